from __future__ import annotations

import msgspec
import pytest

from ptsim.network import Layer, LayerKind, Parameter, Precision
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


@pytest.mark.parametrize(
    ("op", "shape", "folded", "image"),
    [
        ("conv2d", (8, 4, 4), 1, (8, 4, 4)),
        ("conv2d", (3, 8, 4, 4), 3, (8, 4, 4)),  # three patches
        ("conv_transpose2d", (5, 3, 8, 4, 4), 15, (8, 4, 4)),
        ("conv1d", (8, 16), 1, (8, 16)),
        ("conv1d", (3, 8, 16), 3, (8, 16)),
        ("conv3d", (8, 2, 4, 4), 1, (8, 2, 4, 4)),
        ("conv3d", (3, 8, 2, 4, 4), 3, (8, 2, 4, 4)),
    ],
)
def test_what_is_folded_into_the_mini_batch_of_a_convolution_is_told_from_its_images(
    op: str, shape: tuple[int, ...], folded: int, image: tuple[int, ...]
) -> None:
    layer = msgspec.structs.replace(residual_network().layers[0], op=op)
    assert layer.unfolded(shape) == (folded, image)


def test_activations_are_half_as_big_under_autocast() -> None:
    assert [precision.activation_bytes for precision in Precision] == [4, 4, 2, 2]


def test_a_network_survives_json() -> None:
    network = residual_network()
    assert msgspec.json.decode(msgspec.json.encode(network), type=type(network)) == network


def test_what_grows_with_the_mini_batch_and_what_does_not() -> None:
    layer = Layer(
        name="l",
        kind=LayerKind.CONV,
        op="conv2d",
        in_channels=2,
        out_channels=5,
        input_shapes=((2, 3), (5,)),
        output_shape=(5, 3),
        shared_inputs=(1,),
        saved_elements=10,
        saved_other_bytes=3,
        saved_fixed_bytes=5,
    )
    assert layer.input_sizes(4) == (4 * 6, 5)  # the second one is all images'
    assert layer.saved_bytes(4, 2) == 4 * (10 * 2 + 3) + 5
    assert msgspec.structs.replace(layer, once=True).saved_bytes(4, 2) == 10 * 2 + 3 + 5
    assert not layer.is_removed
    assert msgspec.structs.replace(layer, output_shape=(0, 3)).is_removed


def test_a_parameter_that_no_layer_uses_is_counted_and_never_reduced() -> None:
    network = residual_network((4,), (0,), input_shape=(3, 8, 8))
    unused = Parameter(name="unused", layer="", shape=(7, 2))
    more = msgspec.structs.replace(network, parameters=(*network.parameters, unused))
    learnt = 4 * 3 * 9 + 2 * 4 + 10 * 4 + 10  # the stem, its BatchNorm, the linear layer
    assert (more.num_parameters, more.num_learnt, more.gradient_bytes) == (learnt + 14, learnt, 4 * learnt)
    assert more.gradients == network.parameters


def test_a_layer_that_only_training_runs_is_no_part_of_inference() -> None:
    network = residual_network((4,), (0,), input_shape=(3, 8, 8))
    layers = [msgspec.structs.replace(layer, training_only=layer.name == "fc") for layer in network.layers]
    assert msgspec.structs.replace(network, layers=tuple(layers)).forward_macs == 8 * 8 * 4 * 3 * 9
