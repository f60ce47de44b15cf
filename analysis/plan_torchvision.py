"""Does every classification network of torchvision plan? One row each: fractions, seconds, and whether ids agree.

    python analysis/plan_torchvision.py --out FILE.csv [--only resnet18,vgg11]

Plans 30 epochs with six reconfigurations down to half of the inference FLOPs, or to the least that the network can
have. `exact` says that the last network, resized from the dense capture, is equal to a capture of its own. One process
per network; the command goes on where the file ends.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

from ptsim.errors import PtsimError

FIELDS = ("model", "seconds", "architectures", "training", "inference", "bn", "exact", "problem")
ASKED = {"images": 1_281_167, "epochs": 30, "batch": 32, "interval": 5}
TARGETS = ("training=0.7,inference=0.5", "training=0.85,inference=0.7", "training=0.95,inference=0.9")


def names() -> list[str]:
    """The classification networks of torchvision, by name."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def row(name: str) -> dict[str, object]:
    """Plan one network: the hardest of `TARGETS` that it can meet."""
    from ptsim.answers.plan import fractions, plan

    start, problem = time.perf_counter(), ""
    for targets in TARGETS:
        try:
            trace = plan(f"torchvision:{name}", **ASKED, pruning=targets)
        except PtsimError as error:
            problem = problem or error.message
            continue
        found = fractions(trace)
        return {
            "model": name,
            "seconds": round(time.perf_counter() - start, 1),
            "architectures": found.architectures,
            "training": round(found.training_flops_fraction, 4),
            "inference": round(found.inference_flops_fraction, 4),
            "bn": round(found.bn_bytes_fraction, 4),
            "exact": _exact(name, targets, trace.final_network.id),
            "problem": problem,
        }
    return {"model": name, "seconds": round(time.perf_counter() - start, 1), "problem": problem}


def _exact(name: str, targets: str, planned_id: str) -> bool:
    """The last network, captured anew, has the id that the plan gave it."""
    from ptsim.answers.plan import plan
    from ptsim.capture import resized

    always = resized.Recapture.network
    resized.Recapture.network = lambda self, model: self._capture(model)  # type: ignore[method-assign] # no resizing
    try:
        trace = plan(f"torchvision:{name}", **ASKED, pruning=targets)
    finally:
        resized.Recapture.network = always  # type: ignore[method-assign] # as it was
    return trace.final_network.id == planned_id


def main() -> int:
    """Plan them all, one process each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with arguments.out.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(row(arguments.one))
        return 0
    if not arguments.out.exists():
        arguments.out.write_text(",".join(FIELDS) + "\n")
    done = {line["model"] for line in csv.DictReader(arguments.out.open())}
    for name in arguments.only.split(",") if arguments.only else names():
        if name not in done:
            subprocess.run([sys.executable, __file__, "--out", str(arguments.out), "--one", name], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
