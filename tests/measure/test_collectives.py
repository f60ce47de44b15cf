"""Network calibration: logs and live process groups become clusters."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.cli.main import run
from ptsim.costs.tiers import Tier
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.forms import write_cluster
from ptsim.hardware.nccl_log import read_nccl_log
from ptsim.hardware.spec import AllReduceTable, LinkKind
from ptsim.measure.collectives import calibrated_cluster, measure_table, node_name, tables_from_logs

SIZES = tuple(2**k for k in range(10, 28))


def ring_table(num_gpus: int, num_nodes: int, bandwidth: float, hop_s: float) -> AllReduceTable:
    """What a ring of these links would measure: 2(p-1) hops, 2(p-1)/p of the message."""
    seconds = tuple(2 * (num_gpus - 1) * (hop_s + size / num_gpus / bandwidth) for size in SIZES)
    return AllReduceTable(
        num_gpus=num_gpus, num_nodes=num_nodes, size_bytes=SIZES, seconds=seconds, relative_jitter=0.01, source="ring"
    )


def test_other_gpu_counts_of_a_measured_ring_follow_the_formula() -> None:
    cluster = calibrated_cluster([ring_table(4, 4, 5e9, 20e-6)], name="four nodes")
    for nodes in (2, 8):
        expected = 2 * (nodes - 1) * (20e-6 + 2**26 / nodes / 5e9)
        result = ptsim.allreduce(cluster, gpus=nodes, message_bytes=2**26)
        assert result.tier is Tier.SCALED
        assert result.seconds == pytest.approx(expected, rel=0.05)


def test_the_catalog_machine_that_explains_the_table_lends_its_links() -> None:
    measured = ring_table(16, 2, 21e9, 8e-6)
    cluster = calibrated_cluster([measured], name="c", gpus=["NVIDIA A100-SXM4-40GB"])
    assert (cluster.device_name, cluster.gpus_per_node) == ("a100-sxm4-40gb", 8)
    assert cluster.intra.bandwidth_bytes_per_s == 300e9
    assert ptsim.allreduce(cluster, gpus=16, message_bytes=2**20).tier is Tier.MEASURED
    assert ptsim.allreduce(cluster, gpus=8, message_bytes=2**20).tier is Tier.DATASHEET


def test_a_base_without_room_for_the_log_is_refused() -> None:
    with pytest.raises(UsageError, match="4 GPUs a node, the log has 8"):
        calibrated_cluster([ring_table(8, 1, 1e9, 1e-6)], name="c", base=load_cluster("abci-v"))


def test_logs_of_different_gpus_are_no_one_cluster() -> None:
    tables = [ring_table(8, 1, 200e9, 2e-6), ring_table(16, 2, 21e9, 8e-6)]
    gpus = ["A100-SXM-80GB", "NVIDIA A100-SXM4-80GB"]
    assert calibrated_cluster(tables, name="c", gpus=gpus).device_name == "a100-sxm4-80gb"
    slice_of_one = "NVIDIA A100-SXM4-80GB MIG 1g.10gb"
    with pytest.warns(UserWarning, match=f"a100-sxm4-80gb and on GPUs that the catalog does not have: {slice_of_one};"):
        assert calibrated_cluster(tables, name="c", gpus=[*gpus, slice_of_one]).device_name == "a100-sxm4-80gb"
    assert calibrated_cluster(tables, name="c", gpus=[slice_of_one]).device is None
    with pytest.raises(UsageError, match="different GPUs: a100-sxm4-80gb and h100-sxm5-80gb"):
        calibrated_cluster(tables, name="c", gpus=[*gpus, "NVIDIA H100 80GB HBM3"])
    base, both = load_cluster("dgx-h100"), [*gpus, "NVIDIA H100 80GB HBM3"]
    said = "ran on a100-sxm4-80gb, cluster dgx-h100 has h100-sxm5-80gb: steps are projected on h100-sxm5-80gb"
    with pytest.warns(UserWarning, match=said):
        assert calibrated_cluster(tables, name="c", base=base, gpus=both).device == base.device


def test_a_base_with_the_logs_gpus_is_no_reason_to_warn() -> None:
    """Nor is one whose device a user's file describes, under the driver's name; nor GPUs that nobody knows."""
    tables, base = [ring_table(8, 1, 200e9, 2e-6)], load_cluster("dgx-h100")
    assert base.device is not None
    mine = msgspec.structs.replace(base.device, name="mine")
    own = msgspec.structs.replace(base, device=mine)
    for cluster in (base, own):
        calibrated_cluster(tables, name="c", base=cluster, gpus=["NVIDIA H100 80GB HBM3", "an unknown one"])


def test_what_no_table_tells_comes_from_the_base_and_is_read_back(tmp_path: Path) -> None:
    base = msgspec.structs.replace(
        load_cluster("dgx-a100"), price_usd_per_gpu_hour=4.0, storage_bandwidth_bytes_per_s=2e9
    )
    measured = calibrated_cluster([ring_table(8, 1, 1e9, 1e-6)], name="mine", base=base)
    write_cluster(measured, tmp_path / "mine.toml")
    found = load_cluster(tmp_path / "mine.toml")
    assert (found.price_usd_per_gpu_hour, found.cores_per_node, found.storage_bandwidth_bytes_per_s) == (4.0, 128, 2e9)
    assert "AMD Rome" in found.sources["cores_per_node"]


def test_the_nodes_of_a_base_are_the_calibrated_clusters(tmp_path: Path) -> None:
    base = msgspec.structs.replace(load_cluster("dgx-a100"), max_nodes=4, nodes_per_leaf=2, oversubscription=3.0)
    measured = calibrated_cluster([ring_table(16, 2, 21e9, 8e-6)], name="mine", base=base)
    write_cluster(measured, tmp_path / "mine.toml")
    found = load_cluster(tmp_path / "mine.toml")
    assert (found.max_nodes, found.nodes_per_leaf, found.oversubscription) == (4, 2, 3.0)
    one = msgspec.structs.replace(base, inter=None, max_nodes=None)
    with pytest.raises(UsageError, match="cluster dgx-a100 has 1 node, the log has 2"):
        calibrated_cluster([ring_table(16, 2, 21e9, 8e-6)], name="mine", base=one)
    calibrated_cluster([ring_table(32, 4, 21e9, 8e-6)], name="mine", base=base)
    with pytest.raises(UsageError, match="cluster dgx-a100 has 4 nodes, the log has 5"):
        calibrated_cluster([ring_table(40, 5, 21e9, 8e-6)], name="mine", base=base)


def test_two_tables_of_one_layout_are_refused() -> None:
    with pytest.raises(UsageError, match="same GPU and node count"):
        calibrated_cluster([ring_table(8, 1, 1e9, 1e-6)] * 2, name="c")


def write_log(path: Path, slower: float = 1.0) -> Path:
    """The output of eight GPUs in a ring of 10 GB/s and 3 µs."""
    seconds = [slower * time for time in ring_table(8, 1, 10e9, 3e-6).seconds]
    rows = "".join(
        f"{size:12d} {size // 4:12d}   float     sum   {time * 1e6:8.2f}  {size / time / 1e9:7.2f} "
        f"{size / time / 1e9 * 1.75:7.2f}  1e-07\n"
        for size, time in zip(SIZES, seconds, strict=True)
    )
    launched = "mpirun -np 8 -N 8 ./build/all_reduce_perf -b 1K -e 64M\n"
    path.write_text(launched + rows + "# Out of bounds values : 0 OK\n")
    return path


@pytest.mark.parametrize("name", ["mine.toml", "mine"])
def test_a_log_becomes_a_file_that_allreduce_takes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "run.log")
    out = tmp_path / name
    assert run(["calibrate", "network", "--nccl-log", str(log), "--out", str(out)]) == 0
    capsys.readouterr()
    assert run(["allreduce", "--cluster", str(out), "--gpus", "8", "--bytes", "3MiB", "--json"]) == 0
    answer = ptsim.allreduce(str(out), gpus=8, message_bytes=3 * 2**20)
    assert f'"seconds": {answer.seconds}' in capsys.readouterr().out
    assert answer.seconds == pytest.approx(14 * (3e-6 + 3 * 2**20 / 8 / 10e9), rel=0.01)


@pytest.mark.parametrize("name", ["dgx-a100", "DGX_A100", "p4d.24xlarge"])
def test_a_file_that_would_hide_behind_the_catalog_is_not_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = write_log(tmp_path / "run.log")
    assert run(["calibrate", "network", "--nccl-log", str(log), "--out", name]) == 2
    assert f"{name} is a cluster of the catalog" in capsys.readouterr().err
    assert not (tmp_path / name).exists()
    (tmp_path / "here").mkdir()
    assert run(["calibrate", "network", "--nccl-log", str(log), "--out", f"here/{name}"]) == 0
    monkeypatch.chdir(tmp_path / "here")
    assert load_cluster(f"./{name}").tables
    assert load_cluster(f"../here/{name}").tables
    assert not load_cluster(name).tables


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = write_log(tmp_path / "run.log"), tmp_path / "mine.toml"
    assert run(["calibrate", "network", "--nccl-log", str(log), "--out", str(out), "--name", " "]) == 2
    assert "mine.toml: name is ' '" in capsys.readouterr().err
    assert not out.exists()


def test_the_source_of_many_logs_is_short_enough_to_be_read_back(tmp_path: Path) -> None:
    logs = [str(write_log(tmp_path / f"all-reduce-of-run-{number:02}.log")) for number in range(30)]
    out = tmp_path / "mine.toml"
    assert run(["calibrate", "network", "--nccl-log", *logs, "--out", str(out)]) == 0
    (table,) = load_cluster(out).tables
    assert table.source.startswith("nccl-tests log all-reduce-of-run-00.log, ")
    assert table.source.endswith("all-reduce-of-run-29.log")


def test_runs_of_one_layout_are_averaged_and_their_spread_is_jitter(tmp_path: Path) -> None:
    logs = [read_nccl_log(write_log(tmp_path / f"{slower}.log", slower)) for slower in (1.0, 1.21)]
    (table,) = tables_from_logs(logs)
    alone = tables_from_logs(logs[:1])[0]
    assert table.seconds[-1] == pytest.approx(1.1 * alone.seconds[-1], rel=0.01)
    assert table.relative_jitter == pytest.approx(math.log(1.21) / math.sqrt(2), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpus", "8", "--bytes", "-5"], "non-negative"),
        (["--gpus", "8", "--bytes", "5 GHz"], "unit"),
        (["--gpus", "0", "--bytes", "5"], "at least 1"),
        (["--gpus", "99", "--bytes", "5", "--cluster", "nowhere"], "unknown cluster"),
    ],
)
def test_wrong_questions_are_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = [] if "--cluster" in arguments else ["--cluster", "dgx-a100"]
    assert run(["allreduce", *cluster, *arguments]) == 2
    assert says in capsys.readouterr().err


def test_calibrating_without_log_and_without_processes_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert run(["calibrate", "network", "--out", str(tmp_path / "c.toml")]) == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend", "morse"], "this torch has no backend 'morse'"),
        (["--backend", "cpu:gloo,cuda:morse"], "this torch has no backend 'morse'"),
        (["--max-bytes", "100"], "1024 to 17179869184"),
        (["--max-bytes", "99999999999999"], "1024 to 17179869184"),
    ],
)
def test_a_live_measurement_that_cannot_start_is_one_sentence(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert run(["calibrate", "network", "--out", str(tmp_path / "c.toml"), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_too_few_iterations_are_refused() -> None:
    with pytest.raises(UsageError, match="0 iterations; at least 3"):
        measure_table(iterations=0)


def live(out: Path, ranks: int, *arguments: str) -> list[tuple[int, str]]:
    """Exit status and stderr of each of `ranks` gloo processes that calibrate."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ptsim", "calibrate", "network", "--out", str(out), "--backend", "gloo"]
    command += ["--iterations", "3", *arguments]
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            variables = os.environ | environment | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
            processes.append(stack.enter_context(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE)))
            stack.callback(processes[-1].kill)
        errors = [process.communicate(timeout=90)[1].decode() for process in processes]
        return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def test_live_gloo_processes_are_measured_and_go_on(tmp_path: Path) -> None:
    out = tmp_path / "live.toml"
    statuses = live(out, 2, "--max-bytes", "4096")
    assert [status for status, _ in statuses] == [0, 0], statuses
    assert "tier measured" in statuses[0][1]
    first = load_cluster(out)
    assert (first.library, first.intra.kind) == ("gloo", LinkKind.MEASURED)
    assert ptsim.allreduce(out, gpus=2, message_bytes=4096).seconds > 0
    (tmp_path / "more.toml").write_text(out.read_text())
    statuses = live(tmp_path / "more.toml", 2, "--max-bytes", "65536", "--resume")
    assert [status for status, _ in statuses] == [0, 0], statuses
    (more,) = load_cluster(tmp_path / "more.toml").tables
    assert (more.num_gpus, more.size_bytes[-1]) == (2, 65536)
    assert more.seconds[:3] == first.tables[0].seconds


def test_nodes_of_one_name_are_told_apart_by_their_last_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTSIM_NODE_NAME", raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"start of {name}\n")
    names = [node_name(tmp_path / boot) for boot in ("a", "b", "a", "none")]
    assert names == ["localhost start of a", "localhost start of b", "localhost start of a", "localhost"]
    monkeypatch.setattr("socket.gethostname", lambda: "other")  # containers of one machine, as NCCL takes them
    assert node_name(tmp_path / "a") != names[0]
    monkeypatch.setenv("PTSIM_NODE_NAME", "mine")
    assert node_name(tmp_path / "a") == "mine"
