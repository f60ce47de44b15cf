"""Networks of a model whose channels are taken out, without tracing it anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ptsim.capture import resized
from ptsim.capture.network import capture_network
from ptsim.capture.resized import Recapture, thin_copy
from ptsim.prune.groups import find_groups
from ptsim.prune.propagate import skeleton
from ptsim.prune.reconfigure import remove_channels


class _Scaled(nn.Module):
    """Its code takes another way once its width is below 8: a trace of the wide network does not hold any more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 4, 1)
        self.narrow = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        return self.second(torch.tanh(y) if self.narrow else y).mean((2, 3))


@pytest.mark.parametrize("narrow", [False, True])
def test_a_model_is_traced_again_only_where_its_code_may_take_another_way(
    narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bones = skeleton(_Scaled())
    known = Recapture(bones, name="scaled", input_shape=(3, 8, 8), num_classes=4)
    groups = find_groups(bones, (3, 8, 8))
    sparse = torch.zeros(groups.num_components, dtype=torch.bool)
    sparse[torch.nonzero(groups.prunable).flatten()[:5]] = True
    remove_channels(bones, groups, sparse)
    bones.narrow = narrow
    traced, trace = [], resized.symbolic_graph
    monkeypatch.setattr(resized, "symbolic_graph", lambda *args: traced.append(1) or trace(*args))
    network = known.network(bones)
    assert len(traced) == (2 if narrow else 0)  # to see that it has changed, and to capture it
    captured = capture_network(thin_copy(bones), name="scaled", input_shape=(3, 8, 8), num_classes=4)
    assert network.id == captured.id
    assert network.layers == captured.layers
