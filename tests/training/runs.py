"""Training runs that are small enough for tests, and how one is run in a process of its own that may be killed."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ptsim

NETS = Path(__file__).with_name("nets.py")
_PACKAGE = str(Path(ptsim.__file__).parent) + os.sep  # not its clone, which may have its name and hold the environment

# Synthetic 8×8 images; a threshold so high that a network prunes within a few epochs.
SETTINGS: dict[str, Any] = {
    "model": f"{NETS}:small",
    "dataset": "synthetic",
    "image_size": 8,
    "train_limit": 96,
    "epochs": 6,
    "batch": 16,
    "lr": 0.05,
    "penalty_ratio": 0.5,
    "interval": 2,
    "threshold": 0.12,
    "keep_every": 3,
    "device": "cpu",
}


def settings(**changes: Any) -> dict[str, Any]:
    return SETTINGS | changes


def servant() -> Any:
    """Processes forked from one that has imported torch and ptsim once, without any threads of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ptsim.training.loop", "ptsim.models", "torch._dynamo", __name__])
    return context


def train_until_killed(folder: Path, changes: dict[str, Any], kill: tuple[str, int] | None) -> None:
    """Start or resume the run in `folder`; SIGKILL this very process at the n-th call of a function of that name.

    "" counts every Python call below ptsim.
    """
    import torch

    from ptsim.training.loop import train

    torch.set_num_threads(1)
    if kill is not None:
        sys.setprofile(_Killer(*kill))
    if (folder / "config.toml").exists():
        train(resume=folder)
    else:
        train(settings(**changes), out=folder)


def train_in_own_group(folder: Path, changes: dict[str, Any]) -> None:
    """Start or resume the run in `folder`, as the leader of a process group of its own."""
    os.setsid()
    train_until_killed(folder, changes, None)


class _Killer:
    def __init__(self, function: str, count: int) -> None:
        self.function, self.left = function, count

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(_PACKAGE):
            return
        if self.function in ("", frame.f_code.co_name):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def train_as_rank(rank: int, world_size: int, port: int, folder: Path, changes: dict[str, Any], fault: str) -> None:
    """One rank of a gloo team. Exit status 3 (130 if interrupted) and the message in `folder`.rank if training fails.

    `fault` happens on rank 1: "dies" in the first reconfiguration, "fails" there, "drifts" changes its weights before
    it; "begins anew" where the others resume; "no memory in the forward | backward pass" of the second iteration with
    16 images; "nan" and "SIGINT" in the third iteration. "0 fails" is the same on rank 0. "is slow": its first
    reconfiguration takes longer than the ranks may take to connect.
    """
    import torch

    from ptsim.errors import PtsimError, TrainingError
    from ptsim.training import joining, loop, pruning, step

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    changes = changes | changes.get("on_rank_1", {}) if rank == 1 else changes
    changes = {name: value for name, value in changes.items() if name != "on_rank_1"}
    if fault.startswith("no memory"):  # several buckets of gradients, as large networks have
        make = torch.nn.parallel.DistributedDataParallel.__init__
        torch.nn.parallel.DistributedDataParallel.__init__ = functools.partialmethod(make, bucket_cap_mb=1e-4)  # type: ignore[assignment] # the stand-in
    if fault == "is slow":
        joining._CONNECT_S = 1.0  # 3 s for two ranks
    if fault in ("dies", "fails", "drifts", "0 fails", "is slow") and rank == (fault != "0 fails"):
        original = pruning.PruneTrain.prune

        def prune(self: Any) -> Any:
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if "fails" in fault:
                raise TrainingError("the moon is full")
            if fault == "is slow":
                time.sleep(5.0)
                return original(self)
            for parameter in self.network.parameters():
                parameter.data.zero_()
            return original(self)

        pruning.PruneTrain.prune = prune  # type: ignore[method-assign] # the stand-in
    elif fault not in ("", "begins anew") and rank == 1:
        step.F = SimpleNamespace(cross_entropy=_Faulty(fault))  # type: ignore[attr-defined] # the stand-in
    try:
        if (folder / "config.toml").exists() and not (fault == "begins anew" and rank == 1):
            loop.train(resume=folder)
        else:
            loop.train(settings(**changes), out=folder)
    except PtsimError as error:
        folder.with_suffix(f".rank{rank}").write_text(error.message)
        sys.exit(3)
    except KeyboardInterrupt as stopped:
        folder.with_suffix(f".rank{rank}").write_text(str(stopped))
        sys.exit(130)


class _Faulty:
    """A cross-entropy that something happens in."""

    def __init__(self, fault: str) -> None:
        self.fault, self.calls = fault, 0

    def __call__(self, logits: Any, labels: Any, **_: Any) -> Any:
        import torch

        loss = torch.nn.functional.cross_entropy(logits, labels)
        if not loss.requires_grad:
            return loss
        counts = self.fault in ("nan", "SIGINT") or len(labels) == 16
        self.calls += counts
        if not counts or self.calls != 3:  # with 16 images the first is the trial
            return loss
        if self.fault == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        if "forward" in self.fault:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if "backward" in self.fault:
            first = loss.grad_fn
            while first.next_functions and first.next_functions[0][0] is not None and "Conv" not in first.name():
                first = first.next_functions[0][0]
            first.register_prehook(_raise_without_memory)
        return loss * torch.nan if self.fault == "nan" else loss


def _raise_without_memory(*_: Any) -> None:
    raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
