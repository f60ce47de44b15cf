"""Why a pruned run's time does not shrink as its FLOPs do: what each part takes beyond its share, and why."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import msgspec
import pandas as pd

from ptsim.costs.datasheet import uses_tensor_cores
from ptsim.costs.kernels import LOADED_HALVES, pads_channels
from ptsim.costs.run import run_cost
from ptsim.report import parts
from ptsim.report.projected import LabelledRun, Projector, breakdown_frame
from ptsim.setting import StepSetting
from ptsim.trace.pairs import Comparison
from ptsim.trace.trace import Trace
from ptsim.units import percent

_LEAST_GAP, _LEAST_SHARE, _FLOOR = 0.03, 0.15, 0.3
_LEAST_PART = 1e-9  # of the time; less than that is rounding
_LEAST_ROUNDED = 0.05  # of a part: what whole multiples of channels save at least to be worth a sentence


def rounding_projector(trace: Trace, projector: Projector) -> Projector | None:
    """Of the same run with channels in whole multiples of what half precision loads at once.

    None where the run's convolutions do not copy tensors to pad their channels, or the options round them already.
    """
    options, device = projector.options, projector.device
    setting = trace.setting_of(trace.epochs[-1])
    if options.channel_multiple != 1 or not pads_channels(setting, uses_tensor_cores(device, setting.precision)):
        return None
    return projector.changed(projector.cluster, msgspec.structs.replace(options, channel_multiple=LOADED_HALVES))


def excess_frame(comparison: Comparison, projector: Projector, gpus: int) -> pd.DataFrame:
    """One row per part of the time: what the pruned run spends there beyond the FLOPs that it has left.

    If time followed FLOPs, every part would shrink by `macs_fraction`, the pruned run's training FLOPs over the dense
    run's; `excess_seconds` is what a part takes above that. `rounded_seconds` is what it takes with the channels of
    `rounding_projector`, missing where there is none. `floor_fraction` is the share of a part that a mini-batch of one
    image would take as well (launches and least times of kernels, which no pruning shortens), missing but for the
    layers; `step_floor_fraction` is that of whole steps. Parts that take nothing in either run are left out.
    """
    trace = comparison.pruned
    dense, pruned = (_parts(run, projector, gpus) for run in (comparison.baseline, trace))
    rounding = rounding_projector(trace, projector)
    flops = [sum(cost.training_macs for cost in run_cost(t)) for t in (trace, comparison.baseline)]
    fraction = flops[0] / flops[1]
    floors = _floors(trace, projector)
    frame = pd.DataFrame(
        {
            "part": pruned.index,
            "dense_seconds": dense.reindex(pruned.index).to_numpy(),
            "pruned_seconds": pruned.to_numpy(),
            "excess_seconds": (pruned - fraction * dense.reindex(pruned.index)).to_numpy(),
            "rounded_seconds": math.nan
            if rounding is None
            else _parts(trace, rounding, gpus).reindex(pruned.index).to_numpy(),
            "macs_fraction": fraction,
            "floor_fraction": [floors.parts.get(part, math.nan) for part in pruned.index],
            "step_floor_fraction": floors.step,
        }
    )
    most = frame[["dense_seconds", "pruned_seconds", "rounded_seconds"]].max(axis=1)
    return frame[most > _LEAST_PART * pruned.sum()].reset_index(drop=True)


def _parts(trace: Trace, projector: Projector, gpus: int) -> pd.Series:
    """Seconds of a whole run's parts."""
    frame = breakdown_frame([LabelledRun(label="", setting="", trace=trace)], projector, [gpus])
    seconds: pd.Series = frame.set_index("part").seconds
    return seconds


class _Floors(NamedTuple):
    """Shares of the time that mini-batches of one image would take as well: of whole steps, and of parts by name."""

    step: float
    parts: dict[str, float]


def _floors(trace: Trace, projector: Projector) -> _Floors:
    times: dict[tuple[str, StepSetting], list[tuple[float, float, float]]] = {}
    totals = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]  # with one image, with the epochs' own mini-batches
    for epoch in trace.epochs:
        key = epoch.architecture, trace.setting_of(epoch)
        if key not in times:
            steps = (projector.step(trace, e) for e in (msgspec.structs.replace(epoch, batch_per_gpu=1), epoch))
            times[key] = [
                (step.compute_s, step.product_s, step.forward_s + step.backward_s - step.product_s) for step in steps
            ]
        for total, seconds in zip(totals, times[key], strict=True):
            for index, part_s in enumerate(seconds):
                total[index] += part_s * epoch.num_iterations
    step, *shares = (one / whole if whole else math.nan for one, whole in zip(*totals, strict=True))
    return _Floors(step=step, parts=dict(zip((parts.PRODUCTS, parts.MEMORY_BOUND), shares, strict=True)))


def why(excess: pd.DataFrame) -> Iterator[str]:
    """Why time does not shrink as the MACs do, the weightiest reasons first. Takes `excess_frame`."""
    macs = float(excess.macs_fraction.iloc[0])
    pruned_s, dense_s = excess.pruned_seconds.sum(), excess.dense_seconds.sum()
    lead = (
        f"The pruned run has {percent(macs)} of the training MACs and takes {percent(pruned_s / dense_s)} of the time"
    )
    if pruned_s / dense_s - macs < _LEAST_GAP:
        yield f"{lead}: here time follows the MACs."
        return
    yield f"{lead}."
    total = excess.excess_seconds.clip(lower=0).sum()
    for row in excess.sort_values("excess_seconds", ascending=False).to_dict("records"):
        if row["excess_seconds"] < _LEAST_SHARE * total:
            break
        left = percent(row["pruned_seconds"] / row["dense_seconds"]) if row["dense_seconds"] > 0 else "more than all"
        yield _reason(row).format(share=percent(row["pruned_seconds"] / pruned_s), left=left) + _advice(row)
    floor = float(excess.step_floor_fraction.iloc[0])
    if floor >= _FLOOR:
        yield (
            f"Launch-bound: a pruned step on a single image would take {percent(min(floor, 1.0))} of the time of "
            "the whole mini-batch. That part is launches and the least times of kernels, which no pruning shortens."
        )


def _reason(row: dict[Hashable, Any]) -> str:
    """What keeps one part from shrinking: of the layers the cause that explains most of their excess."""
    part = row["part"]
    if part == parts.PRODUCTS and _rounding_saves(row) >= row["excess_seconds"] / 2:
        return _PADDED
    reasons = _SHORT_KERNELS if part in _SHORT_KERNELS and row["floor_fraction"] >= _FLOOR else _REASONS
    return reasons[part]


def _rounding_saves(row: dict[Hashable, Any]) -> float:
    """Seconds of one part that channels in whole multiples save; 0 where nothing is padded."""
    rounded_s: float = row["rounded_seconds"]
    return 0.0 if math.isnan(rounded_s) else row["pruned_seconds"] - rounded_s


def _advice(row: dict[Hashable, Any]) -> str:
    if row["part"] != parts.PRODUCTS or _rounding_saves(row) < _LEAST_ROUNDED * row["pruned_seconds"]:
        return ""
    left = percent(row["rounded_seconds"] / row["pruned_seconds"])
    return (
        f" With channel counts that are multiples of {LOADED_HALVES} (channel_multiple = {LOADED_HALVES}), which "
        f"half precision loads at once, they would take {left} of that."
    )


# What keeps a part of the time from shrinking with the MACs. {share}: of the pruned run; {left}: of its dense time.
_REASONS = {
    parts.HOST: "Host-bound: for {share} of the pruned run the GPU waits for the host, which launches a "
    "narrow layer no faster than a wide one. A larger mini-batch, CUDA graphs or compilation shorten that; pruning "
    "does not.",
    parts.PRODUCTS: "Convolutions and linear layers take {left} of their dense time: with few "
    "channels, tiles and waves of the GPU's multipliers stay partly empty.",
    parts.MEMORY_BOUND: "Memory-bound layers (BatchNorm, activations, sums) take {left} of their dense time: they "
    "move bytes, and bytes shrink with the channels, not with their square.",
    parts.HOOKS: "Gradient hooks take {left} of their dense time: DDP copies every gradient into its bucket, "
    "which takes as long for a small tensor as for a large one.",
    parts.UPDATE: "The group lasso's gradient and the update take {share} of the pruned run.",
    parts.COMMUNICATION: "Exposed communication takes {left} of its dense time: small messages cost latency, not "
    "bandwidth.",
    parts.INPUT: "Waiting for input takes {share} of the pruned run: data arrive no faster for a smaller network.",
    parts.CHANGES: "Starting and reconfiguring take {share} of the pruned run; a dense run only starts.",
    parts.OTHER: "Waiting for slower GPUs takes {share} of the pruned run.",
}

# The same where launches and the least times of kernels make up much of a part …
_SHORT_KERNELS = {
    parts.PRODUCTS: "Convolutions and linear layers take {left} of their dense time: their kernels "
    "are so short that their least times count.",
    parts.MEMORY_BOUND: "Memory-bound layers (BatchNorm, activations, sums) take {left} of their dense time: their "
    "kernels are so short that their least times count, whatever they move.",
}

# … or where copies that pad channels do.
_PADDED = (
    "Convolutions and linear layers take {left} of their dense time: in half precision, convolutions copy tensors "
    f"whose channels are no multiple of {LOADED_HALVES}, to pad them."
)
