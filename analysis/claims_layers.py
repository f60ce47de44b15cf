"""What the recorded runs say layer by layer: the figures of the claims about single layers and steps, and overheads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
from claims_recorded import RESNET18, RESNET32, VGG11, epochs_s, read_recorded
from claims_words import Figures, percent, rounded
from saving_by_layer import recorded_tables

import ptsim
from ptsim.costs.flops import training_macs
from ptsim.trace.schema import Profile
from ptsim.units import listed

BY_LAYER = "by_layer"


def by_layer(root: Path, folder: str, table: str, measured: str = BY_LAYER) -> pd.DataFrame:
    """A table that `saving_by_layer.py` measured for a run of `traces/FOLDER`, in the folder MEASURED there."""
    return pd.read_csv(root / "traces" / folder / measured / f"{table}.csv")


def recorded_layers(root: Path, *, folder: str, run: str) -> Figures:
    """The last network beside the first, by kind of layer, from the profiles that the run took of them."""
    trace = read_recorded(root, folder, run)
    tables = recorded_tables(trace)
    kinds, last = tables["kinds"].set_index("kind"), tables["steps"].iloc[-1]
    names = {"conv": "convolutions", "batch_norm": "BatchNorm", "activation": "ReLU", "elementwise": "additions"}
    left = ", ".join(f"{text} {percent(kinds.time_left[kind])}" for kind, text in names.items())
    lost = [rounded(kinds.lost_share[kind], 1) for kind in names]
    others = tables["steps"].saved_time_per_saved_macs.iloc[1:-1]
    best = "the best" if last.saved_time_per_saved_macs > others.max() else "not the best"
    layers = tables["layers"]
    narrow = layers[(layers.kind == "conv") & layers.layer.str.startswith("layer1.")]
    rates = [
        trace.epochs[0].batch_per_gpu * narrow[f"{which}_macs"].sum() / narrow[f"{which}_seconds"].sum() / 1e9
        for which in ("pruned", "dense")
    ]
    return [
        f"MACs {percent(last.macs_left)}, step {percent(last.time_left)} of dense",
        left,
        f"{listed(lost)} points",
        f"saved time over saved MACs {last.saved_time_per_saved_macs:.1f}, {best} of {len(others) + 2} networks",
        f"the seven before it have {others[-7:].min():.1f} to {others[-7:].max():.1f}",
        f"convolutions of layer1 {rates[0]:.0f} instead of {rates[1]:.0f} GMAC/s",
    ]


def last_profile(trace: ptsim.Trace) -> Profile:
    """The profile that a run took of its last epoch's network."""
    return next(profile for profile in trace.profiles if profile.architecture == trace.epochs[-1].architecture)


def gating_layers(root: Path, *, folder: str, gating: str, union: str) -> Figures:
    """What gathers and scatters take of a step with gating; what the last ten epochs saved beside union."""
    trace, theirs = (read_recorded(root, folder, name) for name in (gating, union))
    profile, operators = last_profile(trace), {layer.name: layer.op for layer in trace.final_network.layers}
    taken = {}
    for operator in ("gather", "scatter"):
        layers = [layer for layer in profile.layers if operators[layer.layer] == operator]
        seconds = sum(layer.forward_s + (layer.backward_s or 0.0) for layer in layers)
        taken[operator] = (len(layers), 1e3 * seconds)
    macs, seconds = (
        sum(training_macs(trace.network_of(epoch)) for epoch in trace.epochs[-10:])
        / sum(training_macs(theirs.network_of(epoch)) for epoch in theirs.epochs[-10:]),
        sum(epochs_s(trace)[-10:]) / sum(epochs_s(theirs)[-10:]),
    )
    gathers, scatters = taken["gather"], taken["scatter"]
    return [
        f"of a step of {1e3 * profile.step_s:.0f} ms, {gathers[0]} gathers take {gathers[1]:.1f} ms "
        f"and {scatters[0]} scatters {scatters[1]:.1f} ms",
        f"last ten epochs: {percent(1 - macs)} fewer MACs than union, {percent(1 - seconds)} less time",
    ]


def recorded_steps(root: Path, *, folder: str, measured: str = BY_LAYER) -> Figures:
    """The step of the last network alone, and with its channels rounded up, as measured on an idle machine."""
    table = by_layer(root, folder, "steps", measured)
    rows = {row["network"]: row for row in table.to_dict("records")}
    one, eight, sixteen = (rows[f"pruned, multiple of {multiple}"] for multiple in (1, 8, 16))
    apart = table.slowest_over_fastest_round - 1
    return [
        f"MACs {percent(one['macs_left'])}, step {percent(one['time_left'])} of dense",
        f"saved time over saved MACs {one['saved_time_per_saved_macs']:.1f}",
        f"multiples of 8: MACs {percent(eight['macs_left'])}, step {percent(eight['time_left'])}",
        f"of 16: MACs {percent(sixteen['macs_left'])}, step {percent(sixteen['time_left'])}",
        f"rounds of a step {rounded(apart.min(), 0)} to {percent(apart.max())} apart",
    ]


def step_ratios(root: Path, *, folder: str, measured: str = BY_LAYER) -> list[float]:
    """What the step of the last network saves for each part that is saved of the MACs, not rounded."""
    rows = by_layer(root, folder, "steps", measured).set_index("network")
    return [float(rows.saved_time_per_saved_macs["pruned, multiple of 1"])]


def recorded_narrow(root: Path, *, folder: str, run: str) -> Figures:
    """The first convolutions of the later blocks of layer1, which keep their input channels."""
    table, trace = by_layer(root, folder, "layers").set_index("layer"), read_recorded(root, folder, run)
    before, after = ({layer.name: layer for layer in network.layers} for network in (
        trace.network_of(trace.epochs[0]), trace.final_network
    ))  # fmt: skip
    names = [f"layer1.{block}.conv1" for block in range(1, 5)]
    inputs = {layers[name].in_channels for layers in (before, after) for name in names}
    dense = {before[name].out_channels for name in names}
    outputs = [str(width) for width in sorted({after[name].out_channels for name in names})]
    left = table.time_left[names]
    return [
        f"{listed([str(width) for width in inputs])} input channels",
        f"{', '.join(outputs[:-1])} or {outputs[-1]} output channels instead of {listed([str(w) for w in dense])}",
        f"{rounded(left.min(), 0)} to {percent(left.max())} of the time",
    ]


def recorded_wide(root: Path, *, folder: str) -> Figures:
    """What the layers without MACs take of the dense network's layers."""
    kinds = by_layer(root, folder, "kinds").set_index("kind")
    share = kinds.share_of_dense_time[["pool", "batch_norm", "activation"]].sum()
    return [f"BatchNorm, ReLU and pooling {percent(share)} of the dense layers' time"]


def recorded_early(root: Path, *, folder: str, measured: str, numbers: tuple[int, ...]) -> Figures:
    """MACs and time left of some convolutions, by their numbers from 1, and of all others together."""
    layers = by_layer(root, folder, "layers", measured)
    convolutions = layers[layers.kind == "conv"].reset_index(drop=True)
    early = convolutions.iloc[[number - 1 for number in numbers]]
    sums = convolutions.drop(early.index)[["pruned_macs", "dense_macs", "pruned_seconds", "dense_seconds"]].sum()
    return [
        *(
            f"convolution {number}: MACs {percent(row.macs_left)}, time {percent(row.time_left)}"
            for number, row in zip(numbers, early.itertuples(), strict=True)
        ),
        f"all other convolutions: MACs {percent(sums.pruned_macs / sums.dense_macs)}, "
        f"time {percent(sums.pruned_seconds / sums.dense_seconds)}",
    ]


def overheads(root: Path) -> Figures:
    """What the penalty, the recorder and the data path take, as shares of a plain step, by the tables `overheads`."""
    tables = {
        name: by_layer(root, folder, "overheads").set_index(["part", "batch"]).share_of_step
        for name, folder in (
            ("VGG-11", "cifar10-vgg11"), ("ResNet-32", "cifar10-resnet32"), ("ResNet-18", "cifar10-resnet18-64")
        )
    }  # fmt: skip
    penalties = [
        f"{name} {listed([percent(table['penalty'][n], 1) for n in (4, 32, 128)])}" for name, table in tables.items()
    ]
    recorders, data = (
        [max(table[part][n] for table in tables.values()) for n in (4, 32, 128)] for part in ("recorder", "data")
    )
    return [
        f"at 4, 32 and 128 images: penalty of {'; of '.join(penalties)}",
        f"recorder at most {listed([percent(share, 2) for share in recorders])}",
        f"data at most {listed([percent(share, 1) for share in data])}",
    ]


CHECKS: dict[str, Callable[[Path], Figures]] = {
    "recorded-vgg11-steps": partial(recorded_steps, folder=VGG11),
    "recorded-vgg11-layers": partial(recorded_wide, folder=VGG11),
    "recorded-vgg11-long-steps": partial(recorded_steps, folder=VGG11, measured="by_layer_long"),
    "recorded-vgg11-long-layers": partial(recorded_early, folder=VGG11, measured="by_layer_long", numbers=(2, 3)),
    "recorded-vgg11-channels-last-steps": partial(recorded_steps, folder=VGG11, measured="by_layer_channels_last"),
    "recorded-vgg11-channels-last-layers": partial(
        recorded_early, folder=VGG11, measured="by_layer_channels_last", numbers=(2, 3)
    ),
    "recorded-resnet18-steps": partial(recorded_steps, folder=RESNET18),
    "recorded-resnet32-layers": partial(recorded_layers, run="prunetrain-r0.25", folder=RESNET32),
    "recorded-resnet32-steps": partial(recorded_steps, folder=RESNET32),
    "recorded-resnet32-narrow": partial(recorded_narrow, run="seed2-prunetrain-r0.25", folder=RESNET32),
    "recorded-modes-layers": partial(gating_layers, gating="mode-gating", union="mode-union", folder=RESNET32),
    "overheads": overheads,
}
# What of the claims about steps a goal is compared with.
REACHED: dict[str, Callable[[Path], list[float]]] = {
    name: partial(step_ratios, **check.keywords)
    for name, check in CHECKS.items()
    if isinstance(check, partial) and check.func is recorded_steps
}
