"""What measured operators say of others: looked up, in proportion to what one does, and how sure that is."""

from __future__ import annotations

import math

import msgspec
import pytest

from ptsim.costs.interpolation import Estimate, Interpolator, convolution_form
from ptsim.hardware.profile import Operator, OperatorSetting, OperatorTime
from ptsim.network import LayerKind, Precision

FP32, BF16 = (
    OperatorSetting(precision=precision, memory_format="contiguous") for precision in (Precision.FP32, Precision.BF16)
)


def relu(batch: int = 8, *, channels: int = 16, inplace: bool = False) -> Operator:
    shape = (channels, 8, 8)
    return Operator(
        kind=LayerKind.ACTIVATION, op="relu", setting=FP32, batch=batch, inputs=(shape,), output=shape, inplace=inplace
    )


def conv(inputs: int, outputs: int, *, size: int = 1, batch: int = 1, kernel: int = 3, **changes: object) -> Operator:
    plain = Operator(
        kind=LayerKind.CONV,
        op="conv2d",
        setting=FP32,
        batch=batch,
        inputs=((inputs, size, size),),
        output=(outputs, size, size),
        kernel=(kernel, kernel),
    )
    return msgspec.structs.replace(plain, **changes)


def linear(inputs: int, outputs: int, *, batch: int, setting: OperatorSetting = FP32) -> Operator:
    return Operator(
        kind=LayerKind.LINEAR, op="linear", setting=setting, batch=batch, inputs=((inputs,),), output=(outputs,)
    )


def bilinear(first: int, second: int, outputs: int) -> Operator:
    return msgspec.structs.replace(linear(first, outputs, batch=1), op="bilinear", inputs=((first,), (second,)))


def took(operator: Operator, forward_s: float, backward_s: float | None = None, **more: float | str) -> OperatorTime:
    return OperatorTime(operator=operator, forward_s=forward_s, backward_s=backward_s, **more)


def known(*times: OperatorTime, setting: OperatorSetting = FP32) -> Interpolator:
    return Interpolator(times, setting)


def test_what_was_measured_is_looked_up_and_the_step_counts_before_the_loop() -> None:
    inside, alone = took(relu(), 2.0, 3.0, context="step"), took(relu(), 5.0, 7.0, context="alone")
    for times in ((inside, alone), (alone, inside)):
        for which, seconds in (("forward", 2.0), ("backward", 3.0)):
            found = known(*times).estimate(relu(), which)
            assert (found.seconds, found.log_error) == (seconds, 0.0)


def test_a_first_layer_takes_the_time_of_the_weights_gradient_alone() -> None:
    first = conv(16, 16, input_needs_gradient=False)
    measured = known(took(conv(16, 16), 1.0, 5.0, weight_gradient_s=2.0))
    assert measured.estimate(first, "backward").seconds == 2.0
    assert measured.estimate(conv(16, 16), "backward").seconds == 5.0
    assert known(took(conv(16, 16), 1.0, 5.0)).estimate(first, "backward") is None
    assert known(took(first, 1.0, 4.0, weight_gradient_s=2.0)).estimate(first, "backward").seconds == 4.0


def test_an_operator_without_a_backward_pass_takes_none() -> None:
    assert known(took(relu(), 1.0)).estimate(relu(), "backward") == Estimate(seconds=0.0, log_error=0.0, family=())
    assert known(took(relu(), 1.0)).estimate(relu(batch=9), "backward") is None


def test_nothing_is_said_of_other_kinds_and_settings() -> None:
    measured = known(took(relu(), 1.0, 2.0))
    assert measured.estimate(conv(16, 16), "forward") is None
    assert known(took(relu(), 1.0, 2.0), setting=BF16).estimate(relu(), "forward") is None


@pytest.mark.parametrize(
    ("measured", "asked", "ratio"),
    [
        # Bytes decide: 4 an element of input and output.
        (relu(8), relu(24), 3.0),
        (relu(8), relu(8, channels=40), 2.5),
        # Weights have 4 bytes whatever the activations have. 1,000 · 2,000 · 4 = 8 MB grow, 4 MB do not.
        (linear(1000, 1000, batch=1000), linear(1000, 1000, batch=2000), 20 / 12),
        (linear(1000, 1000, batch=1000, setting=BF16), linear(1000, 1000, batch=2000, setting=BF16), 12 / 8),
        (linear(4096, 1000, batch=1), linear(4096, 2000, batch=1), (6096 + 8_192_000) / (5096 + 4_096_000)),
        (bilinear(64, 64, 64), bilinear(64, 128, 64), (256 + 2 * 64**3) / (192 + 64**3)),
        (conv(512, 512), conv(512, 256), (768 + 9 * 256 * 512) / (1024 + 9 * 512 * 512)),
        (
            conv(512, 512, groups=4),
            conv(512, 512, groups=2),
            (1024 + 9 * 512 * 256) / (1024 + 9 * 512 * 128),
        ),
        # Products decide where there are more than 1,000 a byte.
        (linear(2**14, 2**14, batch=2**14), linear(2**14, 2**13, batch=2**14), 0.5),
        (conv(2048, 2048, size=64, batch=64), conv(2048, 1024, size=64, batch=64), 0.5),
        (conv(2048, 2048, size=64, batch=64), conv(2048, 2048, size=32, batch=64), 0.25),
        (conv(2048, 2048, size=64, batch=64), conv(2048, 2048, size=64, batch=64, kernel=1), 1 / 9),
        (conv(4096, 4096, size=64, batch=64, groups=2), conv(4096, 4096, size=64, batch=64, groups=4), 0.5),
    ],
)
def test_one_operator_speaks_for_its_kind_in_proportion_and_within_a_factor_of_two(
    measured: Operator, asked: Operator, ratio: float
) -> None:
    found = known(took(measured, 3.0), setting=measured.setting).estimate(asked, "forward")
    assert found.seconds == pytest.approx(3.0 * ratio)
    assert found.log_error == pytest.approx(math.log(2))


@pytest.mark.parametrize("needed", [False, True])
def test_whether_an_input_needs_a_gradient_is_asked_of_the_backward_pass_alone(needed: bool) -> None:
    measured = conv(2048, 2048, size=64, batch=64, input_needs_gradient=needed)
    asked = conv(2048, 1024, size=64, batch=64, input_needs_gradient=not needed)
    found = known(took(measured, 3.0, 5.0))
    forward = found.estimate(asked, "forward")
    assert forward is not None
    assert forward.seconds == pytest.approx(1.5)
    assert found.estimate(asked, "backward") is None


@pytest.mark.parametrize(("op", "size"), [("conv1d", (12,)), ("conv3d", (1, 3, 4))])
def test_signals_and_volumes_are_judged_as_images_of_as_many_pixels(op: str, size: tuple[int, ...]) -> None:
    """Where more than 16 channels come in, all take twice as long."""
    counts = [(4 * 2**i, 4 * 2**o) for i in range(5) for o in range(5)]

    def estimate(op: str, size: tuple[int, ...]) -> Estimate | None:
        made = [
            msgspec.structs.replace(conv(i, o), op=op, inputs=((i, *size),), output=(o, *size))
            for i, o in [*counts, (24, 48)]
        ]
        times = (took(c, 1e-6 * i * o * (1 + (i > 16))) for c, (i, o) in zip(made, counts, strict=False))
        return known(*times).estimate(made[-1], "forward")

    found, image = estimate(op, size), estimate("conv2d", (3, 4))
    assert (found.seconds, found.log_error) == pytest.approx((image.seconds, image.log_error))


@pytest.mark.parametrize(("count", "sure"), [(4, False), (5, True)])
def test_more_than_four_operators_tell_how_sure_they_are(count: int, sure: bool) -> None:
    """In exact proportion to their bytes; measured again they tell nothing new."""
    times = [took(relu(2**k), 1e-3 * 2**k) for k in range(count)]
    found = known(*times, *times).estimate(relu(3), "forward")
    assert found.seconds == pytest.approx(3e-3, rel=1e-3)
    assert (found.log_error < 0.01) is sure
    assert sure or found.log_error == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("operators", "asked", "width"),
    [
        ([conv(16, 8 + k) for k in range(24)], conv(16, 64), 3),
        ([conv(16, 8 + k) for k in range(23)], conv(16, 64), 1),
        ([conv(16, 8 + k) for k in range(24)], conv(16, 64, kernel=5), 1),
        ([conv(16, 8 + k) for k in range(24)], conv(16, 64, stride=(2, 2)), 1),
        ([conv(16, 8 + k) for k in range(24)], conv(16, 64, dilation=(2, 2)), 1),
        ([relu(2**k) for k in range(8)], relu(3), 3),
        ([relu(2**k) for k in range(7)], relu(3), 1),
        ([relu(2**k, inplace=k % 2 == 0) for k in range(8)], relu(3), 2),
    ],
)
def test_a_family_is_as_narrow_as_has_enough_operators(operators: list[Operator], asked: Operator, width: int) -> None:
    """24 convolutions of the same kernel, stride and dilation, 8 of the same element-wise operator; else its kin."""
    assert len(known(*(took(o, 1e-3 * o.batch) for o in operators)).estimate(asked, "forward").family) == width


def test_a_neighbour_of_an_odd_operator_is_odd_and_what_is_far_from_all_is_unsure() -> None:
    """In proportion to their bytes but for one, whose neighbour takes after it."""
    times = [took(relu(2**k), 1e-3 * 2**k * (3.0 if k == 5 else 1.0)) for k in range(10)]
    near, other, far = (known(*times).estimate(relu(batch), "forward") for batch in (33, 480, 2**20))
    assert near.seconds / 33e-3 > 1.4 * other.seconds / 480e-3
    assert 0 < near.log_error < far.log_error


def test_operators_timed_alone_say_how_they_compare_and_not_how_long_a_step_takes() -> None:
    """In proportion to their bytes, but alone in half of the time: the estimate is that of a step."""
    times = [
        took(relu(2**k), 1e-3 * 2**k * (0.5 if k % 2 else 1.0), context="alone" if k % 2 else "step") for k in range(12)
    ]
    found = known(*times).estimate(relu(48), "forward")
    assert found.seconds == pytest.approx(48e-3, rel=0.05)


@pytest.mark.parametrize("changes", [{"kernel": 5}, {"stride": (4, 4)}])
def test_a_kernel_and_a_stride_are_places_of_their_own(changes: dict[str, object]) -> None:
    """Few of each form, so that one family has all: those of one form take three times as long for what they do."""

    def seconds(operator: Operator) -> float:
        taps = operator.kernel[0] ** 2
        return (
            1e-9 * taps * operator.inputs[0][0] * operator.output[0] * (3.0 if taps * operator.stride[0] > 9 else 1.0)
        )

    counts = [(2**i, 2**o) for i in range(6, 10) for o in range(6, 9)]
    operators = [conv(i, o, size=8, **form) for form in ({}, changes) for i, o in counts[: 11 if form else 12]]
    measured = known(*(took(operator, seconds(operator)) for operator in operators))
    for form in ({}, changes):
        asked = conv(96, 192, size=8, **form)
        assert measured.estimate(asked, "forward").seconds == pytest.approx(seconds(asked), rel=0.05)


@pytest.mark.parametrize(("op", "image"), [("conv1d", (64,)), ("conv2d", (8, 8)), ("conv3d", (4, 4, 4))])
def test_a_convolutions_neighbours_have_as_many_channels_over_any_number_of_axes(op: str, image: tuple[int]) -> None:
    """As above: in proportion to their input's channels but for one."""

    def on(channels: int) -> Operator:
        shapes = {"inputs": ((channels, *image),), "output": (64, *image)}
        return msgspec.structs.replace(conv(channels, 64, op=op, batch=2**10), **shapes)

    times = [took(on(2**k), 1e-3 * 2**k * (3.0 if k == 5 else 1.0)) for k in range(10)]
    near, other = (known(*times).estimate(on(channels), "forward") for channels in (33, 480))
    assert near.seconds / 33e-3 > 1.4 * other.seconds / 480e-3


def test_a_transposed_convolution_multiplies_at_the_pixels_of_its_input() -> None:
    """Times in proportion to products: the same images take as long with a larger stride, whose output is larger."""

    def up(batch: int, stride: int = 1) -> Operator:
        output = (512, 4 * stride, 4 * stride)
        return conv(512, 512, size=4, batch=batch, op="conv_transpose2d", output=output, stride=(stride, stride))

    found = known(*(took(up(batch), 1e-3 * batch) for batch in range(1, 25))).estimate(up(16, stride=2), "forward")
    assert found is not None
    assert found.seconds == pytest.approx(16e-3, rel=0.01)


@pytest.mark.parametrize(
    ("groups", "channels", "form"),
    [(1, 16, "dense"), (1, 1, "dense"), (4, 16, "grouped"), (16, 16, "depthwise"), (2, 2, "depthwise")],
)
def test_the_form_of_a_convolution(groups: int, channels: int, form: str) -> None:
    assert convolution_form(groups, channels) == form


def test_dense_convolutions_say_nothing_of_grouped_ones() -> None:
    measured = known(took(conv(16, 16), 1.0))
    assert measured.estimate(conv(16, 32), "forward") is not None
    assert measured.estimate(conv(16, 16, groups=4), "forward") is None
    assert measured.estimate(conv(16, 16, op="conv_transpose2d"), "forward") is None
