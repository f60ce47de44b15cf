"""Do ptsim's counts agree with torch's own? Recomputes the agreement, network by network.

    python analysis/check_counts.py                    # the zoo and a list of torchvision models
    python analysis/check_counts.py --all              # and all of torchvision's classifiers (slow)
    python analysis/check_counts.py resnet20 torchvision:resnet18 --batch 2 --peaks

Columns: MACs against `torch.utils.flop_counter.FlopCounterMode`, forward in evaluation mode and a whole training step
(exact convention); kept bytes against `torch.autograd.graph.saved_tensors_hooks` with real tensors; with --peaks the
modelled peak of a training step against the high-water mark of the CPU allocator's log. Errors are ptsim / torch − 1.

FlopCounterMode is helped out twice: it counts the weight gradient of a grouped convolution as if it were dense,
`groups` times too much, and does not know the CPU's fused attention, whose backward is counted without its
recomputation.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import warnings
from collections.abc import Iterable

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
from ptsim.network import Network

CHOSEN = (
    "alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d densenet121 squeezenet1_1 googlenet inception_v3 mobilenet_v2 "
    "mobilenet_v3_small shufflenet_v2_x1_0 mnasnet0_5 efficientnet_b0 regnet_y_400mf convnext_tiny swin_t vit_b_32"
)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """One network: what ptsim says and what torch says, in MACs per image and bytes per mini-batch."""

    model: str
    batch: int
    inference_macs: int
    inference_macs_torch: int
    training_macs: int
    training_macs_torch: int
    kept_bytes: int
    kept_bytes_torch: int
    peak_bytes: int | None = None
    peak_bytes_torch: int | None = None


def compare(name: str, *, batch: int = 2, peaks: bool = False) -> Agreement:
    """Capture the network called `name` and count the same with torch's own tools on real tensors."""
    entry = zoo.find(name)
    model = entry.build(num_classes=entry.num_classes)
    network = capture_network(model, name=name, input_shape=entry.input_shape, num_classes=entry.num_classes)
    images = torch.rand(batch, *entry.input_shape)
    need = iteration_memory(network, batch=batch)
    inference, training = torch_macs(model, images)
    return Agreement(
        model=name,
        batch=batch,
        inference_macs=inference_macs(network),
        inference_macs_torch=inference,
        training_macs=training_macs(network),
        training_macs_torch=training,
        kept_bytes=need.activation_bytes,
        kept_bytes_torch=kept_bytes(model, images),
        peak_bytes=need.peak_bytes if peaks else None,
        peak_bytes_torch=peak_bytes(model, images, network) if peaks else None,
    )


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


_HELP = {
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


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps at the end of a forward pass, every storage once, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.train()(images)
    num_bytes = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    del outputs
    return num_bytes


def peak_bytes(model: nn.Module, images: Tensor, network: Network) -> int:
    """High-water mark of a second SGD step: what was there before, and the allocator's log from then on."""
    labels = torch.randint(network.num_classes, (len(images),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    model.train()
    _loss(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    before = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers(), *state, images, labels])
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        _loss(model(images), labels).backward()
        optimizer.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most


def table(rows: Iterable[Agreement]) -> pd.DataFrame:
    """A row a network with its relative errors."""
    frame = pd.DataFrame([dataclasses.asdict(row) for row in rows])
    for name in ("inference_macs", "training_macs", "kept_bytes", "peak_bytes"):
        frame[f"{name}_error"] = frame[name].astype(float) / frame[f"{name}_torch"].astype(float) - 1
    return frame


def _loss(outputs: object, labels: Tensor | None = None) -> Tensor:
    logits = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return torch.stack([x.sum() if labels is None else F.cross_entropy(x, labels) for x in logits]).sum()


def main() -> None:
    """Print the table and its worst rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", help="names as ptsim knows them; none: the zoo and a list of torchvision's"
    )
    parser.add_argument("--all", action="store_true", help="all of torchvision's classifiers")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--peaks", action="store_true", help="also the peak of a whole training step")
    options = parser.parse_args()
    names = options.models or [*zoo.names(), *(f"torchvision:{name}" for name in CHOSEN.split())]
    if options.all:
        from torchvision import models

        names = [*zoo.names(), *(f"torchvision:{name}" for name in models.list_models(module=models))]
    warnings.simplefilter("ignore")  # the networks' own deprecations
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    rows = []
    for name in names:
        rows.append(compare(name, batch=options.batch, peaks=options.peaks))
        last = table(rows[-1:]).iloc[0]
        errors = "  ".join(
            f"{column.removesuffix('_error')} {last[column]:+.2%}"
            for column in last.index
            if column.endswith("_error") and pd.notna(last[column])
        )
        print(f"{name:34} {errors}", flush=True)
    frame = table(rows)
    errors_only = frame[[column for column in frame if column.endswith("_error")]].dropna(axis=1).abs()
    print(f"\nlargest error of {len(frame)} networks at mini-batch {options.batch}:")
    print(errors_only.max().map("{:.2%}".format).to_string())


if __name__ == "__main__":
    main()
