"""What would it cost to train this network on that cluster, dense or with PruneTrain, and how sure are we?

Everything here is loaded when first used; importing ptsim does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptsim.answers.cost import CostReport, cost
    from ptsim.answers.plan import plan
    from ptsim.answers.predict import predict
    from ptsim.answers.validate import validate
    from ptsim.costs.collectives import allreduce
    from ptsim.prune.proof import inspect
    from ptsim.report.build import write_report
    from ptsim.sim.run import simulate
    from ptsim.trace.io import read_trace
    from ptsim.trace.trace import Trace
    from ptsim.training.facts import RunFacts
    from ptsim.training.loop import train
    from ptsim.training.pruner_state import load_pruned
    from ptsim.training.pruning import PruneTrain
    from ptsim.training.recorder import Recorder
    from ptsim.training.runfolder import load_model

__version__ = "0.1.0"

_HOME = {
    "allreduce": "ptsim.costs.collectives",
    "write_report": "ptsim.report.build",
    "Trace": "ptsim.trace.trace",
    "inspect": "ptsim.prune.proof",
    "CostReport": "ptsim.answers.cost",
    "cost": "ptsim.answers.cost",
    "PruneTrain": "ptsim.training.pruning",
    "Recorder": "ptsim.training.recorder",
    "RunFacts": "ptsim.training.facts",
    "load_model": "ptsim.training.runfolder",
    "load_pruned": "ptsim.training.pruner_state",
    "plan": "ptsim.answers.plan",
    "predict": "ptsim.answers.predict",
    "read_trace": "ptsim.trace.io",
    "simulate": "ptsim.sim.run",
    "train": "ptsim.training.loop",
    "validate": "ptsim.answers.validate",
}

__all__ = [
    "CostReport",
    "PruneTrain",
    "Recorder",
    "RunFacts",
    "Trace",
    "__version__",
    "allreduce",
    "cost",
    "inspect",
    "load_model",
    "load_pruned",
    "plan",
    "predict",
    "read_trace",
    "simulate",
    "train",
    "validate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ptsim' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
