"""The command line: which subcommands there are, and how errors leave it.

Each subcommand lives in its own file and is imported when it runs, so that `ptsim --help` imports no torch. Data goes
to stdout, everything else to stderr. A `PtsimError` becomes one sentence (and a `hint:` line) and exit status 2;
anything else that escapes is kept in a file, and the sentence says where (`crash.py`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import re
import sys
import threading
import traceback
import typing
import warnings
from pathlib import Path
from typing import Any

import cyclopts

import ptsim
from ptsim.cli import crash
from ptsim.cli.common import PipedConsole, say
from ptsim.cli.reading import check_number
from ptsim.errors import PtsimError, UnknownNameError, UsageError, lacks_memory
from ptsim.units import MIB, listed

app = cyclopts.App(
    name="ptsim",
    help="What would it cost to train this CNN on that cluster, dense or with PruneTrain, and how sure are we?",
    version=ptsim.__version__,
    console=PipedConsole(),
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # an interruption is said, not swallowed
    default_parameter=cyclopts.Parameter(json_list=False, json_dict=False),  # "[1].jsonl" is a file's name
)

# name → (where, one line of help), in the order in which one uses them; `ptsim --help` sorts by name.
COMMANDS = {
    "demo": ("demo:demo", "Train dense and PruneTrain on digits, project both, plan ResNet-50, write two reports."),
    "train": ("train:train", "Train a network, dense or with PruneTrain, and record the run."),
    "inspect": ("inspect:inspect", "Show the channel groups of a network and prove that pruning them is exact."),
    "cost": ("cost:cost", "Count FLOPs, memory traffic, memory and all-reduced bytes of a trace or a network."),
    "calibrate": ("calibrate:app", "Measure this machine: operator times (gpu) or all-reduces (network)."),
    "import": ("import_:app", "Make a device profile of what torch.profiler recorded."),
    "allreduce": ("allreduce:allreduce", "Predict the time of one all-reduce on a cluster."),
    "predict": ("predict:predict", "Predict the time and throughput of one training step."),
    "plan": ("plan:plan", "Plan a run that nobody has trained; its trace can be projected."),
    "simulate": ("simulate:simulate", "Project recorded or planned runs onto clusters of any size."),
    "validate": ("validate:validate", "Compare predictions with what recorded runs measured."),
    "sweep": ("sweep:sweep", "Run many projections in parallel, from a study file."),
    "report": ("report:report", "Write the report of runs: one page with the answer, figures and tables."),
    "export": ("export:export", "Write a trace in a form that other tools read."),
    "doctor": ("doctor:doctor", "Show what this machine has, what can run on it, and what to do about the rest."),
    "devices": ("catalog:devices", "List the catalog's GPUs."),
    "clusters": ("catalog:clusters", "List the catalog's clusters."),
}

_HELP = "ptsim --help lists the commands; ptsim COMMAND --help their options"
_CLUSTERS = "ptsim clusters lists the catalog"
# What a command does while one waits; the others show their own progress.
_WORKS = {
    "inspect": "tracing the network and proving that pruning it is exact",
    "cost": "counting the network",
    "predict": "working out the times of the network's operators",
    "plan": "tracing the network and looking for a trajectory",
    "simulate": "replaying the runs step by step",
    "validate": "predicting what the runs have measured",
    "report": "projecting the runs and drawing the figures",
    "export": "writing the trace in its new form",
    "import": "reading the recorded steps",
    "doctor": "looking at this machine",
    "calibrate network": "waiting for the other ranks and timing all-reduces",
}
# Commands with --set, and the record whose fields it sets.
_SETTINGS = {"train": "ptsim.training.config:Config", "simulate": "ptsim.sim.options:Options"}
_LACKS = re.compile(r'^(?:Command "[^"]*" p|P)arameter (\S+) requires an argument')
_PATIENCE_S = 2.0
_RESERVE_BYTES = 16 * MIB
# Importing torch and torchvision makes half a million objects that all stay. At Python's own threshold of 700 new
# objects, looking for garbage among them took 0.6 of 4.1 s of CPU (other programs beside it).
_COLLECT_EVERY = 50_000

for _name, (_target, _help) in COMMANDS.items():
    app.command(f"ptsim.cli.{_target}", name=_name, help=_help)
app.register_install_completion_command(help="Install completion for this shell.")


def run(tokens: list[str] | None = None) -> int:
    """Run one command line and return its exit status.

    0: done; 2: the input is wrong or the machine refuses (one sentence); 70: a fault of ptsim (kept in a file); 130:
    interrupted; 141: the reader of the output has left.
    """
    warnings.showwarning = _show_warning
    given = sys.argv[1:] if tokens is None else tokens
    reserve = [bytearray(_RESERVE_BYTES)]
    try:
        return _run(tokens, given)
    except Exception as error:
        if not _lacks_memory(error):
            return _fail_unexpected(error, given)
        reserve.clear()  # so that there is memory to speak with
        traceback.clear_frames(error.__traceback__)
        return _fail("the machine has not enough memory for this", "smaller inputs, or another machine")


def _lacks_memory(error: BaseException) -> bool:
    """Whether memory was short: by what the error says, or because there is none now, whatever the error is."""
    seen: BaseException | None = error
    while seen is not None:
        if lacks_memory(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    try:
        bytearray(2 * _RESERVE_BYTES)
    except MemoryError:
        return True
    return False


def _run(tokens: list[str] | None, given: list[str]) -> int:
    if any("\0" in token for token in given):  # a shell cannot say it, a program can
        return _fail("an argument holds a NUL character", None)
    notice = threading.Timer(_PATIENCE_S, _tell_what_it_does, args=[given])
    notice.daemon = True
    try:
        notice.start()
        result: Any = app(tokens, exit_on_error=False, print_error=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # while it can still be said that nobody takes the last words
    except PtsimError as error:
        return _fail(error.message, error.hint)
    except cyclopts.CycloptsError as error:
        return _fail_usage(error)
    except KeyboardInterrupt:
        say("error: interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        return 141
    except UnicodeEncodeError as error:
        near = error.object[max(error.start - 100, 0) : error.end + 100]
        return _fail(f"{near!r} is no text in UTF-8, so that it cannot be written", "rename the file or folder")
    except OSError as error:
        if error.strerror is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, None)
    finally:
        notice.cancel()
    return result if isinstance(result, int) else 0


def _drop_what_nobody_takes() -> None:
    """Let what nobody takes go nowhere: Python would try again when it ends, and end with a status of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main() -> None:
    """Entry point of the `ptsim` script."""
    gc.set_threshold(_COLLECT_EVERY)
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without × or a file name without an encoding
    try:
        status = run()
    finally:
        _drop_what_nobody_takes()
    sys.exit(status)


def _open_what_is_closed() -> None:
    """Let what goes to a closed stdout or stderr go nowhere, and not to a file that would get its number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(number)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", closefd=False))  # noqa: SIM115 - open to the end


def _refuse_what_would_be_changed(
    _app: cyclopts.App, _commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection
) -> None:
    """What the user typed is what is done: cyclopts would round 1.6 epochs to 2, and take "" for the current folder."""
    for argument in arguments:
        kinds = _kinds(argument.hint)
        for token in argument.tokens:
            name = token.keyword or argument.name
            if kinds & {int, float}:
                check_number(name, token.value, whole=float not in kinds)
            if Path in kinds and not token.value:
                raise UsageError(f"{name} is empty, expected a path")


def _name_all_that_is_missing(
    _app: cyclopts.App, _commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection
) -> None:
    """Several at once; for a single one cyclopts has the sentence, and what may have been meant."""
    missing = [
        argument.name
        for argument in arguments
        if argument.parse and argument.field_info.required and not argument.keys and not argument.has_tokens
    ]
    if len(missing) > 1:
        clusters = f"{_CLUSTERS}; " if "--cluster" in missing else ""
        raise UsageError(f"{listed(missing)} are missing", hint=clusters + _HELP)


def _kinds(hint: Any) -> set[Any]:
    """The type of an option, and those that it is made of."""
    return {hint}.union(*map(_kinds, typing.get_args(hint)))


app.config = (_refuse_what_would_be_changed, _name_all_that_is_missing)


def _tell_what_it_does(tokens: list[str]) -> None:
    for command in dict.fromkeys((" ".join(tokens[:1]), " ".join(tokens[:2]))):
        if command in _WORKS and "--help" not in tokens:
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed by now
                say(f"ptsim {command}: {_WORKS[command]} …")


def _fail_usage(error: cyclopts.CycloptsError) -> int:
    if isinstance(error, cyclopts.UnknownCommandError):  # its own text would import every command
        known: list[str] = list(COMMANDS)
        chain = error.command_chain or ()
        if chain:
            group = app
            for part in chain:
                group = group[part]
            known = [name for name in group if not name.startswith("-")]
        unknown = UnknownNameError(" ".join([*chain, "command"]), (error.unused_tokens or ["?"])[0], known)
        return _fail(unknown.message, unknown.hint)
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return _fail(f"unexpected argument {(error.unused_tokens or ['?'])[0]!r}", _HELP)
    text = " ".join(str(error).split())
    if isinstance(error, cyclopts.MissingArgumentError):
        text = _LACKS.sub(r"\1 has no value" if error.keyword else r"\1 is missing", text).removesuffix(".")
    clusters = _CLUSTERS if text.startswith("--cluster ") else None
    return _fail(text, _setting_of(error) or clusters or _HELP)


def _setting_of(error: cyclopts.CycloptsError) -> str | None:
    """How to give what was typed as an option and is a setting without one; None if it is none."""
    command = " ".join(error.command_chain or ())
    if not isinstance(error, cyclopts.UnknownOptionError) or command not in _SETTINGS:
        return None
    typed = (error.token.keyword or error.token.value).partition("=")[0]
    name = typed.lstrip("-").replace("-", "_")
    module, _, record = _SETTINGS[command].partition(":")
    known = getattr(importlib.import_module(module), record).__struct_fields__
    return f"--set {name}=… sets it" if name in known else None


def _fail_unexpected(error: BaseException, tokens: list[str]) -> int:
    """Say where the details of a fault of ptsim are."""
    where = crash.keep(error, tokens)
    kept = f"; the details are in {where}" if where else ""
    _fail(
        f"ptsim met a fault of its own ({type(error).__name__}: {_shortened(str(error), 200)}){kept}",
        "please report it with that file: it holds versions, the command line and the traceback" if where else None,
    )
    return crash.EXIT_STATUS


def _fail(message: str, hint: str | None) -> int:
    say("error: " + _shortened(message.replace("\n", "\\n"), 3000))
    if hint:
        say(f"hint: {hint}")
    return 2


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):  # ours and our users'; deprecations of libraries are not the user's to mend
        say(f"warning: {message}")
