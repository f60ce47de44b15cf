"""Describes the networks of the published measurements once, so that fitting needs no torch.

python analysis/capture_public.py # writes traces/public/networks.json.gz
"""

from __future__ import annotations

import gzip
from typing import Any

import msgspec
import torch
import torchvision
from public_rows import PUBLIC, many_table, network_name, training_table

from ptsim import zoo
from ptsim.capture.network import capture_network

PAPER = ("resnet32", "resnet50", "vgg11", "vgg13")  # the paper's CIFAR networks


class Swish(torch.nn.Module):
    """SiLU of two operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        return x * torch.sigmoid(x)


def build(model: str, *, swish: bool = False) -> Any:
    """The network of a row: torchvision's, or one of torchvision's family that it has no name for."""
    if model == "resnext101_32x4d":
        block = torchvision.models.resnet.Bottleneck
        return torchvision.models.ResNet(block, [3, 4, 23, 3], groups=32, width_per_group=4)
    if model == "inception_v3":  # the rows are of a network without the auxiliary classifier
        return torchvision.models.inception_v3(aux_logits=False, init_weights=False)
    module = zoo.find(f"torchvision:{model}").build(num_classes=1000)
    for parent in module.modules():  # the sources' default is not to drop paths
        for name, child in parent.named_children():
            if isinstance(child, torchvision.ops.StochasticDepth):
                setattr(parent, name, torch.nn.Identity())
            elif swish and isinstance(child, torch.nn.SiLU):
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
    rows = {network_name(row): row for table in (training_table(), many_table()) for _, row in table.iterrows()}
    for name, row in sorted(rows.items()):
        size = row.image_size
        networks[name] = capture_network(
            build(row.model, swish=name.startswith("pycls:")),
            name=name,
            input_shape=(3, size, size),
            num_classes=1000,
        )
        print(name, len(networks[name].layers), networks[name].num_parameters, networks[name].forward_macs)
    with gzip.GzipFile(PUBLIC / "networks.json.gz", "wb", mtime=0) as file:
        file.write(msgspec.json.encode(networks))


if __name__ == "__main__":
    main()
