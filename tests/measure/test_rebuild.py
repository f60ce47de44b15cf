from pathlib import Path

import pytest
import torch
from torch import nn

from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.errors import UnsupportedModelError
from ptsim.hardware.profile import Operator, OperatorSetting
from ptsim.measure.rebuild import build_operator, rebuild
from ptsim.network import Layer, LayerKind, Network, Parameter, Precision
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.groups import find_groups
from ptsim.sim.rounding import rounded
from ptsim.trace.io import read_trace
from tests.traces import residual_network

ROOT = Path(__file__).parents[2]
FP32 = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")


def described(name, input_shape=(3, 32, 32)):
    return capture_network(zoo.create(name), name=name, input_shape=input_shape, num_classes=10)


def test_a_rebuilt_network_has_the_shapes_parameters_and_layers_of_its_description():
    network = described("resnet20")
    module, renamed = rebuild(network)
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in module.parameters()) == 272_474  # He et al.'s 0.27 M with projection short-cuts
    again = capture_network(module, name="resnet20", input_shape=(3, 32, 32), num_classes=10)
    assert [layer.name for layer in again.layers] == [layer.name for layer in renamed.layers]
    assert [layer.forward_macs for layer in again.layers] == [layer.forward_macs for layer in network.layers]
    assert [layer.output_shape for layer in again.layers] == [layer.output_shape for layer in network.layers]


@pytest.mark.parametrize("name", ["vgg11", "resnet50"])
def test_pools_and_bottlenecks_can_be_rebuilt(name):
    module, _ = rebuild(described(name))
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_hand_written_description_is_enough():
    module, _ = rebuild(residual_network(widths=(5, 7, 9), blocks=(1, 1, 1)))
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("size", "out"), [((112, 112), (56, 56)), ((65, 64), (32, 32)), ((64, 65), (32, 32))])
def test_a_pool_that_rounds_up_is_recognised_by_its_output(size, out):
    """Of 65 pixels windows of 3 at every second one leave nothing over, of 64 they leave one."""
    pool = Operator(
        kind=LayerKind.POOL,
        op="max_pool2d",
        setting=FP32,
        batch=1,
        inputs=((4, *size),),
        output=(4, *out),
        kernel=(3, 3),
        stride=(2, 2),
    )
    assert build_operator(pool)(torch.rand(1, 4, *size)).shape == (1, 4, *out)


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_network_whose_branches_were_removed_can_be_rebuilt_and_penalised(multiple):
    trace = read_trace(ROOT / "traces" / "cifar10-resnet32" / "prunetrain-r0.25.jsonl")
    network = rounded(trace.final_network, multiple)
    assert {layer.op for layer in network.layers} >= {"placeholder", "branch_constant"}
    module, renamed = rebuild(network)
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in module.parameters()) == network.num_parameters
    assert [layer.output_shape for layer in renamed.layers] == [layer.output_shape for layer in network.layers]
    groups = find_groups(module, (3, 32, 32))
    GroupLasso(module, groups).add_gradient(1e-3)
    assert bool(groups.prunable.any())


@pytest.mark.parametrize("shape", [(5, 4, 4), (1, 5, 1, 1)])
def test_a_branch_constant_has_the_shape_that_was_described(shape):
    gone = Layer(
        name="gone", kind=LayerKind.RESHAPE, op="placeholder", in_channels=3, out_channels=0,
        input_shapes=((3, 4, 4),), output_shape=(0, 4, 4),
    )  # fmt: skip
    end = Layer(
        name="end", kind=LayerKind.RESHAPE, op="branch_constant", in_channels=0, out_channels=shape[0],
        input_shapes=((0, 4, 4),), output_shape=shape, num_parameters=5,
    )  # fmt: skip
    network = Network(
        name="net", input_shape=(3, 4, 4), num_classes=2, layers=(gone, end), edges=(("gone", "end"),),
        parameters=(Parameter(name="end.bias", layer="end", shape=(5,)),),
    )  # fmt: skip
    module, _ = rebuild(network)
    assert module(torch.rand(2, 3, 4, 4)).shape == (shape if shape[0] == 1 else (2, *shape))


def test_a_convolution_of_patches_is_refused_since_nobody_knows_how_they_were_cut():
    patches = Layer(
        name="each", kind=LayerKind.CONV, op="conv2d", in_channels=1, out_channels=4, kernel_size=(3, 3),
        padding=(1, 1), input_shapes=((3, 1, 4, 4),), output_shape=(3, 4, 4, 4),
    )  # fmt: skip
    network = Network(name="net", input_shape=(3, 4, 4), num_classes=2, layers=(patches,), edges=(), parameters=())
    with pytest.raises(UnsupportedModelError, match="layer each gets more than images in its mini-batch"):
        rebuild(network)


def test_what_the_description_does_not_tell_is_refused():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            a, b = self.conv(x).chunk(2, dim=1)
            return (a * b).mean((2, 3))

    network = capture_network(Chunked(), name="chunked", input_shape=(3, 8, 8), num_classes=4)
    with pytest.raises(UnsupportedModelError, match=r"chunk|getitem"):
        rebuild(network)


@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 4, 4), (5, 2, 4, 4)])
def test_a_batch_norm_of_signals_images_and_volumes_can_be_run(shape):
    norm = Operator(kind=LayerKind.BATCH_NORM, op="batch_norm", setting=FP32, batch=3, inputs=(shape,), output=shape)
    assert build_operator(norm)(torch.rand(3, *shape)).shape == (3, *shape)
