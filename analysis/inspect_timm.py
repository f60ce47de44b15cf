"""How much of timm's CNNs can be pruned, and is it exact? One row for each family: its smallest network.

    pip install timm torch-pruning
    python analysis/inspect_timm.py --out FILE.csv                    # every family that FILE has no row of
    python analysis/inspect_timm.py --models skresnet18 resnest14d    # these alone

A family is what stands in front of the first number in a network's name, in one of timm's modules; pure transformers
are left out. Weights are random, images as small as the network takes. The share is that of the channels that no image
and no class fixes. Seconds are the processor's, of one thread, so that other programs on the machine hardly count.
Torch-Pruning's count beside it is that of the channels of its groups but for the classifier's: it also removes channels
that are normalised or combined together, which changes what the network computes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ptsim
from ptsim.errors import PtsimError
from ptsim.prune.labels import ENDS

COLUMNS = (
    "family", "model", "image", "exact", "share", "prunable_channels", "refused_channels", "torch_pruning_channels",
    "cpu_seconds", "traced_by", "reason",
)  # fmt: skip
SIDES = (64, 96, 128)
TRANSFORMERS = [
    "beit",
    "cait",
    "coat",
    "convit",
    "crossvit",
    "davit",
    "deepseek_vit",
    "deit",
    "eva",
    "focalnet",
    "gcvit",
    "gemma4_vit",
    "hiera",
    "hieradet_sam2",
    "mlp_mixer",
    "mvitv2",
    "naflexvit",
    "nest",
    "pit",
    "qwen3_vit",
    "sequencer",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "tiny_vit",
    "tnt",
    "twins",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "vitamin",
    "volo",
    "xcit",
]


class TooLongError(BaseException):  # no handler of errors in between may take it for one
    """The network's time is over."""


def family_of(name: str, module: str) -> str:
    """A network's family: timm's module and what stands in front of the first number of the name."""
    match = re.match(r"((?:[a-z]+_)*?[a-z]+(?:v\d)?)(?=[\d_]|$)", name)
    return f"{module}/{match[1] if match else name}"


def smallest_of_every_family() -> list[str]:
    """Timm's name of the network with the fewest parameters in every family that is no transformer."""
    import timm

    smallest: dict[str, tuple[int, str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module) if module not in TRANSFORMERS else ():
            found = (_num_parameters(name), name)
            family = family_of(name, module)
            smallest[family] = min(found, smallest.get(family, found))
    return [name for _, name in sorted(smallest.values())]


def _num_parameters(name: str) -> int:
    import timm

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def image_for(model: nn.Module) -> tuple[int, int, int]:
    """The smallest image that the network takes."""
    channels, height, width = model.default_cfg["input_size"]  # type: ignore[index,union-attr,misc] # timm's own dictionary
    for side in SIDES if not model.default_cfg.get("fixed_input_size") else ():  # type: ignore[operator,union-attr] # likewise
        try:
            with torch.no_grad():
                model.eval()(torch.rand(1, channels, side, side))
        except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError):
            continue
        finally:
            model.train()
        return channels, side, side
    return channels, height, width


@contextlib.contextmanager
def limited_to(seconds: int) -> Iterator[None]:
    """`TooLongError` once the processor has worked for so long."""

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def row_of(name: str, limit: int, *, beside: bool = True) -> dict[str, Any]:
    """Inspect one of timm's networks; what it cannot do is a row as well. `beside`: count with Torch-Pruning, too."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    module = type(model).__module__.rpartition(".")[2]
    image = image_for(model)
    row: dict[str, Any] = {"family": family_of(name, module), "model": name, "exact": False, "share": 0.0}
    row["image"] = "x".join(map(str, image))
    start = time.process_time()
    try:
        with limited_to(limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.export traced it stands in a column
            found = ptsim.inspect(model, input_shape=image)
    except TooLongError:
        row["reason"] = f"not done after {limit} s"
    except PtsimError as error:
        row["reason"] = error.message
    else:
        refused = Counter[str]()
        for group in found.groups:
            if not group.prunable and group.reason not in ENDS:
                refused[str(group.reason)] += group.width
        row |= {
            "exact": found.exact,
            "share": round(found.prunable_channels / max(1, found.prunable_channels + refused.total()), 3),
            "prunable_channels": found.prunable_channels,
            "refused_channels": refused.total(),
            "traced_by": found.traced_by,
            "reason": refused.most_common(1)[0][0] if refused else "",
        }
    row["cpu_seconds"] = round(time.process_time() - start, 1)
    row["torch_pruning_channels"] = torch_pruning_channels(model, image, limit) if beside else ""
    return row


def torch_pruning_channels(model: nn.Module, image: tuple[int, int, int], limit: int) -> int | str:
    """The channels of Torch-Pruning's groups but for those of the classifier; what happened where there are none."""
    try:
        import torch_pruning
    except ImportError:
        return ""
    limit = min(limit, 20)  # its search does not end on some networks with attention
    classifier = model.get_classifier()  # type: ignore[operator] # timm's own method
    ignored = list(classifier.modules()) if isinstance(classifier, nn.Module) else []
    try:
        with limited_to(limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(model.eval(), torch.rand(1, *image))
            roots = [nn.modules.conv._ConvNd, nn.Linear]
            return sum(len(group[0].idxs) for group in graph.get_all_groups(ignored, roots))
    except TooLongError:
        return "too long"
    except Exception as error:  # another package's: the survey goes on
        return type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each network and how many are exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=None, help="timm's names; by default one of every family")
    parser.add_argument("--out", type=Path, default=None, help="a CSV file that rows are added to")
    parser.add_argument("--limit", type=int, default=60, help="seconds of the processor for one network")
    parser.add_argument("--alone", action="store_true", help="without Torch-Pruning's count")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no network is begun")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    known: set[str] = set()
    if options.out is not None and options.out.exists():
        with options.out.open(newline="") as file:
            known = {row["model"] for row in csv.DictReader(file)}
    writer = csv.DictWriter(sys.stdout, COLUMNS, restval="")
    writer.writeheader()
    rows = []
    for name in options.models or smallest_of_every_family():
        if name in known or time.monotonic() - start > options.budget:
            continue
        row = row_of(name, options.limit, beside=not options.alone)
        rows.append(row)
        writer.writerow(row)
        sys.stdout.flush()
        if options.out is not None:
            new = not options.out.exists()
            with options.out.open("a", newline="") as file:
                table = csv.DictWriter(file, COLUMNS, restval="")
                if new:
                    table.writeheader()
                table.writerow(row)
    print(f"{sum(bool(row['exact']) for row in rows)} of {len(rows)} networks are pruned exactly", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
