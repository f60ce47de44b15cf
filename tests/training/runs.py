"""Training runs that are small enough for tests, and how one is run in a process of its own that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

NETS = Path(__file__).with_name("nets.py")

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


class _Killer:
    def __init__(self, function: str, count: int) -> None:
        self.function, self.left = function, count

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event != "call" or "/ptsim/" not in frame.f_code.co_filename:
            return
        if self.function in ("", frame.f_code.co_name):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def train_as_rank(rank: int, world_size: int, port: int, folder: Path, changes: dict[str, Any], fault: str) -> None:
    """One rank of a gloo team. Exit status 3 and the message in `folder`.rank if training fails.

    `fault` happens on rank 1: "dies" in the first reconfiguration, "drifts" changes its weights before it.
    """
    import torch

    from ptsim.errors import PtsimError
    from ptsim.training import loop, state

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    if fault and rank == 1:
        original = state.State.prune

        def prune(self: Any) -> Any:
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            for parameter in self.model.parameters():
                parameter.data.zero_()
            return original(self)

        state.State.prune = prune  # type: ignore[method-assign] # the stand-in
    try:
        if (folder / "config.toml").exists():
            loop.train(resume=folder)
        else:
            loop.train(settings(**changes), out=folder)
    except PtsimError as error:
        folder.with_suffix(f".rank{rank}").write_text(error.message)
        sys.exit(3)
