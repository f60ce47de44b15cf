"""Which errors ptsim raises, and which of them are the user's to mend.

    PtsimError                     one sentence, optionally a remedy in `hint`
    ├── UsageError                 an argument, option or configuration value is wrong (also a ValueError)
    │   └── UnknownNameError       a name that nothing is registered under; says which names exist
    ├── FileFormatError            a file is broken: file, place, found, expected
    │   └── NewerVersionError      a file written by a newer ptsim
    ├── UnsupportedModelError      a network that cannot be traced, pruned or counted
    ├── TrainingError              training stopped: a loss that is not finite, a dead rank, a full disk
    └── MissingMeasurementError    the asked tier needs a measurement that is not there

The command line prints a `PtsimError` as one sentence and exits 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

# What torch's allocator and the system say in plain RuntimeErrors where there is no memory, for tensors or threads.
_NO_MEMORY = (
    "DefaultCPUAllocator", "Cannot allocate memory", "Resource temporarily unavailable", "can't start new thread",
)  # fmt: skip
# What torch says of a GPU, in plain RuntimeErrors too: cuDNN finds no algorithm (pytorch/pytorch#108645; before torch 2
# in other words), or a library finds no place.
_NO_GPU_MEMORY = (
    "unable to find an engine to execute this computation", "Unable to find a valid cuDNN algorithm",
    "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip


def lacks_memory(error: BaseException) -> bool:
    """Whether the machine, or a GPU, had not enough memory."""
    if isinstance(error, MemoryError) or lacks_gpu_memory(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def lacks_gpu_memory(error: BaseException) -> bool:
    """Whether something failed for want of a GPU's memory, as far as torch and its libraries tell."""
    own = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # torch is not imported here
    return isinstance(error, RuntimeError) and (own or any(words in str(error) for words in _NO_GPU_MEMORY))


def on_one_line(error: object, most: int = 300) -> str:
    """What another's error says, its lines joined and cut off after `most` characters."""
    return " ".join(str(error).split())[:most]


class PtsimError(Exception):
    """An error that a user can act on: one sentence, and a remedy where one is known."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PtsimError, ValueError):
    """A wrong argument, option or configuration value."""


class UnknownNameError(UsageError):
    """A name that nothing is registered under."""

    def __init__(
        self,
        what: str,
        name: str,
        known: Iterable[str],
        *,
        close: Sequence[str] | None = None,
        otherwise: str | None = None,
    ) -> None:
        """`what` is the kind of thing, singular and lower case ("model", "device").

        `close` are the nearest of the known names, where the caller can tell better than by their letters, and
        `otherwise` is the hint where none is near.
        """
        names = sorted(known)
        part_of = [known_name for known_name in names if len(name) > 1 and name.lower() in known_name]
        if close is None:
            close = part_of[:3] or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        shown = names if len(names) <= 40 else close or names[:40]
        listed = ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(shown) < len(names) else "")
        hint = f"did you mean {' or '.join(close)}?" if close else otherwise
        super().__init__(f"unknown {what} {name!r}; known: {listed or 'none'}", hint=hint)
        self.name = name


class FileFormatError(PtsimError):
    """A broken file: says file, place, what was found and what was expected."""

    def __init__(self, path: str | Path, problem: str, *, line: int | None = None, hint: str | None = None) -> None:
        place = f"{path}:{line}" if line is not None else str(path)
        super().__init__(f"{place}: {problem}", hint=hint)
        self.path = Path(path)
        self.line = line


class NewerVersionError(FileFormatError):
    """A file whose schema version is newer than this ptsim reads."""


class UnsupportedModelError(PtsimError):
    """A network that cannot be traced, pruned or counted; names the layer and the reason."""


class TrainingError(PtsimError):
    """Training stopped for a reason outside the code: NaN loss, dead rank, full disk."""


class MissingMeasurementError(PtsimError):
    """A measurement that the asked tier needs is not there; never papered over by a worse tier."""
