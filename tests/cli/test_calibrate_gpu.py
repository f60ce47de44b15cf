import pytest
import torch

from ptsim.cli.main import run
from ptsim.hardware.profile_file import read_device_profile
from ptsim.measure import calibrate
from ptsim.measure.nvml import cpu_info
from ptsim.trace.io import read_trace
from tests.traces import shrinking_trace

SMALL = {"widths": (4, 6, 8), "blocks": (1, 1, 1), "input_shape": (3, 8, 8), "batch": 4, "epochs": 2}


@pytest.fixture
def trace(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "_MIN_STEPS_S", 0.0)
    return shrinking_trace(tmp_path / "trace.jsonl", device=cpu_info().name, **SMALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the device profile was not measured on a quiet machine")  # here other tests run
def test_a_trace_is_calibrated_with_its_group_lasso_and_the_path_is_printed(tmp_path, trace, capsys):
    out = tmp_path / "cpu.toml"
    assert run(["calibrate", "gpu", "--device", "cpu", "--out", str(out), "--trace", str(trace), "--no-grid"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    profile = read_device_profile(out)
    assert profile.complete
    assert profile.steps[0].regularizer_s > 0
    assert run(["calibrate", "gpu", "--device", "cpu", "--out", str(out)]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the device profile was not measured on a quiet machine")  # here other tests run
def test_several_traces_are_calibrated_to_the_end(tmp_path, trace, capsys):
    other = shrinking_trace(
        tmp_path / "other" / "trace.jsonl", device=cpu_info().name, **{**SMALL, "widths": (4, 6, 6)}
    )
    out = tmp_path / "cpu.toml"
    arguments = ["--out", str(out), "--trace", str(trace), str(other.parent), "--no-grid", "--rounds", "1"]
    assert run(["calibrate", "gpu", "--device", "cpu", *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    profile = read_device_profile(out)
    assert profile.complete
    runs = [read_trace(path) for path in (trace, other.parent)]
    assert profile.sources == tuple(str(one.path) for one in runs)
    assert {step.architecture for step in profile.steps} == {*runs[0].networks, *runs[1].networks}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_gpu_is_one_sentence(tmp_path, capsys):
    assert run(["calibrate", "gpu", "--device", "cuda", "--out", str(tmp_path / "x.toml")]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "nowhere"], "no trace here"),
        (["--trace", "nowhere", "elsewhere"], "no trace here"),  # several after one --trace
        (["--minutes", "-1"], "minutes is -1"),
        (["--precision", "fp7"], "fp7"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_write_nothing(tmp_path, capsys, arguments, message):
    out = tmp_path / "x.toml"
    assert run(["calibrate", "gpu", "--device", "cpu", "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()
