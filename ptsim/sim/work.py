"""What a simulated step is made of, who runs it, and what comes out: plans, jobs and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Stream = Literal["compute", "communication"]
SpanPhase = Literal["forward", "backward", "update", "collective"]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds on the compute stream. `bucket` is the index of the gradient bucket that is complete afterwards."""

    name: str
    seconds: float
    bucket: int | None = None


class Collective(msgspec.Struct, frozen=True, kw_only=True):
    """One collective operation: its undisturbed time, and which bytes it carries how far."""

    name: str
    seconds: float
    num_bytes: int
    wire_bytes_per_gpu: float
    carries: Literal["gradients", "parameters", "buffers"] = "gradients"


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step of a GPU at nominal speed.

    Attributes:
        forward, backward: of one micro-batch, in execution order. `Piece.bucket` counts only in the last micro-batch.
        tail: what needs the reduced gradients: regularizer, optimizer.
        buckets: their all-reduces, in the order in which they become ready.
        head: collectives that the forward pass waits for: DDP's broadcast of buffers, and the gathering of parameters
            that other GPUs have updated in the step before.
        num_micro_batches: forward–backward passes per step; only the last one communicates.
        overlap: False makes every all-reduce wait for the end of backward.
        slowed: the seconds of the computation hold already by how much collectives slow it down.
    """

    forward: tuple[Piece, ...]
    backward: tuple[Piece, ...]
    tail: tuple[Piece, ...]
    buckets: tuple[Collective, ...]
    head: tuple[Collective, ...] = ()
    num_micro_batches: int = 1
    overlap: bool = True
    slowed: bool = False

    @property
    def compute_s(self) -> float:
        """Seconds of computation in the step."""
        passes = _seconds(self.forward) + _seconds(self.backward)
        return self.num_micro_batches * passes + _seconds(self.tail)

    @property
    def communication_s(self) -> float:
        """Seconds of undisturbed communication in the step."""
        return sum(c.seconds for c in (*self.head, *self.buckets))

    @property
    def wire_bytes_per_gpu(self) -> float:
        """Bytes that a GPU sends for gradients and, where their update is sharded, parameters in one step."""
        return sum(c.wire_bytes_per_gpu for c in (*self.head, *self.buckets) if c.carries != "buffers")

    def merged(self) -> StepPlan:
        """The same step with as few pieces of work as the buckets allow: faster to simulate, the same times."""
        backward: list[Piece] = []
        seconds = 0.0
        for work in self.backward:
            seconds += work.seconds
            if work.bucket is not None:
                backward.append(Piece(name="backward", seconds=seconds, bucket=work.bucket))
                seconds = 0.0
        if seconds > 0:
            backward.append(Piece(name="backward", seconds=seconds))
        return msgspec.structs.replace(
            self,
            forward=(Piece(name="forward", seconds=_seconds(self.forward)),),
            backward=tuple(backward),
            tail=(Piece(name="tail", seconds=_seconds(self.tail)),),
        )


class Jitter(msgspec.Struct, frozen=True, kw_only=True):
    """Random variation of the GPUs' speed.

    Attributes:
        sigma: standard deviation of log duration, drawn anew for every GPU and step (mean duration unchanged).
        straggler_fraction: share of GPUs that are slow for the whole run (rounded up; 0 for none).
        straggler_slowdown: by which their computation takes longer (1.5: half as long again).
    """

    sigma: float = 0.0
    straggler_fraction: float = 0.0
    straggler_slowdown: float = 1.0


class TrainingJob(msgspec.Struct, frozen=True, kw_only=True):
    """One data-parallel training job.

    Attributes:
        plan: the step at nominal speed.
        speeds: duration factor of every simulated GPU (1 = the plan's own time); equal GPUs may be one entry.
        counts: how many GPUs each entry stands for; empty for one each.
        input_interval_s: seconds that the input pipeline needs for one GPU's mini-batch; 0: never a limit.
        prefetch: finished mini-batches that the input pipeline may hold.
        start_s: when the job begins.
    """

    plan: StepPlan
    speeds: tuple[float, ...] = (1.0,)
    counts: tuple[int, ...] = ()
    input_interval_s: float = 0.0
    prefetch: int = 2
    start_s: float = 0.0


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """What one GPU's stream did from `start_s` to `end_s`."""

    job: int
    gpu: int
    stream: Stream
    phase: SpanPhase
    name: str
    step: int
    start_s: float
    end_s: float
    num_bytes: int = 0


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the measured steps of one job.

    `step_s` = `compute_s` + `input_wait_s` + `straggler_wait_s` + `exposed_communication_s`, where `compute_s` is the
    mean over GPUs, `straggler_wait_s` what the slowest GPU needs beyond it, and `input_wait_s` how long that one waits
    for its images. Exposed communication is everything else. It has two parts: `communication_wait_s`, in which the
    slowest GPU stands still because a collective has not ended, and the rest, by which the computation takes longer
    while collectives run beside it. Tools that read a recorded timeline (HolisticTraceAnalysis) see only the first.
    """

    step_s: float
    compute_s: float
    input_wait_s: float
    straggler_wait_s: float
    exposed_communication_s: float
    communication_wait_s: float
    communication_s: float
    wire_bytes_per_gpu: float
    spans: tuple[Span, ...] = ()


def _seconds(pieces: Sequence[Piece]) -> float:
    return sum(work.seconds for work in pieces)
