"""How well does a calibrated profile predict runs that it has not seen, on this CPU?

One command: train a short PruneTrain run to know which shapes pruning makes, calibrate on its architectures, then
train dense and PruneTrain runs of other seeds and predict them from the calibration alone.

    OMP_NUM_THREADS=1 python analysis/validate_cpu.py --folder /tmp/validate_cpu --repeats 3

The calibration has seen the dense network and the pruned ones of its own seed, never those of the runs that are
predicted. A machine that does other things meanwhile, or shares its cores with other machines, spoils the figures.
`--repeats` makes them of an undisturbed machine: calibration and runs (the same again, being deterministic) take turns
that often, and of every epoch and every calibrated network the fastest turn counts. Both figures are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

import ptsim
from ptsim.cli.calibrate_gpu import group_lasso_of
from ptsim.hardware.profile import DeviceProfile
from ptsim.measure.calibrate import calibrate_gpu
from ptsim.trace.io import Trace
from ptsim.validation import Validation


def main(arguments: list[str] | None = None) -> Validation:
    """Calibrate, train, predict; prints the errors, and gives those of the undisturbed machine."""
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
    profiles, dense, pruned = [], [], []
    for turn in range(options.repeats):
        file = options.folder / f"cpu{turn}.toml"
        profiles.append(
            calibrate_gpu(
                file,
                device=torch.device("cpu"),
                minutes=options.minutes,
                traces=[seen],
                make_regularizer=group_lasso_of,
                grid=False,
            )
        )
        dense.append(trained(f"dense{turn}", 1, 0.0))
        pruned.append(trained(f"pruned{turn}", 2, 0.4))
    for turn in range(options.repeats):
        _tell(f"turn {turn}", ptsim.validate([dense[turn], pruned[turn]], profiles[turn], holdout=True))
    result = ptsim.validate([fastest(dense), fastest(pruned)], fastest_profile(profiles), holdout=True)
    _tell(f"fastest of {options.repeats}", result)
    return result


def fastest(traces: Sequence[Trace]) -> Trace:
    """The same run, every epoch and reconfiguration as the fastest of its repetitions had it."""
    architectures = {tuple(epoch.architecture for epoch in trace.epochs) for trace in traces}
    if len(architectures) > 1:
        raise RuntimeError("the repetitions of a run pruned differently: they are not the same run")
    epochs = zip(*(trace.epochs for trace in traces), strict=True)
    events = zip(*(trace.reconfigurations for trace in traces), strict=True)
    return msgspec.structs.replace(
        traces[0],
        epochs=tuple(min(same, key=lambda epoch: epoch.time.wall_s) for same in epochs),
        reconfigurations=tuple(min(same, key=lambda event: event.duration_s) for same in events),
    )


def fastest_profile(profiles: Sequence[DeviceProfile]) -> DeviceProfile:
    """Every network and operator as the fastest calibration measured it."""
    steps = [min(same, key=lambda step: step.step_s) for same in zip(*(p.steps for p in profiles), strict=True)]
    operators = {}
    for time in (time for profile in profiles for time in profile.operators):
        known = operators.get(time.operator)
        if known is None or time.forward_s + (time.backward_s or 0) < known.forward_s + (known.backward_s or 0):
            operators[time.operator] = time
    return msgspec.structs.replace(profiles[0], steps=tuple(steps), operators=tuple(operators.values()))


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
