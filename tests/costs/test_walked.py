"""Footprints by rules: small networks walked forward and backward by hand."""

from __future__ import annotations

import msgspec
import pytest

from ptsim.costs.memory import iteration_memory
from ptsim.costs.walked import rescaled, walked_footprint
from ptsim.network import Footprint, Layer, LayerKind, Moment, Network
from ptsim.setting import StepSetting

# Every activation has 48 elements, 192 bytes an image in fp32; the images have 32, and 10 classes take 40 bytes twice
# as the loss, once of which `costs.memory` adds.


def layer(name: str, kind: LayerKind, *, channels: int = 3, inputs: int = 1, **changes: object) -> Layer:
    shape = (channels, 4, 4)
    plain = Layer(
        name=name,
        kind=kind,
        op={LayerKind.ELEMENTWISE: "add", LayerKind.ACTIVATION: "relu"}.get(kind, str(kind)),
        in_channels=channels,
        out_channels=channels,
        input_shapes=(shape,) * inputs,
        output_shape=shape,
    )
    return msgspec.structs.replace(plain, **changes)


def stem(channels: int = 3) -> tuple[Layer, Layer]:
    """A 3×3 convolution of the images, which it keeps, and a ReLU that keeps its own output."""
    conv = layer(
        "c",
        LayerKind.CONV,
        channels=channels,
        in_channels=2,
        input_shapes=((2, 4, 4),),
        kernel_size=(3, 3),
        num_parameters=18 * channels,
        input_needs_gradient=False,
        saved_elements=32,
    )
    relu = layer("r", LayerKind.ACTIVATION, channels=channels, saved_elements=16 * channels, output_saved=True)
    return conv, relu


def head(source: str, *, channels: int = 3, saved: int = 0) -> tuple[tuple[Layer, Layer], tuple[tuple[str, str], ...]]:
    """A view and a linear layer with 10 · 16 weights a channel and 10 biases."""
    flat = layer("f", LayerKind.RESHAPE, channels=channels, output_shape=(16 * channels,), view=True)
    linear = layer(
        "l",
        LayerKind.LINEAR,
        in_channels=16 * channels,
        out_channels=10,
        input_shapes=((16 * channels,),),
        output_shape=(10,),
        num_parameters=160 * channels + 10,
        saved_elements=saved,
    )
    return (flat, linear), ((source, "f"), ("f", "l"))


def built(layers: tuple[Layer, ...], edges: tuple[tuple[str, str], ...]) -> Network:
    return Network(name="n", input_shape=(2, 4, 4), num_classes=10, layers=layers, edges=edges, parameters=())


def chain(channels: int = 3) -> Network:
    layers, edges = head("r", channels=channels)
    return built((*stem(channels), *layers), (("c", "r"), *edges))


def moments(*rows: tuple[int, int, int]) -> tuple[Moment, ...]:
    return tuple(
        Moment(fixed_bytes=fixed, image_bytes=image, gradient_bytes=gradient) for fixed, image, gradient in rows
    )


@pytest.mark.parametrize(
    ("gpu", "half", "contiguous", "channels_last"),
    [
        # Backward begins with 192 kept and 80 of loss. Linear: gradients of the classes, 40, and of its input, 192, and
        # 1,960 of its own weights. ReLU: the gradients of its output and its input. Convolution: that of its output, 80
        # of loss, its weights' 216, and copies of its operands, 4 · (32 + 48), or of its weights.
        (
            False,
            False,
            [(0, 192 + 40 + 2 * 192, 1960), (216, 192 + 40 + 320, 1960), (1960, 192 + 40 + 40 + 192, 0)],
            [(0, 616, 1960), (1960, 464, 0), (216 + 216, 192 + 40, 1960)],
        ),
        # The same in blocks of 512: 1,960 are 4 of them, 216 one.
        (
            True,
            False,
            [(0, 616, 2048), (512, 552, 2048), (2048, 464, 0)],
            [(0, 616, 2048), (2048, 464, 0), (512 + 216, 232, 2048)],
        ),
        # Half as wide: 96 kept of the ReLU and 64 of the images, 20 of classes; copies of the weights, 108 and 980, are
        # kept from forward to backward, where that of the layer at work is there twice.
        (
            False,
            True,
            [
                (108, 64 + 96 + 40 + 2 * 96, 1960),
                (108 + 216 + 108, 64 + 96 + 40 + 160, 1960),
                (1088 + 1960 + 980, 64 + 96 + 40 + 20 + 96, 0),
            ],
            [(108, 392, 1960), (1088 + 1960 + 980, 316, 0), (108 + 216 + 108 + 216, 64 + 96 + 40, 1960)],
        ),
    ],
)
def test_the_highest_moments_of_a_chain(
    gpu: bool, half: bool, contiguous: list[tuple[int, int, int]], channels_last: list[tuple[int, int, int]]
) -> None:
    assert walked_footprint(chain(), gpu=gpu, half=half) == Footprint(
        device="gpu" if gpu else "cpu",
        half=half,
        kept_fixed_bytes=2 * (54 + 490) if half else 0,
        kept_image_bytes=(32 + 48) * (2 if half else 4),
        weight_copy_bytes=2 * (54 + 490) if half else 0,
        buffer_bytes=0,
        contiguous=moments(*contiguous),
        channels_last=moments(*channels_last),
    )


def test_a_trained_bias_beside_frozen_weights_has_a_gradient() -> None:
    """The chain's convolution with 3 biases alone to learn: 12 bytes instead of 216."""
    conv, *others = chain().layers
    conv = msgspec.structs.replace(conv, weight_needs_gradient=False, num_parameters=3)
    network = msgspec.structs.replace(chain(), layers=(conv, *others))
    found = walked_footprint(network, gpu=False, half=False)
    assert found.contiguous == moments((0, 616, 1960), (12, 552, 1960), (1960, 464, 0))


def test_a_network_without_a_footprint_is_walked() -> None:
    assert iteration_memory(chain(), StepSetting(batch=5)).activation_bytes == 5 * 320


def pointwise(name: str) -> Layer:
    """3 → 3 channels, 9 weights; what it reads is kept already. Its operands' copies take 4 · 2 · 48 bytes."""
    return layer(name, LayerKind.CONV, num_parameters=9)


def test_a_sum_hands_its_gradient_to_both_branches() -> None:
    """r → d → a ← r. Forward keeps r's and a's outputs, 384.

    When d runs backward, 192 are kept, 80 of loss are there, the sum's gradient, the new one of r, 36 of weights and
    384 of workspace. Then r has two gradients, which become one.
    """
    layers, edges = head("a", saved=48)
    total = layer("a", LayerKind.ELEMENTWISE, inputs=2, output_saved=True)
    network = built((*stem(), pointwise("d"), total, *layers), (("c", "r"), ("r", "d"), ("d", "a"), ("r", "a"), *edges))
    found = walked_footprint(network, gpu=False, half=False)
    assert found.kept_image_bytes == 128 + 2 * 192
    assert found.contiguous == moments(
        (36, 192 + 40 + 2 * 192 + 384, 1960),
        (1960, 2 * 192 + 40 + 40 + 192, 0),
        (0, 192 + 40 + 2 * 192, 1996),
        (216, 192 + 40 + 320, 1996),
    )
    assert found.channels_last == moments((1960, 656, 0), (36 + 36, 616, 1960), (0, 616, 1996), (432, 232, 1996))


def test_a_smaller_operand_of_a_sum_has_a_gradient_of_its_own() -> None:
    """r → p → a ← r, where p is a number a channel: its gradient has 12 bytes, and lies in no other.

    When p runs backward, there are its gradient and two of r, one of them the sum's, beside 192 kept and 40 of loss.
    """
    layers, edges = head("a", saved=48)
    pool = layer("p", LayerKind.POOL, output_shape=(3, 1, 1))
    total = layer("a", LayerKind.ELEMENTWISE, input_shapes=((3, 4, 4), (3, 1, 1)), output_saved=True)
    network = built((*stem(), pool, total, *layers), (("c", "r"), ("r", "p"), ("r", "a"), ("p", "a"), *edges))
    found = walked_footprint(network, gpu=False, half=False)
    assert max(moment.image_bytes for moment in found.contiguous if moment.gradient_bytes) == 192 + 40 + 2 * 192 + 12


@pytest.mark.parametrize("op", ["sub", "rsub"])
def test_a_difference_hands_its_gradient_to_one_branch_and_its_negative_to_the_other(op: str) -> None:
    """r → d → a ← r, as with the sum above, but r's and d's gradients are two tensors.

    When d runs backward, there is the new one of r, too: 192 kept, 40 of loss, three gradients, 384 of workspace.
    """
    layers, edges = head("a", saved=48)
    difference = layer("a", LayerKind.ELEMENTWISE, op=op, inputs=2, output_saved=True)
    network = built(
        (*stem(), pointwise("d"), difference, *layers), (("c", "r"), ("r", "d"), ("d", "a"), ("r", "a"), *edges)
    )
    assert walked_footprint(network, gpu=False, half=False).contiguous == moments(
        (36, 192 + 40 + 3 * 192 + 384, 1960),
        (1960, 2 * 192 + 40 + 40 + 192, 0),
        (0, 192 + 40 + 2 * 192, 1996),
        (216, 192 + 40 + 320, 1996),
    )


def test_gradients_of_two_branches_are_added_in_memory_of_their_own_where_others_read_them() -> None:
    """e + (d + r), and d and e read r: the sums' gradient belongs to d, e and r.

    After e it is read by d still, so that the sum of r's two gradients is a third tensor; when d runs backward there
    are three, 576, beside 192 kept, 40 of loss, 36 of weights and 384 of workspace.
    """
    layers, edges = head("b", saved=48)
    inner = layer("a", LayerKind.ELEMENTWISE, inputs=2)
    outer = layer("b", LayerKind.ELEMENTWISE, inputs=2, output_saved=True)
    network = built(
        (*stem(), pointwise("d"), pointwise("e"), inner, outer, *layers),
        (("c", "r"), ("r", "d"), ("r", "e"), ("d", "a"), ("r", "a"), ("e", "b"), ("a", "b"), *edges),
    )
    assert walked_footprint(network, gpu=False, half=False).contiguous == moments(
        (36, 192 + 40 + 576 + 384, 1996), (1960, 656, 0), (0, 616, 2032), (216, 552, 2032)
    )


@pytest.mark.parametrize(
    ("only", "cpu", "gpu"),
    [
        (layer("b", LayerKind.BATCH_NORM), 12 + 12 + 8, 3 * 512),  # mean, variance and the number of mini-batches
        (layer("c", LayerKind.CONV, kernel_size=(3, 3), weight_needs_gradient=False), 4 * 9 * 9, 512),
        (
            layer("c", LayerKind.CONV, channels=6, groups=2, kernel_size=(3, 3), weight_needs_gradient=False),
            4 * 9 * 6 * 3,
            1024,
        ),
        (
            layer(
                "c",
                LayerKind.CONV,
                op="conv3d",
                kernel_size=(3, 3),
                weight_needs_gradient=False,
                output_shape=(3, 2, 4, 4),
                forward_macs=9 * 27 * 32,
            ),
            4 * 9 * 27,
            1024,
        ),
        (layer("l", LayerKind.LINEAR, weight_needs_gradient=False), 4 * 9, 512),
        (
            layer("l", LayerKind.LINEAR, op="bilinear", input_shapes=((3,), (50,)), weight_needs_gradient=False),
            4 * 9 * 50,
            2048,
        ),
        (layer("c", LayerKind.CONV), 0, 0),
        (layer("r", LayerKind.ACTIVATION, weight_needs_gradient=False), 0, 0),
    ],
)
def test_buffers_are_running_statistics_and_frozen_weights(only: Layer, cpu: int, gpu: int) -> None:
    network = built((only,), ())
    found = [walked_footprint(network, gpu=on_gpu, half=False).buffer_bytes for on_gpu in (False, True)]
    assert found == [cpu, gpu]


BARE = Footprint(
    device="cpu",
    half=False,
    kept_fixed_bytes=0,
    kept_image_bytes=0,
    weight_copy_bytes=0,
    buffer_bytes=0,
    contiguous=(),
    channels_last=(),
)


def test_a_watched_footprint_grows_as_the_nearest_moment_of_the_walk() -> None:
    """From 3 to 6 channels: gradients 1,960 → 3,880, ReLU's moment 616 → 1,192, the linear layer's 464 → 848.

    What the walk has as 0 grows with the gradients, and what is kept as the walk's 320 → 512.
    """
    watched = msgspec.structs.replace(
        BARE,
        kept_fixed_bytes=50,
        kept_image_bytes=640,
        buffer_bytes=7,
        contiguous=moments((100, 2 * 616, 1960), (2 * 1960, 464, 50)),
        channels_last=moments((432, 232, 1960)),
    )
    assert rescaled(watched, chain(3), chain(6)) == msgspec.structs.replace(
        watched,
        kept_image_bytes=1024,
        contiguous=moments((198, 2 * 1192, 3880), (2 * 3880, 848, 99)),  # 100 and 50 · 3,880 / 1,960
        channels_last=moments((864, 424, 3880)),
    )


def test_gradients_and_images_count_alike_where_the_nearest_moment_is_looked_for() -> None:
    """Of the walk's 1,960 bytes of gradients and 616 an image.

    900 and 616 are 1060/1960 from ReLU's moment, and 900/1960 + 152/616 from the linear layer's; 0 and 616 are a whole
    1 from the one, and 152/616 from the other. 1,000 and 448 are 960/1960 + 24/616 = 0.529 from the view's, 1,960 and
    424, and 1000/1960 + 16/616 = 0.536 from the linear layer's, 0 and 464.
    """
    watched = msgspec.structs.replace(
        BARE, contiguous=moments((0, 616, 900), (0, 448, 1000)), channels_last=moments((0, 616, 0))
    )
    found = rescaled(watched, chain(3), chain(6))
    # 900 and 1,000 · 3,880 / 1,960; 448 · 808 / 424
    assert found.contiguous == moments((0, 1192, 1782), (0, 854, 1980))
    assert found.channels_last == moments((0, 1126, 0))  # 616 · 848 / 464


def test_copies_of_weights_and_buffers_grow_with_the_widths() -> None:
    """From 3 to 6 channels: 18 and 160 weights a channel beside 10 biases, and 8 bytes a channel beside 8."""
    narrow, wide = (
        msgspec.structs.replace(chain(channels), layers=(*chain(channels).layers, layer("b", LayerKind.BATCH_NORM)))
        for channels in (3, 6)
    )
    *layers, last = wide.layers
    wide = msgspec.structs.replace(wide, layers=(*layers, msgspec.structs.replace(last, out_channels=6)))
    watched = msgspec.structs.replace(BARE, half=True, kept_fixed_bytes=2 * 544, weight_copy_bytes=544, buffer_bytes=64)
    found = rescaled(watched, narrow, wide)
    assert found.kept_fixed_bytes == 2 * (178 * 6 + 10)
    assert found.weight_copy_bytes == 178 * 6 + 10
    assert found.buffer_bytes == 2 * (8 * 6 + 8)


def test_a_view_hands_its_gradient_on() -> None:
    """A convolution and the linear layer, which keeps what it reads, without a ReLU between them.

    The linear layer has 192 kept, 80 of loss and the gradients of the classes, 40, and of its input, 192. That one is
    the view's and the convolution's: beside it there is the loss alone.
    """
    conv, _ = stem()
    layers, edges = head("c", saved=48)
    found = walked_footprint(built((conv, *layers), edges), gpu=False, half=False)
    assert found.channels_last == moments((1960, 192 + 40 + 40 + 192, 0), (216 + 216, 192 + 40, 1960))


def test_the_gradients_of_what_was_concatenated_lie_in_that_of_the_whole() -> None:
    """Two convolutions of the images give 3 channels each: the gradient of all 6, 384, is there until both have run."""
    conv, _ = stem()
    other = msgspec.structs.replace(conv, name="d", saved_elements=0)
    both = layer("a", LayerKind.CONCAT, channels=6, input_shapes=((3, 4, 4),) * 2)
    layers, edges = head("a", channels=6, saved=96)
    network = built((conv, other, both, *layers), (("c", "a"), ("d", "a"), *edges))
    found = walked_footprint(network, gpu=False, half=False)
    assert found.channels_last == moments((4 * 970, 384 + 40 + 40 + 384, 0), (216 + 216, 384 + 40, 4 * 970 + 216))


def test_outputs_of_frozen_layers_live_until_their_last_reader() -> None:
    """A frozen convolution gives 30 channels, 1,920 bytes; a ReLU changes them in place; a pool makes 192 of them.

    Both are there while the pool runs, less the 40 that `costs.memory` adds; contiguous, 4 · (32 + 480) of copies are
    there with the 1,920 before. Backward is the linear layer's alone: 192 kept, 80 of loss, 40, and its own weights.
    """
    idle = {"input_needs_gradient": False, "weight_needs_gradient": False}
    wide = layer("c", LayerKind.CONV, channels=30, in_channels=2, input_shapes=((2, 4, 4),), kernel_size=(3, 3), **idle)
    relu = layer("r", LayerKind.ACTIVATION, channels=30, inplace=True, **idle)
    pool = layer("p", LayerKind.POOL, input_shapes=((30, 4, 4),), **idle)
    (flat, linear), edges = head("p", saved=48)
    flat, linear = (msgspec.structs.replace(one, input_needs_gradient=False) for one in (flat, linear))
    network = built((wide, relu, pool, flat, linear), (("c", "r"), ("r", "p"), *edges))
    found = walked_footprint(network, gpu=False, half=False)
    assert found.channels_last == moments((0, 1920 + 192 - 40, 0), (1960, 192 + 40 + 40, 0))
    assert found.contiguous == moments((0, 1920 + 2048 - 40, 0), (1960, 192 + 40 + 40, 0))


def test_what_a_layer_keeps_of_a_frozen_ones_output_is_there_once() -> None:
    """A frozen convolution gives 30 channels, 1,920 bytes, of which a linear layer makes 10 numbers, 40 bytes.

    Forward and backward both are there, the gradient of the 40, and the loss once more than `costs.memory` adds it.
    """
    idle = {"input_needs_gradient": False, "weight_needs_gradient": False}
    wide = layer("c", LayerKind.CONV, channels=30, in_channels=2, input_shapes=((2, 4, 4),), output_saved=True, **idle)
    (_, linear), _ = head("c", channels=30, saved=480)
    linear = msgspec.structs.replace(linear, input_needs_gradient=False)
    found = walked_footprint(built((wide, linear), (("c", "l"),)), gpu=False, half=False)
    assert found.kept_image_bytes == 1920
    assert found.channels_last == moments((4 * 4810, 1920 + 40 + 40, 0))
