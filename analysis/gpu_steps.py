"""Which training steps does the GPU campaign measure, and how: time, power and peak memory, beside what ptsim predicts?

`gpu_campaign.py` calls it; it is no script of its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_parts
import msgspec
import pynvml
import torch
from torch import nn
from torch.nn import functional as F

from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.costs.energy import step_energy
from ptsim.costs.memory import iteration_memory, largest_batch
from ptsim.costs.step import step_time
from ptsim.errors import PtsimError, lacks_gpu_memory, on_one_line
from ptsim.hardware.catalog import match_device
from ptsim.hardware.spec import Device
from ptsim.measure.calibrate import make_optimizer
from ptsim.measure.nvml import NvmlMeter, open_meter
from ptsim.measure.profile import (
    NUM_LAYERED_STEPS,
    NUM_STEPS,
    NUM_WARM_UP,
    Budget,
    layout,
    number_format,
    profile_network,
    tuned_convolutions,
)
from ptsim.measure.tf32 import tf32_allowed
from ptsim.network import MemoryFormat, Network, Precision
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import remove_channels
from ptsim.setting import StepSetting
from ptsim.textfile import write_whole
from ptsim.trace.schema import DeviceUse
from ptsim.units import GIB

Combination = tuple[str, int, str, MemoryFormat]
FORMATS: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
FIRST_STEPS: list[Combination] = [
    *itertools.product(("torchvision:resnet50",), (64,), ("fp32", "tf32", "bf16", "fp16"), FORMATS),
    *itertools.product(("vgg11", "resnet50", "resnet32"), (128,), ("fp32", "bf16"), ("contiguous",)),
    *itertools.product(("torchvision:vgg16_bn", "torchvision:mobilenet_v2"), (32,), ("tf32", "bf16"), FORMATS),
]
# ResNet-50 dense and as pruning leaves it, where this share of the prunable channels is gone.
_STAGES = ("torchvision:resnet50", *(f"pruned {share} torchvision:resnet50" for share in (0.2, 0.4, 0.6)))
MORE_STEPS: list[Combination] = [
    # In fp16 the GradScaler waits for the GPU before every update, so these tell of the host, too; dense is above.
    *itertools.product(_STAGES[1:], (64,), ("fp16",), FORMATS[1:]),
    *itertools.product(
        ("torchvision:resnet18", "torchvision:efficientnet_b0", "torchvision:convnext_tiny", "torchvision:swin_t"),
        (64,),
        ("tf32", "bf16"),
        FORMATS,
    ),
    *itertools.product(("torchvision:densenet121",), (32,), ("tf32", "bf16"), FORMATS),
    *itertools.product(("torchvision:resnet50", "torchvision:vgg16_bn"), (16, 256), ("fp32", "bf16"), FORMATS),
    *itertools.product(("torchvision:mobilenet_v2",), (128,), ("fp32", "tf32", "bf16", "fp16"), FORMATS),
    *itertools.product(("vgg13", "resnet50", "resnet32"), (512,), ("fp32", "tf32", "bf16"), FORMATS),
]
# A few steps each, for the allocator's peak: 20 networks of 14 families.
PEAKS: list[Combination] = [
    (f"torchvision:{name}", 32, "bf16", "channels_last")
    for name in (
        "alexnet", "convnext_small", "densenet169", "efficientnet_b3", "efficientnet_v2_s", "googlenet",
        "inception_v3", "maxvit_t", "mnasnet1_0", "mobilenet_v3_large", "regnet_x_8gf", "regnet_y_3_2gf", "resnet101",
        "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_v2_t", "vgg11", "vit_b_16", "wide_resnet50_2",
    )
]  # fmt: skip
STAGES: list[Combination] = [*itertools.product(_STAGES, (64,), ("fp32", "bf16"), FORMATS[1:])]
TINY_STEPS: list[Combination] = [
    ("resnet20", 4, "fp32", "contiguous"),
    # Not channels_last: oneDNN corrupts its memory there on a CPU without AVX-512 (torch 2.14.1, odd channel counts).
    ("pruned 0.5 resnet20", 2, "fp32", "contiguous"),
]
TINY_PEAKS: list[Combination] = [("vgg11", 4, "fp32", "contiguous")]
LIMITED: list[Combination] = [
    ("torchvision:resnet50", 0, "fp32", "contiguous"),
    ("torchvision:resnet50", 0, "bf16", "channels_last"),
    ("torchvision:mobilenet_v2", 0, "bf16", "channels_last"),
    ("torchvision:vgg16_bn", 0, "fp32", "contiguous"),
    ("resnet50", 0, "tf32", "contiguous"),
]
LIMIT_BYTES = 8 * GIB
_LOAD_S = 1.0  # steps before the meter starts: a board's own power reading is a mean over up to a second
_METERED_S = 2.0
_TIMED_S = 0.5  # of whole steps, where power is measured too
_TOGETHER = 10  # steps between looks at the clock
_MORE, _FEWER = (1.05, 1.1, 1.2, 1.4, 1.8), (0.95, 0.9, 0.8, 0.6)  # of the mini-batch that is said to fit


class Steps:
    """Measures steps into `steps.json` and `memory.json` of a folder; rows that are there stay."""

    def __init__(self, out: Path, device: torch.device, *, tiny: bool, remaining_s: Callable[[], float]) -> None:
        self.out, self.device, self.tiny, self.remaining_s = out, device, tiny, remaining_s
        self.parts = gpu_parts.Parts()
        self._networks: dict[str, tuple[nn.Module, Network]] = {}

    def done(self, wanted: Sequence[Combination]) -> bool:
        """Every combination has a row."""
        return not wanted or {combination_of(row) for row in rows(self.out / "steps.json")}.issuperset(wanted)

    def measure(self, wanted: Sequence[Combination], *, power: bool) -> None:
        """One row per network, mini-batch, precision and memory format; a failure is a row with its reason."""
        table = self.out / "steps.json"
        found = rows(table)
        known = {combination_of(row) for row in found}
        for combination in wanted:
            if combination not in known and self.remaining_s() > (0 if self.tiny else 10):
                row, broken = self._row(*combination, power=power)
                found.append(row)
                write(table, found)
                if broken is not None:
                    raise broken

    def _row(
        self, model_name: str, batch: int, precision_name: str, memory_format: MemoryFormat, *, power: bool
    ) -> tuple[dict[str, Any], RuntimeError | None]:
        """Measured and predicted time and memory of one training step, and an error that may have broken the GPU."""
        precision = Precision(precision_name)
        setting = StepSetting(batch=batch, precision=precision, memory_format=memory_format)
        row: dict[str, Any] = {
            "model": model_name,
            "batch": batch,
            "precision": precision_name,
            "memory_format": memory_format,
            "torch": str(torch.__version__),
        }
        seconds = _TIMED_S if power and not self.tiny else 0.0
        broken: RuntimeError | None = None
        try:
            model, network = self.network(model_name)
            row["device"] = open_meter(self.device).info().name
            row |= predicted(network, setting, match_device(row["device"]))
            here = copy.deepcopy(model).to(self.device).to(memory_format=layout(memory_format))
            profile = profile_network(
                here,
                network,
                batch=batch,
                precision=precision,
                memory_format=memory_format,
                optimizer=make_optimizer("sgd", here.parameters()),
                device=self.device,
                budget=Budget(min_seconds=seconds, max_seconds=max(self.remaining_s(), 1.0)),
            )
            row |= {"measured_step_s": profile.step_s, "measured_peak_bytes": profile.peak_memory_bytes}
            if self.device.type == "cuda":
                row["reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            elif not power:
                row["measured_peak_bytes"] = cpu_peak_bytes(here, network, setting)
            row["profile"] = msgspec.to_builtins(profile)
            if power:
                use = self._use_under_load(here, setting, zoo.find(model_name.rpartition(" ")[2]).input_shape)
                row["use"] = None if use is None else msgspec.to_builtins(use)
        except (PtsimError, torch.OutOfMemoryError) as error:
            row["failed"] = sentence(error)
        except RuntimeError as error:  # after an error of CUDA itself nothing works in this process any more
            row["failed"], broken = sentence(error), error
        except Exception as error:  # of a network's own code, perhaps: the other networks are measured all the same
            row["failed"] = sentence(error)
        here = None  # type: ignore[assignment] # or its memory stays taken
        if broken is None:  # else this would fail, too, and the row would be lost
            free(self.device)
        return row, broken

    def _use_under_load(
        self, model: nn.Module, setting: StepSetting, input_shape: tuple[int, int, int]
    ) -> DeviceUse | None:
        """What the board draws while nothing but steps runs; None where nobody tells."""
        step = training_step(model, input_shape, setting, self.device)
        meter = open_meter(self.device)
        for metered, seconds in ((False, _LOAD_S), (True, _METERED_S)):
            if metered:
                meter.start()
            end_s = time.monotonic() + (0 if self.tiny else seconds)
            while True:
                for _ in range(1 if self.tiny else _TOGETHER):
                    step()
                wait(self.device)
                if time.monotonic() >= end_s:
                    break
        return meter.stop()

    def network(self, name: str) -> tuple[nn.Module, Network]:
        """The model on the CPU and its description, made once; "pruned SHARE NAME" is NAME without that share."""
        if name not in self._networks:
            with self.parts.timed("networks"):
                self._networks[name] = _made(name)
        return self._networks[name]

    def limits_done(self) -> bool:
        """Every network was tried; a CPU has no allocator that can be limited."""
        return len(rows(self.out / "memory.json")) == (1 if self.device.type != "cuda" else len(LIMITED))

    def limits(self) -> None:
        """In 8 GiB of the memory: does what is said to fit run, and how much more would have run?"""
        table = self.out / "memory.json"
        found = rows(table)
        if self.device.type != "cuda":
            write(table, [{"failed": "a CPU has no allocator that can be limited"}])
            return
        for name, _, precision_name, memory_format in LIMITED[len(found) :]:
            if self.remaining_s() < 10:
                return
            setting = StepSetting(batch=1, precision=Precision(precision_name), memory_format=memory_format)
            row: dict[str, Any] = {"model": name, "precision": precision_name, "memory_format": memory_format}
            try:
                row |= self._limit(name, setting)
            except Exception as error:  # the next process goes on with the other networks
                write(table, [*found, row | {"failed": sentence(error)}])
                raise
            found.append(row)
            write(table, found)

    def _limit(self, model_name: str, setting: StepSetting) -> dict[str, Any]:
        """What is said to fit, and what fitted."""
        model, network = self.network(model_name)
        name = open_meter(self.device).info().name
        said = largest_batch(network, setting, capacity_bytes=LIMIT_BYTES, device=match_device(name))
        runs = functools.partial(self._runs, model, zoo.find(model_name).input_shape, setting)
        runs(1)  # loads the libraries, which take memory beside the allocator
        with memory_limit(self.device, LIMIT_BYTES):
            fitted = around_the_limit(runs, said)
        return {"device": name, "limit_bytes": LIMIT_BYTES, "said_to_fit": said, **fitted}

    def _runs(self, model: nn.Module, shape: tuple[int, int, int], setting: StepSetting, batch: int) -> bool:
        return runs_steps(model, shape, msgspec.structs.replace(setting, batch=batch), self.device)


def _made(name: str) -> tuple[nn.Module, Network]:
    """The model on the CPU and its description."""
    pruned, _, share = name.rpartition(" ")[0].partition(" ")
    base = name.rpartition(" ")[2]
    entry = zoo.find(base)
    torch.manual_seed(0)
    model = zoo.create(base)
    if pruned:
        remove_share(model, entry.input_shape, float(share))
    network = capture_network(model, name=name, input_shape=entry.input_shape, num_classes=entry.num_classes)
    return model, network


def predicted(network: Network, setting: StepSetting, device: Device | None) -> dict[str, Any]:
    """What ptsim says of the step before it is measured: from the data sheet, where the catalog knows the device."""
    need = iteration_memory(network, setting, device=device)
    row: dict[str, Any] = {"predicted_peak_bytes": need.peak_bytes, "predicted_device_bytes": need.device_bytes}
    if device is not None:
        step = step_time(network, device, setting)
        row |= {"predicted_step_s": step.compute_s, "low_s": step.low_s, "high_s": step.high_s}
        row |= {"tier": step.tier, "predicted_power_w": step_energy(step, device).mean_power_w}
    return row


def cpu_peak_bytes(model: nn.Module, network: Network, setting: StepSetting) -> int:
    """What the CPU's allocator held at most in a training step."""
    from check_counts import peak_bytes  # seconds to import, and only a rehearsal needs it

    return peak_bytes(model, torch.randn((setting.batch, *network.input_shape)), network, setting.precision)


def step_seconds(step_s: float, *, power: bool) -> float:
    """How long the steps of one row take, if one takes `step_s`: nothing of what comes before and between them."""
    timed = NUM_STEPS * max(1, math.ceil((_TIMED_S if power else 0.0) / step_s / NUM_STEPS))
    layered = max(NUM_LAYERED_STEPS, timed // 4 if timed > NUM_STEPS else 0)
    loads = (_LOAD_S, _METERED_S) if power else ()
    return step_s * (
        NUM_WARM_UP + timed + layered + sum(_TOGETHER * math.ceil(seconds / step_s / _TOGETHER) for seconds in loads)
    )


def limit_seconds(network: Network, setting: StepSetting, device: Device) -> float:
    """How long the steps of one row of `memory.json` take at most: two of each mini-batch that is tried."""
    said = largest_batch(network, setting, capacity_bytes=LIMIT_BYTES, device=device)
    if said < 1:
        return 0.0
    step_s = step_time(network, device, msgspec.structs.replace(setting, batch=said)).compute_s
    return 2 * step_s * (1 + sum(_MORE))


def remove_share(model: nn.Module, input_shape: tuple[int, int, int], share: float) -> None:
    """Remove a random share of the prunable channels as a reconfiguration would."""
    groups = find_groups(model, input_shape)
    generator = torch.Generator().manual_seed(0)
    remove_channels(model, groups, torch.rand(groups.num_components, generator=generator) < share)


def around_the_limit(runs: Callable[[int], bool], said: int) -> dict[str, Any]:
    """Whether the mini-batch that is said to fit runs, and the range in which the largest that runs lies.

    A false "fits" is the grave error: then it looks below, else above.
    """
    if said < 1:
        return {"fits": None, "largest_that_ran": None, "smallest_that_failed": None}
    fits = runs(said)
    factors = _MORE if fits else _FEWER
    ran, failed = (said, None) if fits else (None, said)
    for factor in factors:
        batch = max(round(said * factor), 1)
        if runs(batch):
            ran = batch
            if not fits:
                break
        else:
            failed = batch
            if fits:
                break
    return {"fits": fits, "largest_that_ran": ran, "smallest_that_failed": failed}


def training_step(
    model: nn.Module, input_shape: tuple[int, int, int], setting: StepSetting, device: torch.device
) -> Callable[[], None]:
    """One training step of a copy of `model` on `device`, to be called again and again."""
    here = copy.deepcopy(model).to(device).to(memory_format=layout(setting.memory_format)).train()
    optimizer = make_optimizer("sgd", here.parameters())
    images = torch.randn((setting.batch, *input_shape), device=device)
    images = images.contiguous(memory_format=layout(setting.memory_format))
    labels = torch.zeros(setting.batch, dtype=torch.int64, device=device)
    # As training in fp16 does, which waits for the device before every update.
    scaler = torch.amp.GradScaler(device.type, enabled=setting.precision is Precision.FP16)

    def step() -> None:
        with tf32_allowed(setting.precision), tuned_convolutions():
            optimizer.zero_grad(set_to_none=True)
            with number_format(setting.precision, device):
                logits = here(images)
                loss = F.cross_entropy(logits if isinstance(logits, torch.Tensor) else logits[0], labels)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call] # torch's gap
            scaler.step(optimizer)
            scaler.update()

    return step


def runs_steps(model: nn.Module, input_shape: tuple[int, int, int], setting: StepSetting, device: torch.device) -> bool:
    """Whether two whole training steps of a copy of `model` fit into the memory that the process may have."""
    fits, step = True, None
    try:
        step = training_step(model, input_shape, setting, device)
        for _ in range(2):
            step()
        wait(device)
    except RuntimeError as error:
        if not lacks_gpu_memory(error):
            raise
        fits = False
    step = None  # out of the handler, whose traceback holds what the failed step has allocated
    free(device)
    return fits


@contextlib.contextmanager
def memory_limit(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """As on a device with `limit_bytes`: the allocator gets what CUDA's own context leaves of it."""
    free(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    context_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(max(limit_bytes - context_bytes, 1) / total_bytes, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def combination_of(row: dict[str, Any]) -> Combination:
    """What a row of `steps.json` is about."""
    return row["model"], row["batch"], row["precision"], row["memory_format"]


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON table; none where there is no file."""
    found: list[dict[str, Any]] = msgspec.json.decode(path.read_bytes()) if path.exists() else []
    return found


def write(path: Path, content: Any) -> None:
    """Write as indented JSON, whole or not at all."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(content)))


def board_name() -> str | None:
    """What the driver calls the GPU; not asked of CUDA, whose context would take memory from the pieces."""
    try:
        meter = NvmlMeter(index=0)
    except pynvml.NVMLError:
        return None
    name = meter.info().name
    meter.close()
    return name


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    # Before CUDA is there, the allocator does not know the device.
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch's gap
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def sentence(error: BaseException) -> str:
    """What an error says, on one line; of one that is no sentence also its kind."""
    kind = "" if isinstance(error, PtsimError | RuntimeError) else f"{type(error).__name__}: "
    return kind + on_one_line(error)
