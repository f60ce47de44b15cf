"""The command line: which subcommands there are, and how errors leave it.

Each subcommand lives in its own file and is imported when it runs, so that `ptsim --help` imports no torch. Data goes
to stdout, everything else to stderr. A `PtsimError` becomes one sentence (and a `hint:` line) and exit status 2.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import cyclopts
from rich.console import Console

import ptsim
from ptsim.errors import PtsimError, UnknownNameError

app = cyclopts.App(
    name="ptsim",
    help="What would it cost to train this CNN on that cluster, dense or with PruneTrain, and how sure are we?",
    version=ptsim.__version__,
    result_action="return_value",
)

# name → (where, one line of help). The order is the order of `ptsim --help`.
COMMANDS = {
    "demo": ("demo:demo", "Train dense and PruneTrain on real digits, project both onto a cluster, write the report."),
    "train": ("train:train", "Train a network, dense or with PruneTrain, and record the run."),
    "inspect": ("inspect:inspect", "Show the channel groups of a network and prove that pruning them is exact."),
    "cost": ("cost:cost", "FLOPs, memory traffic, memory and all-reduce bytes of a trace or a network."),
    "calibrate": ("calibrate:app", "Measure this machine: operator times (gpu) or all-reduces (network)."),
    "allreduce": ("allreduce:allreduce", "The time of one all-reduce on a cluster."),
    "predict": ("predict:predict", "The time and throughput of a training step on a device."),
    "simulate": ("simulate:simulate", "Replay a recorded run on clusters of any size."),
    "validate": ("validate:validate", "Predicted against measured, for recorded runs."),
    "sweep": ("sweep:sweep", "Many projections in parallel, from a study file."),
    "report": ("report:report", "The cost-breakdown page of recorded runs."),
    "export": ("export:export", "Write a trace in a form that other tools read."),
    "devices": ("catalog:devices", "List the catalog's GPUs."),
    "clusters": ("catalog:clusters", "List the catalog's clusters."),
}

_HELP = "ptsim --help lists the commands; ptsim COMMAND --help their options"

for _name, (_target, _help) in COMMANDS.items():
    app.command(f"ptsim.cli.{_target}", name=_name, help=_help)


def run(tokens: list[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    warnings.showwarning = _show_warning
    try:
        result: Any = app(tokens, exit_on_error=False, print_error=False)
    except PtsimError as error:
        return _fail(error.message, error.hint)
    except cyclopts.UnknownCommandError as error:  # its own text would import every command to look for close names
        unknown = UnknownNameError("command", (error.unused_tokens or ["?"])[0], COMMANDS)
        return _fail(unknown.message, unknown.hint)
    except cyclopts.UnusedCliTokensError as error:
        return _fail(f"unexpected argument {(error.unused_tokens or ['?'])[0]!r}", _HELP)
    except cyclopts.CycloptsError as error:
        return _fail(" ".join(str(error).split()), _HELP)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `ptsim` script."""
    sys.exit(run())


def progress_console() -> Console:
    """Where progress and messages go: stderr."""
    return Console(stderr=True)


def _fail(message: str, hint: str | None) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):  # ours and our users'; deprecations of libraries are not the user's to mend
        print(f"warning: {message}", file=sys.stderr)
