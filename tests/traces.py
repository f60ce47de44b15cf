"""Synthetic but consistent traces: hand-made residual networks that shrink, with the times that such a run would have.

Nothing here is a measurement. Times follow a fixed roofline so that they are plausible and exactly reproducible: a
profile's step is its parts' sum, an epoch's wall time its iterations times the step, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ptsim.network import Layer, LayerKind, Network, Parameter, Precision
from ptsim.trace.io import TraceWriter
from ptsim.trace.schema import (
    SCHEMA_VERSION,
    AnyRecord,
    Architecture,
    Dataset,
    DeviceInfo,
    DeviceUse,
    End,
    Epoch,
    EpochTime,
    LayerDensity,
    LayerProfile,
    Profile,
    Reconfiguration,
    Run,
    StepDistribution,
)

A100 = "NVIDIA A100-SXM4-40GB"
CPU = "Intel(R) Xeon(R) Processor"

# FLOP/s, byte/s, seconds per operator: the fixed roofline behind every time in here.
_RATES = {"cuda": (8e12, 1.2e12, 6e-6), "cpu": (5e10, 1e10, 4e-6)}


class NetworkBuilder:
    """Builds a `Network` layer by layer; each method returns the new layer's name."""

    def __init__(self, name: str, input_shape: tuple[int, int, int], num_classes: int) -> None:
        self.name, self.input_shape, self.num_classes = name, input_shape, num_classes
        self.layers: dict[str, Layer] = {}
        self.edges: list[tuple[str, str]] = []
        self._parameters: list[Parameter] = []  # in forward order
        self._saved: set[str] = set()  # outputs that some operator has already kept for backward

    def shape(self, source: str | None) -> tuple[int, ...]:
        return self.input_shape if source is None else self.layers[source].output_shape

    def _add(self, layer: Layer, sources: Sequence[str | None]) -> str:
        self.layers[layer.name] = layer
        self.edges += [(source, layer.name) for source in sources if source is not None]
        return layer.name

    def _newly_saved(self, source: str | None) -> int:
        """Elements of `source`'s output, once: the second operator that keeps the same tensor keeps nothing new."""
        key = source or "input"
        if key in self._saved:
            return 0
        self._saved.add(key)
        return math.prod(self.shape(source))

    def conv(self, name: str, source: str | None, out_channels: int, *, kernel: int = 3, stride: int = 1) -> str:
        channels, height, width = self.shape(source)
        padding = kernel // 2
        out = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
        weights = out_channels * channels * kernel * kernel
        self._parameters.append(
            Parameter(name=f"{name}.weight", layer=name, shape=(out_channels, channels, kernel, kernel))
        )
        return self._add(
            Layer(
                name=name,
                kind=LayerKind.CONV,
                op="conv2d",
                in_channels=channels,
                out_channels=out_channels,
                input_shapes=((channels, height, width),),
                output_shape=(out_channels, *out),
                kernel_size=(kernel, kernel),
                stride=(stride, stride),
                padding=(padding, padding),
                num_parameters=weights,
                forward_macs=weights * out[0] * out[1],
                input_needs_gradient=source is not None,
                saved_elements=self._newly_saved(source),
            ),
            [source],
        )

    def batch_norm(self, name: str, source: str) -> str:
        shape = self.shape(source)
        self._parameters += [
            Parameter(name=f"{name}.{kind}", layer=name, shape=(shape[0],)) for kind in ("weight", "bias")
        ]
        return self._add(
            Layer(
                name=name,
                kind=LayerKind.BATCH_NORM,
                op="batch_norm",
                in_channels=shape[0],
                out_channels=shape[0],
                input_shapes=(shape,),
                output_shape=shape,
                bias=True,
                num_parameters=2 * shape[0],
                forward_macs=2 * math.prod(shape),
                saved_elements=self._newly_saved(source),
                saved_fixed_bytes=2 * 4 * shape[0],
            ),
            [source],
        )

    def relu(self, name: str, source: str) -> str:
        shape = self.shape(source)
        self._saved.add(name)  # ReLU keeps its output
        return self._add(
            Layer(
                name=name,
                kind=LayerKind.ACTIVATION,
                op="relu",
                in_channels=shape[0],
                out_channels=shape[0],
                input_shapes=(shape,),
                output_shape=shape,
                saved_elements=math.prod(shape),
            ),
            [source],
        )

    def add(self, name: str, left: str, right: str) -> str:
        shape = self.shape(left)
        assert shape == self.shape(right)
        return self._add(
            Layer(
                name=name,
                kind=LayerKind.ELEMENTWISE,
                op="add",
                in_channels=shape[0],
                out_channels=shape[0],
                input_shapes=(shape, shape),
                output_shape=shape,
            ),
            [left, right],
        )

    def average_pool(self, name: str, source: str) -> str:
        shape = self.shape(source)
        return self._add(
            Layer(
                name=name,
                kind=LayerKind.POOL,
                op="adaptive_avg_pool2d",
                in_channels=shape[0],
                out_channels=shape[0],
                input_shapes=(shape,),
                output_shape=(shape[0], 1, 1),
                kernel_size=(shape[1], shape[2]),
                forward_macs=math.prod(shape),
                saved_elements=self._newly_saved(source),
            ),
            [source],
        )

    def flatten(self, name: str, source: str) -> str:
        shape = self.shape(source)
        features = math.prod(shape)
        return self._add(
            Layer(
                name=name,
                kind=LayerKind.RESHAPE,
                op="flatten",
                in_channels=shape[0],
                out_channels=features,
                input_shapes=(shape,),
                output_shape=(features,),
                inplace=True,
            ),
            [source],
        )

    def linear(self, name: str, source: str, out_features: int) -> str:
        (features,) = self.shape(source)
        self._parameters += [
            Parameter(name=f"{name}.weight", layer=name, shape=(out_features, features)),
            Parameter(name=f"{name}.bias", layer=name, shape=(out_features,)),
        ]
        return self._add(
            Layer(
                name=name,
                kind=LayerKind.LINEAR,
                op="linear",
                in_channels=features,
                out_channels=out_features,
                input_shapes=((features,),),
                output_shape=(out_features,),
                bias=True,
                num_parameters=features * out_features + out_features,
                forward_macs=features * out_features,
                saved_elements=self._newly_saved(source),
            ),
            [source],
        )

    def build(self) -> Network:
        """Parameters become ready in reverse order of the forward pass."""
        return Network(
            name=self.name,
            input_shape=self.input_shape,
            num_classes=self.num_classes,
            layers=tuple(self.layers.values()),
            edges=tuple(self.edges),
            parameters=tuple(reversed(self._parameters)),
        )


def residual_network(
    widths: Sequence[int] = (16, 32, 64),
    blocks: Sequence[int] = (2, 2, 2),
    *,
    inner: Sequence[int] | None = None,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    num_classes: int = 10,
    name: str = "resnet14",
) -> Network:
    """A CIFAR-style residual network of basic blocks; `inner` is the width between a block's two convolutions."""
    net = NetworkBuilder(name, input_shape, num_classes)
    x = net.relu("relu", net.batch_norm("bn1", net.conv("conv1", None, widths[0])))
    for stage, (width, middle, count) in enumerate(zip(widths, inner or widths, blocks, strict=True), start=1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = net.conv(f"{at}.conv1", x, middle, stride=stride)
            y = net.relu(f"{at}.relu1", net.batch_norm(f"{at}.bn1", y))
            y = net.batch_norm(f"{at}.bn2", net.conv(f"{at}.conv2", y, width))
            if net.shape(x) != net.shape(y):
                x = net.conv(f"{at}.shortcut.0", x, width, kernel=1, stride=stride)
                x = net.batch_norm(f"{at}.shortcut.1", x)
            x = net.relu(f"{at}.relu2", net.add(f"{at}.add", y, x))
    net.linear("fc", net.flatten("flatten", net.average_pool("avgpool", x)), num_classes)
    return net.build()


def device_info(name: str = A100) -> DeviceInfo:
    """A GPU's facts for a name that starts with NVIDIA, a two-threaded CPU's otherwise."""
    if name.startswith("NVIDIA"):
        memory = 80 if "80GB" in name else 40
        return DeviceInfo(
            name=name,
            kind="cuda",
            memory_bytes=memory * 2**30,
            max_sm_clock_hz=1.41e9,
            max_memory_clock_hz=1.215e9,
            power_limit_w=400.0,
            driver="580.95.05",
        )
    return DeviceInfo(name=name, kind="cpu", memory_bytes=8 * 2**30, num_threads=2)


def profile_of(
    network: Network,
    *,
    batch: int,
    device: DeviceInfo,
    precision: Precision = Precision.FP32,
    regularizer: bool = True,
    memory_format: Literal["contiguous", "channels_last"] = "contiguous",
) -> Profile:
    """The times of the fixed roofline: a layer is bound by its FLOPs or by its bytes, backward is twice forward."""
    rate, bandwidth, launch = _RATES[device.kind]
    layers = []
    for layer in network.layers:
        products = layer.kind in (LayerKind.CONV, LayerKind.LINEAR)
        flops = 2 * layer.forward_macs * batch if products else 0
        traffic = (layer.input_elements + layer.output_elements) * precision.activation_bytes * batch
        forward = max(flops / rate, traffic / bandwidth) + launch
        if layer.inplace:
            layers.append(LayerProfile(layer=layer.name, forward_s=1e-6, backward_s=None))
        else:
            backward = forward * (2 if layer.input_needs_gradient else 1)
            layers.append(LayerProfile(layer=layer.name, forward_s=forward, backward_s=backward))
    forward_s = sum(layer.forward_s for layer in layers)
    backward_s = sum(layer.backward_s or 0.0 for layer in layers)
    optimizer_s = 5 * 4 * network.num_parameters / bandwidth + 5 * launch
    regularizer_s = 3 * 4 * network.num_parameters / bandwidth + 17 * launch if regularizer else 0.0
    return Profile(
        architecture=network.id,
        batch=batch,
        precision=precision,
        memory_format=memory_format,
        device=device.name,
        num_samples=20,
        layers=tuple(layers),
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=optimizer_s,
        regularizer_s=regularizer_s,
        step_s=forward_s + backward_s + optimizer_s + regularizer_s + 10 * launch,
        peak_memory_bytes=peak_memory(network, batch, precision),
    )


def peak_memory(network: Network, batch: int, precision: Precision) -> int:
    """Saved activations plus weights, gradients and momentum."""
    saved = sum(layer.saved_elements * precision.activation_bytes + layer.saved_other_bytes for layer in network.layers)
    return saved * batch + 3 * 4 * network.num_parameters


def shrinking_records(
    *,
    epochs: int = 6,
    interval: int = 2,
    penalty_ratio: float = 0.2,
    widths: Sequence[int] = (16, 32, 64),
    blocks: Sequence[int] = (2, 2, 2),
    keep: float = 0.8,
    remove_layers: bool = True,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    num_classes: int = 10,
    num_train: int = 5000,
    batch: int = 64,
    batch_step: int = 32,
    world_size: int = 1,
    learning_rate: float = 0.1,
    model: str = "resnet14",
    dataset: str = "cifar10",
    device: str = A100,
    precision: Precision = Precision.FP32,
    profiles: bool = True,
    energy: bool = True,
    jitter: float = 0.04,
    seed: int = 0,
    status: Literal["clean", "interrupted", "failed"] | None = "clean",
    recorded_epochs: int | None = None,
) -> list[AnyRecord]:
    """The records of a PruneTrain run (a dense one with `penalty_ratio=0`).

    After every `interval` epochs each block's inner width shrinks to `keep` of itself, and the residual width to the
    square root of that; the mini-batch grows by `batch_step` (0: never); the last reconfiguration removes the last
    stage's last block. `recorded_epochs` cuts the run short; `status=None` leaves the end record out (a crash).
    """
    info = device_info(device)
    residual, inner, counts = list(widths), list(widths), list(blocks)
    dense = network = residual_network(residual, counts, input_shape=input_shape, num_classes=num_classes, name=model)
    records: list[AnyRecord] = [
        Run(
            schema_version=SCHEMA_VERSION,
            created="2026-11-22T12:00:00Z",
            model=model,
            dataset=Dataset(
                name=dataset,
                num_classes=num_classes,
                num_train=num_train,
                num_validation=num_train // 5,
                input_shape=input_shape,
            ),
            hyperparameters={
                "epochs": epochs,
                "batch": batch,
                "optimizer": "sgd",
                "lr": learning_rate,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "penalty_ratio": penalty_ratio,
                "interval": interval,
                "threshold": 1e-4,
                "seed": seed,
            },
            seed=seed,
            precision=precision,
            memory_format="contiguous",
            world_size=world_size,
            backend="nccl" if world_size > 1 else None,
            device=info,
            versions={"python": "3.12.3", "torch": "2.15.0", "ptsim": "0.1.0"},
            git_revision=None,
        )
    ]
    shrinks = penalty_ratio > 0
    reconfiguration_epochs = list(range(interval - 1, epochs - 1, interval)) if shrinks else []
    seen: set[tuple[str, int]] = set()
    known: set[str] = set()
    wall = joules = 0.0
    iterations = recorded = 0
    for epoch in range(epochs if recorded_epochs is None else recorded_epochs):
        if network.id not in known:
            known.add(network.id)
            records.append(Architecture(id=network.id, network=network))
        profile = profile_of(network, batch=batch, device=info, precision=precision, regularizer=shrinks)
        if profiles and (network.id, batch) not in seen:
            seen.add((network.id, batch))
            records.append(profile)
        record = _epoch(epoch, epochs, network, dense, profile, info, num_train, world_size, learning_rate, jitter)
        if not energy:
            record = msgspec.structs.replace(record, device=None)
        records.append(record)
        recorded += 1
        wall += record.time.wall_s + record.time.validation_s
        iterations += record.num_iterations
        joules += (record.device.energy_j or 0.0) if record.device else 0.0
        if epoch in reconfiguration_epochs:
            before = network
            inner = [max(1, round(width * keep)) for width in inner]
            residual = [max(1, round(width * math.sqrt(keep))) for width in residual]
            removed: tuple[str, ...] = ()
            if remove_layers and epoch == reconfiguration_epochs[-1] and counts[-1] > 1:
                counts[-1] -= 1
                gone = f"layer{len(counts)}.{counts[-1]}."
                removed = tuple(layer.name for layer in before.layers if layer.name.startswith(gone))
            network = residual_network(
                residual, counts, inner=inner, input_shape=input_shape, num_classes=num_classes, name=model
            )
            new_batch, scale = batch + batch_step, (batch + batch_step) / batch
            if network.id not in known:
                known.add(network.id)
                records.append(Architecture(id=network.id, network=network))
            records.append(
                Reconfiguration(
                    epoch=epoch,
                    before=before.id,
                    after=network.id,
                    channels_removed=_channels(before) - _channels(network),
                    layers_removed=removed,
                    measured_duration_s=0.25,
                    batch_before=batch,
                    batch_after=new_batch,
                    learning_rate_scale=scale,
                    predicted_memory_bytes=peak_memory(network, new_batch, precision),
                )
            )
            batch, learning_rate = new_batch, learning_rate * scale
    if status is not None:
        records.append(
            End(
                status=status,
                reason=None if status == "clean" else "KeyboardInterrupt",
                epochs=recorded,
                final_accuracy=0.9 if status == "clean" else None,
                wall_s=wall,
                num_iterations=iterations,
                energy_j=joules if energy and info.kind == "cuda" else None,
            )
        )
    return records


def shrinking_trace(path: Path, *, truncated: bool = False, **options: object) -> Path:
    """Write `shrinking_records(**options)` to `path` (a file, or an existing folder) and return the file.

    With `truncated`, the last line is torn in the middle, as by a crash while it was written.
    """
    return write_trace(path, shrinking_records(**options), truncated=truncated)  # type: ignore[arg-type] # any option


def dense_trace(path: Path, *, truncated: bool = False, **options: object) -> Path:
    """The dense baseline of `shrinking_trace`: the same run with the penalty ratio at 0."""
    return shrinking_trace(path, truncated=truncated, **{**options, "penalty_ratio": 0.0})


def write_trace(path: Path, records: Sequence[AnyRecord], *, truncated: bool = False) -> Path:
    """Write any records as a trace; parents are made."""
    file = path / "trace.jsonl" if path.is_dir() else path
    file.parent.mkdir(parents=True, exist_ok=True)
    with TraceWriter(file) as writer:
        for record in records:
            writer.write(record)
    if truncated:
        data = file.read_bytes()
        last_line = data.rstrip(b"\n").rsplit(b"\n", 1)[-1]
        file.write_bytes(data[: -len(last_line) // 2])
    return file


def _channels(network: Network) -> int:
    return sum(layer.out_channels for layer in network.layers if layer.kind is LayerKind.CONV)


def _epoch(
    epoch: int,
    planned: int,
    network: Network,
    dense: Network,
    profile: Profile,
    device: DeviceInfo,
    num_train: int,
    world_size: int,
    learning_rate: float,
    jitter: float,
) -> Epoch:
    iterations = num_train // (profile.batch * world_size)
    exposed = 0.0 if world_size == 1 else 0.1 * profile.backward_s
    median = profile.step_s + exposed
    waited = 0.05 * median
    wall = iterations * (median + waited)
    progress = (epoch + 1) / planned
    energy = wall * 300.0
    peak = peak_memory(network, profile.batch, profile.precision)
    removed = 1 - network.num_parameters / dense.num_parameters
    return Epoch(
        epoch=epoch,
        architecture=network.id,
        batch_per_gpu=profile.batch,
        world_size=world_size,
        learning_rate=learning_rate,
        num_iterations=iterations,
        num_images=iterations * profile.batch * world_size,
        penalty_coefficient=1e-4 if profile.regularizer_s else 0.0,
        train_loss=2.3 * (1 - 0.9 * progress),
        penalty=3.0 * (1 - 0.5 * progress) if profile.regularizer_s else 0.0,
        train_accuracy=0.1 + 0.85 * progress,
        validation_loss=2.3 * (1 - 0.8 * progress),
        validation_accuracy=0.1 + 0.8 * progress,
        channel_sparsity=1 - _channels(network) / _channels(dense),
        weight_sparsity=removed,
        measured_time=EpochTime(
            wall_s=wall,
            data_wait_s=iterations * waited,
            forward_s=iterations * profile.forward_s,
            backward_s=iterations * profile.backward_s,
            regularizer_s=iterations * profile.regularizer_s,
            optimizer_s=iterations * profile.optimizer_s,
            exposed_communication_s=iterations * exposed,
            validation_s=0.1 * wall,
        ),
        measured_step=StepDistribution(
            median_s=median, p10_s=median * (1 - jitter), p90_s=median * (1 + jitter), std_s=median * jitter / 1.2816
        ),
        allreduce_bytes=4 * network.num_parameters * iterations if world_size > 1 else 0,
        peak_memory_bytes=peak,
        device=DeviceUse(
            energy_j=energy,
            power_w=300.0,
            sm_clock_hz=1.41e9,
            memory_clock_hz=1.215e9,
            temperature_c=55.0,
            utilization=0.95,
            peak_memory_bytes=peak + 600 * 2**20,
        )
        if device.kind == "cuda"
        else None,
        densities=tuple(
            LayerDensity(layer=layer.name, input_channels=1.0, output_channels=0.9, weights=0.85)
            for layer in network.layers
            if layer.kind in (LayerKind.CONV, LayerKind.LINEAR)
        ),
    )
