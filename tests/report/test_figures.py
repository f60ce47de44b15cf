import io
import itertools
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

import ptsim
from ptsim.hardware.catalog import load_cluster
from ptsim.report import figures, frames, projected
from ptsim.report.facts import Facts
from ptsim.report.figures import layers as layer_figures
from ptsim.report.figures import style
from ptsim.report.figures.registry import FIGURES, ReportFigure, figures_of
from ptsim.report.figures.time import PART_COLOURS
from ptsim.report.projected import Projector, labelled_runs
from ptsim.report.scenarios import break_even_frame
from ptsim.sim.options import Options
from ptsim.trace.pairs import compare_runs
from tests.traces import CPU, dense_trace, shrinking_trace

GPUS = [1, 8]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[ptsim.Trace]:
    folder = tmp_path_factory.mktemp("traces")
    paths = [dense_trace(folder / "dense.jsonl"), shrinking_trace(folder / "pruned.jsonl")]
    return [ptsim.read_trace(path) for path in paths]


def facts_of(traces: list[ptsim.Trace]) -> Facts:
    projector = Projector(load_cluster("dgx-a100"), Options())
    return Facts(traces, compare_runs(traces), projectors=[projector], sizes=GPUS, focus=8)


@pytest.fixture(scope="module")
def drawn(traces: list[ptsim.Trace]) -> dict[str, Figure]:
    projector = Projector(load_cluster("dgx-a100"), Options())
    runs = labelled_runs(traces, [])
    pruned = runs[-1]
    costs = frames.costs_frame(traces)
    layers = projected.layers_frame(pruned, projector)
    return {
        "accuracy": figures.accuracy_figure(frames.epochs_of_runs_frame(traces)),
        "shrinking": figures.shrinking_figure(costs[costs.pruned]),
        "memory": figures.memory_figure(costs),
        "allreduce": figures.allreduce_figure(costs),
        "scaling": figures.scaling_figure(projected.projections_frame(runs, projector, GPUS)),
        "saving": figures.saving_figure(projected.savings_frame(compare_runs(traces), projector, GPUS)),
        "breakdown": figures.breakdown_figure(projected.breakdown_frame(runs, projector, GPUS)),
        "epochs": figures.epoch_breakdown_figure(projected.epoch_breakdown_frame(pruned, projector, 8)),
        "layers": figures.layers_figure(layers),
        "roofline": figures.roofline_figure(projected.roofline_frame(pruned, projector)),
        "break_even": figures.break_even_figure(break_even_frame(facts_of(traces))),
        "blocks": figures.blocks_figure(layers),
        "validation": figures.validation_figure(frames.validation_frame(traces, ptsim.validate(traces))),
    }


def test_every_figure_says_hardware_mini_batch_n_and_band(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        foot = " ".join(figure.get_supxlabel().split())
        assert "a100" in foot.lower(), name
        assert "mini-batch" in foot, name
        assert "n = " in foot, name
        assert "and" in foot.lower(), name  # "Band: …" or "No band: …"
        assert "band" in foot.lower(), name


def test_every_axis_has_a_name_and_its_unit(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        bottom = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"][-1]
        assert bottom.get_xlabel(), name


def test_the_lines_of_the_scaling_figure_lie_inside_their_bands(drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["scaling"].axes
    bands = [c.get_datalim(axes.transData) for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    lines = axes.get_lines()
    assert len(bands) == len(lines) == 2
    for line, band in zip(lines, bands, strict=True):
        values = line.get_ydata()
        assert band.y0 <= min(values)
        assert max(values) <= band.y1


def test_the_bars_of_the_breakdown_reach_the_share_they_are_labelled_with(drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["breakdown"].axes
    ends: dict[float, float] = {}
    for bar in axes.patches:
        ends[round(bar.get_y(), 3)] = bar.get_x() + bar.get_width()
    labels = [text.get_text() for text in axes.texts]
    assert [f"{100 * end:.1f} %" for end in ends.values()] == labels
    assert labels[0] == "100.0 %"


def test_drawing_leaves_matplotlibs_settings_alone(traces: list[ptsim.Trace]) -> None:
    before = dict(mpl.rcParams)
    figures.accuracy_figure(frames.epochs_of_runs_frame(traces))
    assert dict(mpl.rcParams) == before


def test_dense_runs_are_grey_and_pruned_ones_coloured() -> None:
    styles = style.run_style(pd.DataFrame({"setting": ["p", "d", "p"], "pruned": [True, False, True]}))
    assert styles["d"][0] in ("#4d4d4d",)
    assert styles["p"][0] in style.COLOURS[1:]
    assert styles["d"][1] != styles["p"][1]  # by dash too, for print


def test_a_cpu_run_is_not_called_a_gpu(tmp_path: Path) -> None:
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", device=CPU))
    foot = figures.accuracy_figure(frames.epochs_of_runs_frame([trace])).get_supxlabel()
    assert "GPU" not in foot
    assert "per process" in " ".join(foot.split())


@pytest.mark.parametrize(("largest", "expected"), [(7200.0, "h"), (7199.0, "min"), (1.9, "ms"), (3e-9, "ns")])
def test_a_unit_is_the_largest_that_leaves_at_least_two(largest: float, expected: str) -> None:
    assert style.scale_for(largest, "seconds")[1] == expected


def test_a_figure_from_outside_is_one_row(traces: list[ptsim.Trace]) -> None:
    def draw(frame: pd.DataFrame) -> Figure:
        figure = Figure()
        figure.subplots().plot(frame.epoch, frame.learning_rate)
        return figure

    row = ReportFigure(
        section="runs",
        title="Learning rate.",
        frame=lambda facts: facts.epochs,
        draw=draw,
        caption=lambda facts: f"Of {len(facts.traces)} runs.",
        needs_projection=False,
    )
    FIGURES.add("learning_rate", row)
    try:
        facts = Facts(traces, compare_runs(traces))
        shown = {name: figure.caption(facts) for name, figure, _ in figures_of("runs", facts)}
    finally:
        FIGURES.remove("learning_rate")
    assert shown["learning_rate"] == "Of 2 runs."
    assert next(iter(shown)) == "accuracy"


def test_layers_above_the_roof_are_counted_and_explained(
    traces: list[ptsim.Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = facts_of(traces)
    frame = pd.DataFrame(
        {"layer": ["a", "b", "a"], "flops_per_second": [3.0, 1.0, 2.5], "peak_flops_per_second": [2.0, 2.0, 2.0]}
    )
    monkeypatch.setattr(layer_figures, "roofline_frame", lambda *_: frame)
    assert "1 layer lies above the roof" in layer_figures.ROOFLINE.caption(facts)
    monkeypatch.setattr(layer_figures, "roofline_frame", lambda *_: frame[frame.flops_per_second < 2])
    assert "above the roof" not in layer_figures.ROOFLINE.caption(facts)


def test_every_own_figure_is_registered_once(traces: list[ptsim.Trace]) -> None:
    facts = facts_of(traces)
    sections = ("time", "scenarios", "scaling", "layers", "costs", "runs")
    found = [name for section in sections for name, _, _ in figures_of(section, facts)]
    assert sorted([*found, "validation"]) == FIGURES.names()  # nothing was validated here


def test_a_name_is_drawn_as_it_is_and_never_as_a_formula() -> None:
    name = "$a_$b ^{ " + "x" * 300
    frame = pd.DataFrame(
        {
            "setting": [name],
            "pruned": [True],
            "run": [name],
            "gpus": [8],
            "total_seconds": [1.0],
            "low_seconds": [0.9],
            "high_seconds": [1.1],
            "device": [name],
        }
    )
    figure = figures.scaling_figure(frame)
    (label,) = (text.get_text() for text in figure.legends[0].get_texts())
    assert label.startswith("$a_$b ^{ x")
    assert len(label) == style.LONGEST_NAME
    assert not figure.legends[0].get_texts()[0].get_parse_math()
    figure.savefig(io.BytesIO(), format="svg")


def test_the_roofline_by_hand(traces: list[ptsim.Trace]) -> None:
    projector = Projector(load_cluster("dgx-a100"), Options())
    run = labelled_runs(traces, [])[0]
    frame = projected.roofline_frame(run, projector).set_index("layer")
    layer = run.trace.network_of(run.trace.epochs[0]).layer("layer1.0.conv1")
    # 16 -> 16 channels, 3x3, 32x32: forward and both gradients; every pass moves input, output and weights, in fp32
    row = frame.loc["layer1.0.conv1"].iloc[0]
    step = projector.step(run.trace, run.trace.epochs[0])
    seconds = next(t.forward_s + t.backward_s for t in step.layers if t.layer == layer.name)
    assert row.flops_per_second == pytest.approx(2 * 3 * 64 * 16 * 16 * 9 * 32 * 32 / seconds)
    assert row.peak_flops_per_second == 19.5e12
    assert row.flops_per_second < min(row.peak_flops_per_second, 10 * row.flops_per_byte * 1.555e12)


def lightness(colour: str) -> float:
    """L* of CIE 1976 of an sRGB colour: what is left of it on paper without colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(colour)]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_neighbours_in_a_bar_differ_in_lightness() -> None:
    shades = [lightness(colour) for colour in PART_COLOURS.values()]
    assert all(abs(one - other) >= 12 for one, other in itertools.pairwise(shades))


@pytest.mark.parametrize(("low", "high"), [(3.0, 4.0), (0.9, 1.3), (2.0, 60.0), (1.0, 1000.0)])
def test_a_logarithmic_axis_has_numbers_whatever_its_range(low: float, high: float) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [low, high])
    axes.set_yscale("log")
    style.label_log_axis(axes.yaxis)
    bottom, top = axes.get_ylim()
    assert sum(bottom <= tick <= top for tick in axes.get_yticks()) >= 2


def test_a_large_bandwidth_is_written_out() -> None:
    frame = pd.DataFrame(
        {
            **{"device": "d", "cluster": "c", "gpus": 8, "batch_per_gpu": 64, "precision": "fp32", "run": "a"},
            **{"setting": "a", "lever": "bandwidth", "value": [225e9 / 8, 14400e9 / 8]},
            **{"saved_fraction": 0.3, "saved_fraction_low": 0.2, "saved_fraction_high": 0.4},
        }
    )
    (axes,) = figures.break_even_figure(frame).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["225", "14,400"]
