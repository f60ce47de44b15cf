"""Recordings in Kineto's form that tests write: one of a GPU with round times, and others event by event."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ptsim.measure.kineto import KinetoImport, import_kineto
from ptsim.measure.kineto_events import read_recording
from ptsim.measure.kineto_steps import Step, read_steps

NODE = "autograd::engine::evaluate_function: "
UPDATE = "Optimizer.step#SGD.step"
# A mini-batch of 4 and its weights; the strided one is channels_last.
CONV = {
    "Input Dims": [[4, 8, 16, 16], [8, 8, 3, 3], [], [], [], [], []],
    "Input type": ["float", "float", "", "ScalarList", "ScalarList", "ScalarList", "Scalar"],
    "Concrete Inputs": ["", "", "", "[1, 1]", "[1, 1]", "[1, 1]", "1"],
}
STRIDED_CONV = {
    "Input Dims": [[4, 8, 16, 16], [32, 8, 3, 3], [], [], [], [], []],
    "Input type": ["float", "float", "", "ScalarList", "ScalarList", "ScalarList", "Scalar"],
    "Input Strides": [[2048, 1, 128, 8], [72, 1, 24, 8], [], [], [], [], []],
    "Concrete Inputs": ["", "", "", "[2, 2]", "[1, 1]", "[1, 1]", "1"],
}
Span = tuple[float, float]


def gpu_trace(*, rank: int = 0, comm_ms: float = 4.0, num_steps: int = 2, **head: Any) -> dict[str, Any]:
    """Steps of 12 ms: a forward kernel of 2 ms, a backward one of 3 ms, an all-reduce that begins 1 ms before its end.

    The host takes a tenth of that and runs ahead.
    """
    events: list[dict[str, Any]] = []

    def add(cat: str, name: str, begin_ms: float, took_ms: float, tid: str | int = 1, **args: Any) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "pid": 0 if cat == "kernel" else 99, "tid": tid,
                       "ts": begin_ms * 1e3, "dur": took_ms * 1e3, "args": args})  # fmt: skip

    for step in range(num_steps):
        host, gpu, ident = 2.0 * step, 5.0 + 12.0 * step, 100 * step
        add("user_annotation", f"ProfilerStep#{step}", host, 2.0)
        add(
            "cpu_op",
            "aten::conv2d",
            host + 0.1,
            0.2,
            **STRIDED_CONV,
            **{"External id": ident + 1, "Sequence number": ident},
        )
        add("cpu_op", "aten::convolution", host + 0.12, 0.16, **{
            "External id": ident + 2, "Sequence number": ident, "Input type": ["c10::Half", "c10::Half"]})  # fmt: skip
        node = "autograd::engine::evaluate_function: ConvolutionBackward0"
        add("cpu_op", node, host + 0.5, 0.3, tid=2, **{"External id": ident + 3, "Sequence number": ident})
        add("cpu_op", "aten::convolution_backward", host + 0.55, 0.2, tid=2, **{
            "External id": ident + 4, "Concrete Inputs": ["", "", "[False, True, False]"]})  # fmt: skip
        gradient = {"External id": ident + 5, "Input Dims": [[32, 8, 3, 3]]}
        add("cpu_op", "torch::autograd::AccumulateGrad", host + 0.9, 0.05, tid=2, **gradient)
        add("user_annotation", "Optimizer.step#SGD.step", host + 1.2, 0.2)
        add("cpu_op", "aten::add_", host + 1.25, 0.1, **{"External id": ident + 6})
        add("kernel", "sm80_xmma_fprop", gpu, 2.0, tid=7, **{"External id": ident + 2, "device": 0})
        add("kernel", "sm80_xmma_wgrad", gpu + 2.5, 3.0, tid=7, **{"External id": ident + 4, "device": 0})
        add("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", gpu + 4.5, comm_ms, tid=20, **{
            "External id": ident + 5, "device": 0})  # fmt: skip
        add("kernel", "sgd_update", gpu + 9.0, 0.5, tid=7, **{"External id": ident + 6, "device": 0})
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA A100-SXM4-80GB", "totalGlobalMem": 85_000_000_000}],
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": 8},
        "traceEvents": events,
        **head,
    }


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


class Events:
    """A recording under construction; all times are milliseconds, given as begin and duration."""

    def __init__(self, *, on_gpu: bool = True) -> None:
        self.on_gpu = on_gpu
        self.events: list[dict[str, Any]] = []
        self.number = 0  # of the next forward operator

    def add(self, category: str, name: str, at: Span, kernel: Span | None = None, *, tid: int = 1, **args: Any) -> None:
        """An event of the host, and the kernel that it launches."""
        ident = len(self.events) + 1
        event = {"ph": "X", "cat": category, "name": name, "pid": 9, "tid": tid, "ts": at[0] * 1e3, "dur": at[1] * 1e3}
        self.events.append(event | {"args": {"External id": ident, **args}})
        if kernel is not None and self.on_gpu:
            self.device(f"kernel of {name}", kernel, **{"External id": ident})

    def device(self, name: str, at: Span, *, category: str = "kernel", **args: Any) -> None:
        event = {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": at[0] * 1e3, "dur": at[1] * 1e3}
        self.events.append(event | {"args": {"device": 0, **args}})

    def layer(self, forward: Span, backward: Span, kernels: tuple[Span, Span], name: str = "aten::conv2d") -> None:
        """An operator and its backward node on autograd's thread."""
        number = {"Sequence number": self.number}
        self.add("cpu_op", name, forward, kernels[0], **number, **(CONV if name == "aten::conv2d" else {}))
        self.add("cpu_op", f"{NODE}Backward of {name}", backward, kernels[1], tid=2, **number)
        self.number += 1

    def update(self, at: Span, kernel: Span, name: str = UPDATE) -> None:
        self.add("user_annotation", name, at)
        self.add("cpu_op", "aten::add_", (at[0] + at[1] / 2, at[1] / 4), kernel)

    def step(self, host: float, gpu: float, *, forward: float = 2.0, update: bool = True) -> None:
        """2 ms of the host: a forward kernel, 3 ms backward right behind it, 0.5 ms of update 1 ms later."""
        self.add("user_annotation", f"ProfilerStep#{host:g}", (host, 2.0))
        self.layer((host + 0.1, 0.2), (host + 0.5, 0.3), ((gpu, forward), (gpu + forward, 3.0)))
        if update:
            self.update((host + 1.2, 0.2), (gpu + forward + 4.0, 0.5))

    def mark(self, took: dict[float, float]) -> None:
        """Of the marks that are there only those at these times, of so many milliseconds."""
        marks = [event for event in self.events if event["name"].startswith("ProfilerStep#")]
        kept = {1e3 * begin: 1e3 * duration for begin, duration in took.items()}
        self.events = [event for event in self.events if event not in marks or event["ts"] in kept]
        for event in marks:
            event["dur"] = kept.get(event["ts"], 0.0)

    def _write(self, folder: Path) -> Path:
        path = folder / "recorded.json"
        gpu = [{"id": 0, "name": "NVIDIA A100-SXM4-80GB", "totalGlobalMem": 85_000_000_000}]
        path.write_text(json.dumps({"deviceProperties": gpu, "traceEvents": self.events}), encoding="utf-8")
        return path

    def steps(self, folder: Path) -> list[Step]:
        return read_steps(read_recording(self._write(folder)))

    def imported(self, folder: Path) -> KinetoImport:
        return import_kineto([self._write(folder)], device=None if self.on_gpu else "a processor", memory_bytes=2**34)


def ms(*seconds: float | None) -> list[float]:
    """The times that are known, in milliseconds."""
    return [1e3 * value for value in seconds if value is not None]
