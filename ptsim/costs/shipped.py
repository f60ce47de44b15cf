"""Which constants does the cost model come with? Files beside its code, most of them written by a fit."""

from __future__ import annotations

from importlib import resources
from typing import TypeVar

import msgspec

T = TypeVar("T")


def shipped(name: str, kind: type[T]) -> T:
    """The TOML file `name` of this package, as a record of `kind`."""
    return msgspec.toml.decode(resources.files("ptsim.costs").joinpath(name).read_bytes(), type=kind)
