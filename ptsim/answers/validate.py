"""How far are predictions from what was measured? The same runs, predicted from less than they recorded.

What a run *did* is given: which architecture each epoch trained, its mini-batch, its number of iterations. What that
*took* is predicted:

* from the profiles (default): an epoch is its iterations times the profiled step of its architecture, plus input and
  loop as the run's **first** epoch had them per image; reconfigurations that change the network take what the first
  such one took. No other epoch's time is looked at.
* from a device profile (`profile`): steps, input and reconfigurations come from the calibration file only. With
  `holdout` the file may not have been calibrated on any of the runs.
* from the other runs (`holdout` without a file): every run is predicted from what the profiles of the *other* runs
  measured, operator by operator, with the others' input and reconfiguration times.

Energy is the predicted time under the power that NVML saw in the run's first epoch.

Exposed communication of a data-parallel run is predicted where its cluster is given (`cluster`): its steps are
simulated with DDP's buckets and the cluster's all-reduces, the first one after each wrapping without overlap. Without a
cluster it is taken as measured, and that is noted: the run's error then leaves communication out.

A whole run is its training epochs and reconfigurations; validation passes, profiling and checkpoints are left out.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ptsim.answers.repredict import EpochCheck, RunCheck, check_run, source_of
from ptsim.answers.subject import find_trace
from ptsim.costs.tiers import tier_row
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.profile_file import read_device_profile
from ptsim.hardware.spec import Cluster
from ptsim.trace.pairs import time_differences
from ptsim.trace.trace import Trace

Source = Literal["own profiles", "device profile", "other runs"]


class SavingCheck(msgspec.Struct, frozen=True, kw_only=True):
    """A pruned run beside a dense one: the fraction of time per epoch that pruning saved, and the error in points."""

    dense: str
    pruned: str
    measured_saving: float
    predicted_saving: float
    error_points: float


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted against measured.

    Attributes:
        whole_run_error: the largest absolute relative error of a run's time (0.05 is 5 %).
        epoch_mape: mean absolute relative error over all epochs of all runs, a fraction.
        memory_mape: the same for the allocator's peak memory; None where none was measured.
        saving_error_points: the largest error of a saving, in percentage points; None without a pair of runs.
        energy_error: the largest absolute relative error of a run's energy; None where none was measured.
        communication_error: the largest error of a run's exposed communication, as a fraction of the run's time; None
            where none was predicted.
        interval_coverage: fraction of the epochs whose time lies in its 90 % interval.
        source: what the predictions were made from.
        tiers: that contributed.
        reasons: for every key that is null, why.
    """

    whole_run_error: float
    epoch_mape: float
    memory_mape: float | None
    saving_error_points: float | None
    energy_error: float | None
    communication_error: float | None
    interval_coverage: float
    source: Source
    tiers: tuple[str, ...]
    reasons: dict[str, str]
    runs: tuple[RunCheck, ...]
    savings: tuple[SavingCheck, ...]


def validate(
    traces: Sequence[Trace | str | Path],
    profile: DeviceProfile | str | Path | None = None,
    *,
    holdout: bool = False,
    cluster: Cluster | str | Path | None = None,
) -> Validation:
    """Predict every run again and compare with what it recorded; what may be seen is said at the top of this module.

    Args:
        traces: runs, or the paths of their traces.
        profile: of `ptsim calibrate gpu`; None predicts from profiles inside the traces.
        holdout: predict from nothing that the run itself measured.
        cluster: that data-parallel runs ran on, a name or a file: their exposed communication is predicted too.

    Raises:
        UsageError: no trace, a run without a whole epoch, a hold-out that is none, a cluster without a data-parallel
            run, or one that has fewer GPUs than the run.
        MissingMeasurementError: a trace without profiles, or a device profile of another device, precision or data.
        FileFormatError: a broken trace or profile.
    """
    if not traces:
        raise UsageError("no run to validate")
    runs = [find_trace(trace) for trace in traces]
    for trace in runs:
        trace.require_measured("compare predictions with")
        if not trace.epochs:
            raise UsageError(f"{trace.path} has no whole epoch to compare with")
    if isinstance(profile, str | Path):
        profile = read_device_profile(profile)
    where = None if cluster is None else load_cluster(cluster)
    if where is not None and all(max(trace.world_sizes) == 1 for trace in runs):
        raise UsageError("a cluster is given, but every run had one rank and so no communication")
    checks = [check_run(trace, *source_of(trace, runs, profile, holdout=holdout), where) for trace in runs]
    source: Source = "device profile" if profile is not None else "other runs" if holdout else "own profiles"
    return _summary(runs, checks, source)


def _summary(runs: Sequence[Trace], checks: Sequence[RunCheck], source: Source) -> Validation:
    """All runs together; a key that cannot be said is None, with its reason."""
    epochs = [epoch for check in checks for epoch in check.epochs]
    savings, unlike = _savings(runs, checks)
    memory, energy, communication = _memory_errors(epochs), _energy_errors(checks), _communication_errors(checks)
    reasons = {}
    if not communication:
        parallel = any(max(trace.world_sizes) > 1 for trace in runs)
        reasons["communication_error"] = (
            "exposed communication was taken as measured; --cluster predicts it"
            if parallel
            else "every run had one rank and so no communication"
        )
    if not memory:
        reasons["memory_mape"] = "no epoch recorded a peak memory (only runs on a GPU do)"
    if not savings:
        missing = "there is no dense run beside a pruned one"
        reasons["saving_error_points"] = f"no pair differs by pruning alone: {'; '.join(unlike)}" if unlike else missing
    if not energy:
        reasons["energy_error"] = "no run recorded the energy of more than one epoch (NVML, on a GPU)"
    return Validation(
        whole_run_error=max(abs(check.error) for check in checks),
        epoch_mape=statistics.fmean(abs(epoch.error) for epoch in epochs),
        memory_mape=statistics.fmean(memory) if memory else None,
        saving_error_points=max((abs(saving.error_points) for saving in savings), default=None),
        energy_error=max(energy, default=None),
        communication_error=max(communication, default=None),
        interval_coverage=sum(epoch.inside for epoch in epochs) / len(epochs),
        source=source,
        tiers=tuple(sorted({epoch.tier for epoch in epochs}, key=lambda name: tier_row(name).order)),
        reasons=reasons,
        runs=tuple(checks),
        savings=tuple(savings),
    )


def _check_saving(dense: RunCheck, pruned: RunCheck) -> SavingCheck:
    """Per epoch, so that runs of different lengths can be compared."""

    def saving(seconds: Callable[[RunCheck], float]) -> float:
        return 1 - (seconds(pruned) / len(pruned.epochs)) / (seconds(dense) / len(dense.epochs))

    measured, predicted = saving(lambda run: run.measured_seconds), saving(lambda run: run.predicted_seconds)
    return SavingCheck(
        dense=dense.trace,
        pruned=pruned.trace,
        measured_saving=measured,
        predicted_saving=predicted,
        error_points=100 * (predicted - measured),
    )


def _savings(runs: Sequence[Trace], checks: Sequence[RunCheck]) -> tuple[list[SavingCheck], list[str]]:
    """Every pruned run beside every dense one that differs by nothing else, and why the other pairs are left out."""
    savings, unlike = [], []
    for (a, dense), (b, pruned) in itertools.product(zip(runs, checks, strict=True), repeat=2):
        if dense.dense and not pruned.dense:
            differences = time_differences(b, a)
            if differences:
                unlike.append(f"{pruned.trace} beside {dense.trace} would compare {differences[0]}")
            else:
                savings.append(_check_saving(dense, pruned))
    return savings, unlike


def _memory_errors(epochs: Sequence[EpochCheck]) -> list[float]:
    return [
        abs(epoch.predicted_memory_bytes / epoch.measured_memory_bytes - 1)
        for epoch in epochs
        if epoch.measured_memory_bytes
    ]


def _energy_errors(checks: Sequence[RunCheck]) -> list[float]:
    return [
        abs(check.predicted_energy_joules / check.measured_energy_joules - 1)
        for check in checks
        if check.predicted_energy_joules is not None and check.measured_energy_joules
    ]


def _communication_errors(checks: Sequence[RunCheck]) -> list[float]:
    return [
        abs(check.predicted_exposed_communication_seconds - check.measured_exposed_communication_seconds)
        / check.measured_seconds
        for check in checks
        if check.predicted_exposed_communication_seconds is not None
    ]
