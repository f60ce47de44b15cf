"""Ranks that have to find each other: one that does not come, dies or stands still is missed soon, in one sentence."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

import ptsim
from ptsim.errors import UsageError
from ptsim.training import joining, meeting
from tests.training.runs import servant, settings


def join_as(name: str, folder: Path, environment: dict[str, str], run: str, fault: str) -> None:
    """Join as the rank that `environment` describes, and write what came of it into `folder`/`name`.

    `fault` happens to this very process: "dies" or "stands still while it waits" does so once it and another process
    have shown that they live; "dies while they connect"; "dies afterwards" or "works on", once they are together;
    "twice" joins a second time, rank 0 later; "does not wait long" is refused after 1 s in place of 15; "is slow, on an
    older torch" comes to the first collective after more than the ranks may take to connect.
    """
    from ptsim.errors import PtsimError

    os.environ |= environment
    shown = 0

    def sleep(seconds: float) -> None:
        nonlocal shown
        shown += 1
        (folder / f"{name}.shown").write_text(str(shown))
        others = [int(other.read_text() or 0) for other in folder.glob("*.shown")]
        if fault.endswith("while it waits") and len(others) > 1 and min(others) >= 5:
            os.kill(os.getpid(), signal.SIGSTOP if fault.startswith("stands still") else signal.SIGKILL)
        time.sleep(seconds)

    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if fault == "does not wait long":
        meeting.SILENCE_S = 1.0
    meeting.time = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)  # type: ignore[attr-defined] # the stand-in
    if fault == "dies while they connect":
        joining.dist.init_process_group = joining._gloo = stop  # type: ignore[assignment] # the stand-in
    if "older torch" in fault:
        joining.dist.set_timeout = None
        joining._CONNECT_S = 0.5  # 2.5 s for two ranks
    me = joining.place()
    try:
        for again in range(1 + (fault == "twice")):
            time.sleep(again * (1 - me.rank))
            joining.join(me, "gloo", shared={"run folder": f"{run}{again}"})
            time.sleep(4.0 * fault.startswith("is slow"))
            total = torch.ones(1)
            torch.distributed.all_reduce(total)
            (folder / f"{name}.together").touch()
            time.sleep(60 * (fault == "works on"))
            if fault == "dies afterwards":
                stop()
            torch.distributed.destroy_process_group()
        told = f"joined {total.item():g}" + " after a restart" * joining.restarted()
    except PtsimError as error:
        told = error.message
    (folder / name).write_text(told)


class Launches:
    """Ranks as processes of their own, which all look at the same address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.processes: dict[str, Any] = {}

    def start(
        self, rank: int, world_size: int, *, name: str = "", run: str = "a", fault: str = "", **more: str
    ) -> None:
        name = name or f"rank{rank}"
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            meeting.PATIENCE: "60",
        } | more
        arguments = (name, self.folder, environment, run, fault)
        self.processes[name] = servant().Process(target=join_as, args=arguments)
        self.processes[name].start()

    def says(self, name: str) -> str:
        """What that process has written when it has ended, within 60 s."""
        self.processes[name].join(timeout=60)
        return (self.folder / name).read_text()

    def shows(self, name: str, what: str) -> None:
        """Wait until that process has got so far."""
        deadline = time.monotonic() + 60
        while not (self.folder / f"{name}.{what}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def has_died(self, name: str) -> None:
        self.processes[name].join(timeout=60)
        assert self.processes[name].exitcode == -signal.SIGKILL


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Launches]:
    some = Launches(tmp_path)
    yield some
    for process in some.processes.values():
        process.kill()
        process.join()


def test_ranks_that_are_all_there_join_also_one_that_comes_late(launches: Launches) -> None:
    launches.start(0, 3)
    launches.start(1, 3)
    time.sleep(1.0)
    launches.start(2, 3)
    assert [launches.says(f"rank{rank}") for rank in range(3)] == ["joined 3"] * 3


def test_a_rank_that_does_not_come_is_named(launches: Launches) -> None:
    launches.start(0, 3, PTSIM_JOIN_SECONDS="3")
    assert re.fullmatch(r"rank 1, 2 of 3 did not come within \d s", launches.says("rank0"))


def test_a_rank_0_that_does_not_come_is_named_with_its_address(launches: Launches) -> None:
    launches.start(1, 2, PTSIM_JOIN_SECONDS="2")
    told = launches.says("rank1")
    assert told == f"rank 1 has not reached rank 0 at 127.0.0.1:{launches.port}: Connection refused"


def test_what_rank_0_says_when_it_gives_up_is_heard_by_the_others(launches: Launches) -> None:
    launches.start(0, 3, PTSIM_JOIN_SECONDS="4")
    launches.start(1, 3)
    assert re.fullmatch(r"rank 2 of 3 did not come within \d s", launches.says("rank0"))
    assert launches.says("rank1") == launches.says("rank0")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies while it waits", "stands still while it waits"])
def test_a_rank_that_dies_while_others_are_missing_is_told_from_those_that_still_start(
    launches: Launches, fault: str
) -> None:
    launches.start(0, 3)
    launches.start(1, 3, fault=fault)
    assert launches.says("rank0") == "rank 1 died or stood still before the 3 were together"


@pytest.mark.slow
def test_a_rank_that_is_started_again_takes_its_dead_place(launches: Launches) -> None:
    launches.start(0, 3)
    launches.start(1, 3, fault="dies while it waits")
    launches.has_died("rank1")
    launches.start(1, 3, name="again")
    launches.start(2, 3)
    assert [launches.says(name) for name in ("rank0", "again", "rank2")] == ["joined 3"] * 3


@pytest.mark.slow
def test_a_second_process_as_a_rank_that_lives_is_refused_and_the_others_join(launches: Launches) -> None:
    launches.start(0, 3)
    launches.start(1, 3)
    time.sleep(2.0)
    launches.start(1, 3, name="second")
    assert launches.says("second") == "rank 1 is there already, as another process that lives"
    launches.start(2, 3)
    assert [launches.says(f"rank{rank}") for rank in range(3)] == ["joined 3"] * 3


def test_ranks_of_two_launches_at_one_address_refuse_each_other(launches: Launches) -> None:
    launches.start(0, 2, run="a")
    time.sleep(1.0)
    launches.start(1, 2, run="b", name="b1")
    launches.start(0, 2, run="b", name="b0")
    address = f"127.0.0.1:{launches.port}"
    assert launches.says("b1") == (
        f"rank 1 met rank 0 of another launch at {address}: its run folder is a0, here it is b0"
    )
    assert launches.says("b0") == f"another program uses port {launches.port}, where rank 0 waits for the others"
    launches.start(1, 2, run="a")
    assert [launches.says(f"rank{rank}") for rank in range(2)] == ["joined 2"] * 2


@pytest.mark.slow
def test_a_rank_that_comes_after_the_others_have_begun_is_refused(launches: Launches) -> None:
    for rank in range(2):
        launches.start(rank, 2, fault="works on")
    for rank in range(2):
        launches.shows(f"rank{rank}", "together")
    launches.start(1, 2, name="late", fault="does not wait long")
    launches.start(1, 2, name="other", run="b", fault="does not wait long")
    address = f"127.0.0.1:{launches.port}"
    assert launches.says("late") == f"the ranks at {address} have begun already, and rank 1 is one of them"
    assert launches.says("other") == (
        f"rank 1 met another launch at {address}, which has begun already: its run folder is a0, here it is b0"
    )


def test_a_program_that_is_no_rank_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in (RANKS | {"RANK": "1", "MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(joining, "SILENCE_S", 0.5)
        with pytest.raises(UsageError, match=f"another program answers at 127.0.0.1:{port} in the place of rank 0"):
            joining.join(joining.place(), "gloo", shared={})


def test_one_process_may_join_twice(launches: Launches) -> None:
    """Rank 0 comes later the second time: the others must not take its first call for the second."""
    for rank in range(2):
        launches.start(rank, 2, fault="twice")
    assert [launches.says(f"rank{rank}") for rank in range(2)] == ["joined 2"] * 2


def test_ranks_that_torchrun_starts_again_do_not_meet_what_the_dead_ones_left(launches: Launches) -> None:
    """Torchrun's store outlives them, and each of its agents counts only the failures of its own ranks."""
    store = TCPStore("127.0.0.1", launches.port, is_master=True, wait_for_workers=False)
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    launches.start(0, 3, fault="dies afterwards", **torchrun)
    for rank in (1, 2):
        launches.start(rank, 3, fault="dies afterwards", TORCHELASTIC_RESTART_COUNT="0", **torchrun)
    for rank in range(3):
        launches.has_died(f"rank{rank}")
    launches.start(1, 2, TORCHELASTIC_RESTART_COUNT="1", **torchrun)  # two of them are left
    time.sleep(1.0)
    launches.start(0, 2, TORCHELASTIC_RESTART_COUNT="0", **torchrun)
    assert [launches.says(f"rank{rank}") for rank in range(2)] == ["joined 2 after a restart"] * 2
    del store


@pytest.mark.slow
def test_the_others_miss_a_rank_0_that_dies_while_they_wait(launches: Launches) -> None:
    launches.start(1, 3)
    launches.start(0, 3, fault="dies while it waits")
    assert launches.says("rank1").startswith("rank 1 lost contact with rank 0 before the 3 ranks were together: ")


@pytest.mark.slow
def test_ranks_that_are_together_wait_for_a_slow_one_longer_than_for_one_that_connects(launches: Launches) -> None:
    """Torch before `set_timeout` cannot change what gloo waits for."""
    launches.start(0, 2, fault="waits, on an older torch")
    launches.start(1, 2, fault="is slow, on an older torch")
    assert [launches.says(f"rank{rank}") for rank in range(2)] == ["joined 2"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_while_they_connect_is_missed(launches: Launches, lost: int) -> None:
    launches.start(lost, 2, fault="dies while they connect")
    launches.start(1 - lost, 2)
    told = launches.says(f"rank{1 - lost}")
    missed = ["cannot join the 2 ranks by gloo: ", *["lost contact with rank 0 before the 2 ranks"] * (lost == 0)]
    assert told.startswith(tuple(f"rank {1 - lost} {words}" for words in missed))


@pytest.mark.slow
def test_one_script_may_train_twice_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "twice.py"
    few = settings(profile=False, epochs=1)
    script.write_text(
        "import os, time, ptsim\n"
        "for name in ('first', 'second'):\n"
        "    time.sleep(1.0 * (os.environ['RANK'] == '0'))\n"
        f"    ptsim.train({few!r}, out={str(tmp_path)!r} + '/' + name)\n"
    )
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert all(ptsim.read_trace(tmp_path / name).complete for name in ("first", "second"))


RANKS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "2"}, "RANK is 2, expected less than WORLD_SIZE, which is 2"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536, expected at most 65535"),
        ({"PTSIM_JOIN_SECONDS": "soon"}, "PTSIM_JOIN_SECONDS is 'soon', expected seconds"),
        ({"PTSIM_JOIN_SECONDS": "nan"}, "PTSIM_JOIN_SECONDS is 'nan'"),
    ],
)
def test_an_environment_that_contradicts_itself_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], sentence: str
) -> None:
    for name, value in (RANKS | changed).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(sentence)):
        joining.join(joining.place(), "gloo", shared={})


def test_the_more_ranks_the_longer_they_may_take_to_connect() -> None:
    assert [joining.connect_s(world_size) for world_size in (2, 64, 4096)] == [22.0, 84.0, 600.0]


def test_only_the_torchrun_that_started_these_ranks_holds_their_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that a rank of torchrun starts by hand inherit its variables."""
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x", "ROLE_RANK": "0"}
    for name, value in (torchrun | {"ROLE_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    assert joining._torchrun_holds_store(joining.Place())
    assert not joining._torchrun_holds_store(joining.Place(world_size=2))
