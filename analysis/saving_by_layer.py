"""Where does the rest of the saving go? Time against MACs, layer by layer, of one network before and after pruning.

    python analysis/saving_by_layer.py TRACE [--batch 64] [--multiples 1,8,16] [--repeats 5] [--device cpu] [--out DIR]

TRACE is a recorded or a planned run. Its first and its last architecture are built from their records, and both train
random images on this machine, in turn, so that they meet the same state of the machine. Two tables come out:

* `layers.csv`: one row per layer of the dense network with its MACs and its milliseconds, dense and pruned. A removed
  layer counts zero. A layer that costs more of its time than of its MACs is where the saving is lost.
* `steps.csv`: one row per channel multiple: the pruned network with every channel count rounded up to it. It gives the
  share of MACs and of time that is left, and what was saved of the time for each part that was saved of the MACs. The
  parts of the step that are not layers (update of the weights, group lasso) stand in columns of their own.

Times of whole steps are taken without timers inside, those of layers with timers around each layer. Run it on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import ptsim
from ptsim.costs.flops import layer_macs, training_macs
from ptsim.errors import PtsimError
from ptsim.measure.profile import profile_network
from ptsim.measure.rebuild import rebuild
from ptsim.network import Network, Precision
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.groups import find_groups
from ptsim.sim.rounding import rounded
from ptsim.textfile import write_whole
from ptsim.trace.schema import Profile


def measure(networks: Sequence[Network], *, batch: int, repeats: int, device: str) -> list[list[Profile]]:
    """Profiles of each network, taken in turn: `repeats` rounds over all of them, each network's in order."""
    profiles: list[list[Profile]] = [[] for _ in networks]
    for _ in range(repeats):
        for found, network in zip(profiles, networks, strict=True):
            found.append(_profile(network, batch=batch, device=device))
    return profiles


def _profile(network: Network, *, batch: int, device: str) -> Profile:
    """One profile with an SGD update and the group lasso's gradient in its steps."""
    module, renamed = rebuild(network)
    module = module.to(device).train()
    lasso = GroupLasso(module, find_groups(module, network.input_shape))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)
    return profile_network(
        module,
        renamed,
        batch=batch,
        precision=Precision.FP32,
        memory_format="contiguous",
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


def step_table(networks: dict[str, Network], profiles: dict[str, Sequence[Profile]]) -> pd.DataFrame:
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is not positive")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Measure, print both tables and write them where asked; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="recorded or planned run whose last network is pruned")
    parser.add_argument("--batch", type=_positive, default=64, help="images per step (default 64)")
    parser.add_argument(
        "--multiples",
        type=lambda text: [_positive(part) for part in text.split(",")],
        default=[1, 8, 16],
        help="channel multiples to round the pruned network to (default 1,8,16)",
    )
    parser.add_argument("--repeats", type=_positive, default=5, help="rounds over all networks (default 5)")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for layers.csv and steps.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        trace = ptsim.read_trace(options.trace)
        dense, pruned = trace.network_of(trace.epochs[0]), trace.final_network
        networks = {"dense": dense} | {
            f"pruned, multiple of {multiple}": rounded(pruned, multiple) for multiple in options.multiples
        }
        profiles = dict(
            zip(
                networks,
                measure(list(networks.values()), batch=options.batch, repeats=options.repeats, device=options.device),
                strict=True,
            )
        )
    except PtsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = list(networks)
    tables = {
        "layers": layer_table(dense, networks[names[1]], profiles["dense"], profiles[names[1]]),
        "steps": step_table(networks, profiles),
    }
    for name, table in tables.items():
        print(table.to_string(index=False, float_format="{:.4g}".format, na_rep="–"), end="\n\n")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            write_whole(options.out / f"{name}.csv", table.to_csv(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
