"""Loggers mirror the trace: what they hold is read back by the packages' own readers."""

import csv
import gc
import glob
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ptsim
from ptsim.errors import UnknownNameError, UsageError
from ptsim.training.config import make_config
from ptsim.training.registries import LOGGERS
from tests.training.nets import small
from tests.training.runs import settings

pytestmark = pytest.mark.filterwarnings("ignore:the network has collapsed:UserWarning")


class Kept:
    def __init__(self, folder=None, *, fails=False):
        self.calls, self.fails = [], fails

    def begin(self, run, first_epoch):
        self.calls.append(("begin", run.model, first_epoch))

    def log(self, epoch, values):
        if self.fails:
            raise OSError("no room\nleft")
        self.calls.append((epoch, dict(values)))

    def close(self):
        self.calls.append("close")


def run(folder, loggers, *, epochs=2, state=None, close=True):
    torch.manual_seed(0)
    model = small(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = ptsim.PruneTrain(
        model, optimizer, input_shape=(3, 8, 8), penalty_ratio=0.5, interval=1, threshold=0.12, record=folder,
        loggers=loggers,
    )  # fmt: skip
    if state is not None:
        pruner.load_state_dict(state)
    for _ in range(epochs):
        loss = F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        pruner.step(loss)
        optimizer.step()
        pruner.end_epoch(validation_accuracy=0.5)
    state = pruner.state_dict()
    if close:
        pruner.close()
    return state


def test_a_logger_gets_every_number_of_every_epoch_and_a_run_that_goes_on_repeats_none(tmp_path):
    first, second = Kept(), Kept()
    state = run(tmp_path, [first], close=False)
    gc.collect()
    run(tmp_path, [second], epochs=1, state=state)
    trace = ptsim.read_trace(tmp_path)
    assert [call[0] for call in first.calls[:3]] == ["begin", 0, 1]
    assert second.calls[0] == ("begin", "Small", 2)
    assert second.calls[1][0] == 2
    assert second.calls[-1] == "close"
    for epoch, (_, values) in zip(trace.epochs, [*first.calls[1:3], second.calls[1]], strict=True):
        assert values["train_loss"] == epoch.train_loss
        assert values["time/forward_s"] == epoch.time.forward_s
        assert values["parameters"] == trace.network_of(epoch).num_parameters
        assert not {"epoch", "train_accuracy"} & values.keys()  # the step's own number, and one that nobody measured


def test_csv_has_one_line_an_epoch_also_after_a_repeated_one(tmp_path):
    state = run(tmp_path, ["csv"], epochs=1, close=False)
    gc.collect()
    run(tmp_path / "other", ["csv"], epochs=1)
    with open(tmp_path / "epochs.csv", "a") as file:
        file.write("1,9,9\n")  # of an attempt that came no further
    run(tmp_path, ["csv"], epochs=2, state=state)
    rows = list(csv.DictReader((tmp_path / "epochs.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    losses = [epoch.train_loss for epoch in ptsim.read_trace(tmp_path).epochs]
    assert [float(row["train_loss"]) for row in rows] == losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_reads_the_losses(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, ["tensorboard"])
    events = accumulator.EventAccumulator(glob.glob(f"{tmp_path}/tensorboard/*")[0]).Reload()
    losses = [epoch.train_loss for epoch in ptsim.read_trace(tmp_path).epochs]
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [
        (0, pytest.approx(losses[0])),
        (1, pytest.approx(losses[1])),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_shows_a_repeated_epoch_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger, run = LOGGERS.find("tensorboard")(tmp_path), SimpleNamespace(hyperparameters={})
    for first_epoch, losses in ((0, [4.0, 3.0, 2.0]), (1, [2.5, 1.5])):
        logger.begin(run, first_epoch)
        for epoch, loss in enumerate(losses, start=first_epoch):
            logger.log(epoch, {"train_loss": loss})
    logger.close()
    events = accumulator.EventAccumulator(f"{tmp_path}/tensorboard").Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(0, 4.0), (1, 2.5), (2, 1.5)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow")
def test_mlflow_reads_the_losses_from_its_local_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run(tmp_path, ["mlflow"])
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (logged,) = client.search_runs(["0"])
    assert logged.info.status == "FINISHED"
    history = client.get_metric_history(logged.info.run_id, "train_loss")
    losses = [epoch.train_loss for epoch in ptsim.read_trace(tmp_path).epochs]
    assert [(m.step, m.value) for m in history] == [(0, losses[0]), (1, losses[1])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_wandb_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run(tmp_path, ["wandb"])
    (file,) = glob.glob(f"{tmp_path}/wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # its service is a process of its own, which writes when it comes to it
    while b"train_loss" not in Path(file).read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"train_loss" in Path(file).read_bytes()


def test_a_logger_that_fails_is_dropped_and_the_trace_goes_on(tmp_path):
    failing, other = Kept(fails=True), Kept()
    with pytest.warns(UserWarning, match="the logger Kept failed and is dropped, the trace goes on: no room left"):
        run(tmp_path, [failing, other])
    assert len(ptsim.read_trace(tmp_path).epochs) == 2
    assert [call[0] for call in other.calls[1:3]] == [0, 1]


class Interrupted(Kept):
    """Somebody presses Ctrl-C while it sends the numbers of the second epoch."""

    def log(self, epoch, values):
        if epoch == 1:
            raise KeyboardInterrupt
        super().log(epoch, values)


def test_an_interrupt_while_a_logger_is_told_leaves_a_trace_that_can_be_read(tmp_path):
    model = small(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loop():
        with ptsim.Recorder(
            model, optimizer, input_shape=(3, 8, 8), record=tmp_path, loggers=[Interrupted()]
        ) as recorder:
            for _ in range(2):
                F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.arange(8)).backward()
                optimizer.step()
                recorder.end_epoch()

    with pytest.raises(KeyboardInterrupt):
        loop()
    trace = ptsim.read_trace(tmp_path)
    assert len(trace.epochs) == 2
    assert (trace.end.status, trace.end.epochs, trace.end.num_iterations) == ("interrupted", 2, 2)


def test_ptsim_train_takes_loggers_of_other_packages_by_name(tmp_path):
    made = Kept()
    LOGGERS.add("kept", lambda folder: made)
    try:
        ptsim.train(settings(epochs=1, profile=False) | {"loggers": ["kept", "csv"]}, out=tmp_path / "run")
    finally:
        LOGGERS.remove("kept")
    assert [call if call == "close" else call[0] for call in made.calls] == ["begin", 0, "close"]
    assert (tmp_path / "run" / "epochs.csv").is_file()


def test_misuse_is_one_sentence(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown logger 'tensorbord'"):
        make_config({"loggers": ["tensorbord"]})
    with pytest.raises(UnknownNameError, match="unknown logger 'tensorbord'"):
        run(tmp_path, ["tensorbord"])
    with pytest.raises(UsageError, match="loggers mirror the trace, and this run writes none"):
        run(None, ["csv"])
    with pytest.raises(UsageError, match="loggers is 'csv', expected a list"):
        run(tmp_path, "csv")
    with pytest.raises(UsageError, match="a dict is no logger: it needs begin, log and close"):
        run(tmp_path, [{}])
