"""What one training step does, as Chakra execution traces: the input of ASTRA-sim, a file per rank.

A step of data-parallel training is forward and backward of every layer, one all-reduce per DDP bucket as soon as its
gradients are there, and the optimizer. Operators carry their FLOPs and bytes, for a simulator with a roofline, and
their measured durations where the trace has a profile, for one that replays.

Source: schema/protobuf/et_def.proto of https://github.com/mlcommons/chakra (`GlobalMetadata`, then `Node`s, each
after its length as a varint), and the attributes that its feeder and ASTRA-sim's read, each from the field of the type
that they look at: is_cpu_op (bool), num_ops, comm_type, comm_size (int64), tensor_size (uint64). What is left out has
the meaning wanted here: no pg_name is all ranks, no involved_dim is every dimension of the network.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.flops import layer_macs
from ptsim.costs.traffic import layer_traffic, update_traffic
from ptsim.errors import UsageError
from ptsim.export import protobuf
from ptsim.network import Network
from ptsim.textfile import write_whole
from ptsim.trace.schema import Profile
from ptsim.trace.trace import Trace

SCHEMA = "0.0.4"
_MOST_RANKS = 16_384
_COMP_NODE, _COMM_COLL_NODE = 4, 7
_ALL_REDUCE = 0
_INT64, _UINT64, _BOOL, _STRING = 9, 13, 27, 29  # fields of AttributeProto


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One operator or collective of a step; `data_deps` are ids of nodes that must be done before.

    `num_ops` are FLOPs; an operator without products counts one per element that it moves, because ASTRA-sim's
    roofline takes num_ops / performance for the time, which is the memory's for any number but 0.
    """

    id: int
    name: str
    data_deps: tuple[int, ...]
    duration_micros: int = 0
    num_ops: int = 0
    tensor_bytes: int = 0
    all_reduce_bytes: int | None = None


def step_nodes(
    network: Network,
    *,
    batch: int,
    num_gpus: int,
    element_bytes: int = 4,
    profile: Profile | None = None,
    optimizer: str = "sgd",
) -> tuple[Node, ...]:
    """The nodes of one step of `batch` images per GPU, in execution order; ids count from 0.

    Durations are rounded to whole microseconds, as the schema wants them, such that their sum is kept. One GPU needs
    no all-reduce.

    Args:
        network: what is trained.
        batch: images per GPU and step.
        num_gpus: ranks.
        element_bytes: of an activation; gradients are reduced in fp32.
        profile: where the durations come from; None leaves them 0.
        optimizer: decides the update's memory traffic.
    """
    nodes: list[Node] = []
    clock = _MicrosecondClock()
    measured = {} if profile is None else {layer.layer: layer for layer in profile.layers}

    def add(name: str, deps: set[int], seconds: float, macs: int, num_bytes: int) -> int:
        nodes.append(
            Node(
                id=len(nodes),
                name=name,
                data_deps=tuple(sorted(deps)),
                duration_micros=clock.advance(seconds),
                num_ops=2 * macs or num_bytes // element_bytes,
                tensor_bytes=num_bytes,
            )
        )
        return len(nodes) - 1

    producers: dict[str, set[str]] = {}
    consumers: dict[str, set[str]] = {}
    for source, target in network.edges:
        producers.setdefault(target, set()).add(source)
        consumers.setdefault(source, set()).add(target)
    forward: dict[str, int] = {}
    for layer in network.layers:
        macs, traffic = layer_macs(layer, "exact"), layer_traffic(layer, batch=batch, element_bytes=element_bytes)
        times = layer.repeats(batch)
        seconds = measured[layer.name].forward_s if layer.name in measured else 0.0
        deps = {forward[name] for name in producers.get(layer.name, ())}
        forward[layer.name] = add(f"{layer.name}.forward", deps, seconds, times * macs.forward, traffic.forward_bytes)
    backward: dict[str, int] = {}
    buckets = ddp_buckets(network) if num_gpus > 1 else ()
    of_parameter = {parameter.name: parameter.layer for parameter in network.parameters}
    waiting = [(bucket, {of_parameter[name] for name in bucket.parameters}) for bucket in buckets]
    reduced: list[int] = []
    for layer in reversed(network.layers):
        macs, traffic = layer_macs(layer, "exact"), layer_traffic(layer, batch=batch, element_bytes=element_bytes)
        times = layer.repeats(batch)
        seconds = (measured[layer.name].backward_s or 0.0) if layer.name in measured else 0.0
        deps = {backward[name] for name in consumers.get(layer.name, ())} | {forward[layer.name]}
        backward[layer.name] = add(
            f"{layer.name}.backward", deps, seconds, times * macs.backward, traffic.backward_bytes
        )
        while waiting and waiting[0][1] <= backward.keys():
            bucket, layers = waiting.pop(0)
            deps = {backward[name] for name in layers} | set(reduced[-1:])  # one stream: buckets in their order
            nodes.append(
                Node(
                    id=len(nodes),
                    name=f"all_reduce.{len(reduced)}",
                    data_deps=tuple(sorted(deps)),
                    all_reduce_bytes=bucket.num_bytes,
                )
            )
            reduced.append(len(nodes) - 1)
    assert not waiting, "every bucket's layers are layers of the network"
    seconds = profile.optimizer_s + profile.regularizer_s if profile else 0.0
    add("optimizer", set(reduced) or set(backward.values()), seconds, 0, update_traffic(network, optimizer))
    return tuple(nodes)


def encode_trace(nodes: tuple[Node, ...], description: dict[str, str]) -> bytes:
    """The bytes of one rank's file: metadata with `description` as string attributes, then the nodes."""
    metadata = protobuf.text(1, SCHEMA) + b"".join(
        protobuf.block(2, protobuf.text(1, name) + protobuf.text(_STRING, value)) for name, value in description.items()
    )
    messages = [metadata, *map(_encode_node, nodes)]
    return b"".join(protobuf.varint(len(message)) + message for message in messages)


def write_chakra(trace: Trace, out: Path, *, num_gpus: int | None = None) -> list[Path]:
    """Write a folder per (architecture, mini-batch) that the run trained, each with `step.RANK.et` for every rank.

    `index.json` says which epochs a folder stands for, with how many iterations. ASTRA-sim takes `FOLDER/step` as its
    workload.

    Args:
        trace: of a run, complete or not.
        out: the folder.
        num_gpus: ranks; None means as many as were recorded, but at least two, because a single one reduces nothing.

    Raises:
        UsageError: no epochs, no GPUs or too many, or a folder that cannot be written.
    """
    ranks = max(trace.run.world_size, 2) if num_gpus is None else num_gpus
    if not 1 <= ranks <= _MOST_RANKS:
        raise UsageError(f"gpus is {ranks:,}, expected 1 to {_MOST_RANKS:,}: every rank is a file per architecture")
    if not trace.epochs:
        raise UsageError(f"{trace.path} holds no epoch, so there is no step to export")
    profiles = {(profile.architecture, profile.batch): profile for profile in trace.profiles}
    settings: dict[tuple[str, int], list[int]] = {}
    for epoch in trace.epochs:
        settings.setdefault((epoch.architecture, epoch.batch_per_gpu), []).append(epoch.epoch)
    index, written = [], []
    for (architecture, batch), epochs in settings.items():
        profile = profiles.get((architecture, batch))
        nodes = step_nodes(
            trace.networks[architecture],
            batch=batch,
            num_gpus=ranks,
            element_bytes=trace.run.precision.activation_bytes,
            profile=profile,
            optimizer=trace.optimizer,
        )
        content = encode_trace(
            nodes,
            {
                "schema": f"Chakra v{SCHEMA}",
                "model": trace.run.model,
                "architecture": architecture,
                "batch_per_gpu": str(batch),
                "durations": f"measured on {profile.device}" if profile else "none",
            },
        )
        folder = out / f"epoch-{epochs[0]:03d}-{architecture}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for rank in range(ranks):
                file = folder / f"step.{rank}.et"
                write_whole(file, content)
                written.append(file)
        except OSError as error:
            raise UsageError(f"{folder} cannot be written: {error.strerror}") from error
        index.append(
            {
                "folder": folder.name,
                "architecture": architecture,
                "batch_per_gpu": batch,
                "epochs": epochs,
                "num_iterations": sum(trace.epochs[number].num_iterations for number in epochs),
                "ranks": ranks,
            }
        )
    write_whole(out / "index.json", msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n")
    return written


class _MicrosecondClock:
    """Whole microseconds between instants: rounding errors of consecutive durations cancel instead of adding up."""

    def __init__(self) -> None:
        self._exact_s = 0.0
        self._ticks = 0

    def advance(self, seconds: float) -> int:
        self._exact_s += seconds
        ticks = round(self._exact_s * 1e6)
        elapsed, self._ticks = ticks - self._ticks, ticks
        return elapsed


def _encode_node(node: Node) -> bytes:
    communicates = node.all_reduce_bytes is not None
    attributes = [protobuf.text(1, "is_cpu_op") + protobuf.integer(_BOOL, 0)]
    if node.all_reduce_bytes is not None:
        attributes.append(protobuf.text(1, "comm_type") + protobuf.integer(_INT64, _ALL_REDUCE))
        attributes.append(protobuf.text(1, "comm_size") + protobuf.integer(_INT64, node.all_reduce_bytes))
    else:
        attributes.append(protobuf.text(1, "num_ops") + protobuf.integer(_INT64, node.num_ops))
        attributes.append(protobuf.text(1, "tensor_size") + protobuf.integer(_UINT64, node.tensor_bytes))
    return b"".join(
        [
            protobuf.integer(1, node.id),
            protobuf.text(2, node.name),
            protobuf.integer(3, _COMM_COLL_NODE if communicates else _COMP_NODE),
            protobuf.packed(5, list(node.data_deps)),
            protobuf.integer(7, node.duration_micros),
            *(protobuf.block(10, attribute) for attribute in attributes),
        ]
    )
