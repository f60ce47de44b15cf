from __future__ import annotations

import msgspec
import pytest

from ptsim.network import LayerKind, Precision
from tests.traces import residual_network


def test_resnet20_has_the_published_number_of_parameters() -> None:
    # 269,722 with parameter-free short-cuts (the well-known CIFAR ResNet-20), plus two 1×1 projections with BatchNorm.
    assert residual_network(blocks=(3, 3, 3)).num_parameters == 269_722 + (16 * 32 + 64) + (32 * 64 + 128)


def test_forward_macs_count_products_only() -> None:
    network = residual_network((16,), (0,), input_shape=(3, 8, 8), num_classes=10)
    # the stem's 3×3 convolution at 8×8, and the linear layer; BatchNorm and pooling multiply nothing that counts
    assert network.forward_macs == 8 * 8 * 16 * 3 * 9 + 16 * 10


def test_the_id_does_not_depend_on_the_name() -> None:
    assert residual_network(name="a").id == residual_network(name="b").id


def test_the_id_depends_on_the_content() -> None:
    network = residual_network()
    other_input = residual_network(input_shape=(3, 16, 16))
    reordered = msgspec.structs.replace(network, parameters=network.parameters[::-1])
    assert len({network.id, residual_network((15, 32, 64)).id, other_input.id, reordered.id}) == 4


def test_the_id_is_16_hexadecimal_digits() -> None:
    identity = residual_network().id
    assert len(identity) == 16
    int(identity, 16)


def test_a_layer_is_found_by_name() -> None:
    assert residual_network().layer("layer2.0.conv1").stride == (2, 2)
    with pytest.raises(KeyError):
        residual_network().layer("layer9")


def test_elements_are_counted_per_image() -> None:
    add = residual_network().layer("layer1.0.add")
    assert add.kind is LayerKind.ELEMENTWISE
    assert add.input_elements == 2 * 16 * 32 * 32
    assert add.output_elements == 16 * 32 * 32


def test_activations_are_half_as_big_under_autocast() -> None:
    assert [precision.activation_bytes for precision in Precision] == [4, 4, 2, 2]


def test_a_network_survives_json() -> None:
    network = residual_network()
    assert msgspec.json.decode(msgspec.json.encode(network), type=type(network)) == network
