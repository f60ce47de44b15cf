"""Do ptsim's counts agree with torch's own? Computes the agreement, network by network.

    python analysis/check_counts.py                                      # the zoo and some torchvision models
    python analysis/check_counts.py --all --csv traces/public/counts.csv  # all of torchvision's classifiers (long)
    python analysis/check_counts.py resnet20 torchvision:resnet18 --batch 2 --peaks
    python analysis/check_counts.py --recount --csv traces/public/counts.csv     # only ptsim's side of existing rows

Every network is checked dense and pruned (a random 40 % of its prunable channels set to zero and removed by ptsim's
own reconfiguration), in fp32 and under bf16 autocast. With `--csv` each row is written at once, and rows that the
file already has are not computed again, so an interrupted run can be continued.

Compared are: MACs with `torch.utils.flop_counter.FlopCounterMode`, for the forward pass in evaluation mode and for a
whole training step (exact convention); bytes kept for backward with `torch.autograd.graph.saved_tensors_hooks` on
real tensors; with --peaks, the modelled peak of a training step with the largest value in the CPU allocator's log.
An error is ptsim / torch − 1.

FlopCounterMode is corrected. It counts the weight gradient of a grouped convolution as if it were dense, `groups` times
too much. And it does not know the CPU's fused attention, whose backward it counts without the recomputation, nor
`nn.Bilinear`, nor the forward pass of `torch.cdist` and `F.affine_grid`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import sys
import warnings
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.costs.flops import inference_macs, training_macs
from ptsim.costs.memory import iteration_memory
from ptsim.errors import PtsimError
from ptsim.network import Network, Precision
from ptsim.prune.groups import find_groups
from ptsim.prune.proof import zero_components
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.selection import keep_one
from ptsim.setting import StepSetting
from ptsim.textfile import write_whole

CHOSEN = (
    "alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d densenet121 squeezenet1_1 googlenet inception_v3 mobilenet_v2 "
    "mobilenet_v3_small shufflenet_v2_x1_0 mnasnet0_5 efficientnet_b0 regnet_y_400mf convnext_tiny swin_t vit_b_32"
)
PRUNED_FRACTION = 0.4

Form = Literal["dense", "pruned"]
FORMS: tuple[Form, ...] = ("dense", "pruned")
PRECISIONS = (Precision.FP32, Precision.BF16)
KEY = ["model", "form", "precision", "batch"]
COUNTS = ("inference_macs", "training_macs", "kept_bytes", "peak_bytes")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One network: what ptsim says and what torch says, in MACs per image and bytes per mini-batch.

    MACs do not depend on the number format; they are counted in fp32 only.
    """

    model: str
    form: Form
    precision: str
    batch: int
    parameters: int
    kept_bytes: int
    kept_bytes_torch: int
    inference_macs: int | None = None
    inference_macs_torch: int | None = None
    training_macs: int | None = None
    training_macs_torch: int | None = None
    peak_bytes: int | None = None
    peak_bytes_torch: int | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """A live network and what ptsim captured of it."""

    name: str
    form: Form
    model: nn.Module
    network: Network


def subject(name: str, form: Form = "dense") -> Subject:
    """Build the network called `name`, prune it where asked, and capture it."""
    entry = zoo.find(name)
    torch.manual_seed(0)
    model = entry.build(num_classes=entry.num_classes)
    if form == "pruned":
        prune(model, entry.input_shape)
    network = capture_network(model, name=name, input_shape=entry.input_shape, num_classes=entry.num_classes)
    return Subject(name, form, model, network)


def prune(model: nn.Module, input_shape: tuple[int, int, int]) -> None:
    """Zero a random part of the prunable channels in every layer that touches them, and reconfigure, in place."""
    groups = find_groups(model, input_shape)
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(groups.num_components, generator=generator)
    mask, _ = keep_one(groups, groups.prunable & (chance < PRUNED_FRACTION), chance)
    zero_components(model, groups, mask)
    reconfigure(model, groups)


def compare(
    name: str,
    *,
    form: Form = "dense",
    precision: Precision = Precision.FP32,
    batch: int = 2,
    peaks: bool = False,
) -> Agreement:
    """Capture the network called `name` and count the same with torch's own tools on real tensors."""
    return agreement(subject(name, form), precision=precision, batch=batch, peaks=peaks)


def agreement(
    about: Subject, *, precision: Precision = Precision.FP32, batch: int = 2, peaks: bool = False
) -> Agreement:
    """One row of the table."""
    model, network = about.model, about.network
    images = torch.rand(batch, *network.input_shape)
    torch_side = {}
    if precision is Precision.FP32:
        inference, training = torch_macs(model, images)
        torch_side = {"inference_macs_torch": inference, "training_macs_torch": training}
    return Agreement(
        model=about.name,
        form=about.form,
        precision=str(precision),
        batch=batch,
        kept_bytes_torch=kept_bytes(model, images, precision),
        peak_bytes_torch=peak_bytes(model, images, network, precision) if peaks else None,
        **torch_side,
        **counted(network, precision=precision, batch=batch, peaks=peaks),
    )


def counted(network: Network, *, precision: Precision, batch: int, peaks: bool) -> dict[str, int]:
    """Ptsim's side of a row."""
    need = iteration_memory(network, StepSetting(batch=batch, precision=precision))
    copies = (
        need.parameter_bytes - iteration_memory(network, StepSetting(batch=batch)).parameter_bytes
    )  # autograd keeps them too
    counts = {"parameters": network.num_parameters, "kept_bytes": need.activation_bytes + copies}
    if precision is Precision.FP32:
        counts["inference_macs"] = inference_macs(network, images=batch) // batch
        counts["training_macs"] = training_macs(network, images=batch) // batch
    return counts | {"peak_bytes": need.peak_bytes} if peaks else counts


def _convolution_backward(
    gradient: list[int], x: list[int], weight: list[int], *rest: object, out_shape: object, **_: object
) -> int:
    """FLOPs of both gradients: each pairs every element of the output (or transposed: input) with a filter."""
    transposed, mask = rest[4], rest[7]
    per_gradient = 2 * math.prod(x if transposed else gradient) * math.prod(weight[1:])
    return per_gradient * (mask[0] + mask[1])  # type: ignore[index] # a pair here


def _attention(query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    gradient: list[int], query: list[int], key: list[int], value: list[int], *_: object, **__: object
) -> int:
    return 2 * _attention(query, key, value)


def _trilinear(
    first: list[int], second: list[int], third: list[int], *axes: list[int], out_shape: object, **_: object
) -> int:
    """Every index of the three tensors once: those at which one is expanded (the first three `axes`) are another's."""
    sizes: dict[int, int] = {}
    for shape, expanded in zip((first, second, third), axes, strict=False):
        own = (axis for axis in itertools.count() if axis not in expanded)
        sizes |= dict(zip(own, shape, strict=False))
    return 2 * math.prod(sizes.values())


def _distances(first: list[int], second: list[int], *_: object, **__: object) -> int:
    return 2 * math.prod(first) * second[-2]


def _coordinates(matrices: list[int], size: list[int], *_: object, **__: object) -> int:
    return 2 * math.prod(matrices) * math.prod(size[2:])


_HELP = {
    torch.ops.aten._euclidean_dist: _distances,
    torch.ops.aten.affine_grid_generator: _coordinates,
    torch.ops.aten._trilinear: _trilinear,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def torch_macs(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """MACs per image of inference and of a training step, as FlopCounterMode counts them."""
    batch = len(images)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that FlopCounterMode does not know
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_HELP) as forward:
        model.eval()(images)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    model.train()
    with FlopCounterMode(display=False, custom_mapping=_HELP) as step:
        _loss(model(images)).backward()
    model.zero_grad()
    return forward.get_total_flops() // 2 // batch, step.get_total_flops() // 2 // batch


def kept_bytes(model: nn.Module, images: Tensor, precision: Precision = Precision.FP32) -> int:
    """Bytes that autograd keeps at the end of a forward pass, every storage once, without parameters and buffers."""
    kept: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return tensor.detach()  # else an output holds its operator, which holds it: never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _number_format(precision):
        outputs = model.train()(images)
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}  # as they are now
    alive = {key: size for key, (reference, size) in kept.items() if reference() is not None}
    num_bytes = sum(size for key, size in alive.items() if key not in own)
    del outputs
    return num_bytes


def peak_bytes(
    model: nn.Module, images: Tensor, network: Network, precision: Precision = Precision.FP32, passes: int = 1
) -> int:
    """High-water mark of a second SGD step: what was there before, and the allocator's log from then on.

    Gradients of so many `passes` over the images accumulate.
    """
    labels = torch.randint(network.num_classes, (len(images),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def forward() -> Tensor:
        with _number_format(precision):
            return _loss(model(images), labels)

    model.train()
    forward().backward()
    optimizer.step()
    optimizer.zero_grad()
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    before = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers(), *state, images, labels])
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(passes):
            forward().backward()
        optimizer.step()
    optimizer.zero_grad()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most


def _number_format(precision: Precision) -> contextlib.AbstractContextManager[object]:
    half = precision is Precision.BF16
    return torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()


def _loss(outputs: object, labels: Tensor | None = None) -> Tensor:
    logits = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return torch.stack([x.sum() if labels is None else _cross_entropy(x, labels) for x in logits]).sum()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of whole images or, where the outputs are maps, of every pixel."""
    labels = labels.view(-1, *(1 for _ in logits.shape[2:])).expand(-1, *logits.shape[2:])
    return F.cross_entropy(logits, labels % logits.shape[1])


def table(rows: Iterable[Agreement]) -> pd.DataFrame:
    """A row a network with its relative errors."""
    return with_errors(pd.DataFrame([dataclasses.asdict(row) for row in rows]))


def with_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """The counts with `…_error` columns beside them."""
    return frame.assign(
        **{f"{name}_error": frame[name].astype(float) / frame[f"{name}_torch"].astype(float) - 1 for name in COUNTS}
    )


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """For every form and precision: networks, and the lowest and highest error of every count, in percent."""
    rows = []
    for (form, precision), part in with_errors(frame).groupby(["form", "precision"]):
        row: dict[str, object] = {"form": form, "precision": precision, "networks": part.model.nunique()}
        for name in COUNTS:
            errors = 100 * part[f"{name}_error"].dropna()
            if len(errors):
                row[f"{name} %"] = f"{errors.min():+.2f} to {errors.max():+.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def missing(
    names: Sequence[str], done: pd.DataFrame, *, batch: int, peaks: bool, forms: Sequence[Form] = FORMS
) -> list[tuple[str, Form, list[Precision]]]:
    """What is not among the `done` rows yet: network, form, and the precisions that it lacks."""
    if peaks and not done.empty:
        done = done[done.peak_bytes.notna()]
    known = set(done[KEY].itertuples(index=False, name=None)) if not done.empty else set()
    wanted = []
    for name, form in itertools.product(names, forms):
        lacking = [precision for precision in PRECISIONS if (name, form, str(precision), batch) not in known]
        if lacking:
            wanted.append((name, form, lacking))
    return wanted


def record(
    names: Sequence[str], file: Path | None, *, batch: int = 2, peaks: bool = False, forms: Sequence[Form] = FORMS
) -> pd.DataFrame:
    """Compare every network, print each row and keep it in `file`; returns all rows, those of the file included."""
    frame = pd.read_csv(file) if file is not None and file.is_file() else pd.DataFrame()
    for name, form, precisions in missing(names, frame, batch=batch, peaks=peaks, forms=forms):
        try:
            about = subject(name, form)
        except PtsimError as error:
            print(f"{name:34} {form:6} {error}", file=sys.stderr)
            continue
        for precision in precisions:
            row = pd.DataFrame([dataclasses.asdict(agreement(about, precision=precision, batch=batch, peaks=peaks))])
            frame = pd.concat([frame, row], ignore_index=True).drop_duplicates(KEY, keep="last")
            last = with_errors(row).iloc[0]
            errors = "  ".join(
                f"{count} {last[f'{count}_error']:+.2%}" for count in COUNTS if pd.notna(last[f"{count}_error"])
            )
            print(f"{name:34} {form:6} {precision:4} {errors}", flush=True)
            if file is not None:
                write_whole(file, frame.sort_values(KEY).astype(_INTEGERS, errors="ignore").to_csv(index=False))
    return frame


def recount(file: Path, names: Sequence[str] = ()) -> pd.DataFrame:
    """Ptsim's side of the file's rows anew (of the networks called `names`, or of all); torch's stays as measured."""
    frame = pd.read_csv(file).astype(_INTEGERS, errors="ignore")
    for (name, form), rows in frame.groupby(["model", "form"]):
        if names and name not in names:
            continue
        network = subject(name, form).network
        for index, row in rows.iterrows():
            counts = counted(
                network, precision=Precision(row.precision), batch=row.batch, peaks=pd.notna(row.peak_bytes_torch)
            )
            frame.loc[index, list(counts)] = list(counts.values())
        print(f"{name:34} {form:6} counted", flush=True)
        write_whole(file, frame.to_csv(index=False))
    return frame


_INTEGERS = {name: "Int64" for count in COUNTS for name in (count, f"{count}_torch")}


def main() -> None:
    """Print the table and its worst rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", help="names as ptsim knows them; none: the zoo and a list of torchvision's"
    )
    parser.add_argument("--all", action="store_true", help="all of torchvision's classifiers")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--peaks", action="store_true", help="also the peak of a whole training step")
    parser.add_argument("--form", choices=FORMS, action="append", help="only dense or only pruned networks")
    parser.add_argument("--recount", action="store_true", help="only ptsim's side, of the rows that --csv has")
    parser.add_argument("--csv", type=Path, help="keep the rows in this file and go on where it ends")
    options = parser.parse_args()
    if options.recount and options.csv is None:
        parser.error("--recount wants --csv, the file whose rows are counted again")
    names = options.models or [*zoo.names(), *(f"torchvision:{name}" for name in CHOSEN.split())]
    if options.all:
        from torchvision import models

        names = [*zoo.names(), *(f"torchvision:{name}" for name in models.list_models(module=models))]
    warnings.simplefilter("ignore")  # the networks' own deprecations
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    if options.recount:
        frame = recount(options.csv, options.models)
    else:
        frame = record(names, options.csv, batch=options.batch, peaks=options.peaks, forms=options.form or FORMS)
    print(f"\nerrors at mini-batch {options.batch}, ptsim / torch − 1:")
    print(summary(frame[frame.batch == options.batch]).to_string(index=False))


if __name__ == "__main__":
    main()
