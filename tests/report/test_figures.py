from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

import ptsim
from ptsim.hardware.catalog import load_cluster
from ptsim.report import figures, frames, projected
from ptsim.report.projected import Projector, labelled_runs
from ptsim.sim.options import Options
from ptsim.trace.pairs import compare_runs
from tests.traces import CPU, dense_trace, shrinking_trace

GPUS = [1, 8]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[ptsim.Trace]:
    folder = tmp_path_factory.mktemp("traces")
    paths = [dense_trace(folder / "dense.jsonl"), shrinking_trace(folder / "pruned.jsonl")]
    return [ptsim.read_trace(path) for path in paths]


@pytest.fixture(scope="module")
def drawn(traces: list[ptsim.Trace]) -> dict[str, Figure]:
    projector = Projector(load_cluster("dgx-a100"), Options())
    runs = labelled_runs(traces, [])
    pruned = runs[-1]
    costs = frames.costs_frame(traces)
    layers = projected.layers_frame(pruned, projector.device)
    return {
        "accuracy": figures.accuracy_figure(frames.epochs_frame(traces)),
        "shrinking": figures.shrinking_figure(costs[costs.pruned]),
        "memory": figures.memory_figure(costs),
        "allreduce": figures.allreduce_figure(costs),
        "scaling": figures.scaling_figure(projected.projections_frame(runs, projector, GPUS)),
        "saving": figures.saving_figure(projected.savings_frame(compare_runs(traces), projector, GPUS)),
        "breakdown": figures.breakdown_figure(projected.breakdown_frame(runs, projector, GPUS)),
        "epochs": figures.epoch_breakdown_figure(projected.epoch_breakdown_frame(pruned, projector, 8)),
        "layers": figures.layers_figure(layers),
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
    assert [f"{100 * end:.0f} %" for end in ends.values()] == labels
    assert labels[0] == "100 %"


def test_drawing_leaves_matplotlibs_settings_alone(traces: list[ptsim.Trace]) -> None:
    before = dict(mpl.rcParams)
    figures.accuracy_figure(frames.epochs_frame(traces))
    assert dict(mpl.rcParams) == before


def test_dense_runs_are_grey_and_pruned_ones_coloured() -> None:
    style = figures.run_style(pd.DataFrame({"setting": ["p", "d", "p"], "pruned": [True, False, True]}))
    assert style["d"][0] in ("#4d4d4d",)
    assert style["p"][0] in figures.COLOURS[1:]
    assert style["d"][1] != style["p"][1]  # by dash too, for print


def test_a_cpu_run_is_not_called_a_gpu(tmp_path: Path) -> None:
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", device=CPU))
    foot = figures.accuracy_figure(frames.epochs_frame([trace])).get_supxlabel()
    assert "GPU" not in foot
    assert "per process" in " ".join(foot.split())


@pytest.mark.parametrize(("largest", "expected"), [(7200.0, "h"), (7199.0, "min"), (1.9, "ms"), (3e-9, "ns")])
def test_a_unit_is_the_largest_that_leaves_at_least_two(largest: float, expected: str) -> None:
    assert figures._scale(largest, figures.TIME_SCALES)[1] == expected
