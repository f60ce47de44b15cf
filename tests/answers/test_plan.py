"""Planned runs: what was asked is met, every network is one that the engine makes, and wrong input is one sentence."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import fx, nn

import ptsim
from ptsim import zoo
from ptsim.answers.plan import _asked, _data_name, fractions, plan
from ptsim.answers.plan_options import PlanOptions
from ptsim.answers.validate import validate
from ptsim.capture import resized
from ptsim.capture.network import capture_network
from ptsim.capture.resized import Recapture
from ptsim.capture.tracers import Tracer
from ptsim.cli.main import run
from ptsim.costs.saving import saving_interval
from ptsim.errors import FileFormatError, PtsimError, UnknownNameError, UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.network import LayerKind, Network
from ptsim.prune.groups import ChannelGroups, find_groups, weight_GOIK
from ptsim.prune.propagate import skeleton
from ptsim.prune.reconfigure import Surgery, reconfigure, remove_channels
from ptsim.prune.trajectories import Problem, Trajectory, build, register
from ptsim.prune.trajectories.build import _beyond, dense_network
from ptsim.prune.trajectories.catalog import published_runs
from ptsim.prune.trajectories.roles import roles
from ptsim.report.projected import Projector, savings_frame
from ptsim.sim.options import Options
from ptsim.sim.run import project
from ptsim.trace.io import read_trace, write_trace
from ptsim.trace.pairs import compare_runs, held_dense
from ptsim.trace.schema import Reconfiguration
from ptsim.trace.stretch import stretch
from ptsim.trace.trace import Trace
from tests.traces import NetworkBuilder, dense_trace

SHAPE = (3, 16, 16)
MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

def small(num_classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), Block(48), Block(48), Block(48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, num_classes),
    )
small.input_shape = (3, 16, 16)
"""
SPLIT = """
import torch
from torch import nn

class Split(nn.Module):
    \"\"\"As Res2Net has it: one quarter of the channels after the other passes the convolutions.\"\"\"

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.convs = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1, bias=False) for _ in range(3))
        self.last = nn.Linear(48, 10)

    def forward(self, x):
        parts = torch.relu(self.norm(self.first(x))).chunk(4, 1)
        made = [parts[0]]
        for conv, part in zip(self.convs, parts[1:]):
            made.append(torch.relu(conv(made[-1] + part)))
        return self.last(torch.cat(made, 1).mean((2, 3)))

def split(num_classes=10):
    torch.manual_seed(0)
    return Split()
split.input_shape = (3, 16, 16)
"""
SHUFFLE = """
import torch
import torch.nn.functional as F
from torch import nn

class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a, self.bn = nn.Conv2d(32, 32, 1, groups=4), nn.BatchNorm2d(32)
        self.dw, self.b = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 1, groups=4)
        self.last = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.bn(self.a(x)))
        n, c, h, w = y.shape
        y = y.view(n, 4, c // 4, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.last(F.relu(x + self.b(self.dw(y))).mean((2, 3)))

def shuffle(num_classes=10):
    return Shuffle()
shuffle.input_shape = (3, 32, 32)
"""
RECORDED = Path(__file__).parents[2] / "traces" / "cifar10-resnet20" / "prunetrain-r0.2.jsonl"
BASE = {"images": 1024, "epochs": 12, "batch": 32, "interval": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("model") / "net.py"
    file.write_text(MODEL)
    return f"{file}:small"


@pytest.fixture(scope="module")
def planned(model: str) -> Trace:
    return plan(model, **BASE, gpus=2, pruning="training=0.7,inference=0.5")


class TestTargets:
    def test_flops_over_the_run_and_at_its_end_are_as_asked(self, planned: Trace) -> None:
        macs = [planned.network_of(epoch).forward_macs for epoch in planned.epochs]
        assert planned.final_network.forward_macs / macs[0] == pytest.approx(0.5, abs=0.005)
        found = fractions(planned)
        assert found.training_flops_fraction == pytest.approx(0.7, abs=0.005)
        assert found.training_flops_fraction == pytest.approx(np.mean(macs) / macs[0], abs=0.01)  # all but the stem
        assert found.architectures == len({network.id for network in planned.networks.values()})

    def test_all_reduced_bytes_are_those_of_the_parameters_left(self, planned: Trace) -> None:
        weights = [planned.network_of(epoch).num_parameters for epoch in planned.epochs]
        assert fractions(planned).allreduce_bytes_fraction == pytest.approx(np.mean(weights) / weights[0])
        assert [epoch.allreduce_bytes for epoch in planned.epochs] == [4 * n * 16 for n in weights]  # 1024 / (2 · 32)

    @pytest.mark.slow
    def test_batch_norm_traffic_is_as_asked(self) -> None:
        for bn, layers in ((0.8, ""), (0.83, ""), (0.85, ",layers=0.1")):  # one channel of its stages is a percent
            trace = plan("resnet20", **BASE, pruning=f"training=0.7,inference=0.5,bn={bn}{layers}")
            found = fractions(trace)
            assert found.bn_bytes_fraction == pytest.approx(bn, abs=0.005)
            assert found.training_flops_fraction == pytest.approx(0.7, abs=0.005)
            assert found.inference_flops_fraction == pytest.approx(0.5, abs=0.005)
            convolutions = [
                sum(layer.kind is LayerKind.CONV for layer in network.layers)
                for network in (trace.network_of(trace.epochs[0]), trace.final_network)
            ]
            assert convolutions[0] - convolutions[1] == (2 if layers else 0)  # 10 % of 21

    @pytest.mark.slow
    def test_a_flattened_image_and_wide_linear_layers_meet_their_targets(self, tmp_path: Path) -> None:
        file = tmp_path / "flat.py"
        file.write_text(
            "from torch import nn\n"
            "def flat(num_classes=10):\n"
            "    return nn.Sequential(\n"
            "        nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1),\n"
            "        nn.ReLU(), nn.Flatten(), nn.Linear(512, 96), nn.ReLU(), nn.Linear(96, num_classes))\n"
        )
        trace = plan(f"{file}:flat", **BASE, input_shape=(3, 16, 16), pruning="training=0.7,inference=0.5")
        assert fractions(trace).training_flops_fraction == pytest.approx(0.7, abs=0.005)
        assert trace.final_network.forward_macs / trace.network_of(trace.epochs[0]).forward_macs == pytest.approx(
            0.5, abs=0.005
        )

    @pytest.mark.slow
    def test_draws_differ_and_agree_with_what_was_given(self, model: str, tmp_path: Path) -> None:
        planned = plan(model, draws=3, **BASE, gpus=2, pruning="training=0.7,inference=0.5")
        typical, *others = planned.drawn()
        alone = plan(model, seed=1, **BASE, gpus=2, pruning="training=0.7,inference=0.5")
        assert len({trace.final_network.id for trace in (typical, *others)}) == 3
        for trace in (typical, *others):
            assert fractions(trace).inference_flops_fraction == pytest.approx(0.5, abs=0.005)
            assert fractions(trace).training_flops_fraction == pytest.approx(0.7, abs=0.005)
        assert others[0].epochs == alone.epochs  # a draw in the trace is the run that its seed plans
        assert [(e.before, e.after) for e in others[0].reconfigurations] == [
            (e.before, e.after) for e in alone.reconfigurations
        ]
        assert read_trace(write_trace(tmp_path / "p.jsonl", planned)).draws == planned.draws

    @pytest.mark.slow
    def test_the_spread_of_draws_is_in_every_interval(self, model: str) -> None:
        planned = plan(model, draws=3, **BASE, gpus=2, pruning="training=0.7,inference=0.5")
        cluster = load_cluster("dgx-a100")
        whole = project(planned, cluster, 2)
        typical, *others = (project(trace, cluster, 2) for trace in planned.drawn())
        logs = [math.log(other.total_s / typical.total_s) for other in others]
        spread = math.sqrt((logs[0] ** 2 + logs[1] ** 2) / 2)
        assert spread > 0
        assert whole.total_s == typical.total_s
        for end, alone in ((whole.low_s, typical.low_s), (whole.high_s, typical.high_s)):
            expected = math.hypot(math.log(alone / typical.total_s), 1.645 * spread)
            assert abs(math.log(end / typical.total_s)) == pytest.approx(expected)
        for index, epoch in enumerate(typical.epochs):
            theirs = [math.log(other.epochs[index].total_s / epoch.total_s) for other in others]
            expected = math.hypot(math.log(epoch.high_s / epoch.total_s), 1.645 * math.hypot(*theirs) / math.sqrt(2))
            assert math.log(whole.epochs[index].high_s / epoch.total_s) == pytest.approx(expected)
            assert whole.epochs[index].total_s == epoch.total_s
        assert whole.epochs[0].high_s == typical.epochs[0].high_s  # nothing is pruned yet
        assert whole.epochs[-1].high_s > typical.epochs[-1].high_s
        assert whole.reconfiguration_high_s >= typical.reconfiguration_high_s
        (comparison,) = compare_runs([planned])
        (row,) = savings_frame([comparison], Projector(cluster, Options()), [2]).to_dict("records")
        dense = project(held_dense(planned), cluster, 2)
        low, high = saving_interval(whole.total_s / dense.total_s, whole.tier, draws=spread)
        assert (row["saved_fraction_low"], row["saved_fraction_high"]) == pytest.approx((1 - high, 1 - low))
        for short, long in zip(planned.drawn(), stretch(planned, epochs=120).drawn(), strict=True):
            counts = [Counter(epoch.architecture for epoch in trace.epochs) for trace in (short, long)]
            assert counts[1] == {name: 10 * count for name, count in counts[0].items()}
            assert long.final_network.id == short.final_network.id

    @pytest.mark.slow
    def test_what_saturates_early_does_not_change_afterwards(self, model: str) -> None:
        trace = plan(model, **BASE, pruning="training=0.65,inference=0.5,saturates=0.5")
        assert trace.network_of(trace.epochs[6]).id == trace.final_network.id

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("pruning", "problem"),
        [
            ("training=0.2,inference=0.5", r"has training=0.2 with inference=0.5; the nearest is training=0.6\d"),
            ("training=0.7,inference=0.5,bn=0.1", "has bn=0.1; the nearest is bn="),
            ("training=0.7", "need inference="),
            ("training=1.7,inference=0.5", "expected a fraction above 0 and at most 1"),
            ("training=a,inference=0.5", "expected a number between 0 and 1"),
            ("trainign=0.7,inference=0.5", "is not one of training=…"),
        ],
    )
    def test_what_cannot_be_is_refused_with_the_nearest_that_can(self, model: str, pruning: str, problem: str) -> None:
        with pytest.raises(UsageError, match=problem):
            plan(model, **BASE, pruning=pruning)

    @pytest.mark.slow
    def test_a_narrow_network_is_told_the_nearest_on_both_sides_and_how_to_ask_for_it(self, tmp_path: Path) -> None:
        """With a and b channels it has 48a + 16ab + 10b MACs: 0.455, then 0.533 of dense, and nothing between."""
        file = tmp_path / "narrow.py"
        file.write_text(
            "from torch import nn\n"
            "def narrow(num_classes=10):\n"
            "    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False),\n"
            "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n"
        )
        size = {**BASE, "epochs": 60, "input_shape": (3, 4, 4)}
        possible = sorted((48 * a + 16 * a * b + 10 * b) / 488 for a in range(1, 5) for b in range(1, 5))
        assert not [share for share in possible if 0.456 < share < 0.532]
        with pytest.raises(UsageError, match=r"narrow was found that has training=0.75, inference=0.5; ") as caught:
            plan(f"{file}:narrow", **size, pruning="training=0.75,inference=0.5")
        told = caught.value.message.partition("; the nearest has ")[2].split(", on the other side ")
        nearest, other = (float(text.rpartition("inference=")[2]) for text in told)
        assert min(nearest, other) < 0.456
        assert max(nearest, other) > 0.532
        for share in (nearest, other):
            assert min(abs(share - it) for it in possible) < 0.001
        option, _, rest = (caught.value.hint or "").removeprefix("--pruning ").partition(" ")
        assert rest == "asks for the nearest that can be planned"
        found = fractions(plan(f"{file}:narrow", **size, pruning=option))
        assert found.inference_flops_fraction == pytest.approx(nearest, abs=0.001)

    @pytest.mark.slow
    @pytest.mark.parametrize("draws", [1, 2])
    def test_what_is_proposed_is_planned(self, tmp_path: Path, draws: int) -> None:
        """Most channels stay: the inference FLOPs cannot be, nor can the training FLOPs beside the nearest that can."""
        file = tmp_path / "mostly.py"
        file.write_text(
            "from torch import nn\n"
            "def mostly(num_classes=10):\n"
            "    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.GroupNorm(1, 64), nn.Conv2d(64, 128, 1), nn.ReLU(),\n"
            "        nn.Conv2d(128, 64, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
            "        nn.Linear(64, num_classes))\n"
        )
        size = {**BASE, "input_shape": (3, 8, 8), "draws": draws}
        with pytest.raises(UsageError, match=r"has inference=0.05; the nearest is inference=0.1\d") as caught:
            plan(f"{file}:mostly", **size, pruning="training=0.2,inference=0.05")
        option, _, rest = (caught.value.hint or "").removeprefix("--pruning ").partition(" ")
        assert rest == "asks for the nearest that can be planned"
        assert len(plan(f"{file}:mostly", **size, pruning=option).draws) == draws - 1


class TestEngine:
    @pytest.mark.slow
    def test_every_network_is_what_a_real_reconfiguration_of_zeroed_weights_gives(self, model: str) -> None:
        entry = zoo.find(model)
        dense = dense_network(lambda: entry.build(num_classes=10), name="net", input_shape=SHAPE, num_classes=10)
        first, second = (i for i, edge in enumerate(dense.edges) if edge.role == "branch" and edge.name != "5.conv1")
        widths = np.array([[edge.width - 5 - i for i, edge in enumerate(dense.edges)]] * 4)
        widths[1:] -= 11
        widths[1:, first] = 0
        widths[2:] = np.maximum(widths[2:] - 7, 0)  # the stream shrinks after a branch has gone
        widths[2:, second] = 0
        widths[3] = 0  # nothing is left but what cannot go
        gone = []
        live = entry.build(num_classes=10)
        groups, edge_of = find_groups(live, SHAPE), dense.edge_of
        for step, row in zip(dense.reconfigured(widths), widths, strict=True):
            zero(live, groups, _beyond(groups, edge_of, torch.as_tensor(row)))
            surgery = reconfigure(live, groups)
            edge_of, groups = followed(groups, surgery, edge_of), surgery.groups
            real = capture_network(live, name="net", input_shape=SHAPE, num_classes=10)
            assert step.network.id == real.id
            assert step.layers_removed == surgery.layers_removed
            assert step.channels_removed == surgery.channels_removed
            gone.append(len(step.layers_removed))
        assert gone == [0, 2, 2, 2]

    def test_a_reconfiguration_takes_one_walk_through_the_graph_and_no_capture(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        walks, walk, trace = Counter[str](), fx.Interpreter.run, Tracer.trace
        monkeypatch.setattr(
            fx.Interpreter, "run", lambda self, *args: walks.update([type(self).__module__]) or walk(self, *args)
        )
        monkeypatch.setattr(Tracer, "trace", lambda self, *args: walks.update(["traces"]) or trace(self, *args))
        file = tmp_path / "densities.toml"
        file.write_text('[[prune]]\nrole = "branch"\nepochs = [12]\ndensities = [0.5]\n')
        found = []
        for interval in (6, 2):
            walks.clear()
            planned = plan(model, **{**BASE, "interval": interval}, pruning=str(file))
            found.append((len(planned.networks), walks.copy()))
        (three, few), (seven, many) = found
        assert (three, seven) == (3, 7)
        assert few["ptsim.capture.resized"] == 3
        assert few["ptsim.capture.rehearsal"] == 2  # one capture: a step at two mini-batches
        assert many - few == Counter({"ptsim.capture.resized": 4})
        walks.clear()
        file.write_text('[[prune]]\nedge = "4.conv1"\nepochs = [6, 12]\ndensities = [0, 0]\n')
        assert len(plan(model, **BASE, pruning=str(file), draws=3).networks) == 3
        assert walks["ptsim.capture.rehearsal"] == 4  # one more for all trajectories: a branch is gone

    @pytest.mark.slow
    def test_channels_that_pass_a_split_are_tried_out_once_a_plan_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "split.py"
        file.write_text(SPLIT)
        tried: list[int] = []
        captured: list[str] = []
        try_out, capture = build.remove_channels, resized.capture_network
        monkeypatch.setattr(build, "remove_channels", lambda *args: tried.append(1) or try_out(*args))
        monkeypatch.setattr(
            resized, "capture_network", lambda *args, **named: captured.append("") or capture(*args, **named)
        )
        asked = {**BASE, "pruning": "training=0.764,inference=0.5"}
        planned = plan(f"{file}:split", **asked)
        assert (len(planned.networks), len(tried), len(captured)) == (5, 4, 1)
        tried.clear()
        with pytest.raises(UsageError, match="the nearest") as refused:
            plan(f"{file}:split", **{**asked, "pruning": "training=0.75,inference=0.5"})
        assert refused.value.hint is not None
        assert len(tried) <= 2  # the last network of what was tried, and of what is proposed
        monkeypatch.setattr(build.Dense, "takes_trying_out", False)  # then every network is tried out at once
        careful = plan(f"{file}:split", **asked)
        assert careful.networks == planned.networks

    @pytest.mark.slow
    def test_a_hint_does_not_propose_to_prune_nothing(self, tmp_path: Path) -> None:
        file = tmp_path / "shuffle.py"
        file.write_text(SHUFFLE)
        with pytest.raises(UsageError, match=r"the nearest is training=0\.74") as refused:
            plan(f"{file}:shuffle", images=50_000, epochs=10, batch=64, pruning="training=0.7,inference=0.5")
        assert refused.value.hint is None  # of its 8 sets of channels a few go at once, and half a point is less

    @pytest.mark.parametrize("split", ["chunk", "tensor_split"])
    def test_a_resized_split_is_equal_to_a_captured_one(self, split: str, tmp_path: Path) -> None:
        file = tmp_path / "split.py"
        file.write_text(SPLIT.replace("chunk", split))
        live = zoo.find(f"{file}:split").build(num_classes=10)
        bones = skeleton(live)
        recapture = Recapture(bones, name="split", input_shape=SHAPE, num_classes=10)
        groups = find_groups(bones, SHAPE)
        sparse = torch.rand(groups.num_components, generator=seeded()) < 0.3
        remove_channels(bones, groups, sparse)
        remove_channels(live, find_groups(live, SHAPE), sparse)
        assert recapture.network(bones).id == capture_network(live, name="split", input_shape=SHAPE, num_classes=10).id
        assert recapture.num_captures == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["resnet20", "vgg11"])
    def test_a_resized_network_is_equal_to_a_captured_one(self, name: str) -> None:
        entry = zoo.find(name)
        live = entry.build(num_classes=10)
        bones = skeleton(live)
        groups = find_groups(bones, entry.input_shape)
        recapture = Recapture(bones, name=name, input_shape=entry.input_shape, num_classes=10)
        remove_channels(bones, groups, torch.rand(groups.num_components, generator=seeded()) < 0.3)
        resized = recapture.network(bones)
        assert recapture.num_captures == 1
        remove_channels(
            live, find_groups(live, entry.input_shape), torch.rand(groups.num_components, generator=seeded()) < 0.3
        )
        captured = capture_network(live, name=name, input_shape=entry.input_shape, num_classes=10)
        assert msgspec.structs.replace(resized, footprints=()) == msgspec.structs.replace(captured, footprints=())
        for ours, theirs in zip(resized.footprints, captured.footprints, strict=True):
            assert ours.kept_image_bytes == pytest.approx(theirs.kept_image_bytes, rel=0.01)

    def test_roles_of_a_residual_network(self, planned: Trace) -> None:
        found = {name: role for name, (role, _) in roles(next(iter(planned.networks.values()))).items()}
        assert found["3.conv1"] == found["5.conv1"] == "branch"
        assert found["3.conv2"] == found["5.conv2"] == "stream"
        assert found["0"] == "stem"


def followed(before: ChannelGroups, surgery: Surgery, edge_of: torch.Tensor) -> torch.Tensor:
    """The edge of every component after a surgery: what was kept of a tensor's axis, in order."""
    after = surgery.groups
    found = torch.full((after.num_components,), -1)
    for key, components in after.axes.items():
        old = before.axes.get(key)
        kept = edge_of[old][~surgery.removed[old]] if old is not None else []
        if len(kept) == len(components):
            found[components] = kept
    return found


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@torch.no_grad()
def zero(model: nn.Module, groups: object, mask: torch.Tensor) -> None:
    """Zero the weights of the masked components in every layer that writes or reads them."""
    parameters = dict(model.named_parameters())
    for layer in groups.layers:  # type: ignore[attr-defined] # the test gives it as an object
        weight_OI = weight_GOIK(parameters[layer.weight].data, layer)[0]
        weight_OI[mask[layer.outputs]] = 0
        weight_OI[:, mask[layer.inputs]] = 0


class TestKinds:
    @pytest.mark.slow
    def test_a_dense_plan_never_changes(self, model: str) -> None:
        trace = plan(model, **BASE)
        assert not trace.is_pruned
        assert len(trace.networks) == 1
        assert fractions(trace).training_flops_fraction == 1

    @pytest.mark.slow
    def test_a_recorded_run_carried_over_to_its_own_network_prunes_as_it_did(self) -> None:
        recorded = read_trace(RECORDED)
        trace = plan("resnet20", images=4000, epochs=30, batch=32, interval=3, pruning=f"like:{recorded.path}")
        ours, theirs = fractions(trace), fractions(recorded)
        assert ours.inference_flops_fraction == pytest.approx(theirs.inference_flops_fraction, abs=0.01)
        assert ours.training_flops_fraction == pytest.approx(theirs.training_flops_fraction, abs=0.01)

    @pytest.mark.slow
    def test_a_recorded_run_is_carried_over_down_to_given_flops(self) -> None:
        """Another strength of the same course: its widths are the recorded ones to one power, and it is met."""
        size, like = {"images": 4000, "epochs": 30, "batch": 64, "interval": 3}, f"like:{RECORDED}"
        harder, same = (plan("resnet20", **size, pruning=like + strength) for strength in (",inference=0.3", ""))
        assert fractions(harder).inference_flops_fraction == pytest.approx(0.3, abs=0.005)
        assert fractions(harder).training_flops_fraction < fractions(same).training_flops_fraction
        assert "how hard" not in str(harder.run.assumed)
        assert "as hard as the recorded one at penalty ratio 0.2; another ratio" in same.run.assumed[-1].what

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("given", "problem"),
        [("0.47x", "inference is '0.47x', expected a number"), ("0", "fraction above 0"), ("1.2", "at most 1")],
    )
    def test_a_strength_that_is_no_fraction_is_refused(self, given: str, problem: str) -> None:
        with pytest.raises(UsageError, match=problem):
            plan("resnet20", **BASE, pruning=f"like:{RECORDED},inference={given}")

    def test_a_run_to_imitate_has_a_name(self, model: str) -> None:
        with pytest.raises(UsageError, match="pruning 'like:' names no trace"):
            plan(model, **BASE, pruning="like:")

    def test_a_path_may_hold_an_equals_sign(self, model: str) -> None:
        for pruning in ("like:runs/lr=0.1/trace.jsonl", "lr=0.1.toml"):
            with pytest.raises(PtsimError, match=r"lr=0\.1"):
                plan(model, **BASE, pruning=pruning)

    @pytest.mark.slow
    def test_a_run_without_a_reconfiguration_cannot_be_imitated(self, model: str, tmp_path: Path) -> None:
        dense = dense_trace(tmp_path / "dense.jsonl")
        with pytest.raises(UsageError, match="has no reconfiguration that removed a channel"):
            plan(model, **BASE, pruning=f"like:{dense}")

    @pytest.mark.slow
    def test_a_planned_run_does_not_stand_in_for_a_measured_one(
        self, planned: Trace, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = write_trace(tmp_path / "planned.jsonl", planned)
        with pytest.raises(UsageError, match="nothing to imitate"):
            plan(model, **BASE, pruning=f"like:{file}")
        with pytest.raises(UsageError, match="nothing to compare predictions with"):
            validate([planned])
        for options in ({"jitter": "recorded"}, {"input_images_per_s": "recorded"}):
            with pytest.raises(UsageError, match=r"is a planned run: .* nothing to take .* from"):
                ptsim.simulate(planned, "dgx-a100", [1], **options)
        assert run(["export", str(file), "--format", "onnx", "-o", str(tmp_path / "o.onnx")]) == 2
        assert "nothing to take weights from" in capsys.readouterr().err

    @pytest.mark.slow
    def test_a_file_gives_densities_by_edge_and_role(self, model: str, tmp_path: Path) -> None:
        file = tmp_path / "densities.toml"
        file.write_text(
            '[[prune]]\nrole = "branch"\nepochs = [6]\ndensities = [0.5]\n'
            '[[prune]]\nedge = "3.conv1"\nepochs = [12]\ndensities = [0.25]\n'
        )
        trace = plan(model, **BASE, pruning=str(file))
        networks = [trace.networks[event.after] for event in trace.reconfigurations]
        assert [network.layer("4.conv1").out_channels for network in networks] == [36, 24, 24, 24]  # 48 · ¾, 48 · ½
        assert [network.layer("3.conv1").out_channels for network in networks] == [39, 30, 21, 12]
        assert networks[-1].layer("0").out_channels == 48
        file.write_text('[[prune]]\nedge = "nope"\nepochs = [6]\ndensities = [0.5]\n')
        with pytest.raises(UnknownNameError, match="nope"):
            plan(model, **BASE, pruning=str(file))
        file.write_text('[[prune]]\nrole = "branch"\nepochs = [60]\ndensities = [0.5]\n')
        with pytest.raises(FileFormatError, match="ascending ones up to 12"):
            plan(model, **BASE, pruning=str(file))

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            (
                'role = "branch"\nepochs = [6]\ndensities = [1.5]',
                r"prune\[0\].densities\[0\] is 1.5, expected .* at most 1",
            ),
            ('role = "branch"\nepochs = [6]\ndensities = [nan]', r"densities\[0\] is not finite"),
            ('role = "branch"\nepochs = [6]\ndensities = ["half"]', r"densities\[0\] is 'half', expected a number"),
            ('role = "branch"\nepochs = [6, 12]\ndensities = [0.5, 0.6]', "a channel that is gone does not come back"),
            ('role = "branch"\nepochs = [6, 6]\ndensities = [0.5, 0.4]', "expected ascending ones"),
            ('role = "branch"\nepochs = [6]\ndensities = [0.5, 0.4]', "1 epochs and 2 densities"),
            ('role = "branches"\nepochs = [6]\ndensities = [0.5]', "unknown role 'branches'"),
            (
                'role = "plain"\nepochs = [6]\ndensities = [0.5]',
                "names no edge of .*; its edges are of the roles b",
            ),
            ('layer = "0"\nepochs = [6]\ndensities = [0.5]', "layer is not a known key"),
            ("epochs = [6]\ndensities = [0.5]", "needs either an edge or a role"),
        ],
    )
    def test_a_wrong_density_file_is_one_sentence(self, model: str, tmp_path: Path, text: str, problem: str) -> None:
        file = tmp_path / "densities.toml"
        file.write_text(f"[[prune]]\n{text}\n")
        with pytest.raises(PtsimError, match=problem) as caught:
            plan(model, **BASE, pruning=str(file))
        assert "\n" not in str(caught.value)

    @pytest.mark.slow
    def test_roles_that_this_network_lacks_are_named_in_the_plan(self, model: str, tmp_path: Path) -> None:
        file = tmp_path / "densities.toml"
        table = '[[prune]]\nrole = "{}"\nepochs = [6]\ndensities = [0.5]\n'
        file.write_text(table.format("branch") + table.format("plain"))
        trace = plan(model, **BASE, pruning=str(file))
        assert trace.run.assumed[0].what == "densities by edge and epoch; no edge is plain"

    @pytest.mark.slow
    def test_a_kind_from_outside_the_package_is_one_function(self, model: str) -> None:
        @register(lambda: ("halved",), lambda text: text == "halved")
        def halved(text: str, problem: Problem) -> Trajectory:
            return Trajectory(
                widths=problem.rounded(np.full((len(problem.events), len(problem.edges)), 0.5)), assumed=()
            )

        trace = plan(model, **BASE, pruning="halved")
        assert trace.final_network.layer("0").out_channels == 24

    def test_published_runs_hold_the_papers_columns(self) -> None:
        runs = published_runs()
        assert len(runs) == 11
        rows = (Path(__file__).parents[2] / "traces" / "public" / "prunetrain_paper.csv").read_text().splitlines()
        table = [row for row in rows if ",Table 1," in row and "relative to dense" in row and "FLOPs" in row]
        printed = sorted(float(row.split("relative to dense,")[1].split(",")[0]) for row in table)
        assert sorted([r.training for r in runs.values()] + [r.inference for r in runs.values()]) == printed

    def test_an_unknown_name_says_which_exist(self, model: str) -> None:
        with pytest.raises(UnknownNameError, match=r"lym2019/resnet50-imagenet-r0\.25"):
            plan(model, **BASE, pruning="lym2019/resnet5O")


class TestTrace:
    def test_it_says_that_it_is_planned_and_what_was_assumed(self, planned: Trace) -> None:
        assert planned.run.origin == "planned"
        assert any("--pruning training=0.7" in assumption.source for assumption in planned.run.assumed)
        assert planned.epochs[0].regularized
        assert planned.complete

    def test_what_is_gone_of_channels_and_weights_is_a_share_of_the_first_network(self, planned: Trace) -> None:
        def counts(network: Network) -> tuple[int, int]:
            products = [layer for layer in network.layers if layer.kind in ("conv", "linear")]
            weights = (p.num_elements for p in network.parameters if len(p.shape) > 1)  # of BatchNorm and biases none
            return sum(layer.out_channels for layer in products), sum(weights)

        first = counts(planned.network_of(planned.epochs[0]))
        # the stem, three blocks of two convolutions, ten classes
        assert first == (7 * 48 + 10, 48 * 3 * 9 + 6 * 48 * 48 * 9 + 10 * 48)
        for epoch in planned.epochs:
            channels, weights = counts(planned.network_of(epoch))
            assert epoch.channel_sparsity == pytest.approx(1 - channels / 346)
            assert epoch.weight_sparsity == pytest.approx(1 - weights / 126_192)
        assert planned.epochs[-1].channel_sparsity > 0

    def test_the_steps_of_a_dense_plan_by_hand(self, model: str) -> None:
        """1,000 images in steps of 4 · 32: seven whole ones and one of 104."""
        trace = plan(model, images=1000, epochs=2, batch=32, gpus=4)
        weights = trace.final_network.num_parameters
        for epoch in trace.epochs:
            assert (epoch.num_iterations, epoch.num_images, epoch.world_size, epoch.batch_per_gpu) == (8, 1000, 4, 32)
            assert (epoch.allreduce_bytes, epoch.penalty_coefficient) == (8 * 4 * weights, 0.0)
        assert trace.end is not None
        assert (trace.end.num_iterations, trace.end.epochs) == (16, 2)
        assert (trace.run.dataset.name, trace.run.hyperparameters["interval"]) == ("1,000 images", 2)
        usual = trace.run.precision, trace.run.memory_format, trace.optimizer, trace.run.seed, trace.run.origin
        assert usual == ("fp32", "contiguous", "sgd", 0, "planned")
        assert str(trace.path) == "planned-small-none"
        (alone,) = plan(model, images=1024, epochs=1, interval=1, batch=1024).epochs  # all images in one step
        assert (alone.num_iterations, alone.world_size, alone.allreduce_bytes) == (1, 1, 0)

    def test_a_network_without_a_convolution_or_linear_layer_has_nothing_that_could_go(self, tmp_path: Path) -> None:
        (tmp_path / "norm.py").write_text(
            "from torch import nn\n"
            "def norm(num_classes=12):\n    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))\n"
        )
        trace = plan(f"{tmp_path / 'norm.py'}:norm", **BASE, input_shape=(3, 2, 2))
        assert {(epoch.channel_sparsity, epoch.weight_sparsity) for epoch in trace.epochs} == {(0.0, 0.0)}

    def test_more_reconfigurations_than_epochs_are_refused(self, model: str) -> None:
        with pytest.raises(UsageError, match="interval is 13, more than the 12 epochs"):
            plan(model, **{**BASE, "interval": 13})
        with pytest.raises(UsageError, match="interval is 0"):
            plan(model, **{**BASE, "interval": 0})

    def test_what_would_take_hours_is_refused(self, model: str) -> None:
        with pytest.raises(UsageError, match="epochs is 2147483648, expected at most 100000"):
            plan(model, **{**BASE, "epochs": 2**31})
        with pytest.raises(UsageError, match="1200 times with the interval 1, at most 1000 are planned"):
            plan(model, **{**BASE, "epochs": 1200, "interval": 1})
        most = PlanOptions(images=10, batch=1, epochs=100_000, interval=100)
        assert len(_asked("resnet20", most).events) == 1000
        with pytest.raises(UsageError, match="epochs is 100001, expected at most 100000"):
            _asked("resnet20", msgspec.structs.replace(most, epochs=100_001))

    def test_the_network_changes_after_every_interval_and_after_the_last_epoch(self) -> None:
        for epochs, interval, events in ((7, 3, (2, 5, 6)), (6, 3, (2, 5)), (4, None, (3,)), (11, None, (4, 9, 10))):
            asked = PlanOptions(images=10, batch=1, epochs=epochs, interval=interval)
            assert _asked("resnet20", asked).events == events  # of 5 epochs where nobody says

    def test_options_may_come_as_a_record_or_by_name(self, model: str) -> None:
        record = PlanOptions(**BASE, optimizer="adam")
        trace = plan(model, record, epochs=6)
        assert (trace.optimizer, len(trace.epochs), trace.epochs[0].batch_per_gpu) == ("adam", 6, BASE["batch"])

    @pytest.mark.parametrize(
        ("wrong", "problem"),
        [
            ({"epoch": 3}, "epoch"),
            ({"epochs": "3"}, "option epochs: Expected `int"),
            ({"epochs": 2.5}, "option epochs: Expected `int"),
            ({"precision": "fp8"}, "precision is 'fp8'"),
            ({"memory_format": "nhwc"}, "option memory_format"),
            ({"input_shape": (3, 0, 16)}, "three positive numbers"),
            ({"optimizer": "lion"}, "optimizer"),
            ({"seed": -1}, "seed is -1"),
            ({"draws": 0}, "draws is 0, expected 1 to 100"),
            ({"draws": 101}, "draws is 101, expected 1 to 100"),
            ({"gpus": 0}, "gpus is 0, expected at least 1"),
            ({"images": None}, "images is needed to plan a run"),
            ({"images": None, "epochs": None, "batch": None}, "images, epochs and batch are needed to plan a run"),
            ({"batch": 300, "gpus": 4}, "one step takes 1,200 images, 300 on each GPU; the data set has 1,024"),
        ],
    )
    def test_a_wrong_option_is_one_sentence(self, model: str, wrong: dict[str, object], problem: str) -> None:
        with pytest.raises(PtsimError, match=problem):
            plan(model, **{**BASE, **wrong})

    def test_a_published_interval_gives_way_to_a_shorter_run(self) -> None:
        published = PlanOptions(pruning="lym2019/resnet32-cifar10")
        for given, interval in (({}, 10), ({"epochs": 5}, 5), ({"epochs": 5, "interval": 2}, 2)):
            assert _asked("resnet32", msgspec.structs.replace(published, **given)).interval == interval

    @pytest.mark.slow
    def test_a_run_shorter_than_the_usual_interval_needs_none(self, model: str) -> None:
        assert len(plan(model, images=1024, epochs=3, batch=32).epochs) == 3

    def test_it_is_projected_like_any_other(self, planned: Trace) -> None:
        frame = ptsim.simulate(planned, "dgx-a100", gpus=[2])
        assert frame.total_seconds[0] > 0
        assert "nobody has trained it" in frame.notes[0]

    @pytest.mark.slow
    def test_the_command_line_writes_it_and_says_what_it_saves(
        self, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "p.jsonl"
        arguments = f"--images 1024 --epochs 4 --batch 32 --gpus 2 --interval 2 --json --draws 2 -o {out}".split()
        run(["plan", model, "--pruning", "training=0.8,inference=0.5", *arguments])
        document = json.loads(capsys.readouterr().out)
        assert document["inference_flops_fraction"] == pytest.approx(0.5, abs=0.005)
        assert set(document) >= {"trace", "training_flops_fraction", "bn_bytes_fraction", "allreduce_bytes_fraction"}
        assert read_trace(document["trace"]).is_planned
        assert len(document["draws"]) == len(read_trace(out).draws) == 1

    @pytest.mark.slow
    def test_its_numbers_say_planned_wherever_they_stand(
        self, planned: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file, recorded = write_trace(tmp_path / "run.jsonl", planned), dense_trace(tmp_path / "dense.jsonl")
        study = tmp_path / "study.toml"
        study.write_text(f'traces = ["{file}", "{recorded}"]\nclusters = ["dgx-a100"]\ngpus = [1]\n')
        for command in (["cost"], ["simulate", "--cluster", "dgx-a100"]):
            for path, says in ((file, True), (recorded, False)):
                run([*command, str(path)])
                assert capsys.readouterr().out.lstrip().startswith("planned ") == says
        run(["sweep", str(study), "--out", str(tmp_path / "rows.jsonl"), "--workers", "1"])
        out = capsys.readouterr().out
        assert out.count("planned ") == 1
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert sorted(row["origin"] for row in rows) == ["planned", "recorded"]
        run(["export", str(file), "--format", "chakra", "-o", str(tmp_path / "et")])
        assert any(b"planned" in path.read_bytes() for path in (tmp_path / "et").rglob("*") if path.is_file())


def chain(width: int) -> Network:
    """A convolution of 432·width MACs, and a linear layer of 2·width that runs once a mini-batch."""
    net = NetworkBuilder("chain", (3, 4, 4), 2)
    x = net.batch_norm("bn", net.conv("conv", None, width))
    net.linear("fc", net.flatten("flat", net.average_pool("pool", x)), 2)
    network = net.build()
    layers = [msgspec.structs.replace(layer, once=layer.name == "fc") for layer in network.layers]
    return msgspec.structs.replace(network, layers=tuple(layers))


def test_fractions_weigh_every_network_by_its_images_and_updates(tmp_path: Path) -> None:
    """Two GPUs: 100 images in 10 updates with 4 channels, 300 in 60 with 2 channels, and 1 channel is handed over."""
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=2, world_size=2))
    big, small, last = (chain(width) for width in (4, 2, 1))
    epochs = tuple(
        msgspec.structs.replace(epoch, architecture=network.id, num_images=images, num_iterations=updates)
        for epoch, network, images, updates in zip(trace.epochs, (big, small), (100, 300), (10, 60), strict=True)
    )
    events = tuple(
        Reconfiguration(
            epoch=number,
            before=before.id,
            after=after.id,
            channels_removed=1,
            layers_removed=(),
            measured_duration_s=None,
            batch_before=64,
            batch_after=64,
        )
        for number, (before, after) in enumerate(((big, small), (small, last)))
    )
    networks = {network.id: network for network in (big, small, last)}
    found = fractions(msgspec.structs.replace(trace, networks=networks, epochs=epochs, reconfigurations=events))
    spent = 100 * 3456 + 20 * 24 + 300 * 1728 + 120 * 12  # no gradient of images; 2 · 10 and 2 · 60 mini-batches
    assert found.training_flops_fraction == pytest.approx(spent / (400 * 3456 + 140 * 24), rel=1e-9)
    assert found.bn_bytes_fraction == pytest.approx((100 * 4 + 300 * 2) / (400 * 4))
    assert found.allreduce_bytes_fraction == pytest.approx((10 * 126 + 60 * 64) / (70 * 126))  # 31 w + 2 weights
    assert found.inference_flops_fraction == pytest.approx(1 / 4)
    assert found.architectures == 3


@pytest.mark.parametrize(
    ("given", "images", "classes", "shape", "name"),
    [
        (None, 1_281_167, 1000, (3, 224, 224), "ImageNet"),
        (None, 50_000, 100, (3, 32, 32), "cifar100"),
        (None, 50_000, 100, (3, 224, 224), "50,000 images"),  # somebody's own
        ("my photos", 1_281_167, 1000, (3, 224, 224), "my photos"),
    ],
)
def test_the_data_of_a_plan_have_a_name(
    given: str | None, images: int, classes: int, shape: tuple[int, int, int], name: str
) -> None:
    assert _data_name(given, images, classes, shape) == name


def test_data_without_a_name_are_refused() -> None:
    with pytest.raises(UsageError, match="dataset is empty"):
        _data_name(" ", 100, 10, (3, 32, 32))


def test_what_runs_once_is_spent_in_every_pass(tmp_path: Path) -> None:
    """100 MACs an image at first; then 100 in each of 16 passes of a mini-batch of 64, a quarter of that."""
    trace = read_trace(dense_trace(tmp_path / "d.jsonl"))
    first = msgspec.structs.replace(trace.epochs[0], architecture="images")
    second = msgspec.structs.replace(first, epoch=1, architecture="once", passes=16)
    *_, last = trace.network_of(trace.epochs[0]).layers
    networks = {
        name: msgspec.structs.replace(
            trace.final_network,
            layers=(msgspec.structs.replace(last, forward_macs=100, once=name == "once"),),
            edges=(),
        )
        for name in ("images", "once")
    }
    shrunk = msgspec.structs.replace(trace, epochs=(first, second), networks=networks, reconfigurations=())
    assert first.num_images == 64 * first.num_iterations
    assert fractions(shrunk).training_flops_fraction == pytest.approx((1 + 1 / 4) / 2)
