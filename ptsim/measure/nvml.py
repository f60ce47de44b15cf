"""What is this device, and what did it draw while we used it? NVML on NVIDIA GPUs, a null object elsewhere.

`open_meter` gives the meter of a torch device. A quantity that the driver does not tell (a MIG slice has no power, a
Pascal board no energy counter) is None, never zero.
Own code on pynvml, not an energy library: the trace takes energy, power, clocks, temperature, utilisation and memory
from one thread of samples, each of them None where a board does not tell it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pynvml
import torch

from ptsim.trace.schema import DeviceInfo, DeviceUse

SAMPLING_INTERVAL_S = 0.1  # the driver renews its power reading every 20 to 100 ms

_MOST_OF_LIMIT = 3.0  # power above so many times the board's limit is no reading: peaks of a millisecond reach two
_COUNTER_LAG_S = 1.0  # by which the board's energy counter may lag behind the clock
_POWER_INSTANT = 186  # nvml.h, NVML_FI_DEV_POWER_INSTANT: in mW

_T = TypeVar("_T")
Span = tuple[float, float]  # seconds: begin, end


class Meter(Protocol):
    """Says what a device is and what it used between `start` and `stop`."""

    def info(self) -> DeviceInfo:
        """What the device is; static."""

    def start(self) -> None:
        """Begin a measurement; forgets one that is under way."""

    def stop(self, until_s: float | None = None, without: Sequence[Span] = ()) -> DeviceUse | None:
        """End the measurement; None where nothing was started or the device has no meter.

        What was used after `until_s`, or in the spans `without`, does not count; by `time.perf_counter`.
        """


def open_meter(device: torch.device | str) -> Meter:
    """The meter of `device`: NVML for a CUDA device, the null object for a CPU or where NVML is missing (warns)."""
    device = torch.device(device)
    if device.type != "cuda":
        return NullMeter(cpu_info())
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = torch.cuda.get_device_properties(index)
    try:
        return _meter_of(str(properties.uuid), properties.name)
    except pynvml.NVMLError as error:
        warnings.warn(f"no power or energy is recorded: NVML cannot read {properties.name}: {error}", stacklevel=2)
        return NullMeter(DeviceInfo(name=properties.name, kind="cuda", memory_bytes=properties.total_memory))


def _meter_of(uuid: str, name: str) -> NvmlMeter:
    """The meter of the board or MIG slice that CUDA calls `uuid`; CUDA_VISIBLE_DEVICES moves its index.

    Some virtual machines show CUDA another UUID than NVML: a single board of the same name is then the one.

    Raises:
        pynvml.NVMLError: no driver, or no such GPU.
    """
    for prefix in ("GPU", "MIG"):
        with contextlib.suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
            return NvmlMeter(uuid=f"{prefix}-{uuid}")
    meter = NvmlMeter(index=0)
    if meter.num_boards == 1 and meter.info().name == name:
        return meter
    meter.close()
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)


class NullMeter:
    """Knows what the device is, measures nothing."""

    def __init__(self, info: DeviceInfo) -> None:
        self._info = info

    def info(self) -> DeviceInfo:
        """What the device is."""
        return self._info

    def start(self) -> None:
        """Nothing to start."""

    def stop(self, until_s: float | None = None, without: Sequence[Span] = ()) -> DeviceUse | None:
        """Nothing was measured."""
        return None


class NvmlMeter:
    """One GPU through NVML; a thread samples what the driver only tells as of now.

    Energy is the difference of the board's own counter, or where there is none the trapezoidal sum of power samples.
    """

    def __init__(self, *, uuid: str | None = None, index: int = 0, interval_s: float = SAMPLING_INTERVAL_S) -> None:
        """The GPU with this UUID ("GPU-…", "MIG-…"), or the `index`-th of the driver's own order.

        Raises:
            pynvml.NVMLError: no driver, or no such GPU.
        """
        pynvml.nvmlInit()
        try:
            self._handle = (
                pynvml.nvmlDeviceGetHandleByUUID(uuid.encode()) if uuid else pynvml.nvmlDeviceGetHandleByIndex(index)
            )
            self._info = self._read_info()
            self.num_boards = int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError:
            pynvml.nvmlShutdown()
            raise
        self._interval_s = interval_s
        self._sampler: _Sampler | None = None
        self._energy_before_j: float | None = None

    def info(self) -> DeviceInfo:
        """What the driver says of the GPU."""
        return self._info

    def start(self) -> None:
        """Note the energy counter and begin to sample."""
        self._stop_sampling()
        self._energy_before_j = self._energy_j()
        self._sampler = _Sampler(self._sample, self._interval_s)

    def stop(self, until_s: float | None = None, without: Sequence[Span] = ()) -> DeviceUse | None:
        """Means of the samples from `start` to `until_s` outside the spans, energy, and the largest memory in use."""
        samples = self._stop_sampling()
        if samples is None:
            return None
        energy_j = self._counted_j(samples[-1].time_s - samples[0].time_s)
        points = _whole([(s.time_s, s.power_w) for s in samples if s.power_w is not None], samples)
        until_s = samples[-1].time_s if until_s is None else max(until_s, samples[0].time_s)
        if energy_j is None:
            energy_j = _integral(points, until_s, without)
        else:
            energy_j *= _share(points if len(points) > 1 else [(s.time_s, 1.0) for s in samples], until_s, without)
        left_out = [*without, (until_s, math.inf)]
        samples = [s for s in samples if not any(begin < s.time_s <= end for begin, end in left_out)]
        memory = [s.memory_bytes for s in samples if s.memory_bytes is not None]
        return DeviceUse(
            energy_j=energy_j,
            power_w=_mean([s.power_w for s in samples]),
            sm_clock_hz=_mean([s.sm_clock_hz for s in samples]),
            memory_clock_hz=_mean([s.memory_clock_hz for s in samples]),
            temperature_c=_mean([s.temperature_c for s in samples]),
            utilization=_mean([s.utilization for s in samples]),
            peak_memory_bytes=max(memory) if memory else None,
        )

    def close(self) -> None:
        """Stop sampling and let the library go."""
        self._stop_sampling()
        pynvml.nvmlShutdown()

    def _stop_sampling(self) -> list[_Sample] | None:
        sampler, self._sampler = self._sampler, None
        return sampler.finish() if sampler else None

    def _counted_j(self, lasted_s: float) -> float | None:
        """What the board's counter has grown by in so many seconds; None where that cannot be true."""
        after_j, before_j = self._energy_j(), self._energy_before_j
        if after_j is None or before_j is None:
            return None
        grown_j = after_j - before_j  # 0 in an epoch that is over before the driver counts again
        return grown_j if 0 < grown_j <= self._most_w * (lasted_s + _COUNTER_LAG_S) else None

    def _energy_j(self) -> float | None:
        return _scaled(_told(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)), 1e-3)  # mJ

    def _sample(self) -> _Sample:
        handle = self._handle
        utilization = _told(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        return _Sample(
            time_s=time.perf_counter(),
            power_w=self._power_w(),
            sm_clock_hz=_scaled(_told(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)), 1e6),
            memory_clock_hz=_scaled(_told(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)), 1e6),
            temperature_c=_scaled(
                _told(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)), 1.0
            ),
            utilization=_scaled(utilization, 0.01),  # percent
            memory_bytes=_told(lambda: int(_memory(handle).used)),
        )

    def _power_w(self) -> float | None:
        """Of this moment where the driver tells it: its usual reading is a mean over a second, from Ampere on.

        An epoch may be as short as that, and the mean would give it what its validation has drawn.
        """
        instant_mw = _told(lambda: _instant_mw(self._handle))
        told_mw = instant_mw or _told(lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle))
        return self._plausible_w(_scaled(told_mw, 1e-3))

    @property
    def _most_w(self) -> float:
        return math.inf if self._info.power_limit_w is None else _MOST_OF_LIMIT * self._info.power_limit_w

    def _plausible_w(self, power_w: float | None) -> float | None:
        """Drivers now and then answer with a number that no board can draw; that one sample then counts as missing."""
        return power_w if power_w is not None and power_w <= self._most_w else None

    def _read_info(self) -> DeviceInfo:
        handle = self._handle
        return DeviceInfo(
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            kind="cuda",
            memory_bytes=int(_memory(handle).total),
            max_sm_clock_hz=_scaled(_told(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)), 1e6),
            max_memory_clock_hz=_scaled(
                _told(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)), 1e6
            ),
            power_limit_w=_scaled(_told(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)), 1e-3),
            driver=_told(lambda: _text(pynvml.nvmlSystemGetDriverVersion())),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """What the driver said at one moment."""

    time_s: float
    power_w: float | None
    sm_clock_hz: float | None
    memory_clock_hz: float | None
    temperature_c: float | None
    utilization: float | None
    memory_bytes: int | None


class _Sampler:
    """Calls `sample` every `interval_s` in a thread, once at the start and once at the end."""

    def __init__(self, sample: Callable[[], _Sample], interval_s: float) -> None:
        self._sample = sample
        self._interval_s = interval_s
        self._samples: list[_Sample] = [sample()]
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ptsim-nvml", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._enough.wait(self._interval_s):
            self._samples.append(self._sample())

    def finish(self) -> list[_Sample]:
        self._enough.set()
        self._thread.join()
        self._samples.append(self._sample())
        return self._samples


def cpu_info() -> DeviceInfo:
    """This machine's processor, its memory and the threads that torch uses."""
    return DeviceInfo(
        name=_processor_name(),
        kind="cpu",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        num_threads=torch.get_num_threads(),
    )


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _memory(handle: Any) -> Any:
    """Version 2 leaves out of `used` what the driver keeps for itself; older drivers have only version 1."""
    try:
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported):
        return pynvml.nvmlDeviceGetMemoryInfo(handle)


def _instant_mw(handle: Any) -> int:
    """The power of this moment; 0 where a driver knows the question but not the answer."""
    (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [_POWER_INSTANT])
    if field.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(field.nvmlReturn)
    return int(field.value.uiVal)


def _told(read: Callable[[], _T]) -> _T | None:
    """What `read` gives, None where this driver, board or slice does not tell it."""
    try:
        return read()
    except pynvml.NVMLError:
        return None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _whole(points: list[tuple[float, float]], samples: list[_Sample]) -> list[tuple[float, float]]:
    """(Seconds, watts) of all the time: what was not told at first, or at last, is as the reading next to it."""
    if len(points) < 2:
        return points
    return [(samples[0].time_s, points[0][1]), *points, (samples[-1].time_s, points[-1][1])]


def _integral(points: list[tuple[float, float]], until_s: float, without: Sequence[Span] = ()) -> float | None:
    """Trapezoidal sum of (seconds, watts) up to `until_s`, outside the spans; None with fewer than two points."""
    if len(points) < 2:
        return None
    spans = ((min(begin, until_s), min(end, until_s)) for begin, end in without)
    return _sum(points, until_s) - math.fsum(_sum(points, end) - _sum(points, begin) for begin, end in spans)


def _sum(points: list[tuple[float, float]], until_s: float) -> float:
    total = 0.0
    for (t0, p0), (t1, p1) in itertools.pairwise(points):
        part_s = min(t1, until_s) - t0
        if part_s > 0:
            total += part_s * (p0 + (p1 - p0) * part_s / (t1 - t0) / 2)
    return total


def _share(points: list[tuple[float, float]], until_s: float, without: Sequence[Span] = ()) -> float:
    """The part of the sum over all points that `_integral` counts; all of it where the sum is 0."""
    part, whole = _integral(points, until_s, without), _integral(points, math.inf)
    return part / whole if part is not None and whole else 1.0
