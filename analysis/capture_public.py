"""The networks of the published measurements, captured once so that fitting needs no torch.

python analysis/capture_public.py        # writes traces/public/networks.json.gz
"""

from __future__ import annotations

import gzip

import msgspec
from public_rows import PUBLIC, training_table

from ptsim import zoo
from ptsim.capture.network import capture_network

PAPER = ("resnet32", "resnet50", "vgg11", "vgg13")  # the paper's CIFAR networks


def main() -> None:
    """Capture every network that a row names, and the paper's."""
    names = {f"torchvision:{name}" for name in training_table().model} | set(PAPER)
    networks = {}
    for name in sorted(names):
        entry = zoo.find(name)
        model = entry.build(num_classes=entry.num_classes)
        networks[name] = capture_network(model, name=name, input_shape=entry.input_shape, num_classes=entry.num_classes)
        print(name, len(networks[name].layers), networks[name].forward_macs)
    with gzip.GzipFile(PUBLIC / "networks.json.gz", "wb", mtime=0) as file:
        file.write(msgspec.json.encode(networks))


if __name__ == "__main__":
    main()
