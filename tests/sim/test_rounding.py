from __future__ import annotations

import pytest

from ptsim.network import LayerKind
from ptsim.sim.rounding import rounded
from tests.traces import NetworkBuilder, residual_network


def test_a_rounded_network_is_the_one_with_those_widths() -> None:
    pruned = residual_network((12, 25, 50), (2, 2, 2), inner=(11, 20, 44))
    assert rounded(pruned, 8).id == residual_network((16, 32, 56), (2, 2, 2), inner=(16, 24, 48)).id


def test_multiples_stay_as_they_are() -> None:
    network = residual_network()
    assert rounded(network, 8).id == network.id
    assert rounded(network, 1) is network


def test_image_channels_and_classes_are_not_rounded() -> None:
    network = rounded(residual_network((12, 25, 50), num_classes=10), 8)
    assert network.layers[0].in_channels == 3
    assert network.layers[-1].out_channels == 10


def test_hidden_linear_layers_are_rounded_and_flattened_maps_follow() -> None:
    def classifier(width: int, hidden: int) -> NetworkBuilder:
        net = NetworkBuilder("mlp", (3, 4, 4), 5)
        flat = net.flatten("flatten", net.relu("relu", net.conv("conv", None, width)))
        net.linear("head", net.relu("relu2", net.linear("hidden", flat, hidden)), 5)
        return net

    assert rounded(classifier(6, 30).build(), 8).id == classifier(8, 32).build().id


def test_counts_of_parameters_stay_consistent() -> None:
    network = rounded(residual_network((12, 25, 50), inner=(11, 20, 44)), 8)
    for layer in network.layers:
        owned = sum(p.num_elements for p in network.parameters if p.layer == layer.name)
        assert layer.num_parameters == owned
        if layer.kind is LayerKind.CONV:
            assert layer.out_channels % 8 == 0


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple 0"):
        rounded(residual_network(), 0)
