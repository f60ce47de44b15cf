"""How do the ranks of a run find each other, and how soon is one missed that does not come?

They meet in a store that rank 0 or torchrun holds (`meeting`), then they connect with each other.

    a rank that has come and dies, or stands still       missed after `meeting.SILENCE_S`
    one that dies while they connect                     after `connect_s`
    one that never comes                                 after `patience_s`
    one of another launch, or a second one               refused, within `meeting.SILENCE_S`
"""

from __future__ import annotations

import datetime
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ptsim.errors import PtsimError, TrainingError, UsageError, on_one_line
from ptsim.training.meeting import (
    HINT,
    LOOK_S,
    PATIENCE,
    POLL_S,
    SILENCE_S,
    Answer,
    Patience,
    call_the_others,
    earlier_call,
)

_PATIENCE_S = 600.0  # what torch.distributed lets NCCL wait; containers of a node may start minutes late
_COLLECTIVES_S = 600.0  # what a rank of a group waits for the others
_CONNECT_S = 20.0  # two ranks on one machine take less than a second
_PORTS = 2**16 - 1


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Which of the ranks this process is, as torchrun's environment variables tell it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


class _Past:
    """What this process has met before."""

    joined = False
    restarted = False
    held: Store | None = None  # rank 0's: the others may still look there when its first run has ended


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


def connect_s(world_size: int) -> float:
    """What the ranks may take to connect, in seconds.

    A second more for every rank: gloo connects each of them with all others, one after the other. Never more than
    collectives may take.
    """
    return min(_CONNECT_S + world_size, _COLLECTIVES_S)


def join(me: Place, backend: str, *, shared: Mapping[str, str]) -> tuple[Store, Any]:
    """Let torch.distributed have the group of all ranks; the store they met in, and a group for numbers on the CPU.

    Args:
        me: which rank this process is.
        backend: of torch.distributed.
        shared: what the ranks have come for; who has come for something else is of another launch.

    Raises:
        UsageError: the environment does not say where rank 0 is, another program or launch is there, or another
            process is there as this rank.
        TrainingError: another rank does not come or has died; names it.
    """
    try:
        store = _meet(me, shared)
        flags = _connect(me, backend, store)
    except PtsimError:
        raise
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {me.rank} cannot join the {me.world_size} ranks by {backend}: {cause_of(error)}", hint=HINT
        ) from error
    return store, flags


def _connect(me: Place, backend: str, store: Store) -> Any:
    """Connect the ranks that have met, within `connect_s`; afterwards they wait for each other as collectives do.

    The group for numbers on the CPU. Where torch has no `set_timeout`, gloo keeps the limit that a group was made with
    (torch 2.8, whose `_set_pg_timeout` reaches NCCL alone): there a first group, which is forgotten, proves that all of
    them connect.
    """
    soon, later = (datetime.timedelta(seconds=seconds) for seconds in (connect_s(me.world_size), _COLLECTIVES_S))
    set_timeout: Any = getattr(dist, "set_timeout", None)
    store.set_timeout(soon)
    proof = None if set_timeout else _gloo(PrefixStore("proof", store), me, soon)
    made_with = soon if set_timeout else later
    dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.world_size, timeout=made_with)
    flags: Any = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=made_with)
    del proof  # all ranks have left its making: they are in the groups made after it
    for group in (dist.group.WORLD, flags):
        if set_timeout and group is not None:
            set_timeout(later, group)
    store.set_timeout(later)
    return flags


def _gloo(store: Store, me: Place, limit: datetime.timedelta) -> object:
    """A group of all ranks that torch.distributed does not know; torch may have been built without gloo."""
    made: object = dist.ProcessGroupGloo(store, me.rank, me.world_size, limit)
    return made


def patience_s() -> float:
    """How long a rank waits for others that have not come yet.

    Raises:
        UsageError: the variable that sets it holds no such number.
    """
    told = os.environ.get(PATIENCE)
    if told is None:
        return _PATIENCE_S
    try:
        seconds = float(told)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86_400:
        raise UsageError(f"the environment variable {PATIENCE} is {told!r}, expected seconds, at most 86400")
    return seconds


def restarted() -> bool:
    """Torchrun has started these ranks again, after a failure or because a node has come or gone.

    Each of its agents counts the failures on its own node alone; that they have met before stands in its store.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0") or _Past.restarted


def _torchrun_holds_store(me: Place) -> bool:
    """Whether torchrun has started these very ranks and holds their store; its variables reach what they start, too."""
    ours = {"ROLE_RANK": str(me.rank), "ROLE_WORLD_SIZE": str(me.world_size)}
    same = all(os.environ.get(name, value) == value for name, value in ours.items())
    return same and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "TORCHELASTIC_RUN_ID" in os.environ


def _launch(me: Place, *, elastic: bool) -> dict[str, str]:
    """What all ranks of a launch share. Not the step of a SLURM job: scripts start each node's ranks by a step."""
    facts = {name: os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")}
    facts["user id"] = str(os.getuid())
    if not elastic:  # there, another number of ranks is an earlier attempt
        facts["WORLD_SIZE"] = str(me.world_size)
    return {name: value for name, value in facts.items() if value}


def _meet(me: Place, shared: Mapping[str, str]) -> Store:
    """The store, once every rank has come to it."""
    patience = Patience(patience_s())
    host, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", least=1)
    if not host:
        raise UsageError("the environment variable MASTER_ADDR is not set", hint="torchrun sets it for every rank")
    if port > _PORTS:
        raise UsageError(f"the environment variable MASTER_PORT is {port}, expected at most {_PORTS}")
    elastic = _torchrun_holds_store(me)
    launch = _launch(me, elastic=elastic) | dict(shared)
    answer = Answer(
        me.rank,
        me.world_size,
        launch,
        patience,
        address=f"{host}:{port}",
        waits_for_next=elastic or _Past.joined,
    )
    while True:
        if me.rank or elastic:
            _reach(me, host, port, patience)
        try:
            served = _open(host, port, me.world_size, holds=not (me.rank or elastic))
            store: Store = PrefixStore("ptsim", served)
            if me.rank:
                nonce = answer.until_together(store)
                break
            if not elastic:
                _Past.held = served
            elif not _Past.joined:
                _Past.restarted = earlier_call(store) is not None
            nonce = call_the_others(store, me.world_size, launch, patience)
            break
        except RuntimeError as error:  # the store is gone: perhaps an earlier run's, and this one's comes
            if me.rank == 0 or answer.given or patience.ends(f"rank {me.rank} waits for rank 0"):
                problem = f"rank {me.rank} lost contact with rank 0 before the {me.world_size} ranks were together"
                raise TrainingError(f"{problem}: {cause_of(error)}") from error
    _Past.joined = True
    return PrefixStore(nonce, store)


def _open(host: str, port: int, world_size: int, *, holds: bool) -> Store:
    """Rank 0's store, or the way to it.

    torch waits without end for an answer of a program that is no store, so a thread of its own opens it.
    """
    opened: list[Store | RuntimeError] = []

    def attempt() -> None:
        limit = datetime.timedelta(seconds=SILENCE_S)
        try:
            opened.append(
                TCPStore(host, port, world_size, holds, timeout=limit, wait_for_workers=False, multi_tenant=True)
            )
        except RuntimeError as error:
            opened.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SILENCE_S)
    if not opened:
        problem = f"another program answers at {host}:{port} in the place of rank 0"
        raise UsageError(problem, hint="set MASTER_PORT to another port")
    (store,) = opened
    if isinstance(store, RuntimeError):
        if holds and "EADDRINUSE" in str(store):
            problem = f"another program uses port {port}, where rank 0 waits for the others"
            raise UsageError(problem, hint="set MASTER_PORT to another port") from store
        raise store
    return store


def _reach(me: Place, host: str, port: int, patience: Patience) -> None:
    """Wait until somebody answers where rank 0 should be; in small pieces, so that Ctrl-C is heard."""
    while True:
        try:
            socket.create_connection((host, port), timeout=LOOK_S).close()
            return
        except OSError as error:
            if patience.ends(f"rank {me.rank} waits for rank 0 at {host}:{port}"):
                problem = f"rank {me.rank} has not reached rank 0 at {host}:{port}: {error.strerror or error}"
                raise TrainingError(problem, hint=HINT) from error
        time.sleep(POLL_S)


def cause_of(error: BaseException) -> str:
    """What the error says, without the place in gloo's source that it begins with."""
    return on_one_line(re.sub(r"\A\[\S+\.(cc|cpp|h):\d+\] ", "", str(error))) or type(error).__name__
