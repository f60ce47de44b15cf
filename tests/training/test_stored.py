"""Where an optimizer's state goes when it comes back, with weights on a device that the state was not stored from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ptsim
from ptsim.errors import UsageError
from ptsim.training.stored import full_state, load_full_state, load_optimizer

STATE = {"optimizer/weight/step": torch.tensor(5.0), "optimizer/weight/exp_avg": torch.ones(2, 3)}


@pytest.mark.parametrize(("form", "there"), [(None, "cpu"), ("fused", "meta"), ("capturable", "meta")])
def test_an_updates_number_goes_where_the_form_of_the_optimizer_reads_it(form: str | None, there: str) -> None:
    network = nn.Linear(3, 2, bias=False, device="meta")
    optimizer = torch.optim.Adam(network.parameters())
    if form is not None:
        optimizer.param_groups[0][form] = True
    load_optimizer(network, optimizer, STATE, {})
    state = optimizer.state[network.weight]
    assert state["step"].device.type == there
    assert state["exp_avg"].device.type == "meta"
    assert state["exp_avg"].shape == (2, 3)


def test_each_group_has_its_own_form() -> None:
    network = nn.Linear(3, 2, device="meta")
    optimizer = torch.optim.Adam([{"params": [network.weight]}, {"params": [network.bias]}])
    optimizer.param_groups[1]["fused"] = True
    load_optimizer(network, optimizer, STATE | {"optimizer/bias/step": torch.tensor(5.0)}, {})
    assert optimizer.state[network.weight]["step"].device.type == "cpu"
    assert optimizer.state[network.bias]["step"].device.type == "meta"


def test_a_form_that_comes_with_the_state_is_known_before_its_numbers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(**form: Any) -> tuple[nn.Module, torch.optim.Optimizer, ptsim.PruneTrain]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **form)
        return model, optimizer, ptsim.PruneTrain(model, optimizer, input_shape=(3, 8, 8), interval=9)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: ptsim.PruneTrain) -> None:
        loss = nn.functional.cross_entropy(model(torch.ones(2, 3, 8, 8)), torch.arange(2))
        optimizer.zero_grad()
        loss.backward()
        pruner.step(loss)
        optimizer.step()

    model, optimizer, pruner = begun(fused=True)
    step(model, optimizer, pruner)
    pruner.end_epoch()
    other, resumed, again = begun()
    fused: list[Any] = []
    real = load_optimizer

    def seen(network: nn.Module, optimizer: torch.optim.Optimizer, *given: Any) -> None:
        fused.append(optimizer.param_groups[0]["fused"])
        real(network, optimizer, *given)

    monkeypatch.setattr("ptsim.training.stored.load_optimizer", seen)
    again.load_state_dict(pruner.state_dict())
    assert fused == [True]
    step(model, optimizer, pruner)
    step(other, resumed, again)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


class Counting(nn.Conv2d):
    """Keeps a number of its own in the state, as a dict or as a tensor."""

    def __init__(self, extra: Any) -> None:
        super().__init__(3, 4, 1)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_an_extra_state_is_stored_if_it_is_a_tensor_and_refused_in_a_sentence_otherwise() -> None:
    model, fresh = Counting({"calls": 3}), Counting(torch.tensor(0))
    with pytest.raises(UsageError, match=r"_extra_state in the state of this Counting is a dict, no tensor"):
        full_state(model)
    model.extra = torch.tensor(3)
    load_full_state(fresh, full_state(model))
    assert int(fresh.extra) == 3
