"""How far off are ptsim's all-reduce times on published nccl-tests runs? Computes every such figure of the docs.

    python analysis/check_allreduce.py

1. Calibrated: half of a run's sizes (every other one) make a table, which predicts the other half; both halves are
   tried. Errors from 1 KiB up.
2. Other GPU counts: the table of one run predicts a run of the same system at another count. Errors from 1 MiB up.
3. Intervals: every inner size is left out in turn, and all sizes below or above one; how many are inside the 90 %
   interval. From 1 KiB up.
4. Catalog: prediction from the topology alone, without a table. Errors from 1 MiB up. `fit_allreduce.py` does the
   same for systems that are left out of the fit.

Each is done for the first runs and for those that were collected later (`part` in allreduce_runs.csv).
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
from fit_allreduce import ROOT, load_runs, predict

from ptsim.costs import nccl
from ptsim.costs.allreduce_table import table_seconds
from ptsim.costs.collectives import all_reduce
from ptsim.hardware.spec import AllReduceTable
from ptsim.measure.collectives import calibrated_cluster


def table_of(run: pd.DataFrame) -> AllReduceTable:
    """What calibrate makes of the rows: the geometric mean of out-of-place and in-place times."""
    first = run.iloc[0]
    seconds = np.sqrt(run.out_of_place_us * run.in_place_us.fillna(run.out_of_place_us)) * 1e-6
    return AllReduceTable(
        num_gpus=int(first.num_gpus),
        num_nodes=int(first.num_nodes),
        size_bytes=tuple(int(size) for size in run.size_bytes),
        seconds=tuple(float(s) for s in seconds),
        relative_jitter=0.0,
        source=str(first.run),
    )


def calibrated_errors(frame: pd.DataFrame, at_least: int = 2**10) -> pd.DataFrame:
    """Median relative error per run and half, with ptsim's interpolation and with plain log-log interpolation."""
    found = []
    for name, run in frame.groupby("run", sort=False):
        run = run.sort_values("size_bytes").reset_index(drop=True)
        if len(run) < 7:
            continue
        for half in (0, 1):
            kept, left = run[run.index % 2 == half], run[(run.index % 2 != half) & (run.size_bytes >= at_least)]
            table = table_of(kept)
            ours = np.array([table_seconds(table, size) for size in left.size_bytes])
            plain = np.exp(np.interp(np.log(left.size_bytes), np.log(table.size_bytes), np.log(table.seconds)))
            found.append(
                {
                    "run": name,
                    "system": run.system_key[0],
                    "part": run.part[0],
                    "half": half,
                    "sizes": len(left),
                    "error": float(np.median(np.abs(ours / left.seconds - 1))),
                    "log_log_error": float(np.median(np.abs(plain / left.seconds - 1))),
                }
            )
    return pd.DataFrame(found)


def interval_rows(frame: pd.DataFrame, at_least: int = 2**10, farthest: float = 16.0) -> pd.DataFrame:
    """Left-out sizes of every run: ln(predicted / measured), and the half width of the interval in ln(time).

    Columns: run, part, side ("between", "below", "above"), distance (halvings or doublings beyond the table), error,
    half_width. The table keeps the run's own jitter. "below" and "above" leave out every size on that side.
    """
    found = []
    for name, run in frame.groupby("run", sort=False):
        run = run.sort_values("size_bytes").drop_duplicates("size_bytes").reset_index(drop=True)
        if len(run) < 7:
            continue
        ratios = np.abs(np.log(run.out_of_place_us / run.in_place_us)).dropna()
        jitter = float(np.median(ratios)) / 0.954 if len(ratios) else 0.0  # as NcclLog.relative_jitter
        last = len(run) - 1
        cuts = [("between", run.drop(index=i), run.loc[[i]]) for i in range(1, last)]
        cuts += [("below", run.loc[i:], run.loc[: i - 1]) for i in range(1, last - 2, 2)]
        cuts += [("above", run.loc[: i - 1], run.loc[i:]) for i in range(4, last + 1, 2)]
        for side, kept, left in cuts:
            table = msgspec.structs.replace(table_of(kept), relative_jitter=jitter)
            gpus = [] if side == "between" else [run.gpu[0]]  # the machine counts beyond the table only
            cluster = calibrated_cluster([table], name="calibrated", gpus=gpus)
            for size, seconds in zip(left.size_bytes, left.seconds, strict=True):
                edge = min(max(size, table.size_bytes[0]), table.size_bytes[-1])
                distance = abs(float(np.log2(size / edge)))
                if size < at_least or distance > farthest:
                    continue
                answer = all_reduce(int(size), cluster, table.num_gpus)
                error = float(np.log(answer.seconds / seconds))
                width = float(np.log(answer.high_s / answer.seconds))
                found.append((name, run.part[0], side, distance, error, width))
    return pd.DataFrame(found, columns=["run", "part", "side", "distance", "error", "half_width"])


def interval_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Per side, distance and part: how many sizes, the median |ln error|, the share inside, the median half width."""
    rows = rows.assign(
        inside=rows.error.abs() <= rows.half_width,
        miss=rows.error.abs(),
        distance=pd.cut(rows.distance, [-1, 0, 1.5, 3.5, 6.5, 10, 16]),
    )
    grouped = rows.groupby(["side", "distance", "part"], observed=True)
    return grouped.agg(
        sizes=("miss", "size"), miss=("miss", "median"), inside=("inside", "mean"), half_width=("half_width", "median")
    )


def scaled_errors(frame: pd.DataFrame, at_least: int = 2**20) -> pd.DataFrame:
    """Median relative error for every ordered pair of GPU counts of one system, on the same tier of links."""
    found = []
    groups = [(name, run.sort_values("size_bytes")) for name, run in frame.groupby("run", sort=False)]
    for name, run in groups:
        for other_name, other in groups:
            a, b = run.iloc[0], other.iloc[0]
            same = (a.system, a.software, a.inter_kind) == (b.system, b.software, b.inter_kind)
            if not same or a.num_gpus == b.num_gpus or (a.num_nodes > 1) != (b.num_nodes > 1):
                continue
            cluster = calibrated_cluster([table_of(run)], name="calibrated", gpus=[a.gpu])
            if cluster.gpus_per_node < b.num_gpus / b.num_nodes:  # a pair was measured, its node holds more
                cluster = msgspec.structs.replace(cluster, gpus_per_node=int(b.num_gpus))
            rows = other[other.size_bytes >= at_least]
            seconds = [all_reduce(int(size), cluster, int(b.num_gpus)).seconds for size in rows.size_bytes]
            error = np.abs(np.array(seconds) / rows.seconds - 1)
            found.append({"calibrated_on": name, "asked_for": other_name, "sizes": len(rows), "error": error.median()})
    return pd.DataFrame(found)


def catalog_errors(frame: pd.DataFrame, at_least: int = 2**20) -> pd.DataFrame:
    """Median relative error per run of the catalog cluster's topology, of runs whose cluster the catalog has."""
    found = []
    for name, run in frame[(frame.size_bytes >= at_least) & (frame.cluster != "")].groupby("run", sort=False):
        first = run.iloc[0]
        ratio = predict(first, run.size_bytes.to_numpy(float), nccl.default_fit()) / run.seconds
        found.append(
            {
                "run": name,
                "cluster": first.system_key,
                "part": first.part,
                "left_out_of_fit": first.odd,
                "sizes": len(run),
                "error": float(np.median(np.abs(ratio - 1))),
                "bias": float(np.median(ratio - 1)),
            }
        )
    return pd.DataFrame(found)


def main() -> None:
    """Print the three tables and their summaries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="where traces/public is")
    frame = load_runs(parser.parse_args().root)
    pd.options.display.float_format = "{:.3f}".format
    pd.options.display.width = 150
    calibrated = calibrated_errors(frame)
    print("1. calibrated system, every other size left out, from 1 KiB up")
    print(calibrated.groupby(["system", "run"])[["error", "log_log_error"]].mean().to_string())
    for part, column in itertools.product(("first", "later"), ("error", "log_log_error")):
        of_part = calibrated[calibrated.part == part]
        by_run, by_system = of_part.groupby("run")[column].mean(), of_part.groupby("system")[column].mean()
        print(
            f"{part}: {column}: median run {by_run.median():.3f}, median system {by_system.median():.3f}, "
            f"runs within 5 %: {(by_run <= 0.05).sum()} of {len(by_run)}"
        )
    print("\n2. other GPU counts of a calibrated system, from 1 MiB up")
    scaled = scaled_errors(frame)
    print(scaled.to_string(index=False))
    print(f"median {scaled.error.median():.3f}, within 20 %: {(scaled.error <= 0.2).sum()} of {len(scaled)}")
    print("\n3. intervals of a calibrated system, sizes left out, from 1 KiB up")
    intervals = interval_rows(frame)
    print(interval_summary(intervals).to_string())
    for side, of_side in intervals.groupby("side"):
        print(f"{side}: {(of_side.error.abs() <= of_side.half_width).mean():.1%} of {len(of_side)} inside")
    print("\n4. catalog systems by topology, from 1 MiB up")
    catalog = catalog_errors(frame)
    print(catalog.to_string(index=False))
    for part in ("first", "later"):
        ordinary = catalog[~catalog.left_out_of_fit & (catalog.part == part)].groupby("cluster").error.mean()
        within = f"within 20 %: {(ordinary <= 0.2).sum()} of {len(ordinary)}"
        print(f"{part}: median system {ordinary.median():.3f}, {within}")


if __name__ == "__main__":
    main()
