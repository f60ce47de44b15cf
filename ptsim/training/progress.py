"""What a person sees on stderr while a run trains; data never goes here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ptsim.textfile import printable
from ptsim.trace.schema import Dataset, Epoch, Reconfiguration
from ptsim.units import counted, format_shape

_T = TypeVar("_T")


class Reporter(Protocol):
    """Is told how a run goes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def begin(self, label: str, num_epochs: int, done: int, dataset: Dataset) -> None:
        """A run on `dataset` begins, or goes on after `done` epochs."""

    def track(self, batches: Iterable[_T], num_iterations: int) -> Iterator[_T]:
        """The same batches."""

    def epoch(self, record: Epoch) -> None:
        """An epoch is over."""

    def reconfigured(self, record: Reconfiguration) -> None:
        """The network has been pruned."""


class Silent:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, label: str, num_epochs: int, done: int, dataset: Dataset) -> None:
        """Nothing."""

    def track(self, batches: Iterable[_T], num_iterations: int) -> Iterator[_T]:
        """The same batches."""
        yield from batches

    def epoch(self, record: Epoch) -> None:
        """Nothing."""

    def reconfigured(self, record: Reconfiguration) -> None:
        """Nothing."""


class Bars:
    """Progress bars on a terminal; in a file or pipe one line per epoch."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._iterations = self._progress.add_task("iterations", state="", visible=False)
        self._num_epochs = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, label: str, num_epochs: int, done: int, dataset: Dataset) -> None:
        """What is trained on, and a bar of epochs; `label` may be any text, such as the name of a folder."""
        label, self._num_epochs = printable(label), num_epochs
        self._epochs = self._progress.add_task(label, total=num_epochs, completed=done, state="")
        size = format_shape(dataset.input_shape)
        self._console.print(
            f"{label}: {counted(num_epochs, 'epoch')}"
            + (f", {done} done" if done else "")
            + f"; trained on {counted(dataset.num_train, 'image')} of {size} in "
            f"{counted(dataset.num_classes, 'class', 'classes')}, validated on {dataset.num_validation:,}",
            soft_wrap=True,
        )

    def track(self, batches: Iterable[_T], num_iterations: int) -> Iterator[_T]:
        """The same batches; the bar of iterations moves in fiftieths."""
        stride = max(1, num_iterations // 50)
        self._progress.reset(self._iterations, total=num_iterations, visible=True)
        for index, batch in enumerate(batches, start=1):
            yield batch
            if index % stride == 0:
                self._progress.update(self._iterations, completed=index)

    def epoch(self, record: Epoch) -> None:
        """Advance, and say how well it goes."""
        took = "" if record.measured_time is None else f"  {record.time.wall_s:.2f} s"  # none without an update
        state = (
            f"loss {record.train_loss:.4f}  validation {record.validation_accuracy:.2%}  "
            f"sparse {record.channel_sparsity:.0%}{took}"
        )
        self._progress.update(self._epochs, completed=record.epoch + 1, state=state)
        if not self._console.is_terminal:
            self._console.print(
                f"epoch {record.epoch} ({record.epoch + 1} of {self._num_epochs})  {state}", soft_wrap=True
            )

    def reconfigured(self, record: Reconfiguration) -> None:
        """Say what went."""
        layers = f", {counted(len(record.layers_removed), 'layer')}" if record.layers_removed else ""
        batch = f", mini-batch {record.batch_after} per rank" if record.batch_after != record.batch_before else ""
        text = f"pruned {counted(record.channels_removed, 'channel')}{layers} in {record.duration_s:.2f} s{batch}"
        self._console.print(f"after epoch {record.epoch}: {text}", soft_wrap=True)
        if record.notes and record.notes[0].startswith("the network has collapsed"):
            self._console.print(f"after epoch {record.epoch}: {record.notes[0]}", soft_wrap=True, markup=False)
