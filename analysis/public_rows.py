"""The published measurements of traces/public as cases that the model can be compared with."""

from __future__ import annotations

import dataclasses
import functools
import gzip
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from ptsim.costs.datasheet import (
    Chip,
    Efficiency,
    chip_of,
    kernel_seconds,
    update_bytes,
    uses_tensor_cores,
)
from ptsim.costs.kernels import (
    Floats,
    Kernel,
    Kernels,
    Pass,
    Work,
    convolution_kernels,
    network_kernels,
    product_kernels,
)
from ptsim.hardware.catalog import load_device
from ptsim.network import Layer, LayerKind, Network, Precision

PUBLIC = Path(__file__).parent.parent / "traces" / "public"
FIT_FILES = ("training", "training_depthwise")
FILES = (*FIT_FILES, "training_later")
# First board of a generation, and PyTorch releases: how old the software was for the chips.
RELEASED = {"pascal": 2016.4, "volta": 2017.5, "turing": 2018.7, "ampere": 2020.5, "ada": 2022.8, "hopper": 2022.8,
            "blackwell": 2024.9}  # fmt: skip
TORCH_RELEASED = {
    1.04: 2020.0,
    1.06: 2020.6,
    1.07: 2020.8,
    1.08: 2021.1,
    1.09: 2021.5,
    1.12: 2022.5,
    1.13: 2022.8,
    2.03: 2024.2,
    2.05: 2024.8,
    2.07: 2025.3,
}
PAGEABLE_BYTES_PER_S = 6e9  # host to device copy of pageable memory over PCIe 3; nuisance of 14 rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: its kernels, the chip, what was measured and what the row says about itself."""

    kernels: Kernels
    chip: Chip
    update_bytes: float
    num_tensors: int
    extra_s: float
    seconds: float
    device: str
    model: str
    row: pd.Series
    age_years: float | None  # of the software at the time, counted from the GPU's release


@functools.lru_cache(maxsize=1)
def networks() -> dict[str, Network]:
    """The captured networks by name."""
    return msgspec.json.decode(gzip.decompress((PUBLIC / "networks.json.gz").read_bytes()), type=dict[str, Network])


def training_table() -> pd.DataFrame:
    """The trimmed collection, rows of a network with depthwise convolutions, of which it has none, and later rows.

    Where a table does not say so, images are of 224 × 224 pixels and the optimizer is SGD with momentum.
    """
    files = {name: pd.read_csv(PUBLIC / f"{name}.csv") for name in FILES}
    table = pd.concat([rows.assign(file=name) for name, rows in files.items()], ignore_index=True)
    defaults = {"image_size": 224, "optimizer": "sgd"}
    return table.fillna(defaults).astype({"image_size": int})


def network_name(row: pd.Series) -> str:
    """The key of a row's network in networks.json.gz."""
    return f"torchvision:{row.model}@{row.image_size}"


def training_cases(files: tuple[str, ...] = FIT_FILES) -> list[Case]:
    """One case per training row of these files, TensorFlow's too."""
    cases = []
    table = training_table()
    for _, row in table[table.file.isin(files)].iterrows():
        device, precision = load_device(row.device), Precision(row.precision)
        network = networks()[network_name(row)]
        kernels = network_kernels(
            network,
            batch=row.batch,
            precision=precision,
            memory_format=row.memory_format,
            tensor_cores=uses_tensor_cores(device, precision),
        )
        images = row.batch * int(np.prod(network.input_shape))
        cases.append(
            Case(
                kernels=kernels,
                chip=chip_of(device, precision),
                update_bytes=update_bytes(network, row.optimizer, precision) if row.with_optimizer else 0.0,
                num_tensors=len(network.parameters) if row.with_optimizer else 0,
                extra_s=4 * images / PAGEABLE_BYTES_PER_S if row.host_copy else 0.0,
                seconds=row.batch / row.images_per_s,
                device=row.device,
                model=row.model,
                row=row,
                age_years=TORCH_RELEASED[row.torch] - RELEASED[device.architecture] if row.torch == row.torch else None,
            )
        )
    return cases


def layer_cases() -> list[Case]:
    """DeepBench's convolutions and products, and single convolutions with odd channel counts."""
    cases = []
    for _, row in pd.read_csv(PUBLIC / "layers.csv").iterrows():
        device, precision = load_device(row.device), Precision(row.precision)
        element = precision.activation_bytes
        kernel = _deepbench_kernel(row, element, uses_tensor_cores(device, precision) and element == 2)
        cases.append(_layer_case(kernel, row, device.name, precision))
    for _, row in pd.read_csv(PUBLIC / "odd_channels.csv").iterrows():
        padding = (row.k - 1) // 2 if row.pad_mode == "SAME" else 0
        layer = _convolution(row.in_c, row.out_c, (row.k, row.k), (row.stride, row.stride), (padding, padding),
                             (row.in_hw, row.in_hw), (row.out_hw, row.out_hw))  # fmt: skip
        kernel = next(
            k
            for k in convolution_kernels(layer, batch=int(row.batch), element=4, foreign=True)
            if k.step is Pass.FORWARD
        )
        cases.append(_layer_case(kernel, row, row.device, Precision.FP32))
    return cases


def is_depthwise(case: Case) -> bool:
    """Whether the network has depthwise convolutions."""
    return bool((case.kernels.work == Work.DEPTHWISE).any())


def stack(cases: list[Case]) -> tuple[Kernels, Chip, Floats]:
    """The kernels of all cases as one table, with the chip as columns, and each kernel's case."""
    sizes = [len(case.kernels.layer) for case in cases]
    owner = np.repeat(np.arange(len(cases)), sizes)
    kernels = Kernels(
        **{name: np.concatenate([getattr(case.kernels, name) for case in cases]) for name in Kernels.__struct_fields__}
    )
    chip = Chip(
        **{name: np.array([getattr(case.chip, name) for case in cases])[owner] for name in Chip.__struct_fields__}
    )
    return kernels, chip, owner


class Predictor:
    """Predicts all cases at once for any efficiencies."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self.kernels, self.chip, self.owner = stack(cases)
        self.bandwidth = np.array([case.chip.bandwidth_bytes_per_s for case in cases])
        self.update = np.array([case.update_bytes for case in cases])
        self.extra = np.array([case.extra_s for case in cases])
        self.seconds = np.array([case.seconds for case in cases])

    def __call__(self, efficiency: Efficiency) -> Floats:
        """Seconds of every case."""
        seconds = kernel_seconds(self.kernels, self.chip, efficiency)
        total = np.bincount(self.owner, seconds, len(self.cases))
        return total + self.update / (efficiency.stream_bandwidth * self.bandwidth) + self.extra


def _layer_case(kernel: Kernel, row: pd.Series, device: str, precision: Precision) -> Case:
    return Case(
        kernels=Kernels.of([kernel]),
        chip=chip_of(load_device(device), precision),
        update_bytes=0.0,
        num_tensors=0,
        extra_s=0.0,
        seconds=row.seconds,
        device=device,
        model="layer",
        row=row,
        age_years=None,
    )


def _deepbench_kernel(row: pd.Series, element: int, halves: bool) -> Kernel:
    if row.op == "gemm":
        return next(product_kernels(row.m, row.n, row.k, element=element))
    stride = (int(row.stride_h), int(row.stride_w))
    padding = (int(row.pad_h), int(row.pad_w))
    size, kernel = (int(row.in_h), int(row.in_w)), (int(row.kh), int(row.kw))
    out = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True))
    layer = _convolution(row.in_c, row.out_c, kernel, stride, padding, size, out)
    step = {"forward": Pass.FORWARD, "backward_data": Pass.INPUT_GRADIENT, "backward_weight": Pass.WEIGHT_GRADIENT}
    kernels = convolution_kernels(layer, batch=int(row.batch), element=element, foreign=halves, halves=halves)
    return next(k for k in kernels if k.step is step[row.phase])


def _convolution(
    in_channels: float,
    out_channels: float,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
    out: tuple[int, ...],
) -> Layer:
    return Layer(
        name="conv",
        kind=LayerKind.CONV,
        op="conv2d",
        in_channels=int(in_channels),
        out_channels=int(out_channels),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        input_shapes=((int(in_channels), int(size[0]), int(size[1])),),
        output_shape=(int(out_channels), int(out[0]), int(out[1])),
    )
