"""Which cost model computed a number? A digest of everything that projections depend on: its code and its data.

A stored result is today's only if the model that computed it is. The package's version does not tell: it changes with
releases, the model with commits.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from ptsim.costs.algorithms import ALGORITHMS
from ptsim.costs.tiers import TIERS
from ptsim.criteria import CRITERIA
from ptsim.optimizers import OPTIMIZERS

_PACKAGE = Path(__file__).parents[1]
# What a projection runs through; the catalog and the fitted constants are files of these packages.
_PARTS = (
    "costs", "sim", "hardware", "trace", "criteria.py", "network.py", "operators.py", "optimizers.py", "setting.py",
    "units.py",
)  # fmt: skip
_SUFFIXES = (".py", ".toml")


@functools.cache
def model_revision() -> str:
    """The digest of the installed cost model, computed once a process."""
    return revision_of(_PACKAGE)


def foreign_rows() -> tuple[dict[str, str], ...]:
    """What other packages add to the model, by name and version: optimizers, criteria, tiers, all-reduce algorithms."""
    return tuple(registry.versions() for registry in (OPTIMIZERS, CRITERIA, TIERS, ALGORITHMS))


def revision_of(package: Path) -> str:
    """The digest of the cost model in the folder `package`: names and contents of its files, in order."""
    digest = hashlib.sha256()
    for part in _PARTS:
        root = package / part
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES)
        for path in files:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]
