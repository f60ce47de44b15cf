"""One operator after another, as people's networks use them: multiply–accumulates, kept bytes and pruning, checked.

What torch counts when the network runs for real is the measure, and the network with zeros in the place of what pruning
has removed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ptsim
from analysis.check_counts import kept_bytes, torch_macs
from ptsim.capture.counts import einsum_macs
from ptsim.capture.network import capture_network
from ptsim.costs.flops import inference_macs, training_macs
from ptsim.costs.memory import iteration_memory
from ptsim.network import Layer, LayerKind
from ptsim.prune.groups import find_groups
from ptsim.setting import StepSetting

IMAGE = (3, 8, 8)


class Net(nn.Module):
    """What `function` makes of the 8 channels of `stem`, between two layers that are like any others."""

    def __init__(self, function: Callable[..., Tensor], **own: Any) -> None:
        super().__init__()
        self.stem, self.function = nn.Conv2d(3, 8, 3, padding=1), function
        for name, part in own.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            elif name.startswith("fixed"):
                self.register_buffer(name, part)
            else:
                setattr(self, name, nn.Parameter(part))
        with torch.no_grad():
            made = function(self, torch.rand(2, 8, 8, 8))
        self.last, self.head = nn.Conv2d(made.shape[1], 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self, torch.relu(self.stem(x)))
        return self.head(torch.relu(self.last(y)).mean((2, 3)))


def vectors(x: Tensor) -> Tensor:
    """One description of an image, of 8 numbers."""
    return x.mean((2, 3))


def image(x: Tensor) -> Tensor:
    """Of as many channels as there are numbers, of one pixel."""
    return x[:, :, None, None]


def rows(x: Tensor) -> Tensor:
    """64 places of 8 channels."""
    return x.flatten(2).transpose(1, 2)


def transformed(m: Any, x: Tensor) -> Tensor:
    """A spatial transformer."""
    theta = m.places(vectors(x)).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.size(), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def flowed(m: Any, x: Tensor) -> Tensor:
    """Every pixel says where it comes from."""
    return F.grid_sample(x, m.flow(x).permute(0, 2, 3, 1).tanh(), padding_mode="border", align_corners=True)


def heads(x: Tensor) -> Tensor:
    return rows(x).view(-1, 64, 2, 4).transpose(1, 2)


def attended(m: Any, x: Tensor, **how: Any) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    made = F.scaled_dot_product_attention(q, k, v, **how)
    return made.transpose(1, 2).reshape(-1, 64, 8).transpose(1, 2).reshape(-1, 8, 8, 8)


def three() -> dict[str, nn.Module]:
    return {name: nn.Conv2d(8, 8, 1) for name in "qkv"}


def read_by_cells(m: Any, x: Tensor) -> Tensor:
    """A cell that reads two descriptions of an image one after the other."""
    first, second = x.mean(3).mean(2), x.amax((2, 3))
    state = m.cell(first)
    state = m.cell(second, state)
    return image(state[0] if isinstance(state, tuple) else state)


def far_from(m: Any, x: Tensor, size: int = 1) -> Tensor:
    return image(torch.cdist(rows(F.avg_pool2d(x, size)), m.centres.expand(x.shape[0], -1, -1)).mean(1))


def looked_up(m: Any, x: Tensor) -> Tensor:
    brightest = x.mean(1).flatten(1).topk(3, 1)[1]
    return x + image(m.bag(brightest))


def turned(m: Any, x: Tensor) -> Tensor:
    """A filter of frequencies."""
    seen = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(m.filter)
    return torch.fft.irfft2(seen, s=(8, 8), norm="ortho")


def blurred(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.fixed_filter, padding=1, groups=x.shape[1])


def squared(m: Any, x: Tensor) -> Tensor:
    y = x.mean(1)
    return torch.bmm(y, y).unsqueeze(1)


def learning_its_bias() -> nn.Module:
    """A convolution whose filters are frozen."""
    layer = nn.Conv2d(8, 8, 3, padding=1)
    layer.weight.requires_grad_(False)
    return layer


def without_gradient(m: Any, x: Tensor) -> Tensor:
    """A teacher beside the student, with the same weights."""
    with torch.no_grad():
        seen = m.own(x)
    return m.own(x) + seen


@dataclasses.dataclass(frozen=True)
class Case:
    function: Callable[..., Tensor]
    own: Callable[[], dict[str, Any]] = dict
    stays: str = ""  # words of the reason for which the channels of `stem` stay; none where they go
    counted: bool = True  # by torch, too
    more: int = 0  # multiplications of a step that torch leaves out
    near: float = 0.0  # how near kept bytes come, as a share


MIXES = "has no rule"
CASES: dict[str, Case] = {
    "affine_grid and grid_sample": Case(transformed, lambda: {"places": nn.Linear(8, 6)}),
    "grid_sample of a flow": Case(flowed, lambda: {"flow": nn.Conv2d(8, 2, 3, padding=1)}),
    "grid_sample with a parameter": Case(
        lambda m, x: F.grid_sample(x, m.grid.expand(x.shape[0], -1, -1, -1), mode="nearest", align_corners=False),
        lambda: {"grid": torch.rand(1, 5, 7, 2)},
    ),
    "pixel_shuffle": Case(lambda m, x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": Case(lambda m, x: F.pixel_unshuffle(x, 2)),
    "unfold": Case(lambda m, x: F.unfold(x, 3, padding=1).view(x.shape[0], -1, 8, 8)),
    "fold": Case(lambda m, x: F.fold(F.unfold(x, 2, stride=2) * 2, 8, 2, stride=2)),
    "interpolate with antialias": Case(
        lambda m, x: F.interpolate(x, size=(5, 6), mode="bilinear", antialias=True, align_corners=False)
    ),
    "interpolate to a bicubic image": Case(lambda m, x: F.interpolate(x, scale_factor=1.5, mode="bicubic")),
    "einsum of channels": Case(
        lambda m, x: torch.einsum("nchw,kc->nkhw", x, m.weight), lambda: {"weight": torch.rand(5, 8)}, "einsum"
    ),
    "einsum with dots": Case(
        lambda m, x: torch.einsum("...hw,wk->...hk", x, m.weight), lambda: {"weight": torch.rand(8, 5)}, "einsum"
    ),
    "einsum of three": Case(
        lambda m, x: torch.einsum("nchw,ck,kd->ndhw", x, m.a, m.b),
        lambda: {"a": torch.rand(8, 3), "b": torch.rand(3, 5)}, "einsum",
    ),
    "einsum of channels with each other": Case(
        lambda m, x: torch.einsum("nchw,ndhw->ncd", x, m.other(x)).unsqueeze(-1),
        lambda: {"other": nn.Conv2d(8, 5, 1)},
    ),
    "attention with a mask": Case(
        lambda m, x: attended(m, x, attn_mask=m.fixed_mask),
        lambda: three() | {"fixed_mask": torch.ones(64, 64).tril().bool()},
    ),
    "attention with a learned bias": Case(
        lambda m, x: attended(m, x, attn_mask=m.bias), lambda: three() | {"bias": torch.rand(2, 64, 64)}
    ),
    "attention to what came before": Case(lambda m, x: attended(m, x, is_causal=True), three),
    "cumsum over places": Case(lambda m, x: x.cumsum(2)),
    "cumsum over channels": Case(lambda m, x: x.cumsum(1), stays="combines these channels"),
    "cdist of few": Case(lambda m, x: far_from(m, x, 2), lambda: {"centres": torch.rand(1, 10, 8)}, MIXES),
    "cdist of many": Case(far_from, lambda: {"centres": torch.rand(1, 40, 8)}, MIXES),
    "gumbel_softmax": Case(lambda m, x: F.gumbel_softmax(x, tau=2.0, dim=1), stays=MIXES),
    "embedding_bag": Case(
        looked_up, lambda: {"bag": nn.EmbeddingBag(64, 8)}, "combines these channels",
        near=1e-3,  # torch takes memory for one place more than there are
    ),
    "LSTM": Case(
        lambda m, x: image(m.reader(rows(x))[0][:, -1]), lambda: {"reader": nn.LSTM(8, 5, batch_first=True)}, MIXES,
        counted=False, near=0.1,  # the library's own memory does not grow evenly
    ),
    # The first state, of zeros, has no gradient.
    "LSTMCell": Case(read_by_cells, lambda: {"cell": nn.LSTMCell(8, 5)}, MIXES, more=4 * 5 * 5),
    "GRUCell": Case(read_by_cells, lambda: {"cell": nn.GRUCell(8, 5)}, MIXES, more=3 * 5 * 5),
    "RNNCell": Case(read_by_cells, lambda: {"cell": nn.RNNCell(8, 5)}, MIXES, more=5 * 5),
    "frequencies": Case(turned, lambda: {"filter": torch.rand(8, 8, 5, 2)}, MIXES),
    "several matrices": Case(
        lambda m, x: torch.linalg.multi_dot([m.a, m.b, x.mean((0, 2, 3))[:, None]]).view(1, -1, 1, 1) + x[:, :1],
        lambda: {"a": torch.rand(5, 3), "b": torch.rand(3, 8)}, MIXES,
    ),
    "a fixed matrix": Case(
        lambda m, x: (rows(x) @ m.fixed).transpose(1, 2).unsqueeze(-1), lambda: {"fixed": torch.rand(8, 5)}, "matmul"
    ),
    "a fixed filter": Case(blurred, lambda: {"fixed_filter": torch.rand(8, 1, 3, 3)}),
    "what is multiplied with itself": Case(
        lambda m, x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)).unsqueeze(-1), stays="multiplies every one"
    ),
    "a matrix by itself": Case(squared, stays="combines these channels"),
    "a layer without gradient": Case(without_gradient, lambda: {"own": nn.Conv2d(8, 8, 3, padding=1)}),
    "a bias that learns alone": Case(lambda m, x: m.own(x), lambda: {"own": learning_its_bias()}, "is frozen"),
    "a detached factor": Case(lambda m, x: x * m.own(x).detach(), lambda: {"own": nn.Conv2d(8, 8, 1)}),
    "cosine_similarity": Case(lambda m, x: x * F.cosine_similarity(x, x.flip(2), dim=1).unsqueeze(1), stays=MIXES),
    "roll and flip": Case(lambda m, x: x.roll(2, 3).flip(2)),
    "logcumsumexp": Case(lambda m, x: x.logcumsumexp(2), stays=MIXES),
    "masked_fill": Case(lambda m, x: x.masked_fill(x < 0.1, 0.0)),
    "a parameter in two": Case(
        lambda m, x: x * m.both.chunk(2)[0] + m.both.unbind()[1], lambda: {"both": torch.rand(2, 8, 1, 1)},
        "takes a parameter apart",
    ),
    "where": Case(lambda m, x: torch.where(x > 0.1, x, 1 - x)),
    "scatter": Case(lambda m, x: x.scatter(1, x.argsort(1), x), stays=MIXES),
    "gather": Case(lambda m, x: torch.gather(x, 3, x.argsort(3)), stays=MIXES),
    "take_along_dim": Case(lambda m, x: torch.take_along_dim(x, x.argsort(3), 3), stays=MIXES),
    "TransformerEncoderLayer": Case(
        lambda m, x: m.encoder(rows(x)).transpose(1, 2).reshape(x.shape),
        lambda: {"encoder": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)}, MIXES,
    ),
}  # fmt: skip


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(CASES[name].function, **CASES[name].own())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_counted_as_torch_counts_it(name: str) -> None:
    model = built(name)
    network = capture_network(model, name="n", input_shape=IMAGE, num_classes=4)
    for batch in (2, 5):
        images = torch.rand(batch, *IMAGE)
        if CASES[name].counted:
            macs = inference_macs(network, images=batch) // batch, training_macs(network, images=batch) // batch
            forward, step = torch_macs(model, images)
            assert macs == (forward, step + CASES[name].more)
        kept = pytest.approx(kept_bytes(model, images), rel=CASES[name].near, abs=0)
        assert iteration_memory(network, StepSetting(batch=batch)).activation_bytes == kept


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_passes_an_operator_is_pruned_exactly_or_refused_with_the_reason(name: str) -> None:
    found = ptsim.inspect(built(name), input_shape=IMAGE)
    assert found.exact or not found.prunable_channels, (found.max_rel_error_eval, found.max_rel_error_train)
    written = next(group for group in found.groups if "stem (out)" in group.members)
    if CASES[name].stays:
        assert not written.prunable
        assert CASES[name].stays in str(written.reason)
    else:
        assert written.prunable, written.reason


def only(layers: tuple[Layer, ...], op: str) -> Layer:
    found = [layer for layer in layers if layer.op == op]
    assert len(found) == 1, [layer.op for layer in layers]
    return found[0]


def test_a_cell_multiplies_its_matrices_once_an_image() -> None:
    network = capture_network(built("LSTMCell"), name="n", input_shape=IMAGE, num_classes=4)
    cells = [layer for layer in network.layers if layer.op == "lstm_cell"]
    assert [(cell.kind, cell.forward_macs) for cell in cells] == [(LayerKind.MATMUL, 4 * 5 * (8 + 5))] * 2


def test_a_fixed_filter_and_a_fixed_matrix_have_no_gradient_of_their_own() -> None:
    network = capture_network(built("a fixed filter"), name="n", input_shape=IMAGE, num_classes=4)
    blur = next(layer for layer in network.layers if layer.op == "conv2d" and layer.groups == 8)
    assert (blur.input_needs_gradient, blur.weight_needs_gradient) == (True, False)
    network = capture_network(built("a fixed matrix"), name="n", input_shape=IMAGE, num_classes=4)
    product = only(network.layers, "matmul")
    assert (product.input_needs_gradient, product.weight_needs_gradient) == (True, False)
    assert training_macs(network) - 2 * (64 * 27 * 8 + 64 * 5 * 6 + 6 * 4) - 64 * 5 * 6 - 6 * 4 == 2 * 64 * 8 * 5


def test_the_matrices_of_an_affine_grid_stay_and_its_size_may_change() -> None:
    model = built("affine_grid and grid_sample")
    groups = find_groups(model, IMAGE)
    edges = {member: edge for edge in groups.edges() for member in edge.members}
    assert edges["stem (out)"].prunable
    assert not edges["places (out)"].prunable
    assert "makes coordinates of them" in str(edges["places (out)"].reason)


@pytest.mark.parametrize("path", [[0, 1, 0, 1], [1, 2, 0, 1], [0, 2, 0, 1]])
def test_an_einsum_multiplies_in_the_order_that_it_is_given(path: list[int]) -> None:
    shapes = [(3, 4), (4, 5), (5, 6)]
    with FlopCounterMode(display=False) as counted:
        torch._VF.einsum("ij,jk,kl->il", [torch.rand(shape) for shape in shapes], path=path)  # type: ignore[attr-defined]
    assert 2 * einsum_macs("ij,jk,kl->il", shapes, path) == counted.get_total_flops()


class Compared(nn.Module):
    """Says of every image how like it is to the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(vectors(self.stem(x)))
        return y @ y.T


def test_images_that_are_compared_with_each_other_are_told_to_be_counted_one_by_one() -> None:
    with pytest.warns(UserWarning, match=r"c compares the images of a mini-batch with each other \(matmul\)"):
        network = capture_network(Compared(), name="c", input_shape=IMAGE, num_classes=1)
    assert only(network.layers, "matmul").forward_macs == 4


LIBRARY = torch.library.Library("ptsim_counts", "DEF")
LIBRARY.define("relu(Tensor x, Tensor w) -> Tensor")
LIBRARY.impl("relu", F.conv2d, "CompositeImplicitAutograd")
LIBRARY.define("tangle(Tensor x) -> Tensor")
LIBRARY.impl("tangle", torch.clone, "CPU")
LIBRARY.impl("tangle", torch.empty_like, "Meta")


def test_an_operator_of_another_library_is_counted_by_what_runs_in_it() -> None:
    model = Net(lambda m, x: torch.ops.ptsim_counts.relu(x, m.weight), weight=torch.rand(5, 8, 3, 3))
    network = capture_network(model, name="n", input_shape=IMAGE, num_classes=4)
    layer = next(layer for layer in network.layers if layer.kind is LayerKind.MATMUL)
    assert (layer.op, layer.forward_macs) == ("relu", 5 * 8 * 9 * 36)
    assert (inference_macs(network), training_macs(network)) == torch_macs(model, torch.rand(1, *IMAGE))


def test_an_operator_of_which_nothing_is_known_is_told() -> None:
    model = Net(lambda m, x: torch.ops.ptsim_counts.tangle(x))
    with pytest.warns(UserWarning, match="n calls ptsim_counts::tangle, of whose arithmetic nothing is known"):
        capture_network(model, name="n", input_shape=IMAGE, num_classes=4)


def test_a_gpu_samples_in_the_width_of_what_it_is_given_and_a_cpu_in_fp32() -> None:
    """A CPU keeps copies in fp32 of the 8 channels and 2 coordinates of 64 places, which are kept already."""
    network = capture_network(built("grid_sample of a flow"), name="n", input_shape=IMAGE, num_classes=4)
    kept = {(seen.device, seen.half): seen.kept_image_bytes for seen in network.footprints}
    assert kept["cpu", True] - kept["gpu", True] == 4 * 64 * (8 + 2)
    assert kept["cpu", False] == kept["gpu", False]
