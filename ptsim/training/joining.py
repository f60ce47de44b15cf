"""How do the ranks of a run find each other, and how soon is one missed that does not come?

They meet in a store that rank 0 or torchrun holds. Until all are there, each shows again and again that it lives, so
that a rank that has died is told from one that still starts. Then they connect with each other.

    a rank that has come and dies                        missed after `SILENCE_S`
    one that dies while they connect                     after `CONNECT_S`
    one that never comes, without torchrun               after `patience_s`
    one that never comes, under torchrun                 torchrun ends the others; else after `_MOST_S`
"""

from __future__ import annotations

import datetime
import os
import re
import socket
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ptsim.errors import PtsimError, TrainingError, UsageError, on_one_line

SILENCE_S = 15.0
CONNECT_S = 20.0  # on one machine it takes less than a second
PATIENCE = "PTSIM_JOIN_SECONDS"
_TIMES = 5  # as long as this rank needed to start: slow disks and busy machines delay all of them
_LEAST_S, _MOST_S = 30.0, 600.0
_COLLECTIVES = datetime.timedelta(minutes=10)  # what a rank of a group waits for the others
_POLL_S, _LOOK_S, _TELL_S = 0.2, 2.0, 10.0
_OPEN_S = 5.0  # of one of torch's three attempts to open the store, once somebody answers there
_NUM, _FAILED = "come", "failed"
_PORTS = 2**16 - 1


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Which of the ranks this process is, as torchrun's environment variables tell it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place() -> Place:
    """The place of this process; that of a single process where the environment tells of no ranks.

    Raises:
        UsageError: variables that are missing, no numbers, or contradict each other.
    """
    world_size = _number("WORLD_SIZE", least=1, default=1)
    if world_size == 1:
        return Place()
    rank = _number("RANK", least=0)
    if rank >= world_size:
        raise UsageError(
            f"the environment variable RANK is {rank}, expected less than WORLD_SIZE, which is {world_size}"
        )
    return Place(rank=rank, world_size=world_size, local_rank=_number("LOCAL_RANK", least=0, default=0))


def _number(name: str, *, least: int, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    hint = "torchrun sets it for every rank"
    if text is None:
        raise UsageError(f"the environment variable {name} is not set", hint=hint)
    if not text.strip().isdecimal() or len(text) > 9 or int(text) < least:
        raise UsageError(
            f"the environment variable {name} is {text!r}, expected a whole number from {least}", hint=hint
        )
    return int(text)


def join(me: Place, backend: str) -> tuple[Store, Any]:
    """Let torch.distributed have the group of all ranks; the store they met in, and a group for numbers on the CPU.

    Raises:
        UsageError: the environment does not say where rank 0 is.
        TrainingError: another rank does not come or has died; names it.
    """
    try:
        store = _meet(me)
        limit = datetime.timedelta(seconds=CONNECT_S)
        dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.world_size, timeout=limit)
        flags: Any = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=limit)
        for group in (dist.group.WORLD, flags):
            if group is not None:
                _set_timeout(group)
        store.set_timeout(_COLLECTIVES)
    except PtsimError:
        raise
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {me.rank} cannot join the {me.world_size} ranks by {backend}: {cause_of(error)}", hint=_HINT
        ) from error
    return store, flags


def _set_timeout(group: Any) -> None:
    """What collectives may take from now on."""
    set_timeout: Any = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # older torch
    set_timeout(_COLLECTIVES, group)


def patience_s() -> float:
    """How long a rank waits for others that have not come yet.

    Raises:
        UsageError: the variable that sets it holds no such number.
    """
    told = os.environ.get(PATIENCE)
    if told is not None:
        try:
            seconds = float(told)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds <= 86_400:
            raise UsageError(f"the environment variable {PATIENCE} is {told!r}, expected seconds, at most 86400")
        return seconds
    if _torchrun_holds_store():
        return _MOST_S
    return min(max(_LEAST_S, _TIMES * _age_s()), _MOST_S)


def _torchrun_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _age_s() -> float:
    """Since this process began; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def _meet(me: Place) -> Store:
    """The store, once every rank has come to it."""
    patience, begun = patience_s(), time.monotonic()
    host, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", least=1)
    if not host:
        raise UsageError("the environment variable MASTER_ADDR is not set", hint="torchrun sets it for every rank")
    if port > _PORTS:
        raise UsageError(f"the environment variable MASTER_PORT is {port}, expected at most {_PORTS}")
    holds = me.rank == 0 and not _torchrun_holds_store()
    if not holds:
        _reach(me, host, port, begun + patience)
    served: Store = TCPStore(
        host,
        port,
        me.world_size,
        is_master=holds,
        timeout=datetime.timedelta(seconds=_OPEN_S),
        wait_for_workers=False,
        multi_tenant=True,
    )
    served.set_timeout(datetime.timedelta(seconds=CONNECT_S))
    # A torchrun that restarts its ranks keeps its store: without a name of their own, the new ranks would find the
    # addresses of the dead ones (torch 2.15, --standalone).
    store = PrefixStore(f"ptsim/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", served)
    if store.add(f"here/{me.rank}", 1) == 1:  # a rank that was started again takes its old place
        store.add(_NUM, 1)
    try:
        _wait_for_all(me, store, begun, patience)
    except RuntimeError as error:  # the store is gone
        raise TrainingError(
            f"rank {me.rank} lost contact with rank 0 before the {me.world_size} ranks were together: {cause_of(error)}"
        ) from error
    return store


def _reach(me: Place, host: str, port: int, deadline: float) -> None:
    """Wait until somebody answers where rank 0 should be; in small pieces, so that Ctrl-C is heard."""
    while True:
        try:
            socket.create_connection((host, port), timeout=_LOOK_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"rank {me.rank} has not reached rank 0 at {host}:{port}: {error.strerror or error}", hint=_HINT
                ) from error
        time.sleep(_POLL_S)


_HINT = f"start all ranks together, as torchrun and srun do; {PATIENCE}=600 lets them wait for ten minutes"


def _wait_for_all(me: Place, store: Store, begun: float, patience: float) -> None:
    """Show that this rank lives until all have come. Rank 0 watches the others, who watch rank 0."""
    watched = range(me.world_size) if me.rank == 0 else range(1)
    beats: dict[int, tuple[int, float]] = {}
    looked, told = begun, False
    while store.add(_NUM, 0) < me.world_size:
        store.add(_beat(me.rank), 1)
        if store.check([_FAILED]):
            raise TrainingError(store.get(_FAILED).decode(), hint=_HINT)
        now = time.monotonic()
        if now - looked >= _LOOK_S:
            looked = now
            for rank in watched:
                beat = store.add(_beat(rank), 0) if store.check([_beat(rank)]) else 0
                if beat and beat != beats.get(rank, (0, now))[0]:
                    beats[rank] = beat, now
            silent = [rank for rank, (_, heard) in beats.items() if now - heard > SILENCE_S]
            missing = [rank for rank in watched if rank not in beats]
            if silent:
                _give_up(me, store, f"{_ranks(silent)} died or stood still before the {me.world_size} were together")
            if missing and now - begun > patience + (0 if me.rank == 0 else _TELL_S):  # rank 0 speaks first
                _give_up(me, store, f"{_ranks(missing)} of {me.world_size} did not come within {now - begun:.0f} s")
            if missing and me.rank == 0 and not told and now - begun > _TELL_S:
                told = True
                warnings.warn(
                    f"waiting for {_ranks(missing)} of {me.world_size}, at most for {patience:.0f} s", stacklevel=2
                )
        time.sleep(_POLL_S)


def _give_up(me: Place, store: Store, problem: str) -> None:
    """End with this sentence, and the other ranks too."""
    store.set(_FAILED, problem)
    if me.rank == 0:
        time.sleep(5 * _POLL_S)  # it may hold the store that they read it in
    raise TrainingError(problem, hint=_HINT)


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _ranks(numbers: Iterable[int]) -> str:
    listed = list(numbers)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return f"rank {', '.join(map(str, listed[:8]))}{more}"


def cause_of(error: BaseException) -> str:
    """What the error says, without the place in gloo's source that it begins with."""
    return on_one_line(re.sub(r"\A\[\S+\.(cc|cpp|h):\d+\] ", "", str(error))) or type(error).__name__
