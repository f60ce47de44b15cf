import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from ptsim.cli.doctor import EXTRAS, Ability, Examination, Gpu, Machine, examine
from ptsim.cli.main import COMMANDS, run

WHOLE = Machine(
    python="3.12.1",
    system="Linux x86_64",
    cores=16,
    memory_bytes=2**37,
    free_disk_bytes=2**36,
    ptsim="0.1.0",
    torch="2.11.0",
    torchvision="0.26.0",
    cuda="13.0",
    gpus=(Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=80 * 2**30, catalog_name="h100-sxm5-80gb"),),
    nvml="580.1",
    nccl="2.28",
    gloo=True,
    compiler="/usr/bin/c++",
    extras={"onnx": True, "dask": True},
)


def without(**missing: object) -> dict[str, Ability]:
    found = examine(msgspec.structs.replace(WHOLE, **missing))
    return {ability.name: ability for ability in (*found.commands, *found.tiers)}


@pytest.mark.slow
def test_a_machine_that_has_everything_can_do_everything() -> None:
    assert {ability.state for ability in without().values()} == {"yes"}


def test_every_command_is_judged() -> None:
    judged = {ability.name.split()[0] for ability in examine(WHOLE).commands}
    assert judged == set(COMMANDS) - {"doctor"}


def test_without_a_gpu_training_is_slow_and_the_data_sheet_remains() -> None:
    found = without(gpus=(), nvml=None)
    assert {found[name].state for name in ("train", "calibrate gpu", "measured", "profiled")} == {"partly"}
    assert "no NVIDIA driver answers" in found["train"].remedy
    assert {found[name].state for name in ("datasheet", "simulate", "predict", "inspect")} == {"yes"}


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ({"gpus": (), "cuda": None, "nvml": None}, "a machine with a GPU"),
        ({"gpus": (), "cuda": None}, "install one for CUDA"),
        ({"gpus": ()}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_reasons_for_no_gpu_are_told_apart(missing: dict[str, object], remedy: str) -> None:
    assert remedy in without(**missing)["train"].remedy


def test_without_torch_traces_can_still_be_costed_projected_and_reported() -> None:
    found = without(torch=None, torchvision=None, cuda=None, gpus=(), nccl=None, gloo=False)
    assert {found[name].state for name in ("train", "demo", "inspect", "plan", "calibrate gpu", "measured")} == {"no"}
    assert {found[name].state for name in ("simulate", "report", "sweep", "allreduce", "devices")} == {"yes"}
    reasons = {name: found[name].reason.split(":")[0] for name in ("cost", "predict", "validate", "import", "export")}
    traces = dict.fromkeys(("cost", "predict", "validate"), "traces only")
    assert reasons == traces | {"import": "without --model", "export": "without --format onnx"}
    assert {found[name].remedy for name in reasons} == {"pip install torch torchvision"}
    assert found["calibrate network"].reason == "reads nccl-tests logs only"


def test_a_missing_extra_names_what_to_install() -> None:
    found = without(extras={"onnx": False, "dask": False})
    assert found["export"].remedy == "pip install 'ptsim[onnx]'"
    assert found["sweep"].remedy == "pip install 'ptsim[dask]'"


def test_a_gpu_without_nvml_records_no_energy() -> None:
    assert "no power and energy" in without(nvml=None)["train"].reason


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"dev", "docs"}
    for extra, packages in EXTRAS.items():
        assert tuple(re.split(r"[<>=]", needed)[0] for needed in extras[extra]) == packages


def test_this_machine_is_described_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    found = msgspec.convert(json.loads(capsys.readouterr().out), Examination)
    assert found.machine.cores == len(os.sched_getaffinity(0))
    assert run(["doctor"]) == 0
    assert "datasheet" in capsys.readouterr().out


@pytest.mark.slow
def test_a_machine_without_torch_is_described_too() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "from ptsim.cli.main import run; sys.exit(run(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = msgspec.json.decode(done.stdout, type=Examination)
    assert found.machine.torch is None
    assert found.machine.gpus == ()


@pytest.mark.filterwarnings("default")
def test_a_torch_that_cannot_be_imported_is_described_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert run(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    found = msgspec.json.decode(captured.out, type=Examination)
    assert (found.machine.torch, found.machine.gpus) == (None, ())
    assert "warning: torch is installed, but cannot be imported: libcudart.so.13: cannot open" in captured.err
