"""Who trains along? The ranks that torchrun started, as one object; a single process is a team of one.

Every decision of the loop is taken by all ranks from equal weights, and `agree` proves that it came out the same.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ptsim.errors import PtsimError, TrainingError, UsageError
from ptsim.training.data import Share

_TIMEOUT = datetime.timedelta(minutes=10)


class Team:
    """The ranks of one run. With one rank every method returns at once."""

    def __init__(self, *, rank: int = 0, world_size: int = 1, backend: str | None = None, device: torch.device) -> None:
        self.rank, self.world_size, self.backend, self.device = rank, world_size, backend, device

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
        """Turns the backend's complaint about a rank that is gone into a sentence.

        Raises:
            TrainingError: another rank has died or left.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or isinstance(error, torch.OutOfMemoryError) or not _lost_peer(error):
                raise
            raise TrainingError(
                f"rank {self.rank} lost contact with the other ranks: {_one_line(error)}",
                hint="torchrun --max-restarts N restarts all ranks, and they go on from the last checkpoint",
            ) from error

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
def join_team(device_name: str) -> Iterator[Team]:
    """The team that torchrun's environment describes, joined on entry and left on exit.

    Args:
        device_name: "auto", "cpu", "cuda" or "cuda:N"; under torchrun every local rank takes its own GPU, whatever N
            (a resumed run has recorded that of rank 0).

    Raises:
        UsageError: no such device here.
        TrainingError: the other ranks cannot be reached.
    """
    environment = os.environ
    world_size = int(environment.get("WORLD_SIZE", "1"))
    device = _device(device_name, int(environment.get("LOCAL_RANK", "0")) if world_size > 1 else None)
    if world_size == 1:
        yield Team(device=device)
        return
    rank = int(environment["RANK"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
        # A torchrun that restarts its ranks keeps its store: without a name of their own, the new ranks would find the
        # addresses of the dead ones (torch 2.15, --standalone).
        store = PrefixStore(f"ptsim/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"rank {rank} cannot join the {world_size} ranks: {_one_line(error)}") from error
    try:
        yield Team(rank=rank, world_size=world_size, backend=backend, device=device)
    finally:
        dist.destroy_process_group()


def restarted() -> bool:
    """Torchrun has started these ranks again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class CommunicationMeter:
    """Seconds of all-reduce that backward could not hide, summed over an epoch, from DDP's own clocks.

    DDP times the first all-reduce's start, the end of the local gradients and the end of the last all-reduce; exposed
    is what of the communication lies after the last local gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        if self._model is not None and next(self._model.parameters()).device.type == "cpu":
            # On GPUs every sample waits for the iteration before: torch's own rate (the first 10, then every 100th).
            self._model._set_ddp_runtime_logging_sample_rate(1)  # type: ignore[no-untyped-call] # torch's gap

    def exposed_s(self, num_iterations: int) -> float:
        """Seconds over `num_iterations`, from the mean over the sampled iterations since the wrapping."""
        if self._model is None:
            return 0.0
        data: dict[str, Any] = self._model._get_ddp_logging_data()  # type: ignore[no-untyped-call] # torch's gap
        communication_ns = data.get("avg_backward_comm_time", 0)
        hidden_ns = data.get("avg_backward_compute_comm_overlap_time", 0)
        return float(max(communication_ns - hidden_ns, 0)) * 1e-9 * num_iterations


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
