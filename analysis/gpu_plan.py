"""What is the GPU campaign predicted to take, and what does half an hour of a lent machine hold of it?

`gpu_campaign.py --plan` calls it; it is no script of its own. Every training and every step is predicted by ptsim from
the data sheet, and the campaign itself is run through with a clock that jumps by these predictions. Where nothing is
predicted a piece takes its part.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_steps
from gpu_parts import Noted, Number
from gpu_runs import BATCH, EPOCHS, IMAGES, INTERVAL, MAX_FILE_BYTES, SHORTEST_TURN_S, Pair, Runs, Turn

import ptsim
from ptsim.costs.datasheet import load_fit
from ptsim.costs.step import step_time
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.spec import Device
from ptsim.network import Precision
from ptsim.setting import StepSetting
from ptsim.sim.run import project

LOAN_S = 30 * 60.0
# Allowances, not measurements: nobody has timed them on such a machine.
START_S = 120.0  # from the asking for a machine until the first call works
BETWEEN_S = 30.0  # of every call: files there and back, wheels, the end of what was interrupted
# Of every turn of a training: imports, 60,000 images to decode, convolutions to tune. `--noted` may know it better.
TURN_S = 20.0

_NUM_LOANS = 3
_VALIDATED = math.ceil(10_000 / BATCH)  # mini-batches after every epoch
# Operators of an iteration that are not the network's, counted by a dispatch mode: 13 for the images, 14 for the sums.
LOOP_OPERATORS = 27


class RunCost(NamedTuple):
    """Seconds of one run, all its epochs; `low` and `high` are factors, the ends of the 90 % interval."""

    epochs: tuple[float, ...]
    waits_s: float
    validation_s: float
    loop_s: float
    low: float
    high: float
    checkpoint_bytes: int
    num_architectures: int = 1

    @property
    def seconds(self) -> float:
        """Of the whole run, but for the beginning of its turns and what comes after its epochs."""
        return math.fsum(self.epochs)


class Allowed(NamedTuple):
    """Seconds that no prediction counts: of a piece's start, of a turn's, of a checkpoint and of a profile."""

    piece_s: float = 0.0  # a turn's allowance is for both
    turn_s: float = TURN_S
    checkpoint_s_per_byte: float = 0.0
    profile_s: float = 0.0

    def after_epoch_s(self, cost: RunCost) -> float:
        """After an epoch, on average: its checkpoint, as large as the first, and a part of the profiles."""
        profiles_s = self.profile_s * (cost.num_architectures - 1)  # the first is of the first turn's start
        return self.checkpoint_s_per_byte * cost.checkpoint_bytes + profiles_s / len(cost.epochs)

    def run_s(self, cost: RunCost, factor: float = 1.0) -> float:
        """A whole run in one turn."""
        return self.turn_s + factor * cost.seconds + len(cost.epochs) * self.after_epoch_s(cost)


ASSUMED = Allowed()


def allowed(noted: Noted, largest_bytes: float) -> tuple[Allowed, list[str]]:
    """What is allowed for, and in words which of it is measured; `largest_bytes` is of the largest checkpoint."""
    start, turn, profile = noted.start(), noted.turn(), noted.profile()
    checkpoint = noted.checkpoint(largest_bytes)
    lines = [
        f"{START_S:.0f} s until a machine has started and {BETWEEN_S:.0f} s around every call: assumed",
        f"the start of a process: {start if start and turn else 'in the next one'}",
        f"the start of every turn of a training: {turn or Number(TURN_S, 'assumed')}",
        f"a checkpoint of {largest_bytes / 1e6:.0f} MB after every epoch: {checkpoint or 'in no number'}",
        f"the layer profile of an architecture: {profile or 'in no number'}",
    ]
    known = Allowed(
        piece_s=start.seconds if start and turn else 0.0,
        turn_s=turn.seconds if turn else TURN_S,
        checkpoint_s_per_byte=checkpoint.seconds / largest_bytes if checkpoint else 0.0,
        profile_s=profile.seconds if profile else 0.0,
    )
    return known, lines


def run_cost(model: str, device: Device, *, pruned: bool) -> RunCost:
    """The run as ptsim predicts it: pruned as the paper's was, or dense.

    A step includes what the GPU waits for its host. A mini-batch of the validation takes a forward pass and, at most,
    all of a step's wait; an operator of the loop what the host needs to update a tensor. Images are on the GPU.
    """
    pruning = f"lym2019/{model}-cifar10" if pruned else "none"
    trace = ptsim.plan(model, images=IMAGES, epochs=EPOCHS, batch=BATCH, interval=INTERVAL, gpus=1, pruning=pruning)
    found = project(trace, load_cluster("dgx-h100"), 1, device=device)  # of one GPU no link counts
    loop_s = LOOP_OPERATORS * load_fit().host.update_s
    changes_s = (found.total_s - math.fsum(epoch.total_s for epoch in found.epochs)) / len(found.epochs)
    validation = [_VALIDATED * (epoch.forward_s + epoch.overhead_s) for epoch in found.epochs]
    loops = [epoch.num_iterations * loop_s for epoch in found.epochs]
    return RunCost(
        epochs=tuple(
            epoch.total_s + changes_s + validated_s + looped_s
            for epoch, validated_s, looped_s in zip(found.epochs, validation, loops, strict=True)
        ),
        waits_s=math.fsum(epoch.num_iterations * epoch.overhead_s for epoch in found.epochs),
        validation_s=math.fsum(validation),
        loop_s=math.fsum(loops),
        low=found.low_s / found.total_s,
        high=found.high_s / found.total_s,
        checkpoint_bytes=2 * trace.networks[trace.epochs[0].architecture].gradient_bytes,  # weights and momentum
        num_architectures=len({epoch.architecture for epoch in trace.epochs}),
    )


def run_costs(pairs: Sequence[Pair], device: Device) -> dict[str, RunCost]:
    """What each run of the pairs takes, by name; seeds differ in nothing that can be predicted."""
    models = dict.fromkeys(pair.model for pair in pairs)
    known = {(model, pruned): run_cost(model, device, pruned=pruned) for model in models for pruned in (False, True)}
    return {name: known[pair.model, ratio > 0] for pair in pairs for name, ratio in pair.runs.items()}


def steps_cost(
    steps: gpu_steps.Steps, wanted: Sequence[gpu_steps.Combination], device: Device, *, power: bool
) -> float:
    """Seconds in the steps that a piece measures."""
    total_s = 0.0
    for name, batch, precision, memory_format in wanted:
        setting = StepSetting(batch=batch, precision=Precision(precision), memory_format=memory_format)
        if setting.precision in device.peak_flops_per_s:  # else its row says so at once
            total_s += gpu_steps.step_seconds(step_time(steps.network(name)[1], device, setting).compute_s, power=power)
    return total_s


def limits_cost(steps: gpu_steps.Steps, device: Device) -> float:
    """Seconds in the steps of `memory.json`, at most."""
    settings = [
        (name, StepSetting(batch=1, precision=Precision(precision), memory_format=memory_format))
        for name, _, precision, memory_format in gpu_steps.LIMITED
    ]
    return math.fsum(
        gpu_steps.limit_seconds(steps.network(name)[1], setting, device)
        for name, setting in settings
        if setting.precision in device.peak_flops_per_s
    )


class PlannedRuns(Runs):
    """Runs that take no time but on the clock: epochs pass as they are predicted."""

    def __init__(self, folder: Path, costs: Mapping[str, RunCost], clock: Clock, end: str, allowed: Allowed) -> None:
        super().__init__(folder, folder, "cuda", tiny=False, cifar=None)
        self._costs, self._clock, self._end, self._allowed = costs, clock, end, allowed
        self._reached: dict[str, int] = dict.fromkeys(costs, 0)  # whole epochs of every run

    def trained(self, name: str) -> bool:
        """The run has all its epochs."""
        return self._reached[name] == EPOCHS

    def epochs(self, name: str) -> int:
        """Whole epochs that the run has."""
        return self._reached[name]

    def begun(self, pairs: Iterable[Pair]) -> bool:
        """One of the runs has an epoch."""
        return any(self._reached[name] for pair in pairs for name in pair.runs)

    def turn(self, turn: Turn, pair: Pair) -> None:
        """Let the clock jump to the end of the turn; an epoch that is not finished is lost."""
        cost = self._costs[turn.name]
        factor = {"low": cost.low, "high": cost.high}.get(self._end, 1.0)
        taken_s, number = self._allowed.turn_s, self._reached[turn.name]
        after_s = self._allowed.after_epoch_s(cost)
        while number < EPOCHS:
            end_s = turn.least_s if number >= turn.epochs else turn.seconds
            epoch_s = factor * cost.epochs[number] + after_s
            if taken_s + epoch_s > end_s:
                taken_s = min(max(taken_s, end_s), turn.seconds)
                break
            taken_s += epoch_s
            number += 1
        self._reached[turn.name] = number
        self._clock.now_s += taken_s

    def keep(self) -> None:
        """There is nothing to keep."""

    def machine_is_given_back(self, pairs: Sequence[Pair]) -> None:
        """Runs whose checkpoints do not fit into the results begin again, unless they are finished."""
        for pair in pairs:
            if not travels(pair, self._costs):
                self._reached |= {name: 0 for name in pair.runs if not self.trained(name)}


def together_s(runs: Sequence[RunCost]) -> float:
    """The least that runs at the same time on one GPU take: the longest one, or what the GPU does for all of them."""
    busy_s = math.fsum(run.seconds - run.waits_s - run.validation_s - run.loop_s for run in runs)
    return max(busy_s, *(run.seconds for run in runs))


def travels(pair: Pair, costs: Mapping[str, RunCost]) -> bool:
    """Whether the checkpoints of both runs fit into `runs.tar`."""
    return sum(costs[name].checkpoint_bytes for name in pair.runs) < MAX_FILE_BYTES


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """What it shows."""
        return self.now_s


class Did(NamedTuple):
    """A piece that had its turn in a call, for so many seconds; how far its runs are then."""

    name: str
    seconds: float
    epochs: dict[str, int]


class Call(NamedTuple):
    """One call of the campaign in the `loan`-th half hour."""

    loan: int
    minutes: float
    did: list[Did]


class Rehearsal:
    """The campaign from an empty folder, call after call, as `work_through` goes through it."""

    def __init__(
        self,
        options: argparse.Namespace,
        make: Callable[..., Any],
        work_through: Callable[..., list[str]],
        allowed: Allowed = ASSUMED,
    ) -> None:
        self._options, self._make, self._work_through, self._allowed = options, make, work_through, allowed

    def calls(self, costs: Mapping[str, RunCost], end: str = "expected", loans: int = _NUM_LOANS) -> list[Call]:
        """The calls of so many half hours, or until nothing is left; every run takes `end` of its interval."""
        found: list[Call] = []
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            runs, measured = PlannedRuns(Path(folder), costs, clock, end, self._allowed), dict[str, float]()
            for loan in range(1, loans + 1):
                left_s = LOAN_S - START_S - BETWEEN_S
                while left_s > SHORTEST_TURN_S:
                    call, spent_s, left = self._call(loan, left_s, runs, measured, clock)
                    if not call.did:
                        break
                    found.append(call)
                    left_s -= spent_s + BETWEEN_S
                    if not left:
                        return found
                runs.machine_is_given_back(self._pairs(folder))
        return found

    def _pairs(self, folder: str) -> Sequence[Pair]:
        pairs: Sequence[Pair] = self._campaign(folder, 1.0).pairs
        return pairs

    def _campaign(self, folder: str | Path, minutes: float, **how: Any) -> Any:
        changed = {"out": Path(folder), "work": None, "minutes": minutes, "device": "cuda"}
        return self._make(argparse.Namespace(**(vars(self._options) | changed)), **how)

    def _call(
        self, loan: int, left_s: float, runs: PlannedRuns, measured: dict[str, float], clock: Clock
    ) -> tuple[Call, float, list[str]]:
        """One call, the seconds that it takes, and the names of the pieces that are left after it."""
        minutes = math.floor(10 * min(self._options.minutes, left_s / 60)) / 10
        campaign = self._campaign(runs.out, minutes, clock=clock, trainings=runs)
        parts = {name: 60 * piece.minutes for name, piece in campaign.pieces.items()}
        campaign.pieces = {
            name: piece
            if piece.pairs
            else piece._replace(done=lambda name=name: measured.get(name, 0.0) > parts[name] - 0.1)
            for name, piece in campaign.pieces.items()
        }
        did: list[Did] = []

        def run(name: str, piece_minutes: float) -> None:
            began_s, end_s = clock(), campaign.deadline_s
            pairs = campaign.pieces[name].pairs
            if pairs:
                campaign.deadline_s = began_s + 60 * piece_minutes
                clock.now_s += self._allowed.piece_s
                runs.train(pairs)
                campaign.deadline_s = end_s
            else:
                clock.now_s += min(60 * piece_minutes, parts[name] - measured.get(name, 0.0))
                measured[name] = measured.get(name, 0.0) + clock() - began_s
            did.append(Did(name, clock() - began_s, {run: runs.epochs(run) for pair in pairs for run in pair.runs}))

        began_s = clock()
        with contextlib.redirect_stdout(io.StringIO()):
            left = self._work_through(campaign, run)
        return Call(loan, minutes, did), clock() - began_s, left
