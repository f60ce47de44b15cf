from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pandas as pd
import pytest

import ptsim
from ptsim.costs.step import StepTime
from ptsim.hardware.catalog import load_cluster
from ptsim.network import LayerKind, Precision
from ptsim.report import causes
from ptsim.report.projected import Projector
from ptsim.sim.options import Options
from ptsim.trace.pairs import compare_runs, first_epochs
from ptsim.trace.trace import Trace
from tests.report.simulated import FixedProjector, epoch_projection, run_projection
from tests.traces import dense_trace, shrinking_trace

PRODUCTS = "convolutions and linear layers"


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    folder = tmp_path_factory.mktemp("traces")
    paths: list[Path] = [dense_trace(folder / "dense.jsonl"), shrinking_trace(folder / "pruned.jsonl")]
    return [ptsim.read_trace(path) for path in paths]


def excess(step_floor: float = 0.1, **pruned_seconds: float) -> pd.DataFrame:
    """Parts of a dense run of 10 s each beside a pruned run's; half of the MACs are left."""
    names = {"host": "loss and host gaps", "products": PRODUCTS, "moved": "memory-bound layers"}
    names["hooks"] = "gradient hooks"
    rows = [
        {"part": names[key], "dense_seconds": 10.0, "pruned_seconds": seconds, "excess_seconds": seconds - 5.0}
        for key, seconds in pruned_seconds.items()
    ]
    usual = {"macs_fraction": 0.5, "floor_fraction": 0.1, "rounded_seconds": math.nan}
    return pd.DataFrame(rows).assign(**usual, step_floor_fraction=step_floor)


def test_a_run_that_waits_for_its_host_is_called_host_bound() -> None:
    lead, *reasons = causes.why(excess(host=10.0, products=5.0, moved=6.0))
    assert "50.0 % of the training MACs and takes 70.0 % of the time" in lead
    assert len(reasons) == 2  # of 6 s in excess, 5 are the host's and 1 is the memory's
    assert reasons[0].startswith("Host-bound: for 47.6 % of the pruned run")
    assert reasons[1].startswith("Memory-bound layers")


def test_where_time_follows_macs_there_is_nothing_to_explain() -> None:
    (only,) = causes.why(excess(products=5.0, moved=5.1))
    assert "time follows the MACs" in only


def test_steps_that_one_image_would_take_as_well_are_called_launch_bound() -> None:
    *_, last = causes.why(excess(0.8, products=9.0))
    assert last.startswith("Launch-bound: a pruned step on a single image would take 80.0 %")


@pytest.mark.parametrize(("part", "usual"), [("moved", "they move bytes"), ("products", "tiles and waves")])
def test_layers_of_short_kernels_are_explained_by_these(part: str, usual: str) -> None:
    """By the part's own floor; that of whole steps decides nothing about a part."""
    for floor, says in ((0.31, "their kernels are so short"), (0.29, usual)):
        _, reason, *_ = causes.why(excess(0.8, **{part: 10.0}).assign(floor_fraction=floor))
        assert "take 100.0 % of their dense time: " in reason
        assert says in reason
        assert ("bytes" in reason or "tiles" in reason) == (floor < 0.3)


def test_copies_that_pad_channels_are_the_cause_where_they_explain_half_of_the_excess() -> None:
    """Of 10 s, 5 s are in excess: rounding that saves 2.6 s is the cause, 2.4 s advice, 0.4 s nothing."""
    for rounded_s, is_cause, left in ((7.4, True, "74.0 %"), (7.6, False, "76.0 %"), (9.6, False, "")):
        _, reason = causes.why(excess(products=10.0).assign(rounded_seconds=rounded_s))
        assert ("convolutions copy tensors whose channels are no multiple of 8, to pad them." in reason) == is_cause
        assert ("(channel_multiple = 8)" in reason) == bool(left)
        assert f"they would take {left} of that." in reason or not left
    _, reason = causes.why(excess(moved=10.0).assign(rounded_seconds=5.0))  # another part
    assert "multiple" not in reason


def test_hooks_of_gradients_are_a_reason_of_their_own() -> None:
    """Every gradient of a narrow tensor is copied as the one of a wide tensor was."""
    _, hooks, _ = causes.why(excess(0.8, moved=5.0, hooks=10.0).assign(floor_fraction=math.nan))
    assert hooks.startswith("Gradient hooks take 100.0 % of their dense time")


def test_small_gaps_and_small_reasons_are_left_out() -> None:
    """Below three points of time over MACs, 15 % of all excess, and 30 % of a step for a single image."""
    for pruned_s, sentences in ((5.29, 1), (5.31, 2)):
        assert len(list(causes.why(excess(products=pruned_s)))) == sentences
    for moved_s, reasons in ((5.8, 1), (5.9, 2)):  # of 0.8 in 5.8 s of excess, or 0.9 in 5.9 s
        assert len(list(causes.why(excess(host=10.0, moved=moved_s)))) == 1 + reasons
    # what shrinks by more than the MACs is no smaller an excess of the others: 0.8 in 5.8 s again
    assert len(list(causes.why(excess(host=10.0, moved=5.8, products=1.0)))) == 2
    for floor, launch_bound in ((0.29, False), (0.31, True)):
        *_, last = causes.why(excess(floor, products=9.0))
        assert last.startswith("Launch-bound") == launch_bound
    fresh = excess(products=5.0, moved=9.0)
    fresh["dense_seconds"] = [10.0, 0.0]
    lead, reason = causes.why(fresh)
    assert "takes 140.0 % of the time" in lead
    assert "take more than all of their dense time" in reason


def test_what_exceeds_the_macs_by_hand(traces: list[Trace]) -> None:
    """A step updates for 1 s and half a second for every image: 1.5 s with one image, 2 s with two."""
    dense, pruned = traces
    slow = epoch_projection(forward_s=2.0, backward_s=4.0, product_s=4.0)
    projector = FixedProjector(
        {False: run_projection(), True: run_projection(epochs=(slow,))}, layer_s=(0.0, 0.0), update_s=(1.0, 0.5)
    )
    epochs = tuple(
        msgspec.structs.replace(epoch, batch_per_gpu=batch, num_iterations=steps)
        for epoch, batch, steps in zip(pruned.epochs, (2, 2, 4, 4, 4, 4), (10, 10, 5, 5, 5, 5), strict=True)
    )
    (comparison,) = compare_runs([dense, msgspec.structs.replace(pruned, epochs=epochs)])
    frame = causes.excess_frame(comparison, projector, 4).set_index("part")
    trained = [(run.network_of(e), e.num_images) for run in (comparison.pruned, dense) for e in run.epochs]
    macs = [images * (3 * net.forward_macs - net.layer("conv1").forward_macs) for net, images in trained]
    left = sum(macs[:6]) / sum(macs[6:])
    assert frame.macs_fraction.unique() == pytest.approx([left])
    products, moved, hooks = frame.loc[[PRODUCTS, "memory-bound layers", "gradient hooks"]].iloc
    assert (products.dense_seconds, products.pruned_seconds, moved.pruned_seconds) == (50.0, 40.0, 5.0)
    assert products.excess_seconds == pytest.approx(40 - left * 50)
    assert moved.excess_seconds == pytest.approx(5 - left * 25)  # they shrank more than the MACs
    assert hooks.excess_seconds == pytest.approx(15 - left * 15)
    assert frame.step_floor_fraction.unique() == pytest.approx([(20 * 1.5 + 20 * 1.5) / (20 * 2.0 + 20 * 3.0)])
    assert frame.floor_fraction.isna().all()  # the layers take no time here
    assert frame.rounded_seconds.isna().all()  # recorded in fp32


def test_parts_that_take_nothing_are_left_out(traces: list[Trace]) -> None:
    """Rounding leaves 2e-15 s of one part: nothing."""
    step_s = 0.1 + 0.2 + 0.3
    epoch = epoch_projection(
        forward_s=0.1, backward_s=0.2, product_s=0.2, hooks_s=0.0, optimizer_s=0.3, regularizer_s=0.0, overhead_s=0.0,
        input_wait_s=0.0, exposed_communication_s=0.0, num_iterations=1, total_s=step_s * (1 + 4e-15),
    )  # fmt: skip
    same = run_projection(epochs=(epoch,))
    (comparison,) = compare_runs(traces)
    frame = causes.excess_frame(comparison, FixedProjector({False: same, True: same}), 1)
    assert list(frame.part) == [
        PRODUCTS,
        "memory-bound layers",
        "optimizer and regulariser",
        "start and reconfiguration",
    ]


def test_a_single_image_in_steps_of_several_passes(traces: list[Trace]) -> None:
    """The same mini-batch at once, and in four passes; of whole steps, and of products and other layers."""
    trace, projector = first_epochs(traces[0], 2), Projector(load_cluster("dgx-a100"), Options())
    epochs = tuple(msgspec.structs.replace(e, passes=n) for e, n in zip(trace.epochs, (1, 4), strict=True))
    (comparison,) = compare_runs(traces)
    pruned = msgspec.structs.replace(comparison.pruned, epochs=epochs, networks=trace.networks)
    changed = msgspec.structs.replace(comparison, pruned=pruned)
    ones = [projector.step(pruned, msgspec.structs.replace(e, batch_per_gpu=1)) for e in epochs]
    wholes = [projector.step(pruned, epoch) for epoch in epochs]
    frame = causes.excess_frame(changed, projector, 1).set_index("part")
    expected = sum(step.compute_s for step in ones) / sum(step.compute_s for step in wholes)
    assert frame.step_floor_fraction.unique() == pytest.approx([expected])  # as many iterations in both

    def layers_s(steps: list[StepTime], *, products: bool) -> float:
        kinds = (LayerKind.CONV, LayerKind.LINEAR)
        times = [t for step in steps for t in step.layers if (t.kind in kinds) == products]
        return sum(t.forward_s + t.backward_s for t in times)

    for part, products in ((PRODUCTS, True), ("memory-bound layers", False)):
        share = layers_s(ones, products=products) / layers_s(wholes, products=products)
        assert frame.floor_fraction[part] == pytest.approx(share)


def half_precision(trace: Trace, **changes: object) -> Trace:
    run = msgspec.structs.replace(trace.run, precision=Precision.FP16, memory_format="channels_last")
    return msgspec.structs.replace(trace, run=msgspec.structs.replace(run, **changes), profiles=())


def test_whole_multiples_are_projected_where_convolutions_pad_others(traces: list[Trace]) -> None:
    """In half precision on tensor cores, and only in the layout that needs no copies anyway."""
    pruned = half_precision(traces[1])
    tensor_cores, none = (Projector(load_cluster(name), Options()) for name in ("dgx-a100", "titan-xp-x4"))
    rounding = causes.rounding_projector(pruned, tensor_cores)
    assert rounding is not None
    assert rounding.options == Options(channel_multiple=8)
    assert causes.rounding_projector(pruned, none) is None
    assert causes.rounding_projector(half_precision(traces[1], memory_format="contiguous"), tensor_cores) is None
    assert causes.rounding_projector(traces[1], tensor_cores) is None  # fp32
    assert causes.rounding_projector(pruned, rounding) is None  # rounded already
    (comparison,) = compare_runs([half_precision(traces[0]), pruned])
    frame = causes.excess_frame(comparison, tensor_cores, 1).set_index("part")
    epochs = rounding.run(pruned, 1).epochs
    assert frame.rounded_seconds[PRODUCTS] == pytest.approx(sum(e.product_s * e.num_iterations for e in epochs))
    assert frame.rounded_seconds[PRODUCTS] != pytest.approx(frame.pruned_seconds[PRODUCTS])
