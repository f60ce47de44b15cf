"""How many GPUs on how many nodes a log of nccl-tests is of, whether it is whole, and how much its times scatter."""

from __future__ import annotations

import contextlib
import math
import warnings
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
    "one GPU a node, of one name": ("node 0 0x27", "node 0 0x27", "node 0 0x27", "node 0 0x27", None),
    "one GPU a process, buses of their own": ("alpha 0 0x27", "alpha 0 0x2a", "alpha 0 0x51", "alpha 0 0x57", 1),
}


def listed(*places: object) -> str:
    """The list of the ranks that name these GPUs."""
    return "".join(
        "#  Rank {0:2d} Group  0 Pid {0:6d} on {1} device {2:>2} [{3}] NVIDIA H100\n".format(i, *str(place).split())
        for i, place in enumerate(places)
    )


FOUR = "  1073741824     268435456     float     sum      -1    11000   97.61  146.42       0\n"  # 97.61 · 1.5


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("case", PLACES)
def test_a_host_name_of_which_a_gpu_is_listed_twice_is_that_of_several_nodes(
    tmp_path: Path, case: str, launched: bool
) -> None:
    """The line that launched the run then says how many, else nobody does."""
    *places, nodes = PLACES[case]
    assert all(isinstance(place, str) for place in places)
    head = "#SBATCH --nodes=2\n" if launched else ""
    (log,) = read_nccl_logs(write(tmp_path, head + listed(*places) + FOUR + TAIL))
    assert (log.num_gpus, log.num_nodes) == (4, 2 if launched and nodes is None else nodes)


# Hosts, and whether some of them may be containers of one machine.
HOSTS = [
    (("a 0 0000:1b:00", "b 0 0000:43:00", "c 0 0000:5b:00", "d 0 0000:6b:00"), 4, True),
    (("a 0 0000:1b:00", "b 0 0000:43:00", "c 0 0000:1b:00", "d 0 0000:43:00"), 4, True),
    (("a 0 0000:1b:00", "a 1 0000:43:00", "b 0 0000:5b:00", "b 1 0000:6b:00"), 2, True),
    (("a 0 0000:1b:00", "b 0 0000:1b:00", "c 0 0000:1b:00", "d 0 0000:1b:00"), 4, False),  # as equal machines do
    (("a 0 0000:1b:00", "a 1 0000:43:00", "b 0 0000:43:00", "b 1 0000:5b:00"), 2, False),  # one has it once
    (("a 0 0x00", "b 0 0x00", "c 0 0x00", "d 0 0x00"), 4, False),
]


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize(("places", "hosts", "may_share"), HOSTS)
def test_hosts_without_a_bus_number_in_common_may_be_containers_of_one_machine(
    tmp_path: Path, places: tuple[str, ...], hosts: int, may_share: bool, launched: bool
) -> None:
    """They are nodes with a warning, unless a launcher or the user says how many machines there were."""
    head = f"srun -N {hosts} -n 4 ./x\n" if launched else ""
    (log,) = read_nccl_logs(write(tmp_path, head + listed(*places) + FOUR + TAIL))
    assert (log.num_nodes, log.may_share) == (hosts, may_share and not launched)
    if not log.may_share:
        assert with_nodes(log) == log
        return
    with pytest.warns(UserWarning, match=f"its {hosts} hosts may be containers"):
        found = with_nodes(log)
    assert with_nodes(found).num_nodes == hosts  # said once
    assert with_nodes(log, 1).num_nodes == 1
    with pytest.warns(UserWarning, match=f"number of nodes, {hosts + 1}, is ignored"):
        assert with_nodes(log, hosts + 1).num_nodes == hosts


@pytest.mark.parametrize(
    ("before", "behind", "nodes"),
    [
        ("mpirun -np 4 -x NCCL_HOSTID=one ./x\n", "", None),
        ("", "b:1:2 [0] NCCL INFO NCCL_HOSTID set by environment to one\n", None),
        (
            "mpirun -np 4 -x NCCL_HOSTID=one ./x\n",
            "b:1:2 [0] NCCL INFO comm 0x5 rank 0 nRanks 4 nNodes 1 localRanks 4 localRank 0 MNNVL 0\n",
            1,
        ),
    ],
)
def test_where_nccl_was_told_which_host_it_is_on_names_do_not_count(
    tmp_path: Path, before: str, behind: str, nodes: int | None
) -> None:
    """As NVIDIA/nccl, issue 1781: two containers of one machine, so that NVLink is used."""
    ranks = listed("a 0 0000:1b:00", "a 1 0000:43:00", "b 0 0000:5b:00", "b 1 0000:6b:00")
    (log,) = read_nccl_logs(write(tmp_path, before + ranks + behind + FOUR + TAIL))
    assert (log.num_gpus, log.num_nodes, log.may_share) == (4, nodes, False)


def rates(*pairs: tuple[float, float]) -> str:
    """Rows of these algorithm and bus bandwidths, out of place and in place in turn."""
    sizes = [2**20 * 4 ** (i // 2) for i in range(len(pairs))]
    halves = [
        f"{size / algbw / 1e3:.1f} {algbw:.2f} {busbw:.2f} 0" for size, (algbw, busbw) in zip(sizes, pairs, strict=True)
    ]
    rows = [
        f"{size} {size // 4} float sum -1 {out} {into}\n"
        for size, out, into in zip(sizes[::2], halves[::2], halves[1::2], strict=True)
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
    many = rates((200.0, 396.88), (200.0, 396.88))  # 128 GPUs: 127 would give 396.85
    assert read_nccl_log(write(tmp_path, many)).num_gpus == 128
    with pytest.raises(FileFormatError, match="its bandwidths fit 870 to 1176 GPUs"):
        read_nccl_log(write(tmp_path, rates((50.0, 99.9), (50.0, 99.9))))  # 2 / (0.1 ± 0.015) · 50
    with pytest.raises(FileFormatError, match="number of GPUs is unknown"):
        read_nccl_log(write(tmp_path, rates((50.0, 100.0), (50.0, 100.0))))


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
    halves = {size: f"{size / 20e3:.1f} 20.0 20.0 0" for size in (2**20, 2**21)}
    rows = "".join(f"{size} {size // 4} float sum -1 {half} {half}\n" for size, half in halves.items())
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
        ("mpirun -np 2 -npernode 1 -H a,b ./x", (1, 0), None),  # of which no run is
        ("mpirun -np 2 -npernode 1 ./all_reduce_perf -g 4", None, 2),
        ("mpirun -np 4 -npernode 2 ./x", (1, 2), 2),
        ("mpirun -np 4 -npernode 3 ./x", (1, 2), None),  # six of eight GPUs
        ("mpirun -np 8 -npernode 4 -H a,b,c,d ./x", (1, 1), None),  # two nodes, or four
        ("mpirun -np 8 -npernode 4 -H a,b ./x", (1, 1), 2),
        ("./x", (1, 8), 1),
        ("./x", (4, 2), 1),
    ],
)
def test_processes_of_several_gpus_count_with_all_of_them(
    tmp_path: Path, launch: str, process: tuple[int, int] | None, nodes: int | None
) -> None:
    head = f"{launch}\n"
    if process:
        head += f"# nThread {process[0]} nGpus {process[1]} minBytes 8 maxBytes 33554432 step: 2(factor)\n"
    (log,) = read_nccl_logs(write(tmp_path, head + EIGHT + TAIL))
    assert (log.num_gpus, log.num_nodes) == (8, nodes)


@pytest.mark.parametrize(("given", "nodes"), [(2, 2), (4, None)])
def test_mpirun_uses_all_nodes_of_a_job_where_fewer_would_have_more_gpus_than_machines_have(
    tmp_path: Path, given: int, nodes: int | None
) -> None:
    """16 GPUs: eight on each of two nodes; but four nodes may have room for eight each."""
    row = EIGHT.replace("214.13", "229.43").replace("212.42", "227.59")
    (log,) = read_nccl_logs(write(tmp_path, f"#SBATCH --nodes={given}\nmpirun -np 16 ./x\n{row}{TAIL}"))
    assert (log.num_gpus, log.num_nodes) == (16, nodes)


@pytest.mark.parametrize(("second", "nodes"), [("srun -N 4 -n 8 ./x\n", [2, 4]), ("", [2, 2])])
def test_a_runs_nodes_are_those_of_the_last_line_that_launched_one(
    tmp_path: Path, second: str, nodes: list[int]
) -> None:
    text = "srun -N 2 -n 8 ./x\n" + EIGHT + TAIL + second + EIGHT + TAIL
    assert [log.num_nodes for log in read_nccl_logs(write(tmp_path, text))] == nodes


# Of two GPUs, before version 2.17: neither its own name nor a column tells which test it is.
HEAD = """# nThread 1 nGpus 2 minBytes 4194304 maxBytes 4194304 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1
#  Rank  0 Group  0 Pid     10 on    alpha device  0 [0000:1b:00] NVIDIA H100 80GB HBM3
#  Rank  1 Group  0 Pid     10 on    alpha device  1 [0000:43:00] NVIDIA H100 80GB HBM3
"""
HALF = "   419.4   10.00   10.00       0"
FAST = f"     4194304       1048576     float     sum      -1{HALF}{HALF}\n"
SENDRECV = FAST.replace("0\n", "N/A\n")  # results in place are those of no sendrecv or alltoall
SLOW = FAST.replace("419.4   10.00   10.00", "8388.6    0.50    0.50")
SCATTER = SLOW.replace("1048576", " 524288").replace("0.50       0", "0.25       0")  # each of two gets half
GATHER = SLOW.replace(" sum", "none")


def test_a_line_that_names_fewer_nodes_than_a_shortened_list_tells_nothing(tmp_path: Path) -> None:
    """As a guide that tries one GPU of a node first."""
    ranks = listed("n0 0 0000:0b:00", "n0 1 0000:1b:00", "n1 0 0000:0b:00", "n1 1 0000:1b:00").splitlines(keepends=True)
    for nodes, found in ((1, None), (2, 2)):
        head = f"sbatch --nodes={nodes} --ntasks=4 ./x\n" + ranks[0] + ranks[3]
        (log,) = read_nccl_logs(write(tmp_path, head + FOUR + TAIL))
        assert (log.num_gpus, log.num_nodes) == (4, found)


@pytest.mark.parametrize("called", ["", "mpirun -np 2 ./build/all_reduce_perf -g 1\n"])
@pytest.mark.parametrize(
    ("row", "says"),
    [(SCATTER, "holds reduce_scatter_perf"), (GATHER, "holds a collective without reduction")],
)
def test_rows_that_are_of_no_all_reduce_are_refused_whatever_the_log_calls_them(
    tmp_path: Path, called: str, row: str, says: str
) -> None:
    """Below 1 GB/s no bandwidth tells, but counts do."""
    with pytest.raises(FileFormatError, match=says):
        read_nccl_log(write(tmp_path, called + HEAD + row + TAIL))
    assert read_nccl_log(write(tmp_path, called + HEAD + SLOW + TAIL)).num_gpus == 2


def test_a_sendrecv_of_two_gpus_is_told_by_its_unchecked_results(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="holds a test that checks no results in place"):
        read_nccl_log(write(tmp_path, HEAD + SENDRECV + TAIL))
    larger = FAST.replace("4194304", "8388608").replace("1048576", "2097152").replace("419.4", "838.9")
    assert len(read_nccl_log(write(tmp_path, HEAD + SENDRECV + larger + TAIL)).measurements) == 2  # a checked one


def test_a_name_is_that_of_one_run(tmp_path: Path) -> None:
    runs = "./build/all_reduce_perf -g 2\n" + HEAD + FAST + TAIL + HEAD + SENDRECV + TAIL
    assert len(read_nccl_logs(write(tmp_path, runs))) == 1
    gather = "./build/all_gather_perf -g 2\n" + HEAD + GATHER + TAIL
    assert len(read_nccl_logs(write(tmp_path, gather + HEAD + FAST + TAIL))) == 1


@pytest.mark.parametrize(
    "before",
    [
        "mpirun -np 2 /home/me/nccl_perf/build/all_reduce_perf\n",
        "Linking  ../build/all_gather_perf.o > ../build/all_gather_perf\n$ ./build/all_reduce_perf -g 2\n",
    ],
)
def test_the_program_is_the_one_that_was_started_last(tmp_path: Path, before: str) -> None:
    assert read_nccl_log(write(tmp_path, before + HEAD + FAST + TAIL)).num_gpus == 2


def test_what_is_wrong_with_another_collective_is_no_matter(tmp_path: Path) -> None:
    columns = "#  size  count  type  redop  root  cputime  algbw  busbw  #wrong  cputime  algbw  busbw  #wrong\n"
    failed = HEAD + GATHER + TAIL.replace(": 0 OK", ": 4 FAILED")
    for other in (failed, HEAD + columns + GATHER + TAIL):
        (log,) = read_nccl_logs(write(tmp_path, other + HEAD + FAST + TAIL))
        assert log.measurements[0].size_bytes == 4194304
    with pytest.raises(FileFormatError, match="4 results were out of bounds"):
        read_nccl_log(write(tmp_path, failed.replace("none", " sum")))


@pytest.mark.parametrize(
    "rows",
    [
        GATHER.replace("\n", "  N/A  N/A  N/A\n") + TAIL,  # rccl-tests -A 1: no algorithm, protocol, channels
        GATHER[:70] + "\n" + TAIL,  # a damaged row
        GATHER,  # broke off
    ],
)
def test_another_collective_may_be_damaged_or_break_off(tmp_path: Path, rows: str) -> None:
    other = "+ mpirun -np 2 ./build/all_gather_perf\n" + HEAD + rows + "+ mpirun -np 2 ./build/all_reduce_perf\n"
    (log,) = read_nccl_logs(write(tmp_path, other + HEAD + FAST + TAIL))
    assert log.measurements[0].out_of_place_s == pytest.approx(419.4e-6)
    with pytest.raises(FileFormatError, match="row of 4194304 bytes is incomplete"):
        read_nccl_logs(write(tmp_path, other + HEAD + FAST[:70] + "\n" + TAIL))


@pytest.mark.parametrize("rows", ["", FAST, FAST[:70] + "\n"])
def test_a_run_that_failed_is_left_out_beside_the_next_one(tmp_path: Path, rows: str) -> None:
    failed = HEAD.replace("maxBytes 4194304", "maxBytes 8388608") + rows
    failed += "alpha: Test NCCL failure common.cu:958 'unhandled error / '\n .. alpha pid 10: Test failure x.cu:4\n"
    with pytest.warns(UserWarning, match=r"runs that failed are left out \(they begin in line 1\)"):
        (log,) = read_nccl_logs(write(tmp_path, failed + HEAD + FAST.replace("419.4", "420.4") + TAIL))
    assert log.measurements[0].out_of_place_s == pytest.approx(420.4e-6)
    with pytest.raises(FileFormatError, match=r"truncated|no measurement found"):
        read_nccl_logs(write(tmp_path, failed))
    (log,) = read_nccl_logs(write(tmp_path, HEAD + FAST + TAIL + "alpha: Test NCCL failure common.cu:1130\n"))
    assert log.num_gpus == 2  # it had ended


def test_columns_alone_begin_a_second_run(tmp_path: Path) -> None:
    old = "# bytes  N  type  op  time  algbw  busbw  res  time  algbw  busbw  res\n"
    rows = "4194304  1048576  float  sum  0.419  10.00  10.00  0e+00  0.419  10.00  10.00  0e+00\n"  # milliseconds
    new = "# size  count  type  redop  root  time  algbw  busbw  #wrong  time  algbw  busbw  #wrong\n"
    logs = read_nccl_logs(write(tmp_path, HEAD + old + rows + TAIL + new + FAST + TAIL))
    assert [round(1e6 * (log.measurements[0].seconds)) for log in logs] == [419, 419]


def test_a_time_that_is_not_the_one_of_its_bandwidth_is_refused(tmp_path: Path) -> None:
    """Milliseconds without the line that says so; a row that lost a digit or a point; 11 % off, and 9 %."""
    old = "1048576  262144  float  sum  0.210  4.99  4.99  N/A  0.210  4.99  4.99  N/A\n"
    with pytest.raises(FileFormatError, match=r"1048576 bytes in 0\.21 us are 4993 GB/s, but the row says 4\.99 GB/s"):
        read_nccl_log(write(tmp_path, old + TAIL))
    for time, fits in (("41.94", False), ("377.0", False), ("384.0", True)):
        path = write(tmp_path, HEAD + FAST.replace("419.4", time, 1) + TAIL)
        if fits:
            assert len(read_nccl_log(path).measurements) == 1
        else:
            with pytest.raises(FileFormatError, match="it is damaged") as caught:
                read_nccl_log(path)
            assert caught.value.line == 4
    slow = FAST.replace("4194304       1048576", "4096 1024").replace("10.00", "0.01")  # 4,096 bytes in 419.4 us
    assert len(read_nccl_log(write(tmp_path, HEAD + slow + TAIL)).measurements) == 1
    for time in ("4194", "41.94"):  # 0.001 and 0.10 GB/s
        path = write(tmp_path, HEAD + slow.replace("419.4", time, 1).replace("0.01", "0.05", 1) + TAIL)
        with pytest.raises(FileFormatError, match="it is damaged"):
            read_nccl_log(path)


def test_each_run_has_the_version_that_it_names_or_that_of_the_run_before(tmp_path: Path) -> None:
    versions = [f"NCCL version {version}\n" for version in ("2.18.3", "2.20.5")]
    text = "".join(HEAD + version + FAST + TAIL for version in (*versions, ""))
    found = [log.version for log in read_nccl_logs(write(tmp_path, "0: NCCL version 2.17.1\n" + text))]
    assert found == ["2.17.1", "2.20.5", "2.20.5"]


def test_aggregated_and_empty_messages_are_no_all_reduces_of_their_size(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="8 all-reduces ran in one group"):
        read_nccl_log(write(tmp_path, HEAD.replace("agg iters: 1", "agg iters: 8") + FAST + TAIL))
    with pytest.raises(FileFormatError, match="has empty messages only"):
        read_nccl_log(write(tmp_path, HEAD + "0  0  float  sum  -1  6.4  0.0  0.0  0  6.4  0.0  0.0  0\n" + TAIL))


def test_a_number_of_nodes_that_the_log_contradicts_is_left_out_with_a_note() -> None:
    log = NcclLog(path="x", num_gpus=8, num_nodes=1, gpus=(), version=None, measurements=())
    assert with_nodes(log, 1, gpus_per_node=4) == log
    with pytest.warns(UserWarning, match="number of nodes, 2, is ignored.*that its 8 GPUs were on 1"):
        assert with_nodes(log, 2) == log


# As rccl-tests wrote until 2023: other spellings in the first line, and GPUs whose driver gives them no name.
RCCL = """# nThreads: 1 nGpus: 2 nRanks: 1 minBytes: 8 maxBytes: 33554432 step: 2(factor) warmupIters: 5 iters: 20
# Using devices
#   Rank  0 Pid 776691 on      tower device  0 [0000:03:00.0] 
#   Rank  1 Pid 776691 on      tower device  1 [0000:06:00.0] 
RCCL version {version}
    33554432       8388608     float     sum      -1   2796.2   12.00   12.00      0   2796.2   12.00   12.00      0
"""  # noqa: W291 # the log's own blanks at ends of lines


@pytest.mark.parametrize("version", ["2.17.1+hip5.7", ": 2.27.7-develop:29e1567"])
def test_what_rccl_writes_is_read(tmp_path: Path, version: str) -> None:
    """Its first line says that the row is the last one: nothing else does."""
    text = RCCL.format(version=version)
    log = read_nccl_log(write(tmp_path, text))
    assert (log.num_gpus, log.num_nodes, log.gpus, log.version) == (2, 1, (), version.removeprefix(": "))
    with pytest.raises(FileFormatError, match="the log ends after 33554432 of 67108864 bytes"):
        read_nccl_log(write(tmp_path, text.replace("maxBytes: 33554432", "maxBytes: 67108864")))


@pytest.mark.parametrize("way", ["completion and barrier after each collective", "barrier after each outer iteration"])
def test_times_that_hold_the_hosts_waiting_are_noted(tmp_path: Path, way: str) -> None:
    first, *ranks = HEAD.splitlines(keepends=True)
    blocking = f"{first}# Blocking Enabled: wait for {way} \n{''.join(ranks)}{FAST}{TAIL}"
    with pytest.warns(UserWarning, match="the host waited for each all-reduce") as caught:
        assert len(read_nccl_logs(write(tmp_path, blocking + HEAD + FAST + TAIL))) == 2
    assert len(caught) == 1  # of the first run only


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("mpirun -x NCCL_ALGO=Ring -x NCCL_PROTO=LL,LL128 ./x\n", "NCCL_ALGO=Ring and NCCL_PROTO=LL,LL128 was set"),
        ("a:1:2 [0] NCCL INFO NCCL_ALGO set by environment to Tree\n", "NCCL_ALGO=Tree was set"),
        ("mpirun -x NCCL_ALGO ./x\n", None),
    ],
)
def test_an_algorithm_that_was_set_is_no_choice_of_nccl(tmp_path: Path, before: str, said: str | None) -> None:
    """A second run that another line launches has none, a second one of the same line has it, too."""
    text = before + HEAD + FAST + TAIL
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_nccl_logs(write(tmp_path, text + "mpirun ./x\n" + HEAD + FAST + TAIL))
        alone = len(caught)
        read_nccl_logs(write(tmp_path, text + HEAD + FAST + TAIL))
    assert (alone, len(caught) - alone) == ((1, 2) if said else (0, 0))
    assert all((said or "") in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("agg iters: 1", "agg iters: 1 graph: 20", "were replayed from a CUDA graph"),
        ("agg iters: 1", "agg iters: 1 graph: 0", None),
        ("warmup iters: 5", "warmup iters: 0", "there was no warm-up"),
        ("warmup iters: 5", "warmup iters: 10", None),
    ],
)
def test_what_the_first_line_says_of_the_times_is_noted(tmp_path: Path, old: str, new: str, said: str | None) -> None:
    assert old in HEAD
    path = write(tmp_path, HEAD.replace(old, new) + FAST + TAIL)
    with contextlib.nullcontext() if said is None else pytest.warns(UserWarning, match=said):
        assert read_nccl_log(path).num_gpus == 2


@pytest.mark.parametrize(
    ("listed", "ran", "told"),
    [
        (1, 4, "4 ranks would"),
        (8, 128, "another number of them would"),  # above 66 ranks two digits tell none
        (64, 128, "another number of them would"),
        (96, 128, "another number of them would"),
        (8, 16, "16 ranks would"),
        (16, 16, None),
        (128, 128, None),
    ],
)
def test_a_list_of_which_the_rest_was_not_copied_is_no_smaller_run(
    tmp_path: Path, listed: int, ran: int, told: str | None
) -> None:
    """`ran` GPUs have a bus bandwidth of 2 (ran - 1) / ran times the algorithm bandwidth."""
    ranks = "".join(f"# Rank {i} Pid {i} on n{i // 8} device {i % 8} [0000:{i % 8}b:00] H100\n" for i in range(listed))
    row = f"1073741824 268435456 float sum -1 11000 97.61 {97.61 * 2 * (ran - 1) / ran:.2f} 0\n"
    path = write(tmp_path, ranks + row + TAIL)
    if told is None:
        assert read_nccl_log(path).num_gpus == listed
    else:
        with pytest.raises(FileFormatError, match=f"lists {listed} of its ranks.*which {told} give") as caught:
            read_nccl_log(path)
        assert caught.value.line == listed + 1


def test_slow_rows_whose_digits_do_not_tell_leave_the_list_as_it_is(tmp_path: Path) -> None:
    """1.00 and 1.88 are 1.875 at two digits; 1.91 is 0.035 more than that, which no rounding explains."""
    ranks = "".join(f"# Rank {i} Pid {i} on n{i // 8} device {i % 8} [0000:{i % 8}b:00] H100\n" for i in range(16))
    rows = {busbw: f"1048576 262144 float sum -1 1048.6 1.00 {busbw} 0\n" for busbw in ("1.88", "1.91")}
    assert read_nccl_log(write(tmp_path, ranks + rows["1.88"] + TAIL)).num_gpus == 16
    with pytest.raises(FileFormatError, match="lists 16 of its ranks"):
        read_nccl_log(write(tmp_path, ranks + rows["1.91"] + TAIL))
    slow = "1048576 262144 float sum -1 1100.0 0.95 {} 0\n"
    assert read_nccl_log(write(tmp_path, ranks + slow.format(1.78) + TAIL)).num_gpus == 16  # as of 15 to 18
    with pytest.raises(FileFormatError, match="lists 16 of its ranks, but its bandwidths are not those of 16 GPUs"):
        read_nccl_log(write(tmp_path, ranks + slow.format(0.95) + TAIL))
    with pytest.raises(FileFormatError, match="single GPU"):
        read_nccl_log(write(tmp_path, ranks.splitlines()[0] + "\n" + slow.format("0.00") + TAIL))


# Of 16 GPUs on two nodes over a slow link, in two digits as of 15 to 18: what a log says beside the end of its list.
SLOW_16 = "1048576 262144 float sum -1 1100.0 0.95 1.78 0 1100.0 0.95 1.78 0\n"
LISTED_16 = listed(*(f"n{i // 8} {i % 8} 0000:{i % 8}b:00" for i in range(16))).splitlines(keepends=True)
HEADED = "# nThread 1 nGpus {} minBytes 1048576 maxBytes 1048576 step: 2(factor)\n"
TELLS = {
    "mpirun -np 16 ./all_reduce_perf -g 1\n": "starts 16 processes",
    "mpirun -np 2 ./all_reduce_perf -b 8 -g 8\n": "starts 2 processes",
    "mpirun -N 8 ./all_reduce_perf\n": "starts 8 processes on each node",
    "srun -n 16 ./all_reduce_perf\n": "starts 16 processes",
    "srun --mpi=pmix --ntasks=16 ./all_reduce_perf\n": "starts 16 processes",
    "mpirun -np 2 ./all_reduce_perf\n" + HEADED.format(8): "starts 2 processes",
    HEADED.format(8): "its processes have 8 GPUs each",
    HEADED.format(2).replace("nThread 1", "nThread 4"): "its processes have 8 GPUs each",
    "n1:9:9 [7] NCCL INFO comm 0x5 rank 15 nRanks 16 nNodes 2 localRanks 8 localRank 7 MNNVL 0\n": "NCCL counts 16",
    "n0:9:9 [0] NCCL INFO comm 0x5 rank 0 nranks 16 cudaDev 0 busId 1b000 - Init COMPLETE\n": "NCCL counts 16",
    "[1,15]<stderr>:n1: no such device mlx5_1\n": "16 processes wrote into it",
}


@pytest.mark.parametrize("says", TELLS)
def test_a_list_of_ranks_whose_end_is_missing_is_noticed_where_the_log_tells(tmp_path: Path, says: str) -> None:
    assert read_nccl_log(write(tmp_path, says + "".join(LISTED_16) + SLOW_16 + TAIL)).num_gpus == 16
    with pytest.raises(FileFormatError, match=f"lists 15 of its ranks, but .*{TELLS[says]}") as caught:
        read_nccl_log(write(tmp_path, says + "".join(LISTED_16[:15]) + SLOW_16 + TAIL))
    assert caught.value.hint == "keep all lines '# Rank …' of the run"


@pytest.mark.parametrize("launched", ["", "mpirun -npernode 8 ./all_reduce_perf\n"])
def test_processes_on_each_of_unknown_nodes_are_no_number_beside_nccls(tmp_path: Path, launched: str) -> None:
    counted = "n1:9:9 [7] NCCL INFO comm 0x5 rank 15 nRanks 16 nNodes 2 localRanks 8 localRank 7 MNNVL 0\n"
    log = read_nccl_log(write(tmp_path, launched + counted + SLOW_16 + TAIL))
    assert (log.num_gpus, log.num_nodes) == (16, 2)


def test_slow_rows_that_begin_again_with_other_gpus_are_no_cycle(tmp_path: Path) -> None:
    """0.50 · 1 and 0.50 · 1.5 GB/s: 2 GPUs, and 4."""
    row = "1048576 262144 float sum -1 2097.2 0.50 {} 0\n"
    head = "mpirun -np 2 ./all_reduce_perf -N 2\n"
    assert len(read_nccl_logs(write(tmp_path, head + 2 * row.format("0.50") + TAIL))) == 2
    with pytest.raises(FileFormatError, match="its rows begin again, of another number of GPUs than 2"):
        read_nccl_logs(write(tmp_path, head + row.format("0.50") + row.format("0.75") + TAIL))


def test_what_nccl_counts_in_a_later_run_is_of_that_run(tmp_path: Path) -> None:
    """And leaves it the line that launched both."""
    head, init = (
        HEADED.format(1),
        "n0:9:9 [0] NCCL INFO comm 0x5 rank 0 nranks 16 cudaDev 0 busId 1b000 - Init COMPLETE\n",
    )
    run, short = (head + init + "".join(LISTED_16[:num]) + SLOW_16 + TAIL for num in (16, 15))
    unlisted = head + init + SLOW_16 + TAIL
    launched = "mpirun -np 16 -npernode 8 ./all_reduce_perf\n"
    logs = read_nccl_logs(write(tmp_path, launched + run + unlisted))
    assert [(log.num_gpus, log.num_nodes) for log in logs] == [(16, 2), (16, 2)]
    with pytest.raises(FileFormatError, match="lists 15 of its ranks, but NCCL counts 16"):
        read_nccl_logs(write(tmp_path, run + short))


def test_nodes_that_the_launcher_names_and_the_list_does_not_are_missing(tmp_path: Path) -> None:
    """Of 8 or 9 GPUs: 0.50 · 1.75 = 0.875 and 0.50 · 1.778 = 0.889."""
    row = SLOW_16.replace("1100.0 0.95 1.78", "2097.2 0.50 0.88")
    ranks = "".join(LISTED_16[:8])
    assert read_nccl_log(write(tmp_path, "srun -N 1 ./all_reduce_perf\n" + ranks + row + TAIL)).num_nodes == 1
    with pytest.raises(FileFormatError, match="lists 8 of its ranks, but the line that launched it names 2 nodes"):
        read_nccl_log(write(tmp_path, "srun -N 2 ./all_reduce_perf\n" + ranks + row + TAIL))


@pytest.mark.parametrize(
    "says",
    [
        "mpirun -np 24 ./all_reduce_perf\n",  # whose bus bandwidth would be 1.82
        "srun -n 24 ./setup.sh\n",
        "mpirun -np 15 ./all_reduce_perf\nmpirun -np 16 ./all_reduce_perf\n",  # the runs of a script
        "n0:9:9 [0] NCCL INFO comm 0x5 rank 0 nranks 2 cudaDev 0 busId 1b000 - Init COMPLETE\n",
    ],
)
def test_what_tells_of_other_runs_does_not_count_against_a_list(tmp_path: Path, says: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the last host
        assert read_nccl_log(write(tmp_path, says + "".join(LISTED_16[:15]) + SLOW_16 + TAIL)).num_gpus == 15


def test_a_last_host_with_fewer_ranks_than_another_is_told_where_nothing_else_tells(tmp_path: Path) -> None:
    ranks = "".join(LISTED_16[:15])
    with pytest.warns(
        UserWarning, match="its hosts have 7 to 8 ranks each: if lines of the list are missing, there were"
    ):
        assert read_nccl_log(write(tmp_path, ranks + SLOW_16 + TAIL)).num_gpus == 15
    launched = "mpirun -np 15 ./all_reduce_perf\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_nccl_log(write(tmp_path, launched + ranks + SLOW_16 + TAIL))
    damaged = ranks.replace("on n0 device  3", "on n device  3")
    with pytest.warns(UserWarning, match=r"its hosts have 1 to 7 ranks each.* if a name is damaged, fewer nodes"):
        assert read_nccl_log(write(tmp_path, launched + damaged + SLOW_16 + TAIL)).num_nodes == 3


def test_a_list_that_nccl_tests_cut_short_is_completed_by_the_gpus_of_each_process(tmp_path: Path) -> None:
    """It keeps 2,048 characters of each process, which long names fill."""
    cut = "#  Rank 14 Group  0 Pid     14 on n0-with-a-long-na...\n"
    fast = SLOW_16.replace("1100.0 0.95 1.78", "10.0 104.86 196.61")
    whole = listed(*(f"n0 {i} 0000:{i:x}b:00" for i in range(14)))
    for name in (cut, cut.replace("on n0-with-a-long-na", "on n0 device 14 [0000:0b:00] NVIDIA H")):
        path = write(tmp_path, HEADED.format(16) + whole + name + fast + TAIL)
        (log,) = read_nccl_logs(path)
        assert (log.num_gpus, log.num_nodes) == (16, 1)
        path = write(tmp_path, HEADED.format(15) + whole + name + fast + TAIL)
        with pytest.raises(FileFormatError, match="lists 15 of its ranks, but its bus bandwidth is"):
            read_nccl_logs(path)


def test_slow_rows_without_a_list_are_of_as_many_gpus_as_the_log_names_once(tmp_path: Path) -> None:
    launched = "mpirun -np 16 -npernode 8 ./all_reduce_perf\n"
    (log,) = read_nccl_logs(write(tmp_path, launched + SLOW_16 + TAIL))
    assert (log.num_gpus, log.num_nodes) == (16, 2)
    fast = SLOW_16.replace("1100.0 0.95 1.78", "1000.0 1.05 1.97")  # 15 to 18 as well
    assert read_nccl_log(write(tmp_path, launched + fast + TAIL)).num_gpus == 16
    for unknown in ("mpirun -npernode 8 ./all_reduce_perf\n", "mpirun -np 0 ./all_reduce_perf\n"):
        with pytest.raises(FileFormatError, match="number of GPUs is unknown"):
            read_nccl_log(write(tmp_path, unknown + SLOW_16 + TAIL))
    with pytest.raises(FileFormatError, match="number of GPUs is unknown"):
        read_nccl_log(write(tmp_path, launched.replace("16", "8") + SLOW_16 + TAIL))
    with pytest.raises(FileFormatError, match="number of GPUs is unknown"):
        read_nccl_log(write(tmp_path, launched + launched.replace("16", "17") + SLOW_16 + TAIL))


@pytest.mark.parametrize(
    ("time_us", "fits"), [("0.001", True), ("0.0009", False), ("86400000000", True), ("86400000001", False)]
)
def test_an_all_reduce_takes_a_nanosecond_to_a_day(tmp_path: Path, time_us: str, fits: bool) -> None:
    rate = f"{0.008 / float(time_us):.2f}"
    half = f"{time_us} {rate} {rate} 0"
    path = write(tmp_path, f"{HEAD}8 2 float sum -1 {half} {half}\n{TAIL}")
    if fits:
        assert read_nccl_log(path).measurements[0].seconds == pytest.approx(float(time_us) * 1e-6)
    else:
        with pytest.raises(FileFormatError, match="expected a positive one of at most a day"):
            read_nccl_log(path)


@pytest.mark.parametrize(
    ("kinds", "chosen"),
    [
        (("half sum", "float prod", "float sum", "double sum"), 2),
        (("half sum", "float32 prod"), 1),  # the type counts first
        (("half prod", "bfloat16 sum", "double sum"), 1),
        (("half prod", "bfloat16 max"), 0),
    ],
)
def test_of_several_kinds_of_all_reduces_the_float_sum_or_what_is_next_to_it_counts(
    tmp_path: Path, kinds: tuple[str, ...], chosen: int
) -> None:
    """Each takes 10 µs more than the one before."""
    sizes = {"half": 2, "float": 4, "float32": 4, "double": 8, "bfloat16": 2}
    rows = ""
    for number, kind in enumerate(kinds):
        half = f"{419.4 + 10 * number:.1f} 10.00 10.00 0"
        rows += f"4194304 {4194304 // sizes[kind.split()[0]]} {kind} -1 {half} {half}\n"
    with pytest.warns(UserWarning, match=f"are left out beside those of {kinds[chosen]}$"):
        log = read_nccl_log(write(tmp_path, HEAD + rows + TAIL))
    assert log.measurements[0].seconds == pytest.approx((419.4 + 10 * chosen) * 1e-6)


def test_what_is_wrong_with_a_second_run_has_its_first_line(tmp_path: Path) -> None:
    groups = HEAD.replace("Rank  1 Group  0", "Rank  1 Group  1")
    empty = HEAD + "0  0  float  sum  -1  6.4  0.0  0.0  0  6.4  0.0  0.0  0\n"
    for second in (groups + FAST, empty):
        with pytest.raises(FileFormatError, match=r"groups of GPUs|empty messages") as caught:
            read_nccl_logs(write(tmp_path, HEAD + FAST + TAIL + second + TAIL))
        assert caught.value.line == 7  # three lines of the head, the row and two of the end are before it


def test_a_log_that_was_read_stays_as_it_is(tmp_path: Path) -> None:
    log = read_nccl_log(write(tmp_path, HEAD + FAST + TAIL))
    for record, field in ((log, "num_nodes"), (log.measurements[0], "size_bytes")):
        with pytest.raises(AttributeError):
            setattr(record, field, 9)
    assert {log: 1}[log] == 1


def test_a_renamed_program_is_judged_by_its_rows(tmp_path: Path) -> None:
    start = "# Collective test starting: bench\n"
    assert len(read_nccl_logs(write(tmp_path, (start + HEAD + FAST + TAIL) * 2))) == 2
    with pytest.raises(FileFormatError, match="holds a collective without reduction"):
        read_nccl_log(write(tmp_path, start + HEAD + GATHER + TAIL))


def test_a_name_counts_where_rows_tell_nothing_and_bandwidths_do_where_there_is_no_name(tmp_path: Path) -> None:
    """Two ranks of a sendrecv whose results nobody checked; four, whose all-reduce would have 1.5 times as much."""
    unchecked = FAST.replace("       0", "     N/A")
    with pytest.raises(FileFormatError, match="holds sendrecv_perf"):
        read_nccl_log(write(tmp_path, "# Collective test starting: sendrecv_perf\n" + HEAD + unchecked + TAIL))
    four = HEAD + HEAD.split("\n", 1)[1].replace("Rank  0", "Rank  2").replace("Rank  1", "Rank  3").replace("al", "be")
    for busbw, says in (("10.19", "holds a test whose bus bandwidth is"), ("10.21", "lists 4 of its ranks")):
        with pytest.raises(FileFormatError, match=says):
            read_nccl_log(write(tmp_path, four + unchecked.replace("10.00   10.00", f"10.00   {busbw}") + TAIL))
    assert (
        read_nccl_log(write(tmp_path, four + unchecked.replace("10.00   10.00", "10.00   15.00") + TAIL)).num_gpus == 4
    )


def test_slow_rows_alone_do_not_tell_how_many_gpus_there_were(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"has no device list .* the number of GPUs is unknown") as caught:
        read_nccl_log(write(tmp_path, SLOW + TAIL))
    assert "keep the lines '# Rank" in str(caught.value.hint)


def test_sizes_that_go_up_and_down_again_are_no_cycles(tmp_path: Path) -> None:
    larger = FAST.replace("4194304", "8388608").replace("1048576", "2097152").replace("419.4", "838.9")
    assert len(read_nccl_logs(write(tmp_path, HEAD + FAST + larger + FAST + larger + TAIL))) == 2
    with pytest.raises(FileFormatError, match="8388608 bytes are there twice") as caught:
        read_nccl_logs(write(tmp_path, HEAD + FAST + larger + larger + FAST + TAIL))
    assert caught.value.line == 6


def test_devices_without_the_first_line_and_the_end_are_no_whole_run(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"the log ends after 4194304 bytes without .* it is truncated"):
        read_nccl_log(write(tmp_path, HEAD.split("\n", 1)[1] + FAST))


def test_a_list_with_gaps_is_completed_only_where_the_bandwidths_say_so(tmp_path: Path) -> None:
    ranks = "".join(f"# Rank {i} Pid {i} on n{i} device 0 [0000:0b:00] H100\n" for i in (0, 5))
    row = "1073741824 268435456 float sum -1 11000 97.61 {} 0\n"
    six, sixteen = f"{97.61 * 10 / 6:.2f}", f"{97.61 * 30 / 16:.2f}"
    assert read_nccl_log(write(tmp_path, ranks + row.format(six) + TAIL)).num_gpus == 6
    with pytest.raises(FileFormatError, match="lists 2 ranks but numbers them up to 5"):
        read_nccl_log(write(tmp_path, ranks + row.format(sixteen) + TAIL))


def test_a_row_of_one_gigabyte_a_second_tells_the_gpus(tmp_path: Path) -> None:
    row = "1048576 262144 float sum -1 1048.6 1.00 1.50 0 1048.6 1.00 1.50 0\n"
    assert read_nccl_log(write(tmp_path, row + TAIL)).num_gpus == 4
