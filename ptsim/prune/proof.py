"""Is pruning this network exact? A numerical proof in float64, for any network.

Random channel components are zeroed in every producer and consumer, the same ones are pruned, and the two networks are
compared: outputs in evaluation mode, and outputs, gradients and BatchNorm statistics of a training step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ptsim import zoo
from ptsim.capture.chance import chance_of, random_state_kept, seed_all
from ptsim.capture.copies import copied
from ptsim.capture.graph import naming_the_image, output_tensors
from ptsim.errors import UnsupportedModelError, UsageError, on_one_line
from ptsim.prune.alignment import SHAPE_ERRORS
from ptsim.prune.cut import take
from ptsim.prune.groups import ChannelGroups, axes_for, find_groups, weight_GOIK
from ptsim.prune.labels import BATCH_NORMS
from ptsim.prune.reconfigure import CutPlan, aligned_graphs, operate
from ptsim.prune.selection import keep_one
from ptsim.setting import image_shape

TOLERANCE = 1e-9
LARGE, THIN = 32_000_000, 1 / 8
SMALL_SIDES = (64, 96, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupReport:
    """One edge of the network: who writes and reads its channels, and whether they can be removed.

    `sets` are what its channels go in: those of one set only together. `evenly` are the grouped convolutions that lose
    as many of them from every group.
    """

    name: str
    width: int
    members: tuple[str, ...]
    prunable: bool
    reason: str | None
    sets: int
    evenly: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `ptsim inspect` found.

    Attributes:
        prunable_channels: channels that can be removed: the widths of the groups, one for all layers that share it.
        refused_channels: those that cannot; `groups` says why. The network's inputs and outputs are among them.
        channels_removed: sets of channels that go only together that the proof removed.
        proof_input: the image on which the proof ran; smaller than `input_shape` where the groups are the same.
        proof_parameters: of the network on which the proof ran. One of more than 32 million parameters is first thinned
            to an eighth of its prunable channels: the same graph and rules, less arithmetic.
        max_rel_error_eval, max_rel_error_train: largest |pruned − zeroed| of a tensor over that tensor's largest
            |zeroed|; training includes outputs, gradients and running statistics. The gradients of one layer share
            a scale, at least 1e-6 of the network's largest: a bias in front of a BatchNorm has the exact gradient 0,
            and what is computed for it is the rounding of sums as large as those of the layer's weight.
        traced_by: "torch.fx", or "torch.export" where torch.fx cannot trace the code.
        exact: something could be removed and both errors are at most 1e-9.
    """

    model: str
    input_shape: tuple[int, int, int]
    proof_input: tuple[int, int, int]
    proof_parameters: int
    groups: tuple[GroupReport, ...]
    prunable_channels: int
    refused_channels: int
    channels_removed: int
    max_rel_error_eval: float
    max_rel_error_train: float
    exact: bool
    traced_by: str
    seconds: float


class InFloat64(TorchFunctionMode):
    """What the model's code makes or converts in another floating-point format is in float64."""

    _FORMATS = frozenset((torch.float16, torch.bfloat16, torch.float32))
    _CONVERSIONS = frozenset((torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take float64 in place of what is narrower."""
        if func in self._CONVERSIONS:
            return args[0].double()
        args, kwargs = tree_map(lambda a: torch.float64 if self._narrow(a) else a, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _narrow(self, argument: Any) -> bool:
        return isinstance(argument, torch.dtype) and argument in self._FORMATS


@contextlib.contextmanager
def _float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class WithoutRandomness(TorchFunctionMode):
    """Dropout of any kind passes its input on; stochastic depth keeps every branch (and still divides by its rate).

    The slope of an RReLU is the middle one, as in evaluation.

    A rate of survival below one half would be taken for one of what is dropped.

    So both networks of a comparison, whose tensors differ in size, see the same (absent) noise.
    """

    _DROPOUTS = frozenset(
        (
            torch.dropout,
            torch.dropout_,
            torch.feature_dropout,
            torch.feature_dropout_,
            torch.alpha_dropout,
            torch.alpha_dropout_,
            torch.feature_alpha_dropout,
            torch.feature_alpha_dropout_,
            torch.nn.functional.dropout,
            torch.nn.functional.dropout1d,
            torch.nn.functional.dropout2d,
            torch.nn.functional.dropout3d,
            torch.nn.functional.alpha_dropout,
            torch.nn.functional.feature_alpha_dropout,
        )
    )

    _RANDOM_SLOPES = frozenset((torch.rrelu, torch.rrelu_, torch.nn.functional.rrelu))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept the random operators."""
        if func in self._RANDOM_SLOPES:
            slopes = {name: value for name, value in (kwargs or {}).items() if name in ("input", "lower", "upper")}
            return torch.nn.functional.rrelu(*args[:3], **slopes)
        if func in self._DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        if func is torch.Tensor.bernoulli_:
            chance = args[1] if len(args) > 1 else (kwargs or {}).get("p", 0.5)
            rare = isinstance(chance, float) and chance < 0.5  # of what is dropped, as in DropBlock
            return args[0].fill_(0.0 if rare else 1.0)
        return func(*args, **(kwargs or {}))


def _group_reports(groups: ChannelGroups) -> tuple[GroupReport, ...]:
    grouped = [
        (layer.layer, {*layer.inputs.tolist(), *layer.outputs.tolist()}) for layer in groups.layers if layer.grouped
    ]
    return tuple(
        GroupReport(
            name=e.name,
            width=e.width,
            members=e.members,
            prunable=e.prunable,
            reason=e.reason,
            sets=len(e.components),
            evenly=tuple(layer for layer, components in grouped if not components.isdisjoint(e.components)),
        )
        for e in groups.edges()
    )


def _thinned(network: nn.Module, groups: ChannelGroups) -> ChannelGroups:
    """Cut a large network to a share `THIN` of its channels in place; the groups of what is left."""
    thin = groups.prunable & (torch.rand(groups.num_components) < 1 - THIN)
    thin, _ = keep_one(groups, thin, torch.rand(groups.num_components))
    operate(network, groups, CutPlan(removed=thin))
    return find_groups(network, groups.input_shape)


def inspect(
    model: str | nn.Module,
    *,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    fraction: float = 0.4,
    seed: int = 0,
) -> Inspection:
    """Channel groups of a network, and a numerical proof that pruning them is exact.

    Args:
        model: a name that `ptsim.zoo` knows, or a module (which is copied and left as it is).
        input_shape: (C, H, W); the entry's own for a name, (3, 224, 224) for a module.
        num_classes: for a name; the entry's own if None.
        fraction: of the prunable components is zeroed and pruned.
        seed: of the weights (for a name), of the choice and of the images.

    Raises:
        UnsupportedModelError: neither torch.fx nor torch.export can trace it, or it does not run on such an image.
        UsageError: a fraction out of (0, 1], a shape with numbers that are not positive; see `zoo.find` as well.
    """
    start = time.perf_counter()
    if not 0 < fraction <= 1:
        raise UsageError(f"the fraction to remove is {fraction}; it has to be in (0, 1]")
    with random_state_kept(None if isinstance(model, str) else model, []):
        seed_all(seed)
        if isinstance(model, str):
            entry = zoo.find(model)
            name, shape = entry.name, image_shape(entry.input_shape if input_shape is None else input_shape)
            network = entry.make(num_classes)
        else:
            name, shape = type(model).__name__, image_shape((3, 224, 224) if input_shape is None else input_shape)
            network = copied(model)
        if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
            raise UnsupportedModelError(
                f"{name} has shapes but no weights: some of its tensors are on the meta device",
                hint='model.to_empty(device="cpu"), and give them values',
            )
        network.cpu()
        groups = report = find_groups(network, shape)
        if sum(parameter.numel() for parameter in network.parameters()) > LARGE:
            groups = _thinned(network, groups)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        proof_shape = _smallest_equivalent(network, groups)
        network.double()
        _liven(network)
        removed, eval_error, train_error = _compare(network, groups, proof_shape, fraction, seed)
    return Inspection(
        model=name,
        input_shape=shape,
        proof_input=proof_shape,
        proof_parameters=parameters,
        groups=_group_reports(report),
        prunable_channels=report.num_channels[0],
        refused_channels=report.num_channels[1],
        channels_removed=removed,
        max_rel_error_eval=eval_error,
        max_rel_error_train=train_error,
        exact=removed > 0 and max(eval_error, train_error) <= TOLERANCE,
        traced_by=report.graph.meta["traced_by"],
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def zero_components(model: nn.Module, groups: ChannelGroups, mask: Tensor) -> None:
    """Set the weights of the components in `mask` to zero in all producers' outputs and all consumers' inputs.

    Depthwise convolutions, fixed filters, biases and BatchNorms keep theirs: nothing reads them any more.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer in groups.layers:
        if not layer.decides:
            continue
        weight = parameters[layer.weight]
        outputs, inputs = (
            torch.nonzero(mask[axis]).flatten().to(weight.device) for axis in (layer.outputs, layer.inputs)
        )
        weight.index_fill_(1 if layer.transposed else 0, outputs, 0.0)
        if layer.groups == 1:
            weight.index_fill_(0 if layer.transposed else 1, inputs, 0.0)
        else:
            kept = (~mask[layer.inputs]).view(layer.groups, 1, -1, 1).to(weight.device)
            weight.copy_((weight_GOIK(weight, layer) * kept).view_as(weight))


def _smallest_equivalent(network: nn.Module, groups: ChannelGroups) -> tuple[int, int, int]:
    channels, height, width = groups.input_shape
    for side in SMALL_SIDES:
        if side < min(height, width):
            axes = axes_for(network, (channels, side, side))
            if axes.keys() == groups.parts.keys() and all(torch.equal(axes[key], groups.parts[key]) for key in axes):
                return (channels, side, side)
    return groups.input_shape


@torch.no_grad()
def _liven(network: nn.Module) -> None:
    """Give parameters and statistics that are initially 0, 1 or another constant values as a trained network has them.

    Otherwise a lost bias or a branch behind a vanishing scale would go unnoticed.
    """
    for module in network.modules():
        if isinstance(module, BATCH_NORMS):
            for tensor, centre in (
                (module.weight, 1.0),
                (module.running_var, 1.0),
                (module.bias, 0.0),
                (module.running_mean, 0.0),
            ):
                if tensor is not None:
                    tensor.uniform_(centre - 0.3, centre + 0.3)
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                    scale = 0.3 if parameter.ndim < 2 else 1 / parameter[0].numel() ** 0.5
                    parameter.uniform_(-scale, scale)


def _compare(
    network: nn.Module, groups: ChannelGroups, shape: tuple[int, int, int], fraction: float, seed: int
) -> tuple[int, float, float]:
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(groups.num_components, generator=generator)
    limit = max(fraction, float(chance[groups.prunable].min())) if bool(groups.prunable.any()) else fraction
    mask = _removable(network, groups, chance, limit, torch.rand(len(chance), generator=generator))
    zero_components(network, groups, mask)
    has_batch_norm = any(isinstance(module, BATCH_NORMS) for module in network.modules())
    if has_batch_norm:
        num_images = 4 if shape[-1] < 200 else 2
    else:  # no image has a say in what becomes of another
        num_images = 1 if sum(parameter.numel() for parameter in network.parameters()) > LARGE else 2
    images = torch.rand((num_images, *shape), dtype=torch.float64, generator=generator)
    kept = groups.cut_for(mask).by_tensor()
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}

    with naming_the_image(network, shape):
        eval_outputs, train_outputs, gradients, after = _run(network, images, seed)
    expected_gradients = {name: take(g, kept.get(name, {})) for name, g in gradients}
    expected_after = {name: take(buffer, kept.get(name, {})) for name, buffer in after.items()}
    for name, buffer in network.named_buffers():
        buffer.copy_(statistics[name])
    try:
        operate(network, groups, CutPlan(removed=mask))
        outputs, outputs_train, gradients, after = _run(network, images, seed)
    except SHAPE_ERRORS as error:
        raise UnsupportedModelError(
            f"{type(network).__name__} does not run with the channels left: {on_one_line(error)}"
        ) from error
    eval_error = max((_relative_error(*pair) for pair in zip(outputs, eval_outputs, strict=True)), default=0.0)
    train_error = max(_relative_error(*pair) for pair in zip(outputs_train, train_outputs, strict=True))
    scales: dict[str, float] = {}
    for name, expected in expected_gradients.items():
        layer = name.rpartition(".")[0]
        scales[layer] = max(scales.get(layer, 0.0), float(expected.abs().max()) if expected.numel() else 0.0)
    least = 1e-6 * max(scales.values(), default=0.0)
    for name, gradient in gradients:
        expected = expected_gradients.pop(name, torch.zeros(()))  # of another shape: a gradient that should not be
        scale = max(scales.get(name.rpartition(".")[0], 0.0), least)
        train_error = max(train_error, _relative_error(gradient, expected, scale))
    if any(bool(lost.any()) for lost in expected_gradients.values()):
        train_error = float("inf")
    for name, buffer in after.items():
        train_error = max(train_error, _relative_error(buffer, expected_after[name]))
    return int(mask.sum()), eval_error, train_error


def _removable(network: nn.Module, groups: ChannelGroups, chance: Tensor, limit: float, importance: Tensor) -> Tensor:
    """Components whose `chance` is at most `limit`, fewer where the model's code would not bear them.

    `reconfigure` refuses what it would not bear, too, and then leaves out all that is sensitive.
    """
    for part in (limit, limit / 2, limit / 4):
        mask, _ = keep_one(groups, groups.prunable & (chance <= part), importance)
        if bool(mask.any()) and aligned_graphs(network, groups, CutPlan(removed=mask)) is not None:
            return mask
    return keep_one(groups, groups.prunable & (chance <= limit) & ~groups.sensitive, importance)[0]


def _run(
    network: nn.Module, images: Tensor, seed: int
) -> tuple[list[Tensor], list[Tensor], Iterator[tuple[str, Tensor]], dict[str, Tensor]]:
    """Outputs in evaluation mode; outputs, gradients (handed out one by one and dropped) and buffers after training."""
    seed_all(seed, chance_of(network).generators)  # noise of the model's own: the same for both networks
    with WithoutRandomness(), InFloat64(), _float64_by_default():
        with torch.no_grad():
            eval_outputs = list(output_tensors(network.eval()(images)))
        train_outputs = list(output_tensors(network.train()(images)))
        if not train_outputs:
            raise UnsupportedModelError(f"{type(network).__name__} returns no tensor")
        generator = torch.Generator().manual_seed(seed + 1)
        learnt = [out for out in train_outputs if out.requires_grad]  # not the number of a class, nor of frozen layers
        losses = [(out * torch.rand(out.shape, dtype=out.dtype, generator=generator)).sum().real for out in learnt]
        if losses:
            torch.autograd.backward(losses)

    def gradients() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                yield name, gradient

    buffers = {name: buffer.clone() for name, buffer in network.named_buffers() if buffer.is_floating_point()}
    return eval_outputs, [out.detach() for out in train_outputs], gradients(), buffers


def _relative_error(found: Tensor, expected: Tensor, least_scale: float = 0.0) -> float:
    if found.shape != expected.shape or not bool((torch.isfinite(found) & torch.isfinite(expected)).all()):
        return float("inf")
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):  # numbers of classes, masks
        found, expected = found.double(), expected.double()
    difference, scale = float((found - expected).abs().max()), max(float(expected.abs().max()), least_scale)
    return difference / scale if scale > 0 else difference
