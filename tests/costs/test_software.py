"""What a step with an older PyTorch takes longer for."""

from __future__ import annotations

import pytest

from ptsim.costs.datasheet import datasheet_step, load_fit
from ptsim.costs.scaling import among
from ptsim.costs.software import Update, again_of, is_young, may_be_young, parse_torch_version, update_of
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster, load_device
from ptsim.network import Precision
from ptsim.setting import StepSetting, TorchVersion
from tests.traces import residual_network

NETWORK = residual_network((16, 32, 64))
A100, V100 = load_device("a100"), load_device("v100")
TENSORS, PARAMETERS = len(NETWORK.parameters), sum(parameter.num_elements for parameter in NETWORK.parameters)


def step(device=A100, version=None, batch=4096, **setting):
    told = None if version is None else TorchVersion(*version)
    return datasheet_step(NETWORK, device, StepSetting(batch=batch, torch_version=told, **setting))


@pytest.mark.parametrize(
    ("device", "version", "young"),
    [
        ("a100", (1, 9), True),
        ("rtx-3090", (1, 7), True),
        ("a100", (1, 10), False),
        ("a100", (2, 8), False),
        ("a100", None, False),
        ("v100", (1, 4), False),
        ("h100", (1, 9), False),
    ],
)
def test_kernels_were_young_on_ampere_before_1_10(device, version, young):
    assert is_young(load_device(device), version and TorchVersion(*version)) is young


def test_young_software_lengthens_the_gpus_work_and_nothing_else():
    young, grown, before = step(version=(1, 9)), step(version=(1, 10)), step(V100, version=(1, 9))
    longer = 1 + load_fit().young_software
    assert young.forward_s == pytest.approx(longer * grown.forward_s)
    assert young.optimizer_s == pytest.approx(longer * grown.optimizer_s)
    assert before == step(V100, version=(1, 13))  # Volta's kernels were grown up


@pytest.mark.parametrize(
    ("optimizer", "momentum", "kernels"),
    [("sgd", None, 4), ("rmsprop", 0.9, 8), ("rmsprop", 0.0, 6), ("adam", None, 8)],
)
def test_before_2_0_gradients_are_zeroed_and_tensors_updated_one_by_one(optimizer, momentum, kernels):
    setting = StepSetting(batch=8, optimizer=optimizer, momentum=momentum)
    now = update_of(NETWORK, setting)
    assert now == Update(now.num_bytes, num_kernels=0, num_launches=TENSORS)

    def told(*version):
        return StepSetting(batch=8, optimizer=optimizer, momentum=momentum, torch_version=TorchVersion(*version))

    assert update_of(NETWORK, told(2, 0)) == now
    before = update_of(NETWORK, told(1, 13))
    assert before == (now.num_bytes + 16 * PARAMETERS, (kernels + 2) * TENSORS, kernels * TENSORS)


@pytest.mark.parametrize("version", [None, TorchVersion(1, 13)])
@pytest.mark.parametrize(("precision", "casts"), [(Precision.FP32, 0), (Precision.FP16, 12)])
def test_a_further_pass_adds_every_gradient_with_a_kernel_of_its_own(version, precision, casts):
    """Two values are read and one is written; backward launches it. Autocast casts the weights again."""
    setting = StepSetting(batch=8, precision=precision, torch_version=version)
    assert again_of(NETWORK, setting) == ((12 + casts) * PARAMETERS, TENSORS, 0)


def test_a_step_of_unknown_software_on_ampere_may_take_as_long_as_with_young_software():
    longer = 1 + load_fit().young_software
    unknown, known = step(precision=Precision.TF32), step(precision=Precision.TF32, version=(2, 8))
    assert (unknown.compute_s, unknown.low_s) == (known.compute_s, known.low_s)
    assert unknown.high_s == pytest.approx(longer * known.high_s)
    cluster = load_cluster("dgx-a100")
    alone, among_many = (among(made, cluster, 16) for made in (known, unknown))
    assert among_many.high_s == pytest.approx(longer * alone.high_s)
    assert alone.high_s / alone.compute_s < known.high_s / known.compute_s
    assert not may_be_young(V100, None)
    assert not may_be_young(load_device("h100"), None)


def test_every_gpu_zeroes_all_of_its_gradients_however_the_update_is_sharded():
    """Zeros and sums, 16 bytes a parameter, are work of a whole step; of the rest every GPU does its share."""
    old, new = step(V100, version=(1, 13)), step(V100, version=(2, 0))
    streaming = load_fit().efficiency.stream_bandwidth * V100.memory_bandwidth_bytes_per_s
    zeroed_s = 16 * PARAMETERS / streaming + 2 * TENSORS * load_fit().efficiency.launch_s
    assert old.whole_s == pytest.approx(new.whole_s + zeroed_s)
    assert old.updating(0.125).optimizer_s == pytest.approx(zeroed_s + 0.125 * (old.optimizer_s - zeroed_s))
    young, grown = (step(version=version, precision=Precision.FP16) for version in ((1, 9), (1, 10)))
    assert young.whole_s / grown.whole_s == pytest.approx(1 + load_fit().young_software)
    assert young.again_s / grown.again_s == pytest.approx(1 + load_fit().young_software)


@pytest.mark.parametrize(
    ("text", "version"), [("1.8", "1.8"), (" 2.12.1+cu126 ", "2.12"), ("v1.10.0a0", "1.10"), ("1.13", "1.13")]
)
def test_a_version_is_read_as_torch_writes_it(text, version):
    assert str(parse_torch_version(text)) == version


@pytest.mark.parametrize(
    "text", ["", 1.8, "0.4", "2", "new", "1.x", "-1.8", "1,8", "21.07", "1.1234", "1.8 or newer", "1.10.", "1.8.x"]
)  # 21.07: a container's
def test_what_is_no_version_is_refused(text):
    with pytest.raises(UsageError, match=r"expected a version of PyTorch such as 1\.8"):
        parse_torch_version(text)
