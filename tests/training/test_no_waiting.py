"""The training step never waits for the device: no `.item()`, `.cpu()` or the like, but where the code says so."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptsim.training import loop
from tests.training.runs import settings

# Operators whose result the host must know, so that on a GPU the call waits for everything before it.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,  # item(), float(), bool(), tolist() of one element
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
}
COPIES = ("cpu", "tolist", "numpy")


class Waits(TorchDispatchMode):
    """Counts what would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITING:
            self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


def waits_of_an_epoch(num_iterations, monkeypatch, tmp_path, **changes):
    seen: Counter[str] = Counter()
    train_epoch = loop.train_epoch

    def watched(*args, **kwargs):
        with Waits() as waits, monkeypatch.context() as patch:
            for name in COPIES:
                original = getattr(torch.Tensor, name)

                def counted(tensor, *a, _name=name, _original=original, **k):
                    waits.seen[_name] += 1
                    return _original(tensor, *a, **k)

                patch.setattr(torch.Tensor, name, counted)
            result = train_epoch(*args, **kwargs)
        seen.update(waits.seen)
        return result

    monkeypatch.setattr(loop, "train_epoch", watched)
    chosen = settings(epochs=1, batch=4, train_limit=4 * num_iterations, interval=1) | changes
    if chosen["penalty_ratio"] == 0:
        chosen = {name: value for name, value in chosen.items() if name not in ("interval", "threshold")}
    loop.train(chosen, out=tmp_path / str(num_iterations))
    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    return seen


@pytest.mark.parametrize(
    "changes",
    [{}, {"penalty_ratio": 0.0}, {"regularizer": "proximal"}, {"ema_decay": 0.9}, {"criterion": "slimming"}],
    ids=lambda changes: "-".join(changes) or "group lasso",
)
def test_more_iterations_wait_no_more_often(changes, monkeypatch, tmp_path):
    few = waits_of_an_epoch(8, monkeypatch, tmp_path, **changes)
    many = waits_of_an_epoch(40, monkeypatch, tmp_path, **changes)
    assert many == few


def test_the_loss_is_looked_at_every_64_iterations(monkeypatch, tmp_path):
    few = waits_of_an_epoch(60, monkeypatch, tmp_path)
    many = waits_of_an_epoch(70, monkeypatch, tmp_path)
    assert sum(many.values()) == sum(few.values()) + 1


def test_an_item_in_the_step_would_be_noticed(monkeypatch, tmp_path):
    from ptsim.training import step

    before = step._Tally.add

    def with_item(self, iteration, loss, logits, labels):
        loss.item()
        before(self, iteration, loss, logits, labels)

    monkeypatch.setattr(step._Tally, "add", with_item)
    few = waits_of_an_epoch(8, monkeypatch, tmp_path)
    many = waits_of_an_epoch(40, monkeypatch, tmp_path)
    assert sum(many.values()) == sum(few.values()) + 32
