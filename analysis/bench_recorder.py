"""What does a recorder cost a training step? CPU time of small steps with and without it, in turn.

The hooks do the same work whatever the network is, so a tiny network shows it best. CPU time, not wall time: what else
the machine does is not counted. On a GPU a phase's end also costs one event, about a microsecond of the host.

python analysis/bench_recorder.py [--steps 500] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
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


def measure(steps: int, rounds: int) -> tuple[float, float]:
    """Medians over the rounds: CPU seconds of a step without a recorder, and what the recorder adds."""
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plain, added = [], []
    for _ in range(rounds):
        plain.append(cpu_seconds(model, optimizer, None, steps))
        recorder = ptsim.Recorder(model, optimizer, input_shape=(1, 4, 4))
        added.append(cpu_seconds(model, optimizer, recorder, steps) - plain[-1])
        recorder.end_epoch()
        recorder.close()
    return statistics.median(plain), statistics.median(added)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    plain_s, added_s = measure(options.steps, options.rounds)
    print(f"a step without a recorder  {plain_s * 1e6:8.1f} µs of CPU time")
    print(f"the recorder adds          {added_s * 1e6:8.1f} µs, {added_s / STEP_S:.3%} of a step of 100 ms")


if __name__ == "__main__":
    main()
