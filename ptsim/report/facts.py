"""What a report is about: the runs, where they are projected, and every table made of them, each computed once.

Figures and sections take these `Facts` and pick the tables that they show.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pandas as pd

from ptsim.answers.validate import Validation
from ptsim.report import answer, causes, frames, projected
from ptsim.report.projected import LabelledRun, Projector
from ptsim.trace.pairs import Comparison
from ptsim.trace.trace import Trace


class Facts:
    """The inputs of a report, and its tables as properties; nothing is computed before it is asked for."""

    def __init__(
        self,
        traces: Sequence[Trace],
        comparisons: Sequence[Comparison],
        *,
        projectors: Sequence[Projector] = (),
        sizes: Sequence[int] = (),
        focus: int = 1,
        validation: Validation | None = None,
        unchecked: str = "",
    ) -> None:
        """Nothing is checked here.

        Args:
            traces: all runs of the report.
            comparisons: of `pairs.compare_runs`.
            projectors: one per cluster; the page is about the first one's. Without any, only what was recorded is
                shown.
            sizes: numbers of GPUs, sorted.
            focus: the one that the page looks into.
            validation: of the runs themselves; None where they cannot be predicted again.
            unchecked: why not.
        """
        self.traces, self.comparisons = tuple(traces), tuple(comparisons)
        self.projectors, self.sizes, self.focus = tuple(projectors), tuple(sizes), focus
        self.validation, self.unchecked = validation, unchecked

    @property
    def is_projected(self) -> bool:
        """There is a cluster, and a run with an epoch to project onto it."""
        return bool(self.projectors and self.labelled)

    @property
    def projector(self) -> Projector:
        """Of the cluster that the page is about."""
        return self.projectors[0]

    @functools.cached_property
    def labelled(self) -> list[LabelledRun]:
        """`projected.labelled_runs`."""
        return projected.labelled_runs(self.traces, self.comparisons)

    @functools.cached_property
    def recorded(self) -> pd.DataFrame:
        """`frames.runs_frame`."""
        return frames.runs_frame(self.traces)

    @functools.cached_property
    def epochs(self) -> pd.DataFrame:
        """`frames.costs_frame`, the measured and counted quantities of every epoch, and `projected_memory_bytes`.

        That is what a step takes at most on the page's cluster and number of GPUs. `estimated_memory_bytes` is of the
        device that recorded the run, and missing where none did.
        """
        costs = frames.costs_frame(self.traces)
        if costs.empty or not self.is_projected:
            return costs
        there = {
            (run.label, epoch.epoch): float(epoch.peak_memory_bytes)
            for run in self.labelled
            for epoch in self.projector.run(run.trace, self.focus).epochs
        }
        projected_bytes = [there.get(key, math.nan) for key in zip(costs.run, costs.epoch, strict=True)]
        return costs.assign(
            projected_memory_bytes=projected_bytes,
            estimated_memory_bytes=costs.estimated_memory_bytes.where(costs.device_kind != "none"),
        )

    @functools.cached_property
    def measured_savings(self) -> pd.DataFrame:
        """`frames.measured_savings_frame`."""
        return frames.measured_savings_frame(self.comparisons)

    @functools.cached_property
    def projections(self) -> pd.DataFrame:
        """`projected.projections_frame` on the page's cluster."""
        return projected.projections_frame(self.labelled, self.projector, self.sizes)

    @functools.cached_property
    def savings(self) -> pd.DataFrame:
        """`projected.savings_frame` on the page's cluster."""
        return projected.savings_frame(self.comparisons, self.projector, self.sizes)

    @functools.cached_property
    def shown(self) -> LabelledRun:
        """The run that the page looks into: the pruned one of the headline, or the first."""
        if self.savings.empty:
            return self.labelled[0]
        best = answer.fastest(self.savings, self.focus).run
        return next(run for run in self.labelled if run.label == best)

    @functools.cached_property
    def comparison(self) -> Comparison | None:
        """That of the shown run; None where nothing is compared."""
        return next((c for c in self.comparisons if c.label == self.shown.label), None)

    @functools.cached_property
    def excess(self) -> pd.DataFrame:
        """`causes.excess_frame` of the shown run; empty where nothing is compared."""
        if self.comparison is None:
            return pd.DataFrame()
        return causes.excess_frame(self.comparison, self.projector, self.focus)

    @functools.cached_property
    def breakdown(self) -> pd.DataFrame:
        """`projected.breakdown_frame`."""
        return projected.breakdown_frame(self.labelled, self.projector, self.sizes)

    @functools.cached_property
    def layers(self) -> pd.DataFrame:
        """`projected.layers_frame` of the shown run."""
        return projected.layers_frame(self.shown, self.projector)

    @functools.cached_property
    def scenarios(self) -> pd.DataFrame:
        """`scenarios.scenarios_frame`: every run on every cluster."""
        from ptsim.report.scenarios import scenarios_frame

        return scenarios_frame(self)

    @functools.cached_property
    def break_even(self) -> pd.DataFrame:
        """`scenarios.break_even_frame`: from where on pruning pays; empty where nothing is compared."""
        from ptsim.report.scenarios import break_even_frame

        return break_even_frame(self)

    @functools.cached_property
    def checks(self) -> pd.DataFrame:
        """`frames.validation_frame`; empty where the runs cannot be predicted again."""
        if self.validation is None:
            return pd.DataFrame()
        return frames.validation_frame(self.trained, self.validation)

    @property
    def trained(self) -> list[Trace]:
        """The runs with an epoch that somebody trained: what can be predicted again, in the order of `traces`."""
        return [trace for trace in self.traces if trace.epochs and not trace.is_planned]
