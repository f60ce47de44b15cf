"""How many GPUs on how many nodes a log of nccl-tests is of, whether it is whole, and how much its times scatter."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log import NcclLog, NcclMeasurement, read_nccl_log, read_nccl_logs, with_nodes

TAIL = "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 10.8\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "all_reduce.log"
    path.write_text(text, encoding="utf-8")
    return path


def test_jitter_is_the_median_log_ratio_of_a_pair_over_that_of_normal_deviates() -> None:
    """0.6745 √2 = 0.954 standard deviations lie between a pair of normal deviates, in the median."""
    measurements = [
        NcclMeasurement(size_bytes=2**i, out_of_place_s=1e-3, in_place_s=None if x is None else 1e-3 * math.exp(x))
        for i, x in enumerate((0.4, -0.1, None, 0.2))
    ]
    log = NcclLog(path="x", num_gpus=2, num_nodes=1, gpus=(), version=None, measurements=tuple(measurements))
    assert log.relative_jitter == pytest.approx(0.2 / 0.954)
    alone = msgspec.structs.replace(log, measurements=tuple(measurements[2:3]))
    assert alone.relative_jitter == 0


@pytest.mark.parametrize(("per_node", "nodes"), [(8, 2), (12, 1), (5, 3), (1, 12)])
def test_nodes_of_a_size_hold_all_gpus(per_node: int, nodes: int) -> None:
    log = NcclLog(path="x", num_gpus=12, num_nodes=None, gpus=(), version=None, measurements=())
    assert with_nodes(log, gpus_per_node=per_node).num_nodes == nodes
    assert with_nodes(log, 12).num_nodes == 12
    with pytest.raises(FileFormatError, match="12 GPUs, which cannot be on 0 nodes"):
        with_nodes(log, 0)


# Which GPUs the ranks name (host, number, bus), and on how many nodes they are.
PLACES = {
    "one node": ("alpha 0 0000:1b:00", "alpha 1 0000:43:00", "alpha 2 0000:5b:00", "alpha 3 0000:6b:00", 1),
    "two nodes": ("alpha 0 0000:1b:00", "alpha 1 0000:43:00", "beta 0 0000:1b:00", "beta 1 0000:43:00", 2),
    "two nodes of one name": ("node 0 0000:1b:00", "node 1 0000:43:00", "node 0 0000:1b:00", "node 1 0000:43:00", None),
    "the same in the old form": ("node 0 0x27", "node 1 0x2a", "node 0 0x27", "node 1 0x2a", None),
    "one GPU a process": ("alpha 0 0000:1b:00", "alpha 0 0000:43:00", "alpha 0 0000:5b:00", "alpha 0 0000:6b:00", 1),
    "one GPU a process, of one name": ("n 0 0000:1b:00", "n 0 0000:43:00", "n 0 0000:1b:00", "n 0 0000:43:00", None),
    "one GPU a process, buses without domain": ("alpha 0 0x00", "alpha 0 0x00", "beta 0 0x00", "beta 0 0x00", 2),
}


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("case", PLACES)
def test_a_host_name_of_which_a_gpu_is_listed_twice_is_that_of_several_nodes(
    tmp_path: Path, case: str, launched: bool
) -> None:
    """The line that launched the run then says how many, else nobody does."""
    *places, nodes = PLACES[case]
    assert all(isinstance(place, str) for place in places)
    ranks = "".join(
        "#  Rank {0:2d} Group  0 Pid {0:6d} on {1} device {2:>2} [{3}] NVIDIA H100\n".format(i, *str(place).split())
        for i, place in enumerate(places)
    )
    row = "  1073741824     268435456     float     sum      -1    11000   97.61  146.42       0\n"  # 97.61 · 1.5
    head = "#SBATCH --nodes=2\n" if launched else ""
    (log,) = read_nccl_logs(write(tmp_path, head + ranks + row + TAIL))
    assert (log.num_gpus, log.num_nodes) == (4, 2 if launched and nodes is None else nodes)


def rates(*pairs: tuple[float, float]) -> str:
    """Rows of these algorithm and bus bandwidths, out of place and in place in turn."""
    halves = [f"{100 * (i + 1)}.0 {algbw:.2f} {busbw:.2f} 0" for i, (algbw, busbw) in enumerate(pairs)]
    sizes = (2**20 * 4**i for i in range(len(pairs)))
    rows = [
        f"{size} {size // 4} float sum -1 {out} {into}\n"
        for size, out, into in zip(sizes, halves[::2], halves[1::2], strict=False)
    ]
    return "".join(rows) + TAIL


def test_two_printed_digits_tell_the_number_of_gpus_only_where_one_number_fits_all_rows(tmp_path: Path) -> None:
    """Of 16 GPUs, whose factor is 1.875; the first pair alone looks like 2 / (2 - 1.96 / 1.04) = 17.3.

    Times 1.04, 16 to 19 GPUs would give 1.95, 1.958, 1.964 and 1.971, which are as near as both digits allow.
    """
    slow = rates((1.04, 1.96), (1.04, 1.96))
    with pytest.raises(FileFormatError, match="its bandwidths fit 16 to 19 GPUs"):
        read_nccl_log(write(tmp_path, slow))
    told = rates((1.04, 1.96), (1.02, 1.91), (1.03, 1.93), (9.60, 18.00))  # 17 would give 18.07
    assert read_nccl_log(write(tmp_path, told)).num_gpus == 16
    fast = rates((100.0, 196.88), (100.0, 196.88))  # 64 GPUs: 63 would give 196.83
    assert read_nccl_log(write(tmp_path, fast)).num_gpus == 64


@pytest.mark.parametrize(
    ("most", "step", "complete"),
    [
        (2**21, "2(factor)", True),  # the last row's own size
        (2**22 - 1, "2(factor)", True),  # twice as much is more
        (2**22, "2(factor)", False),
        (3 * 2**20 - 1, "1048576(bytes)", True),
        (3 * 2**20, "1048576(bytes)", False),
        (2**22, None, False),
    ],
)
def test_a_run_without_its_end_is_whole_where_the_next_size_would_be_too_large(
    tmp_path: Path, most: int, step: str | None, complete: bool
) -> None:
    """Rows of 1 and 2 MiB."""
    head = f"# nThread 1 nGpus 2 minBytes 1048576 maxBytes {most}" + (f" step: {step}\n" if step else "\n")
    rows = "".join(f"{size} {size // 4} float sum -1 100.0 20.0 20.0 0 100.0 20.0 20.0 0\n" for size in (2**20, 2**21))
    path = write(tmp_path, head + rows)
    if complete:
        assert len(read_nccl_log(path).measurements) == 2
    else:
        with pytest.raises(FileFormatError, match="it is truncated"):
            read_nccl_log(path)


EIGHT = "33554432 8388608 float sum -1 274.2 122.36 214.13 0 276.4 121.38 212.42 0\n"  # 122.36 · 1.75 = 214.13


@pytest.mark.parametrize(
    ("launch", "process", "nodes"),
    [
        ("mpirun -np 2 -npernode 1 ./x", (1, 4), 2),  # a process of four GPUs on each node
        ("mpirun -np 2 -npernode 1 ./x", (2, 2), 2),
        ("mpirun -np 4 -npernode 2 ./x", (1, 2), 2),
        ("mpirun -np 4 -npernode 3 ./x", (1, 2), None),  # six of eight GPUs
        ("mpirun -np 8 -npernode 4 -H a,b,c,d ./x", (1, 1), None),  # two nodes, or four
        ("mpirun -np 8 -npernode 4 -H a,b ./x", (1, 1), 2),
        ("./x", (1, 8), 1),
        ("./x", (4, 2), 1),
    ],
)
def test_processes_of_several_gpus_count_with_all_of_them(
    tmp_path: Path, launch: str, process: tuple[int, int], nodes: int | None
) -> None:
    head = f"{launch}\n# nThread {process[0]} nGpus {process[1]} minBytes 8 maxBytes 33554432 step: 2(factor)\n"
    (log,) = read_nccl_logs(write(tmp_path, head + EIGHT + TAIL))
    assert (log.num_gpus, log.num_nodes) == (8, nodes)


@pytest.mark.parametrize(("second", "nodes"), [("srun -N 4 -n 8 ./x\n", [2, 4]), ("", [2, 2])])
def test_a_runs_nodes_are_those_of_the_last_line_that_launched_one(
    tmp_path: Path, second: str, nodes: list[int]
) -> None:
    text = "srun -N 2 -n 8 ./x\n" + EIGHT + TAIL + second + EIGHT + TAIL
    assert [log.num_nodes for log in read_nccl_logs(write(tmp_path, text))] == nodes
