"""A table of things by name that other packages can add to: a function call, or an entry point of an installed package.

What is in a table is imported when it is first asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

from ptsim.errors import UnknownNameError, UsageError, on_one_line

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries of one kind by name: ptsim's own, those of installed packages, those that were added by hand."""

    def __init__(self, what: str, *, entry_points: str, own: Mapping[str, str]) -> None:
        """An empty table.

        Args:
            what: the kind of thing, singular and lower case ("criterion").
            entry_points: the group of entry points that other packages use.
            own: "module:attribute" of ptsim's own entries.
        """
        self.what, self.entry_points = what, entry_points
        self.own = dict(own)
        self._added: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Make `entry` available under `name`.

        Raises:
            UsageError: the name is taken.
        """
        if name in self.own or self._added.get(name, entry) is not entry:
            raise UsageError(f"the {self.what} {name!r} exists already")
        self._added[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Forget an entry that `add` made; nothing if there is none."""
        self._added.pop(name, None)

    def names(self) -> list[str]:
        """All names, without importing what they stand for."""
        return sorted({*self.own, *self._added, *self._foreign()})

    def __contains__(self, name: str | None) -> bool:
        """Whether `find` knows the name; looks among installed packages only where nothing nearer has it."""
        return name in self.own or name in self._added or name in self._foreign()

    def find(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            UnknownNameError: there is none; lists those that exist.
            UsageError: an installed package offers it, but it cannot be imported.
        """
        if name in self._added:
            return self._added[name]
        if name in self.own:
            module, _, attribute = self.own[name].partition(":")
            return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return] # of kind T
        foreign = self._foreign()
        if name not in foreign:
            unknown = UnknownNameError(self.what, name, self.names())
            offered = f"if a package offers it (entry points {self.entry_points!r}), install that package here"
            unknown.hint = f"{unknown.hint}; {offered}" if unknown.hint else offered
            raise unknown
        try:
            loaded: T = foreign[name].load()
        except Exception as error:  # a foreign package's code runs here
            reason = on_one_line(error, 200)
            raise UsageError(
                f"the {self.what} {name!r} of {foreign[name].value} cannot be imported: {reason}"
            ) from error
        self._added[name] = loaded
        return loaded

    def versions(self) -> dict[str, str]:
        """What tells one version of each entry of other packages from another, without importing them."""
        return {name: f"{point.value} {_version(point)}" for name, point in sorted(self._foreign().items())}

    def _foreign(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in importlib.metadata.entry_points(group=self.entry_points)}


def _version(point: importlib.metadata.EntryPoint) -> str:
    """Of the package that offers it; where its files are edited in place, also of the file."""
    version = "" if point.dist is None else point.dist.version
    for folder in sys.path:
        for tail in (".py", "/__init__.py"):
            file = Path(folder, point.module.replace(".", "/") + tail)
            if file.is_file():
                return f"{version} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    return version
