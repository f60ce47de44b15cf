"""Logs as people post them: without a list of devices, with a second run, with another collective, without an end.

The files in `nccl/` have the form of posted ones; hosts and most numbers are made up, the expected values are read off
the files by eye.
"""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptsim.errors import FileFormatError
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.nccl_log import NcclLog, read_nccl_logs, with_nodes
from ptsim.loglines import unwrapped
from ptsim.measure.collectives import tables_from_logs

FOLDER = Path(__file__).parent / "nccl"


def logs(name: str) -> list[tuple[int, int | None, int, float]]:
    """GPUs, nodes, sizes and the out-of-place microseconds of the largest size."""
    return [
        (log.num_gpus, log.num_nodes, len(log.measurements), round(1e6 * (log.measurements[-1].out_of_place_s or 0), 2))
        for log in read_nccl_logs(FOLDER / f"{name}.txt")
    ]


def test_nodes_come_from_the_line_that_launched_the_run():
    assert logs("no_device_list_2_nodes") == [(8, 2, 6, 53727.09)]
    (log,) = read_nccl_logs(FOLDER / "no_device_list_2_nodes.txt")
    assert log.version == "2.20.5+cuda12.4"


def test_a_second_run_whose_header_was_not_copied_is_a_run():
    assert logs("second_run_without_header") == [(8, 1, 6, 4314.97), (16, 2, 6, 12020.46)]
    with pytest.warns(UserWarning, match="NCCL_ALGO=RING was set"):  # as the line over the second run says
        assert logs("second_run_same_ranks_without_header") == [(16, 2, 6, 12020.46), (16, 2, 6, 22669.62)]


def test_a_sendrecv_that_prints_sum_is_left_out():
    assert logs("all_reduce_then_sendrecv") == [(8, 1, 6, 53727.09)]


def test_complete_rows_need_no_trailer():
    assert logs("complete_rows_no_trailer") == [(8, 1, 6, 4314.97)]


def test_rows_alone_are_taken_with_a_note():
    with pytest.warns(UserWarning, match="has rows only"):
        assert logs("rows_only") == [(8, None, 6, 4314.97)]


def test_nodes_that_nothing_tells_are_asked_for_and_never_taken_for_one():
    (log,) = read_nccl_logs(FOLDER / "a3-high-tcpx-16gpu.txt")
    assert (log.num_gpus, log.num_nodes) == (16, None)
    with pytest.raises(FileFormatError, match="on how many nodes its 16 GPUs were is unknown") as caught:
        tables_from_logs([log])
    assert caught.value.hint is not None
    assert "--nodes N" in caught.value.hint
    assert with_nodes(log, 2).num_nodes == 2
    assert with_nodes(log, gpus_per_node=load_cluster("dgx-h100").gpus_per_node).num_nodes == 2
    with pytest.raises(FileFormatError, match="cannot be on 17 nodes"):
        with_nodes(log, 17)


def test_runs_with_other_settings_are_not_averaged_in_silence():
    with pytest.warns(UserWarning, match="NCCL_ALGO=RING was set"):
        found = read_nccl_logs(FOLDER / "second_run_same_ranks_without_header.txt")
    with pytest.warns(UserWarning, match=r"differ by up to 3\.2 times"):
        tables_from_logs(found)


@pytest.mark.parametrize(
    ("launch", "nodes"),
    [
        ("mpirun -np 8 -N 4 ./build/all_reduce_perf -b 1M", 2),  # Open MPI: ranks on a node
        ("mpirun -np 8 --npernode 2 ./build/all_reduce_perf", 4),
        ("mpirun -np 8 -npernode 8 ./build/all_reduce_perf", 1),
        ("mpirun --map-by ppr:4:node ./build/all_reduce_perf", 2),
        ("mpirun -np 8 -H a:4,b:4 ./build/all_reduce_perf", 2),
        ("mpirun -np 8 -H node[1-2]:4 ./build/all_reduce_perf", None),  # of a list that is not spelt out
        ("mpiexec -n 8 --host a,b,c,d ./build/all_reduce_perf", 4),
        ("srun -N 2 -n 8 ./build/all_reduce_perf", 2),  # Slurm: nodes
        ("srun -N4 ./build/all_reduce_perf", 4),
        ("#SBATCH --nodes=2", 2),
        ("#SBATCH --nodes=4\nmpirun -np 8 ./build/all_reduce_perf", None),  # on any of them
        ("#SBATCH --nodes=4\nmpirun ./build/all_reduce_perf -n 20", 4),  # the test's own -n: iterations
        ("#SBATCH --nodes=4\n#SBATCH --ntasks=8\nmpirun -np 8 ./build/all_reduce_perf", 4),
        ("#SBATCH -N 4 -n 32\nmpirun -n 8 ./build/all_reduce_perf", None),
        ("#SBATCH --nodes=4\n#SBATCH --gpus-per-node=2\nmpirun -np 8 ./build/all_reduce_perf", 4),
        ("#SBATCH --nodes=4\n#SBATCH --gres=gpu:a100:8\nmpirun -np 8 ./build/all_reduce_perf", None),
        ("#SBATCH --nodes=4 -G 8\nmpirun -np 8 ./build/all_reduce_perf", 4),
        ("#SBATCH --nodes=4\nmpirun -np 8 --map-by node ./build/all_reduce_perf", 4),
        ("#SBATCH --nodes=4 --ntasks-per-node=8\nmpirun -np 8 ./build/all_reduce_perf", 1),
        ("salloc -N 4 mpirun -n 8 ./build/all_reduce_perf", None),
        ("salloc -N 4 srun -n 8 ./build/all_reduce_perf", 4),
        ("srun --ntasks-per-node=8 ./build/all_reduce_perf", 1),
        ("mpirun -np 8 -map-by ppr:4:node:PE=6 ./build/all_reduce_perf", 2),
        ("mpirun -np 8 --map-by ppr:4:socket ./build/all_reduce_perf", None),  # on nodes of any number of sockets
        ("mpiexec -n 8 --ppn 4 ./build/all_reduce_perf", 2),
        ("mpiexec -n 8 -perhost 2 ./build/all_reduce_perf", 4),
        ("mpirun -np 8 --hostfile hosts ./build/all_reduce_perf -b 8 -N 4", None),  # the test's own -N: run cycles
        ("srun -N 2 ./build/all_reduce_perf -N 4", 2),
        ("mpirun -np 8 -N 4 all_reduce_perf_mpi -N 2", 2),
        ("srun -N 3 ./build/all_reduce_perf", None),  # 8 GPUs are on no 3 equal nodes
        ("mpirun -np 8 -H a:8,b:8 ./build/all_reduce_perf", 1),  # the first host has room for all
        ("mpirun -np 8 -H a:6,b:6,c:6 ./build/all_reduce_perf", 2),
        ("mpirun -np 8 --map-by node -H a:8,b:8 ./build/all_reduce_perf", 2),
        ("mpirun -np 8 -npernode 4 -H a:8,b:8 ./build/all_reduce_perf", 2),
        ("mpirun -np 8 \\\n -x A=1 -npernode 2 \\\n ./build/all_reduce_perf -N 3", 4),  # one line in three
        ("a:1:2 [0] NCCL INFO comm 0x5 rank 0 nRanks 8 nNodes 2 localRanks 4 localRank 0 MNNVL 0", 2),
        ("a:1:2 [0] NCCL INFO comm 0x5 rank 0 nRanks 8 nNodes 1 localRanks 8 localRank 0 MNNVL 1", None),
        ("measured on our cluster of 4 nodes", None),  # words
        ("2 nodes x 4 GPUs", None),
        ("./build/all_reduce_perf -b 1M -e 1G", None),
    ],
)
def test_launchers_say_nodes_in_their_own_ways(tmp_path, launch, nodes):
    text = (FOLDER / "no_device_list_2_nodes.txt").read_text().splitlines()[1:]
    file = tmp_path / "log.txt"
    file.write_text("\n".join([launch, *text]))
    (log,) = read_nccl_logs(file)
    assert log.num_nodes == nodes


def test_numbers_that_nothing_takes_are_refused(tmp_path):
    text = (FOLDER / "complete_rows_no_trailer.txt").read_text()
    for old, new, sentence in (
        ("1093.74", "1e400", "found the number 1e400"),
        ("1093.74", "1e-320", "expected a positive one"),
        ("1093.74", "0", "expected a positive one"),
        ("4314.97", "9" * 400, "which no time, size or rate has"),
    ):
        file = tmp_path / "log.txt"
        file.write_text(text.replace(old, new))
        with pytest.raises(FileFormatError, match=sentence):
            read_nccl_logs(file)


def test_a_line_of_brackets_takes_no_time(tmp_path):
    rows = (FOLDER / "complete_rows_no_trailer.txt").read_text()
    file = tmp_path / "log.txt"
    file.write_text("[" * 1_000_000 + "\n" + "a" * 1_000_000 + "\n" + rows)
    (log,) = read_nccl_logs(file)  # quadratic patterns would take hours
    assert log.num_gpus == 8


def test_one_process_with_all_gpus_is_one_node(tmp_path):
    text = (FOLDER / "complete_rows_no_trailer.txt").read_text().splitlines()
    file = tmp_path / "log.txt"
    file.write_text("\n".join(line for line in text if "Rank" not in line))  # the header says nGpus 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found: tuple[NcclLog, ...] = read_nccl_logs(file)
    assert [(log.num_gpus, log.num_nodes) for log in found] == [(8, 1)]


TIME = "2026-01-02T03:04:05.678901234Z"


def as_json(**fields: object) -> str:
    return json.dumps(fields)


# What a line becomes in the hands of those who keep it: Docker's and Kubernetes' own files, collectors, launchers,
# terminals, web pages.
WRAPPED: dict[str, Callable[[str], str]] = {
    "docker": lambda line: as_json(log=line + "\n", stream="stdout", time=TIME),
    "docker, in pieces": lambda line: "\n".join(as_json(log=piece) for piece in (line[:30], line[30:] + "\r\n")),
    "cri": lambda line: f"{TIME} stdout F {line}",
    "cri, in pieces": lambda line: f"{TIME} stdout P {line[:40]}\n{TIME} stderr F x\n{TIME} stdout F {line[40:]}",
    "fluent bit": lambda line: as_json(log=line, kubernetes={"pod_name": "nccl-0", "labels": {"app": "nccl"}}),
    "journald": lambda line: as_json(PRIORITY="6", MESSAGE=line, _PID="12"),
    "splunk": lambda line: as_json(preview=False, result={"_raw": line}),
    "docker around open mpi, colours": lambda line: as_json(log=f"[1,0]<stdout>:\x1b[32m{line}\x1b[0m\x1b[K\n"),
    "srun -l and a time": lambda line: f" 0: {TIME} {line}",
    "open mpi 5": lambda line: f"[prterun-node1-4711@1,0]<stdout>: {line}",
    "open mpi, times": lambda line: f"[1,0]<stdout>:Fri Jan  2 03:04:05 2026{line}",
    "kubectl": lambda line: f"[pod/nccl-launcher-x/nccl] {TIME} {line}",
    "compose": lambda line: f"nccl-1  | {line}\r",
    "journal": lambda line: f"Jan 02 03:04:05 node1 nccl[4711]: {line}",
    "pdsh": lambda line: f"node1: {line}",
    "ray": lambda line: f"(RayWorker pid=4711, ip=10.0.0.1) {line}",
    "colours that lost their escape": lambda line: f"[1;32m{line}[0m",
    "a title": lambda line: f"\x1b]0;node1\x07^[[32m{line}^[[0m",
    "a quoted cell": lambda line: f'"{TIME}","{line}"',
    "a notebook": lambda line: f"      {json.dumps(line + chr(10))},",
    "html": lambda line: f"<pre>[1,0]&lt;stdout&gt;:{line}</pre><br>",
}


@pytest.mark.parametrize("form", WRAPPED)
def test_what_keeps_a_log_does_not_change_it(form: str, tmp_path: Path) -> None:
    lines = (FOLDER / "complete_rows_no_trailer.txt").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "kept.log"
    path.write_text("".join(WRAPPED[form](line) + "\n" for line in lines), encoding="utf-8")
    (kept,), (own,) = read_nccl_logs(path), read_nccl_logs(FOLDER / "complete_rows_no_trailer.txt")
    assert kept.measurements == own.measurements
    assert (kept.num_gpus, kept.num_nodes, kept.gpus, kept.version) == (8, 1, own.gpus, own.version)


def test_a_list_of_entries_is_read_newest_first_too(tmp_path: Path) -> None:
    lines = (FOLDER / "complete_rows_no_trailer.txt").read_text(encoding="utf-8").splitlines()
    entries = [{"textPayload": line, "timestamp": f"2026-01-02T03:04:{i:02}Z"} for i, line in enumerate(lines)]
    for number, document in enumerate([entries[::-1], {"events": entries, "nextToken": "b/1"}]):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        assert [len(log.measurements) for log in read_nccl_logs(path)] == [6]


def test_a_fault_in_a_kept_log_has_the_line_of_its_file(tmp_path: Path) -> None:
    text = (FOLDER / "complete_rows_no_trailer.txt").read_text(encoding="utf-8").splitlines()
    cut = next(i for i, line in enumerate(text) if line.split()[:1] == ["16777216"])
    text[cut] = text[cut][:70]
    path = tmp_path / "kept.log"
    path.write_text("".join(as_json(log=line + "\n") + "\n" for line in text), encoding="utf-8")
    with pytest.raises(FileFormatError, match="row of 16777216 bytes is incomplete") as caught:
        read_nccl_logs(path)
    assert caught.value.line == cut + 1


def test_a_packed_log_is_read_to_its_end(tmp_path: Path) -> None:
    """Parts that were packed one by one and put together; a part that lacks its end."""
    content = (FOLDER / "complete_rows_no_trailer.txt").read_bytes()
    path = tmp_path / "run.log.gz"
    path.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    (own,) = read_nccl_logs(FOLDER / "complete_rows_no_trailer.txt")
    assert [log.measurements for log in read_nccl_logs(path)] == [own.measurements]
    path.write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(FileFormatError, match="broken gzip file"):
        read_nccl_logs(path)


@pytest.mark.parametrize(("busbw", "gpus"), [(198.44, 128), (199.80, None), (175.00, None)])
def test_the_last_rank_of_a_list_tells_how_many_there_are_unless_the_rates_contradict(tmp_path, busbw, gpus):
    """2 · 127 / 128 · 100 GB/s are 198.44; 1,024 and 8 GPUs have 199.80 and 175.00."""
    file = tmp_path / "log.txt"
    rank = "#  Rank 127 Group  0 Pid    137 on instance7 device  3 [0019:06:00] NVIDIA GB200\n"
    row = f"1073741824 268435456 float sum -1 10737.4 100.00 {busbw:.2f} 0\n"
    file.write_text(f"{rank}{row}# Out of bounds values : 0 OK\n")
    if gpus is None:
        with pytest.raises(FileFormatError, match="lists 1 ranks but numbers them up to 127"):
            read_nccl_logs(file)
        return
    (log,) = read_nccl_logs(file)
    assert (log.num_gpus, log.num_nodes, log.gpus) == (gpus, None, ("NVIDIA GB200",))


# The form of a guide (awslabs/awsome-distributed-training): tables of two runs without anything but their columns.
COLUMNS = "#  size  count  type  redop  root  time  algbw  busbw  #wrong  time  algbw  busbw  #wrong\n"


def table(
    gpus: int, seconds: float, columns: str = COLUMNS, root: str = "-1", wrong: str = "0", kind: str = "float"
) -> str:
    """64 and 128 MiB, whose bus bandwidth is 2 (n-1) / n times size / time."""
    lines = [columns]
    for size, time in ((2**26, seconds), (2**27, 2 * seconds)):
        half = f"{1e6 * time:.1f} {size / time / 1e9:.2f} {2 * (gpus - 1) / gpus * size / time / 1e9:.2f} {wrong}"
        count = size // {"float": 4, "half": 2}[kind]
        lines.append(f"{size} {count} {kind} sum {root} {half} {half}\n")
    return "".join(lines)


def posted(folder: Path, text: str) -> Path:
    path = folder / "posted.log"
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_above_rows_begin_a_run_of_its_own_number_of_gpus(tmp_path: Path) -> None:
    text = f"```txt\n{table(8, 1e-3)}```\nThen:\n\n```txt\n{table(16, 2e-3)}```\n"
    with pytest.warns(UserWarning, match="has rows only"):
        found = read_nccl_logs(posted(tmp_path, text))
    assert [(log.num_gpus, log.measurements[0].out_of_place_s) for log in found] == [
        (8, pytest.approx(1e-3)),
        (16, pytest.approx(2e-3)),
    ]


def test_rows_that_begin_again_with_other_gpus_are_no_cycle(tmp_path: Path) -> None:
    path = posted(tmp_path, table(8, 1e-3) + table(16, 2e-3, columns=""))
    with (
        pytest.warns(UserWarning, match="has rows only"),
        pytest.raises(FileFormatError, match="of another number of GPUs than 8") as caught,
    ):
        read_nccl_logs(path)
    assert (caught.value.line, str(caught.value.hint)) == (
        4,
        "keep the lines with the names of the columns above each run's rows",
    )


@pytest.mark.parametrize(
    ("launch", "nodes"),
    [
        ("srun -N 2 ./x", [2, None]),  # 16 GPUs are not on as many nodes as 8
        ("mpirun -np 8 -H a:4,b:4 ./x", [2, None]),
        ("mpirun -np 8 -npernode 4 ./x", [2, 4]),  # but as many are on each
    ],
)
def test_a_line_that_launched_a_run_on_other_gpus_tells_no_nodes(
    tmp_path: Path, launch: str, nodes: list[int | None]
) -> None:
    end = "# Out of bounds values : 0 OK\n"
    text = f"{launch}\n{table(8, 1e-3)}{end}{table(16, 2e-3)}{end}"
    assert [log.num_nodes for log in read_nccl_logs(posted(tmp_path, text))] == nodes


@pytest.mark.parametrize(
    "first", ["{'NUM_GPUS': 16, 'NPER_NODE': 8}", '{"level": "info", "step": 1}', "{ echo start; }"]
)
def test_a_brace_in_front_of_a_table_makes_no_json_of_it(tmp_path: Path, first: str) -> None:
    """The first is the form of cybertronai/aws-network-benchmarks, where a script prints its settings."""
    end = "# Out of bounds values : 0 OK\n{}\n"
    (log,) = read_nccl_logs(posted(tmp_path, f"{first}\nmpirun -n 16 -N 8 ./all_reduce_perf\n{table(16, 2e-3)}{end}"))
    assert (log.num_gpus, log.num_nodes, len(log.measurements)) == (16, 2, 2)


@pytest.mark.parametrize(("root", "wrong"), [("-1", "17"), ("-1", "2e+01"), ("", "17")])
def test_wrong_results_are_counted_with_and_without_a_root(tmp_path: Path, root: str, wrong: str) -> None:
    path = posted(tmp_path, table(8, 1e-3, root=root, wrong=wrong) + "# Out of bounds values : 0 OK\n")
    with pytest.raises(FileFormatError, match=f"{2 * float(wrong):g} wrong results at 67108864 bytes"):
        read_nccl_logs(path)


def test_a_rounding_error_of_the_old_format_is_no_count(tmp_path: Path) -> None:
    path = posted(tmp_path, table(8, 1e-3, root="", wrong="1e+00") + "# Out of bounds values : 0 OK\n")
    assert [log.num_gpus for log in read_nccl_logs(path)] == [8]


def test_a_run_of_another_data_type_is_no_repetition(tmp_path: Path) -> None:
    """As a script that runs one type after the other keeps them; alone, each counts."""
    end = "# Out of bounds values : 0 OK\n"
    head = "mpirun -np 8 -npernode 8 ./x\n"
    path = posted(tmp_path, f"{head}{table(8, 3e-3, kind='half')}{end}{head}{table(8, 1e-3)}{end}")
    found = read_nccl_logs(path)
    assert [log.kind for log in found] == [("half", "sum"), ("float", "sum")]
    with pytest.warns(UserWarning, match="8 GPUs that reduced half sum are left out beside those of float sum"):
        (both,) = tables_from_logs(found)
    assert both.seconds == pytest.approx((1e-3, 2e-3))
    (alone,) = tables_from_logs(found[:1])
    assert alone.seconds == pytest.approx((3e-3, 6e-3))


def broken(row: str, at: int) -> str:
    """The row as a page has it that breaks lines."""
    return f"{row[:at]}\n{row[at:].lstrip()}\n"


@pytest.mark.parametrize("before", ["", ":mark:`"])
@pytest.mark.parametrize("word", [4, 5, 6, 8, 9, 12])
def test_a_row_that_a_page_broke_is_one_row(tmp_path: Path, word: int, before: str) -> None:
    """The form of ROCm's guide, whose marks are reStructuredText's; `word` words are in the first line."""
    (_, *rows), after = table(8, 1e-3).splitlines(), "`" if before else ""
    cut = [broken(before + row + after, len(before) + len(" ".join(row.split()[:word]))) for row in rows]
    (log,) = read_nccl_logs(posted(tmp_path, f"{COLUMNS}{''.join(cut)}# Out of bounds values : 0 OK\n"))
    assert log.num_gpus == 8
    assert [(m.out_of_place_s, m.in_place_s) for m in log.measurements] == [(1e-3, 1e-3), (2e-3, 2e-3)]


def test_numbers_that_make_no_whole_row_are_not_put_to_one(tmp_path: Path) -> None:
    columns, first, second = table(8, 1e-3).splitlines()
    text = f"{columns}\n{first}\n0\n{' '.join(second.split()[:8])}\n0 2.00\n# Out of bounds values : 0 OK\n"
    with pytest.raises(
        FileFormatError, match="row of 134217728 bytes is incomplete: it has no in-place time"
    ) as caught:
        read_nccl_logs(posted(tmp_path, text))
    assert caught.value.line == 4


def test_a_row_whose_size_is_not_that_of_its_elements_is_damaged(tmp_path: Path) -> None:
    """As where a paste begins in the middle of a number."""
    rows = table(8, 1e-3, columns="")[2:]  # 108864 bytes of 16,777,216 elements
    with pytest.raises(FileFormatError, match="108864 bytes are not those of 16777216 elements of float"):
        read_nccl_logs(posted(tmp_path, f"{rows}# Out of bounds values : 0 OK\n"))


@pytest.mark.parametrize(("node", "read"), [("b", False), ("a", True)])
def test_a_rank_has_one_place(tmp_path: Path, node: str, read: bool) -> None:
    ranks = [f"#  Rank {i:2} Group  0 Pid     10 on  a device {i:2} [0000:{i:02}:00] NVIDIA H100\n" for i in range(8)]
    again = ranks[3].replace("on  a", f"on  {node}")
    path = posted(tmp_path, f"{''.join(ranks)}{again}{table(8, 1e-3)}# Out of bounds values : 0 OK\n")
    if read:
        assert [(log.num_gpus, log.num_nodes) for log in read_nccl_logs(path)] == [(8, 1)]
        return
    with pytest.raises(FileFormatError, match="rank 3 is listed twice: the output of several runs is mixed") as caught:
        read_nccl_logs(path)
    assert caught.value.line == 9


def test_a_list_that_lacks_its_last_node_is_noticed_by_the_second_digit(tmp_path: Path) -> None:
    """128 GPUs, of which 120 are listed: 2 · 127 / 128 = 1.984 and 2 · 119 / 120 = 1.983 times 85.00 GB/s."""
    ranks = [
        f"#  Rank {i:2} Group  0 Pid     10 on  n{i // 8} device {i % 8:2} [0x{i % 8:02}] A100\n" for i in range(128)
    ]
    row = "85000000 21250000 float sum -1 1000.0 85.00 168.67 0 1000.0 85.00 168.67 0\n"
    (log,) = read_nccl_logs(posted(tmp_path, "".join(ranks) + row + "# Out of bounds values : 0 OK\n"))
    assert (log.num_gpus, log.num_nodes) == (128, 16)
    with pytest.raises(FileFormatError, match="lists 120 of its ranks"):
        read_nccl_logs(posted(tmp_path, "".join(ranks[:120]) + row + "# Out of bounds values : 0 OK\n"))
    rounded = row.replace("85.00 168.67", "85.0 168.7")
    (log,) = read_nccl_logs(posted(tmp_path, "".join(ranks) + rounded + "# Out of bounds values : 0 OK\n"))
    assert (log.num_gpus, log.num_nodes) == (128, 16)


def test_a_bandwidth_that_was_cut_in_the_middle_tells_no_number_of_gpus(tmp_path: Path) -> None:
    """As where the paste or the file ends: 8 GPUs have 174.86 GB/s beside 99.92."""
    row = "134217728 33554432 float sum -1 1343.3 99.92 {}\n# Out of bounds values : 0 OK\n"
    (log,) = read_nccl_logs(posted(tmp_path, row.format("174.86")))
    assert log.num_gpus == 8
    for cut in ("174.", "170.1", "174.5"):
        with pytest.raises(FileFormatError, match="times the algorithm bandwidth, which no all-reduce has"):
            read_nccl_logs(posted(tmp_path, row.format(cut)))


def test_a_notebook_that_holds_a_log_is_read(tmp_path: Path) -> None:
    lines = (FOLDER / "complete_rows_no_trailer.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    output = {"name": "stdout", "output_type": "stream", "text": lines}
    cells = [{"cell_type": "code", "source": ["!./build/all_reduce_perf -g 8"], "outputs": [output]}]
    path = tmp_path / "nccl.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}, indent=1), encoding="utf-8")
    (own,) = read_nccl_logs(FOLDER / "complete_rows_no_trailer.txt")
    (log,) = read_nccl_logs(path)
    assert (log.measurements, log.num_gpus, log.num_nodes, log.gpus) == (own.measurements, 8, 1, own.gpus)


@pytest.mark.parametrize("form", [form for form in WRAPPED if "pieces" not in form])
def test_a_message_may_cut_a_row_behind_any_prefix(form: str, tmp_path: Path) -> None:
    columns, *rows = table(8, 1e-3).splitlines()
    lines, message = [columns], "node-1:4711:4722 [3] NCCL INFO Launch mode Parallel"
    for row, words in zip(rows, (6, 9), strict=True):
        lines += [f"  {' '.join(row.split()[:words])}  {message}", f"  {' '.join(row.split()[words:])}"]
    lines.append("# Out of bounds values : 0 OK")
    (log,) = read_nccl_logs(posted(tmp_path, "".join(WRAPPED[form](line) + "\n" for line in lines)))
    assert log.num_gpus == 8
    assert [(m.out_of_place_s, m.in_place_s) for m in log.measurements] == [(1e-3, 1e-3), (2e-3, 2e-3)]


def nested(levels: int) -> dict[str, Any]:
    """A line inside so many objects."""
    return {"log": "x"} if levels == 0 else {"record": nested(levels - 1)}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        # Docker's pieces: one without a newline goes on in the next, and leaves an empty line in its place.
        ([{"log": "a"}, {"log": "b\n"}, {"log": "c\r\n"}, {"log": "d"}], ["", "ab", "c", "", "d"]),
        # Kubernetes' pieces, of two streams; what has no end comes last.
        (
            [
                f"{TIME} stdout P a",
                f"{TIME} stdout P",
                f"{TIME} stderr F e",
                f"{TIME} stdout F b",
                f"{TIME} stdout F",
                f"{TIME} stderr P f",
            ],
            ["", "", "e", "ab", "", "", "f"],
        ),
        (["a", {"log": "b\n"}, "{c}"], ["a", "b", "{c}"]),  # a launcher's own lines between a container's
        ([nested(4)], ["x"]),
        ([nested(5)], [as_json(**nested(5))]),
        (["a \\n", 'b\\n"', "c\t|"], ["a", "b", "c"]),  # a notebook's cell, a quoted one, a table's
        (["<td>b</td>"], ["b"]),
        (["a &amp; b"], ["a & b"]),
        (["12"], ["12"]),  # JSON, too
        (["&lt;a&gt; <td class='x'>b</td>", "<stdout rank='0'>c</stdout>"], ["<a> b", "c"]),
    ],
)
def test_what_was_wrapped_around_lines_is_taken_off(text: list[object], lines: list[str]) -> None:
    given = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in text)
    assert unwrapped(given).split("\n") == lines


FIELDS = ["log", "message", "msg", "textPayload", "_raw", "line", "body", "content", "text"]
TIMES = ["timestamp", "time", "@timestamp", "ts", "date", "__REALTIME_TIMESTAMP"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("time", TIMES)
def test_entries_have_line_and_time_in_one_of_several_fields(field: str, time: str) -> None:
    entries = [{field: line, time: str(number)} for number, line in enumerate("abc", start=1)]
    assert unwrapped(json.dumps(entries)) == unwrapped(json.dumps(entries[::-1])) == "a\nb\nc"
    assert unwrapped(json.dumps(entries[:1])) == "a"
    same = [{field: line, time: "1"} for line in "abc"]
    assert unwrapped(json.dumps(same)) == unwrapped(json.dumps([{field: line} for line in "abc"])) == "a\nb\nc"
