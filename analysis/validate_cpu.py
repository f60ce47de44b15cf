"""How well does a calibrated profile predict runs that it has not seen, on this CPU?

One command: train a short PruneTrain run to know which shapes pruning makes, calibrate on its architectures, then
train dense and PruneTrain runs of other seeds and predict them from the calibration alone.

    OMP_NUM_THREADS=1 python analysis/validate_cpu.py --folder validate_cpu --repeats 3

The calibration has seen the dense network and the pruned ones of its own seed, never those of the runs that are
predicted. A machine that does other things meanwhile, or shares its cores with other machines, changes its speed
between calibration and run, and no prediction can know: so calibration and runs can take several turns, `--repeats`,
and the median error over the turns is printed beside each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

import ptsim
from ptsim.cli.calibrate_gpu import group_lasso_of
from ptsim.measure.calibrate import calibrate_gpu
from ptsim.trace.io import Trace
from ptsim.validation import Validation


def main(arguments: list[str] | None = None) -> list[Validation]:
    """Calibrate, train, predict in turns; prints the errors of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs and profiles go; must not hold any")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--interval", type=int, default=4)
    parser.add_argument("--train-limit", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0, help="limit of a calibration")
    options = parser.parse_args(arguments)

    def trained(name: str, seed: int, penalty_ratio: float) -> Trace:
        settings = {
            "model": options.model,
            "dataset": "digits",
            "batch": 16,
            "lr": 0.2,
            "epochs": options.epochs,
            "interval": options.interval if penalty_ratio else None,
            "train_limit": options.train_limit,
            "seed": seed,
            "penalty_ratio": penalty_ratio,
        }
        out = options.folder / name
        ptsim.train({key: value for key, value in settings.items() if value is not None}, out=out)
        return ptsim.read_trace(out)

    options.folder.mkdir(parents=True, exist_ok=True)
    seen = trained("seen", 0, 0.4)
    turns = []
    for turn in range(options.repeats):
        profile = calibrate_gpu(
            options.folder / f"cpu{turn}.toml",
            device=torch.device("cpu"),
            minutes=options.minutes,
            traces=[seen],
            make_regularizer=group_lasso_of,
            grid=False,
        )
        unseen = [trained(f"dense{turn}", 1, 0.0), trained(f"pruned{turn}", 2, 0.4)]
        turns.append(ptsim.validate(unseen, profile, holdout=True))
        _tell(f"turn {turn}", turns[-1])
    median = medians(turns)
    print(
        f"median of {len(turns)} turns: dense {median['dense']:.1%}, pruned {median['pruned']:.1%} (goal: 5 %); "
        f"saving {median['saving_points']:.1f} points (goal: 3)"
    )
    return turns


def medians(turns: Sequence[Validation]) -> dict[str, float]:
    """Over the turns: absolute errors of the dense and the pruned run (fractions) and of the saving (points)."""
    return {
        "dense": statistics.median(abs(turn.runs[0].error) for turn in turns),
        "pruned": statistics.median(abs(turn.runs[1].error) for turn in turns),
        "saving_points": statistics.median(abs(turn.savings[0].error_points) for turn in turns),
    }


def _tell(what: str, result: Validation) -> None:
    errors = ", ".join(f"{'dense' if run.dense else 'pruned'} {run.error:+.1%}" for run in result.runs)
    savings = ", ".join(
        f"saving {saving.measured_saving:.1%}, predicted {saving.predicted_saving:.1%} ({saving.error_points:+.1f} "
        f"points)"
        for saving in result.savings
    )
    print(f"{what}: whole runs {errors}; epochs {result.epoch_mape:.1%} on average; {savings}", flush=True)


if __name__ == "__main__":
    main()
