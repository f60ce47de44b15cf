"""Where else can the numbers of an epoch be seen? Loggers mirror the trace, which stays the record.

A logger of another package is a function from the run's folder to a `Logger`:

[project.entry-points."ptsim.loggers"]
mine = "my_package.logs:Mine"
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ptsim.errors import UsageError, on_one_line
from ptsim.network import Network
from ptsim.textfile import write_whole
from ptsim.trace.schema import AnyRecord, Architecture, Epoch, Run
from ptsim.training.registries import LOGGERS

_NO_SCALARS = ("type", "epoch", "densities", "channel_maxima")
_LONGEST_PARAMETER = 500  # characters of a hyper-parameter that MLflow keeps


class Logger(Protocol):
    """Takes over what the trace says of every epoch."""

    def begin(self, run: Run, first_epoch: int) -> None:
        """The run's facts; what was logged of `first_epoch` and later is of an attempt that is repeated."""

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Numbers of an epoch, by their names in the trace, such as `train_loss` and `time/forward_s`."""

    def close(self) -> None:
        """The run has ended, or is broken off; another `begin` may follow."""


class Mirror:
    """Tells loggers what is written into a trace. One that fails is dropped with a warning: training goes on."""

    def __init__(self, loggers: Sequence[str | Logger], folder: Path | None) -> None:
        """Opens nothing yet.

        Args:
            loggers: names of the registry, or loggers themselves.
            folder: of the trace.

        Raises:
            UsageError: loggers without a trace, a package that is not installed, or something that is no logger.
            UnknownNameError: no such logger.
        """
        if isinstance(loggers, str):
            raise UsageError(f"loggers is {loggers!r}, expected a list such as [{loggers!r}]")
        if loggers and folder is None:
            raise UsageError("loggers mirror the trace, and this run writes none", hint="record= names its folder")
        self._loggers: list[Logger] = []
        for logger in loggers:
            made = LOGGERS.find(logger)(folder) if isinstance(logger, str) and folder is not None else logger
            if isinstance(made, str) or not all(hasattr(made, name) for name in ("begin", "log", "close")):
                raise UsageError(f"a {type(made).__name__} is no logger: it needs begin, log and close")
            self._loggers.append(made)
        self._networks: dict[str, Network] = {}
        self._open = False

    def begin(self, run: Run, first_epoch: int, networks: Mapping[str, Network]) -> None:
        """A trace begins, or goes on with `first_epoch`."""
        self._networks, self._open = dict(networks), True
        self._tell("begin", run, first_epoch)

    def write(self, record: AnyRecord) -> None:
        """A record has been written into the trace."""
        if isinstance(record, Run):
            self.begin(record, 0, {})
        elif isinstance(record, Architecture):
            self._networks[record.id] = record.network
        elif isinstance(record, Epoch):
            self._tell("log", record.epoch, scalars(record, self._networks.get(record.architecture)))

    def close(self) -> None:
        """The trace is closed."""
        if self._open:
            self._open = False
            self._tell("close")

    def _tell(self, method: str, *arguments: Any) -> None:
        for logger in list(self._loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # a foreign package's code; hours of training must not end by it
                self._loggers.remove(logger)
                reason = on_one_line(error, 200) or type(error).__name__
                warnings.warn(
                    f"the logger {type(logger).__name__} failed and is dropped, the trace goes on: {reason}",
                    stacklevel=2,
                )


def scalars(epoch: Epoch, network: Network | None = None) -> dict[str, float]:
    """Every number of an epoch's record by its name in the trace, parts of parts as `time/forward_s`.

    With the network also its `parameters` and `forward_macs` per image.
    """
    found = dict(_numbers(msgspec.to_builtins(epoch), ""))
    if network is not None:
        found |= {"parameters": float(network.num_parameters), "forward_macs": float(network.forward_macs)}
    return found


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if not prefix and name in _NO_SCALARS:
            continue
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


class Csv:
    """`epochs.csv` in the run's folder: one line an epoch, one column a number."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written yet."""
        self.path = folder / "epochs.csv"
        self._rows: list[dict[str, Any]] = []

    def begin(self, run: Run, first_epoch: int) -> None:
        """Keep the lines of earlier epochs."""
        self._rows = []
        if first_epoch and self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < first_epoch]

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the file anew, with one line more."""
        self._rows.append({"epoch": epoch, **values})
        text = io.StringIO()
        columns = dict.fromkeys(name for row in self._rows for name in row)
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_whole(self.path, text.getvalue())

    def close(self) -> None:
        """Nothing is open."""


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder."""

    def __init__(self, folder: Path) -> None:
        """Looks for the package.

        Raises:
            UsageError: it is not installed.
        """
        with _needed("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._folder = folder / "tensorboard"
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def begin(self, run: Run, first_epoch: int) -> None:
        """Open a file; steps of an attempt that is repeated are hidden."""
        self.close()
        self._writer = self._make(self._folder, purge_step=first_epoch)
        self._writer.add_text("hyperparameters", json.dumps(run.hyperparameters, default=str, indent=1))

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """One point for each number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Wandb:
    """A Weights & Biases run in `wandb/` of the run's folder; offline unless the variable WANDB_MODE says otherwise."""

    def __init__(self, folder: Path) -> None:
        """Looks for the package.

        Raises:
            UsageError: it is not installed.
        """
        with _needed("wandb"):
            import wandb
        self._wandb: Any = wandb
        self._folder = folder
        self._run: Any = None

    def begin(self, run: Run, first_epoch: int) -> None:
        """Open a run; one that goes on is another run of the same group."""
        self.close()
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ptsim"),
            group=self._folder.name,
            dir=str(self._folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=run.hyperparameters | {"model": run.model, "dataset": run.dataset.name},
            settings=self._wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
        )

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """One step."""
        self._run.log(dict(values), step=epoch)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Mlflow:
    """An MLflow run in `mlruns/` of the run's folder, or where the variable MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path) -> None:
        """Looks for the package.

        Raises:
            UsageError: it is not installed.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        with _needed("mlflow"):
            from mlflow import MlflowClient
        self._make = MlflowClient
        self._uri = os.environ.get("MLFLOW_TRACKING_URI")
        if self._uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a plain folder needs MLflow's consent
            self._uri = (folder.resolve() / "mlruns").as_uri()
        self._folder = folder
        self._client: Any = None
        self._id: str | None = None

    def begin(self, run: Run, first_epoch: int) -> None:
        """Open a run; one that goes on is another run of the same name."""
        self.close()
        self._client = self._make(tracking_uri=self._uri)
        self._id = self._client.create_run("0", run_name=self._folder.name).info.run_id
        for name, value in (run.hyperparameters | {"model": run.model, "dataset": run.dataset.name}).items():
            self._client.log_param(self._id, name, str(value)[:_LONGEST_PARAMETER])

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """One step."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=epoch)

    def close(self) -> None:
        """Finish the run."""
        if self._id is not None:
            self._client.set_terminated(self._id)
            self._id = None


@contextlib.contextmanager
def _needed(package: str) -> Iterator[None]:
    """Turns a missing package into a sentence; extra and logger are called alike."""
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"the logger {package} needs the package {package}", hint=f"pip install 'ptsim[{package}]'"
        ) from error
