"""How long do the parts of the GPU campaign's pieces take that nothing predicts: starting, reading, tracing, storing?

    python analysis/gpu_parts.py PARTS.json train …      # does what `ptsim train …` does, and notes its parts

The campaign starts its trainings so. What every piece and every turn of a training has noted stands in `campaign.json`,
and `Noted` finds there what `gpu_campaign.py --plan` would else have to assume.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from processes import running_s

from ptsim.cli import main as command_line
from ptsim.errors import FileFormatError, on_one_line
from ptsim.textfile import read_bytes, write_whole
from ptsim.training import checkpoint, loop, recorder

IMAGES = 60_000  # of CIFAR-10, its validation included
_ENOUGH_IMAGES = 10_000  # of fewer the rate is that of a beginning
_ALIKE = 4.0  # so many times larger or smaller a checkpoint may be to tell how fast another is stored


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """So many of a kind took so many seconds together; `size` is their images or bytes."""

    number: int
    seconds: float
    size: int = 0


class Parts:
    """What one process has noted, by the name of the part.

    `start`: from its beginning until everything is imported. `before`: until its first epoch. `data`: images read.
    `unpacked`: the archive. `networks`: built and traced. `checkpoints` and `profiles`: of trainings.
    """

    def __init__(self) -> None:
        self.found: dict[str, Part] = {}

    def add(self, name: str, seconds: float, *, size: int = 0) -> None:
        """One more of them."""
        part = self.found.get(name, Part(number=0, seconds=0.0))
        self.found[name] = Part(number=part.number + 1, seconds=part.seconds + seconds, size=part.size + size)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """What happens inside is one more of them, if it gets to its end."""
        began_s = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began_s)

    def watch(self, owner: object, function: str, name: str, size: Callable[..., int]) -> None:
        """Every call of the function is one more of them; `size` is asked with what it gave and what it was given."""
        inside = getattr(owner, function)

        def outside(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            result = inside(*args, **kwargs)
            self.add(name, time.perf_counter() - began_s, size=size(result, *args))
            return result

        setattr(owner, function, outside)

    def until(self, owner: object, function: str, name: str) -> None:
        """From the beginning of the process to the first call of the function."""
        inside = getattr(owner, function)

        def outside(*args: Any, **kwargs: Any) -> Any:
            if name not in self.found:
                self.add(name, running_s())
            return inside(*args, **kwargs)

        setattr(owner, function, outside)


def watch_training(parts: Parts) -> None:
    """Note the parts of the training that this process does."""
    parts.watch(loop, "load_data", "data", num_images)
    parts.watch(checkpoint.Folder, "save", "checkpoints", lambda _, __, ___, *tensors: _num_bytes(tensors))
    parts.watch(recorder, "layer_profile", "profiles", lambda *_: 0)
    parts.until(loop, "train_epoch", "before")


def num_images(data: Any, *_: object) -> int:
    """All images of a data set."""
    return int(data.dataset.num_train + data.dataset.num_validation)


def _num_bytes(tensors: Iterable[Mapping[str, Any]]) -> int:
    return sum(tensor.nbytes for named in tensors for tensor in named.values())


def main() -> None:
    """Be `ptsim`, and write down the parts whatever becomes of it."""
    into, parts = Path(sys.argv[1]), Parts()
    sys.argv = ["ptsim", *sys.argv[2:]]
    parts.add("start", running_s())
    watch_training(parts)
    try:
        command_line.main()
    finally:
        with contextlib.suppress(OSError):  # the run is worth more
            write_whole(into, msgspec.json.encode(parts.found))


def read(path: Path) -> dict[str, Part]:
    """What a process has written down; nothing where it was killed before."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Part])
    return {}


class Number(NamedTuple):
    """Seconds, and where they are from."""

    seconds: float
    source: str

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.source}"


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A training's, as `campaign.json` has it."""

    run: str
    seconds: float
    parts: dict[str, Part] = {}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A piece that ran, as `campaign.json` has it; the device is a GPU."""

    piece: str
    seconds: float
    device: str | None = None
    parts: dict[str, Part] = {}
    turns: tuple[Turn, ...] = ()


class Noted:
    """What earlier calls have noted; nothing without them. A rehearsal tells what needs no GPU."""

    def __init__(self, log: Sequence[Entry] = ()) -> None:
        self._log = log
        self._turns = [turn for entry in log for turn in entry.turns]
        self._on_gpu = [turn for entry in log for turn in entry.turns if entry.device is not None]
        self._all = [*(entry.parts for entry in log), *(turn.parts for turn in self._turns)]  # of every process

    @classmethod
    def of(cls, results: Path | None) -> Noted:
        """What stands in a folder of results; nothing without one.

        Raises:
            FileFormatError: it has no `campaign.json`, or none that can be read.
        """
        if results is None:
            return cls()
        path = results / "campaign.json"
        try:
            return cls(msgspec.json.decode(read_bytes(path), type=list[Entry]))
        except msgspec.MsgspecError as error:
            raise FileFormatError(path, f"is no log of the campaign: {on_one_line(error)}") from error

    def taken(self, piece: str) -> str:
        """What a piece has taken in all calls, in words, and which parts of it are known."""
        own = [entry for entry in self._log if entry.piece == piece]
        if not own:
            return "nothing yet"
        seconds: dict[str, float] = {}
        for entry in own:
            for name, part in entry.parts.items():
                seconds[name] = seconds.get(name, 0.0) + part.seconds
        for turn in (turn for entry in own for turn in entry.turns):
            seconds["turns"] = seconds.get("turns", 0.0) + turn.seconds
            for name in ("before", "epochs", "checkpoints", "profiles"):
                seconds[name] = seconds.get(name, 0.0) + (turn.parts[name].seconds if name in turn.parts else 0.0)
        known = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if value >= 0.5)
        calls = "1 call" if len(own) == 1 else f"{len(own)} calls"
        return f"{sum(entry.seconds for entry in own):.0f} s in {calls} ({known or 'no parts noted'})"

    def start(self) -> Number | None:
        """Of a process, until everything is imported."""
        found = [parts["start"].seconds for parts in self._all if "start" in parts]
        return _median([seconds for seconds in found if seconds], "processes")

    def reading(self) -> Number | None:
        """Of all images."""
        found = [parts["data"] for parts in self._all if "data" in parts]
        return _median([IMAGES * part.seconds / part.size for part in found if part.size >= _ENOUGH_IMAGES], "times")

    def turn(self) -> Number | None:
        """Of a training before its first epoch: on a GPU all of it, else its start and the images."""
        whole = [
            turn.parts["before"].seconds
            for turn in self._on_gpu
            if "before" in turn.parts and turn.parts["data"].size >= _ENOUGH_IMAGES
        ]
        if whole:
            return _median(whole, "turns on the GPU")
        start, reading = self.start(), self.reading()
        if start is None or reading is None:
            return None
        without = "measured without a GPU, whose context and choice of kernels is not in it"
        return Number(start.seconds + reading.seconds, without)

    def checkpoint(self, num_bytes: float) -> Number | None:
        """Of one that large, at the rate of those whose size is nearest, if it is anything like it."""
        rates = [
            (max(mean / num_bytes, num_bytes / mean), part.seconds / part.size)
            for turn in self._turns
            if (part := turn.parts.get("checkpoints")) is not None and (mean := part.size / part.number)
        ]
        if not rates or min(rates)[0] > _ALIKE:
            return None
        return Number(min(rates)[1] * num_bytes, "measured")

    def profile(self) -> Number | None:
        """Of an architecture, on a GPU."""
        found = [turn.parts["profiles"] for turn in self._on_gpu if "profiles" in turn.parts]
        return _median([part.seconds / part.number for part in found], "turns on the GPU")


def _median(values: Sequence[float], of: str) -> Number | None:
    return Number(statistics.median(values), f"measured ({of}: {len(values)})") if values else None


if __name__ == "__main__":
    main()
