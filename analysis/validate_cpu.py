"""How well does a calibrated profile predict runs that it has not seen, on this machine?

    OMP_NUM_THREADS=1 python analysis/validate_cpu.py --folder out --dataset imagefolder --data-dir cifar10-jpeg

It trains a short PruneTrain run to learn which shapes pruning makes, calibrates on that run's architectures, trains
a dense and a PruneTrain run with other seeds, and predicts these two from the calibration alone. The calibration
sees the dense network and the pruned ones of its own seed, but never a time of the runs that are predicted.

Calibration and both runs take turns: an epoch of one run, an epoch of the other, some measurements of the
calibration, and again. This is because a shared machine's speed drifts. On the virtual machine where this was first
run, the same step took up to 25 % longer for half a minute, and means over half a minute differed by 5 %, with
nothing else running. With turns a slow minute meets all three, and what is left is the error of the model.
`--in-order` calibrates first and trains the runs afterwards, one after the other; the drift is then part of the
errors.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import ptsim
from ptsim.answers.validate import Validation
from ptsim.cli.calibrate_gpu import group_lasso_of
from ptsim.measure.calibrate import calibrate_gpu


class TakingTurns:
    """A training run in a process of its own, which trains one epoch whenever it is told to."""

    def __init__(self, settings: Mapping[str, Any], out: Path) -> None:
        context = multiprocessing.get_context("spawn")  # torch does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(dict(settings), out, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._goes_on = True

    def epoch(self) -> bool:
        """Let it train until it has stored its next epoch; False when there was none left.

        Raises:
            RuntimeError: the run has failed; its message is on stderr.
        """
        if self._goes_on:
            self._pipe.send("go")
            try:
                self._goes_on = self._pipe.recv()
            except EOFError as error:
                raise RuntimeError("a training run has failed") from error
        return self._goes_on

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _train(settings: dict[str, Any], out: Path, pipe: Connection) -> None:
    torch.set_num_threads(settings["num_threads"])
    pipe.recv()

    def wait(_: object) -> None:
        pipe.send(True)
        pipe.recv()

    ptsim.train(settings, out=out, on_epoch=wait)
    pipe.send(False)


def main(arguments: list[str] | None = None) -> list[Validation]:
    """Calibrate, train, predict; prints the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs and profiles go; must not hold any")
    parser.add_argument("--seen", type=Path, help="a PruneTrain run to calibrate on, instead of training one")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--data-dir", help="of an image tree")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--interval", type=int, default=4)
    parser.add_argument("--penalty-ratio", type=float, default=0.9)
    parser.add_argument("--train-limit", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1, help="with other seeds each")
    parser.add_argument("--between", type=int, default=2, help="measurements of the calibration in each turn")
    parser.add_argument("--in-order", action="store_true", help="do not take turns")
    options = parser.parse_args(arguments)

    def settings(seed: int, penalty_ratio: float) -> dict[str, Any]:
        chosen = {
            "model": options.model,
            "dataset": options.dataset,
            "data_dir": options.data_dir,
            "device": options.device,
            "num_threads": torch.get_num_threads(),
            "batch": options.batch,
            "epochs": options.epochs,
            "train_limit": options.train_limit,
            "validation_limit": 64,
            "seed": seed,
            "penalty_ratio": penalty_ratio,
            # Accuracy is no matter here: the networks are to shrink within a few hundred steps.
            "lr": 0.3,
            "lr_milestones": [],
            "interval": options.interval if penalty_ratio else None,
            "threshold": 2e-2 if penalty_ratio else None,
        }
        return {key: value for key, value in chosen.items() if value is not None}

    options.folder.mkdir(parents=True, exist_ok=True)
    if options.seen is None:
        ptsim.train(settings(0, options.penalty_ratio), out=options.folder / "seen")
    seen = ptsim.read_trace(options.seen or options.folder / "seen")
    num_networks = len({(epoch.architecture, epoch.batch_per_gpu) for epoch in seen.epochs})
    results = []
    for number in range(options.repeats):
        folders = [options.folder / f"{name}{number}" for name in ("dense", "pruned")]
        runs = [
            TakingTurns(settings(2 * number + 1, 0.0), folders[0]),
            TakingTurns(settings(2 * number + 2, options.penalty_ratio), folders[1]),
        ]
        turn = 0

        def others(_what: str, _fraction: float, runs: list[TakingTurns] = runs) -> None:
            nonlocal turn
            if not options.in_order and turn % options.between == 0:
                for run in runs:
                    run.epoch()
            turn += 1

        try:
            profile = calibrate_gpu(
                options.folder / f"profile{number}.toml",
                device=torch.device(options.device),
                minutes=60.0,
                traces=[seen],
                make_regularizer=group_lasso_of,
                grid=False,
                rounds=max(1, options.epochs * options.between // num_networks),
                progress=others,
            )
            if options.in_order:
                for run in runs:
                    while run.epoch():
                        pass
            while sum(run.epoch() for run in runs):  # what is left, in turns
                pass
        finally:
            for run in runs:
                run.close()
        results.append(ptsim.validate(folders, profile, holdout=True))
        _tell(f"run {number}, from the calibration alone", results[-1])
        _tell(f"run {number}, from its own profiles and first epoch", ptsim.validate(folders))
    worst, points = max(r.whole_run_error for r in results), max(abs(r.saving_error_points or 0.0) for r in results)
    print(f"worst of {len(results)}: whole run {worst:.1%} (goal: 5 %), saving {points:.1f} points (goal: 3)")
    return results


def _tell(what: str, result: Validation) -> None:
    errors = ", ".join(f"{'dense' if run.dense else 'pruned'} {run.error:+.1%}" for run in result.runs)
    savings = ", ".join(
        f"saving {saving.measured_saving:.1%}, predicted {saving.predicted_saving:.1%} ({saving.error_points:+.1f} "
        f"points)"
        for saving in result.savings
    )
    inside = f"{result.interval_coverage:.0%} inside their interval"
    for note in dict.fromkeys(note for run in result.runs for note in run.notes):
        print(f"note: {note}")  # above all, whether the machine was quiet
    print(f"{what}: whole runs {errors}; epochs {result.epoch_mape:.1%} on average, {inside}; {savings}", flush=True)


if __name__ == "__main__":
    main()
