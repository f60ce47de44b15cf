"""Does every classification network of torchvision plan? One row each: fractions, CPU seconds, and whether ids agree.

    python analysis/plan_torchvision.py --out FILE.csv [--only resnet18,vgg11] [--minutes 4]

Plans 30 epochs with six reconfigurations down to half of the inference FLOPs, or to less pruning where the network
cannot have that; `problem` then says why. `exact` says that the last network, resized from an earlier record, is equal
to a capture of its own. Called again, the command goes on where the file ends.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ptsim.capture.network import capture_network
from ptsim.capture.resized import Recapture, thin_copy
from ptsim.errors import PtsimError
from ptsim.network import Network
from ptsim.prune.propagate import skeleton
from ptsim.textfile import write_whole

FIELDS = ("model", "cpu_seconds", "architectures", "training", "inference", "bn", "exact", "problem")
ASKED = {"images": 1_281_167, "epochs": 30, "batch": 32, "interval": 5}
TARGETS = ("training=0.7,inference=0.5", "training=0.85,inference=0.7", "training=0.95,inference=0.9")


def names() -> list[str]:
    """The classification networks of torchvision, by name."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def row(name: str) -> dict[str, object]:
    """Plan one network: the hardest of `TARGETS` that it can meet."""
    from ptsim.answers.plan import fractions, plan

    start, problem = time.process_time(), ""
    for targets in TARGETS:
        with last_network() as last:
            try:
                trace = plan(f"torchvision:{name}", **ASKED, pruning=targets)
            except PtsimError as error:
                problem = problem or error.message
                continue
        seconds, found = time.process_time() - start, fractions(trace)
        captured = capture_network(
            thin_copy(last[0]),
            name=trace.run.model,
            input_shape=trace.run.dataset.input_shape,
            num_classes=trace.run.dataset.num_classes,
        )
        return {
            "model": name,
            "cpu_seconds": round(seconds, 1),
            "architectures": found.architectures,
            "training": round(found.training_flops_fraction, 4),
            "inference": round(found.inference_flops_fraction, 4),
            "bn": round(found.bn_bytes_fraction, 4),
            "exact": captured.id == trace.final_network.id,
            "problem": problem,
        }
    return {"model": name, "cpu_seconds": round(time.process_time() - start, 1), "problem": problem}


@contextlib.contextmanager
def last_network() -> Iterator[list[nn.Module]]:
    """The shapes of the network that is resized last while the block runs, as the only element of a list."""
    original, last = Recapture.network, [nn.Module()]

    def seen(self: Recapture, model: nn.Module) -> Network:
        last[0] = skeleton(model)
        return original(self, model)

    Recapture.network = seen  # type: ignore[method-assign] # watched, not changed
    try:
        yield last
    finally:
        Recapture.network = original  # type: ignore[method-assign] # as it was


def main() -> int:
    """Plan them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no further network after so many")
    arguments = parser.parse_args()
    if not arguments.out.exists():
        write_whole(arguments.out, ",".join(FIELDS) + "\n")
    end = time.monotonic() + 60 * arguments.minutes
    done = {line["model"] for line in csv.DictReader(arguments.out.open())}
    asked = arguments.only.split(",") if arguments.only else names()
    failed = 0
    for name in (name for name in asked if name not in done):
        if time.monotonic() > end:
            print(f"{name} and what follows is left for another call", file=sys.stderr)
            break
        try:
            found = row(name)
        except Exception as error:  # a crash is a result, too: of this network, not of those that follow
            found = {"model": name, "problem": f"crash: {type(error).__name__}: {error}"}
        failed += "exact" not in found
        with arguments.out.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(found)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
