"""Describes the networks of the published measurements once, so that fitting needs no torch.

python analysis/capture_public.py # writes traces/public/networks.json.gz
"""

from __future__ import annotations

import gzip
from typing import Any

import msgspec
import torch
import torchvision
from public_rows import PUBLIC, REGNETS, many_table, network_name, training_table

from ptsim import zoo
from ptsim.capture.network import capture_network

RESNEXTS = {"resnext101_32x4d": (3, 4, 23, 3), "resnext152_32x4d": (3, 8, 36, 3)}  # blocks of each stage
PAPER = ("resnet32", "resnet50", "vgg11", "vgg13")  # the paper's CIFAR networks


class Swish(torch.nn.Module):
    """SiLU of two operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        return x * torch.sigmoid(x)


def build(model: str, *, pycls: bool = False) -> Any:
    """The network of a row: torchvision's or, of torchvision's classes, pycls's or one that nobody has a name for."""
    if model in RESNEXTS:
        block = torchvision.models.resnet.Bottleneck
        return torchvision.models.ResNet(block, RESNEXTS[model], groups=32, width_per_group=4)
    if pycls and model in REGNETS:
        depths, widths, channels = REGNETS[model]
        return torchvision.models.RegNet(
            torchvision.models.regnet.BlockParams(
                depths=depths,
                widths=widths,
                group_widths=[channels] * len(widths),
                bottleneck_multipliers=[1.0] * len(widths),
                strides=[2] * len(widths),
                se_ratio=0.25 if model.startswith("regnet_y") else None,
            )
        )
    if model == "inception_v3":  # the rows are of a network without the auxiliary classifier
        return torchvision.models.inception_v3(aux_logits=False, init_weights=False)
    module = zoo.find(f"torchvision:{model}").build(num_classes=1000)
    for parent in module.modules():  # the sources' default is not to drop paths
        for name, child in parent.named_children():
            if isinstance(child, torchvision.ops.StochasticDepth):
                setattr(parent, name, torch.nn.Identity())
            elif pycls and isinstance(child, torch.nn.SiLU):
                setattr(parent, name, Swish())
    return module


def main() -> None:
    """Capture every network that a row names, at the row's image size, and the paper's."""
    networks = {}
    for name in PAPER:
        entry = zoo.find(name)
        module = entry.build(num_classes=entry.num_classes)
        networks[name] = capture_network(
            module, name=name, input_shape=entry.input_shape, num_classes=entry.num_classes
        )
    tables = training_table(), many_table(), many_table("training_unseen")
    rows = {network_name(row): row for table in tables for _, row in table.iterrows()}
    for name, row in sorted(rows.items()):
        size = row.image_size
        networks[name] = capture_network(
            build(row.model, pycls=name.startswith("pycls:")),
            name=name,
            input_shape=(3, size, size),
            num_classes=1000,
        )
        print(name, len(networks[name].layers), networks[name].num_parameters, networks[name].forward_macs)
    with gzip.GzipFile(PUBLIC / "networks.json.gz", "wb", mtime=0) as file:
        file.write(msgspec.json.encode(networks))


if __name__ == "__main__":
    main()
