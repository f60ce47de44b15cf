"""Who trains along? The ranks that torchrun started, as one object; a single process is a team of one.

Every decision of the loop is taken by all ranks from equal weights, and `agree` proves that it came out the same.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket, Store
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from ptsim.errors import PtsimError, TrainingError, UsageError, lacks_gpu_memory
from ptsim.textfile import printable
from ptsim.training.data import Share
from ptsim.training.joining import cause_of, join, place

_FAREWELL_S = 5.0
_CAUSE, _DONE = "cause", "done"


class Team:
    """The ranks of one run. With one rank every method returns at once."""

    def __init__(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        backend: str | None = None,
        device: torch.device,
        store: Store | None = None,
        flags: dist.ProcessGroup | None = None,
    ) -> None:
        """`store` holds the cause of a failure; `flags` is a group that exchanges numbers on the CPU."""
        self.rank, self.world_size, self.backend, self.device = rank, world_size, backend, device
        self._store, self._flags = store, flags
        self._lost = False

    @property
    def leads(self) -> bool:
        """This is rank 0, the only one that writes."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """This rank's part of every mini-batch."""
        return Share(rank=self.rank, world_size=self.world_size)

    @contextlib.contextmanager
    def working_together(self) -> Iterator[None]:
        """Lets the other ranks know why this one stops, and turns their silence into a sentence.

        Raises:
            TrainingError: another rank has stopped, for a reason that it gave, or died.
        """
        try:
            yield
        except BaseException as error:
            if self.world_size == 1:
                raise
            if lacks_gpu_memory(error) or not isinstance(error, RuntimeError) or not _lost_peer(error):
                self._report(error)
                raise
            self._lost = True
            cause = self._cause()
            raise TrainingError(
                f"rank {self.rank} lost contact with the other ranks: {cause or cause_of(error)}",
                hint="torchrun --max-restarts N restarts all ranks, and they go on from the last checkpoint",
            ) from error

    def _report(self, error: BaseException) -> None:
        """Leave the cause where the other ranks find it once they miss this one; the first cause stays."""
        told = error.message if isinstance(error, PtsimError) else cause_of(error)
        if isinstance(error, KeyboardInterrupt):
            told = f"interrupted ({told})"
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store went down with rank 0
                self._store.compare_set(_CAUSE, "", f"rank {self.rank} stopped: {told}")

    def _cause(self) -> str | None:
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set_timeout(datetime.timedelta(seconds=_FAREWELL_S))
                if self._store.check([_CAUSE]):
                    cause: str = self._store.get(_CAUSE).decode()
                    return cause
        return None

    def leave(self) -> None:
        """Rank 0 may hold what the ranks tell each other: it waits a moment until all need it no more."""
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # the store went down with rank 0
            self._store.set_timeout(datetime.timedelta(seconds=_FAREWELL_S))
            done = self._store.add(_DONE, 1)
            deadline = time.monotonic() + _FAREWELL_S
            while self.leads and not self._lost and done < self.world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                done = self._store.add(_DONE, 0)

    def consult(self, signal_number: int, out_of_memory: bool) -> tuple[int, int, int]:
        """What the ranks have noticed: (a signal's number, the rank that got it, the rank without memory or -1)."""
        if self.world_size == 1:
            return signal_number, self.rank, self.rank if out_of_memory else -1
        mine = (
            signal_number * self.world_size + self.rank if signal_number else -1,
            self.rank if out_of_memory else -1,
        )
        found = torch.tensor(mine)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._flags)
        asked, without = found.tolist()
        number, rank = divmod(asked, self.world_size) if asked >= 0 else (0, 0)
        return number, rank, without

    def least(self, value: Tensor) -> Tensor:
        """The smallest value over the ranks."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return value

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over the ranks."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def average_buffers(self, model: nn.Module) -> None:
        """Replace every floating-point buffer (running statistics) by its mean over the ranks, which all then hold."""
        if self.world_size == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world_size
            else:
                dist.broadcast(buffer, src=0)

    def gather(self, text: str) -> list[str]:
        """What every rank says, in the order of the ranks."""
        if self.world_size == 1:
            return [text]
        told: list[str] = [""] * self.world_size
        dist.all_gather_object(told, text)
        return told

    def agree(self, what: str, value: bytes) -> None:
        """Make sure that all ranks hold the same `value`.

        Raises:
            TrainingError: they do not; names the first rank that differs from rank 0.
        """
        if self.world_size == 1:
            return
        digest = hashlib.sha256(value).digest()[:8]
        mine = torch.tensor(int.from_bytes(digest, "little", signed=True), device=self.device)
        all_ranks = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(all_ranks, mine)
        for rank, theirs in enumerate(all_ranks):
            if bool(theirs != all_ranks[0]):
                raise TrainingError(f"the ranks disagree about {what}: rank {rank} differs from rank 0")

    def from_leader(self, make: Callable[[], bytes]) -> bytes:
        """What `make` gives on rank 0, on all ranks; an error of the user's there is raised on all of them.

        It is sent as msgpack: torch's `broadcast_object_list` pickles, and what arrives would be code to run.

        Raises:
            PtsimError: `make` raised one.
        """
        if self.world_size == 1:
            return make()
        content, failure = b"", None
        if self.leads:
            try:
                content = make()
            except PtsimError as error:
                failure = error
        message = msgspec.msgpack.encode((failure is not None, failure.message.encode() if failure else content))
        size = torch.tensor(len(message), device=self.device)
        dist.broadcast(size, src=0)
        buffer = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.leads:
            buffer.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        dist.broadcast(buffer, src=0)
        failed, content = msgspec.msgpack.decode(buffer.cpu().numpy().tobytes(), type=tuple[bool, bytes])
        if failure is not None:
            raise failure
        if failed:
            raise TrainingError(f"rank 0 failed: {content.decode()}")
        return content


@contextlib.contextmanager
def join_team(device_name: str, folder: Path | None = None) -> Iterator[Team]:
    """The team that torchrun's environment describes, joined on entry and left on exit.

    Args:
        device_name: "auto", "cpu", "cuda" or "cuda:N"; under torchrun every local rank takes its own GPU, whatever N
            (a resumed run has recorded that of rank 0).
        folder: of the run; ranks with another one are of another launch.

    Raises:
        UsageError: no such device here, an environment that contradicts itself, or another launch at its address.
        TrainingError: another rank does not come or has died (`joining`).
    """
    me = place()
    device = _device(device_name, me.local_rank if me.world_size > 1 else None)
    if me.world_size == 1:
        yield Team(device=device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    shared = {"work": "training"} | ({} if folder is None else {"run folder": printable(os.path.abspath(folder))})
    store, flags = join(me, backend, shared=shared)
    team = Team(rank=me.rank, world_size=me.world_size, backend=backend, device=device, store=store, flags=flags)
    try:
        yield team
    finally:
        dist.destroy_process_group()
        team.leave()


def current_team(device: torch.device) -> Team:
    """The ranks of torch.distributed's default group, or a team of one where there is none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Team(device=device)
    return Team(rank=dist.get_rank(), world_size=dist.get_world_size(), backend=str(dist.get_backend()), device=device)


class CountedBuckets:
    """How many of DDP's buckets have begun their all-reduce in this backward pass; DDP's default, counted."""

    def __init__(self, module: nn.parallel.DistributedDataParallel) -> None:
        self.begun = 0
        module.register_comm_hook(self, _counted_all_reduce)
        module.counted_buckets = self  # type: ignore[assignment] # a note for `Reduction`


def _counted_all_reduce(buckets: CountedBuckets, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    buckets.begun += 1
    return default_hooks.allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type] # the group of all


_counted_all_reduce.__annotations__.clear()  # DDP compares them with types, not with their names


class Reduction:
    """The all-reduces of one backward pass: a rank that fails in it can still take its part, so that nobody waits."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buckets: CountedBuckets | None = getattr(module, "counted_buckets", None)

    @property
    def can_be_finished(self) -> bool:
        """The module counts its buckets."""
        return self._buckets is not None

    def begin(self) -> None:
        """Before every iteration."""
        if self._buckets is not None:
            self._buckets.begun = 0

    def finish(self) -> None:
        """Give zeros to the buckets that are left; the gradients are of no use afterwards."""
        assert self._buckets is not None, "asked before"
        reducer: Any = self._module.reducer
        left = reducer._get_zeros_like_grad_buckets()[self._buckets.begun :]
        for work in [reducer._run_comm_hook(bucket) for bucket in left]:
            work.wait()


class CommunicationMeter:
    """Seconds of all-reduce that backward could not hide, summed over an epoch, from DDP's own clocks.

    DDP times the first all-reduce's start, the end of the local gradients and the end of the last all-reduce; exposed
    is what of the communication lies after the last local gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return
        self._model = weakref.ref(model)  # one that is held would go on reducing beside a new one
        if next(model.parameters()).device.type == "cpu":
            # On GPUs every sample waits for the iteration before: torch's own rate (the first 10, then every 100th).
            model._set_ddp_runtime_logging_sample_rate(1)  # type: ignore[no-untyped-call] # torch's gap

    def exposed_s(self, num_reductions: int) -> float:
        """Seconds over so many all-reduces of all gradients, from the mean over the sampled ones since the wrapping."""
        model: Any = None if self._model is None else self._model()
        if model is None:
            return 0.0
        data: dict[str, Any] = model._get_ddp_logging_data()
        communication_ns = data.get("avg_backward_comm_time", 0)
        hidden_ns = data.get("avg_backward_compute_comm_overlap_time", 0)
        return float(max(communication_ns - hidden_ns, 0)) * 1e-9 * num_reductions


def _device(name: str, local_rank: int | None) -> torch.device:
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise UsageError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not available:
        raise UsageError(f"device {name!r} is not available: torch finds no CUDA GPU")
    number = local_rank if local_rank is not None else int(index or 0)
    if number >= torch.cuda.device_count():
        raise UsageError(f"device cuda:{number} does not exist: there are {torch.cuda.device_count()}")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _lost_peer(error: RuntimeError) -> bool:
    """Whether this is how NCCL or gloo say that another rank is gone; gloo has no exception type of its own."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "connection closed", "connection reset", "nccl", "timed out"))
