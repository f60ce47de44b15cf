"""Which efficiencies explain the published measurements: fits ptsim/costs/efficiency.toml from traces/public/.

    python analysis/fit_efficiency.py            # rewrites ptsim/costs/efficiency.toml

A maximum a posteriori fit: every parameter has a prior from hardware documentation or experience, residuals are of
log(predicted / measured) under a robust loss. A few nuisance parameters exist in the fit only: young software on a new
GPU, the frameworks of the single-layer campaigns, and a factor per GPU, which predictions for that GPU keep.
The intervals come from `analysis/cross_validate.py`, which is to be run after this.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import tomli_w
from public_rows import Case, Predictor, is_depthwise, layer_cases, training_cases
from scipy.optimize import least_squares

from ptsim.costs.datasheet import Efficiency
from ptsim.costs.kernels import Floats

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
    "pascal_bandwidth": (0.82, 0.06),  # the Volta white paper's 1.5 × delivered over 1.23 × stated
    "depthwise_bandwidth": (0.5, 0.5),  # neighbouring taps find their input in the caches, mostly
    "depthwise_rate": (0.1, 0.5),  # some ten instructions per tap
    "depthwise_halves": (2.0, 0.4),  # two or more values per instruction
    "hiding": (3.0, 0.4),
    "overlap": (3.0, 0.4),
    "launch_s": (3e-6, 0.1),
    "product_s": (8e-6, 0.4),
    "boost": (1.1, 0.04),  # GeForce boards run 5 to 15 % above the stated boost clock
    "cache": (2.0, 0.2),  # L2 over memory bandwidth
    "throttle": (0.5, 0.3),  # power goes with the square to the cube of the clock, and not all of it is the SMs'
}
NUISANCE = {
    "young_software": (0.15, 0.4),  # slower by this at the GPU's release, fading within a year
    "tensorflow_layers": (1.0, 0.3),
    "cudnn6_layers": (1.0, 0.3),
    "cudnn7_layers": (1.0, 0.3),
}
DEVICE_SD = 0.1  # of the logarithm of a GPU's own factor
TRAINING_SD, LAYER_SD = 0.07, 0.25  # of one measurement of a network, of one layer
DEPTHWISE_SD = 0.14  # of a network with depthwise convolutions, whose kernels changed between releases
GROUP_WEIGHT = 1.0  # a group of layer rows (GPU, precision, operator, pass) counts as so many rows
TENSORFLOW_WEIGHT = 0.3
TENSORFLOW_FLOOR_S = 2e-4  # what a session run costs beyond the layer

# Not observable in the public rows, which are all bound by the GPU: seconds that the host needs per forward operator,
# per backward kernel and per parameter tensor of the update, for eager PyTorch. Forward: EfficientNet-B0 with a
# mini-batch of 1 takes 9.33 ms for 248 operators (NVIDIA DeepLearningExamples, efficientnet/README.md at 0107cf27e71b,
# A100, TF32 inference). The other two are assumed: autograd's engine has no Python in it, updates run on lists.
HOST = {"forward_s": 37e-6, "backward_s": 25e-6, "update_s": 8e-6}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """The outcome of one fit."""

    efficiency: Efficiency
    nuisance: dict[str, float]
    device_factor: dict[str, float]
    cost: float

    def predict(self, cases: list[Case]) -> Floats:
        """Seconds of training cases, with the software of their time."""
        factor = np.array([self.device_factor.get(case.device, 1.0) for case in cases])
        return Predictor(cases)(self.efficiency) * _youth(cases, self.nuisance["young_software"]) * factor


def fit(training: list[Case], layers: list[Case], start: Fitted | None = None) -> Fitted:
    """The efficiencies that explain these cases best.

    Args:
        training: whole networks; their GPUs get a factor each.
        layers: single layers.
        start: where to start from; the priors if None.
    """
    priors = PRIORS | NUISANCE
    names = list(priors)
    center = np.log([priors[name][0] for name in names])
    spread = np.array([priors[name][1] for name in names])
    devices = sorted({case.device for case in training})
    device_of = np.array([devices.index(case.device) for case in training])
    training_weight, layer_weight = _training_weight(training), _layer_weight(layers)
    training_sd = np.array([DEPTHWISE_SD if is_depthwise(case) else TRAINING_SD for case in training])
    networks, singles = Predictor(training), Predictor(layers)
    campaign = [_campaign(case) for case in layers]
    floor = np.array([TENSORFLOW_FLOOR_S if name == "tensorflow_layers" else 0.0 for name in campaign])

    def unpack(x: Floats) -> tuple[Efficiency, dict[str, float]]:
        values = dict(zip(names, np.exp(x[: len(names)]).tolist(), strict=True))
        return Efficiency(**{name: values[name] for name in PRIORS}), {name: values[name] for name in NUISANCE}

    def residuals(x: Floats) -> Floats:
        efficiency, nuisance = unpack(x)
        factors = x[len(names) :]
        step = networks(efficiency) * _youth(training, nuisance["young_software"]) * np.exp(factors[device_of])
        layer = singles(efficiency) * np.array([nuisance[name] for name in campaign]) + floor
        return np.concatenate(
            [
                _robust(np.log(step / networks.seconds) / training_sd) * training_weight,
                _robust(np.log(layer / singles.seconds) / LAYER_SD) * layer_weight,
                (x[: len(names)] - center) / spread,
                factors / DEVICE_SD,
            ]
        )

    first = center
    if start is not None:
        values = {name: getattr(start.efficiency, name) for name in PRIORS} | start.nuisance
        first = np.log([values[name] for name in names])
    everything = np.concatenate([first, np.zeros(len(devices))])
    result = least_squares(residuals, everything, diff_step=1e-3, ftol=1e-4, xtol=1e-4, max_nfev=30)
    efficiency, nuisance = unpack(result.x)
    factors = dict(zip(devices, np.exp(result.x[len(names) :]).tolist(), strict=True))
    return Fitted(efficiency=efficiency, nuisance=nuisance, device_factor=factors, cost=float(result.cost))


def _youth(cases: list[Case], share: float) -> Floats:
    age = np.array([np.inf if case.age_years is None else max(case.age_years, 0.0) for case in cases])
    return 1 + share * np.exp(-age)


def _robust(z: Floats) -> Floats:
    """Residuals whose squares are the soft L1 loss of z."""
    return np.sign(z) * np.sqrt(2 * (np.sqrt(1 + z * z) - 1))


def _training_weight(cases: list[Case]) -> Floats:
    """Rows of one GPU share weight: many rows of one machine say less than as many machines."""
    device = pd.Series([case.device for case in cases])
    framework = np.array([1.0 if case.row.framework == "PyTorch" else TENSORFLOW_WEIGHT for case in cases])
    return device.map(device.value_counts()).to_numpy() ** -0.25 * framework


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
    training, layers = training_cases(), layer_cases()
    fitted = fit(training, layers)
    document = {
        "efficiency": {name: float(f"{getattr(fitted.efficiency, name):.4g}") for name in PRIORS},
        "host": HOST,
        "devices": {
            device: float(f"{factor:.4g}")
            for device, factor in fitted.device_factor.items()
            if any(case.device == device and case.row.framework == "PyTorch" for case in training)
        },
    }
    header = (
        "# Generated by: python analysis/fit_efficiency.py (from traces/public/). See ptsim/costs/datasheet.py.\n\n"
    )
    OUT.write_text(header + tomli_w.dumps(document), encoding="utf-8")
    print(tomli_w.dumps(document))
    print({name: round(value, 3) for name, value in fitted.nuisance.items()})


if __name__ == "__main__":
    main()
