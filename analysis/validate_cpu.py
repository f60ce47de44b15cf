"""How well does a calibrated profile predict runs that it has not seen, on this CPU?

One command: train a short PruneTrain run to know which shapes pruning makes, calibrate on its architectures, then
train dense and PruneTrain runs of other seeds and predict them from the calibration file alone.

    OMP_NUM_THREADS=1 python analysis/validate_cpu.py --folder /tmp/validate_cpu

The calibration has seen the dense network and the pruned ones of its own seed, never those of the runs that are
predicted. A machine that does other things meanwhile spoils the figures: times are then of another machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import ptsim
from ptsim.validation import Validation


def main(arguments: list[str] | None = None) -> Validation:
    """Calibrate, train, predict; prints the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs and profile go; must not hold any")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--pruned-seeds", type=int, nargs="+", default=[2])
    parser.add_argument("--minutes", type=float, default=1.0, help="limit of the calibration")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    train = [
        "train", "--model", options.model, "--dataset", "digits", "--batch", "16", "--lr", "0.2",
        "--epochs", str(options.epochs), "--interval", str(options.interval),
    ]  # fmt: skip

    def trained(name: str, seed: int, penalty_ratio: float) -> Path:
        out: Path = options.folder / name
        _ptsim(*train, "--seed", str(seed), "--penalty-ratio", str(penalty_ratio), "--out", str(out))
        return out

    profile = options.folder / "cpu.toml"
    seen = trained("seen", 0, 0.4)
    _ptsim(
        "calibrate", "gpu", "--device", "cpu", "--out", str(profile), "--trace", str(seen), "--no-grid",
        "--minutes", str(options.minutes),
    )  # fmt: skip
    unseen = [trained("dense", 1, 0.0), *(trained(f"pruned{seed}", seed, 0.4) for seed in options.pruned_seeds)]
    _ptsim("validate", *map(str, unseen), "--profile", str(profile), "--holdout")
    result: Validation = ptsim.validate(unseen, profile, holdout=True)
    print(f"largest whole-run error: {result.whole_run_error:.2%} (goal: 5 %)")
    print(f"largest saving error: {result.saving_error_points} points (goal: 3)")
    return result


def _ptsim(*arguments: str) -> None:
    """Each in a process of its own, as a user would."""
    subprocess.run([sys.executable, "-m", "ptsim", *arguments], check=True)


if __name__ == "__main__":
    main()
