import json
from pathlib import Path

import pandas as pd
import pytest

from ptsim.cli.main import run
from ptsim.export import parquet
from ptsim.export.parquet import TABLES
from ptsim.trace.io import read_trace
from tests.traces import dense_trace, shrinking_trace


@pytest.mark.parametrize(("form", "out"), [("chrome", "t.json"), ("chakra", "chakra"), ("parquet", "tables")])
def test_every_format_says_what_it_wrote(
    form: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", epochs=3)
    assert run(["export", str(trace), "--format", form, "--out", str(tmp_path / out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == form
    written = tmp_path / out
    files = {path for path in written.rglob("*") if path.is_file()} if written.is_dir() else {written}
    assert {Path(file) for file in document["files"]} == files


def test_parquet_gives_every_table_back(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", epochs=3)
    assert run(["export", str(trace), "--format", "parquet", "--out", str(tmp_path / "out")]) == 0
    tables = {name: pd.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in TABLES}
    assert len(tables["runs"]) == 1
    assert list(tables["epochs"].epoch) == [0, 1, 2]
    assert tables["layers"].groupby("architecture").parameters.sum().max() == tables["runs"].first_parameters[0]


def test_a_whole_number_of_more_than_64_bits_becomes_a_float(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", epochs=3, status=None)
    lines = trace.read_text(encoding="utf-8").replace('"num_iterations":', '"num_iterations":1000000000000')
    trace.write_text(lines, encoding="utf-8")
    assert run(["export", str(trace), "--format", "parquet", "--out", str(tmp_path / "out")]) == 0
    epochs = pd.read_parquet(tmp_path / "out" / "epochs.parquet")
    assert epochs.select_dtypes("number").to_numpy().max() > 2**63


def test_only_numbers_beyond_64_bits_become_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"least": -(2**63), "less": -(2**63) - 1, "most": 2**63 - 1, "more": 2**63}
    monkeypatch.setattr(parquet, "TABLES", {"t": lambda _: pd.DataFrame([row], dtype=object)})
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1))
    (file,) = parquet.write_parquet(trace, tmp_path / "out")
    kinds = {str(name): str(kind) for name, kind in pd.read_parquet(file).dtypes.items()}
    assert kinds == {"least": "int64", "less": "float64", "most": "int64", "more": "float64"}


def test_tables_without_rows_keep_their_columns(tmp_path: Path) -> None:
    trace = dense_trace(tmp_path / "t.jsonl", epochs=1, profiles=False)
    assert run(["export", str(trace), "--format", "parquet", "--out", str(tmp_path / "out")]) == 0
    profiles = pd.read_parquet(tmp_path / "out" / "profiles.parquet")
    assert profiles.empty
    assert "forward_seconds" in profiles


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["t.jsonl", "--format", "chrome", "--out", "."], "is a folder"),
        (["t.jsonl", "--format", "chakra", "--out", "t.jsonl"], "is a file"),
        (["t.jsonl", "--format", "parquet", "--out", "t.jsonl"], "is a file"),
        (["t.jsonl", "--format", "chrome", "--out", "x.json", "--gpus", "4"], "no effect"),
        (
            ["t.jsonl", "--format", "parquet", "--out", "x", "--sharding", "zero1"],
            "--sharding has no effect on --format par",
        ),
        (["t.jsonl", "--format", "chakra", "--out", "x", "--gpus", "0"], "gpus is 0, expected 1 to"),
        (["t.jsonl", "--format", "chakra", "--out", "x", "--gpus", "16385"], "gpus is 16,385, expected 1 to 16,384"),
        (["t.jsonl", "--format", "gif", "--out", "x"], "chrome"),
        (["nowhere", "--format", "chrome", "--out", "x.json"], "no trace here"),
        (["t.jsonl", "--format", "chrome"], "--out"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dense_trace(Path("t.jsonl"), epochs=1)
    assert run(["export", *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.jsonl"]
