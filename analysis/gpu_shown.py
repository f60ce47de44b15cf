"""How is the plan of the GPU campaign printed: what each piece takes, what the calls do, and what is measured of it?

`gpu_campaign.py --plan` calls it; it is no script of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gpu_plan
import gpu_steps
from gpu_parts import Noted
from gpu_plan import Allowed, Call, Did, RunCost
from gpu_runs import EPOCHS, Pair

from ptsim.hardware.catalog import load_device
from ptsim.hardware.spec import Device

_LOANS = ("First", "Second", "Third")  # as many as are rehearsed


def show(options: argparse.Namespace, make: Callable[..., Any], work_through: Callable[..., list[str]]) -> int:
    """Print the pieces with their costs and the calls; 0.

    Raises:
        UnknownNameError: no such GPU in the catalog.
        FileFormatError: what the earlier calls have noted cannot be read.
    """
    device, noted = load_device(options.gpu), Noted.of(options.noted)
    campaign = make(options)
    print(f"Predicted for one {device.name} from its data sheet, in minutes (90 % interval). Nothing is run.\n")
    if options.tiny:
        costs, allowed, known = dict[str, RunCost](), gpu_plan.ASSUMED, list[str]()
    else:
        print("tracing about 30 networks, which takes a minute or more", file=sys.stderr, flush=True)
        costs = gpu_plan.run_costs(campaign.pairs, device)
        allowed, known = gpu_plan.allowed(noted, max(cost.checkpoint_bytes for cost in costs.values()))
    print(f"{'piece':13}{'part':>5}  {'predicted':24}what it does")
    for name, piece in campaign.pieces.items():
        part = f"{piece.minutes:.1f}" if piece.minutes else "rest"
        said, traced = ("a rehearsal", "") if options.tiny else _said(name, piece, costs, campaign, device, allowed)
        print(f"{name:13}{part:>5}  {said:24}{piece.about}", flush=True)
        if options.noted is not None:
            print(f"{'taken':>18}  {noted.taken(name)}{traced and f'; here {traced}'}")
    if not options.tiny:
        _show_runs(campaign.pairs, costs)
        print("\n".join(("\nAllowed for below:", *(f"  {line}" for line in known))))
        _show_calls(gpu_plan.Rehearsal(options, make, work_through, allowed), campaign, costs)
    return 0


def _said(
    name: str, piece: Any, costs: Mapping[str, RunCost], campaign: Any, device: Device, allowed: Allowed
) -> tuple[str, str]:
    """What is predicted of a piece, in minutes, and how long its networks took to be built and traced here."""
    if piece.pairs:
        runs = [costs[run] for pair in piece.pairs for run in pair.runs]
        least_s, middle_s, most_s = (
            sum(allowed.run_s(run, {"low": run.low, "high": run.high}.get(end, 1.0)) for run in runs)
            for end in ("low", "", "high")
        )
        return f"{middle_s / 60:.1f} ({least_s / 60:.1f} to {most_s / 60:.1f})", ""
    # As a process of its own has nothing traced yet.
    steps = gpu_steps.Steps(campaign.out, campaign.device, tiny=False, remaining_s=lambda: math.inf)
    said = "until its part is over" if name == "calibrate" else "not measured"
    if piece.steps and piece.minutes:
        seconds = gpu_plan.steps_cost(steps, piece.steps, device, power=piece.power)
        said = f"{seconds / 60:.1f} in {len(piece.steps)} rows' steps"
    elif name == "memory":
        said = f"at most {gpu_plan.limits_cost(steps, device) / 60:.1f} in steps"
    part = steps.parts.found.get("networks")
    return said, f"networks {part.seconds:.0f}" if part else ""


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
    together = "; ".join(
        f"{pair.model} {gpu_plan.together_s([costs[name] for name in pair.runs]) / 60:.1f} minutes"
        for pair in pairs
        if pair.seed == 1
    )
    print(
        f"""
A PruneTrain run is taken to lose as many FLOPs as the paper's did. "waits for host" is a part of the steps in which the
GPU has nothing to do: hosts differ most, and so does this. "validation" takes a forward pass and at most all of the
wait per mini-batch; "loop" is {gpu_plan.LOOP_OPERATORS} operators an iteration that are not the network's.

The two runs of a pair at the same time would take no less than {together}. They take
turns all the same: NVML counts the energy of the board, not of a process, and where one run waits, its clock would
count what the other does. Their times and energies would be no measurement of either.

AMP at the stages of ResNet-50 is bf16. In fp16 the GradScaler lets the host wait for the GPU in every step: the dense
network is measured so in the piece steps, the pruned stages come first in more-steps.

In no number: unpacking the images; building, tracing and tuning networks for the pieces that train nothing, which are
taken to need their part."""
    )


def _show_calls(rehearsal: gpu_plan.Rehearsal, campaign: Any, costs: Mapping[str, RunCost]) -> None:
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
        ahead = rehearsal.calls(costs, end)
        state = _state([call for call in ahead if call.loan == 1])
        reached = "; ".join(
            f"{name} {_epochs(_reached(piece.pairs, state))}{_later(piece.pairs, ahead)}"
            for name, piece in campaign.pieces.items()
            if piece.pairs
        )
        print(f"The first half hour, with every run at the {words} end of its interval:\n  {reached}.")
    large = [f"{pair.model} {costs[next(iter(pair.runs))].checkpoint_bytes / 1e6:.0f} MB" for pair in campaign.pairs]
    print(
        f"""
Worth doing: make the calls of a half hour without a pause, since a pair whose checkpoints do not fit into runs.tar
begins again on another machine; keep --work in memory; make validation.json afterwards, on any machine.
A checkpoint is half weights and half momentum ({", ".join(dict.fromkeys(large))}); without both the run is another one.
Of 32-bit numbers only the exponents can be compressed, about a sixth. So one of VGG-11's has no place among the 64 MiB
that may travel, beside the images; a pruned one has, once it is small enough for runs.tar."""
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


def _finished_in(pairs: Sequence[Pair], calls: Sequence[Call]) -> int | None:
    """The half hour after which all runs of the pairs are whole; None where they are not."""
    for number, call in enumerate(calls, 1):
        if set(_reached(pairs, _state(calls[:number])).values()) == {EPOCHS}:
            return call.loan
    return None


def _later(pairs: Sequence[Pair], calls: Sequence[Call]) -> str:
    """In which half hour runs are whole that are not after the first."""
    loan = _finished_in(pairs, calls)
    if loan == 1:
        return ""
    return f", not whole after {len(_LOANS)}" if loan is None else f", whole in the {_LOANS[loan - 1].lower()}"


def _shortfall(
    name: str, piece: Any, reached: Mapping[str, int], calls: Sequence[Call], costs: Mapping[str, RunCost]
) -> str:
    """What becomes of a piece that the first half hour does not finish."""
    loan = _finished_in(piece.pairs, calls)
    if all(gpu_plan.travels(pair, costs) for pair in piece.pairs):
        kept = "goes on in the next one: its checkpoints travel in runs.tar"
    else:
        kept = "begins again on another machine, but for finished runs: its checkpoints do not fit into runs.tar"
    when = f"finished in the {_LOANS[loan - 1].lower()}" if loan else f"not finished after {len(_LOANS)} half hours"
    return f"{name} does not fit into the first half hour ({_epochs(reached)}), {when}.\n  It {kept}."
