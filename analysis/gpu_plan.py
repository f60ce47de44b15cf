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
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_steps
from gpu_runs import BATCH, EPOCHS, IMAGES, INTERVAL, MAX_FILE_BYTES, SHORTEST_TURN_S, Pair, Runs, Turn

import ptsim
from ptsim.costs.datasheet import load_fit
from ptsim.costs.step import step_time
from ptsim.hardware.catalog import load_cluster, load_device
from ptsim.hardware.spec import Device
from ptsim.network import Precision
from ptsim.setting import StepSetting
from ptsim.sim.run import project

LOAN_S = 30 * 60.0
# Allowances, not measurements: nobody has timed them on such a machine.
START_S = 120.0  # from the asking for a machine until the first call works
BETWEEN_S = 30.0  # of every call: files there and back, wheels, the end of what was interrupted
TURN_S = 20.0  # of every turn of a training: imports, 60,000 images to decode, convolutions to tune

_LOANS = ("First", "Second", "Third")
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

    @property
    def seconds(self) -> float:
        """Of the whole run, but for the beginning of its turns and its checkpoints."""
        return math.fsum(self.epochs)


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

    def __init__(self, folder: Path, costs: Mapping[str, RunCost], clock: Clock, end: str) -> None:
        super().__init__(folder, folder, "cuda", tiny=False, cifar=None)
        self._costs, self._clock, self._end = costs, clock, end
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
        left_s, number = turn.seconds - TURN_S, self._reached[turn.name]
        last = min(turn.epochs, EPOCHS)
        while number < last and factor * cost.epochs[number] <= left_s:
            left_s -= factor * cost.epochs[number]
            number += 1
        self._reached[turn.name] = number
        self._clock.now_s += turn.seconds - (left_s if number == last else 0.0)

    def keep(self, running: Iterable[str] = ()) -> None:
        """There is nothing to keep."""

    def machine_is_given_back(self, pairs: Sequence[Pair]) -> None:
        """Runs whose checkpoints do not fit into the results begin again, unless they are finished."""
        for pair in pairs:
            if not travels(pair, self._costs):
                self._reached |= {name: 0 for name in pair.runs if not self.trained(name)}


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
        self, options: argparse.Namespace, make: Callable[..., Any], work_through: Callable[..., list[str]]
    ) -> None:
        self._options, self._make, self._work_through = options, make, work_through

    def calls(self, costs: Mapping[str, RunCost], end: str = "expected", loans: int = len(_LOANS)) -> list[Call]:
        """The calls of so many half hours, or until nothing is left; every run takes `end` of its interval."""
        found: list[Call] = []
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            runs, measured = PlannedRuns(Path(folder), costs, clock, end), dict[str, float]()
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


def show(options: argparse.Namespace, make: Callable[..., Any], work_through: Callable[..., list[str]]) -> int:
    """Print the pieces with their costs and the calls; 0.

    Raises:
        UnknownNameError: no such GPU in the catalog.
    """
    device = load_device(options.gpu)
    campaign = make(options)
    print(f"Predicted for one {device.name} from its data sheet, in minutes (90 % interval). Nothing is run.\n")
    if options.tiny:
        costs = dict[str, RunCost]()
    else:
        print("tracing about 30 networks, which takes a minute or more", file=sys.stderr, flush=True)
        costs = run_costs(campaign.pairs, device)
    print(f"{'piece':13}{'part':>5}  {'predicted':24}what it does")
    for name, piece in campaign.pieces.items():
        part = f"{piece.minutes:.1f}" if piece.minutes else "rest"
        said = "a rehearsal" if options.tiny else _said(name, piece, costs, campaign.steps, device)
        print(f"{name:13}{part:>5}  {said:24}{piece.about}", flush=True)
    if not options.tiny:
        _show_runs(campaign.pairs, costs)
        _show_calls(Rehearsal(options, make, work_through), campaign, costs)
    return 0


def _said(name: str, piece: Any, costs: Mapping[str, RunCost], steps: gpu_steps.Steps, device: Device) -> str:
    """What is predicted of a piece, in minutes."""
    if piece.pairs:
        runs = [costs[run] for pair in piece.pairs for run in pair.runs]
        least_s = sum(run.low * run.seconds + TURN_S for run in runs)
        middle_s = sum(run.seconds + TURN_S for run in runs)
        most_s = sum(run.high * run.seconds + TURN_S for run in runs)
        return f"{middle_s / 60:.1f} ({least_s / 60:.1f} to {most_s / 60:.1f})"
    if piece.steps and piece.minutes:
        return f"{steps_cost(steps, piece.steps, device, power=piece.power) / 60:.1f} in {len(piece.steps)} rows' steps"
    if name == "memory":
        return f"at most {limits_cost(steps, device) / 60:.1f} in steps"
    return "until its part is over" if name == "calibrate" else "not measured"


def _show_runs(pairs: Sequence[Pair], costs: Mapping[str, RunCost]) -> None:
    """What the trainings are made of."""
    print(
        f"\n{'minutes of a run':18}{'all':>6}{'90 % interval':>16}{'waits for host':>16}{'validation':>12}{'loop':>6}"
    )
    for pair in pairs:
        for name in pair.runs if pair.seed == 1 else ():
            cost = costs[name]
            interval = f"{cost.low * cost.seconds / 60:.1f} to {cost.high * cost.seconds / 60:.1f}"
            print(
                f"{name:18}{cost.seconds / 60:6.1f}{interval:>16}{cost.waits_s / 60:16.1f}"
                f"{cost.validation_s / 60:12.1f}{cost.loop_s / 60:6.1f}"
            )
    sizes = ", ".join(
        f"{pair.model} {costs[next(iter(pair.runs))].checkpoint_bytes / 1e6:.0f} MB" for pair in pairs if pair.seed == 1
    )
    allowed = f"{START_S:.0f} s until a machine has started; {BETWEEN_S:.0f} s around every call; {TURN_S:.0f} s at"
    print(
        f"""
A PruneTrain run is taken to lose as many FLOPs as the paper's did. "waits for host" is a part of the steps in which the
GPU has nothing to do: hosts differ most, and so does this. "validation" takes a forward pass and at most all of the
wait per mini-batch; "loop" is {LOOP_OPERATORS} operators an iteration that are not the network's.

Not measured, and in no number: checkpoints, one after every epoch (dense: {sizes});
the layer profile of every architecture; unpacking the images; building, tracing and tuning networks for other pieces.
Allowed for below, not measured: {allowed}
the start of every turn of a training. A piece that trains nothing is taken to need its part."""
    )


def _show_calls(rehearsal: Rehearsal, campaign: Any, costs: Mapping[str, RunCost]) -> None:
    """The calls, one after the other, and what they leave."""
    calls = rehearsal.calls(costs)
    loan = 0
    for number, call in enumerate(calls, 1):
        if call.loan != loan:
            loan = call.loan
            print(f"\n{_LOANS[loan - 1]} half hour of a machine, with --cifar" + (" and --earlier" if loan > 1 else ""))
        print(f"  call {number}, --minutes {call.minutes:.1f}: {'; '.join(_did(did) for did in call.did)}")
    print()
    if loan < len(_LOANS):
        print("Then more-steps, as long as there is time.")
    first = _state([call for call in calls if call.loan == 1])
    for name, piece in campaign.pieces.items():
        if piece.pairs and any(number < EPOCHS for number in _reached(piece.pairs, first).values()):
            print(_shortfall(name, piece, _reached(piece.pairs, first), calls, costs))
    for end, words in (("low", "fast"), ("high", "slow")):
        state = _state(rehearsal.calls(costs, end, loans=1))
        reached = "; ".join(
            f"{name} {_epochs(_reached(piece.pairs, state))}" for name, piece in campaign.pieces.items() if piece.pairs
        )
        print(f"The first half hour, with every run at the {words} end of its interval:\n  {reached}.")
    print(
        """
Worth doing: make the calls of a half hour without a pause, since a pair whose checkpoints do not fit into runs.tar
begins again on another machine; keep --work in memory; make validation.json afterwards, on any machine."""
    )


def _did(did: Did) -> str:
    """A piece's turn in words."""
    return f"{did.name} {did.seconds / 60:.1f}" + (f" ({_epochs(did.epochs)})" if did.epochs else "")


def _epochs(reached: Mapping[str, int]) -> str:
    """Epochs of runs: one number where all have the same."""
    if set(reached.values()) == {EPOCHS}:
        return "whole"
    if len(set(reached.values())) == 1:
        return f"{next(iter(reached.values()))} of {EPOCHS} epochs"
    return " and ".join(f"{number}" for number in reached.values()) + f" of {EPOCHS} epochs"


def _state(calls: Sequence[Call]) -> dict[str, int]:
    """Epochs of every run after these calls."""
    return {run: number for call in calls for did in call.did for run, number in did.epochs.items()}


def _reached(pairs: Sequence[Pair], state: Mapping[str, int]) -> dict[str, int]:
    return {name: state.get(name, 0) for pair in pairs for name in pair.runs}


def _shortfall(
    name: str, piece: Any, reached: Mapping[str, int], calls: Sequence[Call], costs: Mapping[str, RunCost]
) -> str:
    """What becomes of a piece that the first half hour does not finish."""
    whole = [
        call.loan
        for call in calls
        if all(number == EPOCHS for number in _reached(piece.pairs, _state(calls[: calls.index(call) + 1])).values())
    ]
    if all(travels(pair, costs) for pair in piece.pairs):
        kept = "goes on in the next one: its checkpoints travel in runs.tar"
    else:
        kept = "begins again on another machine, but for finished runs: its checkpoints do not fit into runs.tar"
    when = (
        f"finished in the {_LOANS[whole[0] - 1].lower()}" if whole else f"not finished after {len(_LOANS)} half hours"
    )
    return f"{name} does not fit into the first half hour ({_epochs(reached)}), {when}.\n  It {kept}."
