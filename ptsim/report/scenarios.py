"""What else could one do? Every run on every cluster side by side, and from where on pruning pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import msgspec
import pandas as pd

from ptsim.costs.kernels import LOADED_HALVES
from ptsim.costs.memory import usable_bytes
from ptsim.hardware.spec import Cluster
from ptsim.report import projected
from ptsim.report.causes import rounding_projector
from ptsim.report.facts import Facts
from ptsim.report.figures.style import gpus
from ptsim.report.projected import LabelledRun, Projector
from ptsim.trace.frames import numeric
from ptsim.trace.pairs import Comparison
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace
from ptsim.units import GBIT, counted, given_number, listed

FACTORS = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0)  # on a bandwidth
BATCHES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # on a mini-batch
DYNAMIC = ", dynamic mini-batch"
ROUNDED = f", channels in multiples of {LOADED_HALVES}"

Lever = Literal["GPUs", "bandwidth", "mini-batch"]


def scenarios_frame(facts: Facts) -> pd.DataFrame:
    """One row per cluster and run at the page's number of GPUs: time, money, energy, and what it saves against dense.

    The shown pruned run comes again with a dynamic mini-batch (grown at every reconfiguration to what fits the device),
    unless it was recorded so, and with channels in multiples of 8 where convolutions pad others. A cluster with fewer
    GPUs than the page's number is shown with all that it has.
    """
    baselines = {c.label: c for c in facts.comparisons}
    rows = []
    for projector in facts.projectors:
        gpus = min(facts.focus, most_gpus(projector.cluster))
        for run, where, name in _scenarios(facts, projector):
            (row,) = projected.projections_frame([run], where, [gpus]).to_dict("records")
            comparison = baselines.get(run.label)
            if comparison is not None:
                dense = projector.run(comparison.baseline, gpus)
                pruned = where.run(comparison.pruned, gpus)
                row.update(projected.saved_columns(dense, pruned, projector))
            measured = run.trained and name == run.label  # nobody has trained it with other mini-batches or channels
            rows.append({**row, "run": name, "accuracy": run.trace.final_accuracy if measured else None})
    return numeric(pd.DataFrame(rows))


def _scenarios(facts: Facts, projector: Projector) -> Iterator[tuple[LabelledRun, Projector, str]]:
    for run in facts.labelled:
        yield run, projector, run.label
        batches = {epoch.batch_per_gpu for epoch in run.trace.epochs}
        if run.label != facts.shown.label or not run.trace.is_pruned:
            continue
        if len(batches) == 1:
            options = msgspec.structs.replace(projector.options, minibatch="planned")
            yield run, projector.changed(projector.cluster, options), f"{run.label}{DYNAMIC}"
        rounding = rounding_projector(run.trace, projector)
        if rounding is not None:
            yield run, rounding, f"{run.label}{ROUNDED}"


def most_gpus(cluster: Cluster) -> int:
    """How many GPUs a cluster has; one node's where its nodes are not connected."""
    nodes = (cluster.max_nodes or 1_000_000) if cluster.inter else 1
    return cluster.gpus_per_node * nodes


def break_even_frame(facts: Facts) -> pd.DataFrame:
    """What the shown run saves as one thing changes at a time: GPUs, bandwidth or mini-batch (`lever`, `value`).

    The bandwidth is that of the links between nodes (bytes/s), inside the node where all GPUs share one; measured
    all-reduce tables, which hold for one bandwidth only, are left out there. Mini-batches are per GPU at the start;
    larger ones that do not fit the device are left out.
    """
    comparison = facts.comparison
    if comparison is None:
        return pd.DataFrame()
    sizes = facts.sizes if len(facts.sizes) > 1 else ()  # of a single one there is nothing to compare
    rows = [_row(facts, comparison, facts.projector, "GPUs", size, size) for size in sizes]
    cluster = facts.projector.cluster
    field = "inter" if facts.focus > cluster.gpus_per_node else "intra"
    link = getattr(cluster, field)
    if facts.focus > 1 and link is not None:
        for factor in FACTORS:
            bandwidth = link.bandwidth_bytes_per_s * factor
            slower = msgspec.structs.replace(link, bandwidth_bytes_per_s=bandwidth)
            changed = msgspec.structs.replace(cluster, tables=(), **{field: slower})
            where = facts.projector.changed(changed, facts.projector.options)
            rows.append(_row(facts, comparison, where, "bandwidth", bandwidth, facts.focus))
    first, most = comparison.pruned.epochs[0].batch_per_gpu, usable_bytes(facts.projector.device)
    for batch in sorted({max(1, round(first * factor)) for factor in BATCHES}):
        scaled = msgspec.structs.replace(
            comparison,
            pruned=with_batch(comparison.pruned, batch / first),
            baseline=with_batch(comparison.baseline, batch / first),
        )
        where = facts.projector.changed(cluster, facts.projector.options)
        if batch <= first or where.run(scaled.baseline, facts.focus).epochs[0].needed_memory_bytes <= most:
            rows.append(_row(facts, scaled, where, "mini-batch", batch, facts.focus))
    return pd.DataFrame(rows)


def _row(
    facts: Facts, comparison: Comparison, projector: Projector, lever: Lever, value: float, gpus: int
) -> dict[str, object]:
    dense, pruned = projector.run(comparison.baseline, gpus), projector.run(comparison.pruned, gpus)
    saved = projected.saved_columns(dense, pruned, projector)
    low, high = saved["saved_fraction_low"], saved["saved_fraction_high"]
    assert low is not None, "shares of the time are always known"
    assert high is not None, "as low"
    keep = ("dense_seconds", "pruned_seconds", "saved_fraction", "saved_fraction_low", "saved_fraction_high")
    return {
        "run": comparison.label,
        "setting": comparison.setting,
        "pruned": True,
        "cluster": projector.cluster.name,
        "device": projector.device.name,
        "precision": str(comparison.pruned.run.precision),
        "lever": lever,
        "value": float(value),
        "at_value": _named(lever, value),
        "outcome": outcome(low, high),
        "gpus": gpus,
        "batch_per_gpu": comparison.pruned.epochs[0].batch_per_gpu,
        **{name: saved[name] for name in keep},
    }


def with_batch(trace: Trace, factor: float) -> Trace:
    """The run as if every mini-batch had been `factor` times as large; every image is still trained on."""

    def changed(epoch: Epoch) -> Epoch:
        batch = max(1, round(epoch.batch_per_gpu * factor))
        iterations = epoch.iterations_with(batch, epoch.world_size)
        return msgspec.structs.replace(epoch, batch_per_gpu=batch, num_iterations=iterations)

    return msgspec.structs.replace(trace, epochs=tuple(map(changed, trace.epochs)))


_NAMES: dict[Lever, str] = {"GPUs": "Number of GPUs", "bandwidth": "Bandwidth", "mini-batch": "Mini-batch"}
Outcome = Literal["pays", "may pay", "does not pay"]
PLAIN_WORDS = "“Pays” means that the whole 90 % interval of the saving lies above zero, “may pay” that zero lies in it."


def _named(lever: Lever, value: float) -> str:
    if lever == "GPUs":
        return gpus(round(value))
    if lever == "bandwidth":
        return f"{given_number(value / GBIT)} Gbit/s"
    return f"{counted(round(value), 'image')} per GPU"


def outcome(low: float, high: float) -> Outcome:
    """What the 90 % interval of a saving says."""
    if low > 0:
        return "pays"
    return "may pay" if high > 0 else "does not pay"


def break_even_sentences(frame: pd.DataFrame) -> Iterator[str]:
    """From where on pruning pays, one sentence per lever, and what is meant by it. Takes `break_even_frame`."""
    for lever in _NAMES:
        points = frame[frame.lever == lever].sort_values("value")
        if not points.empty:
            yield _sentence(lever, list(points.at_value), list(points.outcome))
    if not frame.empty:
        yield PLAIN_WORDS


def _sentence(lever: Lever, shown: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Where pruning pays, may pay and does not; `outcomes` in ascending order of the values `shown`."""
    name = _NAMES[lever]
    if len(set(outcomes)) == 1:
        where = f"wherever it was tried, from {shown[0]} to {shown[-1]}" if len(shown) > 1 else f"at {shown[0]}"
        return f"{name}: pruning {outcomes[0]} {where}."
    stretches: dict[Outcome, list[str]] = {}
    start = 0
    for end in range(1, len(shown) + 1):
        if end < len(shown) and outcomes[end] == outcomes[start]:
            continue
        stretches.setdefault(outcomes[start], []).append(_stretch(shown, start, end - 1))
        start = end
    parts = [f"{said} {' and '.join(stretches[said])}" for said in get_args(Outcome) if said in stretches]
    return f"{name}: pruning {listed(parts)}."


def _stretch(shown: Sequence[str], first: int, last: int) -> str:
    """Neighbours of equal outcome in words; those at an end of what was tried are open there."""
    if last == len(shown) - 1:
        return f"from {shown[first]} on" if first < last else f"at {shown[last]}"
    if first == last:
        return f"at {shown[first]}"
    return f"up to {shown[last]}" if first == 0 else f"from {shown[first]} to {shown[last]}"
