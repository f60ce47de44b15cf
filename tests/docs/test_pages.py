import doctest
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ptsim
from ptsim.answers import study
from ptsim.answers.study import configurations, read_study
from ptsim.cli.main import COMMANDS, run
from tests.traces import dense_trace, shrinking_trace

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(set(COMMANDS) - {"clusters"})  # clusters shares the page of devices


def make_help() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_help", DOCS / "make_help.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE_HELP = make_help()


def words(text: str, *, refusal: bool) -> list[str]:
    """Words without frames and line breaks; of a refusal its sentence without the names that the catalog holds."""
    if refusal:
        text = text.split("\nhint:")[0].split("known:")[0]
    return re.sub(r"[│╭╮╰╯─`]", " ", text).split()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_quotes_is_what_the_command_prints(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    quotes = list(MAKE_HELP.QUOTE.finditer(text))
    assert quotes
    for match in quotes:
        command = match.group(2)
        refusal = not command.endswith("--help")
        body = match.group(0).split("```text\n", 1)[1].split("\n```", 1)[0].removeprefix(f"$ {command}\n")
        now = words(MAKE_HELP.quote(command), refusal=refusal)
        assert words(body, refusal=refusal) == now, "regenerate with: python docs/make_help.py"


def test_every_command_has_a_page() -> None:
    assert [page for page in PAGES if not (DOCS / f"{page}.md").is_file()] == []


@pytest.mark.slow
def test_the_examples_of_the_library_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"epochs": 4, "blocks": (1, 1, 1), "widths": (4, 8, 8)}
    dense_trace(tmp_path / "runs" / "dense" / "trace.jsonl", **tiny)
    shrinking_trace(tmp_path / "runs" / "pruned" / "trace.jsonl", **tiny)
    monkeypatch.chdir(tmp_path)
    results = doctest.testfile(str(DOCS / "library.md"), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert results.attempted > 20
    assert results.failed == 0


def test_the_study_of_the_sweep_page_is_as_large_as_it_says_and_names_every_what_if(tmp_path: Path) -> None:
    page = (DOCS / "sweep.md").read_text(encoding="utf-8")
    for name in ("dense", "pruned", "weaker"):
        dense_trace(tmp_path / "runs" / name / "trace.jsonl", epochs=2, blocks=(1, 1, 1), widths=(4, 8, 8))
    (tmp_path / "study.toml").write_text(page.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    stated = int(re.search(r"This one is (\d+) projections", page).group(1))
    assert len(list(configurations(read_study(tmp_path / "study.toml")))) == stated == 2 * 3 * 2 * (3 * 2 + 1)
    table = page.split("| what-if | changes |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z0-9-]+)(?:=[^`]*)?`", table)) == set(study._WHAT_IFS)


# A command of every page whose --json says what the page promises; `demo` trains for a minute and has its own test.
ASKED = {
    "allreduce": "allreduce --cluster dgx-a100 --gpus 16 --bytes 25MiB",
    "cost": "cost pruned --gpu a100",
    "devices": "devices",
    "doctor": "doctor",
    "export": "export pruned --format parquet -o tables",
    "import": "import kineto kineto.json -o mine.toml",
    "inspect": "inspect tiny.py:build",
    "plan": "plan tiny.py:build --images 1000 --epochs 4 --batch 10 --interval 2 --draws 2 "
    "--pruning training=0.75,inference=0.495 -o planned.jsonl",
    "predict": "predict pruned --cluster dgx-a100 --gpus 16",
    "report": "report dense pruned -o page --cluster aws-p3-16xlarge --gpus 8",
    "simulate": "simulate pruned --cluster aws-p3-16xlarge --gpus 8,16",
    "sweep": "sweep study.toml --workers 1",
    "train": "train --model tiny.py:build --dataset synthetic --train-limit 32 --epochs 1 --batch 16 --out trained "
    "--set image_size=8 --set validation_limit=16 --set profile=false --set device=cpu",
    "validate": "validate dense pruned",
}
RELIED_ON = {  # what other people's scripts read; to be there, whatever the pages say
    "allreduce": "seconds algorithm",
    "cost": "inference_macs_per_image training_macs_per_image bn_bytes_per_image parameters peak_memory_bytes",
    "import": "step_seconds exposed_communication_seconds operators",
    "inspect": "groups prunable_channels max_rel_error_eval max_rel_error_train exact",
    "plan": "trace training_flops_fraction inference_flops_fraction bn_bytes_fraction allreduce_bytes_fraction "
    "architectures",
    "predict": "step_seconds images_per_second tier low high peak_memory_bytes",
    "simulate": "gpus total_seconds compute_seconds exposed_communication_seconds allreduce_bytes_per_gpu "
    "energy_joules cost_usd low_seconds high_seconds",
    "train": "trace final_accuracy penalty_coefficient",
    "validate": "whole_run_error epoch_mape memory_mape saving_error_points",
}
RELIED_ON["sweep"] = RELIED_ON["simulate"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense and a pruned run, a network, a study, and steps that torch.profiler recorded."""
    folder = tmp_path_factory.mktemp("place")
    tiny = {"epochs": 4, "blocks": (1, 1, 1), "widths": (4, 8, 8)}
    dense_trace(folder / "dense" / "trace.jsonl", **tiny)
    shrinking_trace(folder / "pruned" / "trace.jsonl", **tiny)
    whole = DOCS.parent / "tests" / "fuzz" / "whole"
    for name in ("tiny.py", "kineto.json"):
        shutil.copy(whole / name, folder)
    (folder / "study.toml").write_text('traces = ["pruned"]\nclusters = ["dgx-a100"]\ngpus = [8]\n')
    return folder


def promised(page: str) -> tuple[set[str], set[str]]:
    """The keys in the first column of the page's table, and all other words with an underscore that look like keys."""
    section = (DOCS / f"{page}.md").read_text(encoding="utf-8").split("## Under `--json`\n")[1].split("\n## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    first = {key for row in rows for span in re.findall(r"`([^`]*)`", row) for key in re.findall(r"\w+", span)}
    return first, {span for span in re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", section) if span not in first}


def keys(document: Any) -> Iterator[str]:
    """All keys of a document, at any depth."""
    for part in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from keys(part)
    if isinstance(document, dict):
        yield from document


@pytest.mark.slow
@pytest.mark.parametrize("page", ASKED)
def test_the_keys_that_a_page_promises_are_in_what_the_command_prints(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert run([*shlex.split(ASKED[page]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (row, *_) = document if isinstance(document, list) else [document]
    first, others = promised(page)
    if page == "devices":  # the page is of both lists
        assert run(["clusters", "--json"]) == 0
        document = [document, json.loads(capsys.readouterr().out)]
    assert first | set(RELIED_ON.get(page, "").split()) <= set(row)
    assert others <= set(keys(document))


def test_every_page_with_keys_is_asked() -> None:
    told = {page.stem for page in DOCS.glob("*.md") if "## Under `--json`\n" in page.read_text(encoding="utf-8")}
    assert told == {*ASKED, "demo"}
    assert all(promised(page)[0] or promised(page)[1] for page in told)


def test_the_functions_that_others_script_against_are_public() -> None:
    relied_on = "read_trace inspect cost predict allreduce simulate validate train load_model plan PruneTrain Recorder"
    assert set(relied_on.split()) <= set(ptsim.__all__)
