"""What does pruning cost, compared with training? Prints ratios to a training step; can survey many models.

    python analysis/bench_engine.py [--csv FILE.csv]                 # the ratios
    python analysis/bench_engine.py --all-torchvision --out FILE.csv # inspect the models that the file has no row of
    python analysis/bench_engine.py --launches                       # what an operator takes of the host
    python analysis/bench_engine.py --compare resnet18 densenet121   # compare with Torch-Pruning, if it is installed

Each duration is the median of several runs on this machine. Quote the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from benchmarks import Figure, add_option, tell
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ptsim
from ptsim import zoo
from ptsim.errors import PtsimError
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.groups import find_groups
from ptsim.prune.proof import zero_components
from ptsim.prune.reconfigure import reconfigure

VIEWS = (
    "view",
    "reshape",
    "transpose",
    "expand",
    "alias",
    "detach",
    "slice",
    "select",
    "split",
    "unsqueeze",
    "permute",
)


class CountLaunches(TorchDispatchMode):
    """Counts operators that would start a kernel on a GPU: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run."""
        name = func.__name__.split(".")[0].lstrip("_")
        self.count += not any(name.startswith(view) for view in VIEWS)
        return func(*args, **(kwargs or {}))


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Median duration of `action` after one warm-up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def launch_microseconds(repeats: int) -> dict[str, float]:
    """What the host needs for an operator: in a module's forward and backward pass, and by itself on tiny tensors."""
    layers = [layer for _ in range(30) for layer in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU())]
    network = nn.Sequential(*layers).eval()
    operators, image, number = len(layers), torch.rand(1, 1, 1, 1), torch.rand(1)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(operators):
            torch.mul(number, number)

    forward = median_seconds(lambda: network(image), repeats)
    both = median_seconds(lambda: network(image).sum().backward(), repeats)
    seconds = {"forward": forward, "backward": both - forward, "bare": median_seconds(bare, repeats)}
    return {name: 1e6 * spent / operators for name, spent in seconds.items()}


def regularizer_figures(name: str, batch: int, repeats: int) -> list[Figure]:
    """The hand-written gradient beside a whole training step without it."""
    entry = zoo.find(name)
    model = entry.build(num_classes=entry.num_classes).train()
    groups = find_groups(model, entry.input_shape)
    lasso = GroupLasso(model, groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, labels = torch.rand(batch, *entry.input_shape), torch.randint(0, entry.num_classes, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    launches = []
    forms: tuple[Literal["per_tensor", "gathered"], ...] = ("per_tensor", "gathered")
    for form in forms:
        other = GroupLasso(model, groups, form=form)
        other.add_gradient(1e-4)  # makes the gradients and the flat form's tables
        with CountLaunches() as counter:
            other.add_gradient(1e-4)
        launches.append(Figure(f"kernels of the penalty, {form.replace('_', ' ')}", counter.count, ""))
    step_s = median_seconds(step, repeats)
    regularizer_s = median_seconds(lambda: lasso.add_gradient(1e-4), 3 * repeats)
    return [
        Figure(f"a step of {name} at mini-batch {batch}", step_s, "s"),
        Figure("the penalty's gradient", regularizer_s, "s"),
        Figure("the penalty's gradient, of the step", 100 * regularizer_s / step_s, "%"),
        *launches,
    ]


def reconfiguration_seconds(name: str) -> float:
    """One reconfiguration that removes about half of the channels, optimizer state included."""
    entry = zoo.find(name)
    model = entry.build(num_classes=entry.num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    groups = find_groups(model, entry.input_shape)
    zero_components(model, groups, groups.prunable & (torch.rand(groups.num_components) < 0.5))
    start = time.perf_counter()
    reconfigure(model, groups, optimizer=optimizer)
    return time.perf_counter() - start


def survey(names: Sequence[str], out: Path | None) -> list[dict[str, Any]]:
    """`ptsim.inspect` of every network; an error is a row as well. Rows that are in the file already stay."""
    rows = []
    if out is not None and out.exists():
        with out.open(newline="") as file:
            rows = [dict(row, exact=row["exact"] == "True") for row in csv.DictReader(file) if row["model"] in names]
    known = {row["model"] for row in rows}
    for name in (name for name in names if name not in known):
        start = time.perf_counter()
        row: dict[str, Any] = {"model": name}
        try:
            found = ptsim.inspect(name)
            row |= {
                "exact": found.exact,
                "prunable_channels": found.prunable_channels,
                "refused_channels": found.refused_channels,
                "max_rel_error_eval": f"{found.max_rel_error_eval:.1e}",
                "max_rel_error_train": f"{found.max_rel_error_train:.1e}",
                "proof_image": found.proof_input[-1],
                "proof_parameters": found.proof_parameters,
                "error": "",
            }
        except PtsimError as error:
            row |= {"exact": False, "error": str(error)}
        row["seconds"] = f"{time.perf_counter() - start:.1f}"
        rows.append(row)
        if out is not None:
            new = not out.exists()
            with out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="")
                if new:
                    writer.writeheader()
                writer.writerow(row)
    return rows


COLUMNS = (
    "model", "exact", "prunable_channels", "refused_channels", "max_rel_error_eval", "max_rel_error_train",
    "proof_image", "proof_parameters", "seconds", "error",
)  # fmt: skip


def compare(name: str) -> str:
    """Torch-Pruning's view of the same network: does what it prunes equal the zeroed network?"""
    try:
        import torch_pruning
    except ImportError:
        return f"{name}: Torch-Pruning is not installed (pip install torch-pruning)"
    entry = zoo.find(name)
    model = entry.build(num_classes=entry.num_classes).eval()
    example = torch.rand(1, *entry.input_shape)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    return f"{name}: Torch-Pruning {len(groups)} groups, ptsim {len(ptsim.inspect(name).groups)} edges"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="for the regulariser")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reconfigure", default="torchvision:resnet50", help="for the reconfiguration")
    parser.add_argument("--all-torchvision", action="store_true")
    parser.add_argument("--names", nargs="*", default=None, help="survey these instead of all")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--compare", nargs="*", default=())
    parser.add_argument("--launches", action="store_true")
    add_option(parser)
    options = parser.parse_args(arguments)
    if options.all_torchvision or options.names:
        from ptsim.models.torchvision_family import classifier_names

        names = options.names or [f"torchvision:{name}" for name in classifier_names()]
        rows = survey(names, options.out)
        exact = sum(bool(row["exact"]) for row in rows)
        print(f"{exact} of {len(rows)} networks prune exactly")
        return 0
    if options.launches:
        torch.set_num_threads(1)
        for name, spent in launch_microseconds(100 * options.repeats).items():
            print(f"an operator, {name}: {spent:.1f} µs of the host")
        return 0
    if options.compare:
        for name in options.compare:
            print(compare(name))
        return 0
    figures = regularizer_figures(options.model, options.batch, options.repeats)
    reconfiguration_s = statistics.median(reconfiguration_seconds(options.reconfigure) for _ in range(options.repeats))
    figures.append(Figure(f"one reconfiguration of {options.reconfigure}", reconfiguration_s, "s"))
    tell("engine", figures, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
