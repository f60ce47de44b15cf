"""How much of a layer is left: inputs, outputs and single weights counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptsim.capture.network import capture_network
from ptsim.errors import UsageError
from ptsim.prune.density import channel_maxima, checked_threshold, dense_counts, layer_densities
from ptsim.trace.schema import gone_share
from ptsim.trace.trace import product_sizes


def holding(layer: nn.Module, weight: list[list[float]]) -> nn.Module:
    """A network of one layer in float64 with this weight, whose kernel has one element."""
    layer.double()
    values = torch.tensor(weight, dtype=torch.float64)
    with torch.no_grad():
        layer.get_parameter("weight").copy_(values.view(layer.get_parameter("weight").shape))
    return nn.ModuleDict({"layer": layer})


# Layer, weight, and by hand: the inputs, outputs and weights that reach 1e-4, of how many, and each output's largest.
LAYERS: dict[str, tuple[Callable[[], nn.Module], list[list[float]], list[int], list[float]]] = {
    # rows are outputs, columns inputs; exactly the threshold counts, also with a minus
    "linear": (lambda: nn.Linear(4, 3), [[1, 0, 0, 0], [1e-4, 0, 0, -1e-4], [0, -0.9e-4, 0, 0]], [2, 4, 2, 3, 3, 12],
               [1, 1e-4, 0.9e-4]),
    # outputs 0 and 1 read inputs 0 and 1, outputs 2 and 3 read inputs 2 and 3
    "grouped": (lambda: nn.Conv2d(4, 4, 1, groups=2), [[1, 0], [2, 0], [0, 0], [0, 5]], [2, 4, 3, 4, 3, 8],
                [1, 2, 0, 5]),
    # rows are inputs, columns outputs
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 1), [[1, 0, 0], [-2, 0, 0]], [2, 2, 1, 3, 2, 6], [2, 0, 0]),
    # inputs 0 and 1 make outputs 0, 1 and 2; inputs 2 and 3 make outputs 3, 4 and 5
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 1, groups=2),
                            [[1, 0, 0], [0, 0, 0], [0, 7, 0], [0, 8, 0]], [3, 4, 2, 6, 3, 12], [1, 0, 0, 0, 8, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_what_reaches_the_threshold_is_counted_by_hand(name: str) -> None:
    make, weight, (inputs, of_inputs, outputs, of_outputs, weights, of_weights), maxima = LAYERS[name]
    model = holding(make(), weight)
    (found,) = layer_densities(model)
    assert (found.input_channels, found.output_channels, found.weights) == pytest.approx(
        (inputs / of_inputs, outputs / of_outputs, weights / of_weights)
    )
    assert dense_counts(model) == (outputs, weights)
    assert dense_counts(model, 0.0) == (of_outputs, of_weights)
    assert channel_maxima(model) == {"layer": tuple(maxima)}


def test_the_kernels_elements_belong_to_one_channel_and_biases_to_none() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[[0.0, 0.0], [0.0, 3.0]]], [[[0.0, 0.0], [0.0, 0.0]]]]))
        model[2].weight.zero_()
    assert dense_counts(model) == (1, 1)
    assert [(d.layer, d.output_channels, d.weights) for d in layer_densities(model)] == [("0", 0.5, 1 / 8), ("2", 0, 0)]


def test_what_is_gone_is_a_share_of_what_there_was() -> None:
    assert gone_share(6, 8) == 0.25
    assert gone_share(0, 0) == 0.0  # a network whose weights are in no layer of torch
    assert gone_share(9, 8) == 0.0  # one that another library has widened


class Counted(nn.Module):
    """A grouped, a shared and a transposed convolution, and layers that are none of these."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.again = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Conv3d(1, 2, (2, 1, 3))
        self.fc = nn.Linear(2, 3)
        self.pairs = nn.Bilinear(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.again(self.again(self.grouped(x)))))
        y = self.fc(self.deep(x[:, None]).mean((2, 3, 4)))
        out: Tensor = self.pairs(y, y)
        return out


@pytest.mark.slow
def test_a_plan_counts_the_channels_and_weights_that_a_run_records() -> None:
    """By hand: 8·2·9 weights of 8 channels, 8·8 of 8, 8·2·4 of 4, 2·1·6 of 2, and 2·3 of 3."""
    model = Counted()
    network = capture_network(model, name="counted", input_shape=(4, 4, 4), num_classes=3)
    assert product_sizes(network) == dense_counts(model, 0.0) == (25, 290)


@pytest.mark.parametrize("wrong", [0.0, -1e-4, math.inf, math.nan])
def test_a_threshold_is_a_finite_number_above_nothing(wrong: float) -> None:
    with pytest.raises(UsageError, match="expected a finite number above 0"):
        checked_threshold(wrong)
    assert checked_threshold(1e-30) == 1e-30
