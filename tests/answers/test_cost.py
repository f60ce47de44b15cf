from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from torch import nn

import ptsim
from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.criteria import penalty_work
from ptsim.errors import FileFormatError, UnknownNameError, UsageError
from ptsim.network import LayerKind, Network
from ptsim.trace.schema import Run
from tests.traces import (
    CPU,
    NetworkBuilder,
    dense_trace,
    residual_network,
    shrinking_records,
    shrinking_trace,
    write_trace,
)


@pytest.mark.slow
def test_resnet50_for_cifar_infers_230_million_flops() -> None:
    """The paper's figure is in FLOPs, two per MAC."""
    model = zoo.create("resnet50")
    network = capture_network(model, name="resnet50", input_shape=(3, 32, 32), num_classes=10)
    report = ptsim.cost(network)
    assert 2 * report.inference_macs_per_image == pytest.approx(230e6, rel=0.01)
    paper = ptsim.cost(network, convention="paper")
    assert paper.inference_macs_per_image == report.inference_macs_per_image
    assert paper.training_macs_per_image > report.training_macs_per_image


@pytest.mark.slow
def test_a_trace_and_the_live_network_cost_the_same(tmp_path: Path) -> None:
    model = zoo.create("resnet20")
    network = capture_network(model, name="resnet20", input_shape=(3, 32, 32), num_classes=10)
    records = list(shrinking_records(epochs=1))
    replaced = []
    for record in records:
        if isinstance(record, ptsim.trace.schema.Architecture):
            record = msgspec.structs.replace(record, id=network.id, network=network)
        elif isinstance(record, ptsim.trace.schema.Epoch):
            record = msgspec.structs.replace(record, architecture=network.id, densities=())
        elif isinstance(record, ptsim.trace.schema.Profile | ptsim.trace.schema.Reconfiguration):
            continue
        replaced.append(record)
    path = tmp_path / "trace.jsonl"
    write_trace(path, replaced)
    recorded = ptsim.cost(path, batch=8, precision="fp32")
    live = ptsim.cost(model, input_shape=(3, 32, 32), num_classes=10, batch=8)
    for name in ("inference_macs_per_image", "training_macs_per_image", "bn_bytes_per_image", "parameters", "layers"):
        assert getattr(recorded, name) == getattr(live, name)


def test_a_recorded_run_costs_what_the_network_costs_that_it_ended_with() -> None:
    """SSL prunes once, after its last epoch: 272,474 parameters dense, 204,962 as the recorded run handed it over."""
    report = ptsim.cost(Path(__file__).parents[2] / "traces" / "cifar10-resnet20" / "ssl-r0.2.jsonl")
    assert (report.epochs[-1].parameters, report.parameters) == (272_474, 204_962)


def test_frames_have_a_row_a_layer_a_kind_and_an_epoch(tmp_path: Path) -> None:
    report = ptsim.cost(shrinking_trace(tmp_path / "trace.jsonl"))
    assert len(report.layers_frame()) == len(report.layers)
    assert report.kinds_frame()["training_macs"].sum() == report.training_macs_per_image
    assert list(report.epochs_frame()["epoch"]) == list(range(len(report.epochs)))
    assert report.parameters == report.epochs[-1].parameters < report.epochs[0].parameters


@pytest.mark.slow
def test_the_memory_bound_half_of_a_step_is_a_number() -> None:
    """By hand, two images of 3×8×8 in fp32; every operand is read and every result written once."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip
    report = ptsim.cost(model, input_shape=(3, 8, 8), num_classes=10, batch=2, gpu="a100")
    batch_norm, relu, pool = 8 * 256, 2 * 256 + 3 * 256, 2 * (256 + 4)  # elements of an image, forward and backward
    update = 11 * (108 + 8 + 50)  # read and written elements of SGD with momentum and weight decay
    assert report.streamed_bytes == 4 * (2 * (batch_norm + relu + pool) + update)
    assert report.streamed_seconds == pytest.approx(report.streamed_bytes / 1555e9)
    convolution = 2 * (2 * (192 + 256) + 108)  # forward and weight gradient; images need no gradient
    linear = 3 * (2 * (4 + 10) + 40) + 2 * 10  # the bias is added by the same kernel; its gradient is a sum
    assert report.product_bytes == 4 * (convolution + linear)


@pytest.mark.slow
def test_what_stays_in_the_cache_takes_less_time_than_at_the_memorys_bandwidth() -> None:
    """The activations have 16 MiB, the L40S's cache 96 MiB; so `streamed_seconds` is no least time.

    Of 256 channels, so that every one of its 142 SMs has a block of BatchNorm.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 256, 3, padding=1), *(m for _ in range(4) for m in (nn.BatchNorm2d(256), nn.ReLU()))
    )
    report = ptsim.cost(model, input_shape=(3, 16, 16), num_classes=10, batch=64, gpu="l40s")
    step = ptsim.predict(model, input_shape=(3, 16, 16), num_classes=10, batch=64, gpu="l40s")
    layers_s = sum(time.forward_seconds + time.backward_seconds for time in step.by_kind if time.kind != "conv")
    assert report.streamed_seconds is not None
    assert layers_s < 0.9 * report.streamed_seconds


def test_a_device_answers_whether_the_mini_batch_fits() -> None:
    network = residual_network()
    small = ptsim.cost(network, batch=64, gpu="gtx-1080-ti")
    assert small.fits
    assert small.largest_batch is not None
    assert small.largest_batch >= 64
    assert ptsim.cost(network, batch=small.largest_batch, gpu="gtx-1080-ti").fits
    assert not ptsim.cost(network, batch=small.largest_batch + 1, gpu="gtx-1080-ti").fits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"convention": "rough"}, "'exact' or 'paper'"),
        ({"precision": "fp12"}, "fp12"),
        ({"optimizer": "lion"}, "lion"),
        ({"num_classes": 0}, "classes is 0"),
        ({"gpu": "gtx-1080-ti", "precision": "tf32"}, "gtx-1080-ti does not support tf32"),
    ],
)
def test_a_wrong_option_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ptsim.cost("resnet20", **arguments)


@pytest.mark.slow
def test_an_unknown_model_or_device_says_which_exist() -> None:
    with pytest.raises(UnknownNameError, match="resnet20"):
        ptsim.cost("resnet21")
    with pytest.raises(UnknownNameError, match="a100"):
        ptsim.cost("resnet20", gpu="a1000")


def test_the_regularizer_of_a_trace_is_its_own_criterion(tmp_path: Path) -> None:
    records = shrinking_records(epochs=2)
    run = records[0]
    assert isinstance(run, Run)
    settings = run.hyperparameters | {"criterion": "slimming"}
    path = write_trace(tmp_path / "t.jsonl", [msgspec.structs.replace(run, hyperparameters=settings), *records[1:]])
    report = ptsim.cost(path)
    norms = [layer for layer in report.layers if layer.kind is LayerKind.BATCH_NORM]
    assert report.criterion == "slimming"
    assert report.regularizer_bytes == 3 * 4 * sum(layer.output_shape[0] for layer in norms)


@pytest.mark.parametrize(("device", "gpu"), [(CPU, False), ("NVIDIA X9000", True), ("NVIDIA A100-SXM4-40GB", True)])
def test_the_penalty_moves_what_it_does_on_the_traces_kind_of_device(tmp_path: Path, device: str, gpu: bool) -> None:
    trace = ptsim.read_trace(shrinking_trace(tmp_path / "t.jsonl", device=device, energy=False))
    expected = {on: penalty_work("group_lasso", trace.final_network, gpu=on).num_bytes for on in (False, True)}
    assert expected[False] != expected[True]
    assert ptsim.cost(trace).regularizer_bytes == expected[gpu]
    assert ptsim.cost(trace, gpu="a100").regularizer_bytes == expected[True]


def test_the_memory_of_a_trace_is_that_of_its_gpu_and_a_named_one_takes_its_place(tmp_path: Path) -> None:
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl"))
    own = ptsim.cost(trace)
    assert own.peak_memory_bytes == own.epochs[-1].peak_memory_bytes
    h100 = ptsim.cost(trace, gpu="h100-sxm5-80gb")  # whose cuBLAS takes 2 times 32 MiB, an A100's 2 times 8,320 KiB
    assert h100.peak_memory_bytes - own.peak_memory_bytes == 2 * (32 * 2**20 - 8320 * 2**10)
    assert h100.epochs[-1].peak_memory_bytes == h100.peak_memory_bytes


def test_a_trace_without_momentum_that_shrinks_by_proximal_steps_is_costed_so(tmp_path: Path) -> None:
    records = shrinking_records(epochs=2)
    run = records[0]
    assert isinstance(run, Run)

    def cost(**changes: object) -> ptsim.CostReport:
        settings = run.hyperparameters | {"criterion": "slimming"} | changes
        path = write_trace(
            tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl",
            [msgspec.structs.replace(run, hyperparameters=settings), *records[1:]],
        )
        return ptsim.cost(path)

    usual, plain, proximal = cost(), cost(momentum=0.0), cost(regularizer="proximal")
    assert plain.memory.optimizer_bytes == 0 < usual.memory.optimizer_bytes
    assert 11 * plain.update_bytes == 6 * usual.update_bytes
    assert 3 * proximal.regularizer_bytes == 13 * usual.regularizer_bytes
    with pytest.raises(FileFormatError, match=r"momentum is '0\.9', expected a number"):
        cost(momentum="0.9")


def tiny(*, once: bool = False) -> Network:
    """A 3×3 convolution to 4 channels of 8×8 pixels, a norm, a ReLU, a pool and a linear layer to 10 classes."""
    net = NetworkBuilder("tiny", (3, 8, 8), 10)
    x = net.relu("relu", net.batch_norm("bn", net.conv("conv", None, 4)))
    net.linear("fc", net.flatten("flat", net.average_pool("pool", x)), 10)
    network = net.build()
    layers = [msgspec.structs.replace(layer, once=once and layer.name == "fc") for layer in network.layers]
    return msgspec.structs.replace(network, layers=tuple(layers))


def test_every_layer_by_hand() -> None:
    """Two images of 3×8×8 in fp32: a convolution of 4·3·9·64 = 6,912 MACs, a linear layer of 4·10."""
    report = ptsim.cost(tiny(), batch=2)
    assert report.inference_macs_per_image == 6912 + 40
    assert report.training_macs_per_image == 2 * 6912 + 3 * 40  # no gradient of the images
    assert ptsim.cost(tiny(), batch=2, convention="paper").training_macs_per_image == 2 * 6912 + 10 * 10 * 108 + 3 * 40
    assert (report.parameters, report.allreduce_bytes, report.num_buckets) == (108 + 8 + 50, 4 * 166, 1)
    assert report.bn_bytes_per_image == 8 * 256 * 4
    assert ptsim.cost(tiny(), batch=2, precision="fp16").bn_bytes_per_image == 8 * 256 * 2
    assert report.update_bytes == 11 * 4 * 166
    assert (report.origin, report.gpu, report.fits, report.largest_batch) == (None, None, None, None)
    rows = {row.layer: row for row in report.layers}
    for name, macs, moved, saved in (  # forward and both gradients; elements of an image and of weights, both ways
        ("conv", (6912, 6912, 0), (2 * (192 + 256) + 108, 2 * (192 + 256) + 108), 2 * 192),
        ("bn", (0, 0, 0), (2 * 3 * 256, 2 * 5 * 256), 2 * 256 + 2 * 4),
        ("relu", (0, 0, 0), (2 * 2 * 256, 2 * 3 * 256), 2 * 256),
        ("fc", (40, 40, 40), (2 * 14 + 40, 2 * (2 * 14 + 40) + 2 * 10), 2 * 4),  # its bias: a sum
    ):
        row = rows[name]
        assert (row.forward_macs, row.weight_gradient_macs, row.input_gradient_macs) == macs
        assert (row.forward_bytes, row.backward_bytes) == (4 * moved[0], 4 * moved[1])
        assert row.saved_bytes == 4 * saved
    assert report.product_bytes == 4 * (2 * (2 * (192 + 256) + 108) + 3 * (2 * 14 + 40) + 2 * 10)
    kinds = report.kinds_frame().set_index("kind")
    assert list(kinds.index[:2]) == ["conv", "linear"]
    assert tuple(kinds.loc["conv", ["layers", "parameters", "forward_macs", "training_macs"]]) == (1, 108, 6912, 13824)
    assert tuple(kinds.loc["linear", ["layers", "parameters", "forward_macs", "training_macs"]]) == (1, 50, 40, 120)


def test_a_step_of_several_passes_reads_its_weights_in_every_one(tmp_path: Path) -> None:
    """Four images on one GPU in two passes: twice what a step of two images moves, and one update."""
    network = tiny(once=True)
    recorded = ptsim.read_trace(shrinking_trace(tmp_path / "t.jsonl", epochs=1, batch=4, num_train=40, profiles=False))
    (epoch,) = recorded.epochs
    epoch = msgspec.structs.replace(epoch, architecture=network.id, passes=2)
    trace = msgspec.structs.replace(recorded, networks={network.id: network}, epochs=(epoch,))
    report, half = ptsim.cost(trace), ptsim.cost(network, batch=2)
    assert (report.batch, report.passes, half.passes) == (4, 2, 1)
    assert (report.inference_macs_per_image, report.training_macs_per_image) == (6912 + 20, 2 * 6912 + 3 * 20)
    assert report.product_bytes == 2 * half.product_bytes
    assert report.streamed_bytes - report.update_bytes == 2 * (half.streamed_bytes - half.update_bytes)
    assert report.update_bytes == half.update_bytes == 11 * 4 * 166
    assert [row.saved_bytes for row in report.layers] == [row.saved_bytes for row in half.layers]
    (row,) = (row for row in report.layers if row.layer == "fc")
    assert (row.forward_macs, row.weight_gradient_macs, row.input_gradient_macs) == (20, 20, 20)
    (row,) = report.epochs
    assert row.inference_macs_per_image == report.inference_macs_per_image
    assert row.training_macs_per_image == report.training_macs_per_image
    predicted = ptsim.predict(trace, gpu="a100")
    flops = 2 * 4 * (2 * 6912 + 3 * 20)
    assert predicted.mfu_fraction == pytest.approx(flops / predicted.step_seconds / 19.5e12)


def test_an_image_bears_its_share_of_what_runs_once_a_mini_batch() -> None:
    report = ptsim.cost(tiny(once=True), batch=4)
    assert report.inference_macs_per_image == 6912 + 10
    assert report.training_macs_per_image == 2 * 6912 + 3 * 10
    (row,) = (row for row in report.layers if row.layer == "fc")
    assert (row.forward_macs, row.weight_gradient_macs, row.input_gradient_macs) == (10, 10, 10)


def test_a_proximal_penalty_moves_what_its_own_steps_do(tmp_path: Path) -> None:
    """Squares, their sum and the scaling, 5 accesses, for input and for output groups: 10 in all."""
    trace = ptsim.read_trace(shrinking_trace(tmp_path / "t.jsonl"))
    settings = {**trace.run.hyperparameters, "regularizer": "proximal"}
    proximal = msgspec.structs.replace(trace, run=msgspec.structs.replace(trace.run, hyperparameters=settings))
    for run in (proximal, msgspec.structs.replace(proximal, epochs=())):  # one of which no epoch is over
        weights = sum(p.num_elements for p in run.final_network.parameters if len(p.shape) > 1)
        assert ptsim.cost(run, gpu="a100").regularizer_bytes == 4 * 10 * weights
    assert ptsim.cost(trace, gpu="a100").regularizer_bytes != ptsim.cost(proximal, gpu="a100").regularizer_bytes
