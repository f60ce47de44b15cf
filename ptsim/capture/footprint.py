"""How much memory do the tensors of one training iteration take, moment by moment, without doing its arithmetic?

A copy of the model runs forward, loss and backward as Python runs them, without arithmetic, and a dispatch mode sees
every storage come and go: what operators keep, what autocast copies, and what lives only for a moment. Two sizes of the
mini-batch tell what grows with it. A GPU is stood in for by the CPU's kernels under the GPU's rules: what autocast
runs in fp32 there, dropout's boolean masks, and fused attention. Tests compare with the CPU allocator's own log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ptsim.capture.chance import random_state_kept
from ptsim.capture.copies import dtype_of, hollow_copy
from ptsim.capture.graph import output_tensors
from ptsim.capture.hollow import NoArithmetic
from ptsim.capture.kept import KeptStorages
from ptsim.capture.looking import let_hooks_look
from ptsim.network import ALLOCATOR_BLOCK, Footprint, LayerKind, Moment
from ptsim.operators import AUTOCAST_FP32_CPU, AUTOCAST_FP32_GPU, KIND_OF_OP

_BATCHES = (2, 3)
_LARGEST = 2**20  # mini-batches beyond it are nobody's
_WIDEST_ON_GPU = frozenset({"grid_sample", "grid_sampler"})  # of its operands (AT_FORALL_PROMOTE); on a CPU fp32
_WIDER_ON_GPU = AUTOCAST_FP32_GPU | _WIDEST_ON_GPU
# Pools and padding that a CPU alone runs in fp32. What else is on its list, a GPU cannot do in half precision.
_AS_GIVEN_ON_GPU = frozenset(
    op for op in AUTOCAST_FP32_CPU - _WIDER_ON_GPU if KIND_OF_OP.get(op) in (LayerKind.POOL, LayerKind.RESHAPE)
)
_VECTOR = 16  # channels of oneDNN's blocked layout with AVX-512


class _Workspaces(NamedTuple):
    """Bytes that libraries take, by device and memory format."""

    cpu: int = 0
    gpu: int = 0
    channels_last: int = 0


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Bytes after one operator: alive beside gradients of parameters, these, and a library's workspace in it."""

    alive: int
    gradients: int
    num_tensors: int
    workspaces: _Workspaces


def footprints(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[Footprint, ...]:
    """One for every kind of device and width; none where a step takes another course at another mini-batch.

    Nor are there any of a width in which the model cannot run: some operators know no half precision. The model, which
    `rehearse` has run already, is left as it is.
    """
    found: list[Footprint] = []
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    buffers = sum(tensor.numel() * tensor.element_size() for tensor in (*model.buffers(), *frozen))
    for half in (False, True):
        try:
            gpu = tuple(_watch(model, input_shape, batch, gpu=True, half=half) for batch in _BATCHES)
            cpu = gpu  # where no operator has rules of its own on a GPU, the iteration is the same one
            if gpu[0].bent:
                cpu = tuple(_watch(model, input_shape, batch, gpu=False, half=half) for batch in _BATCHES)
        except RuntimeError:  # what torch raises of operators; `costs.memory` has rules instead
            continue
        for device, (small, large) in (("cpu", cpu), ("gpu", gpu)):
            if len(small.seen) == len(large.seen) and len(small.kept) == len(large.kept):
                found.append(_footprint(small, large, device=device, half=half, buffer_bytes=buffers))
    return tuple(found)


def _footprint(small: _Watch, large: _Watch, *, device: str, half: bool, buffer_bytes: int) -> Footprint:
    fixed, per_image = _line(sum(size for size, _ in small.kept), sum(size for size, _ in large.kept))
    same = ((few, is_half) for (few, is_half), (many, _) in zip(small.kept, large.kept, strict=True) if few == many)
    gpu = device == "gpu"
    return Footprint(
        device="gpu" if gpu else "cpu",
        half=half,
        kept_fixed_bytes=fixed,
        kept_image_bytes=per_image,
        weight_copy_bytes=sum(size for size, is_half in same if is_half),
        buffer_bytes=buffer_bytes,
        contiguous=_moments(small.seen, large.seen, lambda w: w.gpu if gpu else w.cpu, gpu=gpu),
        channels_last=_moments(small.seen, large.seen, lambda w: w.channels_last, gpu=gpu),
    )


@dataclasses.dataclass
class _Watch:
    """One step: what was seen after every operator, and what autograd kept at the end of the forward pass."""

    seen: list[_Seen]
    kept: list[tuple[int, bool]]  # bytes of every storage, and whether they are matrices in half precision
    bent: bool  # a GPU's rule differed from the CPU's somewhere


def _watch(model: nn.Module, input_shape: tuple[int, int, int], batch: int, *, gpu: bool, half: bool) -> _Watch:
    hollow = NoArithmetic()
    with warnings.catch_warnings(), random_state_kept(model, []), hollow, torch.device("cpu"), torch.enable_grad():
        warnings.simplefilter("ignore")  # the model's own: `rehearse` was not the place to repeat them either
        twin = hollow_copy(model).train()
        let_hooks_look(twin)
        dtype = dtype_of(twin)
        images = torch.empty(batch, *input_shape, dtype=dtype)  # draws nothing: the code meets the numbers of its trace
        ledger = _Ledger([*twin.parameters(), *twin.buffers()], images)
        rules = _LikeGpu(half=half)
        with ledger, rules if gpu else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=half), ledger.saved.watching():
                outputs = list(output_tensors(twin(images)))
            kept = ledger.kept()
            for parameter in twin.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(ledger.accumulated)  # type: ignore[no-untyped-call] # torch's gap
            learnt = [y for y in outputs if y.requires_grad]
            loss = [y.float().flatten(1 if y.dim() > 1 else 0).log_softmax(-1).sum() for y in learnt]
            del outputs, learnt
            if loss:
                torch.autograd.backward(loss)
    return _Watch(ledger.seen, kept, rules.bent)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's gap
    """Counts storages from the operator that makes them until nothing holds them."""

    def __init__(self, own: Sequence[Tensor], images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's gap
        self.seen: list[_Seen] = []
        self.saved = KeptStorages(own, _size_and_width)
        self._images = images.untyped_storage()._cdata
        self._own = {*self.saved.own, self._images}
        self._image_bytes = images.untyped_storage().nbytes()
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, Any] = {}
        self._gradients: set[int] = set()
        self._alive = self._gradient_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        self.seen.append(_Seen(self._alive, self._gradient_bytes, len(self._sizes), _workspaces(func, args)))
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._own or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._alive += storage.nbytes()
        self._watched[key] = weakref.ref(storage, lambda _: self._leave(key))

    def _leave(self, key: int) -> None:
        size = self._sizes.pop(key)
        del self._watched[key]
        if key in self._gradients:
            self._gradients.discard(key)
            self._gradient_bytes -= size
        else:
            self._alive -= size

    def accumulated(self, parameter: Tensor) -> None:
        """From now on the gradient counts as one."""
        if parameter.grad is None:  # an operator without a formula for its gradient hands back none
            return
        key = parameter.grad.untyped_storage()._cdata
        if key in self._sizes and key not in self._gradients:
            self._gradients.add(key)
            self._gradient_bytes += self._sizes[key]
            self._alive -= self._sizes[key]

    def kept(self) -> list[tuple[int, bool]]:
        """What autograd keeps now: bytes of every storage, and whether they are matrices in half precision."""
        alive = self.saved.alive()
        images = alive.pop(self._images, None)
        return [*alive.values()] if images is None else [(self._image_bytes, False), *alive.values()]


def _size_and_width(tensor: Tensor, _: object) -> tuple[int, bool]:
    return tensor.untyped_storage().nbytes(), tensor.dim() > 1 and tensor.dtype in (torch.bfloat16, torch.float16)


class _LikeGpu(TorchFunctionMode):
    """The CPU's operators under a GPU's rules."""

    def __init__(self, *, half: bool) -> None:
        super().__init__()
        self._half = half
        self.bent = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        name = getattr(func, "__name__", "")
        wider = name in _WIDER_ON_GPU
        if self._half and (wider or _as_given_on_gpu(name, kwargs)) and torch.is_autocast_enabled("cpu"):
            self.bent = True
            if wider:
                width = _full_width if name in AUTOCAST_FP32_GPU else _as_wide_as(output_tensors((args, kwargs)))
                args, kwargs = pytree.tree_map_only(Tensor, width, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training and not inplace and p > 0:  # keeps a mask of bytes
            self.bent = True
            return torch.native_dropout(input, p, True)[0]
        return F.dropout(input, p, training, inplace)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        **more: Any,
    ) -> Tensor:  # fmt: skip
        if dropout_p > 0:  # inside the fused kernel: nothing is kept for it
            self.bent = True
        return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, **more)


def _as_given_on_gpu(name: str, kwargs: dict[str, Any]) -> bool:
    return name in _AS_GIVEN_ON_GPU or (name == "pad" and kwargs.get("mode", "constant") != "constant")


def _full_width(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _as_wide_as(tensors: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    widest = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
    return lambda tensor: tensor.to(widest)


def _workspaces(func: Any, args: Any) -> _Workspaces:
    """What libraries take in a convolution's backward pass beside its results; forward needs less.

    Contiguous operands are copied to the library's own layout, the weights' gradient is made in it (channels-last: in
    split sums) and copied out. oneDNN's layout pads channels to whole vectors of 16; an image of few channels it takes
    as it is. Seen in the CPU allocator's log; of cuDNN it is assumed, for dense convolutions.
    """
    if func is not torch.ops.aten.convolution_backward.default:
        return _Workspaces()
    gradient, x, weight = args[:3]
    filters = 4 * weight.numel()
    strided = max(args[4], default=1) > 1  # the gradient of its input takes a copy more
    cpu = _in_own_layout(x) + max(_in_own_layout(gradient), strided * _in_own_layout(x))
    gpu = (gradient.numel() + x.numel()) * x.element_size()
    dense = args[9] == 1
    return _Workspaces(max(cpu, dense * filters), dense * max(gpu, filters), dense * filters)


def _in_own_layout(tensor: Tensor) -> int:
    """Bytes of a copy whose channels fill whole vectors; 0 for an image that the CPU's kernel reads as it is."""
    channels = tensor.shape[1]
    padded = 0 if channels <= 4 else -(-channels // _VECTOR) * _VECTOR
    return tensor.numel() // channels * padded * tensor.element_size()


def _line(small: int, large: int) -> tuple[int, int]:
    """(fixed, per image) of what takes `small` and `large` bytes at the two mini-batches."""
    per_image = (large - small) // (_BATCHES[1] - _BATCHES[0])
    return small - _BATCHES[0] * per_image, per_image


def _moments(
    small: Sequence[_Seen], large: Sequence[_Seen], workspace: Callable[[_Workspaces], int], *, gpu: bool
) -> tuple[Moment, ...]:
    """The moments that can be the highest at some mini-batch, with gradients kept in buckets or not."""
    lines = set()
    for few, many in zip(small, large, strict=True):
        fixed, image = _line(few.alive + workspace(few.workspaces), many.alive + workspace(many.workspaces))
        lines.add((fixed + gpu * ALLOCATOR_BLOCK * few.num_tensors, image, few.gradients))
    highest = set(_envelope(lines, lambda line: line[0] + line[2])) | set(_envelope(lines, lambda line: line[0]))
    return tuple(
        Moment(fixed_bytes=fixed, image_bytes=image, gradient_bytes=gradients)
        for fixed, image, gradients in sorted(highest, key=lambda line: line[1])
    )


_Line = tuple[int, int, int]


def _envelope(lines: set[_Line], height: Callable[[_Line], int]) -> Iterator[_Line]:
    """Of lines height + batch·slope those that are the highest somewhere between one image and very many."""
    batch: float = 1
    while batch <= _LARGEST:
        best = max(lines, key=lambda line: (height(line) + batch * line[1], line[1]))
        yield best
        crossings = ((height(best) - height(line)) / (line[1] - best[1]) for line in lines if line[1] > best[1])
        batch = math.nextafter(min((at for at in crossings if at > batch), default=math.inf), math.inf)
