"""The files are decoded with protobuf's own library and a schema that is written out here from et_def.proto."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from ptsim.costs.scaling import load_scaling
from ptsim.costs.times import LayerTime, StepTime
from ptsim.criteria import group_lasso_work
from ptsim.errors import UsageError
from ptsim.export import protobuf
from ptsim.export.chakra import step_nodes, write_chakra
from ptsim.network import Network, Precision
from ptsim.setting import StepSetting
from ptsim.trace.io import read_trace
from tests.traces import A100, CPU, NetworkBuilder, dense_trace, shrinking_trace

Field = descriptor_pb2.FieldDescriptorProto
# AttributeProto's oneof: for every scalar type a value and a list of it, numbered from 3 in this order.
SCALARS = [
    "double",
    "float",
    "int32",
    "int64",
    "uint32",
    "uint64",
    "sint32",
    "sint64",
    "fixed32",
    "fixed64",
    "sfixed32",
    "sfixed64",
    "bool",
    "string",
    "bytes",
]
# message → field → (number, type, repeated, message or enum type); all of et_def.proto that a trace of steps can hold.
SCHEMA: dict[str, dict[str, tuple[int, int, bool, str]]] = {
    **{
        f"{scalar.capitalize()}List": {"values": (1, getattr(Field, f"TYPE_{scalar.upper()}"), True, "")}
        for scalar in SCALARS
    },
    "AttributeProto": {
        "name": (1, Field.TYPE_STRING, False, ""),
        "doc_string": (2, Field.TYPE_STRING, False, ""),
        **{
            f"{scalar}_val": (3 + 2 * i, getattr(Field, f"TYPE_{scalar.upper()}"), False, "")
            for i, scalar in enumerate(SCALARS)
        },
        **{
            f"{scalar}_list": (4 + 2 * i, Field.TYPE_MESSAGE, False, f"{scalar.capitalize()}List")
            for i, scalar in enumerate(SCALARS)
        },
    },
    "GlobalMetadata": {
        "version": (1, Field.TYPE_STRING, False, ""),
        "attr": (2, Field.TYPE_MESSAGE, True, "AttributeProto"),
    },
    "IOInfo": {
        "values": (1, Field.TYPE_STRING, False, ""),
        "shapes": (2, Field.TYPE_STRING, False, ""),
        "types": (3, Field.TYPE_STRING, False, ""),
    },
    "Node": {
        "id": (1, Field.TYPE_UINT64, False, ""),
        "name": (2, Field.TYPE_STRING, False, ""),
        "type": (3, Field.TYPE_ENUM, False, "NodeType"),
        "ctrl_deps": (4, Field.TYPE_UINT64, True, ""),
        "data_deps": (5, Field.TYPE_UINT64, True, ""),
        "start_time_micros": (6, Field.TYPE_UINT64, False, ""),
        "duration_micros": (7, Field.TYPE_UINT64, False, ""),
        "inputs": (8, Field.TYPE_MESSAGE, False, "IOInfo"),
        "outputs": (9, Field.TYPE_MESSAGE, False, "IOInfo"),
        "attr": (10, Field.TYPE_MESSAGE, True, "AttributeProto"),
    },
}
NODE_TYPES = ["INVALID", "METADATA", "MEM_LOAD", "MEM_STORE", "COMP", "COMM_SEND", "COMM_RECV", "COMM_COLL"]
# The field of AttributeProto that et_feeder_node.cpp takes each attribute from; any other one it would read as 0.
FEEDER = {
    "is_cpu_op": "bool_val",
    "num_ops": "int64_val",
    "tensor_size": "uint64_val",
    "comm_type": "int64_val",
    "comm_size": "int64_val",
    "involved_dim": "bool_list",
}


def message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="et_def.proto", package="ChakraProtoMsg", syntax="proto3")
    enum = file.enum_type.add(name="NodeType")
    for number, name in enumerate(NODE_TYPES):
        enum.value.add(name=f"{name}_NODE", number=number)
    for message_name, fields in SCHEMA.items():
        message = file.message_type.add(name=message_name)
        if message_name == "AttributeProto":
            message.oneof_decl.add(name="value")
        for name, (number, kind, repeated, type_name) in fields.items():
            field = message.field.add(name=name, number=number, type=kind)
            field.label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            if type_name:
                field.type_name = f".ChakraProtoMsg.{type_name}"
            if message_name == "AttributeProto" and number > 2:
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ChakraProtoMsg.{name}")) for name in SCHEMA
    }


CLASSES = message_classes()


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def decode(file: Path) -> tuple[Any, list[Any]]:
    data, at, blocks = file.read_bytes(), 0, []
    while at < len(data):
        length, at = read_varint(data, at)
        blocks.append(data[at : at + length])
        at += length
    assert at == len(data)
    return CLASSES["GlobalMetadata"].FromString(blocks[0]), [CLASSES["Node"].FromString(b) for b in blocks[1:]]


def attributes(message: Any) -> dict[str, Any]:
    return {attr.name: getattr(attr, attr.WhichOneof("value")) for attr in message.attr}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[Path]]:
    folder = tmp_path_factory.mktemp("chakra")
    trace = read_trace(shrinking_trace(folder / "t.jsonl", world_size=4, num_train=20_000))
    return trace, folder / "out", write_chakra(trace, folder / "out")


def test_there_is_a_file_per_rank_and_architecture(exported: tuple[Any, Path, list[Path]]) -> None:
    trace, out, files = exported
    settings = {(epoch.architecture, epoch.batch_per_gpu) for epoch in trace.epochs}
    assert len(files) == 4 * len(settings) + 1
    assert all(file.is_file() for file in files)
    assert files[-1] == out / "index.json"
    index = msgspec.json.decode((out / "index.json").read_bytes())
    assert sorted(n for entry in index for n in entry["epochs"]) == [epoch.epoch for epoch in trace.epochs]
    assert sum(entry["num_iterations"] for entry in index) == sum(epoch.num_iterations for epoch in trace.epochs)


def test_a_file_is_metadata_and_then_nodes_that_nothing_is_lost_from(exported: tuple[Any, Path, list[Path]]) -> None:
    trace, _, files = exported
    metadata, nodes = decode(files[0])
    assert metadata.version == "0.0.4"
    assert attributes(metadata)["architecture"] == trace.epochs[0].architecture
    network = trace.networks[trace.epochs[0].architecture]
    compute = [node for node in nodes if NODE_TYPES[node.type] == "COMP"]
    sums = sum(layer.op == "add" for layer in network.layers)  # hand their gradient on: nothing moves, and no node
    assert sums == 6
    assert len(compute) == 2 * len(network.layers) - sums + 2  # and the loss and the optimizer
    for node in nodes:
        size = node.ByteSize()
        node.DiscardUnknownFields()
        assert node.ByteSize() == size


def test_every_attribute_lies_in_the_field_that_the_feeder_reads(exported: tuple[Any, Path, list[Path]]) -> None:
    _, nodes = decode(exported[2][0])
    for node in nodes:
        names = {attr.name: attr.WhichOneof("value") for attr in node.attr}
        assert names.items() <= FEEDER.items()
        communicates = NODE_TYPES[node.type] == "COMM_COLL"
        assert names.keys() == {
            "is_cpu_op",
            *(("comm_type", "comm_size", "involved_dim") if communicates else ("num_ops", "tensor_size")),
        }


def test_bytes_are_those_of_the_layers_traffic(exported: tuple[Any, Path, list[Path]]) -> None:
    trace, _, files = exported
    _, nodes = decode(files[0])
    network, batch = trace.networks[trace.epochs[0].architecture], trace.epochs[0].batch_per_gpu
    relu = next(layer for layer in network.layers if layer.kind == "activation")
    by_name = {node.name: attributes(node) for node in nodes}
    assert by_name[f"{relu.name}.forward"]["tensor_size"] == 4 * batch * (relu.input_elements + relu.output_elements)


def test_a_roofline_finds_work_wherever_bytes_are_moved(exported: tuple[Any, Path, list[Path]]) -> None:
    """ASTRA-sim's time is num_ops / min(peak, bandwidth * num_ops / tensor_size), and 0 / 0 for no operations."""
    _, nodes = decode(exported[2][0])
    computing = [attributes(node) for node in nodes if NODE_TYPES[node.type] == "COMP"]
    assert all(node["num_ops"] > 0 for node in computing)
    assert all(node["tensor_size"] > 0 for node in computing)  # else it is skipped with all that waits for it


def test_flops_are_twice_the_macs_of_the_mini_batch(exported: tuple[Any, Path, list[Path]]) -> None:
    trace, _, files = exported
    _, nodes = decode(files[0])
    network, batch = trace.networks[trace.epochs[0].architecture], trace.epochs[0].batch_per_gpu
    by_name = {node.name: attributes(node) for node in nodes}
    conv = network.layer("layer1.0.conv1")
    assert by_name["layer1.0.conv1.forward"]["num_ops"] == 2 * conv.forward_macs * batch
    assert by_name["layer1.0.conv1.backward"]["num_ops"] == 4 * conv.forward_macs * batch
    assert by_name["conv1.backward"]["num_ops"] == 2 * network.layer("conv1").forward_macs * batch  # no input gradient


def test_the_all_reduces_carry_every_gradient_once(exported: tuple[Any, Path, list[Path]]) -> None:
    trace, _, files = exported
    _, nodes = decode(files[0])
    reduces = [attributes(node) for node in nodes if NODE_TYPES[node.type] == "COMM_COLL"]
    network = trace.networks[trace.epochs[0].architecture]
    assert sum(node["comm_size"] for node in reduces) == 4 * network.num_parameters
    assert {node["comm_type"] for node in reduces} == {0}
    assert all(list(node["involved_dim"].values) == [True] * 10 for node in reduces)  # of the network's dimensions
    assert not any(node["is_cpu_op"] for node in reduces)


def test_every_node_waits_only_for_earlier_ones_and_the_optimizer_for_all_of_them(
    exported: tuple[Any, Path, list[Path]],
) -> None:
    _, nodes = decode(exported[2][0])
    assert [node.id for node in nodes] == list(range(len(nodes)))
    assert all(dependency < node.id for node in nodes for dependency in node.data_deps)
    before: set[int] = set()
    pending = [nodes[-1].id]
    while pending:
        number = pending.pop()
        before.add(number)
        pending += [n for n in nodes[number].data_deps if n not in before]
    assert before == set(range(len(nodes)))


def test_durations_add_up_to_the_recorded_step_and_the_hooks_of_its_gradients(
    exported: tuple[Any, Path, list[Path]],
) -> None:
    """47 tensors: 15 convolutions, 15 BatchNorms of two each, and the linear layer's two."""
    trace, _, files = exported
    metadata, nodes = decode(files[0])
    profile = trace.profiles[0]
    assert profile.step_s > profile.forward_s + profile.backward_s + profile.optimizer_s + profile.regularizer_s
    step_s = (1 + load_scaling().slowdown) * profile.step_s + 47 * load_scaling().tensor_s
    assert sum(node.duration_micros for node in nodes) == pytest.approx(step_s * 1e6, abs=1)
    assert attributes(metadata)["durations"].endswith("what other GPUs add fitted")


def test_on_processors_and_on_one_gpu_no_hooks_come_on_top(tmp_path: Path) -> None:
    for name, gpus in ((CPU, 4), (A100, 1)):
        trace = read_trace(dense_trace(tmp_path / f"{gpus}.jsonl", epochs=1, device=name))
        metadata, nodes = decode(write_chakra(trace, tmp_path / name.split()[0], num_gpus=gpus)[0])
        took_s = trace.profiles[0].step_s - trace.profiles[0].regularizer_s
        assert sum(node.duration_micros for node in nodes) == pytest.approx(took_s * 1e6, abs=1)
        assert attributes(metadata)["durations"] == f"measured on {name}"


def test_layers_that_were_timed_one_by_one_are_scaled_to_the_step(tmp_path: Path) -> None:
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1))
    # per-layer timers cost time: every layer appears a quarter longer than it is
    slow = tuple(
        msgspec.structs.replace(
            layer,
            forward_s=1.25 * layer.forward_s,
            backward_s=None if layer.backward_s is None else 1.25 * layer.backward_s,
        )
        for layer in trace.profiles[0].layers
    )
    timed = msgspec.structs.replace(trace, profiles=(msgspec.structs.replace(trace.profiles[0], layers=slow),))
    (_, plain), (_, scaled) = (
        decode(write_chakra(run, tmp_path / name, num_gpus=1)[0]) for name, run in (("a", trace), ("b", timed))
    )
    # up to rounding, and but for what has no backward node
    assert [n.duration_micros for n in scaled] == pytest.approx([n.duration_micros for n in plain], abs=1)


def test_a_step_of_two_passes_lasts_as_long_as_both_and_one_update(tmp_path: Path) -> None:
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1))
    epoch, profile = trace.epochs[0], trace.profiles[0]
    accumulated = msgspec.structs.replace(epoch, passes=2, batch_per_gpu=2 * profile.batch)
    trace = msgspec.structs.replace(trace, epochs=(accumulated,))
    _, nodes = decode(write_chakra(trace, tmp_path / "out", num_gpus=1)[0])
    one_pass_s = profile.step_s - profile.optimizer_s - profile.regularizer_s
    assert sum(node.duration_micros for node in nodes) == pytest.approx(
        (2 * one_pass_s + (1 + 3 / 11) * profile.optimizer_s) * 1e6,
        abs=1,  # a sum moves 3 values, an update 11
    )


def test_a_chain_by_hand() -> None:
    net = NetworkBuilder("chain", (3, 4, 4), 2)
    net.linear("fc", net.flatten("flat", net.relu("relu", net.conv("conv", None, 2))), 2)
    network = net.build()
    view = msgspec.structs.replace(network.layer("flat"), view=True)  # as a captured network has it: no byte moves
    layers = tuple(view if layer.name == "flat" else layer for layer in network.layers)
    nodes = step_nodes(msgspec.structs.replace(network, layers=layers), StepSetting(batch=8, num_gpus=2))
    assert all(node.tensor_bytes or node.comm_bytes for node in nodes)
    names = [node.name for node in nodes]
    assert names == [
        "conv.forward", "relu.forward", "fc.forward", "loss",
        "fc.backward", "relu.backward", "conv.backward", "all_reduce.0", "optimizer",
    ]  # fmt: skip
    by_name = {node.name: node for node in nodes}
    assert by_name["fc.forward"].data_deps == (1,)  # through the flatten
    assert by_name["loss"].data_deps == (2,)
    assert by_name["relu.backward"].data_deps == (1, 4)
    assert by_name["all_reduce.0"].comm_bytes == 4 * (2 * 3 * 9 + 32 * 2 + 2)
    assert by_name["all_reduce.0"].data_deps == (4, 6)
    assert by_name["optimizer"].data_deps == (7,)
    assert by_name["conv.forward"].num_ops == 2 * (2 * 3 * 9 * 16) * 8
    assert by_name["conv.backward"].num_ops == by_name["conv.forward"].num_ops  # the images need no gradient
    assert by_name["fc.backward"].num_ops == 2 * by_name["fc.forward"].num_ops == 2 * (2 * 64) * 8
    assert by_name["relu.forward"].tensor_bytes == 4 * 8 * (32 + 32)
    assert by_name["relu.forward"].num_ops == 8 * (32 + 32)  # one for every element that is moved
    assert by_name["loss"].tensor_bytes == 3 * 4 * 8 * 2  # logits of two classes: read, written, and their gradient
    assert by_name["optimizer"].tensor_bytes == 11 * 4 * (54 + 66)  # SGD with momentum and weight decay
    half = step_nodes(network, StepSetting(batch=8, precision=Precision.BF16))
    relu = next(node for node in half if node.name == "relu.forward")
    assert (relu.tensor_bytes, relu.num_ops) == (2 * 8 * (32 + 32), 8 * (32 + 32))


def test_durations_are_whole_microseconds_whose_sum_is_kept() -> None:
    """Ends in µs: forward 1.4, 2.8, 4.6 with the view's 0.4, 5.6 with the loss; backward 8.0, 9.4, 10.8; all 12."""
    net = NetworkBuilder("chain", (3, 4, 4), 2)
    net.linear("fc", net.flatten("flat", net.relu("relu", net.conv("conv", None, 2))), 2)
    network = net.build()
    layers = tuple(msgspec.structs.replace(layer, view=layer.name == "flat") for layer in network.layers)
    times = {"conv": (1.4e-6, 1.4e-6), "relu": (1.4e-6, 1.4e-6), "flat": (0.4e-6, 0.0), "fc": (1.4e-6, 2.4e-6)}
    took = tuple(
        LayerTime(layer=layer.name, kind=layer.kind, forward_s=there, backward_s=back, tier="measured")
        for layer, (there, back) in ((layer, times[layer.name]) for layer in layers)
    )
    step = StepTime(
        layers=took,
        optimizer_s=0.9e-6,
        regularizer_s=0.3e-6,
        overhead_s=1.0e-6,
        low_s=0.0,
        high_s=0.0,
        tier="measured",
    )
    nodes = step_nodes(msgspec.structs.replace(network, layers=layers), StepSetting(batch=8), step=step)
    assert {node.name: node.duration_micros for node in nodes} == {
        "conv.forward": 1, "relu.forward": 2, "fc.forward": 2, "loss": 1,
        "fc.backward": 2, "relu.backward": 1, "conv.backward": 2, "optimizer": 1,
    }  # fmt: skip


def test_passes_before_the_last_one_come_first_and_reduce_nothing() -> None:
    """Three passes of 8 images: two of them as one node a layer; the view of the flatten is no node."""
    net = NetworkBuilder("chain", (3, 4, 4), 2)
    net.linear("fc", net.flatten("flat", net.relu("relu", net.conv("conv", None, 2))), 2)
    network = net.build()
    layers = tuple(msgspec.structs.replace(layer, view=layer.name == "flat") for layer in network.layers)
    network = msgspec.structs.replace(network, layers=layers)
    micros = {"conv": (2, 4), "relu": (1, 1), "flat": (0, 0), "fc": (1, 2)}
    step = StepTime(
        layers=tuple(
            LayerTime(
                layer=name, kind=network.layer(name).kind, forward_s=t * 1e-6, backward_s=b * 1e-6, tier="measured"
            )
            for name, (t, b) in micros.items()
        ),
        optimizer_s=5e-6,
        regularizer_s=2e-6,
        overhead_s=1e-6,
        low_s=0.0,
        high_s=0.0,
        tier="measured",
        again_s=3e-6,
    )
    setting = StepSetting(batch=24, passes=3, num_gpus=2)
    nodes = step_nodes(network, setting, step=step)
    assert [(node.name, node.duration_micros) for node in nodes] == [
        ("earlier conv.forward", 4), ("earlier relu.forward", 2), ("earlier fc.forward", 2), ("earlier loss", 2),
        ("earlier fc.backward", 4), ("earlier relu.backward", 2), ("earlier conv.backward", 8),
        ("conv.forward", 2), ("relu.forward", 1), ("fc.forward", 1), ("loss", 1),
        ("fc.backward", 2), ("relu.backward", 1), ("conv.backward", 4), ("all_reduce.0", 0), ("optimizer", 7 + 2 * 3),
    ]  # fmt: skip
    by_name = {node.name: node for node in nodes}
    assert by_name["earlier conv.forward"].data_deps == ()
    assert by_name["conv.forward"].data_deps == (1, 4, 5, 6)  # all that was computed backwards before
    assert by_name["relu.forward"].data_deps == (7,)
    assert by_name["all_reduce.0"].data_deps == (11, 13)
    assert by_name["optimizer"].data_deps == (14,)
    assert by_name["conv.forward"].num_ops == 2 * (2 * 3 * 9 * 16) * 8
    assert by_name["earlier conv.forward"].num_ops == 2 * by_name["conv.forward"].num_ops
    assert by_name["relu.forward"].tensor_bytes == 4 * 8 * (32 + 32)
    assert by_name["earlier relu.forward"].tensor_bytes == 2 * 4 * 8 * (32 + 32)
    assert by_name["earlier relu.forward"].num_ops == 2 * 8 * (32 + 32)
    assert by_name["earlier loss"].tensor_bytes == 2 * by_name["loss"].tensor_bytes == 2 * 3 * 4 * 8 * 2
    assert by_name["optimizer"].tensor_bytes == (11 + 2 * 3) * 4 * (54 + 66)  # one update, and two sums of gradients
    assert step_nodes(network, setting, step=step.accumulated(3)) == nodes


def test_epochs_of_other_passes_are_another_step(tmp_path: Path) -> None:
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=2))
    first, second = trace.epochs
    trace = msgspec.structs.replace(trace, epochs=(first, msgspec.structs.replace(second, passes=2)))
    one, two = (decode(file)[1] for file in write_chakra(trace, tmp_path / "out", num_gpus=1)[:-1])
    index = msgspec.json.decode((tmp_path / "out" / "index.json").read_bytes())
    assert [(entry["epochs"], entry["passes"]) for entry in index] == [([0], 1), ([1], 2)]
    assert len(two) == 2 * len(one) - 1  # both passes, and one optimizer


def test_a_sum_of_measured_passes_takes_its_share_of_the_measured_update(tmp_path: Path) -> None:
    """A second pass as long as the first, whose gradients are added at the pace of the update: 3 values of 11."""
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1))
    (profile,), (epoch,) = trace.profiles, trace.epochs
    profile = msgspec.structs.replace(profile, optimizer_s=1.1e-3, step_s=profile.step_s + 1.1e-3)
    epoch = msgspec.structs.replace(epoch, passes=2, batch_per_gpu=2 * epoch.batch_per_gpu)
    trace = msgspec.structs.replace(trace, profiles=(profile,), epochs=(epoch,))
    _, nodes = decode(write_chakra(trace, tmp_path / "out", num_gpus=1)[0])
    (update,) = (node for node in nodes if node.name == "optimizer")
    assert update.duration_micros == pytest.approx(1100 + 300, abs=1)


def test_as_many_ranks_are_written_as_the_run_had_at_most(tmp_path: Path) -> None:
    one, four = (read_trace(dense_trace(tmp_path / f"{n}.jsonl", world_size=n)) for n in (1, 4))
    mixed = msgspec.structs.replace(one, epochs=(*one.epochs[:3], *four.epochs[3:]))
    *files, _ = write_chakra(mixed, tmp_path / "out")
    assert [file.name for file in files] == [f"step.{rank}.et" for rank in range(4)]


def two_buckets(classes: int = 9000) -> Network:
    """The layers of `test_a_chain_by_hand` with 9,000 classes: the linear layer's 1.2 MB are a bucket of their own."""
    net = NetworkBuilder("chain", (3, 4, 4), classes)
    net.linear("fc", net.flatten("flat", net.relu("relu", net.conv("conv", None, 2))), classes)
    network = net.build()
    layers = tuple(msgspec.structs.replace(layer, view=layer.name == "flat") for layer in network.layers)
    return msgspec.structs.replace(network, layers=layers)


FC, REST = 4 * (32 * 9000 + 9000), 4 * (2 * 3 * 9)  # bytes of the gradients of `two_buckets`


@pytest.mark.parametrize(
    ("overlap", "after_the_loss"),
    [
        (True, [
            ("fc.backward", (2, 3), 0), ("all_reduce.0", (4,), FC), ("relu.backward", (1, 4), 0),
            ("conv.backward", (0, 6), 0), ("all_reduce.1", (5, 7), REST), ("optimizer", (5, 8), 0),
        ]),
        (False, [
            ("fc.backward", (2, 3), 0), ("relu.backward", (1, 4), 0), ("conv.backward", (0, 5), 0),
            ("all_reduce.0", (1, 4, 5, 6), FC), ("all_reduce.1", (1, 4, 5, 6, 7), REST), ("optimizer", (7, 8), 0),
        ]),
    ],
)  # fmt: skip
def test_an_all_reduce_starts_in_the_backward_pass_unless_the_step_is_compiled(
    overlap: bool, after_the_loss: list[tuple[str, tuple[int, ...], int]]
) -> None:
    nodes = step_nodes(two_buckets(), StepSetting(batch=8, num_gpus=2), overlap=overlap)
    assert [(node.name, node.data_deps, node.comm_bytes) for node in nodes[4:]] == after_the_loss


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("classes", "fc", "conv"), [(9000, 2, 1), (2, 0, 3), (300_000, 2, 1)])
def test_a_hook_of_every_gradient_runs_in_the_last_pass_before_the_layer_that_completes_its_bucket(
    classes: int, fc: int, conv: int, overlap: bool
) -> None:
    """Gradients come as fc.bias, fc.weight, conv.weight; of 300,000 classes the bias alone fills the first bucket."""
    network = two_buckets(classes)
    took = tuple(
        LayerTime(layer=name, kind=network.layer(name).kind, forward_s=1e-6, backward_s=2e-6, tier="measured")
        for name in ("conv", "relu", "fc")
    )
    step = StepTime(
        layers=took, optimizer_s=5e-6, regularizer_s=0.0, overhead_s=0.0, low_s=0.0, high_s=0.0, tier="measured"
    )
    setting = StepSetting(batch=16, passes=2, num_gpus=2)
    nodes = step_nodes(network, setting, step=step, overlap=overlap, tensor_s=50e-6)
    micros = {node.name: node.duration_micros for node in nodes if "backward" in node.name}
    assert micros == {
        "earlier fc.backward": 2, "earlier relu.backward": 2, "earlier conv.backward": 2,
        "fc.backward": 2 + 50 * fc, "relu.backward": 2, "conv.backward": 2 + 50 * conv,
    }  # fmt: skip
    plain = step_nodes(network, setting, overlap=overlap, tensor_s=50e-6)
    assert not any(node.duration_micros for node in plain)  # where nothing was measured


def test_a_compiled_run_has_its_all_reduces_at_the_end_of_the_step(tmp_path: Path) -> None:
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1))
    compiled = msgspec.structs.replace(trace.run, hyperparameters=trace.run.hyperparameters | {"compile": True})
    trace = msgspec.structs.replace(trace, run=compiled)
    _, nodes = decode(write_chakra(trace, tmp_path / "out")[0])
    backward = {node.id for node in nodes if node.name.endswith(".backward")}
    reduce = next(node for node in nodes if node.name == "all_reduce.0")
    assert backward <= set(reduce.data_deps)


def test_a_sharded_update_is_of_a_ranks_share_whose_result_is_gathered() -> None:
    """480 bytes of gradients over 7 ranks: 69 bytes each, the last one padded. The penalty is computed whole."""
    net = NetworkBuilder("chain", (3, 4, 4), 2)
    net.linear("fc", net.flatten("flat", net.relu("relu", net.conv("conv", None, 2))), 2)
    network = net.build()
    step = StepTime(
        layers=(), optimizer_s=14e-6, regularizer_s=3e-6, overhead_s=0.0, low_s=0.0, high_s=0.0, tier="measured"
    )
    setting = StepSetting(batch=8, num_gpus=7, sharding="zero1", regularizer="group_lasso")
    *_, reduce, optimizer, gather = step_nodes(network, setting, step=step)
    assert (reduce.name, reduce.collective, reduce.comm_bytes) == ("reduce_scatter.0", 7, 480)
    assert optimizer.data_deps == (reduce.id,)
    assert optimizer.duration_micros == 14 / 7 + 3
    assert optimizer.tensor_bytes == round(11 * 480 / 7) + group_lasso_work(network, gpu=True).num_bytes
    assert (gather.name, gather.collective, gather.comm_bytes) == ("all_gather", 2, 69)
    assert gather.data_deps == (optimizer.id,)
    alone = msgspec.structs.replace(setting, num_gpus=1)
    assert step_nodes(network, alone)[-1].tensor_bytes == 11 * 480 + group_lasso_work(network, gpu=True).num_bytes


def test_a_sharded_export_says_so(tmp_path: Path) -> None:
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1))
    _, nodes = decode(write_chakra(trace, tmp_path / "out", num_gpus=4, sharding="zero1")[0])
    *scattered, gathered = [attributes(node) for node in nodes if NODE_TYPES[node.type] == "COMM_COLL"]
    num_bytes = 4 * trace.networks[trace.epochs[0].architecture].num_parameters
    assert {node["comm_type"] for node in scattered} == {7}
    assert sum(node["comm_size"] for node in scattered) == num_bytes
    assert (gathered["comm_type"], gathered["comm_size"]) == (2, -(-num_bytes // 4))
    (entry,) = msgspec.json.decode((tmp_path / "out" / "index.json").read_bytes())
    assert entry["sharding"] == "zero1"
    with pytest.raises(UsageError, match="sharding is 'zero'"):
        write_chakra(trace, tmp_path / "other", sharding="zero")


def test_epochs_without_the_penalty_are_another_step(tmp_path: Path) -> None:
    """As in a run that first trains dense: the penalty is neither in the update's time nor in its bytes."""
    trace = read_trace(shrinking_trace(tmp_path / "t.jsonl", epochs=3))
    first, profile = trace.epochs[0], trace.profiles[0]
    epochs = tuple(
        msgspec.structs.replace(first, epoch=number, penalty_coefficient=coefficient)
        for number, coefficient in enumerate((0.0, 1e-4, 0.0))
    )
    trace = msgspec.structs.replace(trace, epochs=epochs)
    plain, penalised = (
        {node.name: node for node in decode(file)[1]}["optimizer"]
        for file in write_chakra(trace, tmp_path / "out", num_gpus=1)[:-1]
    )
    index = msgspec.json.decode((tmp_path / "out" / "index.json").read_bytes())
    assert [(entry["epochs"], entry["regularized"]) for entry in index] == [([0, 2], False), ([1], True)]
    assert [entry["num_iterations"] for entry in index] == [2 * first.num_iterations, first.num_iterations]
    assert profile.regularizer_s > 5e-6
    added = penalised.duration_micros - plain.duration_micros
    assert added == pytest.approx(profile.regularizer_s * 1e6, abs=1)
    penalty = group_lasso_work(trace.networks[first.architecture], gpu=True)
    assert attributes(penalised)["tensor_size"] - attributes(plain)["tensor_size"] == penalty.num_bytes


def test_files_of_an_earlier_job_of_more_ranks_are_not_mixed_with_those_of_this_one(tmp_path: Path) -> None:
    trace, out = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1)), tmp_path / "out"
    files = write_chakra(trace, out, num_gpus=12)
    (files[2].parent / "step.notes.et").write_text("of nobody")
    before = [file.read_bytes() for file in files]
    with pytest.raises(UsageError, match=r"holds step\.11\.et of an earlier job of more ranks"):
        write_chakra(trace, out, num_gpus=11)
    assert [file.read_bytes() for file in files] == before
    assert write_chakra(trace, out, num_gpus=12) == files


def test_one_gpu_reduces_nothing(tmp_path: Path) -> None:
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1))
    file, _ = write_chakra(trace, tmp_path / "out", num_gpus=1)
    assert {NODE_TYPES[node.type] for node in decode(file)[1]} == {"COMP"}


def test_a_trace_without_profiles_has_no_durations(tmp_path: Path) -> None:
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1, profiles=False))
    files = write_chakra(trace, tmp_path / "out")
    assert len(files) == 3
    assert all(node.duration_micros == 0 for node in decode(files[0])[1])


def test_a_trace_without_epochs_is_refused(tmp_path: Path) -> None:
    trace = read_trace(dense_trace(tmp_path / "t.jsonl", recorded_epochs=0))
    with pytest.raises(UsageError, match="no epoch"):
        write_chakra(trace, tmp_path / "out")


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**64 - 1])
def test_varints_are_read_back_by_hand(value: int) -> None:
    assert read_varint(protobuf.varint(value), 0) == (value, len(protobuf.varint(value)))


def test_the_varint_of_the_protobuf_guide() -> None:
    assert protobuf.varint(150) == b"\x96\x01"
    assert protobuf.integer(1, 150) == b"\x08\x96\x01"
    assert protobuf.text(2, "testing") == b"\x12\x07testing"


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_a_number_beyond_64_bits_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        protobuf.varint(value)


def test_negative_numbers_and_lists_on_the_wire() -> None:
    """Two's complement in ten bytes, and field 5 of wire type 2: three bytes that hold 1 and 300."""
    assert protobuf.varint(-1) == b"\xff" * 9 + b"\x01"
    assert read_varint(protobuf.varint(-(2**63)), 0) == (2**63, 10)
    assert protobuf.packed(5, [1, 300]) == b"\x2a\x03\x01\xac\x02"
    assert protobuf.packed(5, []) == b""


@pytest.mark.parametrize(
    ("ranks", "iterations"),
    [(1, [156, 104, 78]), (None, [78, 52, 40]), (8, [20, 14, 10])],
)
def test_the_index_counts_the_iterations_of_as_many_ranks(
    tmp_path: Path, ranks: int | None, iterations: list[int]
) -> None:
    """One rank trained 4,992 images an epoch, two epochs each with 64, 96 and 128 images a step; None: two ranks.

    On eight ranks an epoch takes 9.75, 6.5 and 4.875 steps, rounded up.
    """
    trace = read_trace(shrinking_trace(tmp_path / "t.jsonl"))
    assert {epoch.num_images for epoch in trace.epochs} == {4992}
    write_chakra(trace, tmp_path / "out", num_gpus=ranks)
    index = msgspec.json.decode((tmp_path / "out" / "index.json").read_bytes())
    assert [(entry["batch_per_gpu"], entry["num_iterations"]) for entry in index] == list(
        zip((64, 96, 128), iterations, strict=True)
    )
