import pytest
import torch

from ptsim.hardware.profile import Operator, OperatorSetting
from ptsim.measure.operators import copy_bandwidth_bytes_per_s, launch_overhead_s, time_operator
from ptsim.network import LayerKind, Precision

CPU = torch.device("cpu")
FP32 = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")


def conv(channels, **changes):
    options = {
        "kind": LayerKind.CONV,
        "op": "conv2d",
        "setting": FP32,
        "batch": 8,
        "inputs": ((channels, 16, 16),),
        "output": (channels, 16, 16),
        "kernel": (3, 3),
        "padding": (1, 1),
    }
    return Operator(**(options | changes))


def test_every_pass_of_a_convolution_is_timed_by_itself():
    time = time_operator(conv(32), CPU)
    assert min(time.forward_s, time.backward_s, time.weight_gradient_s, time.input_gradient_s) > 0
    assert time.host_s is None
    assert time.context == "alone"


def test_the_first_layer_has_no_input_gradient():
    time = time_operator(conv(3, input_needs_gradient=False), CPU)
    assert time.input_gradient_s is None
    assert time.weight_gradient_s > 0


def test_sixty_four_times_the_products_take_longer():
    assert time_operator(conv(128), CPU).forward_s > time_operator(conv(16), CPU).forward_s


def test_an_operator_without_parameters_has_one_backward_time_and_in_place_ones_run_on_copies():
    relu = Operator(
        kind=LayerKind.ACTIVATION,
        op="relu",
        setting=FP32,
        batch=4,
        inputs=((8, 16, 16),),
        output=(8, 16, 16),
        inplace=True,
    )
    time = time_operator(relu, CPU)
    assert time.backward_s > 0
    assert time.weight_gradient_s is None


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_sixteen_bit_operators_run_in_either_layout(memory_format):
    setting = OperatorSetting(precision=Precision.BF16, memory_format=memory_format)
    assert time_operator(conv(16, setting=setting), CPU).backward_s > 0


def test_timing_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    time_operator(conv(4), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_machine_copies_and_launches():
    assert 1e8 < copy_bandwidth_bytes_per_s(CPU) < 1e13
    assert 1e-8 < launch_overhead_s(CPU) < 1e-2
