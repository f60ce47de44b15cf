"""Which Python files make a user's network, and how are they run? The file itself, and what of the user's it imports.

As for a script, the folder of the file is the first place where its imports are looked for; the others are Python's
own (PYTHONPATH), where installed packages do not count. Imports are found by reading the code, not by running it: a
name that the code puts together when it runs is not found.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_NEVER_LOCAL = frozenset({"ptsim", "torch", *sys.stdlib_module_names})


def source_files(file: Path) -> dict[str, Path]:
    """The file and the user's modules that it imports, directly or not, by their paths below the folder of each.

    A module that is called as one of Python's, torch or ptsim does not count, nor does an installed one.
    """
    found: dict[str, Path] = {}
    waiting = [file.name]
    while waiting:
        name = waiting.pop()
        path = file.parent / name
        if not os.path.isfile(path):
            path = _elsewhere(name) or path
        if name in found or not os.path.isfile(path):
            continue
        found[name] = path
        for module in _imported(path, name):
            first = module.partition(".")[0]
            if first not in _NEVER_LOCAL:
                parts = module.split(".")
                waiting += [f"{'/'.join(parts)}.py"]
                waiting += [f"{'/'.join(parts[:n])}/__init__.py" for n in range(1, len(parts) + 1)]
    return found


def _elsewhere(name: str) -> Path | None:
    """The file `name` below one of the folders that Python looks through, unless it belongs to an installed package."""
    for folder in map(os.path.realpath, sys.path):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return None if _lies_installed(path) else Path(path)
    return None


def digest(file: Path | None) -> str | None:
    """Digest of the file and what of the user's it imports; None where there is no such file."""
    if file is None or not os.path.isfile(file):
        return None
    own = hashlib.sha256(file.read_bytes()).hexdigest()
    others = {name: path for name, path in source_files(file).items() if path != file}
    if not others:
        return own
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in sorted(others.items())]
    return hashlib.sha256("".join([own, "\n", *lines]).encode()).hexdigest()


@contextlib.contextmanager
def importing_beside(file: Path) -> Iterator[None]:
    """Inside, imports find the modules beside `file` first, as they are now; nothing is written beside them.

    What was loaded under the same names, from an older content or another folder, is in its place again afterwards.
    """
    folder = str(file.parent.resolve())
    beside = [name for name, path in source_files(file).items() if path == file.parent / name]
    local = {name.partition("/")[0].removesuffix(".py") for name in beside} - _NEVER_LOCAL
    aside = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in local and not _is_installed(module)
    }
    for name in aside:
        del sys.modules[name]
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    writes_nothing, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_nothing
        sys.path.remove(folder)
        again = {name.partition(".")[0] for name in aside}
        for name in [name for name in sys.modules if name.partition(".")[0] in again]:
            del sys.modules[name]
        sys.modules.update(aside)


def _imported(path: Path, name: str) -> Iterator[str]:
    """Full names of what a module's code may import, whether or not they are modules."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # who runs the file says so
        return
    package = name.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            if parts:
                yield ".".join(parts)
            yield from (".".join([*parts, alias.name]) for alias in node.names if alias.name != "*")


def _is_installed(module: ModuleType) -> bool:
    """Whether it belongs to Python or to an installed package; what is built in has no place."""
    file = getattr(module, "__file__", None)
    places = [os.path.realpath(place) for place in ([file] if file else getattr(module, "__path__", ()))]
    return all(map(_lies_installed, places))


def _lies_installed(path: str) -> bool:
    """Whether a file is Python's or a package's, of whichever installation: this one, its base, or the user's own."""
    roots = tuple(os.path.realpath(sysconfig.get_path(kind)) + os.sep for kind in ("stdlib", "purelib", "platlib"))
    return path.startswith(roots) or not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)
