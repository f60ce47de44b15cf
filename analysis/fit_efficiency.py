"""Which efficiencies explain the published measurements: fits ptsim/costs/efficiency.toml from traces/public/.

    python analysis/fit_efficiency.py            # rewrites ptsim/costs/efficiency.toml

A maximum a posteriori fit: every parameter has a prior from hardware documentation or experience, residuals are of
log(predicted / measured) under a robust loss. The frameworks of the single-layer campaigns and the machines' hosts have
parameters in the fit only. Predictions keep what young software takes longer, and the factor of a GPU.
Rows of several GPUs are deduced with what `analysis/fit_scaling.py` wrote, which is to be run before this. The
intervals come from `analysis/cross_validate.py`, which is to be run after it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import tomli_w
from fit_scaling import deduced_rows
from public_rows import Case, Predictor, cases_of, layer_cases, training_cases
from residuals import chip_name

from ptsim.costs.datasheet import Efficiency, Fit, Host, device_factor
from ptsim.costs.kernels import Floats
from ptsim.costs.scaling import load_scaling
from ptsim.hardware.catalog import load_device
from ptsim.textfile import write_whole

OUT = Path(__file__).parent.parent / "ptsim" / "costs" / "efficiency.toml"

# Prior median and standard deviation of the logarithm.
PRIORS = {
    "simt": (0.9, 0.1),  # hand-written sgemm sustains nine tenths of the peak
    "tensor": (0.9, 0.1),
    # cuBLAS in fp32: 24 TFLOP/s on RTX 3090, 53 to 55 on RTX 4090, 18.9 of 19.5 on A100 (github.com:
    # mli/transformers-benchmarks issue 3, zzc0721/torch-performance-test-data issue 78, Yinghan-Li/YHs_Sample issue 4).
    "wide": (0.7, 0.07),
    "feed_bytes_per_clock": (
        16,
        0.7,
    ),  # the L2 cache gives an SM up to 64 bytes per clock; prologues and misses eat most
    "ramp": (32, 0.7),  # one or two steps of a block's pipeline
    "latency": (0.3, 0.25),
    "winograd": (2.0, 0.3),  # F(2×2) multiplies 2.25 times less, F(4×4) 4 times
    "input_gradient": (0.95, 0.1),
    "weight_gradient": (0.85, 0.15),
    "strided": (0.6, 0.3),
    "product_bandwidth": (0.8, 0.15),
    "stream_bandwidth": (0.88, 0.08),  # BabelStream reaches 0.85 to 0.93 from Volta on
    "norm_bandwidth": (0.75, 0.15),
    "layout_bandwidth": (0.75, 0.2),
    # Four elements a thread (ATen's vectorised kernels), 2,048 threads an SM, some 900 clocks to memory and back.
    "elements_per_clock": (9, 0.4),
    "norm_block": (2.0, 0.5),  # a block has half of the threads that an SM may hold, and loads in flight decide
    "pascal_bandwidth": (0.82, 0.06),  # the Volta white paper's 1.5 × delivered over 1.23 × stated
    "depthwise_bandwidth": (0.5, 0.3),  # neighbouring taps find their input in the caches, mostly
    "depthwise_rate": (0.1, 0.5),  # some ten instructions per tap
    "depthwise_base": (10, 0.7),  # a pixel's own addresses, its load and its store
    "depthwise_halves": (2.0, 0.4),  # two or more values per instruction
    "odd_groups": (0.2, 0.7),  # a direct kernel on the CUDA cores
    "hiding": (3.0, 0.4),
    "overlap": (3.0, 0.4),
    "launch_s": (3e-6, 0.1),
    "product_s": (8e-6, 0.4),
    "boost": (1.1, 0.04),  # GeForce boards run 5 to 15 % above the stated boost clock
    "cache": (2.0, 0.2),  # L2 over memory bandwidth
    "throttle": (0.5, 0.3),  # power goes with the square to the cube of the clock, and not all of it is the SMs'
}
NUISANCE = {
    "young_software": (0.15, 0.4),  # slower by this
    "tensorflow_layers": (1.0, 0.3),
    "cudnn6_layers": (1.0, 0.3),
    "cudnn7_layers": (1.0, 0.3),
}
# Seconds that eager PyTorch's host needs per forward kernel, per backward kernel, per tensor of the update. The first
# prior: inference with a mini-batch of 1 on NVIDIA's own servers (DeepLearningExamples) takes 9.33 ms for the 248
# operators of EfficientNet-B0 (efficientnet/README.md at 0107cf27e71b, A100), 10.37 and 7.12 ms for ResNet-50's 175
# (resnet50v1.5/README.md at 291f0d02e815 and 3bbe228d3895, V100): 38, 59 and 41 µs. Backward: autograd's engine has no
# Python in it. The update is not visible in the rows: it is assumed to run on lists of tensors.
HOST = {"forward_s": (45e-6, 0.3), "backward_s": (25e-6, 0.5)}
UPDATE_S = 8e-6
MACHINE_SD = 0.6  # of the logarithm of a host's own factor
CHIP_SD, BOARD_SD = 0.09, 0.04  # of the logarithm of a chip's own factor, and of its boards' beside it
TRAINING_SD, LAYER_SD = 0.07, 0.25  # of one measurement of a network, of one layer
STEPWISE_SD = 0.25  # of steps that are timed one by one with the copy of the images, the GPU idle between them
UNUSUAL_SD = (
    0.2  # times the share of the step in depthwise and grouped convolutions, whose kernels changed between releases
)
WAITING_SD = 0.6  # times the share of the step that the GPU waits: hosts are not one number
GROUP_WEIGHT = 1.0  # a group of layer rows (GPU, precision, operator, pass) counts as so many rows
TENSORFLOW_WEIGHT = 0.3
STEP = 1e-3  # of a logarithm, for derivatives
TENSORFLOW_FLOOR_S = 2e-4  # what a session run costs beyond the layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """The outcome of one fit."""

    efficiency: Efficiency
    host: Host
    nuisance: dict[str, float]
    device_factor: dict[str, float]
    machine_factor: dict[str, float]
    cost: float

    def shipped(self, known: Iterable[str]) -> Fit:
        """What `efficiency.toml` would hold if these were the GPUs with rows."""
        return Fit(
            efficiency=self.efficiency,
            host=self.host,
            devices={device: self.device_factor[device] for device in known},
            young_software=self.nuisance["young_software"],
        )

    def predict(self, networks: Predictor, fit: Fit) -> Floats:
        """Seconds of training cases as `fit` predicts them, with the software of their time."""
        gpu = np.array([device_factor(load_device(case.device), fit) or 1.0 for case in networks.cases])
        return networks.steps(
            networks.kernel_seconds(fit.efficiency),
            networks.update_seconds(fit.efficiency),
            fit.host,
            gpu=gpu * _youth(networks.cases, self.nuisance["young_software"]),
            hosts=np.ones(len(networks.cases)),
        )


class Problem:
    """The fit's parameters as a vector of logarithms, and its residuals: rows, then priors."""

    def __init__(self, training: list[Case], layers: list[Case]) -> None:
        self.networks, self.singles = Predictor(training), Predictor(layers)
        self.named = PRIORS | NUISANCE | HOST
        self.devices = sorted({case.device for case in training})
        chips = [chip_name(device) for device in self.devices]
        self.chips = sorted(set(chips))
        self.chip_of = np.array([self.chips.index(chip) for chip in chips], np.intp)
        self.machines = sorted({case.machine for case in training})
        self.device_of = np.array([self.devices.index(case.device) for case in training], np.intp)
        self.machine_of = np.array([self.machines.index(case.machine) for case in training], np.intp)
        campaigns = [_campaign(case) for case in layers]
        self.campaign_of = np.array([list(NUISANCE).index(name) for name in campaigns], np.intp)
        self.floor = np.array([TENSORFLOW_FLOOR_S if name == "tensorflow_layers" else 0.0 for name in campaigns])
        own = len(self.devices) + len(self.chips) + len(self.machines)
        self.center = np.concatenate([np.log([center for center, _ in self.named.values()]), np.zeros(own)])
        self.spread = np.concatenate(
            [
                [sd for _, sd in self.named.values()],
                np.full(len(self.devices), BOARD_SD),
                np.full(len(self.chips), CHIP_SD),
                np.full(len(self.machines), MACHINE_SD),
            ]
        )
        self.sd = np.full(len(training), TRAINING_SD)
        at_priors = self._kernels(self.center)
        self.sd = np.array(self._row_sd(at_priors))

    def weights(self, training: npt.NDArray[np.bool_], layers: npt.NDArray[np.bool_]) -> Floats:
        """Square roots of the weights of rows and priors, where these rows are kept."""
        parts = [np.zeros(len(training)), np.zeros(len(layers)), np.ones(len(self.center))]
        kept = [case for case, keep in zip(self.networks.cases, training, strict=True) if keep]
        parts[0][training] = _training_weight(kept)
        parts[1][layers] = _layer_weight([case for case, keep in zip(self.singles.cases, layers, strict=True) if keep])
        return np.concatenate(parts)

    def residuals(self, x: Floats, kernels: tuple[Floats, Floats, Floats] | None = None) -> Floats:
        """Of every row and prior, without their weights; `kernels` may be what `_kernels` gives for this x."""
        kernel_s, update_s, layer_s = kernels or self._kernels(x)
        values = np.exp(x)
        young, layer_nuisance = values[len(PRIORS)], values[len(PRIORS) : len(PRIORS) + len(NUISANCE)]
        at = len(self.named)
        host = Host(forward_s=values[at - 2], backward_s=values[at - 1], update_s=UPDATE_S)
        gpu, hosts = self._factors(values)
        step = self.networks.steps(
            kernel_s,
            update_s,
            host,
            gpu=gpu[self.device_of] * _youth(self.networks.cases, young),
            hosts=hosts[self.machine_of],
        )
        layer = layer_s * layer_nuisance[self.campaign_of] + self.floor
        return np.concatenate(
            [
                _robust(np.log(step / self.networks.seconds) / self.sd),
                _robust(np.log(layer / self.singles.seconds) / LAYER_SD),
                (x - self.center) / self.spread,
            ]
        )

    def jacobian(self, x: Floats) -> npt.NDArray[np.float64]:
        """Of `residuals`, by differences."""
        kernels = self._kernels(x)
        base = self.residuals(x, kernels)
        columns = []
        for index in range(len(x)):
            moved = x.copy()
            moved[index] += STEP
            columns.append((self.residuals(moved, None if index < len(PRIORS) else kernels) - base) / STEP)
        return np.stack(columns, axis=1)

    def solve(self, weights: Floats, start: Floats | None = None, jacobian: Floats | None = None) -> Floats:
        """The parameters at which the weighted residuals are least.

        With a Jacobian from near by, that one serves throughout, which costs a hundredth and is how rows are left out.
        """
        x = self.center if start is None else start
        best = self.residuals(x) * weights
        for _ in range(40):
            matrix = (self.jacobian(x) if jacobian is None else jacobian) * weights[:, None]
            step = np.linalg.lstsq(matrix, -best, rcond=None)[0]
            step *= min(1.0, 0.5 / np.abs(step).max())
            for size in (1.0, 0.5, 0.25, 0.1):
                moved = self.residuals(x + size * step) * weights
                if moved @ moved < best @ best:
                    break
            else:
                break
            gain = 1 - (moved @ moved) / (best @ best)
            x, best = x + size * step, moved
            if gain < 1e-4:
                break
        return x

    def fitted(self, x: Floats, weights: Floats) -> Fitted:
        """The parameters by name."""
        values = np.exp(x).tolist()
        named = dict(zip(self.named, values[: len(self.named)], strict=True))
        residuals = self.residuals(x) * weights
        gpu, hosts = (factors.tolist() for factors in self._factors(np.exp(x)))
        return Fitted(
            efficiency=Efficiency(**{name: named[name] for name in PRIORS}),
            host=Host(**{name: named[name] for name in HOST}, update_s=UPDATE_S),
            nuisance={name: named[name] for name in NUISANCE},
            device_factor=dict(zip(self.devices, gpu, strict=True)),
            machine_factor=dict(zip(self.machines, hosts, strict=True)),
            cost=float(residuals @ residuals) / 2,
        )

    def _factors(self, values: Floats) -> tuple[Floats, Floats]:
        """The factors of GPUs, each its board's times its chip's, and of machines."""
        ends = np.cumsum([len(self.named), len(self.devices), len(self.chips)])
        _, boards, chips, machines = np.split(values, ends)
        return boards * chips[self.chip_of], machines

    def _kernels(self, x: Floats) -> tuple[Floats, Floats, Floats]:
        efficiency = Efficiency(**dict(zip(PRIORS, np.exp(x[: len(PRIORS)]).tolist(), strict=True)))
        networks, singles = self.networks, self.singles
        return networks.kernel_seconds(efficiency), networks.update_seconds(efficiency), singles(efficiency)

    def _row_sd(self, kernels: tuple[Floats, Floats, Floats]) -> Floats:
        seconds, update_s, _ = kernels
        networks = self.networks
        total = np.bincount(networks.owner, seconds, len(networks.cases)) + update_s
        unusual = (networks.kernels.groups > 1)[networks.alike]
        share = np.bincount(networks.owner, seconds * unusual, len(networks.cases)) / total
        ones = np.ones(len(networks.cases))
        host = Host(forward_s=HOST["forward_s"][0], backward_s=HOST["backward_s"][0], update_s=UPDATE_S)
        slow = networks.steps(seconds, update_s, host, gpu=ones, hosts=np.exp(MACHINE_SD) * ones)
        waits = 1 - (total + networks.extra) / slow
        usual = np.where(networks.extra > 0, STEPWISE_SD, TRAINING_SD)
        sd: Floats = np.sqrt(usual**2 + (UNUSUAL_SD * share) ** 2 + (WAITING_SD * waits) ** 2)
        return sd


def evidence() -> list[Case]:
    """Every row of one GPU, and what rows of many GPUs say of one.

    The latter by constants that are fitted on all sources, also where a source is left out then. With the constants
    that the fit without that source gives, they move by 0.1 to 0.4 % in the median, and by 2.3 % at most.
    """
    return [*training_cases(), *cases_of(deduced_rows(load_scaling()))]


def fit(training: list[Case], layers: list[Case]) -> Fitted:
    """The efficiencies that explain these cases best.

    Args:
        training: whole networks; their GPUs, and the machines they were measured on, get a factor each.
        layers: single layers.
    """
    problem = Problem(training, layers)
    weights = problem.weights(np.ones(len(training), np.bool_), np.ones(len(layers), np.bool_))
    return problem.fitted(problem.solve(weights), weights)


def _youth(cases: list[Case], share: float) -> Floats:
    return 1 + share * np.array([case.young for case in cases])


def _robust(z: Floats) -> Floats:
    """Residuals whose squares are the soft L1 loss of z."""
    return np.sign(z) * np.sqrt(2 * (np.sqrt(1 + z * z) - 1))


def _training_weight(cases: list[Case]) -> Floats:
    """Rows of one GPU, and of one network on it, share weight: many rows of one machine say less than many machines."""
    device = pd.Series([case.device for case in cases], dtype=object)
    network = pd.Series([f"{case.device} {case.model}" for case in cases], dtype=object)
    framework = np.array([1.0 if case.row.framework == "PyTorch" else TENSORFLOW_WEIGHT for case in cases])
    shared = device.map(device.value_counts()).to_numpy() * network.map(network.value_counts()).to_numpy()
    weight: Floats = shared.astype(np.float64) ** -0.25 * framework
    return weight


def _layer_weight(cases: list[Case]) -> Floats:
    keys = pd.Series([f"{c.device} {c.row.get('precision')} {c.row.get('op')} {c.row.get('phase')}" for c in cases])
    return np.sqrt(GROUP_WEIGHT / keys.map(keys.value_counts()).to_numpy())


def _campaign(case: Case) -> str:
    if "op" not in case.row.index:
        return "tensorflow_layers"
    return "cudnn7_layers" if case.device.startswith("v100") else "cudnn6_layers"


def main() -> None:
    """Fit all rows and write the result."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    training, layers = evidence(), layer_cases()
    fitted = fit(training, layers)
    document = {
        "young_software": float(f"{fitted.nuisance['young_software']:.3g}"),
        "efficiency": {name: float(f"{getattr(fitted.efficiency, name):.4g}") for name in PRIORS},
        "host": {name: float(f"{getattr(fitted.host, name):.3g}") for name in Host.__struct_fields__},
        "devices": {
            device: float(f"{factor:.4g}")
            for device, factor in fitted.device_factor.items()
            if any(case.device == device and case.tells for case in training)
        },
    }
    header = (
        "# Generated by: python analysis/fit_efficiency.py (from traces/public/). See ptsim/costs/datasheet.py.\n\n"
    )
    write_whole(OUT, header + tomli_w.dumps(document))
    print(tomli_w.dumps(document))
    print({name: round(value, 3) for name, value in fitted.nuisance.items()})
    print({name: round(value, 2) for name, value in fitted.machine_factor.items() if abs(value - 1) > 0.05})


if __name__ == "__main__":
    main()
