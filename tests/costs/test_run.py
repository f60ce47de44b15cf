from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ptsim.costs.flops import training_macs
from ptsim.costs.memory import iteration_memory
from ptsim.costs.run import recorded_device, run_cost
from ptsim.hardware.catalog import load_device
from ptsim.network import Precision
from ptsim.trace.io import read_trace
from tests.traces import shrinking_trace


def test_an_epoch_costs_its_own_architecture_times_its_images(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "trace.jsonl"))
    costs = run_cost(trace)
    assert len(costs) == len(trace.epochs)
    for cost, epoch in zip(costs, trace.epochs, strict=True):
        assert cost.training_macs == training_macs(trace.network_of(epoch)) * epoch.num_images
        assert cost.gradient_bytes == 4 * trace.network_of(epoch).num_parameters * epoch.num_iterations
    assert costs[-1].training_macs_per_image < costs[0].training_macs_per_image


def test_a_ring_sends_two_times_p_minus_one_over_p(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "trace.jsonl"))
    alone, four = run_cost(trace, world_size=1)[0], run_cost(trace, world_size=4)[0]
    assert alone.allreduce_bytes_per_gpu == 0
    assert four.allreduce_bytes_per_gpu == pytest.approx(1.5 * four.gradient_bytes)
    with pytest.raises(ValueError, match="world_size is 0"):
        run_cost(trace, world_size=0)


def test_an_epoch_that_accumulates_gradients_needs_the_memory_of_a_pass(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "trace.jsonl"))
    first, second, *rest = trace.epochs
    assert first.architecture == second.architecture
    second = msgspec.structs.replace(second, passes=2)
    trace = msgspec.structs.replace(trace, epochs=(first, second, *rest))
    need = iteration_memory(trace.network_of(second), trace.setting_of(second), device=recorded_device(trace))
    costs = run_cost(trace)
    assert costs[1].peak_memory_bytes == need.peak_bytes < costs[0].peak_memory_bytes


def test_an_epoch_without_the_penalty_needs_no_memory_for_its_tables(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "trace.jsonl"))
    first, second, *rest = trace.epochs
    first = msgspec.structs.replace(first, penalty_coefficient=0.0)
    trace = msgspec.structs.replace(trace, epochs=(first, second, *rest))
    costs = run_cost(trace)
    gathered = sum(p.num_elements for p in trace.network_of(second).parameters if len(p.shape) > 1)
    # Three tables of 4 bytes an entry; scratch after the backward pass is less than what is alive within it.
    assert costs[1].peak_memory_bytes - costs[0].peak_memory_bytes == 3 * 4 * gathered


def test_an_epoch_by_hand(tmp_path: Path) -> None:
    """ResNet-14 on 32×32 images: 39 iterations of 64 images on each of 2 GPUs, in bf16.

    Weights: stem 432; stages 4 · 2,304, 4,608 + 3 · 9,216 + 512 and 18,432 + 3 · 36,864 + 2,048; 5 BatchNorms of each
    width, 1,120; 650. They multiply on 1,024, 256 and 64 pixels. BatchNorm normalises 5 · 16 · 1,024, 5 · 32 · 256 and
    5 · 64 · 64 elements with 8 accesses of 2 bytes.
    """
    trace = read_trace(shrinking_trace(tmp_path / "trace.jsonl", world_size=2, precision=Precision.BF16))
    cost = run_cost(trace)[0]
    macs = 432 * 1024 + 9216 * 1024 + (32_256 + 512) * 256 + (129_024 + 2048) * 64 + 640
    per_image = 3 * macs - 432 * 1024  # images need no gradient
    normalised = 8 * 2 * (81_920 + 40_960 + 20_480)
    assert (cost.batch_per_gpu, cost.world_size, cost.num_iterations, cost.num_images) == (64, 2, 39, 4992)
    assert (cost.inference_macs_per_image, cost.training_macs_per_image) == (macs, per_image)
    assert cost.training_macs == 4992 * per_image
    assert (cost.bn_bytes_per_image, cost.bn_bytes) == (normalised, 4992 * normalised)
    assert cost.parameters == 175_258
    assert cost.gradient_bytes == 39 * 4 * 175_258
    assert cost.allreduce_bytes_per_gpu == cost.gradient_bytes  # 2 · 1/2
    assert cost.measured_peak_memory_bytes == trace.epochs[0].peak_memory_bytes
    more = run_cost(trace, world_size=4)[0]
    assert (more.world_size, more.training_macs, more.num_images) == (4, cost.training_macs, 4992)
    seven = run_cost(trace, world_size=7)[0].allreduce_bytes_per_gpu
    assert seven == 46_868_997  # 2 · 6/7 of 27,340,248 is 46,868,996.57


def test_a_run_on_a_processor_has_no_gpu_of_the_catalog_whatever_its_device_is_called(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "trace.jsonl"))
    assert recorded_device(trace) == load_device("a100-sxm4-40gb")
    used = msgspec.structs.replace(trace.run.device, kind="cpu")
    assert recorded_device(msgspec.structs.replace(trace, run=msgspec.structs.replace(trace.run, device=used))) is None


def test_what_runs_once_runs_in_every_pass_of_every_gpu(tmp_path: Path) -> None:
    """The last layer, 640 MACs, as one that runs once: 3 passes of each of 39 mini-batches on 2 GPUs."""
    trace = read_trace(shrinking_trace(tmp_path / "trace.jsonl", world_size=2))
    epoch = msgspec.structs.replace(trace.epochs[0], passes=3)
    *layers, last = trace.network_of(epoch).layers
    assert last.forward_macs == 640
    without, once = (
        msgspec.structs.replace(trace.network_of(epoch), layers=(*layers, msgspec.structs.replace(last, **changes)))
        for changes in ({"forward_macs": 0}, {"once": True})
    )
    costs = [
        run_cost(msgspec.structs.replace(trace, epochs=(epoch,), networks={epoch.architecture: network}))[0]
        for network in (without, once)
    ]
    assert costs[1].training_macs - costs[0].training_macs == 3 * 640 * 3 * 39 * 2
    assert costs[1].training_macs_per_image - costs[0].training_macs_per_image == 3 * 640 * 3 // 64
    assert costs[1].inference_macs_per_image - costs[0].inference_macs_per_image == 640 * 3 // 64
