"""How well does one recorded run say how another prunes? `ptsim plan --pruning like:TRACE`, each run left out in turn.

    python analysis/carry_over.py [TRACE…] [--out carry_over.csv]

Every run is imitated on the network, data and length of every other run, which plays no part in the plan. One row per
pair: inference FLOPs, training FLOPs and BatchNorm traffic of dense, planned minus recorded, in points; and how far the
FLOPs of an epoch's network are off, on average over the epochs. Columns that begin with `told`: the plan was told the
inference FLOPs of the run that is left out, which say how hard it prunes. A run imitated on its own data shows the
error of the method alone.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import ptsim
from ptsim.answers.plan import fractions
from ptsim.answers.plan_options import PlanOptions
from ptsim.textfile import write_whole
from ptsim.trace.trace import Trace

RUNS = Path(__file__).parent.parent / "traces" / "cifar10-resnet20"
PRUNED = tuple(
    RUNS / f"{name}.jsonl" for name in ("prunetrain-r0.1", "prunetrain-r0.2", "prunetrain-r0.3", "gating-r0.2")
)


def setting(target: Trace) -> PlanOptions:
    """The data and length of a run."""
    first = target.epochs[0]
    return PlanOptions(
        images=first.num_images,
        num_classes=target.run.dataset.num_classes,
        input_shape=target.run.dataset.input_shape,
        epochs=len(target.epochs),
        batch=first.batch_per_gpu,
        interval=target.run.hyperparameters["interval"],
    )


@functools.cache
def imitation(source: Path, model: str, options: PlanOptions, strength: str = "") -> Trace:
    """A plan that prunes as the run in the file `source` did; runs of one setting share it."""
    return ptsim.plan(model, options, pruning=f"like:{source}{strength}")


def epoch_fractions(trace: Trace) -> pd.Series[float]:
    """Forward MACs of every epoch's network, of the first one's."""
    macs = pd.Series([float(trace.network_of(epoch).forward_macs) for epoch in trace.epochs])
    return macs / macs.iloc[0]


def table(traces: Sequence[Trace]) -> pd.DataFrame:
    """One row per pair of runs."""
    rows = []
    for source in traces:
        for target in traces:
            planned = imitation(source.path, target.run.model, setting(target))
            ours, theirs = fractions(planned), fractions(target)
            strength = f",inference={theirs.inference_flops_fraction:.4f}"
            told = imitation(source.path, target.run.model, setting(target), strength)
            rows.append(
                {
                    "imitated": source.path.stem,
                    "left_out": target.path.stem,
                    "inference_points": 100 * (ours.inference_flops_fraction - theirs.inference_flops_fraction),
                    "training_points": 100 * (ours.training_flops_fraction - theirs.training_flops_fraction),
                    "bn_points": 100 * (ours.bn_bytes_fraction - theirs.bn_bytes_fraction),
                    "epoch_points": 100 * (epoch_fractions(planned) - epoch_fractions(target)).abs().mean(),
                    "told_training_points": 100
                    * (fractions(told).training_flops_fraction - theirs.training_flops_fraction),
                    "told_bn_points": 100 * (fractions(told).bn_bytes_fraction - theirs.bn_bytes_fraction),
                    "told_epoch_points": 100 * (epoch_fractions(told) - epoch_fractions(target)).abs().mean(),
                }
            )
    return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> int:
    """Imitate, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, default=PRUNED)
    parser.add_argument("--out", type=Path, help="file for the table (CSV)")
    arguments = parser.parse_args(argv)
    rows = table([ptsim.read_trace(path) for path in arguments.traces or PRUNED])
    print(rows.to_string(index=False, float_format=lambda value: f"{value:.1f}"))
    others = rows[rows.imitated != rows.left_out]
    for name in ("inference", "training", "bn", "epoch", "told_training", "told_bn", "told_epoch"):
        print(f"{name}: mean error {others[f'{name}_points'].abs().mean():.1f} points on runs left out")
    if arguments.out is not None:
        write_whole(arguments.out, rows.to_csv(index=False, float_format="%.3f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
