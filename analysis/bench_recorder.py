"""What does a recorder cost a training step? CPU time of small steps with and without it, in pairs.

The hooks do the same work whatever the network is, so a tiny network shows it best. CPU time, not wall time: what else
the machine does is not counted, but it takes caches and clock from both of a pair. So the least over all rounds stands
for a quiet machine, and the median of the pairs beside it says how far this one was from that. On a GPU a phase's end
also costs one event, about a microsecond of the host.

python analysis/bench_recorder.py [--steps 500] [--rounds 11] [--csv FILE.csv]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from benchmarks import Figure, add_option, tell
from torch import nn

import ptsim

STEP_S = 0.1  # a step of this length is what the share is of


def cpu_seconds(
    model: nn.Module, optimizer: torch.optim.Optimizer, recorder: ptsim.Recorder | None, steps: int
) -> float:
    """CPU seconds of one training step, the mean over `steps`."""
    images, labels = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    begin = time.process_time()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if recorder is not None:
            recorder.step(loss)
    return (time.process_time() - begin) / steps


def measure(steps: int, rounds: int) -> list[tuple[float, float]]:
    """CPU seconds of a step (without a recorder, with one) in every round; which comes first changes in turn."""
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def recorded() -> float:
        recorder = ptsim.Recorder(model, optimizer, input_shape=(1, 4, 4))
        seconds = cpu_seconds(model, optimizer, recorder, steps)
        recorder.end_epoch()
        recorder.close()
        return seconds

    cpu_seconds(model, optimizer, None, steps)  # warms up
    pairs = []
    for i in range(rounds):
        first_s = recorded() if i % 2 else cpu_seconds(model, optimizer, None, steps)
        second_s = cpu_seconds(model, optimizer, None, steps) if i % 2 else recorded()
        pairs.append((second_s, first_s) if i % 2 else (first_s, second_s))
    return pairs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=11)
    add_option(parser)
    options = parser.parse_args()
    pairs = measure(options.steps, options.rounds)
    least_s = min(without for without, _ in pairs)
    added_s = min(recorded for _, recorded in pairs) - least_s
    median_s = statistics.median(recorded - without for without, recorded in pairs)
    share = f"%, of a step of {1e3 * STEP_S:.0f} ms"
    figures = [
        Figure(f"a step without a recorder, CPU time, the least of {len(pairs)} rounds", 1e6 * least_s, "µs"),
        Figure("the recorder adds to the least", 1e6 * added_s, "µs"),
        Figure("the recorder adds to the least, share", 100 * added_s / STEP_S, share),
        Figure("the recorder adds, median of pairs", 1e6 * median_s, "µs"),
        Figure("the recorder adds, median of pairs, share", 100 * median_s / STEP_S, share),
    ]
    tell("recorder", figures, options.csv)


if __name__ == "__main__":
    main()
