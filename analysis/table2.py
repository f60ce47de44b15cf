"""Table 2: inference throughput of the dense and the pruned network at mini-batches of 10 and 100, predicted.

The PruneTrain paper measured a TITAN Xp. No trace holds inference measurements, so ours are predictions for that
device from its data sheet: the forward time of the first and of the final architecture. Compare the ratios.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd

import ptsim
from ptsim.costs.step import step_time
from ptsim.hardware.catalog import load_device
from ptsim.network import Precision
from ptsim.setting import StepSetting

DEVICE = "titan-xp"
BATCHES = (10, 100)


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per pruned run and mini-batch."""
    device = load_device(DEVICE)
    rows = []
    for names, trace in _common.labelled(traces):
        if not trace.reconfigurations:
            continue
        first, last = trace.network_of(trace.epochs[0]), trace.final_network
        for batch in BATCHES:
            setting = StepSetting(batch=batch, precision=Precision.FP32)
            steps = [step_time(network, device, setting) for network in (first, last)]
            published, of = _common.nearest_paper("Table 2", names["dataset"], names["model"], per_gpu_batch=batch)
            published = published.dropna(subset="ratio_vs_baseline")
            rows.append(
                {
                    "run": names["run"],
                    "dataset": names["dataset"],
                    "model": names["model"],
                    "penalty_ratio": names["penalty_ratio"],
                    "device": device.name,
                    "batch_per_gpu": batch,
                    "dense_images_per_second": batch / steps[0].forward_s,
                    "pruned_images_per_second": batch / steps[1].forward_s,
                    "speed_up": steps[0].forward_s / steps[1].forward_s,
                    "tier": str(steps[0].tier),
                    "paper_of": of,
                    "paper_speed_up": published.ratio_vs_baseline.iloc[0] if len(published) else None,
                }
            )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, needs="a run that was reconfigured"))
