"""What the comparison with ASTRA-sim gives it and reads from it; a script stands for the binary."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from analysis.astra_sim import Machine, Result, main, parse, run
from ptsim.export.chakra import Collective, Node
from ptsim.hardware.spec import Cluster, Link

GIB = 2**30
PAIRS = Cluster(
    name="pairs",
    device=None,
    gpus_per_node=2,
    intra=Link(name="bus", bandwidth_bytes_per_s=10 * GIB, latency_s=3e-6),
    inter=Link(name="wire", bandwidth_bytes_per_s=8 * GIB, latency_s=5e-6),
)
NODES = [Node(id=0, name="all_reduce", data_deps=(), collective=Collective.ALL_REDUCE, comm_bytes=4000)]
OUTPUT = """\
[2026-11-28T09:41:02+0000] [I] <workload>: sys[1] finished, 7000 cycles, exposed communication 400 cycles.
[2026-11-28T09:41:02+0000] [I] <statistics>: sys[1], Wall time: 7000
[2026-11-28T09:41:02+0000] [I] <workload>: sys[0] finished, 8000 cycles, exposed communication 1400 cycles.
"""
LOG = """\
[2026-11-28T09:41:02+0000] [D] <workload>: issue,sys->id=0, tick=0, node->id=0, node->name=a, node->type=4
[2026-11-28T09:41:02+0000] [D] <workload>: callback,sys->id=0, tick=10, node->id=0, node->name=a, node->type=4
[2026-11-28T09:41:02+0000] [D] <workload>: callback,sys->id=1, tick=10, node->id=0, node->name=a, node->type=4
[2026-11-28T09:41:02+0000] [D] <workload>: callback,sys->id=1, tick=90, node->id=12, node->name=b, node->type=7
"""


def test_the_slowest_rank_decides_and_every_executed_node_counts_once() -> None:
    assert parse(OUTPUT, LOG + LOG) == Result(step_s=8e-6, exposed_s=1.4e-6, ranks=2, nodes=3)
    assert parse("", "") == Result(step_s=0.0, exposed_s=0.0, ranks=0, nodes=0)


def test_links_are_told_in_binary_gigabytes_and_nanoseconds_of_half_a_switch() -> None:
    files = Machine(PAIRS, 4).files(0.0, 1e12)
    assert files["network"].splitlines() == [
        'topology: ["Switch", "Switch"]',
        "npus_count: [2, 2]",
        "bandwidth: [10.0, 4.0]",  # both GPUs of a node share its wire
        "latency: [1500.0, 2500.0]",
    ]
    system = json.loads(files["system"])
    assert (system["roofline-enabled"], system["local-mem-bw"]) == (0, 1000.0)
    assert system["all-reduce-implementation"] == ["ring", "ring"]
    alone = Machine(PAIRS, 2).files(5e12, 1e12)
    assert "npus_count: [2]" in alone["network"]
    assert (json.loads(alone["system"])["roofline-enabled"], json.loads(alone["system"])["peak-perf"]) == (1, 5.0)


def test_an_all_reduce_by_hand() -> None:
    """Two steps of 2,000 bytes inside, two of 2,000 of a pair's between; 3 accesses to 3/4 of all bytes."""
    inside, between = 2 * (3e-6 + 2000 / (10 * GIB)), 2 * (5e-6 + 2000 / (8 * GIB))
    assert Machine(PAIRS, 4).all_reduce(4000, 1e9).seconds == pytest.approx(inside + between + 9e-6)


@pytest.mark.parametrize("executed", [4, 3])
def test_a_run_in_which_a_node_is_missing_is_refused(executed: int, tmp_path: Path) -> None:
    log = "".join(f"callback,sys->id={rank}, tick=9, node->id=0, \n" for rank in range(executed))
    output = "".join(f"sys[{r}] finished, 9 cycles, exposed communication 9 cycles.\n" for r in range(4))
    binary = tmp_path / "astra"
    binary.write_text(f"#!/bin/sh\nmkdir log\nprintf {shlex.quote(log)} > log/log.log\nprintf {shlex.quote(output)}\n")
    binary.chmod(0o755)
    machine = Machine(PAIRS, 4)
    if executed == 4:
        result = run(binary, tmp_path / "new", machine, NODES, machine.files(0.0, 1e12))
        assert result == Result(step_s=9e-9, exposed_s=9e-9, ranks=4, nodes=4)
        assert {file.name for file in (tmp_path / "new").glob("step.*.et")} == {f"step.{rank}.et" for rank in range(4)}
    else:
        with pytest.raises(SystemExit, match="nodes=3"):
            run(binary, tmp_path / "new", machine, NODES, machine.files(0.0, 1e12))


def test_help_names_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "AstraSim_Analytical_Congestion_Unaware" in capsys.readouterr().out
