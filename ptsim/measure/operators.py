"""How long does one operator take alone, each pass by itself?

On a CPU a loop over several inputs, together larger than the caches, so that an operator finds its input where a
training step would leave it. On a GPU a CUDA graph of many calls, which shows the kernels without the host's launch
gaps; what the host needs is timed beside it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ptsim.hardware.profile import Operator, OperatorTime
from ptsim.measure.host_memory import keep_freed_memory
from ptsim.measure.profile import HALF_TYPES, layout, number_format, tuned_convolutions
from ptsim.measure.rebuild import build_operator
from ptsim.measure.timers import cuda_event

_ROTATED_BYTES = 96 * 2**20  # more than the last-level cache that one process gets of common CPUs
_MAX_COPIES = 16
_CPU_REPETITIONS = 7
_GRAPH_CALLS, _GRAPH_REPLAYS = 10, 5
_REPETITIONS = 9  # of what the machine itself is measured by
_WAKING_S = 0.3  # an idle H200 was seen at 345 of its 1980 MHz


def time_operator(operator: Operator, device: torch.device) -> OperatorTime:
    """Median times of the operator's passes on random data.

    Raises:
        UnsupportedModelError: the operator cannot be run from its description.
        torch.OutOfMemoryError: its tensors do not fit on the device.
    """
    if device.type == "cpu":
        keep_freed_memory()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        bench = _Bench(operator, device)
        with number_format(operator.setting.precision, device), tuned_convolutions():
            return bench.on_cuda() if device.type == "cuda" else bench.on_cpu()


class _Bench:
    """One operator with its tensors and the passes that it has."""

    def __init__(self, operator: Operator, device: torch.device) -> None:
        self.operator = operator
        self.device = device
        function = build_operator(operator)
        memory_format = layout(operator.setting.memory_format)
        self.parameters: list[Tensor] = []
        if isinstance(function, nn.Module):
            function.to(device).train()
            if operator.inputs and len(operator.inputs[0]) == 3:
                function.to(memory_format=memory_format)
            self.parameters = list(function.parameters())
        self.function: Callable[..., Tensor] = function
        self.dtype = HALF_TYPES.get(operator.setting.precision, torch.float32)
        self.memory_format = memory_format

    def tensor(self, shape: Sequence[int]) -> Tensor:
        tensor = torch.randn((self.operator.batch, *shape), device=self.device).to(self.dtype)
        return tensor.contiguous(memory_format=self.memory_format) if len(shape) == 3 else tensor

    def inputs(self) -> list[Tensor]:
        wanted = self.operator.input_needs_gradient
        return [self.tensor(shape).requires_grad_(wanted) for shape in self.operator.inputs]

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """An in-place operator may not overwrite a leaf, so it gets fresh copies."""
        torch.clear_autocast_cache()  # a training step casts its weights every time
        return self.function(*([x.clone() for x in inputs] if self.operator.inplace else inputs))

    def targets(self, inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """What each pass of backward computes the gradient of."""
        leaves = list(inputs) if self.operator.input_needs_gradient else []
        passes = {"backward": [*leaves, *self.parameters]}
        if self.parameters:
            passes["weight"] = list(self.parameters)
            if leaves:
                passes["input"] = leaves
        return {name: tensors for name, tensors in passes.items() if tensors}

    def on_cpu(self) -> OperatorTime:
        bytes_each = 4 * self.operator.batch * max(sum(_elements(self.operator)), 1)
        copies = max(1, min(_MAX_COPIES, _ROTATED_BYTES // bytes_each + 1))
        inputs = [self.inputs() for _ in range(copies)]
        gradient = torch.randn_like(self.forward(inputs[0]))
        seconds: dict[str, list[float]] = {}
        for repetition in range(_CPU_REPETITIONS + 1):
            own = inputs[repetition % copies]
            given = [x.clone() for x in own] if self.operator.inplace else own
            torch.clear_autocast_cache()  # a training step casts its weights every time
            begin = time.perf_counter()
            output = self.function(*given)
            end = time.perf_counter()
            measured = {"forward": end - begin}
            if output.grad_fn is not None:
                for name, tensors in self.targets(own).items():
                    begin = time.perf_counter()
                    torch.autograd.grad(output, tensors, gradient, retain_graph=True)
                    measured[name] = time.perf_counter() - begin
            if repetition > 0:  # the first one allocates
                for name, value in measured.items():
                    seconds.setdefault(name, []).append(value)
        return self.result({name: statistics.median(values) for name, values in seconds.items()}, host_s=None)

    def on_cuda(self) -> OperatorTime:
        inputs = self.inputs()
        clone_s = _kernel_seconds(lambda: [x.clone() for x in inputs], self.device) if self.operator.inplace else 0.0
        output = self.forward(inputs)
        gradient = torch.randn_like(output)
        forward_s = _kernel_seconds(lambda: self.forward(inputs), self.device)
        seconds = {"forward": max(forward_s - clone_s, 0.0)}
        whole: Callable[[], object] = lambda: self.forward(inputs)  # noqa: E731 - replaced below
        if output.grad_fn is not None:
            for name, tensors in self.targets(inputs).items():

                def both(tensors: list[Tensor] = tensors) -> object:
                    return torch.autograd.grad(self.forward(inputs), tensors, gradient)

                seconds[name] = max(_kernel_seconds(both, self.device) - forward_s, 0.0)
                whole = both if name == "backward" else whole
        return self.result(seconds, host_s=host_seconds(whole, self.device))

    def result(self, seconds: dict[str, float], host_s: float | None) -> OperatorTime:
        return OperatorTime(
            operator=self.operator,
            forward_s=seconds["forward"],
            backward_s=seconds.get("backward"),
            weight_gradient_s=seconds.get("weight"),
            input_gradient_s=seconds.get("input"),
            host_s=host_s,
            context="alone",
        )


def _elements(operator: Operator) -> list[int]:
    return [int(torch.Size(shape).numel()) for shape in (*operator.inputs, operator.output)]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all operators: cuBLAS keeps a workspace for every stream that it has met."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's gap
    return stream


def _kernel_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the call's kernels, without launch gaps where it can be captured in a CUDA graph."""
    stream, usual = _side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        for _ in range(3):  # lets cuDNN choose, and allocates
            call()
    usual.wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(_GRAPH_CALLS):
                call()
    except RuntimeError:  # an operator that waits for the device cannot be captured: time it with its gaps
        _leave_failed_capture(usual, device)
        return _median_between_events(lambda: [call() for _ in range(_GRAPH_CALLS)], device) / _GRAPH_CALLS
    return _median_between_events(graph.replay, device) / _GRAPH_CALLS


def _leave_failed_capture(usual: torch.cuda.Stream, device: torch.device) -> None:
    """Back to the usual stream, and to random numbers.

    A capture that fails leaves its own stream, and the device's generator as captured: from then on every random tensor
    would raise "Offset increment outside graph capture encountered unexpectedly", and no operator could be timed.

    Source: aten/src/ATen/cuda/CUDAGraph.cpp, `capture_end`, which gives up before `capture_epilogue`.
    """
    torch.cuda.set_stream(usual)
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(torch.Generator(device).manual_seed(generator.initial_seed()))


def _median_between_events(run: Callable[[], object], device: torch.device, repeats: int = _GRAPH_REPLAYS) -> float:
    run()
    spans = []
    for _ in range(repeats):
        begin, end = cuda_event(), cuda_event()
        begin.record(torch.cuda.current_stream(device))
        run()
        end.record(torch.cuda.current_stream(device))
        spans.append((begin, end))
    torch.cuda.synchronize(device)
    return statistics.median(float(begin.elapsed_time(end)) / 1e3 for begin, end in spans)


def host_seconds(call: Callable[[], object], device: torch.device, *, calls: int = 20) -> float:
    """Seconds that the host needs to launch the call, without waiting for the device's answer."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = (time.perf_counter() - begin) / calls
    torch.cuda.synchronize(device)
    return seconds


def copy_bandwidth_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written per second by copies of 256 MiB (64 MiB on a CPU), the median of nine."""
    elements = (64 if device.type == "cuda" else 16) * 2**20
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), device)
    return 2 * 4 * elements / seconds


def launch_overhead_s(device: torch.device) -> float:
    """Shortest time from one small operator to the next: 1000 additions to one element, in a row."""
    tensor = torch.zeros(1, device=device)

    def run() -> None:
        for _ in range(1000):
            tensor.add_(1.0)

    return _median_seconds(run, device) / 1000


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of nine; on a GPU by its own clock: the host's would count the way there and back."""
    if device.type == "cuda":
        _wake(run, device)
        return _median_between_events(run, device, repeats=_REPETITIONS)
    run()
    seconds = []
    for _ in range(_REPETITIONS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _wake(run: Callable[[], object], device: torch.device) -> None:
    """Keep a GPU busy until its clocks have risen: what the machine is measured by comes first, on an idle board."""
    awake_s = time.perf_counter() + _WAKING_S
    while True:
        run()
        torch.cuda.synchronize(device)
        if time.perf_counter() >= awake_s:
            return
