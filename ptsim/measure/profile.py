"""How long does each layer of this very network take here, forward and backward, and a whole step without timers?

Everything runs on a copy: weights, buffers, random state, gradients and optimizer of the caller stay as they are. The
layers are timed inside one real pass after the other: forward node by node through the torch.fx graph, backward
between the hooks around every autograd node, which is attributed to the layer whose output first reaches it. So
in-place operators, autocast's casts and saved tensors behave as in training.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import Node
from torch.nn import functional as F

from ptsim.capture.copies import computed_tensors
from ptsim.capture.network import layer_names, training_graph
from ptsim.errors import MissingMeasurementError, UnsupportedModelError, lacks_memory
from ptsim.measure.host_memory import keep_freed_memory
from ptsim.measure.nvml import open_meter
from ptsim.measure.tf32 import tf32_allowed
from ptsim.measure.timers import cuda_event
from ptsim.network import MemoryFormat, Network, Precision
from ptsim.setting import positive_number
from ptsim.trace.schema import LayerProfile, Profile

NUM_WARM_UP = 2  # the first step allocates and lets cuDNN choose; the second is the first of the usual kind
NUM_STEPS = 5
NUM_LAYERED_STEPS = 3
_MANY_STEPS = 20  # from which on a range of steps leaves out the fastest and the slowest ones

# torch's types of the formats that autocast uses.
HALF_TYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


def layout(memory_format: MemoryFormat) -> torch.memory_format:
    """Torch's name of a memory format."""
    return torch.channels_last if memory_format == "channels_last" else torch.contiguous_format


@contextlib.contextmanager
def number_format(precision: Precision, device: torch.device) -> Iterator[None]:
    """Matrix products inside run in `precision`: autocast for the 16-bit ones, CUDA's TF32 switches otherwise."""
    with tf32_allowed(precision), _autocast(precision, device):
        yield


def _autocast(precision: Precision, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=HALF_TYPES.get(precision), enabled=precision in HALF_TYPES)


@contextlib.contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Let cuDNN try its algorithms for every new shape and keep the fastest, as ptsim's training does."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """How many steps a profile takes.

    Attributes:
        num_steps: whole steps to take the median of.
        num_layered_steps: steps with a clock around every layer.
        min_seconds: take whole steps for at least as long, and a quarter as many with clocks around the layers.
        max_seconds: take fewer steps, of each kind at least one, where all of them would take longer.

    Raises:
        ValueError: a number of steps is not positive.
    """

    num_steps: int = NUM_STEPS
    num_layered_steps: int = NUM_LAYERED_STEPS
    min_seconds: float = 0.0
    max_seconds: float = math.inf

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_layered_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    def after(self, first_s: float) -> tuple[Budget, int]:
        """What is left of the budget once the first step has taken so long, and how many more steps warm up."""
        affordable = self.max_seconds / max(first_s, 1e-9) - 1
        left = self
        if affordable < NUM_WARM_UP - 1 + self.num_steps + self.num_layered_steps:
            left = Budget(
                num_steps=min(self.num_steps, max(1, int(affordable / 2))),
                num_layered_steps=min(self.num_layered_steps, max(1, int(affordable / 4))),
            )
        return left, NUM_WARM_UP - 1 if affordable > 2 else 0


USUAL_BUDGET = Budget()


def profile_network(
    model: nn.Module,
    network: Network,
    *,
    batch: int,
    precision: Precision,
    memory_format: MemoryFormat,
    optimizer: torch.optim.Optimizer | None = None,
    regularizer: Callable[[], object] | None = None,
    device: torch.device | str,
    budget: Budget = USUAL_BUDGET,
) -> Profile:
    """Time one architecture on this device: medians per layer and of whole steps, and a step's peak memory on a GPU.

    Costs the steps of the budget and `NUM_WARM_UP` more on random images, and the copy: measured for ResNet-20 at
    mini-batch 128 on a CPU, 11.4 times a step, which is 2.9 % of a CIFAR epoch of 390, once per architecture. The
    memory of the copy (weights and optimizer state once more) is needed besides the caller's.

    Args:
        model: in training, on `device`; only copied.
        network: the same model captured; the profile's layers are its layers.
        batch: images per step.
        precision: of the matrix products.
        memory_format: layout of the images (the weights have the layout that the caller gave them).
        optimizer: the model's; None times no update.
        regularizer: adds the penalty's gradient, between backward and update. It is copied together with the model, so
            it must reach the parameters through objects (a method, a `functools.partial`), not a closure.
        device: where to run.
        budget: how many steps.

    Raises:
        UnsupportedModelError: `network` does not describe `model`, or torch.fx cannot trace it.
        MissingMeasurementError: the copy and a step do not fit into the device's memory.
        UsageError: batch is no positive number.
    """
    device = torch.device(device)
    positive_number("batch", batch)
    with _as_in_training(precision, device):
        try:
            before_bytes = _held_bytes(device)
            run = _Run(model, network, batch, memory_format, optimizer, regularizer, device, precision)
            taken = _take(run, budget)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            problem = f"at mini-batch {batch}: a second copy does not fit into {device}"
            raise MissingMeasurementError(f"{network.name} cannot be profiled {problem}") from error
        finally:
            run = None  # type: ignore[assignment] # frees the copy before anybody looks at the memory again
            if device.type == "cuda":
                gc.collect()  # its graph and its clocks hold each other
    times = _step_times(taken, optimizer is not None, regularizer is not None)
    return Profile(
        architecture=network.id,
        batch=batch,
        precision=precision,
        memory_format=memory_format,
        device=open_meter(device).info().name,
        num_samples=len(taken.steps),
        layers=tuple(_median_layers(network, taken.layered)),
        peak_memory_bytes=None if taken.peak_bytes is None else taken.peak_bytes - before_bytes,
        **times,
    )


def _held_bytes(device: torch.device) -> int:
    """What is allocated on a GPU by others; cuBLAS's workspaces, made again by the next product, are a step's own."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(device)


@contextlib.contextmanager
def _as_in_training(precision: Precision, device: torch.device) -> Iterator[None]:
    """The switches for TF32 and the convolutions of ptsim's training; random state is put back afterwards."""
    if device.type == "cpu":
        keep_freed_memory()
    cuda_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices), tf32_allowed(precision), tuned_convolutions():
        yield


class _Taken(NamedTuple):
    """The steps of a profile; each is forward, backward, regulariser, optimizer and the whole, in seconds."""

    steps: list[tuple[float, ...]]
    layered: list[LayerSeconds]
    peak_bytes: int | None


def _take(run: _Run, budget: Budget) -> _Taken:
    """The steps of the budget, whole ones and ones with a clock around every layer."""
    on_gpu, first_s = run.device.type == "cuda", _one_step_s(run)
    if on_gpu:  # cuDNN has tried its algorithms for seconds, perhaps: the second step tells what steps take
        budget = msgspec.structs.replace(budget, max_seconds=budget.max_seconds - first_s)
        first_s = _one_step_s(run)
    budget, warm_up = budget.after(first_s)
    if warm_up and not on_gpu:
        run.steps(warm_up)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    steps = run.steps(budget.num_steps)
    while sum(step[-1] for step in steps) < budget.min_seconds:
        steps += run.steps(budget.num_steps)
    peak_bytes = torch.cuda.max_memory_allocated(run.device) if on_gpu else None
    num_layered = budget.num_layered_steps
    if len(steps) > budget.num_steps:
        num_layered = max(num_layered, len(steps) // 4)
    return _Taken(steps, [run.layered_step() for _ in range(num_layered)], peak_bytes)


def _one_step_s(run: _Run) -> float:
    began_s = time.perf_counter()
    run.steps(1)
    return time.perf_counter() - began_s


def _step_times(taken: _Taken, updates: bool, regularizes: bool) -> dict[str, float]:
    """Medians of the parts and the range of whole steps, as `Profile` calls them."""
    forward_s, backward_s, regularizer_s, optimizer_s, step_s = (
        statistics.median(values) for values in zip(*taken.steps, strict=True)
    )
    return {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "optimizer_s": optimizer_s if updates else 0.0,  # not the microseconds between two clocks
        "regularizer_s": regularizer_s if regularizes else 0.0,
        "step_s": step_s,
        "step_low_s": _rank(taken.steps, 0.05),
        "step_high_s": _rank(taken.steps, 0.95),
    }


def match_layers(graph: fx.GraphModule, network: Network) -> dict[fx.Node, str]:
    """Which graph node is which layer of `network`.

    Raises:
        UnsupportedModelError: a layer that no node bears.
    """
    wanted = {layer.name for layer in network.layers}
    nodes = {node: name for node, name in layer_names(graph).items() if name in wanted}
    unmatched = wanted.difference(nodes.values())
    if unmatched:
        raise UnsupportedModelError(
            f"the description of {network.name} has layers that the model does not have: {', '.join(sorted(unmatched))}"
        )
    return nodes


def _rank(steps: list[tuple[float, ...]], fraction: float) -> float:
    """That quantile of the steps' seconds; of fewer than twenty the fastest or the slowest."""
    ordered = sorted(step[-1] for step in steps)
    if len(ordered) < _MANY_STEPS:
        fraction = round(fraction)
    return ordered[round(fraction * (len(ordered) - 1))]


LayerSeconds = dict[str, list[float]]  # layer → [forward, backward]; backward NaN where autograd has no node


class _Run:
    """A copy of the model and all that a training step of it needs."""

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        batch: int,
        memory_format: MemoryFormat,
        optimizer: torch.optim.Optimizer | None,
        regularizer: Callable[[], object] | None,
        device: torch.device,
        precision: Precision,
    ) -> None:
        # One deepcopy of all three: its memo lets the copies of optimizer and regulariser hold the copy's parameters.
        self.model, self.optimizer, self.regularizer = copy.deepcopy(
            (model, optimizer, regularizer), computed_tensors(model)
        )
        self.network = network
        self.device, self.precision = device, precision
        # As training in fp16 does: its updates wait for the device to say whether a gradient overflowed. The scale of 1
        # stays below any overflow, which would leave the update out.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=precision is Precision.FP16)
        self.model.train()
        graph_module = training_graph(self.model, self.network.input_shape)
        self.layer_of = match_layers(graph_module, network)
        self.interpreter = _TimingInterpreter(graph_module, self)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((batch, *network.input_shape), generator=generator)
        self.images = images.to(device).contiguous(memory_format=layout(memory_format))
        self.labels = torch.randint(network.num_classes, (batch,), generator=generator).to(device)

    def instant(self) -> Any:
        """Now, on the device's own clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = cuda_event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def steps(self, count: int) -> list[tuple[float, ...]]:
        """Seconds of forward, backward, regulariser, optimizer and all together, for `count` steps in a row.

        As in training, the host does not wait for a GPU between steps.
        """
        self.wait()
        marks = [self._step() for _ in range(count)]
        self.wait()
        parts = [tuple(itertools.starmap(seconds_between, itertools.pairwise(step))) for step in marks]
        return [(*step, sum(step)) for step in parts]

    def _step(self) -> list[Any]:
        """One training step; the instants between its phases."""
        marks = [self.instant()]
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self._loss(self.model)
        marks.append(self.instant())
        self._without_autocast(self.scaler.scale(loss).backward)
        marks.append(self.instant())
        if self.regularizer is not None:
            if self.optimizer is not None:
                self.scaler.unscale_(self.optimizer)
            self._without_autocast(self.regularizer)
        marks.append(self.instant())
        if self.optimizer is not None:
            self._without_autocast(self._update)
        marks.append(self.instant())
        return marks

    def _loss(self, forward: Callable[[Tensor], Any]) -> Tensor:
        """Autocast begins anew, as in training: until it ends it keeps the weights that it has cast."""
        with _autocast(self.precision, self.device):
            return F.cross_entropy(_logits(forward(self.images)), self.labels)

    def _update(self) -> None:
        assert self.optimizer is not None, "the caller has looked"
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def layered_step(self) -> LayerSeconds:
        """Seconds per layer of one pass with a clock around every operator."""
        self.wait()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.interpreter.reset()
        loss = self._loss(self.interpreter.run)
        self._without_autocast(loss.backward)
        self.wait()
        return self.interpreter.seconds()

    def _without_autocast(self, action: Callable[[], object]) -> None:
        with torch.autocast(self.device.type, enabled=False):
            action()


class _TimingInterpreter(fx.Interpreter):
    """Runs the graph and notes when each layer's forward and each of its autograd nodes begin and end."""

    def __init__(self, module: fx.GraphModule, run: _Run) -> None:
        super().__init__(module)
        self._run = run
        self.reset()

    def reset(self) -> None:
        self._forward: list[tuple[str, Any, Any]] = []
        self._backward: list[tuple[str, list[Any]]] = []
        self._seen: set[Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        name = self._run.layer_of.get(n)
        if name is None:
            return super().run_node(n)
        begin = self._run.instant()
        result = super().run_node(n)
        self._forward.append((name, begin, self._run.instant()))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                self._watch(name, tensor.grad_fn)
        return result

    def seconds(self) -> LayerSeconds:
        seconds: LayerSeconds = {layer.name: [0.0, float("nan")] for layer in self._run.network.layers}
        for name, begin, end in self._forward:
            seconds[name][0] += seconds_between(begin, end)
        for name, marks in self._backward:
            if len(marks) == 2:
                known = seconds[name][1]
                seconds[name][1] = seconds_between(*marks) + (0.0 if known != known else known)
        return seconds

    def _watch(self, name: str, root: Node) -> None:
        """Put a clock around every autograd node that no earlier layer has reached."""
        stack: list[Node | None] = [root]
        while stack:
            node = stack.pop()
            if node is None or node in self._seen:
                continue
            self._seen.add(node)
            marks: list[Any] = []
            self._backward.append((name, marks))
            node.register_prehook(self._mark(marks))
            node.register_hook(self._mark(marks))
            stack.extend(next_node for next_node, _ in node.next_functions)

    def _mark(self, marks: list[Any]) -> Callable[..., None]:
        instant = self._run.instant

        def mark(*_: object) -> None:
            marks.append(instant())

        return mark


def _logits(output: Any) -> Tensor:
    """The main head's output; networks with auxiliary heads return several in training."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds from one instant of `_Run.instant` to another; the device must have passed both."""
    return float(end - begin) if isinstance(begin, float) else float(begin.elapsed_time(end)) / 1e3


def _median_layers(network: Network, runs: list[LayerSeconds]) -> Iterator[LayerProfile]:
    for layer in network.layers:
        forward_s = statistics.median(run[layer.name][0] for run in runs)
        backward_s = statistics.median(run[layer.name][1] for run in runs)
        yield LayerProfile(
            layer=layer.name, forward_s=forward_s, backward_s=None if backward_s != backward_s else backward_s
        )
