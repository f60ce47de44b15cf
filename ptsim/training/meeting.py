"""How do the ranks of one launch come together in a store, each of them alive and none of another launch?

The store belongs to rank 0, or to torchrun, whose store outlives its ranks: what dead ranks left lies in it. So every
attempt has a nonce of its own, and rank 0 alone says who takes part:

    call          what rank 0 says, again and again: the nonce, its launch, later who takes part (`Call`)
    NONCE/RANK    the token of the process that answers as this rank
    TOKEN         how often that process has shown that it lives

A process that answers reads the call at every look: where a new rank 0 has come, it answers again.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from torch._C._distributed_c10d import Store

from ptsim.errors import TrainingError, UsageError

PATIENCE = "PTSIM_JOIN_SECONDS"
SILENCE_S = 15.0
POLL_S, LOOK_S, TELL_S = 0.2, 2.0, 10.0
_TAKE_S = 3.0  # a process that answers shows every `POLL_S` that it lives
_CALL = "call"
HINT = f"start all ranks together, as torchrun and srun do; {PATIENCE}=1200 lets them wait for twenty minutes"
_PORT_HINT = "give every launch a MASTER_PORT of its own, and all of its ranks the same command and folder"


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 says to the others.

    Attributes:
        nonce: the name of this attempt.
        launch: what all ranks of a launch share.
        beat: grows as long as rank 0 waits.
        team: the tokens of the ranks that take part, rank 0 first, once all have come.
        problem: why they do not come together.
    """

    nonce: str
    launch: dict[str, str]
    beat: int = 0
    team: tuple[str, ...] = ()
    problem: str = ""


class Patience:
    """How long one waits for ranks that have not come; says once that it waits."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._begun, self._told = seconds, time.monotonic(), False

    def ends(self, waits_for: str, *, later_s: float = 0.0) -> bool:
        """Whether they are late, by `later_s` more than usual; `waits_for` is what one is told after `TELL_S`."""
        if not self._told and self.waited_s > TELL_S:
            self._told = True
            warnings.warn(f"{waits_for}, at most for {self.seconds:.0f} s", stacklevel=2)
        return self.waited_s > self.seconds + later_s

    @property
    def waited_s(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begun


class _Pulse:
    """Something that changes as long as somebody lives."""

    def __init__(self) -> None:
        self._value: object = None
        self._first = self._last = time.monotonic()
        self.changes = -1  # the first look tells nothing

    def look(self, value: object) -> None:
        if value != self._value:
            self._value, self._last = value, time.monotonic()
            self.changes += 1

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._last

    @property
    def watched_s(self) -> float:
        return time.monotonic() - self._first


def call_the_others(store: Store, world_size: int, launch: Mapping[str, str], patience: Patience) -> str:
    """Rank 0: wait until all others have answered, then say who takes part; the nonce.

    Raises:
        TrainingError: a rank does not come or has died; another process has come as rank 0.
    """
    call = Call(nonce=uuid.uuid4().hex, launch=dict(launch))
    store.set(_CALL, _encoded(call))
    answered: dict[int, _Pulse] = {}
    missing = list(range(1, world_size))
    looked = time.monotonic()
    while True:
        before = missing
        answered |= {rank: _Pulse() for rank in missing if store.check([f"{call.nonce}/{rank}"])}
        missing = [rank for rank in missing if rank not in answered]
        if before and not missing:  # all have come; now each of them shows once more that it lives
            answered = {rank: _Pulse() for rank in answered}
        if not missing or time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            tokens = {rank: store.get(f"{call.nonce}/{rank}").decode() for rank in sorted(answered)}
            for rank, token in tokens.items():
                answered[rank].look(store.add(token, 0))
            if not missing and all(pulse.changes > 0 for pulse in answered.values()):
                _say(store, call, msgspec.structs.replace(call, team=(call.nonce, *tokens.values())))
                return call.nonce
        problem = ""
        silent = [rank for rank, pulse in answered.items() if pulse.silent_s > SILENCE_S]
        if silent:
            problem = f"{_ranks(silent)} died or stood still before the {world_size} were together"
        elif missing and patience.ends(f"rank 0 waits for {_ranks(missing)} of {world_size}"):
            problem = f"{_ranks(missing)} of {world_size} did not come within {patience.waited_s:.0f} s"
        call = _say(store, call, msgspec.structs.replace(call, beat=call.beat + 1, problem=problem))
        if problem:
            time.sleep(5 * POLL_S)  # the store that the others read it in may end with this process
            raise TrainingError(problem, hint=HINT)
        time.sleep(POLL_S)


def _say(store: Store, before: Call, now: Call) -> Call:
    said: Any = store.compare_set(_CALL, _encoded(before), _encoded(now))
    if said != _encoded(now).encode():
        raise TrainingError("another process has come as rank 0 of this launch", hint=_PORT_HINT)
    return now


def _encoded(call: Call) -> str:
    return msgspec.json.encode(call).decode()


def earlier_call(store: Store) -> Call | None:
    """What rank 0 said last in this store."""
    return msgspec.json.decode(store.get(_CALL), type=Call) if store.check([_CALL]) else None


class Answer:
    """A rank other than 0: answers every call of its launch until it takes part."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        launch: Mapping[str, str],
        patience: Patience,
        *,
        address: str,
        waits_for_next: bool,
    ) -> None:
        """`waits_for_next`: a team that is complete without this process may be an earlier one of this launch."""
        self._rank, self._world_size, self._launch, self._patience = rank, world_size, dict(launch), patience
        self._address, self._waits_for_next = address, waits_for_next
        self._token = uuid.uuid4().hex
        self._nonce = ""  # of the last call that came
        self._caller, self._rival, self._complete = _Pulse(), _Pulse(), _Pulse()
        self.given = False  # rank 0 lives and knows of this process

    def until_together(self, store: Store) -> str:
        """The nonce, once rank 0 has said that this process takes part.

        Raises:
            UsageError: rank 0 is of another launch, or another process is there as this rank.
            TrainingError: another rank does not come or has died.
        """
        while True:
            call = earlier_call(store)
            if call is not None and self._takes_part(store, call):
                return call.nonce
            waits_for = f"rank {self._rank} waits for {'other ranks' if self.given else 'rank 0'} of {self._world_size}"
            late = self._patience.ends(waits_for, later_s=TELL_S)  # rank 0 speaks first
            if late and not self.given:  # who has answered waits as long as rank 0 does
                seconds = f"{self._patience.waited_s:.0f} s"
                raise TrainingError(f"rank 0 of {self._world_size} did not come within {seconds}", hint=HINT)
            time.sleep(POLL_S)

    def _takes_part(self, store: Store, call: Call) -> bool:
        if call.nonce != self._nonce:
            self._nonce, self.given = call.nonce, False
            self._caller, self._rival, self._complete = _Pulse(), _Pulse(), _Pulse()
        self._caller.look(call.beat)
        if call.team:
            self.given = False
            if call.team[self._rank :][:1] == (self._token,):
                return True
            self._refuse_complete(call)
        elif call.problem:
            if self.given:
                raise TrainingError(call.problem, hint=HINT)
        elif other := _difference(self._launch, call.launch):
            if self._caller.changes > 0:  # otherwise a rank 0 that has died
                raise UsageError(
                    f"rank {self._rank} met rank 0 of another launch at {self._address}: {other}", hint=_PORT_HINT
                )
        else:
            self._answer(store)
        return False

    def _refuse_complete(self, call: Call) -> None:
        """Do not wait for long where no further call can be expected."""
        if self._waits_for_next or self._complete.watched_s < SILENCE_S:
            return
        problem = f"the ranks at {self._address} have begun already, and rank {self._rank} is one of them"
        if other := _difference(self._launch, call.launch):
            problem = f"rank {self._rank} met another launch at {self._address}, which has begun already: {other}"
        raise UsageError(problem, hint=_PORT_HINT)

    def _answer(self, store: Store) -> None:
        place = f"{self._nonce}/{self._rank}"
        holder = _text(store.compare_set(place, "", self._token))
        if holder == self._token:
            store.add(self._token, 1)
            self.given = self._caller.changes > 0
            if self.given and self._caller.silent_s > SILENCE_S:
                problem = f"rank 0 died or stood still before the {self._world_size} were together"
                raise TrainingError(problem, hint=HINT)
            return
        self._rival.look((holder, store.add(holder, 0)))
        if self._rival.silent_s > _TAKE_S:  # it has died, and this process was started in its place
            store.compare_set(place, holder, self._token)
        elif self._rival.watched_s > 2 * _TAKE_S and self._rival.silent_s < _TAKE_S / 2:
            problem = f"rank {self._rank} is there already, as another process that lives"
            raise UsageError(problem, hint=_PORT_HINT)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first thing in which two launches differ; "" where none does that both know."""
    for name, value in ours.items():
        if theirs.get(name, value) != value:
            return f"its {name} is {theirs[name]}, here it is {value}"
    return ""


def _ranks(numbers: Iterable[int]) -> str:
    listed = list(numbers)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return f"rank {', '.join(map(str, listed[:8]))}{more}"
