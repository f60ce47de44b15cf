"""Ranks that have to find each other: one that does not come, dies or stands still is missed soon, in one sentence."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ptsim.errors import UsageError
from ptsim.training import joining
from tests.training.runs import servant


def join_as_rank(rank: int, world_size: int, port: int, folder: Path, fault: str, seconds: str) -> None:
    """Join as this rank, and write what came of it into `folder`; `fault` is what happens to this very process."""
    from ptsim.errors import PtsimError

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PTSIM_JOIN_SECONDS": seconds,
    }

    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP if fault.startswith("stands still") else signal.SIGKILL)

    module: Any = joining
    wait_for_all = joining._wait_for_all

    def wait_until_stopped(me: Any, store: Any, *rest: Any) -> None:
        while store.add(joining._NUM, 0) < 2:  # the other one is there, too
            time.sleep(0.02)
        module.time = SimpleNamespace(monotonic=time.monotonic, sleep=stop)
        wait_for_all(me, store, *rest)

    if fault.endswith("while it waits"):  # it has shown that it lives once
        module._wait_for_all = wait_until_stopped
    if fault == "dies while they connect":
        module.dist.init_process_group = stop
    try:
        joining.join(joining.place(), "gloo")
        told = "joined"
    except PtsimError as error:
        told = error.message
    (folder / f"rank{rank}").write_text(told)


def what_rank_says(rank: int, world_size: int, others: dict[int, str], folder: Path, seconds: str = "60") -> str:
    """What `rank` says within 30 s, beside others to which something happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    faults = {rank: "", **others}
    team = {
        number: servant().Process(target=join_as_rank, args=(number, world_size, port, folder, fault, seconds))
        for number, fault in faults.items()
    }
    for process in team.values():
        process.start()
    try:
        team[rank].join(timeout=60)  # 30 s and the start of the processes
        return (folder / f"rank{rank}").read_text()
    finally:
        for process in team.values():
            process.kill()
            process.join()


def test_ranks_that_are_all_there_join(tmp_path: Path) -> None:
    assert what_rank_says(0, 2, {1: ""}, tmp_path) == "joined"


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    assert re.fullmatch(r"rank 1, 2 of 3 did not come within \d s", what_rank_says(0, 3, {}, tmp_path, seconds="3"))


def test_a_rank_0_that_does_not_come_is_named_with_its_address(tmp_path: Path) -> None:
    told = what_rank_says(1, 2, {}, tmp_path, seconds="2")
    assert re.fullmatch(r"rank 1 has not reached rank 0 at 127\.0\.0\.1:\d+: Connection refused", told)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies while it waits", "stands still while it waits"])
def test_a_rank_that_dies_while_others_are_missing_is_told_from_those_that_still_start(
    tmp_path: Path, fault: str
) -> None:
    told = what_rank_says(0, 3, {1: fault}, tmp_path)
    assert told == "rank 1 died or stood still before the 3 were together"


@pytest.mark.slow
def test_the_others_miss_a_rank_0_that_dies_while_they_wait(tmp_path: Path) -> None:
    told = what_rank_says(1, 3, {0: "dies while it waits"}, tmp_path)
    assert re.match(r"rank 1 (lost contact with rank 0 before the 3 ranks were together|cannot join the 3 ranks)", told)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_while_they_connect_is_missed(tmp_path: Path, lost: int) -> None:
    told = what_rank_says(1 - lost, 2, {lost: "dies while they connect"}, tmp_path)
    missed = ["cannot join the 2 ranks by gloo: ", *["lost contact with rank 0 before the 2 ranks"] * (lost == 0)]
    assert told.startswith(tuple(f"rank {1 - lost} {words}" for words in missed))


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
        joining.join(joining.place(), "gloo")


def test_who_started_slowly_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTSIM_JOIN_SECONDS", raising=False)
    for age, patience in ((1.0, 30.0), (20.0, 100.0), (3600.0, 600.0)):
        monkeypatch.setattr(joining, "_age_s", lambda age=age: age)
        assert joining.patience_s() == patience
