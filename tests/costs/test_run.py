from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ptsim.costs.flops import training_macs
from ptsim.costs.memory import iteration_memory
from ptsim.costs.run import recorded_device, run_cost
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
