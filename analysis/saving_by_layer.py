"""Where does the rest of the saving go? Time against MACs, layer by layer, of one network before and after pruning.

    python analysis/saving_by_layer.py TRACE [--batch 32] [--batches 4,32,128] [--multiples 1,8,16] [--repeats 5]
        [--threads 1] [--device cpu] [--only-overheads] [--out DIR]
    python analysis/saving_by_layer.py TRACE --recorded [--out DIR]

TRACE is a recorded or a planned run. Its first and its last architecture are built from their records, and both train
random images on this machine, in turn, so that they meet the same state of the machine, in the run's own precision and
memory format. Up to five tables come out, each a CSV file in `--out`:

* `layers`: one row per layer of the dense network with its MACs and its milliseconds, dense and pruned. A removed
  layer counts zero. A layer that costs more of its time than of its MACs is where the saving is lost.
* `kinds`: the same, one row for all layers of a kind, the kind that loses most first.
* `steps`: one row per channel multiple: the pruned network with every channel count rounded up to it. It gives the
  share of MACs and of time that is left, and what was saved of the time for each part that was saved of the MACs. The
  parts of the step that are not layers (update of the weights, group lasso) stand in columns of their own.
* `overheads`: what ptsim's recorder, penalty and data path take beside a plain training step of the dense network, at
  the mini-batches of `--batches`, a small and a large one. Each is timed by itself: two whole steps differ by more.
* `epochs`: where the recorded run itself spent its time. Nothing for a planned run.

Times of whole steps are taken without timers inside, those of layers with timers around each layer. Run it on a machine
that does nothing else. With `--recorded` nothing is measured: the times are those of the profiles that the run took of
each of its networks while it trained. `steps` then has one row for each of them, and there are no `overheads`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import bench_recorder
import pandas as pd
import torch
from torch.nn import functional as F

import ptsim
from ptsim.costs.flops import layer_macs, training_macs
from ptsim.errors import PtsimError, UsageError
from ptsim.hardware.profile import OperatorSetting
from ptsim.measure.profile import layout, number_format, profile_network
from ptsim.measure.rebuild import rebuild
from ptsim.network import Network
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.groups import find_groups
from ptsim.sim.rounding import rounded
from ptsim.textfile import write_whole
from ptsim.trace.schema import Profile
from ptsim.training.config import Config
from ptsim.training.data import ResidentData, Share

_TINY_STEPS = 200  # of a network that takes hardly longer than the recorder


def measure(
    networks: Sequence[Network], *, batch: int, setting: OperatorSetting, repeats: int, device: str
) -> list[list[Profile]]:
    """Profiles of each network, taken in turn: `repeats` rounds over all of them, each network's in order."""
    profiles: list[list[Profile]] = [[] for _ in networks]
    for _ in range(repeats):
        for found, network in zip(profiles, networks, strict=True):
            found.append(_profile(network, batch=batch, setting=setting, device=device))
    return profiles


def _profile(network: Network, *, batch: int, setting: OperatorSetting, device: str) -> Profile:
    """One profile with an SGD update and the group lasso's gradient in its steps."""
    module, renamed = rebuild(network)
    module = module.to(device).to(memory_format=layout(setting.memory_format)).train()
    lasso = GroupLasso(module, find_groups(module, network.input_shape))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)
    return profile_network(
        module,
        renamed,
        batch=batch,
        precision=setting.precision,
        memory_format=setting.memory_format,
        optimizer=optimizer,
        regularizer=functools.partial(lasso.add_gradient, 1e-9),
        device=device,
    )


def layer_table(
    dense: Network, pruned: Network, dense_profiles: Sequence[Profile], pruned_profiles: Sequence[Profile]
) -> pd.DataFrame:
    """One row per layer of the dense network, in its order; `*_macs` are an image's multiply-accumulates in training.

    `*_seconds` are forward and backward of one mini-batch, the median over the rounds. `macs_left` and `time_left` are
    pruned over dense; null where the dense network has none.
    """
    before, after = _layer_seconds(dense, dense_profiles), _layer_seconds(pruned, pruned_profiles)
    left = {layer.name: layer for layer in pruned.layers}
    rows = [
        {
            "layer": layer.name,
            "kind": str(layer.kind),
            "dense_macs": layer_macs(layer).training,
            "pruned_macs": layer_macs(left[layer.name]).training if layer.name in left else 0,
            "dense_seconds": before[layer.name],
            "pruned_seconds": after.get(layer.name, 0.0),
        }
        for layer in dense.layers
    ]
    frame = pd.DataFrame(rows)
    frame["macs_left"] = frame.pruned_macs / frame.dense_macs.where(frame.dense_macs > 0)
    frame["time_left"] = frame.pruned_seconds / frame.dense_seconds.where(frame.dense_seconds > 0)
    frame["share_of_dense_time"] = frame.dense_seconds / frame.dense_seconds.sum()
    return frame


def _layer_seconds(network: Network, profiles: Sequence[Profile]) -> dict[str, float]:
    """Seconds of each layer by its name in `network`; the rebuilt module's layers keep the order."""
    rounds = [[layer.forward_s + (layer.backward_s or 0.0) for layer in profile.layers] for profile in profiles]
    medians = [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
    return dict(zip((layer.name for layer in network.layers), medians, strict=True))


def step_table(networks: Mapping[str, Network], profiles: Mapping[str, Sequence[Profile]]) -> pd.DataFrame:
    """One row per network, the dense one first: MACs and seconds of a step, and what is left of the dense ones.

    The seconds are the median over the rounds; the ratios are medians of each round's own ratio, since a round meets
    one state of the machine. `saved_time_per_saved_macs` is (1 - time left) / (1 - MACs left).
    """
    dense = next(iter(networks))
    macs = {name: training_macs(network) for name, network in networks.items()}
    rows = []
    for name, found in profiles.items():
        time_left = statistics.median(
            mine.step_s / theirs.step_s for mine, theirs in zip(found, profiles[dense], strict=True)
        )
        macs_left = macs[name] / macs[dense]
        step_s = statistics.median(profile.step_s for profile in found)
        rows.append(
            {
                "network": name,
                "training_macs": macs[name],
                "step_seconds": step_s,
                "macs_left": macs_left,
                "time_left": time_left,
                "saved_time_per_saved_macs": (1 - time_left) / (1 - macs_left) if macs_left < 1 else None,
                "images_per_second": found[0].batch / step_s,
                "optimizer_share": statistics.median(p.optimizer_s / p.step_s for p in found),
                "regularizer_share": statistics.median(p.regularizer_s / p.step_s for p in found),
                "slowest_over_fastest_round": max(p.step_s for p in found) / min(p.step_s for p in found),
            }
        )
    return pd.DataFrame(rows)


def kind_table(layers: pd.DataFrame, macs_left: float) -> pd.DataFrame:
    """One row per kind of layer, the one that loses most of the saving first.

    `lost_share` is what a kind takes more than its dense time times `macs_left`, the whole network's, as a share of
    all layers' dense time. The rows add up to what the layers' time left lies above the MACs left.
    """
    sums = layers.groupby("kind", as_index=False)[
        ["dense_macs", "pruned_macs", "dense_seconds", "pruned_seconds"]
    ].sum()
    sums["macs_left"] = sums.pruned_macs / sums.dense_macs.where(sums.dense_macs > 0)
    sums["time_left"] = sums.pruned_seconds / sums.dense_seconds.where(sums.dense_seconds > 0)
    sums["share_of_dense_time"] = sums.dense_seconds / sums.dense_seconds.sum()
    sums["lost_share"] = (sums.pruned_seconds - macs_left * sums.dense_seconds) / sums.dense_seconds.sum()
    return sums.sort_values("lost_share", ascending=False, ignore_index=True)


def overhead_table(
    network: Network, batches: Sequence[int], *, setting: OperatorSetting, repeats: int, device: str, steps: int = 5
) -> pd.DataFrame:
    """What ptsim adds to a plain training step of `network`, at each mini-batch: one row for each of its parts.

    A plain step is forward, backward and SGD. Beside it are timed, `repeats` times `steps` of each: the recorder on a
    tiny network (`bench_recorder`: its hooks do the same work on any); `PruneTrain.step` inside a step, that is the
    penalty with its checks; and the making of a mini-batch on the device, with crop and flip. `share_of_step` is the
    median over the rounds of a part's time over the plain step of the same round.
    """
    recorder_s = [recorded_s - without_s for without_s, recorded_s in bench_recorder.measure(_TINY_STEPS, repeats)]
    rows = []
    for batch in batches:
        loops, penalty_s = _loops(network, batch, setting, device)
        rounds = []
        for _ in range(repeats):
            rounds.append({name: _seconds(loop, steps, device) for name, loop in loops.items()})
            rounds[-1]["penalty"] = statistics.mean(penalty_s[-steps:])
        parts = {
            "recorder": recorder_s,
            "penalty": [found["penalty"] for found in rounds],
            "data": [found["data"] for found in rounds],
        }
        plain_s = [found["plain"] for found in rounds]
        for part, added_s in parts.items():
            rows.append(
                {
                    "batch": batch,
                    "plain_step_seconds": statistics.median(plain_s),
                    "part": part,
                    "added_seconds": statistics.median(added_s),
                    "share_of_step": statistics.median(a / b for a, b in zip(added_s, plain_s, strict=True)),
                }
            )
    return pd.DataFrame(rows)


def _loops(
    network: Network, batch: int, setting: OperatorSetting, device: str
) -> tuple[dict[str, Callable[[], object]], list[float]]:
    """A plain step, one with the penalty, and one mini-batch of data; and the seconds of every penalty so far."""
    shape, place = network.input_shape, torch.device(device)
    images = torch.randn((batch, *shape), device=device).contiguous(memory_format=layout(setting.memory_format))
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    penalty_s: list[float] = []

    def loop(*, penalised: bool) -> Callable[[], object]:
        module = rebuild(network)[0].to(device).to(memory_format=layout(setting.memory_format)).train()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)
        pruner = ptsim.PruneTrain(module, optimizer, input_shape=shape) if penalised else None

        def step() -> None:
            with number_format(setting.precision, place):
                loss = F.cross_entropy(module(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call] # torch's gap
            if pruner is not None:
                _wait(device)
                begin_s = time.perf_counter()
                pruner.step(loss)
                _wait(device)
                penalty_s.append(time.perf_counter() - begin_s)
            optimizer.step()

        return step

    pixels = torch.randint(0, 256, (8 * batch, *shape), dtype=torch.uint8)
    config = Config(augment="crop_flip", batch=batch, memory_format=setting.memory_format)
    split = pixels, torch.zeros(len(pixels), dtype=torch.int64)
    source = ResidentData("random", train=split, validation=split, num_classes=2, config=config, device=place)
    epochs = (source.training_batches(epoch, batch, Share()) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    loops = {"plain": loop(penalised=False), "penalised": loop(penalised=True), "data": lambda: next(batches)}
    return loops, penalty_s


def _seconds(action: Callable[[], object], steps: int, device: str) -> float:
    """Seconds of one call, the mean over `steps` after one that warms up."""
    begin_s = 0.0
    for count in (1, steps):
        begin_s = time.perf_counter()
        for _ in range(count):
            action()
        _wait(device)
    return (time.perf_counter() - begin_s) / steps


def _wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def epoch_table(trace: ptsim.Trace) -> pd.DataFrame:
    """Where the recorded run itself spent its time: shares of its epochs' wall time, of the first, the last and all.

    `rest` is the loop's own work. Reconfigurations and validation are no part of an epoch's wall time; their seconds
    stand over it. Empty where nothing was measured.
    """
    timed = [epoch for epoch in trace.epochs if epoch.measured_time is not None]
    if not timed:
        return pd.DataFrame()
    rows = []
    for name, epochs in (("first epoch", timed[:1]), ("last epoch", timed[-1:]), ("all epochs", timed)):
        times = [epoch.time for epoch in epochs]
        wall_s = sum(t.wall_s for t in times)
        parts = {
            part: sum(getattr(t, f"{part}_s") for t in times)
            for part in ("data_wait", "forward", "backward", "regularizer", "optimizer", "exposed_communication")
        }
        numbers = {epoch.epoch for epoch in epochs}
        more = {
            "validation": sum(t.validation_s for t in times),
            "reconfigurations": sum(r.duration_s for r in trace.reconfigurations if r.epoch in numbers),
        }
        shares = parts | {"rest": wall_s - sum(parts.values())} | more
        seconds = {"wall_seconds": wall_s, "images_per_second": sum(e.num_images for e in epochs) / wall_s}
        rows.append({"of": name} | seconds | {f"{part}_share": value / wall_s for part, value in shares.items()})
    return pd.DataFrame(rows)


def recorded_profiles(trace: ptsim.Trace) -> tuple[dict[str, Network], dict[str, list[Profile]]]:
    """The networks of a run in their order, "from epoch 0" and so on, and the profile that it recorded of each.

    Raises:
        UsageError: a network has no profile with the mini-batch of its first epoch.
    """
    firsts = {epoch.architecture: epoch for epoch in reversed(trace.epochs)}
    found = {(profile.architecture, profile.batch): profile for profile in trace.profiles}
    networks, profiles = {}, {}
    for epoch in sorted(firsts.values(), key=lambda epoch: epoch.epoch):
        name = f"from epoch {epoch.epoch}"
        profile = found.get((epoch.architecture, epoch.batch_per_gpu))
        if profile is None:
            raise UsageError(f"the trace has no profile of its network {name} with mini-batch {epoch.batch_per_gpu}")
        networks[name], profiles[name] = trace.network_of(epoch), [profile]
    return networks, profiles


def recorded_tables(trace: ptsim.Trace) -> dict[str, pd.DataFrame]:
    """The tables `layers`, `kinds`, `steps` and `epochs` of what the run itself has recorded.

    Raises:
        UsageError: a profile is missing.
    """
    networks, profiles = recorded_profiles(trace)
    first, last = next(iter(networks)), list(networks)[-1]
    layers = layer_table(networks[first], networks[last], profiles[first], profiles[last])
    steps = step_table(networks, profiles)
    return {
        "layers": layers,
        "kinds": kind_table(layers, steps.macs_left.iloc[-1]),
        "steps": steps,
        "epochs": epoch_table(trace),
    }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is not positive")
    return value


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def tables_of(trace: ptsim.Trace, options: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """The five tables by name, or only the overheads.

    Raises:
        PtsimError: a network cannot be built from its record, or is pruned by nothing.
    """
    dense, pruned = trace.network_of(trace.epochs[0]), trace.final_network
    setting = OperatorSetting(precision=trace.run.precision, memory_format=trace.run.memory_format)
    overheads = functools.partial(
        overhead_table, dense, options.batches, setting=setting, repeats=options.repeats, device=options.device
    )
    if options.only_overheads:
        return {"overheads": overheads()}
    networks = {"dense": dense} | {
        f"pruned, multiple of {multiple}": rounded(pruned, multiple) for multiple in options.multiples
    }
    batch = options.batch or trace.epochs[0].batch_per_gpu
    found = measure(
        list(networks.values()), batch=batch, setting=setting, repeats=options.repeats, device=options.device
    )
    profiles = dict(zip(networks, found, strict=True))
    first = list(networks)[1]
    layers = layer_table(dense, networks[first], profiles["dense"], profiles[first])
    steps = step_table(networks, profiles)
    return {
        "layers": layers,
        "kinds": kind_table(layers, steps.macs_left[1]),
        "steps": steps,
        "overheads": overheads(),
        "epochs": epoch_table(trace),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables and write them where asked; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="recorded or planned run whose last network is pruned")
    parser.add_argument("--recorded", action="store_true", help="measure nothing: the times of the run's own profiles")
    parser.add_argument("--batch", type=_positive, help="images per step (default: the run's)")
    parser.add_argument("--only-overheads", action="store_true", help="measure nothing but that table")
    parser.add_argument(
        "--batches", type=_numbers, default=[4, 32, 128], help="mini-batches of the overheads (default 4,32,128)"
    )
    parser.add_argument(
        "--multiples",
        type=_numbers,
        default=[1, 8, 16],
        help="channel multiples to round the pruned network to (default 1,8,16)",
    )
    parser.add_argument("--repeats", type=_positive, default=5, help="rounds over all networks (default 5)")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        trace = ptsim.read_trace(options.trace)
        tables = recorded_tables(trace) if options.recorded else tables_of(trace, options)
    except PtsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, table in tables.items():
        if table.empty:
            continue
        print(f"{name}\n{table.to_string(index=False, float_format='{:.4g}'.format, na_rep='–')}", end="\n\n")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            write_whole(options.out / f"{name}.csv", table.to_csv(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
