"""The page of all settings of a run, made from the configuration itself: name, default, effect.

`python -m ptsim.training.reference` prints it; docs/settings.md is its output, and a test compares the two.
"""

from __future__ import annotations

import inspect
import re
import sys

import msgspec

from ptsim.training.config import SETTINGS, Config

_GROUPS = {
    "model": "Model and data",
    "epochs": "Length, learning rate, optimizer",
    "penalty_ratio": "Pruning",
    "dynamic_batch": "Dynamic mini-batch",
    "device": "Machine, precision, what is kept",
}


def effects() -> dict[str, str]:
    """The sentence of every setting, from the docstring of `Config`."""
    text = inspect.cleandoc(Config.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + text):
        names, colon, effect = entry.strip().partition(": ")
        if colon:
            for name in names.split(", "):
                found[name] = " ".join(effect.split())
    return found


def page() -> str:
    """The page, in Markdown."""
    described = effects()
    defaults = msgspec.to_builtins(Config())
    lines = [
        "# Settings of a training run",
        "",
        "Every setting of `ptsim train`: in its TOML file as `name = value`, on the command line as",
        "`--set name=value`, in Python as a key of the mapping that `ptsim.train` takes. A setting without a",
        "default (None in Python) is off, or decided by what is trained.",
        "This page is made by `python -m ptsim.training.reference`.",
    ]
    for name in SETTINGS:
        if name in _GROUPS:
            lines += ["", f"## {_GROUPS[name]}", "", "| setting | default | effect |", "|---|---|---|"]
        default = defaults[name]
        shown = "" if default is None else f"`{msgspec.json.encode(default).decode()}`"
        effect = described[name][0].upper() + described[name][1:]
        lines.append(f"| `{name}` | {shown} | {effect.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
