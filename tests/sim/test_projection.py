"""The rows of a projection: every column holds its own number, of the whole epoch where its name says seconds."""

from __future__ import annotations

import datetime

import msgspec

from ptsim.sim.faults import FaultyRun
from ptsim.sim.options import HourPrice
from ptsim.sim.projection import EpochProjection, RunProjection, projection_row, told_notes

STEP = EpochProjection(
    epoch=3,
    architecture="a",
    batch_per_gpu=64,
    num_iterations=10,
    step_s=2.75,
    forward_s=0.125,
    backward_s=0.25,
    product_s=0.3125,
    hooks_s=0.125,
    optimizer_s=0.03125,
    regularizer_s=0.0625,
    overhead_s=0.015625,
    input_wait_s=0.5,
    straggler_wait_s=0.75,
    communication_s=1.5,
    exposed_communication_s=1.0,
    communication_wait_s=0.0078125,
    wire_bytes_per_gpu=1000.0,
    total_s=27.5,
    low_s=20.0,
    high_s=35.0,
    peak_memory_bytes=19,
    needed_memory_bytes=23,
    energy_j=17.0,
    tier="scaled",
)
PRICE = HourPrice(usd=2.0, source="a list", date=datetime.date(2026, 9, 24), instance_gpus=8)
FAILED = FaultyRun(
    total_s=1.0, low_s=2.0, high_s=3.0, num_failures=4.0, checkpoint_s=5.0, lost_s=6.0, restart_s=7.0, slow_s=8.0,
    goodput=0.875,
)  # fmt: skip
RUN = RunProjection(
    trace="t.jsonl",
    model="net",
    origin="recorded",
    cluster="here",
    device="gpu",
    gpus=9,
    scaling="weak",
    epochs=(msgspec.structs.replace(STEP, epoch=2, peak_memory_bytes=11), STEP),
    reconfiguration_s=30.0,
    reconfiguration_low_s=29.0,
    reconfiguration_high_s=31.0,
    startup_s=32.0,
    faults_s=33.0,
    total_s=7200.0,
    compute_s=34.0,
    exposed_communication_s=35.0,
    communication_wait_s=36.0,
    input_wait_s=37.0,
    straggler_wait_s=38.0,
    allreduce_bytes_per_gpu=39.0,
    energy_j=40.0,
    energy_low_j=41.0,
    energy_high_j=42.0,
    price=PRICE,
    low_s=5400.0,
    high_s=9000.0,
    tier="measured",
    network_tier="datasheet",
    mfu_fraction=0.43,
    input_images_per_s=44.0,
    input_limit_gpus=6,
    draw_spread=0.45,
    complete=True,
    notes=("one", "two"),
    faults=FAILED,
)


def test_the_row_of_a_run_has_every_number_under_its_name() -> None:
    """9 GPUs are billed as 16, at 2 USD: 64 USD for 2 hours, 48 for 1.5 and 80 for 2.5."""
    assert projection_row(RUN) == {
        "trace": "t.jsonl",
        "model": "net",
        "origin": "recorded",
        "cluster": "here",
        "device": "gpu",
        "gpus": 9,
        "scaling": "weak",
        "total_seconds": 7200.0,
        "low_seconds": 5400.0,
        "high_seconds": 9000.0,
        "compute_seconds": 34.0,
        "mfu_fraction": 0.43,
        "exposed_communication_seconds": 35.0,
        "communication_wait_seconds": 36.0,
        "input_wait_seconds": 37.0,
        "input_images_per_second_per_gpu": 44.0,
        "input_limit_gpus_per_node": 6,
        "straggler_wait_seconds": 38.0,
        "reconfiguration_seconds": 30.0,
        "low_reconfiguration_seconds": 29.0,
        "high_reconfiguration_seconds": 31.0,
        "startup_seconds": 32.0,
        "fault_seconds": 33.0,
        "goodput": 0.875,
        "allreduce_bytes_per_gpu": 39.0,
        "peak_memory_bytes": 19,
        "gpu_hours": 18.0,
        "energy_joules": 40.0,
        "low_energy_joules": 41.0,
        "high_energy_joules": 42.0,
        "draw_spread": 0.45,
        "price_usd_per_gpu_hour": 2.0,
        "price_date": "2026-09-24",
        "price_source": "a list",
        "billed_gpus": 16,
        "cost_usd": 64.0,
        "low_cost_usd": 48.0,
        "high_cost_usd": 80.0,
        "tier": "measured",
        "network_tier": "datasheet",
        "num_epochs": 2,
        "complete": True,
        "notes": "one; two",
    }


def test_what_is_not_known_has_no_number_and_a_run_without_failures_is_all_good() -> None:
    row = projection_row(msgspec.structs.replace(RUN, price=None, faults=None, network_tier=None))
    unknown = ("price_usd_per_gpu_hour", "price_date", "price_source", "billed_gpus", "network_tier")
    assert [row[name] for name in (*unknown, "cost_usd", "low_cost_usd", "high_cost_usd")] == [None] * 8
    assert row["goodput"] == 1.0
    told = msgspec.structs.replace(PRICE, date=None, instance_gpus=1)
    mine = projection_row(msgspec.structs.replace(RUN, price=told))
    assert (mine["price_date"], mine["billed_gpus"], mine["cost_usd"]) == (None, 9, 36.0)


def test_the_row_of_an_epoch_is_its_step_times_the_iterations() -> None:
    assert STEP.compute_s == 0.484375  # 0.125 + 0.25 + 0.03125 + 0.0625 + 0.015625
    _, row = RUN.epochs_frame().to_dict("records")
    assert row == {
        "trace": "t.jsonl",
        "cluster": "here",
        "device": "gpu",
        "epoch": 3,
        "architecture": "a",
        "batch_per_gpu": 64,
        "num_gpus": 9,
        "num_iterations": 10,
        "wall_seconds": 27.5,
        "low_wall_seconds": 20.0,
        "high_wall_seconds": 35.0,
        "data_wait_seconds": 5.0,
        "forward_seconds": 1.25,
        "backward_seconds": 2.5,
        "product_seconds": 3.125,
        "hook_seconds": 1.25,
        "regularizer_seconds": 0.625,
        "optimizer_seconds": 0.3125,
        "overhead_seconds": 0.15625,
        "straggler_wait_seconds": 7.5,
        "communication_seconds": 15.0,
        "exposed_communication_seconds": 10.0,
        "communication_wait_seconds": 0.078125,
        "step_median_seconds": 2.75,
        "wire_bytes_per_gpu": 10_000.0,
        "peak_memory_bytes": 19,
        "energy_joules": 17.0,
        "tier": "scaled",
    }


def test_a_note_of_some_gpu_counts_begins_with_them_and_one_of_all_is_said_once() -> None:
    notes = {
        1: ("of all", "alone"),
        8: ("of all", "together"),
        1024: ("of all", "together", "1,024 GPUs do not fill nodes of 9", "all 1,024 GPUs of a node"),
    }
    runs = [msgspec.structs.replace(RUN, gpus=gpus, notes=said) for gpus, said in notes.items()]
    assert told_notes(runs) == [
        "of all",
        "1 GPU: alone",
        "8 and 1,024 GPUs: together",
        "1,024 GPUs do not fill nodes of 9",
        "1,024 GPUs: all 1,024 GPUs of a node",
    ]
    assert told_notes([RUN]) == told_notes([RUN, RUN]) == ["one", "two"]
