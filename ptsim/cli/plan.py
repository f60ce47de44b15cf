"""`ptsim plan`: a trace of a run that nobody has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter

from ptsim.answers.plan import fractions, plan_draws
from ptsim.answers.plan_options import PlanOptions
from ptsim.cli.common import parse_input_shape, print_json, stdout_console
from ptsim.errors import FileFormatError
from ptsim.trace.io import write_trace
from ptsim.trace.trace import Trace


def plan(
    model: str,
    *,
    images: int | None = None,
    classes: int | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    gpus: int | None = None,
    interval: int | None = None,
    pruning: str = "none",
    input: str | None = None,
    precision: str = "fp32",
    memory_format: Literal["contiguous", "channels_last"] = "contiguous",
    optimizer: str = "sgd",
    seed: int = 0,
    draws: int = 1,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Plan a run that nobody has trained, dense or pruned, as a trace to project.

    Args:
        model: a zoo name, torchvision:NAME or path/to/file.py:function.
        images: images of the training set.
        classes: number of classes; the model's usual number.
        epochs: how many.
        batch: images per GPU and step.
        gpus: data-parallel size; 1 unless a published run says otherwise.
        interval: epochs between reconfigurations; 5 unless a published run says otherwise.
        pruning: none; targets as training=0.60,inference=0.47 with bn=, layers=, saturates= if wanted; like:TRACE;
            a published run as lym2019/resnet50-imagenet-r0.25, which also says what is not given here; or a TOML file.
        input: CHANNELS,HEIGHT,WIDTH of an image, for example 3,224,224.
        precision: fp32, tf32, bf16, fp16 or amp.
        memory_format: of the activations.
        optimizer: sgd, adam, adamw or rmsprop.
        seed: which of the trajectories that agree with the pruning; 0 is the typical one.
        draws: how many such trajectories, the further ones into files of their own: OUT-1, OUT-2, …
        out: the trace.
        json: print one JSON document.
    """
    if not out.resolve().parent.is_dir():
        raise FileFormatError(out, "its folder does not exist")
    options = PlanOptions(
        images=images,
        num_classes=classes,
        epochs=epochs,
        batch=batch,
        gpus=gpus,
        interval=interval,
        pruning=pruning,
        input_shape=None if input is None else parse_input_shape(input),
        precision=precision,
        memory_format=memory_format,
        optimizer=optimizer,
        seed=seed,
    )
    traces = plan_draws(model, draws, options)
    files = [out, *(out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(1, draws))]
    documents = [_document(write_trace(file, trace), trace) for file, trace in zip(files, traces, strict=True)]
    if json:
        print_json(documents[0] | ({"draws": documents} if draws > 1 else {}))
    else:
        for document, trace in zip(documents, traces, strict=True):
            _show(document, trace)


def _document(file: Path, trace: Trace) -> dict[str, Any]:
    return {"trace": str(file), **msgspec.to_builtins(fractions(trace))}


def _show(document: dict[str, Any], trace: Trace) -> None:
    console = stdout_console()
    changed = sum(event.before != event.after for event in trace.reconfigurations)
    console.print(
        f"{document['trace']}: planned, {len(trace.epochs)} epochs, {document['architectures']} architectures, "
        f"{changed} reconfigurations that remove channels",
        highlight=False,
    )
    console.print(
        f"of dense: training FLOPs {document['training_flops_fraction']:.1%}, inference FLOPs "
        f"{document['inference_flops_fraction']:.1%}, BatchNorm traffic {document['bn_bytes_fraction']:.1%}, "
        f"all-reduced bytes {document['allreduce_bytes_fraction']:.1%}",
        highlight=False,
    )
    for assumption in trace.run.assumed:
        console.print(f"assumed: {assumption.what} ({assumption.source})", highlight=False)
