"""What is found prunable, what is refused and why, and the proof behind `ptsim inspect`."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ptsim
from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.errors import UnsupportedModelError, UsageError
from ptsim.network import LayerKind
from ptsim.prune import function_rules, rules
from ptsim.prune.groups import find_groups
from ptsim.prune.propagate import skeleton
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.structure import apply_structure, structure_of
from tests.prune.helpers import SMALL_IMAGE, same_function, small_resnet


@pytest.mark.slow
def test_a_cifar_resnet_has_one_edge_per_stage_and_one_per_block() -> None:
    edges = {edge.name: edge for edge in find_groups(zoo.create("resnet20"), (3, 32, 32)).edges()}
    assert edges["conv1"].width == 16
    assert set(edges["conv1"].members) >= {"conv1 (out)", "layer1.2.conv2 (out)", "layer2.0.downsample.0 (in)"}
    assert edges["layer1.0.conv1"].members == ("layer1.0.conv1 (out)", "layer1.0.conv2 (in)")
    assert sum(edge.prunable for edge in edges.values()) == 3 + 9
    assert edges["fc"].reason == "it is the network's output"


def test_channels_are_found_on_shapes_alone_also_in_a_network_without_storage() -> None:
    groups = find_groups(small_resnet(), SMALL_IMAGE)
    assert groups.shapes_only
    assert find_groups(skeleton(small_resnet()), SMALL_IMAGE).num_components == groups.num_components


def test_layer_norm_over_channels_is_refused_by_name_and_the_hidden_layer_is_not() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
            self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            return self.head((x + self.down(nn.functional.gelu(self.up(self.norm(x))))).mean(1))

    edges = {edge.name: edge for edge in find_groups(Mlp(), (3, 8, 8)).edges()}
    assert edges["up"].prunable
    assert not edges["patch"].prunable
    assert "norm (LayerNorm) normalises over these channels" in str(edges["patch"].reason)


def test_an_operator_without_a_rule_freezes_only_what_flows_into_it() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.head(torch.fft.fft(self.b(x).mean((2, 3))).real)

    edges = {edge.name: edge for edge in find_groups(Odd(), (3, 4, 4)).edges()}
    assert edges["a"].prunable
    assert "fft" in str(edges["b"].reason)


def test_layers_that_are_called_twice_share_their_channels() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(self.again(self.stem(x))).mean((2, 3)))

    model = Twice().double()
    groups = find_groups(model, (3, 4, 4))
    assert int(groups.prunable.sum()) == 5
    with torch.no_grad():
        for weight in (model.stem.weight[1], model.again.weight[1], model.again.weight[:, 1], model.head.weight[:, 1]):
            weight.zero_()
    zeroed = copy.deepcopy(model)
    assert reconfigure(model, groups).changed
    same_function(model, zeroed, (3, 4, 4))


@pytest.mark.parametrize("layers", [["stem"], ["stem", "blocks.0.b", "blocks.1.b", "blocks.2.b"], ["blocks.0.a"]])
def test_empty_stems_stages_and_layers_do_not_crash(layers: list[str]) -> None:
    model = small_resnet()
    for name in layers:
        nn.init.zeros_(model.get_parameter(f"{name}.weight"))
    for name in ("blocks.0.a", "blocks.1.a", "blocks.2.a", "head"):
        nn.init.zeros_(model.get_parameter(f"{name}.weight"))
    surgery = reconfigure(model, find_groups(model, SMALL_IMAGE))
    assert model(torch.rand(2, *SMALL_IMAGE, dtype=torch.float64)).shape == (2, 5)
    if len(layers) > 1:
        assert any("one is kept" in note for note in surgery.notes)


@pytest.mark.slow
def test_several_reconfigurations_removals_and_gates_rebuild_in_a_fresh_process(tmp_path: Path) -> None:
    model = zoo.create("resnet20").double()
    with torch.no_grad():
        for name in ("layer1.1.conv1", "layer1.1.conv2"):
            model.get_parameter(f"{name}.weight").zero_()
        surgery = reconfigure(model, find_groups(model, (3, 32, 32)))
        assert surgery.layers_removed == ("layer1.1.conv1", "layer1.1.conv2")
        model.get_parameter("layer2.1.conv1.weight")[:, 3:9] = 0
        model.get_parameter("layer2.1.conv2.weight")[10:14] = 0
        surgery = reconfigure(model, surgery.groups, mode="gating")
        for name, parameter in model.named_parameters():
            if parameter.ndim == 4 and "layer3.2.conv1" in name:
                parameter[5:20] = 0
            if parameter.ndim == 4 and "layer3.2.conv2" in name:
                parameter[:, 5:20] = 0
        reconfigure(model, surgery.groups, mode="gating")
    network = capture_network(model, name="pruned", input_shape=(3, 32, 32), num_classes=10)
    ops = [layer.op for layer in network.layers if layer.kind is LayerKind.RESHAPE]
    assert "gather" in ops
    assert "scatter" in ops
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.save({"weights": model.state_dict(), "images": images, "out": model.eval()(images)}, tmp_path / "test.pt")
    (tmp_path / "structure.json").write_text(json.dumps(structure_of(model)))
    code = (
        "import json, sys, torch\n"
        "from ptsim import zoo\n"
        "from ptsim.prune.structure import apply_structure\n"
        "stored = torch.load(sys.argv[1] + '/test.pt')\n"
        "model = zoo.create('resnet20').double()\n"
        "apply_structure(model, json.load(open(sys.argv[1] + '/structure.json')))\n"
        "model.load_state_dict(stored['weights'])\n"
        "assert torch.equal(model.eval()(stored['images']), stored['out'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize("groups", [3, 32, 2**53])
def test_a_structure_with_groups_that_do_not_divide_the_channels_is_refused(groups: int) -> None:
    structure = structure_of(zoo.create("resnet20"))
    structure["groups"]["layer1.0.conv1"] = groups
    with pytest.raises(UsageError, match=f"has 16 channels in {groups} groups at layer1.0.conv1"):
        apply_structure(zoo.create("resnet20"), structure)


def test_a_structure_with_an_unknown_part_is_refused() -> None:
    structure = structure_of(zoo.create("resnet20"))
    structure["modules"]["layer1.0.conv1"] = {"kind": "pickle"}
    with pytest.raises(UsageError, match=r"something unknown at layer1\.0\.conv1"):
        apply_structure(zoo.create("resnet20"), structure)


@pytest.mark.slow
def test_channel_counts_are_rounded_up_with_dead_channels() -> None:
    model = zoo.create("resnet20").double()
    with torch.no_grad():
        model.get_parameter("layer3.0.conv1.weight")[:41] = 0
        model.get_parameter("layer3.0.conv2.weight")[:, :41] = 0
    zeroed = copy.deepcopy(model)
    surgery = reconfigure(model, find_groups(model, (3, 32, 32)), channel_multiple=8)
    assert model.get_submodule("layer3.0.conv1").out_channels == 24  # 64 - 41 = 23
    same_function(model, zeroed, (3, 32, 32), batch=2)
    assert not reconfigure(model, surgery.groups, channel_multiple=8).changed


def test_the_threshold_is_strict_and_of_the_magnitude() -> None:
    model = small_resnet()
    with torch.no_grad():
        for channel, value in ((0, 1e-4), (1, -1e-4), (2, 0.99e-4), (3, -0.99e-4)):
            model.get_parameter("blocks.0.a.weight")[channel] = value
            model.get_parameter("blocks.0.b.weight")[:, channel] = value
    reconfigure(model, find_groups(model, SMALL_IMAGE), threshold=1e-4)
    assert model.get_submodule("blocks.0.a").out_channels == 8 - 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image"),
    [("torchvision:mobilenet_v3_small", 64), ("torchvision:squeezenet1_1", 64), ("torchvision:regnet_x_400mf", 64)],
)
def test_torchvision_networks_prune_exactly(name: str, image: int) -> None:
    found = ptsim.inspect(name, input_shape=(3, image, image), num_classes=10)
    assert found.exact
    assert found.max_rel_error_eval <= 1e-9
    assert found.max_rel_error_train <= 1e-9


def test_biases_in_front_of_a_batch_norm_are_judged_on_their_layers_scale() -> None:
    """Their exact gradient is 0; relative to themselves its rounding would be an error of the order of 1."""
    assert ptsim.inspect(small_resnet(bias=True), input_shape=SMALL_IMAGE).max_rel_error_train < 1e-12


def test_inspecting_a_module_leaves_it_as_it_was() -> None:
    model = small_resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ptsim.inspect(model, input_shape=SMALL_IMAGE).exact
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_proof_finds_a_network_that_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rule for softmax broken on purpose, channels would be pruned that must not be."""
    monkeypatch.setitem(rules._RULES, "softmax", function_rules.elementwise)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), Softmax(), nn.Flatten(), nn.Linear(8 * 16, 3))
    assert not ptsim.inspect(model, input_shape=(3, 4, 4)).exact


class Softmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, 1)


class Predicting(nn.Module):
    """Gives logits, the number of the class, and whether it is sure."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.relu(self.a(x)).mean((2, 3)))
        return {"logits": logits, "class": logits.argmax(1), "sure": logits.amax(1) > 0}


def test_outputs_that_are_no_fractions_are_compared_too() -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Predicting(), input_shape=(3, 6, 6))
    assert found.exact
    assert found.prunable_channels == 8


def test_a_network_that_learns_nothing_is_proven_by_its_outputs() -> None:
    """None of its layers is called frozen: all are pruned as their weights are."""
    found = ptsim.inspect(small_resnet().requires_grad_(False), input_shape=SMALL_IMAGE)
    assert found.exact
    assert found.prunable_channels == 12 + 3 * 8


def test_a_network_without_an_output_is_one_sentence() -> None:
    class Silent(Predicting):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            super().forward(x)
            return {}

    with pytest.raises(UnsupportedModelError, match="Silent returns no tensor"):
        ptsim.inspect(Silent(), input_shape=(3, 6, 6))


def test_wrong_input_is_one_sentence() -> None:
    class Branchy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModelError, match=r"torch\.fx cannot trace Branchy"):
        ptsim.inspect(Branchy(), input_shape=(3, 4, 4))
    with pytest.raises(UnsupportedModelError, match="fails on an image of 1×4×4"):
        ptsim.inspect(small_resnet(), input_shape=(1, 4, 4))
    with pytest.raises(UsageError, match="input_shape is 0"):
        ptsim.inspect(small_resnet(), input_shape=(3, 0, 4))
    with pytest.raises(UsageError, match="threshold"):
        reconfigure(small_resnet(), find_groups(small_resnet(), SMALL_IMAGE), threshold=0.0)


def test_a_branch_whose_layers_are_gated_can_go_and_be_rebuilt() -> None:
    model = small_resnet()
    with torch.no_grad():
        model.get_parameter("blocks.0.a.weight")[:, 2:7] = 0
        model.get_parameter("blocks.0.b.weight")[4:9] = 0
    surgery = reconfigure(model, find_groups(model, SMALL_IMAGE), mode="gating")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.0") and parameter.ndim == 4:
                parameter.zero_()
    zeroed = copy.deepcopy(model)
    surgery = reconfigure(model, surgery.groups, mode="gating")
    assert surgery.layers_removed == ("blocks.0.a.layer", "blocks.0.b")
    same_function(model, zeroed, SMALL_IMAGE)
    fresh = small_resnet(seed=1)
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    same_function(fresh, model, SMALL_IMAGE)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("version",), 2, "a model structure of version 2; this ptsim reads 1"),
        (("tensors", "0.weight"), [9, 3, 3, 3], r"0\.weight of shape \(9, 3, 3, 3\), the model \(8, 3, 3, 3\)"),
        (("tensors", "3.weight"), [2], r"3\.weight of shape \(2,\), the model \(2, 8\)"),
        (("tensors", "3.weight"), [2, -1], "not a model structure"),
        (("modules", "5"), {"kind": "placeholder"}, "no module 5"),
        (("modules", "0"), {"kind": "placeholder"}, "describes 0 wrongly"),
    ],
)
def test_a_structure_that_does_not_fit_is_one_sentence(place: tuple[str, ...], value: object, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    structure = structure_of(model)
    table = structure
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    with pytest.raises(UsageError, match=message):
        apply_structure(model, structure)


def test_the_edges_of_a_residual_network_by_hand() -> None:
    groups = find_groups(small_resnet(), SMALL_IMAGE)
    edges = {edge.name: edge for edge in groups.edges()}
    stream = [f"blocks.{i}.{role}" for i in range(3) for role in ("a (in)", "b (out)")]
    assert edges["stem"].members == ("stem (out)", *stream, "head (in)")
    assert edges["blocks.1.a"].members == ("blocks.1.a (out)", "blocks.1.b (in)")
    inside = {f"blocks.{i}.a": 8 for i in range(3)}
    assert {name: edge.width for name, edge in edges.items()} == {"stem": 12, "stem (in)": 3, "head": 5} | inside
    assert {name: edge.reason for name, edge in edges.items() if not edge.prunable} == {
        "stem (in)": "it is the network's input", "head": "it is the network's output"
    }  # fmt: skip
    assert groups.num_channels == (12 + 3 * 8, 3 + 5)
    assert groups.main_reason() is None  # of others than images and classes
    penalised = {layer.layer: (inputs, outputs) for layer, inputs, outputs in groups.penalised()}
    inner = {f"blocks.{i}.{layer}": (True, True) for i in range(3) for layer in "ab"}
    assert penalised == {"stem": (False, True), "head": (True, False)} | inner


def test_a_channel_of_a_flattened_image_is_one_channel_and_many_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 6, 7), nn.ReLU(), nn.Linear(7, 2))
    groups = find_groups(model, (3, 2, 3))
    assert [(edge.name, edge.width) for edge in groups.edges() if edge.prunable] == [("0", 4), ("2", 7)]
    with torch.no_grad():
        model[0].weight[2] = 0
        model[2].weight.view(7, 4, 6)[:, 2] = 0
    reconfigure(model, groups)
    assert (model[0].out_channels, model[2].in_features) == (3, 18)


def test_edges_widths_and_cuts_of_a_small_network_are_those_by_hand() -> None:
    """Two channels of 2×2 pixels are eight features; each channel is read in four places."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 3), nn.Linear(3, 2))
    groups = find_groups(model, (3, 2, 2))
    assert [(edge.name, edge.width, edge.members, edge.prunable) for edge in groups.edges()] == [
        ("0", 2, ("0 (out)", "2 (in)"), True),
        ("0 (in)", 3, ("0 (in)",), False),
        ("2", 3, ("2 (out)", "3 (in)"), True),
        ("3", 2, ("3 (out)",), False),
    ]
    assert groups.num_channels == (2 + 3, 3 + 2)
    assert groups.main_reason() is None  # images and classes stay everywhere
    assert [(layer.layer, inputs, outputs) for layer, inputs, outputs in groups.penalised()] == [
        ("0", False, True), ("2", True, True), ("3", True, False),
    ]  # fmt: skip
    removed = torch.zeros(groups.num_components, dtype=torch.bool)
    removed[groups.axes["0.weight", 0][1]] = removed[groups.axes["2.weight", 0][0]] = True
    keep = {key: indices.tolist() for key, indices in groups.cut_for(removed).keep.items()}
    assert keep == {
        ("0.weight", 0): [0], ("0.bias", 0): [0], ("2.weight", 1): [0, 1, 2, 3], ("2.weight", 0): [1, 2],
        ("2.bias", 0): [1, 2], ("3.weight", 1): [1, 2],
    }  # fmt: skip


def test_why_most_channels_stay_is_told_without_those_of_images_and_classes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(2), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 9))
    reason = find_groups(model, (3, 2, 2)).main_reason()
    assert reason is not None
    assert reason.startswith("3 (LayerNorm) normalises over these channels")


@pytest.mark.parametrize(
    ("inputs", "outputs", "inside"),
    [
        ([0, 4], [], [[1, 2], [1, 2], [0, 2], [0, 2]]),  # one of each group of three, which two outputs read
        ([0, 1, 2], [0, 1], None),  # the whole first group
        ([0, 1, 2, 3], [0, 1], [[0, 1], [0, 1], [1, 2], [1, 2]]),  # and one of the second: any two stand for the first
        ([], [0, 2], None),
    ],
)
def test_of_a_grouped_convolution_every_output_keeps_the_inputs_of_its_group(
    inputs: list[int], outputs: list[int], inside: list[list[int]] | None
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, groups=2), nn.Flatten(), nn.Linear(16, 2))
    groups = find_groups(model, (3, 2, 2))
    layer = next(layer for layer in groups.layers if layer.layer == "1")
    removed = torch.zeros(groups.num_components, dtype=torch.bool)
    removed[layer.inputs[inputs]] = True
    removed[layer.outputs[outputs]] = True
    kept = groups.cut_for(removed).keep.get(("1.weight", -1))
    assert (None if kept is None else kept.tolist()) == inside
