"""A folder with a file per rank: whoever reads it takes every one for a rank of the same job."""

from __future__ import annotations

import re
from pathlib import Path

from ptsim.errors import UsageError


def check_no_other_ranks(folder: Path, name: str, ranks: int) -> None:
    """Look for files that an earlier, larger job has left.

    Args:
        folder: that is written into; it need not exist.
        name: of a rank's file, with `*` for the rank.
        ranks: of the job; they count from 0.

    Raises:
        UsageError: there is one.
    """
    pattern = re.compile(re.escape(name).replace(r"\*", "([0-9]+)"))
    matches = [match for file in folder.glob(name) if (match := pattern.fullmatch(file.name))]
    found = [match[0] for match in matches if int(match[1]) >= ranks]
    if found:
        problem = f"{folder} holds {min(found)} of an earlier job of more ranks"
        raise UsageError(problem, hint="name another folder, or empty this one")
