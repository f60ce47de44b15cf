"""What the parts of the page show beside their figures."""

from __future__ import annotations

import msgspec
import pytest

import ptsim
from ptsim.report import sections
from ptsim.report.facts import Facts
from ptsim.report.page import Section
from ptsim.report.tables import Table
from ptsim.sim.options import Options
from ptsim.trace.pairs import compare_runs
from ptsim.trace.trace import Trace
from tests.report.simulated import FixedProjector, epoch_projection, run_projection
from tests.traces import dense_trace, shrinking_trace


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "shown_figures", lambda *_: ())


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    folder = tmp_path_factory.mktemp("sections")
    paths = [dense_trace(folder / "d.jsonl", epochs=3), shrinking_trace(folder / "p.jsonl", epochs=3, batch_step=0)]
    return [ptsim.read_trace(path) for path in paths]


def table_of(section: Section, name: str) -> Table:
    (table,) = [table for table in section.tables if table.name == name]
    return table


def test_a_checked_run_has_its_mean_error_and_the_share_of_epochs_inside_their_interval(traces: list[Trace]) -> None:
    """Epochs that took 1, 5/4 and 4/5 of what the first one says: errors of 0, minus a fifth and a quarter."""
    dense, pruned = traces
    profile = dense.profiles[0]
    close = msgspec.structs.replace(profile, step_low_s=0.99 * profile.step_s, step_high_s=1.01 * profile.step_s)
    epochs = tuple(
        msgspec.structs.replace(e, measured_time=msgspec.structs.replace(e.time, wall_s=share * e.time.wall_s))
        for e, share in zip(dense.epochs, (1.0, 1.25, 0.8), strict=True)
    )
    dense = msgspec.structs.replace(dense, epochs=epochs, profiles=(close,))
    facts = Facts([dense, pruned], compare_runs([dense, pruned]), validation=ptsim.validate([dense, pruned]))
    section = sections.validation_section(facts)
    row, _ = table_of(section, "validation").frame.to_dict("records")
    assert row["epoch_error"] == pytest.approx((0.2 + 0.25) / 3)
    assert row["inside_fraction"] == pytest.approx(1 / 3)
    assert row["error"] == pytest.approx(3 / 3.05 - 1)
    assert "up to 1.60 times as long" in row["notes"]  # (5/4 · 1.05 - 0.05) to (4/5 · 1.05 - 0.05), without the input
    (saving,) = table_of(section, "savings_checked").frame.to_dict("records")
    assert (saving["dense"], saving["pruned"]) == ("dense", "PruneTrain r=0.2")
    why = sections.validation_section(Facts([dense], [], unchecked="Nobody looked."))
    assert (why.paragraphs, why.tables) == (("Nobody looked.",), ())


def test_memory_is_projected_epoch_by_epoch_and_estimated_where_somebody_trained(traces: list[Trace]) -> None:
    epochs = tuple(epoch_projection(epoch=n, peak_memory_bytes=(n + 1) * 2**30) for n in range(2))
    projection = run_projection(epochs=epochs)
    projector = FixedProjector({False: projection, True: projection})
    facts = Facts(traces, compare_runs(traces), projectors=[projector], sizes=[4], focus=4)
    for _, rows in facts.epochs.groupby("run"):
        assert list(rows.projected_memory_bytes[:2]) == [2**30, 2**31]
        assert rows.projected_memory_bytes[2:].isna().all()  # nothing was projected there
        assert rows.estimated_memory_bytes.notna().all()
    table = table_of(sections.costs_section(facts), "architectures")
    assert table.caption.endswith("Projected memory is that of a GPU of dgx-a100 when 4 GPUs train.")
    assert "passes" not in [column.heading for column in table.columns]


@pytest.mark.parametrize("epochs", [1, 2])
def test_runs_of_different_length_say_how_long_they_are(traces: list[Trace], epochs: int) -> None:
    short = run_projection(epochs=tuple(epoch_projection(epoch=number) for number in range(epochs)))
    projector = FixedProjector({False: run_projection(), True: short})
    facts = Facts(traces, compare_runs(traces), projectors=[projector], sizes=[4], focus=4)
    table = table_of(sections.scaling_section(facts), "projections")
    assert list(table.frame.epochs) == [1, epochs]
    assert ("epochs" in [column.heading for column in table.columns]) == (epochs > 1)


def test_architectures_that_were_trained_in_several_passes_say_so(traces: list[Trace]) -> None:
    dense = traces[0]
    accumulated = tuple(msgspec.structs.replace(epoch, passes=4) for epoch in dense.epochs[:2]) + dense.epochs[2:]
    projection = run_projection(epochs=tuple(epoch_projection(epoch=epoch.epoch) for epoch in dense.epochs))
    facts = Facts(
        [msgspec.structs.replace(dense, epochs=accumulated)],
        [],
        projectors=[FixedProjector({False: projection})],
        sizes=[4],
        focus=4,
    )
    table = table_of(sections.costs_section(facts), "architectures")
    assert "passes" in [column.heading for column in table.columns]
    assert list(zip(table.frame.passes, table.frame.first_epoch, strict=True)) == [(4, 0), (1, 2)]


def test_money_and_energy_are_shown_with_the_price_that_they_are_at(traces: list[Trace]) -> None:
    options = Options(price_usd_per_gpu_hour=2.0)
    dense, pruned = run_projection(100.0), run_projection(80.0)
    facts = Facts(
        traces,
        compare_runs(traces),
        projectors=[FixedProjector({False: dense, True: pruned}, options=options)],
        sizes=[4],
        focus=4,
    )
    section = sections.scaling_section(facts)
    assert [table.name for table in section.tables] == ["projections", "savings", "energy", "saved_energy"]
    assert table_of(section, "energy").caption.endswith(" Money is at 2.00 USD per GPU-hour.")
    nothing = msgspec.structs.replace(dense, energy_j=None, price=None)
    unknown = FixedProjector({False: nothing, True: nothing})
    bare = Facts(traces, compare_runs(traces), projectors=[unknown], sizes=[4], focus=4)
    assert [table.name for table in sections.scaling_section(bare).tables] == ["projections", "savings"]


def test_a_report_without_a_cluster_shows_what_was_recorded(traces: list[Trace]) -> None:
    facts = Facts(traces, compare_runs(traces))
    assert [section.name for section in sections.make_sections(facts)] == ["runs", "methods"]
    runs = sections.runs_section(facts)
    assert [table.name for table in runs.tables] == ["measured_savings", "runs", "reconfigurations"]
    assert (runs.title, table_of(runs, "runs").title) == ("The recorded runs", "The recorded runs.")
    assert [c.name for c in table_of(runs, "runs").columns[:2]] == ["run", "state"]  # network, data and seed are shared
    assert table_of(runs, "reconfigurations").folded
    (alone,) = [t for t in sections.runs_section(Facts(traces[1:], [])).tables if t.name == "reconfigurations"]
    assert not alone.folded


def test_the_time_of_every_part_is_a_column(traces: list[Trace]) -> None:
    projection = run_projection(130.0)
    projector = FixedProjector({False: projection, True: projection})
    facts = Facts(traces, compare_runs(traces), projectors=[projector], sizes=[4], focus=4)
    frame = table_of(sections.time_section(facts), "breakdown").frame
    assert list(frame.run) == ["dense", "PruneTrain r=0.2"]
    assert list(frame["exposed communication_seconds"]) == [7.5, 7.5]
    assert list(frame["start and reconfiguration_seconds"]) == [10.0, 10.0]
