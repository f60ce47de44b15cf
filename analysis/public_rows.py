"""The published measurements of traces/public as cases that the model can be compared with."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import re
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from ptsim.costs.datasheet import (
    Chip,
    Efficiency,
    Host,
    chip_of,
    kernel_seconds,
    launch_order,
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
from ptsim.costs.software import Update, again_of, is_young, update_of, zeroing_of
from ptsim.hardware.catalog import load_device
from ptsim.network import Layer, LayerKind, Network, Precision
from ptsim.setting import StepSetting, TorchVersion

PUBLIC = Path(__file__).parent.parent / "traces" / "public"
FILES = ("training", "training_depthwise", "training_later")
# Two rows are the same measurement, published twice, if these are equal and their speeds are within this share.
SAME_TEST = ["source", "device", "precision", "memory_format", "model", "image_size", "batch"]
SAME_SPEED = 0.01
# The version of PyTorch in NVIDIA's containers, from the first with each on (release notes of the containers), and when
# each version was released, for rows that say neither.
CONTAINERS = {
    (19, 1): (1, 1), (20, 1): (1, 4), (20, 2): (1, 5), (20, 6): (1, 6), (20, 8): (1, 7), (20, 11): (1, 8),
    (21, 3): (1, 9), (21, 7): (1, 10), (21, 11): (1, 11), (22, 4): (1, 12), (22, 6): (1, 13), (23, 3): (2, 0),
}  # fmt: skip
RELEASES = {
    "": (1, 0), "2019": (1, 1), "2020-01": (1, 4), "2020-04": (1, 5), "2020-07": (1, 6), "2020-10": (1, 7),
    "2021-03": (1, 8), "2021-06": (1, 9), "2021-10": (1, 10), "2022-03": (1, 11), "2022-06": (1, 12),
    "2022-10": (1, 13), "2023-03": (2, 0),
}  # fmt: skip
# Whose EfficientNets of April 2020 have SiLU as x * sigmoid(x): torch had no operator for it yet (effnet.py as of
# 1caf15bb).
PYCLS = "https://github.com/facebookresearch/pycls"
# Its RegNets that torchvision does not have, or has with other widths: blocks and channels of each stage, and channels
# of a group (configs/dds_baselines and pycls/models/regnet.py as of 1caf15bb).
REGNETS = {
    "regnet_x_200mf": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnet_x_400mf": ((1, 2, 7, 12), (32, 64, 160, 384), 16),
    "regnet_x_600mf": ((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "regnet_x_4gf": ((2, 5, 14, 2), (80, 240, 560, 1360), 40),
    "regnet_x_6_4gf": ((2, 4, 10, 1), (168, 392, 784, 1624), 56),
    "regnet_x_12gf": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "regnet_y_200mf": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnet_y_600mf": ((1, 3, 7, 4), (48, 112, 256, 608), 16),
    "regnet_y_800mf": ((1, 3, 8, 2), (64, 128, 320, 768), 16),
    "regnet_y_4gf": ((2, 6, 12, 2), (128, 192, 512, 1088), 64),
    "regnet_y_6_4gf": ((2, 7, 14, 2), (144, 288, 576, 1296), 72),
    "regnet_y_8gf": ((2, 4, 10, 1), (168, 448, 896, 2016), 56),
    "regnet_y_12gf": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
}
PAGEABLE_BYTES_PER_S = 6e9  # host to device copy of pageable memory over PCIe 3; nuisance of 14 rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: its kernels, the chip, what was measured and what the row says about itself."""

    kernels: Kernels
    chip: Chip
    update: Update
    num_zeroed: int  # tensors that the host zeroes before the GPU gets work, in steps that are timed one by one
    extra_s: float
    seconds: float
    device: str
    model: str
    machine: str  # whose host launched: source and device
    row: pd.Series
    young: bool  # of software that had not learned its GPU's generation yet
    tells: bool  # measured with PyTorch on one GPU: TensorFlow's and deduced ones serve the fit, and test nothing


@functools.lru_cache(maxsize=1)
def networks() -> dict[str, Network]:
    """The captured networks by name."""
    return msgspec.json.decode(gzip.decompress((PUBLIC / "networks.json.gz").read_bytes()), type=dict[str, Network])


def training_table() -> pd.DataFrame:
    """The trimmed collection, rows of a network with depthwise convolutions, of which it has none, and later rows.

    Where a table does not say so, images are of 224 × 224 pixels and the optimizer is SGD with momentum.
    """
    table = pd.concat([pd.read_csv(PUBLIC / f"{name}.csv") for name in FILES], ignore_index=True)
    defaults = {"image_size": 224, "optimizer": "sgd"}
    return table.fillna(defaults).astype({"image_size": int}).assign(deduced=False)


def many_table(name: str = "training_many") -> pd.DataFrame:
    """The published rows of many GPUs: those of the fit, or "training_unseen", which no fit has seen."""
    return pd.read_csv(PUBLIC / f"{name}.csv")


def network_table() -> pd.DataFrame:
    """Published rows that say what a network adds to a step of one GPU which the source does not name.

    `device` is a board that it may be. `reduction`: "BSP" is one all-reduce after the backward pass; the others merge
    gradients, much as DDP's buckets do.
    """
    return pd.read_csv(PUBLIC / "training_network.csv")


def alone_table() -> pd.DataFrame:
    """What the tests of many GPUs say of one GPU that `training_table` does not have, in its columns.

    Steps that were synchronised and timed one by one are left out: no row of one GPU is timed so without a copy.
    """
    many = many_table()
    many = many[many.alone_images_per_s.notna() & ~many.stepwise]
    alone = many.drop(columns="images_per_s").rename(columns={"alone_images_per_s": "images_per_s"})
    alone = alone.drop_duplicates([*SAME_TEST, "software", "images_per_s"])
    known = alone.reset_index().merge(training_table()[[*SAME_TEST, "images_per_s"]], on=SAME_TEST)
    alike = (known.images_per_s_x / known.images_per_s_y - 1).abs() < SAME_SPEED
    return one_gpu_rows(alone.drop(index=known["index"][alike].unique()), deduced=False)


def one_gpu_rows(rows: pd.DataFrame, *, deduced: bool) -> pd.DataFrame:
    """Rows of many GPUs, whose `images_per_s` are one GPU's, in the columns of `training_table`."""
    how = {"framework": "PyTorch", "whole_model_fp16": False, "with_optimizer": True, "host_copy": False}
    return rows.assign(**how, deduced=deduced)


def version_of(row: pd.Series) -> TorchVersion | None:
    """The version of PyTorch that a row was measured with, by its software or at the latest by its date.

    TensorFlow's rows have none, and are predicted as if by today's PyTorch.
    """
    if row.get("framework") == "TensorFlow":
        return None
    found = (
        re.search(r"(?:NGC |pytorch-)(\d\d)\.(\d\d)", row.software),
        re.search(r"(?i)torch (\d+)\.(\d+)", row.software),
    )
    container, torch = (tuple(map(int, match.groups())) if match else None for match in found)
    if container is None and torch is not None:
        return TorchVersion(*torch)
    known, at = (CONTAINERS, container) if container else (RELEASES, f"{row.date}-12"[:7])
    return TorchVersion(*known[max(since for since in known if since <= at)])


def setting_of(row: pd.Series) -> StepSetting:
    """How a row's step was run."""
    return StepSetting(
        batch=int(row.batch),
        precision=Precision(row.precision),
        memory_format=row.memory_format,
        optimizer=row.optimizer,
        momentum=0.9,
        torch_version=version_of(row),
    )


def steps_per_update(row: pd.Series, num_gpus: int) -> int:
    """How many steps of a row's program on so many GPUs make one update.

    `optimizer_batch` says how many images an update is to be of; what is short of a step's own images is every step.
    """
    images = row.get("optimizer_batch", np.nan)
    return 1 if pd.isna(images) else max(1, int(images / (num_gpus * row.batch)))


def _mean_update(row: pd.Series, network: Network, setting: StepSetting) -> Update:
    """What gradients and parameters cost a step of a row of one GPU besides forward and backward, in the mean."""
    if not row.with_optimizer:
        return zeroing_of(network, setting)
    steps = steps_per_update(row, 1)
    both = zip(update_of(network, setting), again_of(network, setting), strict=True)
    return Update(*((update + (steps - 1) * again) / steps for update, again in both))


def network_name(row: pd.Series) -> str:
    """The key of a row's network in networks.json.gz."""
    own = row.source == PYCLS and (row.model in REGNETS or row.model.startswith("efficientnet"))
    library = "pycls" if own else "torchvision"
    return f"{library}:{row.model}@{row.image_size}"


@functools.lru_cache(maxsize=1)
def training_cases() -> list[Case]:
    """One case per training row of one GPU, TensorFlow's too."""
    return cases_of(pd.concat([training_table(), alone_table()], ignore_index=True))


def cases_of(table: pd.DataFrame) -> list[Case]:
    """One case per row of such a table."""
    cases = []
    for _, row in table.iterrows():
        device, precision = load_device(row.device), Precision(row.precision)
        network, setting = networks()[network_name(row)], setting_of(row)
        zeroed = row.host_copy and not setting.groups_updates
        kernels = network_kernels(network, setting, tensor_cores=uses_tensor_cores(device, precision))
        images = row.batch * int(np.prod(network.input_shape))
        cases.append(
            Case(
                kernels=kernels,
                chip=chip_of(device, precision),
                update=_mean_update(row, network, setting),
                num_zeroed=len(network.gradients) if zeroed else 0,
                extra_s=4 * images / PAGEABLE_BYTES_PER_S if row.host_copy else 0.0,
                seconds=row.batch / row.images_per_s,
                device=row.device,
                model=row.model,
                machine=f"{row.source} {row.device}",
                row=row,
                young=is_young(device, setting.torch_version),
                tells=row.framework == "PyTorch" and not row.deduced,
            )
        )
    return cases


@functools.lru_cache(maxsize=1)
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


class Predictor:
    """Predicts all cases at once for any efficiencies; kernels that are alike are evaluated once."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        orders = [launch_order(case.kernels) for case in cases]
        sizes = np.array([len(order) for order in orders])
        self.starts = np.concatenate([[0], sizes.cumsum()[:-1]])
        self.owner = np.repeat(np.arange(len(cases)), sizes)
        columns = {
            name: np.concatenate(
                [getattr(case.kernels, name)[order] for case, order in zip(cases, orders, strict=True)]
            )
            for name in Kernels.__struct_fields__
        }
        chips = {name: np.array([getattr(case.chip, name) for case in cases]) for name in Chip.__struct_fields__}
        _, chip_of_case = np.unique(np.stack(list(chips.values())), axis=1, return_inverse=True)
        relevant = [value for name, value in columns.items() if name != "layer"]
        table = np.stack([chip_of_case[self.owner].astype(np.float64), *(np.asarray(v, np.float64) for v in relevant)])
        _, first, self.alike = np.unique(table, axis=1, return_index=True, return_inverse=True)
        self.kernels = Kernels(**{name: value[first] for name, value in columns.items()})
        self.chip = Chip(**{name: value[self.owner[first]] for name, value in chips.items()})
        self.forward, self.backward = (
            self._cumulated(columns["launches"] * ((columns["step"] == Pass.FORWARD) == forward))
            for forward in (True, False)
        )
        self.bandwidth = np.array([case.chip.bandwidth_bytes_per_s for case in cases])
        updates = [case.update for case in cases]
        self.update_bytes = np.array([update.num_bytes for update in updates])
        self.update_kernels = np.array([update.num_kernels for update in updates])
        self.update_launches = np.array([update.num_launches for update in updates])
        self.zeroed = np.array([case.num_zeroed for case in cases])
        self.extra = np.array([case.extra_s for case in cases])
        self.seconds = np.array([case.seconds for case in cases])

    def __call__(self, efficiency: Efficiency) -> Floats:
        """Seconds of the GPU's work of every case, without waiting for the host."""
        total: Floats = np.bincount(self.owner, self.kernel_seconds(efficiency), len(self.cases))
        return total + self.update_seconds(efficiency) + self.extra

    def kernel_seconds(self, efficiency: Efficiency) -> Floats:
        """Seconds of every kernel of every case in the order that they are launched."""
        seconds: Floats = kernel_seconds(self.kernels, self.chip, efficiency)[self.alike]
        return seconds

    def update_seconds(self, efficiency: Efficiency) -> Floats:
        """Seconds of every case's update on the GPU."""
        moved_s: Floats = self.update_bytes / (efficiency.stream_bandwidth * self.bandwidth)
        return moved_s + self.update_kernels * efficiency.launch_s

    def steps(self, kernels_s: Floats, update_s: Floats, host: Host, *, gpu: Floats, hosts: Floats) -> Floats:
        """Seconds of every step, as `ptsim.costs.datasheet.waiting_seconds` has it.

        Args:
            kernels_s: from `kernel_seconds`.
            update_s: from `update_seconds`.
            host: what a host needs.
            gpu: factors of every case's work on the GPU.
            hosts: factors of its host's work.
        """
        seconds = kernels_s * gpu[self.owner]
        done = self._cumulated(seconds)
        total = np.bincount(self.owner, seconds, len(self.cases))
        launched = (host.forward_s * self.forward + host.backward_s * self.backward) * hosts[self.owner]
        first = launched[self.starts]
        waits = np.maximum.reduceat(launched - done + seconds, self.starts) - first
        ends = np.concatenate([self.starts[1:], [len(launched)]]) - 1
        late = launched[ends] - first + self.update_launches * host.update_s * hosts - total - update_s * gpu
        before = self.zeroed * host.update_s * hosts + self.extra
        steps: Floats = total + update_s * gpu + np.maximum(np.maximum(waits, late), 0.0) + before
        return steps

    def _cumulated(self, values: Floats) -> Floats:
        sums = np.cumsum(values)
        before: Floats = (sums - values)[self.starts]
        cumulated: Floats = sums - before[self.owner]
        return cumulated


def _layer_case(kernel: Kernel, row: pd.Series, device: str, precision: Precision) -> Case:
    return Case(
        kernels=Kernels.of([kernel]),
        chip=chip_of(load_device(device), precision),
        update=Update(),
        num_zeroed=0,
        extra_s=0.0,
        seconds=row.seconds,
        device=device,
        model="layer",
        machine="",
        row=row,
        young=False,
        tells=False,
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
