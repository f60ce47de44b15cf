"""What does a device profile need, in which order, and when is it enough?

A calibration is a queue of measurements, most useful first: the machine's constants, whole training steps (of a
trace's networks, or of a few of the zoo), then single convolutions over channel counts, odd ones and stairs included,
with the BatchNorm, activation and sum that follow them. It stops at its time limit wherever it is; what was measured
is in the file all along, and a resumed calibration goes on with the rest.

Networks are measured in rounds: each of them shortly, then each of them again. A machine's speed drifts (a virtual
one's by 10 % within a minute, a GPU's with its temperature), and of two networks that are measured one after the other
the one that had the slow minute would look too slow.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import nn

from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.costs.measured import of_profile
from ptsim.errors import (
    FileFormatError,
    MissingMeasurementError,
    UnsupportedModelError,
    UsageError,
    lacks_gpu_memory,
)
from ptsim.hardware.profile import DeviceProfile, Operator, OperatorSetting, OperatorTime, operator_of
from ptsim.hardware.profile_file import read_device_profile, write_device_profile
from ptsim.hardware.profile_merge import mean_time, merge_operators, with_round
from ptsim.measure.load import LoadWatch
from ptsim.measure.nvml import open_meter
from ptsim.measure.operators import copy_bandwidth_bytes_per_s, launch_overhead_s, time_operator
from ptsim.measure.profile import Budget, layout, profile_network
from ptsim.measure.rebuild import rebuild
from ptsim.network import LayerKind, MemoryFormat, Network, Precision
from ptsim.optimizers import OPTIMIZERS
from ptsim.trace.pace import changes, input_s_per_image, reconfiguration_s
from ptsim.trace.trace import Trace
from ptsim.units import time_stamp

MakeRegularizer = Callable[[nn.Module, tuple[int, int, int]], Callable[[], object]]
Progress = Callable[[str, float], None]  # what is being measured, fraction of the time that has passed

_SAVE_EVERY_S = 5.0
_NUM_STEPS = 7
_MIN_STEPS_S = 2.0  # of whole steps, in all rounds: small networks take milliseconds, and a machine is rarely still
_ZOO_STEPS = {
    "cpu": (("resnet20", 32), ("vgg11", 32), ("resnet50", 16)),
    "cuda": (
        ("resnet20", 128),
        ("resnet50", 128),
        ("vgg11", 128),
        ("torchvision:resnet50", 64),
        ("torchvision:mobilenet_v2", 64),
    ),
}
_GRID_BATCHES = {"cpu": (16, 32, 64, 128), "cuda": (32, 64, 128, 256)}
# (image side, kernel, stride, largest channel count) as CIFAR and ImageNet networks have them.
_GRID_FORMS = (
    (32, 3, 1, 128),
    (16, 3, 1, 256),
    (8, 3, 1, 512),
    (32, 1, 1, 256),
    (16, 1, 1, 512),
    (8, 1, 1, 1024),
    (32, 3, 2, 128),
    (16, 3, 2, 256),
    (32, 1, 2, 128),
    (4, 3, 1, 512),
    (56, 3, 1, 256),
    (28, 3, 1, 512),
    (14, 3, 1, 512),
    (56, 1, 1, 512),
    (14, 1, 1, 2048),
    (7, 1, 1, 2048),
)
_ACTIVATIONS = (
    ("relu", True), ("relu", False), ("relu6", True), ("silu", True), ("hardswish", True), ("gelu", False),
)  # fmt: skip
_POOLS = (("max_pool2d", 2), ("max_pool2d", 3), ("avg_pool2d", 2))
_CHANNELS = (
    1, 2, 3, 5, 8, 11, 12, 16, 17, 20, 24, 29, 31, 32, 33, 40, 47, 48, 56, 61, 64, 65, 72, 80, 96, 97, 112, 127, 128,
    129, 144, 160, 176, 192, 200, 224, 256, 257, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048,
)  # fmt: skip


def calibrate_gpu(
    out: Path,
    *,
    device: torch.device,
    minutes: float = 10.0,
    traces: Sequence[Trace] = (),
    settings: Sequence[OperatorSetting] = (),
    make_regularizer: MakeRegularizer | None = None,
    resume: bool = False,
    grid: bool = True,
    rounds: int = 3,
    progress: Progress = lambda _what, _fraction: None,
) -> DeviceProfile:
    """Measure `device` for at most about `minutes` and write what is known to `out`, again and again.

    Args:
        out: the profile's TOML file.
        device: CPU or CUDA device.
        minutes: the limit; a measurement that has begun is finished.
        traces: measure the whole steps and operators of exactly these runs' architectures first, at their mini-batches.
        settings: precisions and memory formats of what is not a trace's; the device's usual ones if empty.
        make_regularizer: gives, for a model and its input shape, what adds the group lasso's gradient; an
            `UnsupportedModelError` leaves the penalty out.
        resume: go on with the file that is there.
        grid: also measure single operators over channel counts, as time allows.
        rounds: how often each network's whole steps are measured; the profile has the means over the rounds.
        progress: called with what is about to be measured.

    Raises:
        UsageError: a file is there and `resume` is False, or minutes or rounds is not positive.
        UnknownNameError: a trace's optimizer, which cannot be made here.
        FileFormatError: the file to resume is broken.
        MissingMeasurementError: the file to resume is of another device, thread count or software version.
    """
    if not 0 < minutes < math.inf:
        raise UsageError(f"minutes is {minutes}, expected a finite number above 0")
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}, expected at least 1")
    calibration = _Calibration(out, device, _begin(out, device, traces, resume), make_regularizer)
    begin_s = time.perf_counter()
    settings = settings or (_usual_settings(device) if not traces else ())
    networks = [*itertools.chain.from_iterable(calibration.of_trace(trace) for trace in traces)]
    networks += calibration.of_zoo(settings)
    queue: Iterator[_Measurement] = itertools.chain(
        calibration.machine(),
        calibration.steps(networks, rounds),
        calibration.of_grid(settings or tuple(sorted({setting_of(trace) for trace in traces}))) if grid else (),
    )
    calibration.work_off(queue, begin_s, 60.0 * minutes, progress)
    return calibration.profile


def setting_of(trace: Trace) -> OperatorSetting:
    """The precision and memory format that the run trained in."""
    return OperatorSetting(precision=trace.run.precision, memory_format=trace.run.memory_format)


class _Trained(NamedTuple):
    """A network whose training steps are to be measured."""

    network: Network
    setting: OperatorSetting
    batch: int
    optimizer: str

    @property
    def what(self) -> tuple[str, OperatorSetting, int, str | None]:
        """What makes it another measurement than another one."""
        return self.network.id, self.setting, self.batch, self.optimizer


_GRID = "alone: "
_Measurement = tuple[str, Callable[[float], None]]  # what it is, and what does it, given the seconds that are left


def _usual_settings(device: torch.device) -> tuple[OperatorSetting, ...]:
    if device.type == "cpu":
        return (OperatorSetting(precision=Precision.FP32, memory_format="contiguous"),)
    precisions = [Precision.FP32, Precision.FP16]
    if torch.cuda.get_device_capability(device) >= (8, 0):
        precisions[1:1] = [Precision.TF32, Precision.BF16]
    formats: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
    return tuple(OperatorSetting(precision=p, memory_format=f) for p, f in itertools.product(precisions, formats))


def _begin(out: Path, device: torch.device, traces: Sequence[Trace], resume: bool) -> DeviceProfile:
    info = open_meter(device).info()
    sources = tuple(str(trace.path) for trace in traces)
    runs = tuple(trace.fingerprint for trace in traces)
    software = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        software |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call] # torch's gap
        software |= {"driver": info.driver} if info.driver else {}
    if out.exists():
        if not resume:
            raise UsageError(f"{out} exists", hint="--resume goes on with it; or choose another file")
        known = read_device_profile(out)
        known.check_device(info.name)
        if known.num_threads != info.num_threads:
            raise MissingMeasurementError(
                f"{out} was measured with {known.num_threads} threads, this process uses {info.num_threads}"
            )
        if known.software != software:
            raise MissingMeasurementError(
                f"{out} was measured with {_versions(known.software)}, here is {_versions(software)}: "
                "their times do not belong into one file",
                hint="measure into a new file",
            )
        return msgspec.structs.replace(
            known,
            sources=tuple(dict.fromkeys((*known.sources, *sources))),
            runs=tuple(dict.fromkeys((*known.runs, *runs))),
        )
    if not out.resolve().parent.is_dir():
        raise FileFormatError(out, "its folder does not exist")
    kind, memory_bytes = info.must_exist()
    return DeviceProfile(
        created=time_stamp(),
        complete=False,
        device=info.name,
        kind=kind,
        memory_bytes=memory_bytes,
        num_threads=info.num_threads,
        software=software,
        sources=sources,
        runs=runs,
    )


def _versions(software: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in software.items()) or "unknown software"


class _Calibration:
    """The profile as it grows, and the measurements that make it grow."""

    def __init__(
        self, out: Path, device: torch.device, profile: DeviceProfile, make_regularizer: MakeRegularizer | None
    ) -> None:
        self.profile = profile
        self._out = out
        self._device = device
        self._make_regularizer = make_regularizer
        self._repeated: dict[Operator, list[OperatorTime]] = defaultdict(list)  # in whole steps, of this session

    def save(self, *, complete: bool) -> None:
        self.update(complete=complete)
        write_device_profile(self._out, self.profile)

    def update(self, **changes: object) -> None:
        self.profile = msgspec.structs.replace(self.profile, **changes)

    def machine(self) -> Iterator[_Measurement]:
        if self.profile.copy_bandwidth_bytes_per_s is None:

            def measure(_left_s: float) -> None:
                self.update(
                    copy_bandwidth_bytes_per_s=copy_bandwidth_bytes_per_s(self._device),
                    launch_overhead_s=launch_overhead_s(self._device),
                )

            yield "copies and launches", measure

    def of_trace(self, trace: Trace) -> Iterator[_Trained]:
        """Every architecture at every mini-batch that was one pass: the first, the last, then the middles between."""
        if trace.run.device.name == self.profile.device:
            seconds = input_s_per_image(trace)
            if seconds is not None:
                self.update(input_s_per_image={**self.profile.input_s_per_image, trace.run.dataset.name: seconds})
            if changes(trace):
                self.update(reconfiguration_s=reconfiguration_s(trace))
        optimizer = trace.optimizer
        OPTIMIZERS.find(optimizer)  # before minutes are measured
        pairs = list(dict.fromkeys((epoch.architecture, trace.setting_of(epoch).pass_batch) for epoch in trace.epochs))
        for index in _outside_in(len(pairs)):
            architecture, batch = pairs[index]
            yield _Trained(trace.networks[architecture], setting_of(trace), batch, optimizer)

    def of_zoo(self, settings: Sequence[OperatorSetting]) -> Iterator[_Trained]:
        """A few networks of the zoo in every setting."""
        for name, batch in _ZOO_STEPS[self.profile.kind] if settings else ():
            entry = zoo.find(name)
            network = capture_network(
                zoo.create(name), name=name, input_shape=entry.input_shape, num_classes=entry.num_classes
            )
            for setting in settings:
                yield _Trained(network, setting, batch, "sgd")

    def steps(self, networks: Sequence[_Trained], rounds: int) -> Iterator[_Measurement]:
        """Whole steps of every network, in rounds; a resumed calibration makes up for the rounds that are missing."""
        asked: dict[tuple[str, OperatorSetting, int, str | None], _Trained] = {}
        for one in networks:
            asked.setdefault(one.what, one)
        done = {(s.architecture, s.setting, s.batch, s.optimizer): s.num_rounds for s in self.profile.steps}
        for number in range(1, rounds + 1):
            for one in asked.values():
                if done.get(one.what, 0) < number:
                    what = f"steps of {one.network.name} ({one.network.id}), mini-batch {one.batch}, {one.setting}"
                    yield f"{what}, round {number}", functools.partial(self._measure_step, one, _MIN_STEPS_S / rounds)

    def of_grid(self, settings: Sequence[OperatorSetting]) -> Iterator[_Measurement]:
        """Without an end: forms, batches and settings in turn, channel counts drawn evenly in their logarithm."""
        known = {(time.operator, time.context) for time in self.profile.operators}
        for operator in itertools.chain.from_iterable(
            _block(*draw) for draw in _grid(settings, _GRID_BATCHES[self.profile.kind])
        ):
            if (operator, "alone") in known:
                continue
            known.add((operator, "alone"))
            text = f"{operator.op} {operator.inputs[0]} → {operator.output}, mini-batch {operator.batch}"
            yield f"{_GRID}{text}, {operator.setting}", lambda _, operator=operator: self._alone(operator)  # type: ignore[misc] # mypy types no default of a lambda

    def work_off(self, queue: Iterator[_Measurement], begin_s: float, limit_s: float, progress: Progress) -> None:
        """Measure what is in the queue until the limit, counted from `begin_s`, has passed; saves now and then."""
        saved_s, finished = begin_s, True
        meter, watch = open_meter(self._device), LoadWatch(self._device, self.profile.load)
        meter.start()
        try:
            for what, measure in queue:
                passed_s = time.perf_counter() - begin_s
                if passed_s >= limit_s:
                    finished = what.startswith(_GRID)  # the grid has no end; all that was asked for is there
                    break
                progress(what, passed_s / limit_s)
                with watch.measuring():
                    measure(limit_s - passed_s)
                if time.perf_counter() - saved_s > _SAVE_EVERY_S:
                    self.update(load=watch.load())
                    self.save(complete=False)
                    saved_s = time.perf_counter()
        except KeyboardInterrupt:
            self.update(load=watch.load())
            self.save(complete=False)
            raise
        use = meter.stop()
        if use is not None:
            self.update(power_w=use.power_w, sm_clock_hz=use.sm_clock_hz)
        self.update(load=watch.load())
        self.save(complete=finished)

    def _measure_step(self, one: _Trained, min_seconds: float, left_s: float) -> None:
        network, setting, batch = one.network, one.setting, one.batch
        try:
            module, renamed = rebuild(network)
        except UnsupportedModelError:  # an operator that the description does not fully tell: the others alone
            for operator in dict.fromkeys(operator_of(l, batch=batch, setting=setting) for l in network.layers):  # noqa: E741 - l is a layer
                self._alone(operator)
            return
        regularizer = None
        try:
            module.to(self._device).to(memory_format=layout(setting.memory_format))
            if self._make_regularizer is not None:
                with contextlib.suppress(UnsupportedModelError):  # what cannot be pruned has no penalty to time
                    regularizer = self._make_regularizer(module, network.input_shape)
            profile = profile_network(
                module,
                renamed,
                batch=batch,
                precision=setting.precision,
                memory_format=setting.memory_format,
                optimizer=make_optimizer(one.optimizer, module.parameters()),
                regularizer=regularizer,
                device=self._device,
                budget=Budget(num_steps=_NUM_STEPS, min_seconds=min_seconds, max_seconds=left_s),
            )
        except MissingMeasurementError:  # larger than this device's memory
            return
        except RuntimeError as error:
            if not lacks_gpu_memory(error):
                raise
            return
        layers = [
            msgspec.structs.replace(m, layer=own.name) for own, m in zip(network.layers, profile.layers, strict=True)
        ]
        step, times = of_profile(
            network, msgspec.structs.replace(profile, layers=tuple(layers)), optimizer=one.optimizer
        )
        for measured in times:
            self._repeated[measured.operator].append(measured)
        means = [mean_time(self._repeated[measured.operator]) for measured in times]
        self.update(
            operators=merge_operators(self.profile.operators, means), steps=with_round(self.profile.steps, step)
        )

    def _alone(self, operator: Operator) -> None:
        try:
            measured = time_operator(operator, self._device)
        except (UnsupportedModelError, torch.OutOfMemoryError):
            return  # the profile has no time for it, and whoever asks for one is told so
        except RuntimeError:
            if self._device.type != "cuda":
                raise
            torch.cuda.synchronize(self._device)  # raises where the error has left nothing that works
            return  # cuDNN has no kernel for it, or no memory for one
        self.update(operators=merge_operators(self.profile.operators, [measured]))


class _Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings under which an optimizer's update is timed; the weights hardly move."""

    lr: float = 1e-4
    weight_decay: float = 5e-4
    momentum: float | None = None
    nesterov: bool = False


def make_optimizer(name: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer with the state that it has in training by default.

    Raises:
        UnknownNameError: no such optimizer.
    """
    kind = OPTIMIZERS.find(name)
    return kind.make(parameters, _Settings(momentum=kind.momentum))


def _outside_in(count: int) -> list[int]:
    """First, last, then the middles: whatever prefix is measured, the rest lies between what is known."""
    order: list[int] = []
    spans = [(0, count - 1)]
    while spans:
        low, high = spans.pop(0)
        order += [index for index in (low, high) if 0 <= index < count]
        middle = (low + high) // 2
        if high - low > 1:
            spans += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))


def _grid(
    settings: Sequence[OperatorSetting], batches: Sequence[int]
) -> Iterator[tuple[int, OperatorSetting, int, tuple[int, int, int, int], int, int]]:
    """Draws of number, setting, batch, form, input and output channels; the same sequence on every machine."""
    draw = random.Random(0)  # the same on resuming
    for stair in range(57, 74):  # one whole stair of 16 and its neighbours, at every count
        for setting in settings:
            yield 0, setting, batches[-1], (14, 3, 1, 512), 64, stair
    for number in itertools.count():
        form = _GRID_FORMS[number % len(_GRID_FORMS)]
        allowed = [channels for channels in _CHANNELS if channels <= form[3]]
        inputs, outputs = draw.choice(allowed), draw.choice(allowed)
        batch = draw.choice(list(batches))
        for setting in settings:
            yield number // len(_GRID_FORMS), setting, batch, form, inputs, outputs


def _block(
    number: int,
    setting: OperatorSetting,
    batch: int,
    form: tuple[int, int, int, int],
    in_channels: int,
    out_channels: int,
) -> Iterator[Operator]:
    """A convolution and what follows it; `number` decides which activation, pool and rarer convolution that is."""
    side, kernel, stride, _ = form
    out = (out_channels, -(-side // stride), -(-side // stride))
    convolution = functools.partial(
        Operator,
        kind=LayerKind.CONV,
        op="conv2d",
        setting=setting,
        batch=batch,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
    )
    other = functools.partial(Operator, setting=setting, batch=batch)
    yield convolution(inputs=((in_channels, side, side),), output=out)
    if kernel > 1 and number % 2 == 0:
        yield convolution(inputs=((out_channels, side, side),), output=out, groups=out_channels)  # depthwise
    elif kernel > 1 and out_channels % 16 == 0:
        yield convolution(inputs=((out_channels, side, side),), output=out, groups=16)
    yield other(kind=LayerKind.BATCH_NORM, op="batch_norm", inputs=(out,), output=out, bias=True)
    activation, inplace = _ACTIVATIONS[number % len(_ACTIVATIONS)]
    yield other(kind=LayerKind.ACTIVATION, op=activation, inplace=inplace, inputs=(out,), output=out)
    yield other(kind=LayerKind.ELEMENTWISE, op="add", inplace=bool(number % 2), inputs=(out, out), output=out)
    yield other(kind=LayerKind.LINEAR, op="linear", inputs=((in_channels,),), output=(out_channels,), bias=True)
    half = (out_channels, out[1] // 2, out[2] // 2)
    if out[1] % 2 == 0:
        pool, size = _POOLS[number % len(_POOLS)]
        yield other(
            kind=LayerKind.POOL, op=pool, inputs=(out,), output=half, kernel=(size, size), stride=(2, 2),
            padding=(size // 3, size // 3),
        )  # fmt: skip
    if number % 3 == 0:
        yield other(
            kind=LayerKind.POOL, op="adaptive_avg_pool2d", inputs=(out,), output=(out_channels, 1, 1),
        )  # fmt: skip
        yield other(kind=LayerKind.DROPOUT, op="dropout", inputs=(out,), output=out)
        yield other(kind=LayerKind.CONCAT, op="cat", inputs=(out, out), output=(2 * out_channels, *out[1:]))
