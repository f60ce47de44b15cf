"""Figures by public functions: each takes a tidy frame, and returns a matplotlib Figure.

from ptsim import plots

trace = ptsim.read_trace("runs/mine")
plots.accuracy_figure(plots.epochs_of_runs_frame([trace])).savefig("accuracy.svg")
plots.scaling_figure(plots.scaling_frame([trace], "dgx-a100", gpus=[1, 8, 64]))

The other frames are made by `ptsim.report.frames` and `ptsim.report.projected`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ptsim.hardware.catalog import load_cluster
from ptsim.report import figures
from ptsim.report.figures import *  # noqa: F403 - the list of figures stands there
from ptsim.report.frames import costs_frame, epochs_of_runs_frame
from ptsim.report.projected import Projector, labelled_runs, projections_frame
from ptsim.sim.options import Options
from ptsim.trace.pairs import compare_runs
from ptsim.trace.trace import Trace

__all__ = ["costs_frame", "epochs_of_runs_frame", "scaling_frame"]
__all__ += figures.__all__


def scaling_frame(traces: Sequence[Trace], cluster: str | Path, gpus: Sequence[int], **options: Any) -> pd.DataFrame:
    """A row per run and cluster size: whole-run seconds with their 90 % interval, parts, bytes, joules and money.

    A pruned run without a dense partner is set beside itself with its first network held.

    Args:
        traces: recorded or planned runs.
        cluster: a catalog's name or a TOML file.
        gpus: cluster sizes.
        options: fields of `ptsim.sim.options.Options`.

    Raises:
        UnknownNameError, FileFormatError: no such cluster.
        UsageError: the cluster has fewer GPUs.
    """
    projector = Projector(load_cluster(cluster), Options(**options))
    return projections_frame(labelled_runs(traces, compare_runs(traces)), projector, gpus)
