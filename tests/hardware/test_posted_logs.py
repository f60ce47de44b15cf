"""Logs as people post them: without a list of devices, with a second run, with another collective, without an end.

The files in `nccl/` have the form of posted ones; hosts and most numbers are made up, the expected values are read off
the files by eye.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from ptsim.errors import FileFormatError
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.nccl_log import NcclLog, read_nccl_logs, with_nodes
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


def test_a_second_run_whose_header_was_not_copied_is_a_run():
    assert logs("second_run_without_header") == [(8, 1, 6, 4314.97), (16, 2, 6, 12020.46)]
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
        ("mpiexec -n 8 --host a,b,c,d ./build/all_reduce_perf", 4),
        ("srun -N 2 -n 8 ./build/all_reduce_perf", 2),  # Slurm: nodes
        ("srun -N4 ./build/all_reduce_perf", 4),
        ("#SBATCH --nodes=2", 2),
        ("srun --ntasks-per-node=8 ./build/all_reduce_perf", 1),
        ("srun -N 3 ./build/all_reduce_perf", None),  # 8 GPUs are on no 3 equal nodes
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
