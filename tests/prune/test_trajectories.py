"""What planned trajectories are made of: progress, whole widths, a table of costs, targets, roles. All by hand."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from torch import nn

from ptsim.errors import UsageError
from ptsim.network import Layer, LayerKind
from ptsim.prune.trajectories.build import dense_network
from ptsim.prune.trajectories.catalog import with_targets
from ptsim.prune.trajectories.file import from_file
from ptsim.prune.trajectories.like import imitate, recorded_densities
from ptsim.prune.trajectories.problem import Edge, Problem, Trajectory
from ptsim.prune.trajectories.roles import roles
from ptsim.prune.trajectories.table import CostTable, Seen
from ptsim.prune.trajectories.targets import OutOfReachError, Targets, meet, parse_targets
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace
from tests.traces import residual_network, shrinking_trace


def table() -> CostTable:
    """Two edges: a of 8 channels, and b of 5 inside a branch.

    Rows: a convolution of the images to a; one of a to b; a BatchNorm of b; one of a; a depthwise convolution, half of
    whose channels are a's and half cannot go, and which goes with b.
    """
    return CostTable(
        inputs=np.array([[0, 0], [1, 0], [0, 0], [0, 0], [0, 0]], dtype=float),
        outputs=np.array([[1, 0], [0, 1], [0, 1], [1, 0], [0.5, 0]]),
        fixed_inputs=np.array([1.0, 0, 1, 1, 1]),
        fixed_outputs=np.array([0, 0, 0, 0, 0.5]),
        product=np.array([True, True, False, False, False]),
        dead_with=np.array([[0, 0], [0, 0], [0, 0], [0, 0], [0, 1]], dtype=float),
        inference=np.array([10.0, 30, 0, 0, 60]),
        training=np.array([20.0, 90, 0, 0, 60]),
        bn=np.array([0.0, 0, 4, 6, 0]),
        full=np.array([8.0, 5]),
    )


def problem(epochs: int = 10, events: tuple[int, ...] = (1, 4, 9)) -> Problem:
    edges = (
        Edge(name="a", width=8, role="stream", depth=0.4, removable=False),
        Edge(name="b", width=5, role="branch", depth=0.4, removable=True),
    )
    return Problem(model="made up", edges=edges, epochs=epochs, events=events, table=table())


def test_a_reconfiguration_after_the_second_of_ten_epochs_is_a_fifth_of_the_run() -> None:
    asked = problem()
    assert asked.progress.tolist() == [0.2, 0.5, 1.0]
    assert asked.lengths.tolist() == [2, 3, 5, 0]
    assert asked.noise().tolist() == [0, 0]  # the typical trajectory


def test_densities_become_whole_widths_that_never_grow_and_keep_a_channel() -> None:
    asked = problem()
    # 8 · ½ = 4 and 5 · ½ = 2.5; 7.2 would grow again and 0.45 is none; b may vanish, a may not
    densities = np.array([[0.5, 0.5], [0.9, 0.09], [0.0, 0.3]])
    assert asked.rounded(densities).tolist() == [[4, 3], [4, 0], [1, 0]]
    assert asked.rounded(densities, may_vanish=np.array([True, False])).tolist() == [[4, 3], [4, 1], [0, 1]]
    assert asked.rounded(densities, offset=0.4).tolist() == [[4, 2], [4, 0], [1, 0]]
    assert asked.rounded(np.array([[1.4, 1.0]]), offset=0.95).tolist() == [[8, 5]]  # never wider than dense


@pytest.mark.parametrize(
    ("widths", "inference", "training", "bn"),
    [
        ([8, 5], 100, 170, 10),
        ([4, 5], 5 + 15 + 45, 10 + 45 + 45, 4 + 3),  # ¾ of the depthwise layer: half of it cannot go
        ([8, 1], 10 + 6 + 60, 20 + 18 + 60, 0.8 + 6),
        ([4, 1], 5 + 3 + 45, 10 + 9 + 45, 0.8 + 3),  # a half times a fifth of the second convolution
        ([8, 0], 10, 20, 6),  # the branch is gone
    ],
)
def test_costs_fall_with_the_product_of_the_widths(
    widths: list[int], inference: float, training: float, bn: float
) -> None:
    found = [part.item() for part in table().fractions(np.array(widths))]
    assert found == pytest.approx([inference / 100, training / 170, bn / 10])


def test_what_real_networks_had_is_read_between_and_below_what_was_seen() -> None:
    seen = Seen(said=(0.2, 0.5, 1.0), true=(0.3, 0.6, 1.0))
    found = seen.of(np.array([0.1, 0.2, 0.35, 0.75, 1.0]))
    assert found.tolist() == pytest.approx([0.15, 0.3, 0.45, 0.8, 1.0])


def test_an_edge_is_memory_bound_by_its_traffic_per_flop_beside_the_others() -> None:
    """By hand: a writes 20 + 60/2 and reads 90, for traffic 6; b writes 90, for traffic 4. Their mean is geometric."""
    a_per_b = (6 / 140) / (4 / 90)
    assert table().intensity.tolist() == pytest.approx([math.sqrt(a_per_b), 1 / math.sqrt(a_per_b)])


def test_targets_are_read_by_name() -> None:
    given = parse_targets("training=0.6, inference = 0.47,layers=0")
    assert given == Targets(training=0.6, inference=0.47, bn=None, layers=0.0, saturates=1.0)
    assert parse_targets("inference=0.5,training=1,bn=0.7,saturates=0.4") == Targets(
        training=1.0, inference=0.5, bn=0.7, saturates=0.4
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training=0.6,inference=0.5,training=0.6", "training is given twice"),
        ("inference=0.5", "need training="),
        ("training=0.6,inference=0", "inference is 0, expected a fraction above 0 and at most 1"),
        ("training=0.6,inference=0.5,bn=0", "bn is 0, expected a fraction above 0"),
        ("training=0.6,inference=0.5,layers=-0.1", "layers is -0.1, expected a fraction"),
        ("training=0.6,inference=nan", "inference is nan, expected a fraction"),
    ],
)
def test_targets_that_are_none_are_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_targets(text)


def test_a_file_gives_straight_lines_from_the_dense_network_through_its_epochs(tmp_path: Path) -> None:
    file = tmp_path / "densities.toml"
    file.write_text(
        'source = "a table"\n'
        '[[prune]]\nrole = "branch"\nepochs = [5]\ndensities = [0.6]\n'
        '[[prune]]\nedge = "a"\nepochs = [2, 10]\ndensities = [0.5, 0.25]\n'
    )
    found = from_file(str(file), problem())
    # after 2, 5 and 10 epochs: a is at 0.5, 0.40625 and 0.25 of 8, b at 0.84, 0.6 and still 0.6 of 5
    assert found.widths.tolist() == [[4, 4], [3, 3], [2, 3]]
    assert [(a.what, a.source) for a in found.assumed] == [("densities by edge and epoch", f"{file}: a table")]
    # after 7 of 100 epochs exactly 3½ of 8 channels, which is 4; 0.07 · 100 is more than 7, and all are gone at 8
    file.write_text('[[prune]]\nedge = "a"\nepochs = [7, 8]\ndensities = [0.4375, 0]\n')
    assert from_file(str(file), problem(epochs=100, events=(6,))).widths.tolist() == [[4, 5]]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (0, {"conv1": ("stem", 0.0), "fc": ("plain", 1.0)}),
        (1, {"conv1": ("stem", 0.0), "layer1.0.conv1": ("branch", 1 / 3), "layer1.0.conv2": ("stream", 2 / 3),
             "fc": ("branch", 1.0)}),
    ],
)  # fmt: skip
def test_layers_stand_by_their_number_and_by_the_sums_that_they_meet(
    blocks: int, expected: dict[str, tuple[str, float]]
) -> None:
    assert roles(residual_network((4,), (blocks,), input_shape=(3, 8, 8))) == expected


def test_a_recorded_run_is_imitated_by_progress_depth_and_role(tmp_path: Path) -> None:
    """Two blocks of width 16: inside of them 16, 8, 4; around them 16, 11, 8; the second goes after two thirds."""
    file = shrinking_trace(tmp_path / "run.jsonl", widths=(16,), blocks=(2,), keep=0.5, profiles=False)
    trace = read_trace(file)
    times, densities, places = recorded_densities(trace)
    assert times.tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert places == [("stem", 0.0), ("branch", 0.2), ("stream", 0.4), ("branch", 0.6), ("stream", 0.8)]
    assert (16 * densities).tolist() == [[16] * 5, [11, 8, 11, 8, 11], [8, 4, 8, 0, 0]]
    # a at depth 0.4 like the first block's stream; b half way between the two branches: ½ and ⅛ of 5 channels
    assert imitate(trace, problem(epochs=6, events=(1, 3))).widths.tolist() == [[6, 3], [4, 1]]
    # half way between the two: (11 + 8)/32 of 8 channels, (½ + ⅛)/2 of 5
    alike = imitate(trace, problem(epochs=6, events=(2,)))
    assert alike.widths.tolist() == [[5, 2]]
    assert "as hard as the recorded one at penalty ratio 0.2; another ratio" in alike.assumed[1].what
    # branches at the depths 0 and ½ end with ¼ and 1/16; raised to one power they are u and u², whose mean is 0.3
    u = (math.sqrt(1 + 4 * 0.6) - 1) / 2
    softer = imitate(trace, even([1, 1]), inference=0.3)
    assert softer.widths[-1].tolist() == pytest.approx([1000 * u, 1000 * u**2], abs=2)
    assert softer.targets == {"inference": 0.3}


def shrunk(tmp_path: Path) -> tuple[Trace, str]:
    """The run of two blocks of the test above, and the name of its last network."""
    file = shrinking_trace(tmp_path / "run.jsonl", widths=(16,), blocks=(2,), keep=0.5, profiles=False)
    trace = read_trace(file)
    return trace, trace.reconfigurations[-1].after


def test_a_layer_behind_a_gather_is_the_layer_that_it_was(tmp_path: Path) -> None:
    trace, last = shrunk(tmp_path)
    network = trace.networks[last]
    layers = tuple(
        msgspec.structs.replace(layer, name=f"{layer.name}.layer") if layer.name == "layer1.0.conv1" else layer
        for layer in network.layers
    )
    trace.networks[last] = msgspec.structs.replace(network, layers=layers)
    assert (16 * recorded_densities(trace)[1][-1]).tolist() == [8, 4, 8, 0, 0]


@pytest.mark.parametrize("constant", ["layer1.1.bn2", "layer1.1.conv2"])
def test_the_last_layer_of_a_branch_that_is_gone_leaves_the_width_of_the_stream(tmp_path: Path, constant: str) -> None:
    """What stays of the second block is a constant of 8 channels, of its BatchNorm or of a convolution without one."""
    trace, last = shrunk(tmp_path)
    network = trace.networks[last]
    left = Layer(
        name=constant, kind=LayerKind.RESHAPE, op="branch_constant", in_channels=0, out_channels=8,
        input_shapes=((0, 32, 32),), output_shape=(8, 32, 32),
    )  # fmt: skip
    trace.networks[last] = msgspec.structs.replace(network, layers=(*network.layers, left))
    assert (16 * recorded_densities(trace)[1][-1]).tolist() == [8, 4, 8, 0, 8]


def test_edges_of_a_network_without_sums_follow_the_layers_that_are_still_there(tmp_path: Path) -> None:
    """At depth ½ only layers of the second block lie behind, which are gone; in front the stream has half its width."""
    trace, _ = shrunk(tmp_path)
    asked = even([1, 1])
    edges = tuple(dataclasses.replace(edge, role="plain") for edge in asked.edges)
    assert imitate(trace, dataclasses.replace(asked, edges=edges)).widths[-1].tolist() == [500, 500]


def test_a_run_is_dense_until_its_first_reconfiguration_is_near(tmp_path: Path) -> None:
    """Of a single one nobody knows for how long channels have gone; of two that are an epoch apart, for an epoch."""
    trace, _ = shrunk(tmp_path)
    first, last = trace.reconfigurations
    once = msgspec.structs.replace(trace, reconfigurations=(last,))  # after 4 of 6 epochs
    assert imitate(once, problem(epochs=6, events=(2, 3))).widths.tolist() == [[8, 5], [4, 1]]
    events = tuple(msgspec.structs.replace(event, epoch=epoch) for event, epoch in ((first, 3), (last, 4)))
    late = msgspec.structs.replace(trace, reconfigurations=events)
    asked = problem(epochs=12, events=(5, 6, 7))  # after 3, 3½ and 4 of 6 epochs: 8 · 1, 8 · (1 + 11/16)/2, 8 · 11/16
    assert imitate(late, asked).widths.tolist() == [[8, 5], [7, 4], [6, 3]]


def even(bn: list[float], *, removable: bool = False) -> Problem:
    """As many layers as edges, of 1000 channels and equal FLOPs each; reconfigured after each of 10 epochs."""
    count = len(bn)
    own = np.eye(count)
    costs = CostTable(
        inputs=np.zeros((count, count)),
        outputs=own,
        fixed_inputs=np.ones(count),
        fixed_outputs=np.zeros(count),
        product=np.zeros(count, dtype=bool),
        dead_with=own,
        inference=np.ones(count),
        training=np.ones(count),
        bn=np.array(bn),
        full=np.full(count, 1000.0),
    )
    edges = [Edge(name=str(i), width=1000, role="branch", depth=i / count, removable=removable) for i in range(count)]
    return Problem(model="even", edges=tuple(edges), epochs=10, events=tuple(range(10)), table=costs)


def of_dense(trajectory: Trajectory) -> np.ndarray:
    """The density of every edge in each of the 10 epochs, and after them."""
    return np.vstack([np.ones(trajectory.widths.shape[1]), trajectory.widths / 1000])


@pytest.mark.parametrize("training", [0.5, 0.6])  # in proportion to the time it would be about 0.56
def test_flops_are_met_at_the_end_and_over_the_run_and_what_saturates_stays(training: float) -> None:
    found = meet(Targets(training=training, inference=0.4, saturates=0.5), even([3, 1]), source="here")
    densities = of_dense(found)
    assert densities[-1].mean() == pytest.approx(0.4, abs=0.005)
    assert densities[:10].mean() == pytest.approx(training, abs=0.005)
    assert (densities[5:] == densities[-1]).all()  # after half of the epochs
    assert (np.diff(densities, axis=0) <= 0).all()
    assert densities[-1, 0] < densities[-1, 1]  # what is bound by memory goes first
    assert found.targets == {"training": training, "inference": 0.4}
    assert found.assumed[0].source == "here"
    assert "harder (tilt 0.87)" in found.assumed[1].what


def test_traffic_of_batch_norms_decides_how_hard_memory_bound_edges_are_pruned() -> None:
    found = meet(Targets(training=0.6, inference=0.5, bn=0.56), even([3, 1]), source="here")
    densities = of_dense(found)
    assert densities[-1].mean() == pytest.approx(0.5, abs=0.005)
    assert densities[:10].mean() == pytest.approx(0.6, abs=0.005)
    assert (densities[:10] @ [0.75, 0.25]).mean() == pytest.approx(0.56, abs=0.005)
    assert found.targets == {"training": 0.6, "inference": 0.5, "bn": 0.56}


def test_the_most_memory_bound_branches_go_as_a_whole() -> None:
    found = meet(Targets(training=0.6, inference=0.4, layers=0.5), even([4, 1, 3, 2], removable=True), source="here")
    last = of_dense(found)[-1]
    assert (last == 0).tolist() == [True, False, True, False]
    assert last.mean() == pytest.approx(0.4, abs=0.02)  # moved a little for the FLOPs over the run, which jump


def test_what_no_course_can_give_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        OutOfReachError, match=r"has training=0.3 with inference=0.4; the nearest is training=0.46"
    ) as caught:
        meet(Targets(training=0.3, inference=0.4), even([1, 1]), source="here")  # an epoch of 1 and nine of 0.4
    assert caught.value.aimed == {"training": 0.3, "inference": 0.4}
    assert caught.value.nearest == pytest.approx({"training": 0.46, "inference": 0.4}, abs=0.005)


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        ("training=0.6,inference=0.5", {"training": 0.6123, "inference": 0.49}, "training=0.612,inference=0.49"),
        (
            "inference=0.5,training=0.6,bn=0.7,layers=0,saturates=0.4",
            {"bn": 0.71},
            "training=0.6,inference=0.5,bn=0.71,layers=0,saturates=0.4",
        ),
        ("like:runs/a,b/trace.jsonl,inference=0.5", {"inference": 0.4834}, "like:runs/a,b/trace.jsonl,inference=0.483"),
        ("lym2019/resnet32-cifar10", {"inference": 0.5}, r"training=0\.\d+,inference=0\.5.*"),
    ],
)
def test_a_pruning_is_written_with_other_targets(text: str, wanted: dict[str, float], expected: str) -> None:
    assert re.fullmatch(expected, with_targets(text, wanted))


def test_a_pruning_without_targets_takes_none() -> None:
    for text in ("none", "like:runs/trace.jsonl", "densities.toml"):
        with pytest.raises(UsageError):
            with_targets(text, {"inference": 0.5})


def test_a_planned_network_has_the_widths_and_the_costs_by_hand() -> None:
    """Two 1×1 convolutions over 4 × 4 places and a linear layer; a BatchNorm behind the first."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
        )  # fmt: skip

    dense = dense_network(build, name="n", input_shape=(3, 4, 4), num_classes=2)
    assert [(edge.name, edge.width, edge.role, edge.depth, edge.removable) for edge in dense.edges] == [
        ("0", 4, "stem", 0.0, False), ("3", 6, "plain", 0.5, False)
    ]  # fmt: skip
    widths = np.array([[4, 6], [3, 6], [3, 2]])
    macs = [16 * (3 * a + a * b) + 2 * b for a, b in widths.tolist()]
    # nobody needs the gradient of the images
    trained = [16 * (2 * 3 * a + 3 * a * b) + 3 * 2 * b for a, b in widths.tolist()]
    inference, training, bn = dense.table.fractions(widths)
    assert (inference * macs[0]).tolist() == pytest.approx(macs)
    assert (training * trained[0]).tolist() == pytest.approx(trained)
    assert bn.tolist() == [1, 0.75, 0.75]
    steps = list(dense.reconfigured(widths))
    assert [step.network.forward_macs for step in steps] == macs
    assert [(step.channels_removed, step.layers_removed) for step in steps] == [(0, ()), (1, ()), (4, ())]


def test_a_table_follows_the_networks_that_were_really_made() -> None:
    """Products that say 0.6 and 0.2 where networks of half and a quarter of the channels cost half and a quarter."""
    dense, half, quarter = (residual_network((width,), (0,), input_shape=(3, 8, 8)) for width in (4, 2, 1))
    for widths, pruned in (([600, 200], [half, quarter]), ([200, 600], [quarter, half])):
        table = even([1]).table.corrected(np.array(widths)[:, None], dense, pruned)
        for found in table.fractions(np.array([[1000], [800], [600], [400], [200], [100]])):
            assert found.tolist() == pytest.approx([1, 0.75, 0.5, 0.375, 0.25, 0.125])
