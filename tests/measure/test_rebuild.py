import pytest
import torch
from torch import nn

from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.errors import UnsupportedModelError
from ptsim.hardware.profile import Operator, OperatorSetting
from ptsim.measure.rebuild import build_operator, rebuild
from ptsim.network import LayerKind, Precision
from tests.traces import residual_network

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


def test_a_pool_that_rounds_up_is_recognised_by_its_output():
    pool = Operator(
        kind=LayerKind.POOL,
        op="max_pool2d",
        setting=FP32,
        batch=1,
        inputs=((4, 112, 112),),
        output=(4, 56, 56),
        kernel=(3, 3),
        stride=(2, 2),
    )
    assert build_operator(pool)(torch.rand(1, 4, 112, 112)).shape == (1, 4, 56, 56)


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
