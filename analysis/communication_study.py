"""At which cluster size and bandwidth does pruning save more communication time than computation time?

Every pair of a dense and a pruned run is projected onto one cluster, over a range of sizes and of bandwidths between
nodes. Pruning shortens the computation (fewer FLOPs and bytes) and the part of the all-reduces that computation does
not hide (fewer gradients; fewer updates if the mini-batch grows). The study says which of the two savings is larger.
The time of reconfigurations is left out of both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _common
import msgspec
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

import ptsim
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.spec import Cluster
from ptsim.report.figures import style
from ptsim.trace.pairs import compare_runs

CLUSTER = "dgx-a100"
NODES = (2, 4, 8, 16, 32, 64, 128)
SCALES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


def with_bandwidth(cluster: Cluster, scale: float) -> Cluster:
    """The cluster with links between nodes `scale` times as fast; measured tables, which are of the real ones, go.

    Raises:
        UsageError: the cluster is a single machine.
    """
    if cluster.inter is None:
        raise UsageError(f"{cluster.name} is a single machine; a study of the network needs links between nodes")
    inter = msgspec.structs.replace(cluster.inter, bandwidth_bytes_per_s=cluster.inter.bandwidth_bytes_per_s * scale)
    return msgspec.structs.replace(cluster, inter=inter, tables=(), max_nodes=None)


def table(
    traces: Sequence[ptsim.Trace],
    *,
    cluster: str = CLUSTER,
    nodes: Sequence[int] = NODES,
    scales: Sequence[float] = SCALES,
) -> pd.DataFrame:
    """One row per comparison, bandwidth and size: seconds saved by computing and by communicating less.

    `communication_share` is communication's part of what both save, missing where pruning exposes more communication
    than it saves, because less computation is left to hide it. `crossover_gpus` is
    the smallest size at that bandwidth from which on communication saves more, missing where there is none.
    """
    base = load_cluster(cluster)
    gpus = [base.gpus_per_node * count for count in nodes]
    rows = []
    for comparison in compare_runs(traces):
        batches = [epoch.batch_per_gpu for epoch in comparison.pruned.epochs]
        for scale in scales:
            changed = with_bandwidth(base, scale)
            dense = ptsim.simulate(comparison.baseline, changed, gpus)
            pruned = ptsim.simulate(comparison.pruned, changed, gpus)
            computing = dense.compute_seconds - pruned.compute_seconds
            communicating = dense.exposed_communication_seconds - pruned.exposed_communication_seconds
            larger = [size for size, more in zip(gpus, communicating > computing, strict=True) if more]
            # from the first size after the last at which computing saves more
            settled = [s for s in larger if all(t in larger for t in gpus if t >= s)]
            rows.append(
                pd.DataFrame(
                    {
                        "run": comparison.label,
                        "baseline": comparison.baseline_label,
                        "cluster": base.name,
                        "device": dense.device,
                        "precision": str(comparison.pruned.run.precision),
                        "first_batch_per_gpu": min(batches),
                        "last_batch_per_gpu": max(batches),
                        "gpus": gpus,
                        "node_gigabytes_per_second": changed.inter.bandwidth_bytes_per_s / 1e9
                        if changed.inter
                        else None,
                        "dense_seconds": dense.total_seconds,
                        "pruned_seconds": pruned.total_seconds,
                        "saved_computing_seconds": computing,
                        "saved_communicating_seconds": communicating,
                        "communication_share": (communicating / (computing + communicating)).where(
                            (computing > 0) & (communicating >= 0)
                        ),
                        "crossover_gpus": min(settled) if settled else None,
                        "tier": pruned.tier,
                    }
                )
            )
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def figure(frame: pd.DataFrame) -> Figure:
    """A map of communication's share over size and bandwidth, of the first comparison; white where it has none."""
    return _figure(frame[frame.run == frame.run.iloc[0]])


@style.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig, (axes,) = style.panels(1, height_in=3.4)
    shares = frame.pivot_table(
        index="node_gigabytes_per_second", columns="gpus", values="communication_share", dropna=False
    ).sort_index(ascending=False)
    sns.heatmap(
        shares,
        ax=axes,
        cmap="PuOr_r",
        vmin=0,
        vmax=1,
        annot=shares.map(lambda share: "–" if pd.isna(share) else f"{100 * share:.0f}"),
        fmt="",
        annot_kws={"size": 8},
        linewidths=0.5,
        cbar_kws={"label": "saved by communicating less", "format": lambda value, _: f"{value:.0%}"},
    )
    axes.set_yticklabels([f"{bandwidth:.3g}" for bandwidth in shares.index], rotation=0)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set(xlabel="GPUs", ylabel="bandwidth of a node (GB/s)", title="communication's share of the saving (%)")
    return style.finish(fig, frame, n="1 pair of runs", band="no band: expected values")


def main(argv: list[str] | None = None) -> int:
    """The study's own command line: `--cluster` beside what all studies take."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cluster", default=CLUSTER)
    parser.add_argument("--nodes", type=lambda text: [int(part) for part in text.split(",")], default=list(NODES))
    own, rest = parser.parse_known_args(argv)
    return _common.main(
        __file__,
        str(__doc__),
        lambda traces: table(traces, cluster=own.cluster, nodes=own.nodes),
        figure,
        needs="a run with a penalty ratio above 0",
        argv=rest,
    )


if __name__ == "__main__":
    sys.exit(main())
