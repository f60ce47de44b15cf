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
from ptsim.trace.schema import Epoch
from ptsim.units import listed

Pairs = Mapping[str, str]  # a run, and the run that was recorded beside it


@functools.cache
def read_recorded(root: Path, folder: str, name: str) -> ptsim.Trace:
    """The run NAME in `traces/FOLDER`."""
    return ptsim.read_trace(root / "traces" / folder / f"{name}.jsonl")


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


def saved_ratio(of: Mapping[str, float]) -> float:
    """What was saved of the time for each part that was saved of the FLOPs."""
    return (1 - of["time"]) / (1 - of["flops"])


def ratio(of: Mapping[str, float]) -> str:
    """The same as a claim writes it."""
    return f"{saved_ratio(of):.1f}"


def saved_ratios(root: Path, *, folder: str, pairs: Pairs) -> list[float]:
    """The same of every pair, not rounded."""
    return [saved_ratio(recorded(root, folder, run, beside)) for run, beside in pairs.items()]


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


def penalty_share(epoch: Epoch) -> float:
    """The penalty's share of the loss that an epoch minimised."""
    assert epoch.penalty is not None
    assert epoch.train_loss is not None
    return epoch.penalty / (epoch.train_loss + epoch.penalty)


def penalty_shares(root: Path, *, runs: Mapping[str, tuple[str, str]]) -> Figures:
    """The penalty's share of each run's loss in its first epoch, where it is least, and in its last epoch."""
    found = []
    for name, (folder, run) in runs.items():
        shares = [penalty_share(epoch) for epoch in read_recorded(root, folder, run).epochs]
        found.append(f"{name}: {percents([shares[0], min(shares), shares[-1]])}")
    return found


def longer_schedule(root: Path, *, folder: str, pairs: Pairs) -> Figures:
    """What pairs of different length lost, on images for validation and on those for training."""
    found = []
    for run, beside in pairs.items():
        pruned, dense = (read_recorded(root, folder, name) for name in (run, beside))
        lost = [
            f"{100 * (getattr(dense.epochs[-1], of) - getattr(pruned.epochs[-1], of)):.1f}"
            for of in ("validation_accuracy", "train_accuracy")
        ]
        found.append(f"{len(pruned.epochs)} epochs: {lost[0]} points, in training {lost[1]} points")
    return found


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


def unpruned_apart(root: Path, *, pairs: Sequence[tuple[str, str, str]]) -> Figures:
    """How much longer than the dense runs beside them pruned runs took until they were pruned; without the penalty.

    A pair is a folder, the pruned run and the dense one.
    """
    apart = []
    for folder, run, beside in pairs:
        pruned, dense = (read_recorded(root, folder, name) for name in (run, beside))
        times = [epoch.time for epoch in pruned.epochs[: first_pruned(pruned)]]
        alike_s = sum(time.wall_s - time.regularizer_s for time in times)
        apart.append(alike_s / sum(epochs_s(dense)[: len(times)]) - 1)
    return [f"{100 * min(apart):+.1f} to {100 * max(apart):+.1f} %".replace("-", "−")]


def unpruned_longer(root: Path, *, folder: str, pairs: Pairs) -> Figures:
    """How much longer than the dense run beside it a pruned run took until it was pruned, and what that costs."""
    found = []
    for run, beside in pairs.items():
        pruned, dense = (read_recorded(root, folder, name) for name in (run, beside))
        times = [epoch.time for epoch in pruned.epochs[: first_pruned(pruned)]]
        dense_s, penalty_s = sum(epochs_s(dense)[: len(times)]), sum(time.regularizer_s for time in times)
        longer = sum(time.wall_s for time in times) / dense_s - 1
        saved = 1 - recorded(root, folder, run, beside)["flops"]
        equal = (1 - own_pace(pruned) / own_pace(dense)) / saved
        found += [
            f"first {len(times)} epochs {percent(longer, 1)} longer, "
            f"{percent(longer - penalty_s / dense_s, 1)} without the penalty",
            f"{percent(saved)} of the training FLOPs saved: a point of the time is {0.01 / saved:.2f} of the ratio",
            f"with equal paces in the first ten epochs it would be {equal:.1f}",
        ]
    return found


def own_pace(trace: ptsim.Trace) -> float:
    """The time of a run at the mean pace of its own first ten epochs: its epochs' mean over theirs.

    Raises:
        ValueError: one of these ten is pruned, and the claims say that none is.
    """
    seconds = epochs_s(trace)
    early = [epoch.epoch for epoch in trace.epochs[:10] if epoch.architecture != trace.epochs[0].architecture]
    if early:
        raise ValueError(f"{trace.path} is pruned from epoch {early[0]} on: its first ten epochs are no pace of it")
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


def paper_table(root: Path) -> pd.DataFrame:
    """Table 1 of the paper."""
    rows = pd.read_csv(root / "traces" / "public" / "prunetrain_paper.csv")
    return rows[rows["where"] == "Table 1"]


def paper_accuracy(root: Path) -> Figures:
    """What the paper lost of the accuracy on CIFAR-10 and CIFAR-100."""
    rows = paper_table(root)
    rows = rows[rows.dataset.str.startswith("CIFAR") & (rows.metric == "validation accuracy change vs dense")]
    lost = -rows.value.astype(float)
    return [f"{lost.min():.1f} to {lost.max():.1f} points"]


def paper_vgg11(root: Path, *, run: str) -> Figures:
    """What the paper reports for the network that was recorded here, and how much longer it trained."""
    rows = paper_table(root)
    rows = rows[(rows.dataset == "CIFAR10") & (rows.model == "VGG11")]
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


RESNET20, RESNET32 = "cifar10-resnet20", "cifar10-resnet32"
RESNET18, VGG11 = "cifar10-resnet18-64", "cifar10-vgg11"
_SEEDS = {f"seed{seed}-prunetrain-r0.25": f"seed{seed}-dense" for seed in (2, 3)}
_BATCH_128 = {"batch128-prunetrain-r0.25": "batch128-dense"}  # of VGG-11
_BATCH_128_LONG = {"batch128-long-prunetrain-r0.25": "batch128-long-dense"}  # of VGG-11
_CHANNELS_LAST = {"batch128-channels-last-prunetrain-r0.25": "batch128-channels-last-dense"}  # of VGG-11
_FIRST = {"prunetrain-r0.25": "dense"}  # the first pair of ResNet-32 and of VGG-11
_OWN_WORK = {
    "ResNet-32": (RESNET32, "prunetrain-r0.25"),
    "VGG-11": (VGG11, "prunetrain-r0.25"),
    "ResNet-18": (RESNET18, "prunetrain-r0.2"),
}
_PAIRS = (  # side by side from the first epoch on
    (RESNET20, "prunetrain-r0.2", "dense"),
    (RESNET20, "long-prunetrain-r0.2", "long-dense"),
    (VGG11, "prunetrain-r0.25", "dense"),
    *((VGG11, run, beside) for run, beside in (_BATCH_128 | _BATCH_128_LONG).items()),
    (RESNET18, "prunetrain-r0.2", "dense"),
    (RESNET32, "prunetrain-r0.2", "dense-beside-r0.2"),
    *((RESNET32, run, beside) for run, beside in (_FIRST | _SEEDS).items()),
)
_PENALISED = {
    "ResNet-20": (RESNET20, "prunetrain-r0.2"),
    "ResNet-20, 120 epochs": (RESNET20, "long-prunetrain-r0.2"),
    **_OWN_WORK,
}
CHECKS: dict[str, Callable[[Path], Figures]] = {
    "recorded-pair": partial(recorded_pair, run="prunetrain-r0.2", folder=RESNET20),
    "recorded-resnet20-long": partial(recorded_saving, pairs={"long-prunetrain-r0.2": "long-dense"}, folder=RESNET20),
    "recorded-longer": partial(
        longer_schedule, pairs={"prunetrain-r0.2": "dense", "long-prunetrain-r0.2": "long-dense"}, folder=RESNET20
    ),
    "recorded-penalty-share": partial(penalty_shares, runs=_PENALISED),
    "recorded-r03": partial(recorded_r03, run="prunetrain-r0.3", folder=RESNET20),
    "recorded-gating": partial(recorded_gating, runs=("gating-r0.2", "prunetrain-r0.2"), folder=RESNET20),
    "recorded-vgg11": partial(recorded_saving, pairs=_FIRST, folder=VGG11),
    "recorded-vgg11-pace": partial(recorded_pace, pairs=_FIRST, folder=VGG11),
    "recorded-vgg11-widths": partial(pruned_widths, run="prunetrain-r0.25", folder=VGG11),
    "recorded-vgg11-128": partial(recorded_saving, pairs=_BATCH_128, folder=VGG11),
    "recorded-vgg11-128-pace": partial(recorded_pace, pairs=_BATCH_128, folder=VGG11),
    "recorded-vgg11-128-work": partial(own_work, runs={"VGG-11": (VGG11, "batch128-prunetrain-r0.25")}),
    "recorded-vgg11-128-unpruned": partial(unpruned_longer, pairs=_BATCH_128, folder=VGG11),
    "recorded-vgg11-long": partial(recorded_saving, pairs=_BATCH_128_LONG, folder=VGG11),
    "recorded-vgg11-long-pace": partial(recorded_pace, pairs=_BATCH_128_LONG, folder=VGG11),
    "recorded-vgg11-long-work": partial(own_work, runs={"VGG-11": (VGG11, "batch128-long-prunetrain-r0.25")}),
    "recorded-vgg11-long-unpruned": partial(unpruned_longer, pairs=_BATCH_128_LONG, folder=VGG11),
    "recorded-vgg11-long-widths": partial(pruned_widths, run="batch128-long-prunetrain-r0.25", folder=VGG11),
    "recorded-vgg11-channels-last": partial(recorded_saving, pairs=_CHANNELS_LAST, folder=VGG11),
    "recorded-vgg11-channels-last-pace": partial(recorded_pace, pairs=_CHANNELS_LAST, folder=VGG11),
    "recorded-vgg11-channels-last-work": partial(
        own_work, runs={"VGG-11": (VGG11, "batch128-channels-last-prunetrain-r0.25")}
    ),
    "recorded-vgg11-channels-last-unpruned": partial(unpruned_longer, pairs=_CHANNELS_LAST, folder=VGG11),
    "recorded-vgg11-channels-last-widths": partial(
        pruned_widths, run="batch128-channels-last-prunetrain-r0.25", folder=VGG11
    ),
    "paper-accuracy": paper_accuracy,
    "paper-vgg11": partial(paper_vgg11, run="prunetrain-r0.25"),
    "recorded-resnet18": partial(recorded_saving, pairs={"prunetrain-r0.2": "dense"}, folder=RESNET18),
    "recorded-resnet18-pace": partial(recorded_pace, pairs={"prunetrain-r0.2": "dense"}, folder=RESNET18),
    "recorded-resnet18-size": partial(shrunk, run="prunetrain-r0.2", folder=RESNET18),
    "recorded-resnet32": partial(recorded_saving, pairs=_FIRST, folder=RESNET32),
    "recorded-resnet32-r02": partial(recorded_saving, pairs={"prunetrain-r0.2": "dense-beside-r0.2"}, folder=RESNET32),
    "recorded-resnet32-pace": partial(recorded_pace, pairs=_FIRST, folder=RESNET32),
    "recorded-resnet32-machine": partial(recorded_machine, run="prunetrain-r0.25", networks=(7, 8, 9), folder=RESNET32),
    "recorded-seeds": partial(recorded_saving, pairs=_FIRST | _SEEDS, folder=RESNET32),
    "recorded-seeds-pace": partial(recorded_pace, pairs=_SEEDS, folder=RESNET32),
    "recorded-dynamic": partial(recorded_dynamic, run="batch-dynamic", beside="batch-fixed", folder=RESNET32),
    "recorded-modes": partial(recorded_modes, gating="mode-gating", union="mode-union", folder=RESNET32),
    "recorded-twice": partial(recorded_twice, runs=("batch-fixed", "mode-union"), folder=RESNET32),
    "recorded-unpruned": partial(unpruned_apart, pairs=_PAIRS),
    "recorded-own-work": partial(own_work, runs=_OWN_WORK),
}
# What of the claims about pairs a goal is compared with.
REACHED: dict[str, Callable[[Path], list[float]]] = {
    name: partial(saved_ratios, **check.keywords)
    for name, check in CHECKS.items()
    if isinstance(check, partial) and check.func is recorded_saving
}
