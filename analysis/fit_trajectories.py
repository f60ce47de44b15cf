"""How memory-bound edges are pruned, and how far edges scatter: the two constants of planned trajectories.

    python analysis/fit_trajectories.py

Prints the tilt at which the published runs with a BatchNorm column meet it (`DEFAULT_TILT` is their median), and how
far the hazards of a recorded run's edges scatter around theirs (`SCATTER`). No measured time enters.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np

from ptsim import zoo
from ptsim.prune.trajectories.build import Dense, dense_network
from ptsim.prune.trajectories.catalog import PublishedRun, published_runs
from ptsim.prune.trajectories.like import recorded_densities
from ptsim.prune.trajectories.problem import Problem
from ptsim.prune.trajectories.roles import roles
from ptsim.prune.trajectories.targets import Targets, tilt_of
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace

RUNS = Path(__file__).parent.parent / "traces" / "cifar10-resnet20"
RECORDED = ("prunetrain-r0.1", "prunetrain-r0.2", "prunetrain-r0.3")


def dense_of(model: str, classes: int) -> Dense:
    """A model's dense network with its edges."""
    entry = zoo.find(model)
    return dense_network(
        lambda: entry.build(num_classes=classes), name=model, input_shape=entry.input_shape, num_classes=classes
    )


def tilt(run: PublishedRun, dense: Dense) -> float:
    """The tilt at which a published run's FLOPs and BatchNorm traffic are met."""
    events = tuple(e for e in range(run.epochs) if (e + 1) % run.interval == 0 or e + 1 == run.epochs)
    problem = Problem(model=run.model, edges=dense.edges, epochs=run.epochs, events=events, table=dense.table)
    return tilt_of(Targets(training=run.training, inference=run.inference, bn=run.bn), problem)


def scatter(trace: Trace, dense: Dense) -> tuple[int, float, float]:
    """Pruned edges of a recorded run, the slope of log(hazard) over log(intensity), and the deviation around it."""
    _, densities, _ = recorded_densities(trace)
    first = roles(trace.networks[trace.epochs[0].architecture])
    layers = sorted(first, key=lambda name: first[name][1])[:-1]
    edges = {edge.name: index for index, edge in enumerate(dense.edges)}
    intensity = dense.table.intensity
    points = [
        (np.log(intensity[edges[name]]), np.log(-np.log(density)))
        for name, density in zip(layers, densities[-1], strict=True)
        if name in edges and 0 < density < 1
    ]
    x, y = np.array(points).T
    slope, constant = np.polyfit(x, y, 1)
    return len(points), float(slope), float(np.std(y - slope * x - constant, ddof=2))


def main() -> int:
    """Print both."""
    resnet50, tilts = dense_of("torchvision:resnet50", 1000), []
    for run in published_runs().values():
        if run.bn is not None:
            tilts.append(tilt(run, resnet50))
            print(f"{run.name}: tilt {tilts[-1]:.2f}")
    print(f"median {statistics.median(tilts):.2f}")
    resnet20 = dense_of("resnet20", 10)
    for name in RECORDED:
        count, slope, deviation = scatter(read_trace(RUNS / f"{name}.jsonl"), resnet20)
        print(f"{name}: {count} pruned edges, slope {slope:.2f}, scatter {deviation:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
