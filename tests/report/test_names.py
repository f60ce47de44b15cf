"""Names that somebody else chose, on their way into every output."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from markupsafe import Markup

from ptsim.cli.main import run as command
from ptsim.report.build import write_report
from ptsim.report.page import csv_text, harmless
from ptsim.textfile import printable
from tests.report.test_page import checked
from tests.traces import shrinking_records, shrinking_trace, write_trace

NAMES = {
    "script": "<script>alert(1)</script>",
    "quotes": "a\"b'c`d",
    "newline": "two\nlines\r\x1b[31mred",
    "right to left": "abc\u202edef\u2067",
    "formula of a spreadsheet": "=cmd|' /C calc'!A0",
    "formula of matplotlib": "$a_$b and $x$",
    "markup of rich": "[red]warning[/b]",
    "long": "n" * 300,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_does_no_harm_on_the_page_in_its_figures_and_in_its_tables(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"epochs": 3, "interval": 1, "model": name, "dataset": name, "device": name}
    trace = write_trace(tmp_path / "t.jsonl", shrinking_records(**options))  # type: ignore[arg-type]
    assert command(["report", str(trace), "-o", str(tmp_path / "out"), "--cluster", "dgx-a100", "--gpus", "1,8"]) == 0
    out = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u2067]", out)
    page = (tmp_path / "out" / "index.html").read_text()
    assert not re.search("[\u202e\u2067\x1b]", page)
    assert "<script>alert" not in page
    assert checked(tmp_path / "out" / "index.html").open == []
    for file in (tmp_path / "out" / "tables").glob("*.csv"):
        with file.open(newline="") as stream:
            for row in csv.reader(stream):
                for cell in row:
                    assert not cell.startswith(("=", "@", "+"))
                    assert not cell.startswith("-") or float(cell) < 0  # a number
    assert list((tmp_path / "out" / "figures").glob("*.svg"))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_in_a_chrome_trace_is_text_on_one_line(name: str, tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", epochs=1, model=name)
    assert command(["export", str(trace), "-f", "chrome", "-o", str(tmp_path / "t.json")]) == 0
    document = json.loads((tmp_path / "t.json").read_text())
    names = [event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"]
    assert printable(name) in names[0]


def test_cells_that_a_spreadsheet_would_run_are_text_and_numbers_stay_numbers() -> None:
    frame = pd.DataFrame({"name": ["=1+1", "@x", "-y", "+z", "plain"], "value": [-1.5, 2.0, float("nan"), 0.0, 1e-9]})
    lines = csv_text(frame).splitlines()
    assert lines == ["name,value", "'=1+1,-1.5", "'@x,2.0", "'-y,", "'+z,0.0", "plain,1e-09"]


def test_what_acts_is_replaced_and_what_is_long_is_shortened_in_the_middle() -> None:
    assert printable("a\tb\n c\x1b[0m\u202ed") == "a b c\ufffd[0m\ufffdd"
    assert printable("abcdefghij", 5) == "ab…ij"
    assert printable("abcde", 5) == "abcde"


@pytest.mark.slow
def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", epochs=1)
    page = write_report([trace], tmp_path / "out", gpus=[1])
    before = page.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ptsim.report.page.write_whole", full)
    assert command(["report", str(trace), "-o", str(tmp_path / "out"), "--gpus", "1"]) == 2
    assert page.read_bytes() == before


def test_text_of_the_page_has_no_character_that_acts_and_keeps_its_soft_hyphens() -> None:
    assert harmless("a\u202eb\x1bc communi\u00adcation ") == "a\ufffdb\ufffdc communi\u00adcation "
    assert harmless(Markup("<b>\u202e</b>")) == Markup("<b>\u202e</b>")  # the page's own
    assert harmless(3) == 3
