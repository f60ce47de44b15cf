"""The footprint of a network that was never watched: one iteration walked over its layers by rules.

`capture.footprint` watches an iteration and writes down its moments; traces of schema version 1 and 2, networks made
by hand and the few that cannot be watched have none. Here the same moments come from rules: forward, where every layer
adds what autograd newly keeps for backward and outputs live until their last reader; backward in reverse, where kept
tensors go, gradients of activations come and go, and gradients of parameters stay. zero_grad(set_to_none=True) is
assumed before forward, so parameter gradients exist from backward to the update.

A network of other widths than a watched one gets that one's footprint, rescaled moment by moment (`rescaled`): what the
rules get wrong about both cancels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from ptsim.costs.backward import gradient_of_view
from ptsim.costs.widths import Widths, sources_of
from ptsim.network import ALLOCATOR_BLOCK, Footprint, Layer, LayerKind, MemoryFormat, Moment, Network, Precision
from ptsim.operators import hands_on, num_taps, second_features
from ptsim.setting import MEMORY_FORMATS

_BATCHES = (512, 1024)  # at multiples of 128 images no tensor that grows with the mini-batch is rounded


class _Line(NamedTuple):
    """One moment: bytes whatever the mini-batch, for every image, and gradients of parameters."""

    fixed: float
    image: float
    gradients: float


@functools.lru_cache(maxsize=256)
def walked_footprint(network: Network, *, gpu: bool, half: bool) -> Footprint:
    """The footprint by rules.

    Args:
        network: what is trained.
        gpu: a GPU's rules of autocast, and its allocator's rounding.
        half: under autocast with half precision.
    """
    precision = Precision.FP16 if half else Precision.FP32
    widths = Widths(network, precision, gpu=gpu)
    walks = [_walk(network, batch, gpu=gpu, half=half, memory_format="contiguous") for batch in _BATCHES]
    kept = _line(walks[0].kept, walks[1].kept)
    block = ALLOCATOR_BLOCK if gpu else 1
    return Footprint(
        device="gpu" if gpu else "cpu",
        half=half,
        kept_fixed_bytes=round(kept[0]),
        kept_image_bytes=round(kept[1]),
        weight_copy_bytes=sum(widths.weight_copy(layer) for layer in network.layers),
        buffer_bytes=sum(-(-size // block) * block for size in _buffer_sizes(network)),
        contiguous=_highest(_lines(network, gpu=gpu, half=half, memory_format="contiguous")),
        channels_last=_highest(_lines(network, gpu=gpu, half=half, memory_format="channels_last")),
    )


def rescaled(footprint: Footprint, before: Network, after: Network) -> Footprint:
    """The footprint of `before` as it is for `after`, which has the same layers with other widths.

    Every watched moment is matched with the moment of the walk that lies nearest, by how many gradients are there and
    how much is alive, and grows as that one does.
    """
    gpu, half = footprint.device == "gpu", footprint.half
    old, new = (walked_footprint(network, gpu=gpu, half=half) for network in (before, after))
    formats: dict[MemoryFormat, tuple[Moment, ...]] = {}
    for memory_format in MEMORY_FORMATS:
        pairs = list(
            zip(
                _lines(before, gpu=gpu, half=half, memory_format=memory_format),
                _lines(after, gpu=gpu, half=half, memory_format=memory_format),
                strict=True,
            )
        )
        formats[memory_format] = tuple(_grown(moment, pairs) for moment in getattr(footprint, memory_format))
    return msgspec.structs.replace(
        footprint,
        kept_fixed_bytes=_scaled(footprint.kept_fixed_bytes, new.kept_fixed_bytes, old.kept_fixed_bytes),
        kept_image_bytes=_scaled(footprint.kept_image_bytes, new.kept_image_bytes, old.kept_image_bytes),
        weight_copy_bytes=_scaled(footprint.weight_copy_bytes, new.weight_copy_bytes, old.weight_copy_bytes),
        buffer_bytes=_scaled(footprint.buffer_bytes, new.buffer_bytes, old.buffer_bytes),
        contiguous=formats["contiguous"],
        channels_last=formats["channels_last"],
    )


def _grown(moment: Moment, pairs: list[tuple[_Line, _Line]]) -> Moment:
    gradients = max(old.gradients for old, _ in pairs) or 1.0
    images = max(old.image for old, _ in pairs) or 1.0
    old, new = min(
        pairs,
        key=lambda pair: (
            abs(pair[0].gradients - moment.gradient_bytes) / gradients
            + abs(pair[0].image - moment.image_bytes) / images
        ),
    )
    all_old, all_new = (max(pair[which].gradients for pair in pairs) for which in (0, 1))
    return Moment(
        fixed_bytes=_scaled(moment.fixed_bytes, *((new.fixed, old.fixed) if old.fixed > 0 else (all_new, all_old))),
        image_bytes=_scaled(moment.image_bytes, new.image, old.image),
        gradient_bytes=_scaled(
            moment.gradient_bytes, *((new.gradients, old.gradients) if old.gradients > 0 else (all_new, all_old))
        ),
    )


def _scaled(value: int, new: float, old: float) -> int:
    return round(value * new / old) if old > 0 else value


def _lines(network: Network, *, gpu: bool, half: bool, memory_format: MemoryFormat) -> list[_Line]:
    small, large = (
        _walk(network, batch, gpu=gpu, half=half, memory_format=memory_format).moments for batch in _BATCHES
    )
    loss = 4 * network.num_classes  # of every image; `costs.memory` adds it to the highest moment
    lines = []
    for (few, gradients), (many, _) in zip(small, large, strict=True):
        fixed, image = _line(few, many)
        lines.append(_Line(fixed, image - loss, float(gradients)))
    return lines


def _line(small: int, large: int) -> tuple[float, float]:
    image = (large - small) / (_BATCHES[1] - _BATCHES[0])
    return small - _BATCHES[0] * image, image


def _highest(lines: list[_Line]) -> tuple[Moment, ...]:
    """The moments that no other one exceeds in everything."""
    best: list[_Line] = []
    for line in sorted(set(lines), key=lambda line: (-line.image, -line.fixed, -line.gradients)):
        if not any(line.fixed <= other.fixed and line.gradients <= other.gradients for other in best):
            best.append(line)
    return tuple(
        Moment(fixed_bytes=round(line.fixed), image_bytes=round(line.image), gradient_bytes=round(line.gradients))
        for line in best
    )


@functools.lru_cache(maxsize=16)  # a footprint, and what it is compared with, ask for the same walks
def _walk(network: Network, batch: int, *, gpu: bool, half: bool, memory_format: MemoryFormat) -> _Walk:
    widths = Widths(network, Precision.FP16 if half else Precision.FP32, gpu=gpu)
    return _Walk(network, batch, widths, ALLOCATOR_BLOCK if gpu else 1, memory_format=memory_format)


class _Storages:
    """Where gradients of activations lie: each is there until the last gradient in it is released.

    Attributes:
        alive_bytes: of all that are there.
    """

    def __init__(self) -> None:
        self.alive_bytes = 0
        self._sizes: list[int] = []
        self._gradients: list[int] = []  # how many lie in each

    def allocate(self, num_bytes: int) -> int:
        """A new one with one gradient in it; its number."""
        self._sizes.append(num_bytes)
        self._gradients.append(1)
        self.alive_bytes += num_bytes
        return len(self._sizes) - 1

    def share(self, storage: int) -> int:
        """The same one, with one gradient more in it."""
        self._gradients[storage] += 1
        return storage

    def is_shared(self, storage: int) -> bool:
        """Whether several gradients lie in it."""
        return self._gradients[storage] > 1

    def release(self, storage: int) -> None:
        """Forget one gradient in it."""
        self._gradients[storage] -= 1
        if self._gradients[storage] == 0:
            self.alive_bytes -= self._sizes[storage]


class _Walk:
    """One iteration, layer by layer.

    Attributes:
        moments: bytes after every operator beyond weights, optimizer state and images; and those of the gradients of
            parameters that were there before it.
        kept: what autograd keeps at the end of the forward pass, weight copies and images included.
    """

    def __init__(
        self,
        network: Network,
        batch: int,
        widths: Widths,
        block: int,
        *,
        memory_format: MemoryFormat,
    ) -> None:
        self._network, self._batch, self._widths, self._block = network, batch, widths, block
        self._workspace = {
            layer.name: layer_workspace(layer, batch, widths.output[layer.name], memory_format)
            for layer in network.layers
        }
        self._sources = sources_of(network)
        self._kept = {layer.name: self._kept_bytes(layer) for layer in network.layers}
        self.moments: list[tuple[int, int]] = []
        self.kept = sum(widths.saved(layer, batch) + widths.weight_copy(layer) for layer in network.layers)
        self._backward(self._forward())

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._block) * self._block

    def _kept_bytes(self, layer: Layer) -> int:
        """Newly kept by this layer, without the fp32 images, which are counted for themselves."""
        kept = self._widths.saved(layer, self._batch) + self._widths.weight_copy(layer)
        image = math.prod(self._network.input_shape)
        if not self._sources[layer.name] and layer.saved_elements >= image:
            half = self._widths.weight_copy(layer) > 0
            kept -= 0 if half else self._batch * image * 4
        return self._rounded(kept)

    def _output_bytes(self, layer: Layer) -> int:
        return self._rounded(layer.repeats(self._batch) * layer.output_elements * self._widths.output[layer.name])

    def _forward(self) -> int:
        """Walk the forward pass and return what is alive at its end."""
        storage: dict[str, str | None] = {}  # layer → the layer that made the memory its output lives in
        readers: dict[str, list[int]] = {}
        layers = self._network.layers
        for index, layer in enumerate(layers):
            made_by = [storage[s] for s in self._sources[layer.name]]
            for maker in made_by:
                if maker is not None:
                    readers.setdefault(maker, []).append(index)
            borrowed = layer.view or layer.inplace
            storage[layer.name] = (made_by[0] if made_by else None) if borrowed else layer.name
        saved_somewhere = {storage[layer.name] for layer in layers if layer.output_saved}
        ends: dict[int, list[str]] = {}
        for layer in layers:
            if storage[layer.name] == layer.name and (read := readers.get(layer.name)):
                counted_when_read = layer.name in saved_somewhere
                ends.setdefault(read[0] if counted_when_read else read[-1], []).append(layer.name)

        kept = 0
        live: dict[str, int] = {}
        for index, layer in enumerate(layers):
            for name in ends.get(index, ()):
                if name in saved_somewhere:  # from here on it is among the kept
                    live.pop(name, None)
            kept += self._kept[layer.name]
            if storage[layer.name] == layer.name and not self._keeps_own_output(index, layer, readers, saved_somewhere):
                live[layer.name] = self._output_bytes(layer)
            self._see(kept + sum(live.values()) + self._workspace[layer.name])
            for name in ends.get(index, ()):
                live.pop(name, None)
        loss = 2 * self._rounded(4 * self._batch * self._network.num_classes)  # log-probabilities and their source
        self._see(kept + sum(live.values()) + loss)
        return kept + loss

    def _keeps_own_output(
        self, index: int, layer: Layer, readers: Mapping[str, list[int]], saved: Iterable[str | None]
    ) -> bool:
        """The output is already counted at this layer: it is kept, and its first reader keeps nothing of its size."""
        if layer.name not in set(saved) or layer.saved_elements < layer.output_elements:
            return False
        read = readers.get(layer.name)
        return not read or self._network.layers[read[0]].saved_elements < layer.output_elements

    def _backward(self, kept: int) -> None:
        """Walk the backward pass; gradients of activations are shared where an operator hands its own on."""
        # layer → storages whose sum is its output's gradient, each with how much of it is this layer's
        gradients: dict[str, list[tuple[int, int]]] = {}
        storages = _Storages()
        beside, learnt = kept, 0
        by_name = {layer.name: layer for layer in self._network.layers}
        read = {s for sources in self._sources.values() for s in sources}
        for layer in reversed(self._network.layers):
            if layer.name not in read:
                num_bytes = self._output_bytes(layer)
                gradients[layer.name] = [(storages.allocate(num_bytes), num_bytes)]
            given = gradients.pop(layer.name, [])
            if given:
                own = self._rounded(4 * layer.num_parameters)
                beside += own
                sources = self._sources[layer.name] if layer.input_needs_gradient else []
                sizes = layer.input_sizes(self._batch)
                for index, source in enumerate(sources):
                    if len(sizes) == len(sources):
                        num_bytes = self._rounded(sizes[index] * self._widths.output[source])
                    else:
                        num_bytes = self._output_bytes(by_name[source])
                    if _shares_gradient(layer, index):
                        storage = storages.share(given[0][0])
                    else:
                        storage = storages.allocate(num_bytes)
                    gradients.setdefault(source, []).append((storage, num_bytes))
                copies = self._widths.weight_copy(layer) + self._workspace[layer.name]
                self._see(beside + storages.alive_bytes + copies, learnt)
                for storage, _ in given:
                    storages.release(storage)
                for source in sources:
                    gradients[source] = self._added_up(gradients[source], storages, beside, learnt)
                beside -= own
                learnt += own
            beside -= self._kept[layer.name]

    def _added_up(
        self, parts: list[tuple[int, int]], storages: _Storages, beside: int, learnt: int
    ) -> list[tuple[int, int]]:
        """The branches' gradients as one: they are added where they meet, in a new storage if the first is shared."""
        (first, num_bytes), *others = parts
        if not others:
            return parts
        total = first
        if storages.is_shared(first):
            total = storages.allocate(num_bytes)
            self._see(beside + storages.alive_bytes, learnt)
            storages.release(first)
        for storage, _ in others:
            storages.release(storage)
        return [(total, num_bytes)]

    def _see(self, num_bytes: int, gradients: int = 0) -> None:
        self.moments.append((num_bytes, gradients))


def _shares_gradient(layer: Layer, operand: int) -> bool:
    """An input's gradient is the output's, or lies in it: of sums, views, and the slices of a concatenation."""
    same = all(math.prod(shape) == layer.output_elements for shape in layer.input_shapes)
    handed_on = layer.view and gradient_of_view(layer, 1, 1) is None
    return handed_on or layer.kind is LayerKind.CONCAT or (same and hands_on(layer.op, operand))


def _buffer_sizes(network: Network) -> Iterable[int]:
    """Running statistics of BatchNorm, and weights that are frozen and therefore no `Parameter`."""
    for layer in network.layers:
        if layer.kind is LayerKind.BATCH_NORM:
            yield from (4 * layer.out_channels, 4 * layer.out_channels, 8)
        if not layer.weight_needs_gradient and layer.kind in (LayerKind.CONV, LayerKind.LINEAR):
            weights = num_taps(layer) * second_features(layer.op, layer.input_shapes)
            yield 4 * weights * layer.in_channels // layer.groups * layer.out_channels


def layer_workspace(layer: Layer, batch: int, width: int, memory_format: MemoryFormat) -> int:
    """What cuDNN and oneDNN take around a dense convolution beside its results, at most.

    Contiguous operands are copied to the library's own layout, the weights' gradient is made in it (channels-last: in
    split sums) and copied out. Backward is meant; forward needs less. Seen in the CPU allocator's log of ResNet-20 and
    VGG-11.
    """
    if layer.kind is not LayerKind.CONV or layer.groups > 1:
        return 0
    operands = (sum(layer.input_sizes(batch)) + layer.repeats(batch) * layer.output_elements) * width
    return max(operands if memory_format == "contiguous" else 0, 4 * layer.num_parameters)
