"""Where the time of the paper's runs on a TITAN Xp goes by the model, and which trajectory would explain another time.

    python analysis/paper_misses.py lym2019/resnet50-cifar10 [--bn 0.6] [--tilt 0]

Prints milliseconds of a mini-batch by kind of work: the dense network, the mean of the planned run, its last network;
and the run's share of the dense time, as it is, without the penalty, and with convolutions that take as long as dense
ones. `--bn` asks for a trajectory with that BatchNorm traffic, `--tilt` for another default (`docs/paper.md`).
"""

from __future__ import annotations

import argparse
from collections import Counter

from ptsim.answers.plan import fractions, plan
from ptsim.costs.step import step_time
from ptsim.hardware.catalog import load_device
from ptsim.network import PRODUCTS
from ptsim.prune.trajectories import targets
from ptsim.prune.trajectories.catalog import published_runs
from ptsim.trace.pairs import held_dense
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace

DEVICE = "titan-xp"


def parts(trace: Trace, epoch: Epoch) -> Counter[str]:
    """Milliseconds of one mini-batch of `epoch`, by kind of layer; convolutions and linear layers are products."""
    step = step_time(trace.network_of(epoch), load_device(DEVICE), trace.setting_of(epoch))
    found: Counter[str] = Counter()
    for layer in step.layers:
        kind = "products" if layer.kind in PRODUCTS else str(layer.kind)
        found[kind] += 1e3 * (layer.forward_s + layer.backward_s)
    rest = {"optimizer": step.optimizer_s, "penalty": step.regularizer_s, "waits for the host": step.overhead_s}
    found.update({name: 1e3 * seconds for name, seconds in rest.items()})
    return found


def mean_parts(trace: Trace) -> Counter[str]:
    """The same on average over the run; every epoch has as many images."""
    known: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for epoch in trace.epochs:
        if epoch.architecture not in known:
            known[epoch.architecture] = parts(trace, epoch)
        total.update(known[epoch.architecture])
    return Counter({name: value / len(trace.epochs) for name, value in total.items()})


def main() -> None:
    """Plan one run and print where its time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--bn", type=float)
    parser.add_argument("--tilt", type=float, default=targets.DEFAULT_TILT)
    options = parser.parse_args()
    targets.DEFAULT_TILT = options.tilt
    run = published_runs()[options.run]
    pruning = f"training={run.training},inference={run.inference},bn={options.bn}" if options.bn else run.name
    trace = plan(
        run.model,
        pruning=pruning,
        images=run.images,
        num_classes=run.classes,
        input_shape=(3, 32, 32),
        epochs=run.epochs,
        batch=run.batch,
        interval=run.interval,
    )
    dense, pruned = mean_parts(held_dense(trace)), mean_parts(trace)
    print(f"{run.name}, {pruning}: BatchNorm traffic {fractions(trace).bn_bytes_fraction:.2f} of dense")
    print(f"{'ms':20}{'dense':>9}{'mean':>9}{'last':>9}")
    last = parts(trace, trace.epochs[-1])
    for name in sorted(dense | pruned, key=lambda name: -dense[name]):
        print(f"{name:20}{dense[name]:9.2f}{pruned[name]:9.2f}{last[name]:9.2f}")
    whole, rest = dense.total(), pruned.total()
    print(f"time of dense {rest / whole:.3f}, without penalty {(rest - pruned['penalty']) / whole:.3f}, ", end="")
    print(f"with products as long as dense {(rest - pruned['products'] + dense['products']) / whole:.3f}")


if __name__ == "__main__":
    main()
