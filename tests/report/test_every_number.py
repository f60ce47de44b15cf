"""Every number that a page shows is in a table beside it, in the command's JSON, or known beforehand: to its digits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest
from matplotlib.text import Text

import ptsim
from ptsim.cli.main import run as command
from ptsim.report.build import Report, make_report, write
from ptsim.report.page import ShownFigure
from ptsim.trace.schema import NO_DEVICE
from ptsim.trace.trace import Trace
from tests.traces import dense_trace, shrinking_trace

# What one of every unit is; written out here, so that a wrong factor in the report is seen.
UNITS = {
    **{"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9},
    **{"B": 1.0, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3, "TiB": 1024.0**4},
    **{
        "J": 1.0,
        "kJ": 1e3,
        "kWh": 3.6e6,
        "MWh": 3.6e9,
        "g": 1.0,
        "kg": 1e3,
        "t": 1e6,
        "USD": 1.0,
        "%": 0.01,
        "points": 1.0,
    },
    **{"MAC": 1.0, "kMAC": 1e3, "MMAC": 1e6, "GMAC": 1e9, "TMAC": 1e12, "PMAC": 1e15},
    **{"million": 1e6, "thousand": 1e3, "": 1.0},
}
NUMBER = re.compile(r"(?<![\w.,])[\u2212+]?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?: ?(%)| (?:GPU-)?([A-Za-zµ]+))?")
PRICE, GRID = 2.5, 400.0
# Said by the page of itself: confidence, ways of counting, filter sizes, and what the user gave.
KNOWN = {"90 %", "100 %", "80 %", "9", "10", "1 MAC", "2", "4", "3", "0", "89", "90", f"{PRICE:.2f} USD", "400 g"}
DATE = re.compile(r"\b\d{4}-\d\d-\d\d\b")


def planned(path: Path) -> Trace:
    """The run as if somebody had only planned it."""
    trace = ptsim.read_trace(path)
    nothing = {"measured_time": None, "measured_step": None, "validation_accuracy": None, "device": None}
    epochs = tuple(msgspec.structs.replace(epoch, **nothing, peak_memory_bytes=None) for epoch in trace.epochs)
    assert trace.end is not None
    return msgspec.structs.replace(
        trace,
        run=msgspec.structs.replace(trace.run, origin="planned", device=NO_DEVICE),
        epochs=epochs,
        profiles=(),
        end=msgspec.structs.replace(trace.end, final_accuracy=None),
    )


def pair(folder: Path, **options: Any) -> list[Path]:
    return [
        dense_trace(folder / "dense.jsonl", epochs=3, **options),
        shrinking_trace(folder / "pruned.jsonl", epochs=3, interval=1, **options),
    ]


PAGES = ("recorded pair", "planned pair", "several traces, two clusters", "dense only", "pruned only")


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("page")
    recorded = pair(folder)
    traces: list[Path | Trace] = [*recorded]
    clusters = ["dgx-a100"]
    if request.param == "planned pair":
        traces = [planned(path) for path in recorded]
    elif request.param == "dense only":
        traces = traces[:1]
    elif request.param == "pruned only":
        traces = traces[1:]
    elif request.param == "several traces, two clusters":
        traces += [shrinking_trace(folder / "seed.jsonl", epochs=3, interval=1, seed=1)]
        clusters += ["ethernet-1g"]
    report = make_report(traces, cluster=clusters, gpus=[1, 8], price_usd_per_gpu_hour=PRICE, grid_grams_per_kwh=GRID)
    return report, write(report, folder / "out").parent


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path)


def digits(text: str) -> tuple[float, float]:
    """The number that is shown, and half of its last digit."""
    plain = text.replace(",", "").replace("\N{MINUS SIGN}", "-").replace("+", "")
    return float(plain), 0.5 * 10.0 ** -len(plain.partition(".")[2])


def agrees(text: str, value: float) -> bool:
    number, half = digits(text)
    return abs(number - value) <= half * (1 + 1e-6) + 1e-12 * abs(value)


@pytest.mark.slow
def test_every_cell_is_its_value_in_the_csv_rounded_once(page: tuple[Report, Path]) -> None:
    report, out = page
    cells = 0
    for table in [table for section in report.sections for table in section.tables]:
        frame = read(out / "tables" / f"{table.name}.csv")
        assert len(frame) == len(table.rows)
        for position, column in enumerate(table.columns):
            if column.kind != "number":
                continue
            factor = UNITS[column.unit.removesuffix("/image")]
            for row, value in zip(table.rows, frame[column.name], strict=True):
                cell = row[position]
                assert cell.missing == math.isnan(value)
                if not cell.missing:
                    assert agrees(cell.text, value / factor), (table.name, column.name, cell.text, value)
                    cells += 1
    assert cells > 100


def values(out: Path) -> dict[str, list[float]]:
    """What the tables hold, by the last word of their columns; shares of rows and columns that the page forms too."""
    found: dict[str, list[float]] = {"": []}
    for path in sorted(out.glob("*/*.csv")):
        frame = read(path)
        for name in frame.select_dtypes("number"):
            words = str(name).removesuffix("_per_image").split("_")
            kind = "fraction" if {"fraction", "accuracy", "sparsity", "error"} & set(words) else words[-1]
            kind = kind if kind in ("seconds", "bytes", "joules", "macs", "usd", "grams", "fraction") else ""
            if "seconds" in words or "bytes" in words or "joules" in words or "usd" in words or "grams" in words:
                kind = next(word for word in ("seconds", "bytes", "joules", "usd", "grams") if word in words)
            kind = "points" if words[-1] == "points" else kind
            found.setdefault(kind, []).extend(abs(float(value)) for value in frame[name].dropna())
    for name in ("projections", "layers"):
        if (out / "tables" / f"{name}.csv").exists():
            frame = read(out / "tables" / f"{name}.csv")
            images: list[float] = list(frame.gpus * frame.first_batch_per_gpu) if name == "projections" else []
            found[""] += [len(frame), *images]  # how many layers there are; images of an update
    if (out / "figures" / "validation.csv").exists():
        found[""].append(len(read(out / "figures" / "validation.csv")))  # epochs of all runs
    return found


def shares(out: Path) -> Iterator[float]:
    """The shares of the head that are quotients of two numbers of a table."""
    if (out / "tables" / "excess.csv").exists():
        excess = read(out / "tables" / "excess.csv")
        yield excess.pruned_seconds.sum() / excess.dense_seconds.sum()
        yield from (excess.pruned_seconds / excess.pruned_seconds.sum()).dropna()
        yield from (excess.pruned_seconds / excess.dense_seconds).replace(math.inf, math.nan).dropna()
        yield min(float(excess.step_floor_fraction.iloc[0]), 1.0)
        yield from (excess.rounded_seconds / excess.pruned_seconds).dropna()
    if (out / "tables" / "savings.csv").exists():
        savings = read(out / "tables" / "savings.csv")
        yield from (savings.pruned_allreduce_bytes_per_gpu / savings.dense_allreduce_bytes_per_gpu).dropna()
        yield from savings.last_inference_macs_per_image / savings.first_inference_macs_per_image
    runs = read(out / "tables" / "runs.csv")
    yield from (runs.last_inference_macs_per_image / runs.first_inference_macs_per_image).dropna()
    if (out / "figures" / "breakdown.csv").exists():  # a bar is a share of the first setting's
        parts = read(out / "figures" / "breakdown.csv")
        totals = parts.groupby(["gpus", "setting"], as_index=False).seconds.sum()
        first = totals[totals.setting == parts.setting.iloc[0]].set_index("gpus").seconds
        yield from totals.seconds / totals.gpus.map(first)
    if (out / "figures" / "validation.csv").exists():
        checks = read(out / "figures" / "validation.csv")
        yield float((checks.predicted_seconds / checks.measured_seconds - 1).abs().mean())
        yield float(checks.measured_seconds.between(checks.low_seconds, checks.high_seconds).mean())


def texts(report: Report) -> Iterator[str]:
    """All sentences of the page, and all words in its figures but those at their axes' scales."""
    head = report.answer
    yield from (report.title, report.byline, head.headline, head.certainty, *head.why, *head.notices)
    for tile in head.tiles:
        yield from (tile.value, tile.detail, tile.origin)
    for section in report.sections:
        yield from section.paragraphs
        yield from (table.caption for table in section.tables)
        for shown in section.figures:
            yield from (shown.caption, *written(shown))


def written(shown: ShownFigure) -> Iterator[str]:
    scales = {
        label
        for axes in shown.figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.findobj(Text)
        if label is not axis.label
    }
    for text in shown.figure.findobj(Text):
        if text not in scales:
            yield " ".join(str(text.get_text()).split())


@pytest.mark.slow
def test_every_number_of_the_sentences_and_figures_is_in_a_table(page: tuple[Report, Path]) -> None:
    report, out = page
    found = values(out)
    found["fraction"] = [*found.get("fraction", []), *map(abs, shares(out))]
    cells = " ".join(
        path.read_text(encoding="utf-8") for path in sorted(out.glob("tables/*.csv")) if path.stem != "answer"
    )
    unknown = [
        (match.group(), text)
        for text in texts(report)
        for match in NUMBER.finditer(DATE.sub("", text))
        if not _known(match, found, cells)
    ]
    assert unknown == []


KINDS = {
    **dict.fromkeys(("h", "min", "s", "ms", "µs", "ns"), "seconds"),
    **dict.fromkeys(("B", "KiB", "MiB", "GiB", "TiB"), "bytes"),
    **dict.fromkeys(("J", "kJ", "kWh", "MWh"), "joules"),
    **dict.fromkeys(("MAC", "kMAC", "MMAC", "GMAC", "TMAC", "PMAC"), "macs"),
    **dict.fromkeys(("g", "kg", "t"), "grams"),
    "USD": "usd",
    "%": "fraction",
    "points": "points",
}


def _known(match: re.Match[str], found: dict[str, list[float]], cells: str) -> bool:
    unit = match.group(3) or match.group(4) or ""
    number = match.group(1) + (match.group(2) or "")
    if (f"{number} {unit}" if unit in KINDS else number) in KNOWN:
        return True
    if unit in KINDS:
        amounts = [value / UNITS[unit] for value in found.get(KINDS[unit], [])]
        amounts += [100 * value for value in found["fraction"] if unit == "points"]  # a change of a share
        if any(agrees(number, value) for value in amounts):
            return True
    elif any(agrees(number, value) for value in found[""]):
        return True
    return re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", cells) is not None  # part of a text, such as a name


@pytest.mark.slow
def test_the_commands_give_what_the_tables_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = [str(path) for path in pair(tmp_path)]
    options = ["--cluster", "dgx-a100", "--gpus", "1,8", "--json"]
    assert command(["report", *traces, "-o", str(tmp_path / "out"), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    for name, rows in document["tables"].items():
        frame = read(tmp_path / "out" / "tables" / f"{name}.csv")
        for column in frame.select_dtypes("number"):
            ours = [math.nan if row[column] in (None, "") else float(row[column]) for row in rows]
            assert ours == pytest.approx(list(frame[column]), rel=1e-15, nan_ok=True), (name, column)
    assert command(["simulate", *traces, *options]) == 0
    simulated = json.loads(capsys.readouterr().out)
    projections = document["tables"]["projections"]
    assert len(simulated) == len(projections) == 4
    for row in simulated:
        (same,) = (p for p in projections if (p["trace"], p["gpus"]) == (row["trace"], row["gpus"]))
        shared = set(row) & set(same) - {
            "model",
            "input_wait_seconds",
            "epochs",
            "notes",
        }  # names; lists; empty if input keeps up
        assert {name: same[name] for name in shared} == {name: row[name] for name in shared}
        assert {"total_seconds", "low_seconds", "cost_usd", "peak_memory_bytes", "energy_joules"} <= shared


@pytest.mark.slow
def test_memory_is_one_number_where_a_run_was_only_planned(tmp_path: Path) -> None:
    """`ptsim simulate` and the page say the same: what a GPU of the cluster takes, not the tensors alone."""
    traces = [planned(path) for path in pair(tmp_path)]
    report = make_report(traces, cluster="dgx-a100", gpus=[8])
    (table,) = (t for section in report.sections for t in section.tables if t.name == "architectures")
    headings = [column.heading for column in table.columns]
    assert "peak memory, projected" in headings
    assert not any(word in heading for heading in headings for word in ("measured", "estimated"))
    projection = ptsim.simulate(traces[0], "dgx-a100", [8])
    dense = table.frame[table.frame.run == "planned dense"]
    assert list(dense.projected_memory_bytes) == list(projection.peak_memory_bytes)
