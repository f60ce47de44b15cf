"""What the recorded runs of `traces/cifar10-*` say: the figures of the claims about them, computed from their files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from claims_words import Figures, percent, percents, rounded
from saving_by_layer import recorded_tables

import ptsim
from ptsim.costs.flops import training_macs
from ptsim.costs.traffic import batch_norm_bytes
from ptsim.trace.pairs import held_dense
from ptsim.trace.schema import Profile
from ptsim.units import listed

Pairs = Mapping[str, str]  # a run, and the run that was recorded beside it


@functools.cache
def read_recorded(root: Path, folder: str, name: str) -> ptsim.Trace:
    """The run NAME in `traces/FOLDER`."""
    return ptsim.read_trace(root / "traces" / folder / f"{name}.jsonl")


def by_layer(root: Path, folder: str, table: str) -> pd.DataFrame:
    """A table that `saving_by_layer.py` measured for a run of `traces/FOLDER`."""
    return pd.read_csv(root / "traces" / folder / "by_layer" / f"{table}.csv")


def epochs_s(trace: ptsim.Trace) -> list[float]:
    """The wall time of every epoch."""
    return [epoch.time.wall_s for epoch in trace.epochs]


def reconfigurations_s(trace: ptsim.Trace) -> float:
    """The time of all reconfigurations."""
    return sum(reconfiguration.duration_s for reconfiguration in trace.reconfigurations)


def last_accuracy(trace: ptsim.Trace) -> float:
    """The validation accuracy of the last epoch."""
    accuracy = trace.epochs[-1].validation_accuracy
    assert accuracy is not None
    return accuracy


def totals(trace: ptsim.Trace) -> dict[str, float]:
    """What a recorded run did in all, and the MACs of its last network."""
    return {
        "flops": sum(training_macs(trace.network_of(e), images=e.num_images) for e in trace.epochs),
        "bn": sum(batch_norm_bytes(trace.network_of(e)) * e.num_images for e in trace.epochs),
        "time": sum(epochs_s(trace)) + reconfigurations_s(trace),
        "inference": trace.network_of(trace.epochs[-1]).forward_macs,
    }


def recorded(root: Path, folder: str, run: str, beside: str) -> dict[str, float]:
    """FLOPs, BatchNorm traffic and time of a run in `traces/FOLDER`, relative to the run recorded beside it."""
    dense, pruned = (read_recorded(root, folder, name) for name in (beside, run))
    theirs, ours = totals(dense), totals(pruned)
    accuracies = {"dense": last_accuracy(dense), "accuracy": last_accuracy(pruned)}
    return {key: ours[key] / theirs[key] for key in ours} | accuracies


def ratio(of: Mapping[str, float]) -> str:
    """What was saved of the time for each part that was saved of the FLOPs."""
    return f"{(1 - of['time']) / (1 - of['flops']):.1f}"


def setting(trace: ptsim.Trace) -> Figures:
    """The data, length and penalty of a pruned run."""
    return [
        f"{trace.run.dataset.num_train:,} CIFAR-10 images",
        f"{len(trace.epochs)} epochs",
        f"penalty ratio {trace.run.hyperparameters['penalty_ratio']}",
    ]


def recorded_saving(root: Path, *, folder: str, pairs: Pairs) -> Figures:
    """Each run beside its own: work, time and accuracy. Of one pair the accuracies, of several what was lost."""
    found = [recorded(root, folder, run, beside) for run, beside in pairs.items()]
    work = {key: percents([of[key] for of in found]) for key in ("flops", "bn", "inference", "time")}
    lost = [rounded(of["dense"] - of["accuracy"], 1) for of in found]
    accuracy = f"accuracy {percent(found[0]['accuracy'], 1)} against {percent(found[0]['dense'], 1)}"
    return [
        *setting(read_recorded(root, folder, next(iter(pairs)))),
        f"training FLOPs {work['flops']}, BatchNorm traffic {work['bn']}, "
        f"inference FLOPs {work['inference']}, time {work['time']} of dense",
        f"saved time over saved FLOPs {listed([ratio(of) for of in found])}",
        accuracy if len(found) == 1 else f"accuracy {listed(lost)} points lower",
    ]


def recorded_pair(root: Path, *, folder: str, run: str) -> Figures:
    """The pair of ResNet-20 whose times compare, and how equal they are before anything is pruned."""
    pruned, dense = (epochs_s(read_recorded(root, folder, name)) for name in (run, "dense"))
    trace = read_recorded(root, folder, run)
    unpruned = sum(epoch.architecture == trace.epochs[0].architecture for epoch in trace.epochs)
    apart = sum(pruned[:unpruned]) / sum(dense[:unpruned]) - 1
    worst = max(abs(ours / theirs - 1) for ours, theirs in zip(pruned[:unpruned], dense[:unpruned], strict=True))
    return [
        *recorded_saving(root, folder=folder, pairs={run: "dense"}),
        f"first {unpruned} epochs, unpruned, {percent(apart, 1)} longer than the dense ones, "
        f"single ones up to {percent(worst, 1)} apart",
    ]


def own_pace(trace: ptsim.Trace) -> float:
    """The time of a run at the mean pace of its own first ten epochs: its epochs' mean over theirs."""
    seconds = epochs_s(trace)
    return sum(seconds) / len(seconds) / (sum(seconds[:10]) / 10)


def profiled_pace(trace: ptsim.Trace) -> float:
    """What the run's profiles of its networks say of its time, over that of its first network all the way."""
    step_s = {profile.architecture: profile.step_s for profile in trace.profiles}
    mean_s = sum(step_s[epoch.architecture] for epoch in trace.epochs) / len(trace.epochs)
    return mean_s / step_s[trace.epochs[0].architecture]


def recorded_pace(root: Path, *, folder: str, pairs: Pairs) -> Figures:
    """The time of both runs of each pair at their own pace, and by the profiles of the pruned one."""
    pruned, dense = ([read_recorded(root, folder, run) for run in names] for names in (pairs, pairs.values()))
    found = [percents([own_pace(trace) for trace in traces]) for traces in (pruned, dense)]
    profiled = percents([profiled_pace(trace) for trace in pruned])
    return [f"pruned {found[0]}, dense {found[1]}", f"by the profiles of its networks {profiled}"]


def recorded_machine(root: Path, *, folder: str, run: str, networks: Sequence[int]) -> Figures:
    """How much times of equal or nearly equal work differ; `networks` are a run of the pruned run's profiles."""
    trace, dense_s = read_recorded(root, folder, run), epochs_s(read_recorded(root, folder, "dense"))
    steps = recorded_tables(trace)["steps"].iloc[list(networks)]
    saved = (1 - profiled_pace(trace)) / (1 - recorded(root, folder, run, "dense")["flops"])
    return [
        f"dense epochs of {min(dense_s):.0f} to {max(dense_s):.0f} s",
        f"by the profiles saved time over saved FLOPs {saved:.1f}",
        f"{percents(list(steps.macs_left))} of the MACs",
        f"{listed([f'{step_s:.2f}' for step_s in steps.step_seconds])} s a step",
    ]


def last_ten(root: Path, folder: str, *runs: str) -> str:
    """The mean time of an epoch at the end of two runs."""
    means = [f"{sum(epochs_s(read_recorded(root, folder, run))[-10:]) / 10:.1f}" for run in runs]
    return f"last ten epochs {' against '.join(means)} s each"


def recorded_dynamic(root: Path, *, folder: str, run: str, beside: str) -> Figures:
    """A growing mini-batch beside a fixed one: same pruning settings, other steps."""
    of = recorded(root, folder, run, beside)
    trace, fixed = (read_recorded(root, folder, name) for name in (run, beside))
    sizes = [epoch.batch_per_gpu for epoch in trace.epochs]
    grown = " to ".join(str(size) for size in dict.fromkeys(sizes))
    left = [t.network_of(t.epochs[-1]).forward_macs / t.network_of(t.epochs[0]).forward_macs for t in (trace, fixed)]
    return [
        f"mini-batch {grown}",
        f"training FLOPs {percent(of['flops'])}, time {percent(of['time'])} of the fixed one's",
        last_ten(root, folder, run, beside),
        f"inference FLOPs {percents(left)} of dense",
        f"accuracy {percent(of['accuracy'], 1)} against {percent(of['dense'], 1)}",
    ]


def recorded_modes(root: Path, *, folder: str, gating: str, union: str) -> Figures:
    """Gating beside union: FLOPs of the last network and of the run, of the unpruned network's; times."""
    found = []
    for mode, name in (("gating", gating), ("union", union)):
        trace = read_recorded(root, folder, name)
        own, dense = totals(trace), totals(held_dense(trace))
        inference, whole = (own[key] / dense[key] for key in ("inference", "flops"))
        found.append(f"{mode}: inference FLOPs {percent(inference)}, training FLOPs {percent(whole)} of dense")
    of = recorded(root, folder, gating, union)
    return [
        *found,
        f"time of gating {percent(of['time'])} of union's",
        last_ten(root, folder, gating, union),
        f"accuracy {percent(of['accuracy'], 1)} against {percent(of['dense'], 1)}",
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


def recorded_twice(root: Path, *, folder: str, runs: tuple[str, str]) -> Figures:
    """Two runs of equal settings and seed at different hours."""
    first, second = (read_recorded(root, folder, run) for run in runs)
    equal = all(
        (ours.train_loss, ours.validation_loss, ours.architecture)
        == (theirs.train_loss, theirs.validation_loss, theirs.architecture)
        for ours, theirs in zip(first.epochs, second.epochs, strict=True)
    )
    times = [totals(trace)["time"] for trace in (first, second)]
    return [
        f"losses and networks {'agree bit for bit' if equal else 'differ'}",
        f"times {times[0]:,.0f} and {times[1]:,.0f} s, {percent(times[1] / times[0] - 1)} apart",
    ]


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


def recorded_steps(root: Path, *, folder: str) -> Figures:
    """The step of the last network alone, and with its channels rounded up, as measured on an idle machine."""
    table = by_layer(root, folder, "steps")
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


def pruned_widths(root: Path, *, folder: str, run: str) -> Figures:
    """From which epoch the network is smaller, and the width of its convolutions before and after."""
    trace = read_recorded(root, folder, run)
    networks = (trace.network_of(trace.epochs[0]), trace.final_network)
    widths = [", ".join(str(c.out_channels) for c in network.layers if c.kind == "conv") for network in networks]
    return [f"nothing pruned before epoch {first_pruned(trace)}", f"widths from {widths[0]} to {widths[1]}"]


def first_pruned(trace: ptsim.Trace) -> int:
    """The first epoch whose network is not the first one's."""
    return next(epoch.epoch for epoch in trace.epochs if epoch.architecture != trace.epochs[0].architecture)


def shrunk(root: Path, *, folder: str, run: str) -> Figures:
    """How much smaller a network became: channels of its convolutions, parameters."""
    trace = read_recorded(root, folder, run)
    networks = (trace.network_of(trace.epochs[0]), trace.final_network)
    parameters = [network.num_parameters for network in networks]
    channels, last_stage = (
        [sum(c.out_channels for c in net.layers if c.kind == "conv" and c.name.startswith(part)) for net in networks]
        for part in ("", "layer4.")
    )
    return [
        f"{parameters[0] / 1e6:.0f} million parameters",
        f"{sum(epoch.num_iterations for epoch in trace.epochs):,} steps",
        f"from epoch {first_pruned(trace)} on",
        f"{percent(1 - channels[1] / channels[0])} of the channels, "
        f"{percent((last_stage[0] - last_stage[1]) / (channels[0] - channels[1]))} of them in the last stage",
        f"{percent(1 - parameters[1] / parameters[0])} of the parameters",
    ]


def own_work(root: Path, *, runs: Mapping[str, tuple[str, str]]) -> Figures:
    """The work of ptsim itself in each pruned run, as shares of its epochs' time; a run's name, folder and file."""
    found = []
    for name, (folder, run) in runs.items():
        trace = read_recorded(root, folder, run)
        whole_s = sum(epochs_s(trace))
        penalty, waits = (
            sum(getattr(epoch.time, part) for epoch in trace.epochs) / whole_s
            for part in ("regularizer_s", "data_wait_s")
        )
        paid = reconfigurations_s(trace) / whole_s
        found.append(f"{name}: {percent(penalty, 1)}, {percent(waits, 1)} and {percent(paid, 2)}")
    return found


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


def paper_vgg11(root: Path, *, run: str) -> Figures:
    """What the paper reports for the network that was recorded here, and how much longer it trained."""
    rows = pd.read_csv(root / "traces" / "public" / "prunetrain_paper.csv")
    rows = rows[(rows["where"] == "Table 1") & (rows.dataset == "CIFAR10") & (rows.model == "VGG11")]
    value = rows.set_index("metric").value.astype(float)
    epochs, trace = int(rows.epochs.iloc[0]), read_recorded(root, "cifar10-vgg11", run)
    images, trained = 50_000, len(trace.epochs) * trace.run.dataset.num_train  # CIFAR-10 has 50,000 for training
    return [
        f"training FLOPs {percent(value['training FLOPs relative to dense'])}, "
        f"time {percent(value['training time relative to dense'])} of dense",
        f"{epochs} epochs of {images:,} images, {epochs * images / trained:.0f} times as many",
    ]


def recorded_r03(root: Path, *, folder: str, run: str) -> Figures:
    """A run whose time compares with its own unpruned epochs only, without the regulariser as in `table1.py`."""
    of, trace = recorded(root, folder, run, "dense"), read_recorded(root, folder, run)
    pace = totals(trace)["time"] / totals(held_dense(trace))["time"]
    return [
        f"training FLOPs {percent(of['flops'])} of dense",
        f"accuracy {percent(of['accuracy'], 1)}",
        f"time {percent(pace)} of {len(trace.epochs)} unpruned epochs",
    ]


def recorded_gating(root: Path, *, folder: str, runs: tuple[str, str]) -> Figures:
    """Inference FLOPs with gating and union, and the profiled steps of each run's last two networks."""
    traces = [read_recorded(root, folder, run) for run in runs]
    gating, union = (percent(recorded(root, folder, run, "dense")["inference"]) for run in runs)
    steps = [listed([f"{1e3 * profile.step_s:.0f}" for profile in trace.profiles[-2:]]) for trace in traces]
    return [
        f"inference FLOPs {gating} where union has {union}",
        f"steps of {steps[0]} ms where union has {steps[1]} ms",
    ]


_RESNET20, _RESNET32 = "cifar10-resnet20", "cifar10-resnet32"
_RESNET18, _VGG11 = "cifar10-resnet18-64", "cifar10-vgg11"
_SEEDS = {f"seed{seed}-prunetrain-r0.25": f"seed{seed}-dense" for seed in (2, 3)}
_FIRST = {"prunetrain-r0.25": "dense"}  # the first pair of ResNet-32 and of VGG-11
CHECKS: dict[str, Callable[[Path], Figures]] = {
    "recorded-pair": partial(recorded_pair, run="prunetrain-r0.2", folder=_RESNET20),
    "recorded-r03": partial(recorded_r03, run="prunetrain-r0.3", folder=_RESNET20),
    "recorded-gating": partial(recorded_gating, runs=("gating-r0.2", "prunetrain-r0.2"), folder=_RESNET20),
    "recorded-vgg11": partial(recorded_saving, pairs=_FIRST, folder=_VGG11),
    "recorded-vgg11-pace": partial(recorded_pace, pairs=_FIRST, folder=_VGG11),
    "recorded-vgg11-steps": partial(recorded_steps, folder=_VGG11),
    "recorded-vgg11-layers": partial(recorded_wide, folder=_VGG11),
    "recorded-vgg11-widths": partial(pruned_widths, run="prunetrain-r0.25", folder=_VGG11),
    "paper-vgg11": partial(paper_vgg11, run="prunetrain-r0.25"),
    "recorded-resnet18": partial(recorded_saving, pairs={"prunetrain-r0.2": "dense"}, folder=_RESNET18),
    "recorded-resnet18-pace": partial(recorded_pace, pairs={"prunetrain-r0.2": "dense"}, folder=_RESNET18),
    "recorded-resnet18-steps": partial(recorded_steps, folder=_RESNET18),
    "recorded-resnet18-size": partial(shrunk, run="prunetrain-r0.2", folder=_RESNET18),
    "recorded-resnet32": partial(recorded_saving, pairs=_FIRST, folder=_RESNET32),
    "recorded-resnet32-pace": partial(recorded_pace, pairs=_FIRST, folder=_RESNET32),
    "recorded-resnet32-machine": partial(
        recorded_machine, run="prunetrain-r0.25", networks=(7, 8, 9), folder=_RESNET32
    ),
    "recorded-resnet32-layers": partial(recorded_layers, run="prunetrain-r0.25", folder=_RESNET32),
    "recorded-seeds": partial(recorded_saving, pairs=_FIRST | _SEEDS, folder=_RESNET32),
    "recorded-seeds-pace": partial(recorded_pace, pairs=_SEEDS, folder=_RESNET32),
    "recorded-resnet32-steps": partial(recorded_steps, folder=_RESNET32),
    "recorded-resnet32-narrow": partial(recorded_narrow, run="seed2-prunetrain-r0.25", folder=_RESNET32),
    "recorded-dynamic": partial(recorded_dynamic, run="batch-dynamic", beside="batch-fixed", folder=_RESNET32),
    "recorded-modes": partial(recorded_modes, gating="mode-gating", union="mode-union", folder=_RESNET32),
    "recorded-modes-layers": partial(gating_layers, gating="mode-gating", union="mode-union", folder=_RESNET32),
    "recorded-twice": partial(recorded_twice, runs=("batch-fixed", "mode-union"), folder=_RESNET32),
    "recorded-own-work": partial(
        own_work,
        runs={
            "ResNet-32": (_RESNET32, "prunetrain-r0.25"),
            "VGG-11": (_VGG11, "prunetrain-r0.25"),
            "ResNet-18": (_RESNET18, "prunetrain-r0.2"),
        },
    ),
    "overheads": overheads,
}
