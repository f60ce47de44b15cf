from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptsim.cli.main import run
from ptsim.sim import budget
from tests.traces import shrinking_trace


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(shrinking_trace(tmp_path))


def test_json_has_a_document_per_gpu_count(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", trace, "--cluster", "dgx-a100", "--gpus", "1,8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["gpus"] for row in rows] == [1, 8]
    keys = (
        "gpus total_seconds compute_seconds exposed_communication_seconds allreduce_bytes_per_gpu energy_joules "
        "cost_usd low_seconds high_seconds"
    )
    assert set(keys.split()) <= set(rows[0])
    assert len(rows[0]["epochs"]) == 6


def test_the_help_shows_what_holds_where_nothing_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for default in ("weak", "fp32", "25.0", "formula", "1", "0"):  # torch's cap of a bucket: 25 MiB
        assert f"[default: {default}]" in out


def test_people_get_tables_and_the_notes(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", trace, "--cluster", "dgx-a100", "--gpus", "1,12", "--price", "2.5"]) == 0
    out = capsys.readouterr().out
    assert "90 % interval" in out
    assert "USD" in out
    assert "do not fill nodes" in out


def test_people_are_told_the_utilisation_that_json_has(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", trace, "--cluster", "dgx-a100", "--gpus", "1,8"]
    assert run([*command, "--json"]) == 0
    fractions = [row["mfu_fraction"] for row in json.loads(capsys.readouterr().out)]
    assert run(command) == 0
    table = capsys.readouterr().out.split("GPU-hours")[1]
    assert table.lstrip().startswith("MFU")
    assert re.findall(r"(\S+%)", table.split("note:")[0]) == [f"{fraction:.1%}" for fraction in fractions]


def test_what_a_run_waits_for_has_a_column_where_it_waits(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", trace, "--cluster", "dgx-a100", "--gpus", "1,8"]
    for options, shown in (
        ([], ()),
        (["--jitter", "0.1"], ("slow, failed",)),
        (["--mtbf-gpu-hours", "1e-3"], ("slow, failed",)),
        (["--jitter", "0.1", "--mtbf-gpu-hours", "1", "--input-images-per-s", "9"], ("input wait", "slow, failed")),
    ):
        assert run([*command, *options]) == 0
        (headings,) = (line for line in capsys.readouterr().out.splitlines() if "speed-up" in line)
        assert [name for name in ("input wait", "slow, failed") if name in headings] == list(shown)


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "TRACE", "--gpu", "a100"],
        ["allreduce", "--cluster", "dgx-a100", "--gpus", "8", "--bytes", "25MiB"],
        ["simulate", "TRACE", "--cluster", "dgx-a100"],
        ["validate", "TRACE"],
    ],
)
def test_every_command_writes_an_interval_alike(
    command: list[str], trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([trace if word == "TRACE" else word for word in command]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d( [^\W\d]+)? to \d", out)
    assert not re.search(r"\d ?([^\W\d]+ ?)?– ?\d", out)


def test_a_note_of_some_gpu_counts_names_them_and_under_json_it_stands_beside_its_count(
    trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch has 78 mini-batches of 64 images, 52 of 96 or 39 of 128.

    16 GPUs take 3 · 16 of 39 (4 · 16 of 52, 23.1 % more), 32 take 2 · 32 of 39, 64 take 64 of 39 (64.1 % more).
    """
    command = ["simulate", trace, "--cluster", "dgx-a100", "--gpus"]
    note = "the last mini-batch of an epoch is not full and counts as a whole step: up to {} more than the images need"
    assert run([*command, "32,64,16"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"note: 32 and 64 GPUs: {note.format('64%')}" in out
    assert f"note: 16 GPUs: {note.format('23%')}" in out
    assert run([*command, "32,64"]) == 0
    assert f"note: {note.format('64%')}" in " ".join(capsys.readouterr().out.split())
    assert run([*command, "32,64,16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["gpus"], [n for n in row["notes"] if "is not full" in n]) for row in rows] == [
        (gpus, [note.format(share)]) for gpus, share in ((32, "64%"), (64, "64%"), (16, "23%"))
    ]


def test_a_list_price_is_printed_with_its_day_unless_another_is_given(
    trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", trace, "--cluster", "aws-p3-16xlarge"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "3.06 USD per GPU-hour, the list price of 2026-09-24 for whole instances of 8 GPUs" in out
    assert "note: 1 GPU is billed as 8: at the list price one rents whole instances of 8 GPUs" in out
    assert run(["simulate", trace, "--cluster", "aws-p3-16xlarge", "--price", "2.5"]) == 0
    out = capsys.readouterr().out
    assert "2.50 USD per GPU-hour" in out
    assert "list price" not in out
    assert "billed" not in out


def test_json_says_what_the_price_is_and_where_it_is_from(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", trace, "--cluster", "aws-p3-16xlarge", "--gpus", "8,9", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["price_usd_per_gpu_hour"], row["price_date"]) for row in rows] == [(3.06, "2026-09-24")] * 2
    assert rows[0]["price_source"].startswith("AWS Price List, ")
    assert [row["billed_gpus"] for row in rows] == [8, 16]
    assert [row["cost_usd"] for row in rows] == pytest.approx(
        [3.06 * gpus * row["total_seconds"] / 3600 for gpus, row in zip((8, 16), rows, strict=True)]
    )
    assert run(["simulate", trace, "--cluster", "aws-p3-16xlarge", "--gpus", "9", "--price", "2", "--json"]) == 0
    (given,) = json.loads(capsys.readouterr().out)
    assert (given["price_date"], given["price_source"], given["billed_gpus"]) == (None, "given by the user", 9)
    assert given["cost_usd"] == pytest.approx(2 * 9 * given["total_seconds"] / 3600)
    assert run(["simulate", trace, "--cluster", "dgx-a100", "--json"]) == 0
    (unpriced,) = json.loads(capsys.readouterr().out)
    names = ("price_usd_per_gpu_hour", "price_date", "price_source", "billed_gpus", "cost_usd")
    assert [unpriced[name] for name in names] == [None] * 5


def test_a_gpu_count_that_is_named_twice_is_projected_once(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", trace, "--cluster", "dgx-a100", "--gpus", "8,1,8", "--json"]) == 0
    assert [row["gpus"] for row in json.loads(capsys.readouterr().out)] == [8, 1]


def test_several_traces_are_projected_one_after_the_other(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", trace, trace, "--cluster", "dgx-a100", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_equal_seeds_print_equal_bytes(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", trace, "--cluster", "dgx-a100", "--gpus", "16", "--jitter", "recorded", "--json"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert run([*command, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_links_are_named_with_their_blanks(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", trace, "--cluster", "dgx-a100", "--gpus", "64", "--json", "--network", "links"]
    assert run(command) == 0
    (whole,) = json.loads(capsys.readouterr().out)
    assert run([*command, "--set", "link-bandwidth.node 3 out nic 1=0.01"]) == 0
    (slow,) = json.loads(capsys.readouterr().out)
    assert slow["exposed_communication_seconds"] > 2 * whole["exposed_communication_seconds"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--cluster", "dgx-a100", "--network", "links", "--set", "link_bandwidth.wire 1=2"], "'wire 1'"),
        (["--cluster", "dgx-z9"], "unknown cluster 'dgx-z9'"),
        (["--cluster", "missing.toml"], "missing.toml"),
        (["--cluster", "dgx-a100", "--gpus", "0"], "gpus '0'"),
        (["--cluster", "dgx-a100", "--gpus", "1,,2"], "gpus '1,,2'"),
        (["--cluster", "dgx-a100", "--scaling", "up"], "scaling"),
        (["--cluster", "dgx-a100", "--jitter", "much"], "jitter 'much'"),
        (["--cluster", "dgx-a100", "--set", "nonsense"], "'nonsense' is not name=value"),
        (["--cluster", "dgx-a100", "--set", "nonsense=1"], "nonsense"),
        (["--cluster", "dgx-a100", "--set", "seed.x=1"], "option seed: Expected `int`, got `object`"),
        (["--cluster", "dgx-a100", "--set", "mixed-devices.rtx-9090=1"], "unknown device 'rtx-9090'"),
        ([], "cluster"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(
    trace: str, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", trace, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert problem in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("gpus_per_node", "gpus_per_nod"), "gpus_per_nod"),
        (('bandwidth = "', 'bandwidth = "0 B/s" #'), "intra.bandwidth"),
    ],
)
def test_a_broken_cluster_file_names_file_and_key(
    trace: str, tmp_path: Path, change: tuple[str, str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
name = "mine"
device = "a100-sxm4-40gb"
gpus_per_node = 4
[intra]
name = "NVLink"
bandwidth = "100 GB/s"
latency = "2 us"
[sources]
default = "measured"
"""
    file = tmp_path / "mine.toml"
    file.write_text(text)
    assert run(["simulate", trace, "--cluster", str(file), "--gpus", "4"]) == 0
    capsys.readouterr()
    file = tmp_path / "broken.toml"
    file.write_text(text.replace(*change))
    assert run(["simulate", trace, "--cluster", str(file)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert problem in error


@pytest.mark.slow
def test_projecting_imports_no_torch(trace: str) -> None:
    code = (
        "import sys; from ptsim.cli.main import run; "
        f"run(['simulate', {trace!r}, '--cluster', 'dgx-a100', '--gpus', '8']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.fixture
def few_events() -> Iterator[None]:
    token = budget._limit.set(5)
    yield
    budget._limit.reset(token)


@pytest.mark.parametrize(
    "options",
    [
        ["--mtbf-gpu-hours", "1e6", "--set", "faults.checkpoint_interval_s=0.01"],
        pytest.param(["--network", "links", "--set", "jobs=2", "--set", "placement=striped"], marks=pytest.mark.slow),
        ["--micro-batches", "8"],
        ["--micro-batches", "2", "--timeline", "steps.json"],
    ],
    ids=["failures", "chunks on links", "passes", "a timeline"],
)
def test_what_takes_many_events_asks_for_yes_and_with_it_gives_the_same_answer(
    trace: str,
    options: list[str],
    few_events: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["simulate", trace, "--cluster", "dgx-a100", "--gpus", "16", "--json", *options]
    assert run(command) == 2
    error = capsys.readouterr().err
    assert re.search(r"would take about \S+ events, more than the limit of 5e\+00", error)
    assert "--yes of simulate and sweep simulates them all the same" in error
    assert run([*command, "--yes"]) == 0
    asked = json.loads(capsys.readouterr().out)
    budget._limit.set(budget.MOST_EVENTS)
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out) == asked
    assert (tmp_path / "steps.json").exists() == ("--timeline" in options)


def test_a_trace_that_tells_of_more_passes_than_anybody_waits_for_is_not_simulated(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = tmp_path / "many.jsonl"
    text = Path(trace).read_text()
    text = re.sub(r'"batch_per_gpu":\d+', f'"batch_per_gpu":{2**31}', text)
    many.write_text(text.replace('"passes":1', f'"passes":{2**30}'))
    assert run(["simulate", str(many), "--cluster", "dgx-a100", "--gpus", "8"]) == 2
    assert "simulating the steps would take about" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["jobs=1000000000", "channel_multiple=10000000000"])
def test_a_number_that_no_cluster_and_no_kernel_has_is_refused(
    trace: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", trace, "--cluster", "dgx-a100", "--set", option]) == 2
    assert "expected between 1 and" in capsys.readouterr().err


def test_a_time_line_that_could_not_be_written_is_found_before_the_simulation(
    trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ptsim.cli.simulate.project", lambda *_, **__: pytest.fail("this comes too late"))
    (tmp_path / "file").touch()
    (tmp_path / "steps.json").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name, sentence in (
        ("file", "file is a file, expected a folder"),
        ("file/steps.json", "cannot be written"),
        ("steps.json", "steps.json is a folder, expected a file to write"),
    ):
        path = str(tmp_path / name)
        assert run(["simulate", trace, "--cluster", "dgx-a100", "--timeline", path]) == 2
        assert sentence in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
