"""What a step with an older PyTorch takes longer for; where nobody says the version, predictions are for today's.

Two things are known to depend on it:

* Before PyTorch 1.10, and containers of NVIDIA's before 21.07, Ampere's kernels were young: an A100 PCIe trains
  ResNet-50 19 % (TF32) and 25 % (half) faster with container 22.10 than with 20.10, an RTX 3090 9 and 13 % faster with
  PyTorch 1.13 than with 1.7. By how much in all is fitted (`young_software` in `efficiency.toml`).
* Before PyTorch 2.0 `zero_grad` wrote zeros, which backward added to, and optimizers updated one tensor after the
  other, each by as many kernels as it has arithmetic steps (torch/optim/sgd.py and rmsprop.py as of 1.13).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ptsim.costs.traffic import cast_bytes, sum_bytes, update_traffic
from ptsim.errors import UsageError
from ptsim.hardware.spec import Device
from ptsim.network import Network
from ptsim.optimizers import kind_of
from ptsim.setting import StepSetting, TorchVersion

GROWN = {"ampere": TorchVersion(1, 10)}  # since when a generation's kernels are grown up
# Values that an arithmetic step of an update reads and writes, two or three: SGD's 11 are 4 steps.
_STEP_ACCESSES = 2.75


class Update(NamedTuple):
    """What gradients and parameters cost a step besides forward and backward."""

    num_bytes: float = 0.0  # moved
    num_kernels: int = 0  # on the GPU, one for a tensor: each takes at least a kernel's least time
    num_launches: int = 0  # by the host, after backward

    def seconds(self, streaming_bytes_per_s: float, launch_s: float) -> float:
        """On a GPU that streams so many bytes and needs so long for a kernel at least."""
        return self.num_bytes / streaming_bytes_per_s + self.num_kernels * launch_s


def is_young(device: Device, version: TorchVersion | None) -> bool:
    """Whether this version's kernels had not learned the GPU's generation yet; no version is today's."""
    grown = GROWN.get(device.architecture)
    return version is not None and grown is not None and version < grown


def may_be_young(device: Device, version: TorchVersion | None) -> bool:
    """Whether a step of which nobody says the version may be of such software: many published ones are."""
    return version is None and device.architecture in GROWN


def software_note(device: Device, version: TorchVersion | None, young_share: float) -> str | None:
    """What is to be known of a prediction whose software is, or may be, older; None where there is nothing to say.

    Args:
        device: that the step is predicted for.
        version: of the PyTorch that runs it, if that was said.
        young_share: by which share young software takes longer.
    """
    grown, longer = GROWN.get(device.architecture), f"{young_share:.0%} longer"
    if is_young(device, version):
        return f"with PyTorch before {grown}, kernels on {device.name} take {longer}; the prediction includes this"
    if may_be_young(device, version):
        return (
            f"with PyTorch before {grown}, kernels on {device.name} took {longer}; no version of PyTorch was given, so "
            "the upper end of the interval includes this"
        )
    return None


def update_of(network: Network, setting: StepSetting) -> Update:
    """The update of every parameter that learns, with the zeros of older versions."""
    num_tensors = len(network.gradients)
    num_bytes = update_bytes(network, setting)
    if setting.groups_updates:
        return Update(num_bytes, num_launches=num_tensors)
    kernels = round(kind_of(setting).moved(setting.momentum) / _STEP_ACCESSES) * num_tensors
    zeroed = zeroing_of(network, setting)
    return Update(num_bytes + zeroed.num_bytes, num_kernels=kernels + zeroed.num_kernels, num_launches=kernels)


def zeroing_of(network: Network, setting: StepSetting) -> Update:
    """What older versions do to gradients: a kernel writes zeros, another adds to them; backward launches neither."""
    if setting.groups_updates:
        return Update()
    summed = _summing_of(network)
    return Update(network.gradient_bytes + summed.num_bytes, num_kernels=len(network.gradients) + summed.num_kernels)


def again_of(network: Network, setting: StepSetting) -> Update:
    """What every pass but the first costs besides: a kernel adds each gradient to its sum; weights are cast again."""
    summed = _summing_of(network)
    return Update(summed.num_bytes + cast_bytes(network, setting), num_kernels=summed.num_kernels)


def _summing_of(network: Network) -> Update:
    """The sum of a pass's gradients and those that are there; backward launches it."""
    return Update(sum_bytes(network), num_kernels=len(network.gradients))


def update_bytes(network: Network, setting: StepSetting) -> float:
    """What an update moves; under autocast with the casts of weights and gradients and the scaler's division."""
    halves = cast_bytes(network, setting) + (8 * network.num_learnt if setting.half else 0)
    return float(update_traffic(network, kind_of(setting), momentum=setting.momentum) + halves)


def parse_torch_version(text: str) -> TorchVersion:
    """The PyTorch version that `text` names, such as "1.8" or "2.12.1+cu126"; a number is none: 1.10 would be 1.1.

    Raises:
        UsageError: not a version.
    """
    found = isinstance(text, str) and re.fullmatch(r"v?([1-9])\.(\d{1,2})(\.\d[\w.+-]*|[ab]\d*|rc\d+)?", text.strip())
    if not found:
        raise UsageError(f"torch_version is {text!r}, expected a version of PyTorch such as 1.8")
    return TorchVersion(int(found[1]), int(found[2]))
