"""What one training step does, as Chakra execution traces: the input of ASTRA-sim, a file per rank.

A step of data-parallel training is forward and backward of every layer with the loss in between, one all-reduce per
DDP bucket as soon as its gradients are there (in a compiled step: at its end), and the optimizer. Where the update is
sharded, buckets are reduce-scattered, and the updated parameters gathered at the end. Operators carry their FLOPs and
bytes, for a simulator with a roofline, and their measured durations where the trace has a profile, for one that
replays: the profile's layers are scaled to its whole step, which was measured without per-layer timers. On several GPUs
the hooks of gradients come on top, by the same fit as in `ptsim simulate`.

What moves no byte (a view, a layer that pruning has removed) is no node: ASTRA-sim's roofline skips a node whose
tensor_size is 0 together with all that waits for it, so that the step would never end. Nodes wait for what was in front
of it, and its measured time goes to the next node.

Source: schema/protobuf/et_def.proto of https://github.com/mlcommons/chakra (`GlobalMetadata`, then `Node`s, each
after its length as a varint), and the attributes that its feeder and ASTRA-sim's read, each from the field of the type
that they look at: is_cpu_op (bool), num_ops, comm_type, comm_size (int64), tensor_size (uint64), involved_dim (list of
bool). A comm_size is what a rank puts in: of an all-gather its own share. No pg_name is all ranks. involved_dim has to
be there: without it ASTRA-sim before November 2024 reduces over the first dimension of the network only, or reads
beyond the end of a list; a longer one than the network is taken by all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from ptsim.costs.buckets import Bucket, ddp_buckets
from ptsim.costs.flops import layer_macs
from ptsim.costs.measured import find_profile, recorded_step
from ptsim.costs.scaling import slowed, tensor_seconds
from ptsim.costs.times import StepTime
from ptsim.costs.traffic import network_traffic, sum_bytes, update_traffic
from ptsim.criteria import step_penalty
from ptsim.errors import UsageError
from ptsim.export import protobuf
from ptsim.export.ranks import check_no_other_ranks
from ptsim.network import Network
from ptsim.optimizers import kind_of
from ptsim.setting import Sharding, StepSetting, parse_sharding
from ptsim.textfile import write_whole
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace

SCHEMA = "0.0.4"
_MOST_RANKS = 16_384
_COMP_NODE, _COMM_COLL_NODE = 4, 7
_INT64, _UINT64, _BOOL, _BOOL_LIST, _STRING = 9, 13, 27, 28, 29  # fields of AttributeProto
_ALL = [1] * 10  # dimensions of the network; as many as ASTRA-sim's own default for a group of ranks


class Collective(IntEnum):
    """Chakra's numbers of the collectives that a step has."""

    ALL_REDUCE = 0
    ALL_GATHER = 2
    REDUCE_SCATTER = 7


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
    collective: Collective | None = None
    comm_bytes: int = 0


def step_nodes(
    network: Network,
    setting: StepSetting,
    *,
    step: StepTime | None = None,
    overlap: bool = True,
    tensor_s: float = 0.0,
) -> tuple[Node, ...]:
    """The nodes of one step, in execution order; ids count from 0. Gradients are reduced in fp32.

    Where gradients of several passes add up, all passes but the last come first, each layer's as one node ("earlier
    NAME"): only the last one's gradients are reduced. Durations are rounded to whole microseconds, as the schema wants
    them, such that their sum is kept. One GPU needs no collectives.

    Args:
        network: what is trained.
        setting: how the step is run, with the number of ranks.
        step: where the durations come from, of however many passes; None leaves them 0.
        overlap: False where the step is compiled: no gradient is there before its end.
        tensor_s: seconds of every gradient tensor's hook (`costs.scaling.tensor_seconds`), which the layer that
            completes its bucket takes longer, as in `sim.ddp`; without a step none.
    """
    builder = _StepBuilder(network, setting, step, tensor_s)
    if setting.passes > 1:
        builder.passes("earlier ", setting.passes - 1)
    builder.passes("", 1, ddp_buckets(network) if setting.data_parallel else (), overlap=overlap)
    builder.update()
    return tuple(builder.nodes)


class _StepBuilder:
    """The nodes of a step under way; the parts of a step are added in execution order."""

    def __init__(self, network: Network, setting: StepSetting, step: StepTime | None, tensor_s: float) -> None:
        self.network, self.setting = network, setting
        self.batch, self.step = setting.pass_batch, None if step is None else step.accumulated(1)
        self._whole = None if step is None else step.accumulated(setting.passes)
        names = (layer.name for layer in network.layers)
        self._traffic = dict(zip(names, network_traffic(network, setting.one_pass), strict=True))
        self.nodes: list[Node] = []
        self._clock = _MicrosecondClock()
        self._carried_s = 0.0  # measured time of what is no node
        self._measured = {} if self.step is None else {layer.layer: layer for layer in self.step.layers}
        self._tensor_s = 0.0 if self.step is None else tensor_s
        self._reduced: list[int] = []
        self._done: set[int] = set()  # the backward nodes of the passes so far
        self._prefix, self._times = "", 1
        self._sharded = setting.sharding != "none"

    def passes(self, prefix: str, times: int, buckets: Sequence[Bucket] = (), *, overlap: bool = True) -> None:
        """Add `times` forward and backward passes, each layer's as one node."""
        self._prefix, self._times = prefix, times
        self._backward(self._forward(), buckets, overlap)

    def update(self) -> None:
        """The regulariser and the optimizer, which wait for every gradient; of its own share where that is sharded.

        The sums of the gradients of several passes, which are all of a GPU's, count here.
        """
        self._prefix, self._times = "", 1
        share = self.setting.update_share
        seconds = self._whole.updating(share).optimizer_s + self._whole.regularizer_s if self._whole else 0.0
        num_bytes = update_traffic(self.network, kind_of(self.setting), momentum=self.setting.momentum)
        num_bytes = round(share * num_bytes) + step_penalty(self.network, self.setting, gpu=True).num_bytes
        num_bytes += (self.setting.passes - 1) * sum_bytes(self.network)
        updated = self._add("optimizer", set(self._reduced) or self._done, seconds, 0, num_bytes)
        if self._sharded and self._reduced:
            own_bytes = -(-self.network.gradient_bytes // self.setting.num_gpus)
            self._communicate("all_gather", updated, Collective.ALL_GATHER, own_bytes)

    def _forward(self) -> dict[str, set[int]]:
        """Every layer, then the loss; returns what each layer's output waits for."""
        producers: dict[str, set[str]] = {}
        for source, target in self.network.edges:
            producers.setdefault(target, set()).add(source)
        done: dict[str, set[int]] = {}
        for layer in self.network.layers:
            deps = set().union(*(done[name] for name in producers.get(layer.name, ()))) or self._done
            traffic = self._traffic[layer.name]
            macs = layer.repeats(self.batch) * layer_macs(layer, "exact").forward
            seconds = self._measured[layer.name].forward_s if layer.name in self._measured else 0.0
            done[layer.name] = self._add(f"{layer.name}.forward", deps, seconds, macs, traffic.forward_bytes)
        outputs = done.keys() - {source for source, _ in self.network.edges}
        deps = set().union(*(done[name] for name in outputs))
        logits_bytes = 4 * self.batch * self.network.num_classes
        seconds = self.step.overhead_s if self.step else 0.0
        self._loss = self._add("loss", deps, seconds, 0, 3 * logits_bytes)  # reads, writes, and writes their gradient
        return done

    def _backward(self, forward: Mapping[str, set[int]], buckets: Sequence[Bucket], overlap: bool) -> None:
        """Every layer, last to first, and each bucket's collective as soon as its gradients are there."""
        consumers: dict[str, set[str]] = {}
        for source, target in self.network.edges:
            consumers.setdefault(source, set()).add(target)
        of_parameter = {parameter.name: parameter.layer for parameter in self.network.parameters}
        every = {layer.name for layer in self.network.layers}
        waiting = [
            (bucket, {of_parameter[name] for name in bucket.parameters} if overlap else every) for bucket in buckets
        ]
        hooks_s: defaultdict[str, float] = defaultdict(float)
        for bucket in buckets:
            hooks_s[bucket.ready_layer] += self._tensor_s * len(bucket.parameters)
        done: dict[str, set[int]] = {}
        for layer in reversed(self.network.layers):
            after = [done[name] for name in consumers.get(layer.name, ())] or [self._loss]
            deps = forward[layer.name].union(*after)
            traffic = self._traffic[layer.name]
            macs = layer.repeats(self.batch) * layer_macs(layer, "exact").backward
            seconds = self._measured[layer.name].backward_s if layer.name in self._measured else 0.0
            seconds += hooks_s[layer.name]
            done[layer.name] = self._add(f"{layer.name}.backward", deps, seconds, macs, traffic.backward_bytes)
            while waiting and waiting[0][1] <= done.keys():
                bucket, layers = waiting.pop(0)
                self._reduce(set().union(*(done[name] for name in layers)), bucket.num_bytes)
        assert not waiting, "every bucket's layers are layers of the network"
        self._done = set().union(*done.values())

    def _add(self, name: str, deps: set[int], seconds: float, macs: int, num_bytes: int) -> set[int]:
        """Add an operator of one pass, as often as it runs; returns what waits for it has to wait for."""
        self._carried_s += self._times * seconds
        if not num_bytes and not macs:
            return deps
        operations = 2 * macs or num_bytes // self.setting.precision.activation_bytes
        self.nodes.append(
            Node(
                id=len(self.nodes),
                name=f"{self._prefix}{name}",
                data_deps=tuple(sorted(deps)),
                duration_micros=self._clock.advance(self._carried_s),
                num_ops=self._times * operations,
                tensor_bytes=self._times * num_bytes,
            )
        )
        self._carried_s = 0.0
        return {self.nodes[-1].id}

    def _reduce(self, deps: set[int], num_bytes: int) -> None:
        """One stream: a bucket's collective also waits for the one before."""
        kind, name = Collective.ALL_REDUCE, "all_reduce"
        if self._sharded:
            kind, name = Collective.REDUCE_SCATTER, "reduce_scatter"
        deps = deps | set(self._reduced[-1:])
        self._reduced.append(self._communicate(f"{name}.{len(self._reduced)}", deps, kind, num_bytes))

    def _communicate(self, name: str, deps: set[int], kind: Collective, num_bytes: int) -> int:
        """Add a collective; returns its id."""
        number = len(self.nodes)
        self.nodes.append(
            Node(id=number, name=name, data_deps=tuple(sorted(deps)), collective=kind, comm_bytes=num_bytes)
        )
        return number


def encode_trace(nodes: tuple[Node, ...], description: dict[str, str]) -> bytes:
    """The bytes of one rank's file: metadata with `description` as string attributes, then the nodes."""
    metadata = protobuf.text(1, SCHEMA) + b"".join(
        protobuf.block(2, protobuf.text(1, name) + protobuf.text(_STRING, value)) for name, value in description.items()
    )
    messages = [metadata, *map(_encode_node, nodes)]
    return b"".join(protobuf.varint(len(message)) + message for message in messages)


class _Kind(NamedTuple):
    """What the steps of an epoch depend on: one folder stands for all epochs of a kind."""

    architecture: str
    batch_per_gpu: int
    passes: int
    regularized: bool


def write_chakra(
    trace: Trace, out: Path, *, num_gpus: int | None = None, sharding: Sharding | str = "none"
) -> list[Path]:
    """Write a folder per kind of step that the run has, each with `step.RANK.et` for every rank.

    Steps differ in architecture, mini-batch, passes, and whether they have a penalty. `index.json`, the last of the
    files, says which epochs a folder stands for, and how many iterations they are on so many ranks: every image is
    trained on. ASTRA-sim's workload is `FOLDER/step`.

    Args:
        trace: of a run, complete or not.
        out: the folder.
        num_gpus: ranks; None means the most that were recorded, but at least two, because a single one reduces nothing.
        sharding: as `StepSetting.sharding`.

    Raises:
        UsageError: no epochs, no GPUs or too many, no such sharding, or a folder that cannot be written or holds files
            of more ranks.
    """
    ranks = max(*trace.world_sizes, 2) if num_gpus is None else num_gpus
    shared = parse_sharding(sharding)
    if not 1 <= ranks <= _MOST_RANKS:
        raise UsageError(f"gpus is {ranks:,}, expected 1 to {_MOST_RANKS:,}: every rank is a file per architecture")
    if not trace.epochs:
        raise UsageError(f"{trace.path} holds no epoch, so there is no step to export")
    kinds: dict[_Kind, list[Epoch]] = {}
    for epoch in trace.epochs:
        kind = _Kind(epoch.architecture, epoch.batch_per_gpu, epoch.passes, epoch.regularized)
        kinds.setdefault(kind, []).append(epoch)
    folders = {kind: out / f"epoch-{epochs[0].epoch:03d}-{kind.architecture}" for kind, epochs in kinds.items()}
    for folder in folders.values():
        check_no_other_ranks(folder, "step.*.et", ranks)
    index, written = [], []
    for kind, epochs in kinds.items():
        content = _step_content(trace, epochs[0], ranks, shared)
        written += _write_ranks(folders[kind], content, ranks)
        index.append(
            {
                "folder": folders[kind].name,
                **kind._asdict(),
                "epochs": [epoch.epoch for epoch in epochs],
                "num_iterations": sum(epoch.iterations_with(epoch.batch_per_gpu, ranks) for epoch in epochs),
                "ranks": ranks,
                "sharding": shared,
            }
        )
    try:
        write_whole(out / "index.json", msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n")
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error
    return [*written, out / "index.json"]


def _write_ranks(folder: Path, content: bytes, ranks: int) -> list[Path]:
    """Equal ranks, a file each."""
    files = [folder / f"step.{rank}.et" for rank in range(ranks)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            write_whole(file, content)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from error
    return files


def _step_content(trace: Trace, epoch: Epoch, ranks: int, sharding: Sharding) -> bytes:
    """What every rank's file of a step of `epoch` holds."""
    network = trace.networks[epoch.architecture]
    setting = msgspec.structs.replace(trace.setting_of(epoch), num_gpus=ranks, sharding=sharding)
    profile, step = find_profile(network, trace.profiles, setting.one_pass), None
    on_gpus = trace.run.device.kind == "cuda"
    if profile is not None:
        step = slowed(recorded_step(network, profile, setting), ranks, on_gpus=on_gpus)
    tensor_s = tensor_seconds(ranks, on_gpus=on_gpus)
    hooks = ", what other GPUs add fitted" if tensor_s else ""
    return encode_trace(
        step_nodes(network, setting, step=step, overlap=not trace.compiled, tensor_s=tensor_s),
        {
            "schema": f"Chakra v{SCHEMA}",
            "model": trace.run.model,
            "origin": trace.run.origin,
            "architecture": epoch.architecture,
            "batch_per_gpu": str(epoch.batch_per_gpu),
            "durations": f"measured on {profile.device}{hooks}" if profile else "none",
        },
    )


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
    attributes = [protobuf.text(1, "is_cpu_op") + protobuf.integer(_BOOL, 0)]
    if node.collective is not None:
        attributes.append(protobuf.text(1, "comm_type") + protobuf.integer(_INT64, node.collective))
        attributes.append(protobuf.text(1, "comm_size") + protobuf.integer(_INT64, node.comm_bytes))
        attributes.append(protobuf.text(1, "involved_dim") + protobuf.block(_BOOL_LIST, protobuf.packed(1, _ALL)))
    else:
        attributes.append(protobuf.text(1, "num_ops") + protobuf.integer(_INT64, node.num_ops))
        attributes.append(protobuf.text(1, "tensor_size") + protobuf.integer(_UINT64, node.tensor_bytes))
    return b"".join(
        [
            protobuf.integer(1, node.id),
            protobuf.text(2, node.name),
            protobuf.integer(3, _COMP_NODE if node.collective is None else _COMM_COLL_NODE),
            protobuf.packed(5, list(node.data_deps)),
            protobuf.integer(7, node.duration_micros),
            *(protobuf.block(10, attribute) for attribute in attributes),
        ]
    )
