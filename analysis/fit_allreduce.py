"""Fits the latencies and efficiencies of NCCL to published nccl-tests runs, and writes ptsim/costs/nccl.toml.

    python analysis/fit_allreduce.py [--out ptsim/costs/nccl.toml] [--no-cross-validation]

Every system has the same weight. Messages from 512 KiB up decide; smaller ones have a fifth of the weight, because
the time that a call costs the host differs twofold between systems that are otherwise equal. The residual in the
file is that of systems left out of the fit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import tomli_w
from scipy.optimize import minimize

from ptsim.costs import nccl
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.spec import Cluster, LinkKind
from ptsim.textfile import write_whole
from ptsim.units import GBIT

ROOT = Path(__file__).resolve().parents[1]
SHARES = ("LL", "LL128")
ROUNDS = 3
# Left out of the fit. Not what their catalog entry describes: peer access off, PCIe trees that carry 2 to 7 GB/s for
# reasons unstated, ABCI A between nodes (36 of 100 GB/s; NCCL_NET_GDR_LEVEL=2 keeps GPUDirect off most GPU–NIC pairs),
# EFA without GPUDirect (T4), and a BM.GPU4.8 tutorial that reaches half of what two other runs of that shape do.
ODD = (
    "abci_inter_anode",
    "4090_8card_lc",
    "deepbench_M40",
    "deepbench_TitanX_n",
    "deepbench_P100",
    "18-41-24_2_0",
    "19-08-14_1_0",
    "oci_gpu4_tutorial",
    "rtx4090_",
    "t4_efa",
    "v100pcie_guide",
)
# Where every fit starts, whatever is left out: a hop and a call take twice what NCCL's table says.
START = nccl.NcclFit(
    base_scale=dict.fromkeys(nccl.PROTOCOLS, 2.0),
    join=4.0,
    pcie_crowding=0.7,
    nvls_share=0.6,
    residual=0.0,
    small_residual=0.0,
    kinds={
        kind: nccl.KindFit(
            latency_scale=2.0,
            efficiency=0.8,
            share={"LL": 0.25, "LL128": 0.6, "Simple": 1.0},
            cap_bytes_per_s=5e9 if kind is LinkKind.TCP else np.inf,
        )
        for kind in LinkKind
        if kind is not LinkKind.MEASURED
    },
)


def load_runs(root: Path = ROOT) -> pd.DataFrame:
    """One row per measured size with the columns of its run; microseconds become seconds.

    Runs whose cluster is empty are of machines that the catalog cannot describe: their NICs' rate is not stated.
    """
    runs = pd.read_csv(root / "traces/public/allreduce_runs.csv", keep_default_na=False)
    rows = pd.read_csv(root / "traces/public/allreduce.csv")
    frame = rows.merge(runs, on="run", validate="many_to_one")
    frame["seconds"] = frame.out_of_place_us * 1e-6
    frame["odd"] = [any(part in run for part in ODD) for run in frame.run]
    frame["system_key"] = frame.cluster + frame.inter_kind.map(lambda kind: f" {kind}" if kind else "")
    return frame


def cluster_of(run: pd.Series) -> Cluster:
    """The catalog cluster as the run used it: GPUs per node, kind and rate of the network may differ."""
    cluster = load_cluster(run.cluster)
    inter = cluster.inter
    if inter is not None and run.inter_kind:
        inter = msgspec.structs.replace(inter, kind=LinkKind(run.inter_kind))
    if inter is not None and run.inter_gbit_per_s:
        inter = msgspec.structs.replace(inter, bandwidth_bytes_per_s=float(run.inter_gbit_per_s) * GBIT)
    return msgspec.structs.replace(cluster, inter=inter, gpus_per_node=int(run.gpus_per_node))


def predict(run: pd.Series, sizes: np.ndarray, fit: nccl.NcclFit, cluster: Cluster | None = None) -> np.ndarray:
    """Seconds of the all-reduces of a run by the topology alone."""
    lines = nccl.lines(cluster or cluster_of(run), int(run.num_gpus), int(run.num_nodes), fit)
    forced = set(run.forced.split())  # an algorithm, a protocol, both or neither
    lines = [line for line in lines if line.algorithm != "hierarchical" and forced <= {line.algorithm, line.protocol}]
    return np.min([line.latency_s + sizes * line.seconds_per_byte for line in lines], axis=0)


def _pack(fit: nccl.NcclFit) -> np.ndarray:
    values = [*(fit.base_scale[p] for p in nccl.PROTOCOLS), fit.join, fit.pcie_crowding, fit.nvls_share]
    for kind in fit.kinds.values():
        values += [kind.latency_scale, kind.efficiency, *(kind.share[p] for p in SHARES)]
    values.append(fit.kinds[LinkKind.TCP].cap_bytes_per_s / 1e9)
    return np.log(values)


def _unpack(x: np.ndarray, like: nccl.NcclFit) -> nccl.NcclFit:
    values = iter(np.exp(x).tolist())
    base = {protocol: next(values) for protocol in nccl.PROTOCOLS}
    join, crowding, nvls = max(next(values), 1.0), min(next(values), 1.0), next(values)
    kinds = {}
    for kind in like.kinds:
        scale, efficiency = next(values), next(values)
        share = {protocol: min(next(values), 1.0) for protocol in SHARES} | {"Simple": 1.0}
        kinds[kind] = nccl.KindFit(latency_scale=scale, efficiency=min(efficiency, 1.0), share=share)
    cap = next(values) * 1e9
    kinds[LinkKind.TCP] = msgspec.structs.replace(kinds[LinkKind.TCP], cap_bytes_per_s=cap)
    return msgspec.structs.replace(
        like, base_scale=base, join=join, pcie_crowding=crowding, nvls_share=nvls, kinds=kinds
    )


def fit_constants(frame: pd.DataFrame, start: nccl.NcclFit = START) -> nccl.NcclFit:
    """Least absolute log error over the runs, every system with the same weight; weakly held to where it starts."""
    groups = []
    for _, group in frame.groupby("run"):
        run = group.iloc[0]
        groups.append((run, cluster_of(run), group.size_bytes.to_numpy(float), np.log(group.seconds.to_numpy())))
    counts = frame.groupby("system_key").run.nunique()
    origin = _pack(start)

    def loss(x: np.ndarray) -> float:
        fit = _unpack(x, start)
        total = 0.0
        for run, cluster, sizes, logs in groups:
            weight = np.where(sizes >= 2**19, 1.0, 0.2) * (sizes >= 2**10)
            error = np.abs(np.log(predict(run, sizes, fit, cluster)) - logs)
            total += float((weight * error).sum() / max(weight.sum(), 1e-9)) / counts[run.system_key]
        return total / len(counts) + 0.002 * float(np.square(x - origin).sum())

    x = origin
    for _ in range(ROUNDS):
        x = minimize(loss, x, method="Powell", options={"maxiter": 3, "xtol": 1e-3, "ftol": 1e-4}).x
    fit = _unpack(x, start)
    if not any(cluster.inter and cluster.inter.kind is LinkKind.TCPX for _, cluster, _, _ in groups):
        # TCPX is TCP whose payload lands on the GPU: of the two only sockets' copies are bound by CPU threads
        fit.kinds[LinkKind.TCPX] = msgspec.structs.replace(fit.kinds[LinkKind.TCP], cap_bytes_per_s=np.inf)
    return fit


def errors(frame: pd.DataFrame, fit: nccl.NcclFit, at_least: int = 2**20) -> pd.DataFrame:
    """ln(predicted / measured) per row from `at_least` bytes up."""
    parts = []
    for _, group in frame[frame.size_bytes >= at_least].groupby("run"):
        ratio = predict(group.iloc[0], group.size_bytes.to_numpy(float), fit) / group.seconds
        parts.append(group[["run", "system_key", "size_bytes", "odd"]].assign(log_error=np.log(ratio)))
    return pd.concat(parts, ignore_index=True)


def sigma(left_out: pd.DataFrame) -> float:
    """Standard deviation of ln that holds 90 % of the errors, every system with the same weight."""
    weight = 1 / left_out.groupby("system_key").log_error.transform("size")
    order = left_out.log_error.abs().sort_values().index
    inside = weight.loc[order].cumsum() / weight.sum()
    return round(float(left_out.log_error.abs().loc[order][inside <= 0.9].max() / 1.645), 3)


def main() -> None:
    """Fit, cross-validate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "ptsim/costs/nccl.toml")
    parser.add_argument("--no-cross-validation", action="store_true")
    options = parser.parse_args()
    frame = load_runs()
    frame = frame[frame.cluster != ""]
    used = frame[~frame.odd]
    fit = fit_constants(used)
    print(errors(frame, fit).groupby(["odd", "run"]).log_error.agg(lambda e: np.expm1(e.abs().median())).to_string())
    if not options.no_cross_validation:
        left_out = []
        for system in sorted(used.system_key.unique()):
            without = fit_constants(used[used.system_key != system])
            left_out.append(errors(used[used.system_key == system], without, at_least=2**10))
            large = left_out[-1][left_out[-1].size_bytes >= 2**20].log_error
            print(f"left out {system}: median error {np.expm1(large.abs().median()):.3f}", flush=True)
        everything = pd.concat(left_out, ignore_index=True)
        is_large = everything.size_bytes >= 2**20
        fit = msgspec.structs.replace(
            fit, residual=sigma(everything[is_large]), small_residual=sigma(everything[~is_large])
        )
        print(f"residual (sigma of ln) {fit.residual} from 1 MiB up, {fit.small_residual} below")
    document = msgspec.to_builtins(fit)
    for kind in document["kinds"].values():
        if not np.isfinite(kind["cap_bytes_per_s"] or np.inf):
            del kind["cap_bytes_per_s"]
    document = _rounded(document)
    write_whole(
        options.out,
        "# Written by analysis/fit_allreduce.py from traces/public/allreduce.csv.\n" + tomli_w.dumps(document),
    )


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
