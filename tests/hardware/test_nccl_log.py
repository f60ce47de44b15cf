"""nccl-tests logs, old and new, text and JSON: what is read and what is refused."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path

import pytest

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log import read_nccl_log, read_nccl_logs, reading
from ptsim.hardware.nccl_log.section import Row, Times
from ptsim.hardware.nccl_log.text import read_sections

OLD_HEAD = """\
# nThread 1 nGpus 1 minBytes 1024 maxBytes 4194304 step: 64(factor) warmup iters: 5 iters: 9 validation: 1
#
# Using devices
#   Rank  0 Pid 100 on    alpha device  0 [0x27] A100-SXM4-40GB
#   Rank  1 Pid 101 on    alpha device  1 [0x2a] A100-SXM4-40GB
#   Rank  2 Pid 102 on     beta device  0 [0x27] A100-SXM4-40GB
#   Rank  3 Pid 103 on     beta device  1 [0x2a] A100-SXM4-40GB
#
#                                                     out-of-place                       in-place
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)                     (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
OLD_ROWS = """        1024           256   float     sum    20.00    0.05    0.08  5e-07    21.00    0.05    0.07  5e-07
       65536         16384   float     sum    40.00    1.64    2.46  5e-07    39.00    1.68    2.52  5e-07
     4194304       1048576   float     sum    210.0   19.97   29.96  5e-07    208.0   20.16   30.25  5e-07
"""
ALONE = "4194304 1048576 float sum 10.00 419.43 0.00 0e+00 0.50 8388.6 0.00 0e+00\n"
TAIL = """# Out of bounds values : 0 OK
# Avg bus bandwidth    : 10.8
#
"""
NEW_HEAD = """# nccl-tests version 2.17.8 nccl-headers=22902 nccl-library=22902
# Collective test starting: all_reduce_perf
# nThread 1 nGpus 2 minBytes 1024 maxBytes 4194304 step: 64(factor) warmup iters: 5 iters: 20 agg iters: 1 validation: 1
#
# Using devices
#  Rank  0 Group  0 Pid     10 on    alpha device  0 [0000:1b:00] NVIDIA H100 80GB HBM3
#  Rank  1 Group  0 Pid     10 on    alpha device  1 [0000:43:00] NVIDIA H100 80GB HBM3
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)
"""
NEW_ROWS = """\
        1024           256     float     sum      -1    10.00    0.10    0.10       0    10.00    0.10    0.10     N/A
     4194304       1048576     float     sum      -1    41943    0.10    0.10       0    41943    0.10    0.10       0
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "all_reduce.log"
    path.write_text(text, encoding="utf-8")
    return path


def test_old_format_gives_sizes_times_gpus_and_nodes(tmp_path: Path) -> None:
    log = read_nccl_log(write(tmp_path, "some UCX WARN noise\n" + OLD_HEAD + OLD_ROWS + TAIL))
    assert (log.num_gpus, log.num_nodes, log.gpus) == (4, 2, ("A100-SXM4-40GB",))
    assert [m.size_bytes for m in log.measurements] == [1024, 65536, 4194304]
    assert log.measurements[0].out_of_place_s == pytest.approx(20e-6)
    assert log.measurements[0].in_place_s == pytest.approx(21e-6)
    assert log.measurements[0].seconds == pytest.approx((20e-6 * 21e-6) ** 0.5)


def test_new_format_with_root_column_whole_microseconds_and_version(tmp_path: Path) -> None:
    log = read_nccl_log(write(tmp_path, NEW_HEAD + NEW_ROWS + TAIL))
    assert (log.num_gpus, log.num_nodes, log.version) == (2, 1, "22902")
    assert log.measurements[1].out_of_place_s == pytest.approx(41943e-6)


@pytest.mark.parametrize(
    "prefix",
    ["[1,0]<stdout>:", "[1,0]<stdout> ", "0: ", "    ", "launcher-0: ", "\x1b[36m[pod-7]\x1b[0m ",
     "2026-01-02T03:04:05.678Z stdout F "],
)  # fmt: skip
def test_launcher_prefixes_are_taken_off(tmp_path: Path, prefix: str) -> None:
    text = "".join(prefix + line + "\n" for line in (OLD_HEAD + OLD_ROWS + TAIL).splitlines())
    assert len(read_nccl_log(write(tmp_path, text)).measurements) == 3


def test_in_place_only_and_time_stamps_are_read(tmp_path: Path) -> None:
    row = "        1024           256     float     sum      -1    10.00    0.10    0.10       0  2026-01-02 03:04:05\n"
    log = read_nccl_log(write(tmp_path, NEW_HEAD + row + TAIL))
    assert log.measurements[0].seconds == pytest.approx(10e-6)


NAMES = NEW_HEAD.splitlines(keepends=True)[-3:]  # of the columns, in three lines
PAGED = [f"{4**i * 2**20} {4**i * 2**18} float sum -1" + 2 * f" {4**i * 1e3:.1f} 1.05 1.05 0" + "\n" for i in range(4)]


@pytest.mark.parametrize("names", [NAMES, NAMES[1:2]])
@pytest.mark.parametrize("page", [1, 3])
def test_names_of_columns_that_every_page_repeats_are_of_one_table(tmp_path: Path, page: int, names: list[str]) -> None:
    rows = "".join(row if i % page else "".join(names) + row for i, row in enumerate(PAGED))
    log = read_nccl_log(write(tmp_path, "".join(NEW_HEAD.splitlines(keepends=True)[:-3]) + rows + TAIL))
    assert [m.size_bytes for m in log.measurements] == [2**20, 2**22, 2**24, 2**26]
    assert log.num_gpus == 2


@pytest.mark.parametrize("names", [NAMES, NAMES[1:2]])
def test_sizes_that_start_again_under_the_same_names_are_a_second_run(tmp_path: Path, names: list[str]) -> None:
    """Of which the first needs an end of its own: here its header's."""
    head = NEW_HEAD.replace("maxBytes 4194304 step: 64", f"maxBytes {2**26} step: 4")
    rows = "".join(PAGED)
    path = write(tmp_path, head + rows + "".join(names) + rows + TAIL)
    assert [len(log.measurements) for log in read_nccl_logs(path)] == [4, 4]
    path = write(tmp_path, head + "".join(PAGED[:3]) + "".join(names) + rows + TAIL)
    with pytest.raises(FileFormatError, match="ends after 16777216 of 67108864 bytes"):
        read_nccl_logs(path)


def test_a_table_that_another_runs_goes_on_is_of_different_numbers_of_gpus(tmp_path: Path) -> None:
    """As two files put together, the first of which broke off: 2 GPUs, and 4, whose bus bandwidth is 1.5 times 1.05."""
    four = "".join(PAGED[2:]).replace("1.05 1.05", "1.05 1.58")
    path = write(tmp_path, NAMES[1] + "".join(PAGED[:2]) + NAMES[1] + four + TAIL)
    with pytest.raises(FileFormatError, match="has rows whose bandwidths are of different numbers of GPUs"):
        read_nccl_logs(path)


@pytest.mark.parametrize("between", ["mpirun -np 2 ./x\n", "# Collective test starting: all_reduce_perf\n"])
def test_names_of_columns_behind_a_line_that_starts_a_run_are_not_of_the_same_table(
    tmp_path: Path, between: str
) -> None:
    text = NEW_HEAD + "".join(PAGED[:2]) + between + "".join(NAMES) + "".join(PAGED[2:]) + TAIL
    with pytest.raises(FileFormatError, match="ends after 4194304 of 67108864 bytes"):
        read_nccl_logs(write(tmp_path, text.replace("maxBytes 4194304 step: 64", f"maxBytes {2**26} step: 4")))


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    text = "\ufeff" + (OLD_HEAD + OLD_ROWS + TAIL).replace("\n", "\r\n")
    assert len(read_nccl_log(write(tmp_path, text)).measurements) == 3


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_what_powershell_writes_is_read(tmp_path: Path, order: str) -> None:
    path = tmp_path / "all_reduce.log"
    path.write_bytes(("\ufeff" + OLD_HEAD + OLD_ROWS + TAIL).replace("\n", "\r\n").encode(order))
    assert read_nccl_log(path).num_gpus == 4


def test_per_iteration_columns_are_passed_over(tmp_path: Path) -> None:
    # nccl-tests 2.18, writePerIterReport: i_min, i_max, i_p99, i_cv% behind either half
    row = "1024  256  float  sum  -1  10.0  0.1  0.1  0  9.0 12.0 11.9 5.0  14.4  0.1  0.1  0  9.5 15.0 14.9 6.0\n"
    log = read_nccl_log(write(tmp_path, NEW_HEAD + row + TAIL))
    assert log.measurements[0].seconds == pytest.approx(12e-6)


def test_an_in_place_only_row_counts_and_one_without_a_time_does_not(tmp_path: Path) -> None:
    row = "1024  256  float  sum  -1  N/A  N/A  N/A  N/A  12.0  0.1  0.1  0\n"
    measured = read_nccl_log(write(tmp_path, NEW_HEAD + row + TAIL)).measurements[0]
    assert (measured.out_of_place_s, measured.in_place_s) == (None, pytest.approx(12e-6))
    with pytest.raises(FileFormatError, match="has no time"):
        read_nccl_log(write(tmp_path, NEW_HEAD + row.replace("12.0  0.1  0.1", "N/A  N/A  N/A") + TAIL))


def test_rows_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    rows = "".join(reversed(OLD_ROWS.splitlines(keepends=True)))
    log = read_nccl_log(write(tmp_path, OLD_HEAD + rows + TAIL))
    assert [m.size_bytes for m in log.measurements] == [1024, 65536, 4194304]


def test_of_several_data_types_and_reductions_the_float_sum_counts(tmp_path: Path) -> None:
    integers = OLD_ROWS.replace("float", "int32").replace("  20.00", "  99.00")
    products = OLD_ROWS.replace(" sum", "prod").replace("  20.00", "  77.00")
    with pytest.warns(UserWarning, match="reduced int32 sum and float prod are left out beside those of float sum"):
        log = read_nccl_log(write(tmp_path, OLD_HEAD + integers + products + OLD_ROWS + TAIL))
    assert log.measurements[0].out_of_place_s == pytest.approx(20e-6)


def test_a_thousand_ranks_are_counted_and_a_list_cut_short_is_completed(tmp_path: Path) -> None:
    def listing(ranks: range) -> str:
        return "".join(
            f"#  Rank {r:2d} Group  0 Pid {r:6d} on node{r // 8:03d} device {r % 8:2d} [0000:1b:00] NVIDIA H100\n"
            for r in ranks
        )

    row = "  1073741824     268435456     float     sum      -1    11000   97.61  {}       0\n"
    many = listing(range(1024)) + row.format(round(97.61 * 2 * 1023 / 1024, 2)) + TAIL
    log = read_nccl_log(write(tmp_path, many))
    assert (log.num_gpus, log.num_nodes) == (1024, 128)
    few = listing(range(0, 16, 5)) + row.format(round(97.61 * 2 * 15 / 16, 2)) + TAIL
    log = read_nccl_log(write(tmp_path, few))
    assert (log.num_gpus, log.num_nodes) == (16, None)  # other nodes may be among those left out


def test_times_before_version_2_are_milliseconds(tmp_path: Path) -> None:
    text = """# nThread 1 nGpus 2 minBytes 1 maxBytes 1048576 step: 2(factor) warmup iters: 5 iters: 20 validation: 0
# NCCL Tests compiled with NCCL 2.4
# Using devices
#   Rank  0 on       ncrh device  0 [0x05] GeForce RTX 2080 Ti
#   Rank  1 on       ncrh device  1 [0x06] GeForce RTX 2080 Ti

#                                                 out-of-place                    in-place
#      bytes             N    type      op     time  algbw  busbw      res     time  algbw  busbw      res
     1048576        262144   float     sum    0.210   4.99   4.99       N/A    0.210   4.99   4.99      N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 4.99
"""
    log = read_nccl_log(write(tmp_path, text))
    assert (log.num_gpus, log.version) == (2, "2.4")
    assert log.measurements[0].seconds == pytest.approx(210e-6)


def test_several_runs_of_a_file_are_all_read(tmp_path: Path) -> None:
    path = write(tmp_path, OLD_HEAD + OLD_ROWS + TAIL + NEW_HEAD + NEW_ROWS + TAIL)
    assert [log.num_gpus for log in read_nccl_logs(path)] == [4, 2]
    with pytest.raises(FileFormatError, match="holds 2 all-reduce runs, expected one"):
        read_nccl_log(path)


def test_cpu_times_and_simultaneous_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="CPU times"):
        read_nccl_log(write(tmp_path, NEW_HEAD.replace("     time ", "  cputime ") + NEW_ROWS + TAIL))
    with pytest.raises(FileFormatError, match="2 groups of GPUs at the same time"):
        read_nccl_log(write(tmp_path, NEW_HEAD.replace("Rank  1 Group  0", "Rank  1 Group  1") + NEW_ROWS + TAIL))


def test_pairs_that_reduce_at_the_same_time_are_called_groups_and_not_another_collective(tmp_path: Path) -> None:
    # NCCL_TESTS_SPLIT: of two ranks, bus and algorithm bandwidth are equal, as a sendrecv's are
    head = NEW_HEAD.replace("# Collective test starting: all_reduce_perf\n", "").replace(
        "Rank  1 Group  0", "Rank  1 Group  1"
    )
    more = "#  Rank  2 Group  0 Pid 10 on beta device 0 [0000:1b:00] NVIDIA H100\n"
    head = head.replace("#\n#  ", f"{more}{more.replace('Rank  2 Group  0', 'Rank  3 Group  1')}#\n#  ", 1)
    times = "    41.943    100.00    100.00    0"
    row = f"     4194304       1048576     float     sum      -1{times}{times}\n"
    with pytest.raises(FileFormatError, match="2 groups of GPUs at the same time"):
        read_nccl_log(write(tmp_path, head + row + TAIL))


def test_all_reduce_is_found_among_other_collectives(tmp_path: Path) -> None:
    gather = (NEW_HEAD + NEW_ROWS).replace("all_reduce", "all_gather").replace(" sum ", "none ") + TAIL
    ends = "# Collective test concluded: {}\n"
    text = gather + ends.format("all_gather_perf") + NEW_HEAD + NEW_ROWS + TAIL + ends.format("all_reduce_perf")
    assert len(read_nccl_log(write(tmp_path, text)).measurements) == 2


def test_number_of_gpus_follows_from_bus_bandwidth_where_no_device_is_listed(tmp_path: Path) -> None:
    log = read_nccl_log(write(tmp_path, OLD_ROWS + TAIL))
    assert log.num_gpus == 4  # 29.96 / 19.97 = 1.5 = 2 (n-1) / n


def document(**changes: object) -> str:
    base: dict[str, object] = {
        "version": 1,
        "args": ["./all_reduce_perf", "-g", "2"],
        "nccl_version": 22902,
        "config": {
            "nthreads": 1,
            "ngpus": 2,
            "blocking_collectives": "false",
            "devices": [{"rank": 0, "hostname": "alpha", "device_info": "NVIDIA H100 80GB HBM3"}],
        },
        "results": [
            {
                "size": size,
                "count": size // 4,
                "type": "float",
                "redop": "sum",
                "root": "    -1",
                "out_of_place": {"time": time, "alg_bw": rate, "bus_bw": rate, "nwrong": 0.0},
                "in_place": {"time": time, "alg_bw": rate, "bus_bw": rate, "nwrong": None},
            }
            for size, time, rate in ((1024, 10.0, 0.1), (4194304, 90.0, 46.6))
        ],
        "out_of_bounds": {"count": 0, "okay": True},
        "average_bus_bandwidth": {"bandwidth": 3.0, "okay": "unchecked"},
    }
    return json.dumps(base | changes)


def results(root: str = "-1", nwrong: object = "N/A") -> dict[str, object]:
    time = {"time": 9.0, "alg_bw": 0.0, "bus_bw": 0.0, "nwrong": nwrong}
    return {"size": 8, "count": 2, "root": root, "out_of_place": time, "in_place": time | {"nwrong": None}}


def test_json_counts_the_gpus_of_one_process(tmp_path: Path) -> None:
    log = read_nccl_log(write(tmp_path, document()))
    assert (log.num_gpus, log.num_nodes, log.version) == (2, 1, "22902")
    assert log.measurements[1].seconds == pytest.approx(90e-6)


@pytest.mark.parametrize(("nthreads", "ngpus"), [(1, 4), (2, 2), (4, 1)])
def test_json_of_several_processes_names_the_first_device_of_each(tmp_path: Path, nthreads: int, ngpus: int) -> None:
    devices = [
        {"rank": 4 * i, "group": 0, "hostname": f"n{i}", "device_info": "NVIDIA H100 80GB HBM3"} for i in range(2)
    ]
    results = [
        {"size": 4194304, "type": "float", "redop": "sum", "root": "    -1", "out_of_place": None,
         "in_place": {"time": 90.0, "alg_bw": 46.6, "bus_bw": 81.55, "nwrong": 0.0},
         "in_place_per_iter": {"min_us": 80.0, "times_us": [80.0, 100.0]}}
    ]  # fmt: skip
    text = document(config={"nthreads": nthreads, "ngpus": ngpus, "devices": devices}, results=results)
    log = read_nccl_log(write(tmp_path, text))
    assert (log.num_gpus, log.num_nodes) == (8, 2)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", None, "is empty"),
        ("hello\nworld\n", None, "no measurement found"),
        (OLD_HEAD + TAIL, None, "no measurement found"),
        (OLD_HEAD + "".join(OLD_ROWS.splitlines(keepends=True)[:-1]), 13, "truncated"),
        (OLD_HEAD + OLD_ROWS[:-60], 14, "truncated"),
        (NEW_HEAD + NEW_ROWS[:-12], 13, "incomplete"),
        (OLD_HEAD + OLD_ROWS + OLD_ROWS + TAIL, 15, "mixed"),
        (OLD_HEAD + OLD_HEAD + OLD_ROWS + TAIL, 12, "mixed"),
        ((OLD_HEAD + OLD_ROWS + TAIL).replace(" sum ", "none "), 12, "expected all_reduce_perf"),
        ((NEW_HEAD + NEW_ROWS + TAIL).replace("all_reduce", "all_gather"), 12, "holds all_gather_perf"),
        ((NEW_HEAD + NEW_ROWS + TAIL).replace(" -1 ", "  0 ").replace("all_reduce_perf", ""), 12, "holds reduce_perf"),
        (OLD_HEAD + OLD_ROWS.replace("29.96", "14.98") + TAIL, 12, "holds reduce_scatter_perf"),
        (OLD_HEAD + OLD_ROWS.replace("29.96", "34.94") + TAIL, 14, "which 8 ranks would give"),
        (OLD_HEAD + OLD_ROWS + TAIL.replace(": 0 OK", ": 3 FAILED"), 15, "out of bounds"),
        (NEW_HEAD + NEW_ROWS.replace("     N/A", "       7") + TAIL, 12, "7 wrong results"),
        ("\n".join(OLD_HEAD.splitlines()[:4]) + "\n" + ALONE + TAIL, None, "single GPU"),
        (ALONE + TAIL, None, "single GPU"),
        ("\n".join(OLD_HEAD.splitlines()[:4]) + "\n" + OLD_ROWS + TAIL, 7, "lists 1 of its ranks"),
        (document(args=["./broadcast_perf"]), None, "holds broadcast_perf"),
        (document(results=[]), None, "no 'results'"),
        (document()[:-200], None, "not the JSON output of nccl-tests: Input data was truncated"),
        (document(out_of_bounds={"count": 2, "okay": False}), None, "2 results were out of bounds"),
        (document(out_of_bounds={"count": 0, "okay": "false"}), None, "results were out of bounds"),
        (document(out_of_bounds=0), None, "$.out_of_bounds"),
        (document(config=[]), None, "$.config"),
        (document(results=[{"size": 8, "out_of_place": {"time": "N/A"}}]), None, "$.results[0].out_of_place.time"),
        (document(results=[{"size": 8, "out_of_place": {"cpu_time": 3.0}}]), None, "has CPU time"),
        (document(results=[{"size": 8}]), None, "neither an out-of-place nor an in-place time"),
        (document(out_of_bounds=None), None, "has no 'out_of_bounds': the run did not end"),
        (document(results=[results(nwrong=3.0)]), None, "3 wrong results at 8 bytes"),
        (document(results=[results(root="one")]), None, "results[0].root is 'one', expected a rank"),
        (document(args=[], results=[results(root=" 0")]), None, "holds reduce_perf"),
    ],
)
def test_what_cannot_be_trusted_is_refused_with_file_and_line(
    tmp_path: Path, text: str, line: int | None, says: str
) -> None:
    with pytest.raises(FileFormatError, match=r"all_reduce\.log") as caught:
        read_nccl_log(write(tmp_path, text))
    assert says in caught.value.message
    if line is not None:
        assert caught.value.line == line


# What people posted, shortened to the rows that show the form; where from stands beside each.
POSTED = {
    # KeitaW/p5-nccl-test-2024-07-19: Open MPI marks every piece that a process writes, not every line
    "a prefix in the middle of a row": """\
[1,0]<stdout>:# nThread 1 nGpus 1 minBytes 8 maxBytes 17179869184 step: 2(factor) warmup iters: 5 iters: 100 agg iters: 1
[1,0]<stdout>:# Using devices
[1,5]<stdout>:test-nccl-worker-0:32:68 [5] NCCL INFO NET/OFI Using transport protocol RDMA
[1,0]<stdout>:#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
[1,0]<stdout>:       65536         16384     float     sum      -1[1,0]<stdout>:    107.4    0.61    1.14      0[1,0]<stdout>:    86.01    0.76    1.43      0
[1,0]<stdout>:    33554432       8388608     float     sum      -1[1,0]<stdout>:    459.2   73.07  137.01      0[1,0]<stdout>:    434.2   77.27  144.89      0
[1,0]<stdout>:# Out of bounds values : 0 OK
[1,0]<stdout>:# Avg bus bandwidth    : 124.584
""",  # noqa: E501
    # NVIDIA/nccl, issue 1453: Hydra's prefix
    "a rank in brackets": """\
[0]      4194304       1048576     float     sum      -1[0]     622.6    6.74   12.91      0[0]     625.8    6.70   12.85      0
[0]     33554432       8388608     float     sum      -1[0]    2180.1   15.39   29.50      0[0]    2285.2   14.68   28.14      0
[0] # Out of bounds values : 0 OK
""",  # noqa: E501
    # the same issue, with NCCL_DEBUG_SUBSYS=TUNING: messages cut a row in two
    "a row cut by messages": """\
[0]       524288        131072     float     sum      -1[0]     366.5    1.43    2.74      0[0]     340.8    1.54    2.95      0
[0]     33554432       8388608     float     sum      -1h100clust-worker-1:497888:497888 [0] NCCL INFO 33554432 Bytes -> Algo 5 proto 2 time 79.214401
[0] h100clust-worker-1:497888:497888 [0] NCCL INFO 33554432 Bytes -> Algo 5 proto 2 time 79.214401
[0]    2180.1   15.39   29.50      0h100clust-worker-1:497888:497888 [0] NCCL INFO 33554432 Bytes -> Algo 5 proto 2 time 79.2
[0]    2285.2   14.68   28.14      0
[0] # Out of bounds values : 0 OK
""",  # noqa: E501
    # dstackai/dstack, examples/clusters/crusoe: a page that lost its hashes
    "no hashes": """\
 nThread 1 nGpus 8 minBytes 8 maxBytes 8589934592 step: 2(factor) warmup iters: 5 iters: 20 validation: 1
 Using devices
   Rank  0 Pid 1821213 on AI-A100-Beethoven01 device  0 [0x00] NVIDIA H100 80GB HBM3
   Rank  1 Pid 1821214 on AI-A100-Beethoven02 device 15 [0x00] NVIDIA H100 80GB HBM3
 out-of-place                       in-place
        size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
    33554432       8388608     float     sum      -1   274.23  122.36  122.36       0   276.45  121.38  121.38       0
  8589934592    2147483648     float     sum      -1  34448.4  249.36  249.36       0  34381.0  249.85  249.85       0
  Out of bounds values : 0 OK
  Avg bus bandwidth    : 125.499
""",
    # a course page of 2020, quoted
    "a quotation": """\
>      1048576        262144   float     sum    615.4    1.70    2.98  2e-07    613.0    1.71    2.99  2e-07
>    134217728      33554432   float     sum    95470    1.41    2.46  2e-07    95477    1.41    2.46  2e-07
> # Out of bounds values : 0 OK
""",
    # NVIDIA/nccl-tests, pull request 349: -S 1; Kubernetes' own time in front
    "times of day": """\
2025-10-14T08:00:01.123456789Z     33554432       8388608     float     sum      -1   274.23  122.36  229.43       0   276.45  121.38  227.58       0  2025-10-14 08:00:01
2025-10-14T08:00:02.123456789Z # Out of bounds values : 0 OK
""",  # noqa: E501
    # srun -l; in-place results unchecked
    "a rank and a colon": """\
 0:   33554432   16777216   bfloat16     avg      -1    274.2  122.36  229.43    N/A    276.4  121.38  227.58    N/A
 0: # Out of bounds values : 0 OK
""",
    # hosts of Azure ML start with digits; NCCL_DEBUG_SUBSYS=COLL writes before the first time
    "a message right behind the reduction": """\
#   Rank  0 Pid    195 on 2e3f9af7 device  0 [0x00] Tesla K80
#   Rank  1 Pid    196 on 2e3f9af7 device  1 [0x00] Tesla K80
    33554432       8388608     float     sumworker-0:195:195 [0] NCCL INFO AllReduce: opCount 5
2e3f9af7:196:196 [1] NCCL INFO AllReduce: opCount 5
    19902    1.69    1.69  2e-07    19898    1.69    1.69  2e-07
# Out of bounds values : 0 OK
""",
    # NCCL 2.27 and newer put the day in front of a message
    "dated messages": """\
    33554432       8388608     float     sum      -1[2026-01-02 03:04:05] n1:12:34 [0] misc/socket.cc:49 NCCL WARN slow
   274.23  122.36  229.43       0   276.45  121.38  227.58       0[2026-01-02 03:04:06] n1:12:34 [0] NCCL INFO done
# Out of bounds values : 0 OK
""",
    # SageMaker's mpirun
    "a host in the prefix": """\
[1,mpirank:0,algo-1]<stdout>:    33554432       8388608     float     sum      -1[1,mpirank:0,algo-1]<stdout>:   274.23  122.36  229.43       0[1,mpirank:0,algo-1]<stdout>:   276.45  121.38  227.58       0
[1,mpirank:0,algo-1]<stdout>:# Out of bounds values : 0 OK
""",  # noqa: E501
    # Hydra's prefix behind the time of day that `ts` puts in front
    "a time and a rank in brackets": """\
2026-01-02T03:04:05 [0]     33554432       8388608     float     sum      -1   274.23  122.36  229.43       0   276.45  121.38  227.58       0
2026-01-02T03:04:06 [0] # Out of bounds values : 0 OK
""",  # noqa: E501
    # a page on GKE's a4-highgpu-8g: one group of columns without errors
    "three columns": """\
# nThread 1 nGpus 8 minBytes 8388608 maxBytes 17179869184 step: 2(factor)
#  Rank  0 Group  0 Pid 221599 device  0 [0000:8f:00] NVIDIA B200
     8388608       2097152     float     sum      -1    80.32  104.44  182.77
    33554432       8388608     float     sum      -1    172.6  194.36  340.13
# Avg bus bandwidth    : 300
""",
}
LAST_US = {
    "a prefix in the middle of a row": (16, 459.2, 434.2),
    "a rank in brackets": (24, 2180.1, 2285.2),
    "a row cut by messages": (24, 2180.1, 2285.2),
    "no hashes": (2, 34448.4, 34381.0),
    "a quotation": (8, 95470, 95477),
    "times of day": (16, 274.23, 276.45),
    "a rank and a colon": (16, 274.2, 276.4),
    "a message right behind the reduction": (2, 19902, 19898),
    "dated messages": (16, 274.23, 276.45),
    "a host in the prefix": (16, 274.23, 276.45),
    "a time and a rank in brackets": (16, 274.23, 276.45),
    "three columns": (8, 172.6, None),
}


@pytest.mark.parametrize("form", POSTED)
def test_what_people_post_is_read(form: str, tmp_path: Path) -> None:
    log = read_nccl_log(write(tmp_path, POSTED[form]))
    num_gpus, out_of_place, in_place = LAST_US[form]
    last = log.measurements[-1]
    assert log.num_gpus == num_gpus
    assert last.out_of_place_s == pytest.approx(out_of_place * 1e-6)
    assert last.in_place_s == (None if in_place is None else pytest.approx(in_place * 1e-6))


def test_a_row_of_which_messages_swallowed_the_end_is_refused(tmp_path: Path) -> None:
    text = POSTED["a row cut by messages"].replace("[0]    2285.2   14.68   28.14      0\n", "")
    with pytest.raises(FileFormatError, match="row of 33554432 bytes is incomplete") as caught:
        read_nccl_log(write(tmp_path, text.replace("   29.50      0h100", "   29.50      h100")))
    assert caught.value.line == 2


def cycles(num: int) -> str:
    halves = [
        (size, f"{time:8.2f} {size / time / 1e3:7.2f} {size / time / 1e3:7.2f}       0")
        for i in range(num)
        for size, time in ((0, 0.1), (1024, 10 * i + 20.0), (4194304, 10 * i + 100.0))
    ]
    rows = [f"{size:12d} {size // 4:12d}     float     sum      -1 {half} {half}\n" for size, half in halves]
    return NEW_HEAD + "".join(rows) + TAIL


def test_run_cycles_are_runs(tmp_path: Path) -> None:
    logs = read_nccl_logs(write(tmp_path, cycles(3)))
    assert [[round(m.seconds * 1e6) for m in log.measurements] for log in logs] == [[20, 100], [30, 110], [40, 120]]
    assert {log.num_gpus for log in logs} == {2}


def test_json_of_run_cycles_is_as_many_runs(tmp_path: Path) -> None:
    results = json.loads(document())["results"]
    assert len(read_nccl_logs(write(tmp_path, document(results=results * 3)))) == 3
    with pytest.raises(FileFormatError, match="1024 bytes are there twice"):
        read_nccl_logs(write(tmp_path, document(results=results + results[:1])))


def test_cycles_that_stop_or_interleave_are_refused(tmp_path: Path) -> None:
    lines = cycles(2).splitlines(keepends=True)
    last = next(i for i in reversed(range(len(lines))) if " 4194304 " in lines[i])
    swapped = [*lines[: last - 4], lines[last - 3], lines[last - 1], lines[last - 4], *lines[last - 2 :]]
    for broken in (lines[:last] + lines[last + 1 :], swapped):
        with pytest.raises(FileFormatError, match="there twice: the output of several ranks or runs is mixed"):
            read_nccl_logs(write(tmp_path, "".join(broken)))


def test_a_reduce_scatter_without_name_and_device_list_is_told_by_its_counts(tmp_path: Path) -> None:
    row = "  33554432       1048576     float     sum      -1    80.28  417.95  365.71       0    79.87  420.13  367.61       0\n"  # noqa: E501
    with pytest.raises(FileFormatError, match="holds reduce_scatter_perf"):
        read_nccl_log(write(tmp_path, row + TAIL))
    with pytest.raises(FileFormatError, match="which no all-reduce has"):
        read_nccl_log(write(tmp_path, row.replace("  1048576", "  8388608") + TAIL))


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be read: No such file"):
        read_nccl_log(tmp_path / "absent.log")


def test_json_of_nodes_of_one_name_does_not_take_them_for_one(tmp_path: Path) -> None:
    """Each process names its first GPU: a GPU that two of them have is that of two nodes, of whatever name."""
    time = {"time": 90.0, "alg_bw": 46.6, "bus_bw": 81.55, "nwrong": 0.0}
    rows = [{"size": 4194304, "redop": "sum", "out_of_place": time, "in_place": time}]
    for numbers, nodes in (((0, 0), None), ((0, 4), 1)):
        devices = [
            {"rank": 4 * i, "hostname": "worker", "device": number, "device_hex": f"0000:{number}b:00"}
            for i, number in enumerate(numbers)
        ]
        text = document(config={"nthreads": 1, "ngpus": 4, "devices": devices}, results=rows)
        log = read_nccl_log(write(tmp_path, text))
        assert (log.num_gpus, log.num_nodes) == (8, nodes)


def test_json_of_a_program_of_another_name_is_judged_by_its_results(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="holds a collective without reduction"):
        read_nccl_log(write(tmp_path, document(args=["./ag"], results=[results() | {"redop": "none"}])))
    with pytest.raises(FileFormatError, match="holds a test that checks no results in place"):
        read_nccl_log(write(tmp_path, document(args=["./sr"])))
    path = write(tmp_path, document(args=["./ar"], results=[results() | {"type": "fp4"}]))  # a type of the future
    assert [m.size_bytes for m in read_nccl_log(path).measurements] == [8]
    with pytest.warns(UserWarning, match="16 all-reduces ran in one group"):
        read_nccl_log(write(tmp_path, document(config={"ngpus": 2, "aggregated_iterations": 16, "devices": [{}]})))
    with pytest.warns(UserWarning, match="the host waited for each all-reduce"):
        read_nccl_log(write(tmp_path, document(config={"ngpus": 2, "blocking_collectives": "true", "devices": [{}]})))
    with pytest.warns(UserWarning, match="there was no warm-up"):
        read_nccl_log(write(tmp_path, document(config={"ngpus": 2, "warmup_iters": 0, "devices": [{}]})))


def test_a_file_of_blank_lines_is_empty(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is empty"):
        read_nccl_log(write(tmp_path, " \n\n"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_read_up_to_a_size(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, it is small on the disk."""
    data = (OLD_HEAD + OLD_ROWS + TAIL).encode()
    path = tmp_path / "log"
    path.write_bytes(gzip.compress(data) if packed else data)
    monkeypatch.setattr(reading, "_MOST_BYTES", len(data))
    assert len(read_nccl_logs(path)) == 1
    monkeypatch.setattr(reading, "_MOST_BYTES", len(data) - 1)
    with pytest.raises(FileFormatError, match=r"more than|at most"):
        read_nccl_logs(path)


def test_a_run_that_listed_its_devices_and_no_row_is_left_out(tmp_path: Path) -> None:
    alone = read_nccl_log(write(tmp_path, NEW_HEAD + NEW_ROWS + TAIL))
    assert read_nccl_log(write(tmp_path, NEW_HEAD + NEW_HEAD + NEW_ROWS + TAIL)).measurements == alone.measurements


def test_of_several_other_collectives_the_first_is_named(tmp_path: Path) -> None:
    first, second = (NEW_HEAD.replace("all_reduce", name) + NEW_ROWS + TAIL for name in ("broadcast", "all_gather"))
    with pytest.raises(FileFormatError, match="holds broadcast_perf, expected all_reduce_perf"):
        read_nccl_log(write(tmp_path, first + second))


TEN, NINE = Times(10.0, 0.1, 0.2), Times(9.0, 0.3, 0.4)
ITERATIONS = "1 2 3 4"  # times of single ones, behind each time


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        # reduction, root, out of place, in place, wrong results, groups of columns, checked out of place alone
        ("sum 10 .1 .2 5e-07 9 .3 .4 1e+00", ("sum", None, TEN, NINE, 0, 2, False)),  # errors, no counts
        ("sum -1 10 .1 .2 3 9 .3 .4 4", ("sum", -1, TEN, NINE, 7, 2, False)),
        ("sum 2 10 .1 .2 0 9 .3 .4 0", ("sum", 2, TEN, NINE, 0, 2, False)),
        ("sum -1 10 .1 .2 0 9 .3 .4 N/A", ("sum", -1, TEN, NINE, 0, 2, True)),
        ("sum -1 10 .1 .2 N/A 9 .3 .4 N/A", ("sum", -1, TEN, NINE, 0, 2, False)),
        ("sum -1 10 .1 .2 0", ("sum", -1, TEN, None, 0, 1, False)),
        ("sum 10 .1 .2", ("sum", None, TEN, None, 0, 1, False)),
        ("10 .1 .2 0 9 .3 .4 0", ("none", None, TEN, NINE, 0, 2, False)),
        ("sum -1 N/A N/A N/A N/A 9 .3 .4 0", ("sum", -1, None, NINE, 0, 2, False)),
        ("sum -1 N/A .1 .2 0 9 .3 .4 0", ("sum", -1, None, NINE, 0, 2, False)),
        ("sum -1 10 N/A .2 0 9 .3 .4 0", ("sum", -1, None, NINE, 0, 2, False)),
        ("sum -1 10 .1 N/A 0 9 .3 .4 0", ("sum", -1, None, NINE, 0, 2, False)),
        ("sum -1 10 .1 .2 0 9 .3 .4 0 N/A N/A N/A", ("sum", -1, TEN, NINE, 0, 2, False)),  # rccl-tests -A 1
        ("sum -1 10 .1 .2 0 9 .3 .4 0 Fri Jan 2 03:04:05 2026", ("sum", -1, TEN, NINE, 0, 2, False)),
        (f"sum -1 10 .1 .2 0 {ITERATIONS} 9 .3 .4 5 {ITERATIONS}", ("sum", -1, TEN, NINE, 5, 2, False)),
        ("sum -1 1e18 .1 .2 0", ("sum", -1, Times(1e18, 0.1, 0.2), None, 0, 1, False)),
    ],
)
def test_the_numbers_of_a_row(tmp_path: Path, numbers: str, expected: tuple[object, ...]) -> None:
    (section,) = read_sections(tmp_path, f"noise\n1024 256 float {numbers}\n")
    assert section.rows == [Row(2, 1024, 256, "float", *expected)]


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ("sum -1 10 .1 .2 0 9 .3 .4 0 1 2 3", "is incomplete"),  # 11 numbers that are some
        ("sum -1 10 .1 .2 0 9 .3", "is incomplete"),
        ("sum -1 N/A N/A N/A N/A N/A N/A N/A N/A", "has no time"),
        ("sum -1 1.1e18 .1 .2 0", "found the number 1.1e18"),
        ("sum -1 -1.1e18 .1 .2 0", "found the number -1.1e18"),
    ],
)
def test_rows_that_are_none_are_the_problem_of_their_run(tmp_path: Path, numbers: str, says: str) -> None:
    (section,) = read_sections(tmp_path, f"1024 256 float {numbers}\n")
    assert section.rows == []
    assert says in str(section.problem)
    assert section.problem is not None
    assert section.problem.line == 1


def test_a_launch_goes_on_where_a_backslash_ends_its_line(tmp_path: Path) -> None:
    text = "$ mpirun -np 16 \\  \n  -N 8 \\\n  ./all_reduce_perf\n" + OLD_HEAD + OLD_ROWS + TAIL
    (section,) = read_sections(tmp_path, text)
    assert section.launch == "$ mpirun -np 16    -N 8    ./all_reduce_perf\n"
    assert section.ranks[3] == ("beta", "A100-SXM4-40GB")
    (other,) = read_sections(tmp_path, text.replace("A100-SXM4-40GB\n", "A100-SXM4-40GB  \n"))
    assert other.ranks == section.ranks


def test_the_version_said_first_is_that_of_the_run(tmp_path: Path) -> None:
    head = "NCCL version 2.20.5\nNCCL version 2.19.3\n"
    (section,) = read_sections(tmp_path, head + NEW_HEAD.replace("nccl-library=22902", "") + NEW_ROWS + TAIL)
    assert section.version == "2.20.5"
    later = "NCCL version 2.18.1\nNCCL version 2.17.1\n"
    _, second = read_sections(tmp_path, head + OLD_HEAD + OLD_ROWS + TAIL + later + OLD_HEAD + OLD_ROWS + TAIL)
    assert second.version == "2.18.1"


@pytest.mark.parametrize(
    ("config", "env", "says"),
    [
        ({"aggregated_iterations": 3}, [], "3 all-reduces ran in one group"),
        ({"graph": 1}, [], "were replayed from a CUDA graph"),
        ({"warmup_iters": 0}, [], "there was no warm-up"),
        ({"blocking_collectives": "True"}, [], "the host waited for each all-reduce"),
        ({"blocking_collectives": True}, [], "the host waited for each all-reduce"),
        ({}, ["PATH=/bin", "NCCL_ALGO=Tree", "NCCL_PROTO=LL"], "NCCL_ALGO=Tree and NCCL_PROTO=LL was set"),
        ({}, ["PATH=/bin", "MY_NCCL_HOST=1"], None),
        ({"aggregated_iterations": 1, "graph": 0, "warmup_iters": 1, "blocking_collectives": "false"}, [], None),
    ],
)
def test_json_says_how_the_times_were_made(
    tmp_path: Path, config: dict[str, object], env: list[str], says: str | None
) -> None:
    devices = [{"hostname": "alpha", "device_info": "H100"}]
    path = write(tmp_path, document(config={"ngpus": 2, "devices": devices} | config, env=env))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = read_nccl_log(path)
    assert len(caught) == (says is not None)
    assert all(str(says) in str(warning.message) for warning in caught)
    assert (log.num_gpus, log.num_nodes) == (2, 1)


@pytest.mark.parametrize("okay", [False, "false", "False"])
def test_json_whose_results_are_not_okay_is_refused(tmp_path: Path, okay: object) -> None:
    with pytest.raises(FileFormatError, match="results were out of bounds"):
        read_nccl_log(write(tmp_path, document(out_of_bounds={"count": 0, "okay": okay})))
    for fine in (True, "true", "unchecked"):
        assert read_nccl_log(write(tmp_path, document(out_of_bounds={"count": 0, "okay": fine}))).num_gpus == 2
    assert read_nccl_log(write(tmp_path, document(out_of_bounds={}))).num_gpus == 2


def one_result(out_of_place: object, in_place: object) -> str:
    """4 MiB."""
    plain = {"size": 2**22, "count": 2**20}
    return document(results=[plain | {"out_of_place": out_of_place, "in_place": in_place}])


def test_json_has_the_times_out_of_place_and_in_place(tmp_path: Path) -> None:
    slow, fast = ({"time": 2**22 / rate / 1e3, "alg_bw": rate, "bus_bw": rate} for rate in (40.0, 80.0))
    for halves in ((slow, fast), (fast, slow), (slow, None), (None, slow)):
        (row,) = read_nccl_log(write(tmp_path, one_result(*halves))).measurements
        expected = [half and pytest.approx(half["time"] / 1e6) for half in halves]
        assert [row.out_of_place_s, row.in_place_s] == expected
    wrong = [slow | {"nwrong": 3.0}, slow | {"nwrong": 4.0}]
    with pytest.raises(FileFormatError) as caught:
        read_nccl_log(write(tmp_path, one_result(*wrong)))
    assert ": 7 wrong results at 4194304 bytes" in caught.value.message
    with pytest.raises(FileFormatError, match="neither an out-of-place nor an in-place time"):
        read_nccl_log(write(tmp_path, one_result(None, None)))


@pytest.mark.parametrize(
    ("half", "says"),
    [({"cpu_time": 3.0}, "results[0].in_place has CPU time"), ({}, "results[0].in_place has no 'time'")],
)
def test_json_without_the_time_of_the_collective_says_which_it_has(
    tmp_path: Path, half: dict[str, object], says: str
) -> None:
    with pytest.raises(FileFormatError) as caught:
        read_nccl_log(write(tmp_path, one_result(None, half)))
    assert says in caught.value.message


def test_json_of_groups_that_reduce_at_the_same_time_is_refused(tmp_path: Path) -> None:
    devices = [{"rank": i, "group": i // 2, "hostname": "n", "device_info": "H100"} for i in range(4)]
    with pytest.raises(FileFormatError, match="2 groups of GPUs at the same time"):
        read_nccl_log(write(tmp_path, document(config={"devices": devices})))


def test_json_without_a_version_has_none(tmp_path: Path) -> None:
    assert read_nccl_log(write(tmp_path, document(nccl_version=None))).version is None


def test_a_row_that_a_page_broke_may_go_on_with_what_was_not_checked(tmp_path: Path) -> None:
    (section,) = read_sections(
        tmp_path, "1024 256 float sum -1 10 .1 .2 0 9\n .3 .4 N/A\n2048 512 float sum -1 10 .1 .2 0\n"
    )
    assert section.rows == [
        Row(1, 1024, 256, "float", "sum", -1, TEN, NINE, 0, 2, True),
        Row(3, 2048, 512, "float", "sum", -1, TEN, None, 0, 1, False),
    ]
