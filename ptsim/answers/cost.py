"""What does training this network, or this recorded run, cost: arithmetic, traffic, memory, communication?

The entry point of `ptsim.cost` and `ptsim cost`. A trace is enough on its own; torch is imported only when a live
network has to be described.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ptsim.answers.subject import Subject, find_subject
from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.flops import Convention, check_convention, inference_macs, layer_macs, training_macs
from ptsim.costs.memory import MemoryNeed, iteration_memory, largest_batch, usable_bytes
from ptsim.costs.run import EpochCost, recorded_device, run_cost
from ptsim.costs.traffic import batch_norm_bytes, network_traffic, update_traffic
from ptsim.criteria import GROUP_LASSO, step_penalty
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_device
from ptsim.hardware.spec import Device
from ptsim.network import PRODUCTS, LayerKind, MemoryFormat, Network, Precision
from ptsim.optimizers import kind_of
from ptsim.setting import StepSetting
from ptsim.trace.trace import Trace

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

DEFAULT_BATCH = 32


class LayerCost(msgspec.Struct, frozen=True, kw_only=True):
    """One layer: MACs per image (its share, where the layer runs once a mini-batch), and bytes of the mini-batch.

    `forward_bytes` and `backward_bytes` are of all passes whose gradients accumulate, `saved_bytes` of one of them.
    """

    layer: str
    kind: LayerKind
    op: str
    output_shape: tuple[int, ...]
    parameters: int
    forward_macs: int
    weight_gradient_macs: int
    input_gradient_macs: int
    forward_bytes: int
    backward_bytes: int
    saved_bytes: int


class CostReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a network costs, and for a trace what every epoch did. MACs are per image; 1 MAC is 2 FLOPs.

    An image's share of what runs once a mini-batch depends on the mini-batch: it is `batch` here, in `passes` parts.

    For a trace, everything but `epochs` is of the network that the run ended with.

    Attributes:
        input_shape: channels, height and width of the images.
        origin: of the trace: "recorded", "planned" or "imported"; None for a model.
        batch: images per device that memory and traffic are of.
        passes: forward and backward passes over it whose gradients accumulate; 1 unless a trace has more.
        gpus: data-parallel size that memory is of.
        peak_memory_bytes: of one iteration on each device; `memory` has the parts.
        gpu: the device that was asked about; None for none.
        fits: whether the mini-batch fits it, with the margins of `costs.memory`; None without a device.
        largest_batch: the largest mini-batch that fits it, 0 where none does; None without a device.
        allreduce_bytes: gradients that one update reduces, on each device.
        num_buckets: all-reduces that DistributedDataParallel makes of them.
        criterion: a trace's own, else the group lasso.
        update_bytes, regularizer_bytes: memory traffic of one update and of the criterion's penalty
            (on a GPU, unless `gpu` or the trace says a CPU).
        streamed_bytes: the memory-bound part of a dense step: what layers without products move forward and backward
            (BatchNorm, activations, sums, pools …), and the update.
        streamed_seconds: of these bytes at the device's memory bandwidth, without what stays in a cache (less time) and
            small kernels (more), which `predict` counts; None without a device.
        product_bytes: what convolutions, linear layers and matrix products move.
    """

    name: str
    input_shape: tuple[int, int, int]
    origin: str | None
    architecture: str
    convention: Convention
    batch: int
    passes: int
    gpus: int
    precision: Precision
    optimizer: str
    memory_format: MemoryFormat
    inference_macs_per_image: int
    training_macs_per_image: int
    bn_bytes_per_image: int
    parameters: int
    peak_memory_bytes: int
    memory: MemoryNeed
    gpu: str | None
    fits: bool | None
    largest_batch: int | None
    allreduce_bytes: int
    num_buckets: int
    update_bytes: int
    criterion: str
    regularizer_bytes: int
    streamed_bytes: int
    streamed_seconds: float | None
    product_bytes: int
    layers: tuple[LayerCost, ...]
    epochs: tuple[EpochCost, ...] = ()

    def layers_frame(self) -> pd.DataFrame:
        """A row a layer, in forward order; columns as `LayerCost`."""
        return _frame(self.layers)

    def kinds_frame(self) -> pd.DataFrame:
        """A row a kind of layer, costliest first: how many, their MACs per image and their bytes per mini-batch."""
        frame = self.layers_frame()
        frame["training_macs"] = frame[["forward_macs", "weight_gradient_macs", "input_gradient_macs"]].sum(axis=1)
        summed = ["parameters", "forward_macs", "training_macs", "forward_bytes", "backward_bytes", "saved_bytes"]
        kinds = frame.groupby("kind", sort=False)[summed].sum()
        kinds.insert(0, "layers", frame.groupby("kind", sort=False).size())
        return kinds.reset_index().sort_values(["training_macs", "forward_bytes"], ascending=False, ignore_index=True)

    def epochs_frame(self) -> pd.DataFrame:
        """A row an epoch of the trace; columns as `EpochCost`; empty for a model."""
        return _frame(self.epochs)


def cost(
    subject: str | Path | Trace | Network | nn.Module,
    *,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    batch: int | None = None,
    gpu: str | Path | Device | None = None,
    gpus: int | None = None,
    precision: Precision | str | None = None,
    optimizer: str | None = None,
    memory_format: MemoryFormat | None = None,
    convention: Convention = "exact",
) -> CostReport:
    """What `subject` costs to train.

    Args:
        subject: a trace or its path, or a network: a name that `ptsim.zoo` knows, a live module, a `Network`.
        input_shape: (channels, height, width); needed for a live module, else the model's usual one.
        num_classes: outputs; the model's usual number.
        batch: images per device; a trace's last one, else 32.
        gpu: a device of the catalog, by name, file or object.
        gpus: data-parallel size: from 2 on every device also holds the buckets of its all-reduces; a trace's own,
            else 1.
        precision: of the matrix products; a trace's own, else fp32.
        optimizer: a trace's own, else sgd.
        memory_format: a trace's own, else contiguous.
        convention: "exact", or "paper" for the way the PruneTrain authors count.

    Raises:
        UsageError: an option that is wrong, or that a trace already decides.
        UnsupportedModelError: the network cannot be traced.
        FileFormatError: the trace is broken.
    """
    check_convention(convention)
    device = None if gpu is None else load_device(gpu)  # before seconds of capturing
    found = find_subject(subject, input_shape=input_shape, num_classes=num_classes)
    setting = found.setting(
        batch=batch,
        precision=precision,
        memory_format=memory_format,
        optimizer=optimizer,
        num_gpus=gpus,
        default_batch=DEFAULT_BATCH,
    )
    if device is not None:
        device.check_precision(setting.precision)
    return _report(found, setting, device, convention)


def _report(found: Subject, setting: StepSetting, device: Device | None, convention: Convention) -> CostReport:
    network, trace, batch, passes = found.network, found.trace, setting.batch, setting.passes
    runs_on = device if device is not None or trace is None else recorded_device(trace)
    try:
        need = iteration_memory(network, setting, device=runs_on)
    except ValueError as error:
        raise UsageError(str(error)) from error
    fits = largest = None
    if device is not None:
        fits = need.fits(device)
        largest = largest_batch(network, setting, capacity_bytes=usable_bytes(device), device=device)
    element_bytes = setting.precision.activation_bytes
    layers = layer_costs(network, convention, setting)
    update_bytes = update_traffic(network, kind_of(setting), momentum=setting.momentum)
    criterion = (trace and trace.criterion) or GROUP_LASSO
    penalised = msgspec.structs.replace(setting, regularizer=criterion)
    moved = dict.fromkeys((True, False), 0)
    for layer in layers:
        moved[layer.kind in PRODUCTS] += layer.forward_bytes + layer.backward_bytes
    streamed_bytes = moved[False] + update_bytes
    # a GPU that the catalog does not have is one all the same
    gpu = runs_on.is_gpu if runs_on is not None else trace is None or trace.run.device.kind != "cpu"
    return CostReport(
        name=network.name,
        input_shape=network.input_shape,
        origin=None if trace is None else trace.run.origin,
        architecture=network.id,
        convention=convention,
        batch=batch,
        passes=passes,
        gpus=setting.num_gpus,
        precision=setting.precision,
        optimizer=setting.optimizer,
        memory_format=setting.memory_format,
        inference_macs_per_image=inference_macs(network, convention, images=batch, mini_batches=passes) // batch,
        training_macs_per_image=training_macs(network, convention, images=batch, mini_batches=passes) // batch,
        bn_bytes_per_image=batch_norm_bytes(network, element_bytes),
        parameters=network.num_parameters,
        peak_memory_bytes=need.peak_bytes,
        memory=need,
        gpu=None if device is None else device.name,
        fits=fits,
        largest_batch=largest,
        allreduce_bytes=network.gradient_bytes,
        num_buckets=len(ddp_buckets(network)),
        update_bytes=update_bytes,
        criterion=criterion,
        regularizer_bytes=step_penalty(network, penalised, gpu=gpu).num_bytes,
        streamed_bytes=streamed_bytes,
        streamed_seconds=None if device is None else streamed_bytes / device.memory_bandwidth_bytes_per_s,
        product_bytes=moved[True],
        layers=layers,
        epochs=() if trace is None else run_cost(trace, convention, device=device),
    )


def layer_costs(network: Network, convention: Convention, setting: StepSetting) -> tuple[LayerCost, ...]:
    """A row for every layer, in forward order."""
    rows, batch, passes = [], setting.batch, setting.passes
    for layer, traffic in zip(network.layers, network_traffic(network, setting.one_pass), strict=True):
        macs, times = layer_macs(layer, convention), layer.repeats(batch, passes)
        rows.append(
            LayerCost(
                layer=layer.name,
                kind=layer.kind,
                op=layer.op,
                output_shape=layer.output_shape,
                parameters=layer.num_parameters,
                forward_macs=macs.forward * times // batch,
                weight_gradient_macs=macs.weight_gradient * times // batch,
                input_gradient_macs=macs.input_gradient * times // batch,
                forward_bytes=passes * traffic.forward_bytes,
                backward_bytes=passes * traffic.backward_bytes,
                saved_bytes=layer.saved_bytes(setting.pass_batch, setting.precision.activation_bytes),
            )
        )
    return tuple(rows)


def _frame(rows: tuple[msgspec.Struct, ...]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([msgspec.to_builtins(row) for row in rows])
