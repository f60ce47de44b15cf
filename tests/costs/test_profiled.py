"""Tier 2 against a machine of our own: its times are a formula with stairs, its measurements a few points of it."""

import math

import msgspec
import pytest

from ptsim.costs.profiled import profiled_step
from ptsim.costs.tiers import Tier
from ptsim.errors import MissingMeasurementError
from ptsim.hardware.profile import DeviceProfile, OperatorSetting, OperatorTime, StepMeasurement, operator_of
from ptsim.network import LayerKind, Precision
from ptsim.setting import StepSetting
from tests.traces import residual_network

FP32 = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")
CLOCKED = 1.1  # clocks around layers make them this much longer than in a whole step


def machine(operator):
    """Forward seconds: products on tiles of 16 channels at 100 GMAC/s, plus bytes at 10 GB/s, plus 20 µs."""
    products = 0.0
    if operator.kind is LayerKind.CONV:
        tiled = [16 * math.ceil(c / 16) for c in (operator.inputs[0][0], operator.output[0])]
        products = math.prod(tiled) * math.prod(operator.output[1:]) * math.prod(operator.kernel) * operator.batch
    elif operator.kind is LayerKind.LINEAR:
        products = operator.inputs[0][0] * operator.output[0] * operator.batch
    elements = sum(math.prod(shape) for shape in (*operator.inputs, operator.output)) * operator.batch
    return products / 100e9 + 4 * elements / 10e9 + 20e-6


def operators_of(network, batch):
    return [operator_of(layer, batch=batch, setting=FP32) for layer in network.layers]


def backward_factor(operator):
    return 2.0 if operator.input_needs_gradient else 1.0


def truth(network, batch):
    return sum((1 + backward_factor(operator)) * machine(operator) for operator in operators_of(network, batch))


def calibrated(*networks, batch=32, steps=True):
    times = {
        operator: OperatorTime(
            operator=operator,
            forward_s=CLOCKED * machine(operator),
            backward_s=CLOCKED * backward_factor(operator) * machine(operator),
            context="step",
        )
        for network in networks
        for operator in operators_of(network, batch)
    }
    measured = [
        StepMeasurement(
            architecture=network.id,
            name=network.name,
            setting=FP32,
            batch=batch,
            optimizer="sgd",
            num_parameters=network.num_parameters,
            num_tensors=len(network.parameters),
            num_layers=len(network.layers),
            num_samples=7,
            forward_s=sum(machine(o) for o in operators_of(network, batch)),
            backward_s=sum(backward_factor(o) * machine(o) for o in operators_of(network, batch)),
            optimizer_s=2e-9 * network.num_parameters + 3e-6 * len(network.parameters),
            regularizer_s=4e-9 * network.num_parameters + 9e-6 * len(network.parameters),
            step_s=truth(network, batch),
            step_low_s=0.95 * truth(network, batch),
            step_high_s=1.1 * truth(network, batch),
            layers_forward_s=CLOCKED * sum(machine(o) for o in operators_of(network, batch)),
            layers_backward_s=CLOCKED * sum(backward_factor(o) * machine(o) for o in operators_of(network, batch)),
        )
        for network in (networks if steps else ())
    ]
    return DeviceProfile(
        created="2026-11-22T13:00:00Z",
        complete=True,
        device="Formula",
        kind="cpu",
        memory_bytes=2**33,
        num_threads=1,
        software={},
        operators=tuple(times.values()),
        steps=tuple(measured),
    )


WIDTHS = [(16, 32, 64), (13, 30, 50), (9, 22, 41), (16, 27, 33), (7, 12, 20), (5, 17, 57)]
PROFILE = calibrated(*(residual_network(widths=w) for w in WIDTHS))
UNSEEN = residual_network(widths=(11, 25, 46), inner=(10, 19, 39))


def step(network, profile=PROFILE, *, batch=32, **options):
    return profiled_step(network, profile, StepSetting(batch=batch, precision=Precision.FP32, **options))


def test_a_network_that_was_measured_whole_takes_what_was_measured():
    network = residual_network(widths=WIDTHS[1])
    known = PROFILE.steps[1]
    result = step(network)
    assert result.forward_s == pytest.approx(known.forward_s)
    assert result.backward_s == pytest.approx(known.backward_s)
    assert result.optimizer_s == pytest.approx(known.optimizer_s)
    assert result.low_s == pytest.approx(0.95 * result.compute_s)
    assert result.high_s == pytest.approx(1.1 * result.compute_s)
    assert result.tier is Tier.PROFILED
    assert {layer.tier for layer in result.layers} == {Tier.PROFILED}


def test_the_update_and_penalty_of_a_network_that_was_measured_whole_are_its_own():
    """Not what those of all networks grow with; of two measurements the later one counts."""
    network, known = residual_network(widths=WIDTHS[1]), PROFILE.steps[1]
    first, last = (
        msgspec.structs.replace(known, optimizer_s=n * known.optimizer_s, regularizer_s=2 * n * known.regularizer_s)
        for n in (2, 3)
    )
    steps = (first, PROFILE.steps[0], last, *PROFILE.steps[2:])
    result = step(network, msgspec.structs.replace(PROFILE, steps=steps), regularizer="group_lasso")
    assert result.optimizer_s == pytest.approx(3 * known.optimizer_s)
    assert result.regularizer_s == pytest.approx(6 * known.regularizer_s)


def test_a_step_holds_the_hooks_of_several_gpus_where_the_steps_that_it_comes_from_do():
    """Where the network was measured whole, that measurement says it; else one of the others is enough."""
    among = msgspec.structs.replace(PROFILE.steps[0], data_parallel=True)
    mixed = msgspec.structs.replace(PROFILE, steps=(among, *PROFILE.steps[1:]))
    measured = [step(residual_network(widths=widths), mixed).data_parallel for widths in WIDTHS[:2]]
    assert (*measured, step(UNSEEN, mixed).data_parallel) == (True, False, True)
    assert not step(UNSEEN).data_parallel


def test_a_pruned_network_between_the_measured_ones_is_within_five_percent():
    result = step(UNSEEN)
    expected = truth(UNSEEN, 32) + 2e-9 * UNSEEN.num_parameters + 3e-6 * len(UNSEEN.parameters)
    assert result.compute_s == pytest.approx(expected, rel=0.05)
    assert result.low_s < expected < result.high_s


def test_another_mini_batch_than_the_measured_one_is_within_ten_percent():
    network = residual_network(widths=WIDTHS[0])
    assert step(network, batch=48).forward_s == pytest.approx(1.5 * step(network).forward_s, rel=0.1)


def test_the_group_lasso_costs_what_it_cost_where_it_was_measured():
    expected = 4e-9 * UNSEEN.num_parameters + 9e-6 * len(UNSEEN.parameters)
    assert step(UNSEEN, regularizer="group_lasso").regularizer_s == pytest.approx(expected)
    assert step(UNSEEN).regularizer_s == 0


def test_channels_in_the_same_tile_take_about_the_same_and_the_next_tile_more():
    def conv_seconds(width):
        network = residual_network(widths=(16, width, 64), inner=(16, width, 64))
        return next(t.forward_s for t in step(network).layers if t.layer == "layer2.1.conv2")

    assert conv_seconds(31) / conv_seconds(26) < 1.12  # 24 % and more products if they counted one by one
    assert conv_seconds(33) / conv_seconds(32) > 1.15  # four tiles become nine; the bytes stay


def test_without_whole_steps_there_is_no_update_time_and_it_says_so():
    with pytest.raises(MissingMeasurementError, match="no training step with the optimizer 'sgd'"):
        step(UNSEEN, calibrated(residual_network(), steps=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "no training step with the optimizer 'adam' in fp32"),
        ({"memory_format": "channels_last"}, "holds fp32 contiguous, not fp32 channels_last"),
    ],
)
def test_what_the_profile_does_not_hold_is_an_error(options, message):
    with pytest.raises(MissingMeasurementError, match=message):
        step(UNSEEN, **options)


def test_an_operator_of_a_kind_that_nobody_measured_is_an_error_that_names_the_layer():
    bare = msgspec.structs.replace(
        PROFILE, operators=tuple(t for t in PROFILE.operators if t.operator.kind is not LayerKind.BATCH_NORM)
    )
    with pytest.raises(MissingMeasurementError, match="has no batch_norm in fp32 contiguous, which layer bn1"):
        step(UNSEEN, bare)


def test_a_network_that_was_measured_whole_needs_no_time_of_each_of_its_operators():
    """As `import kineto --model` writes one where an operator's shapes could not be told."""
    network, known = residual_network(widths=WIDTHS[1]), PROFILE.steps[1]
    timed = tuple(t for t in PROFILE.operators if t.operator.kind is not LayerKind.BATCH_NORM)
    result = step(network, msgspec.structs.replace(PROFILE, operators=timed))
    assert result.forward_s == pytest.approx(known.forward_s)
    assert result.backward_s == pytest.approx(known.backward_s)
    assert {layer.forward_s for layer in result.layers if layer.kind is LayerKind.BATCH_NORM} == {0.0}
    with pytest.raises(MissingMeasurementError, match="has no dense conv2d"):  # nothing to share the step out among
        step(network, msgspec.structs.replace(PROFILE, operators=()))


def test_no_step_with_the_group_lasso_is_an_error_when_one_is_asked_for():
    bare = msgspec.structs.replace(
        PROFILE, steps=tuple(msgspec.structs.replace(s, regularizer_s=None) for s in PROFILE.steps)
    )
    with pytest.raises(MissingMeasurementError, match="no step with a regulariser"):
        step(UNSEEN, bare, regularizer="group_lasso")


def test_another_criterion_than_the_measured_one_takes_as_its_bytes_say():
    took = {name: step(UNSEEN, regularizer=name).regularizer_s for name in ("group_lasso", "slimming")}
    kernels = [(p.num_elements, math.prod(p.shape[2:])) for p in UNSEEN.parameters if len(p.shape) > 1]
    lasso = sum(elements * (7 + 2 / kernel) for elements, kernel in kernels)  # on a CPU
    scales = sum(layer.out_channels for layer in UNSEEN.layers if layer.kind is LayerKind.BATCH_NORM)
    assert took["slimming"] / took["group_lasso"] == pytest.approx(3 * scales / lasso)
    slim = msgspec.structs.replace(
        PROFILE, steps=tuple(msgspec.structs.replace(s, criterion="slimming") for s in PROFILE.steps)
    )
    assert step(UNSEEN, slim, regularizer="slimming").regularizer_s == pytest.approx(took["group_lasso"])


def test_another_momentum_or_form_of_the_penalty_than_the_measured_one_takes_as_its_bytes_say():
    usual, plain = (step(UNSEEN, momentum=momentum).optimizer_s for momentum in (None, 0.0))
    assert plain / usual == pytest.approx(6 / 11)
    gradient, proximal = (
        step(UNSEEN, regularizer="group_lasso", proximal=proximal).regularizer_s for proximal in (False, True)
    )
    sizes = [(p.num_elements, math.prod(p.shape[2:])) for p in UNSEEN.parameters if len(p.shape) > 1]
    moved = sum(elements * (7 + 2 / kernel) for elements, kernel in sizes)
    assert proximal / gradient == pytest.approx(10 * sum(elements for elements, _ in sizes) / moved)


def test_a_step_whose_layers_nobody_timed_tells_nothing_of_them():
    """As `import kineto` writes one whose shapes were not recorded: the ratio to its layers is not known."""
    untimed = [msgspec.structs.replace(s, layers_forward_s=0.0, layers_backward_s=0.0) for s in PROFILE.steps]
    alone = step(UNSEEN, msgspec.structs.replace(PROFILE, steps=(*PROFILE.steps, untimed[0])))
    assert alone.forward_s == step(UNSEEN).forward_s
    assert step(UNSEEN, msgspec.structs.replace(PROFILE, steps=tuple(untimed))).forward_s > 0


def rolled(network, name):
    """The network with layer `name` replaced by one that moves every element to another place."""
    layers = tuple(
        msgspec.structs.replace(layer, kind=LayerKind.RESHAPE, op="roll", inplace=False, view=False)
        if layer.name == name
        else layer
        for layer in network.layers
    )
    return msgspec.structs.replace(network, layers=layers)


def test_an_operator_that_only_moves_elements_takes_a_copys_time_where_nobody_timed_it():
    name = next(layer.name for layer in UNSEEN.layers if layer.kind is LayerKind.ACTIVATION)
    bare = msgspec.structs.replace(
        PROFILE, operators=tuple(t for t in PROFILE.operators if t.operator.kind is not LayerKind.RESHAPE)
    )

    def roll_s(bandwidth):
        profile = msgspec.structs.replace(bare, copy_bandwidth_bytes_per_s=bandwidth)
        return next(t.forward_s for t in step(rolled(UNSEEN, name), profile).layers if t.layer == name)

    elements = next(layer for layer in UNSEEN.layers if layer.name == name).output_elements
    assert roll_s(1e9) == pytest.approx(2 * 4 * 32 * elements / 1e9, rel=0.25)  # whole steps are faster than their sum
    assert roll_s(1e9) == pytest.approx(2 * roll_s(2e9))
    with pytest.raises(MissingMeasurementError, match=f"has no reshape in fp32 contiguous, which layer {name}"):
        step(rolled(UNSEEN, name), bare)


def test_an_operator_that_moves_next_to_nothing_may_be_unmeasured():
    bare = msgspec.structs.replace(
        PROFILE, operators=tuple(t for t in PROFILE.operators if t.operator.kind is not LayerKind.LINEAR)
    )
    linear = next(layer for layer in UNSEEN.layers if layer.kind is LayerKind.LINEAR)
    assert linear.input_elements < 0.001 * sum(layer.output_elements for layer in UNSEEN.layers)
    assert next(t.forward_s for t in step(UNSEEN, bare).layers if t.layer == linear.name) == 0


@pytest.mark.parametrize(("name", "negligible"), [("layer2.0.relu1", False), ("layer3.0.relu1", True)])
def test_what_an_operator_moves_both_ways_decides_whether_it_may_be_unmeasured(name, negligible):
    """0.47 % of all bytes forward and as many backward, or 0.24 %: next to nothing is half a percent of them."""
    rolls = rolled(UNSEEN, name)
    bare = tuple(t for t in PROFILE.operators if t.operator.kind is not LayerKind.RESHAPE)
    profile = msgspec.structs.replace(PROFILE, operators=bare, copy_bandwidth_bytes_per_s=1e9)
    moved = next(time for time in step(rolls, profile).layers if time.layer == name)
    assert (moved.forward_s == moved.backward_s == 0) == negligible


ONE = residual_network(widths=WIDTHS[0])


def of_another(*changes):
    """The profile of `ONE` as if its steps were another network's: all operators are known, and no step is.

    Steps that do not vary, one for each of the changes; their layers take as long as those of `ONE` did with clocks.
    """
    known = calibrated(ONE)
    steady = msgspec.structs.replace(known.steps[0], architecture="0" * 16, step_low_s=1.0, step_s=1.0, step_high_s=1.0)
    return msgspec.structs.replace(known, steps=tuple(msgspec.structs.replace(steady, **change) for change in changes))


def widths_of(step):
    return math.log(step.compute_s / step.low_s), math.log(step.high_s / step.compute_s)


def test_known_operators_vary_as_whole_steps_do():
    """90 % of the steps lay within a factor of 1.21: 1.1 either way; of three factors the middle one counts."""
    steps = [{"step_low_s": 1.0, "step_high_s": high} for high in (1.0, 1.21, 9.0)]
    one, median = step(ONE, of_another(steps[1])), step(ONE, of_another(*steps))
    assert widths_of(one) == pytest.approx((math.log(1.1),) * 2)
    assert widths_of(median) == pytest.approx((math.log(1.1),) * 2)
    assert widths_of(step(ONE, of_another({}))) == pytest.approx((0.0, 0.0))
    assert one.compute_s == pytest.approx(truth(ONE, 32) + one.optimizer_s)


def test_steps_whose_layers_are_as_long_say_most_of_how_whole_steps_compare_to_their_layers():
    """Of two steps one has layers as long as those here, 1 / 0.25, the other twice as long, 1 / (1 + 0.25): 5 to 1.

    Forward they take half and an eighth of their layers' times, backward as long and twice as long.
    """
    ones = calibrated(ONE).steps[0]
    forward_s, backward_s = ones.layers_forward_s, ones.layers_backward_s
    found = step(
        ONE,
        of_another(
            {"forward_s": forward_s / 2, "backward_s": backward_s},
            {"forward_s": forward_s / 8, "backward_s": 2 * backward_s, "num_layers": ones.num_layers / 2},
        ),
    )
    assert found.forward_s == pytest.approx(forward_s * 2 ** -(5 / 6 + 3 / 6))
    assert found.backward_s == pytest.approx(backward_s * 2 ** (1 / 6))
    spread = math.sqrt(5 / 6 * 1 / 6) * math.log(2)  # of the backward passes
    assert widths_of(found) == pytest.approx((1.645 * spread,) * 2)


def test_what_is_guessed_is_as_unsure_as_its_share_of_the_step():
    """An operator that only moves, forward and backward, at a copy's 1 GB/s: known within a factor of two."""
    name, profile = "layer1.0.relu1", of_another({})
    known = tuple(t for t in profile.operators if t.operator.kind is not LayerKind.RESHAPE)
    profile = msgspec.structs.replace(profile, operators=known, copy_bandwidth_bytes_per_s=1e9)
    found = step(rolled(ONE, name), profile)
    others_s = sum(
        CLOCKED * (1 + backward_factor(operator)) * machine(operator)
        for layer, operator in zip(ONE.layers, operators_of(ONE, 32), strict=True)
        if layer.name not in (name, "flatten")  # which moves next to nothing
    )
    moved_s = 2 * 2 * 4 * 32 * ONE.layer(name).output_elements / 1e9
    assert widths_of(found) == pytest.approx((1.645 * math.log(2) * moved_s / (moved_s + others_s),) * 2)
    assert found.compute_s - found.optimizer_s == pytest.approx((moved_s + others_s) / CLOCKED)
