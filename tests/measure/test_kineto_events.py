"""Which events a recording holds, which runs inside which and which launched a kernel; spans of time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ptsim.measure.kineto_events import Event, Recording, clip, length, outside, read_recording, union, within


def event(
    cat: str, name: str, begin_us: float | str, took_us: float | str, tid: int = 1, **args: Any
) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": tid, "ts": begin_us, "dur": took_us, "args": args}


def recording(folder: Path, *events: dict[str, Any], **head: Any) -> Recording:
    path = folder / "recorded.json"
    path.write_text(json.dumps({"traceEvents": events, **head}), encoding="utf-8")
    return read_recording(path)


def at(begin_s: float) -> Event:
    return Event(name="a", category="kernel", thread=("0", "7"), begin_s=begin_s, end_s=begin_s + 1, arguments={})


def test_spans_that_touch_are_one_and_time_counts_once() -> None:
    assert union([(4, 5), (0, 1), (1, 2), (4.5, 4.7)]) == [(0, 2), (4, 5)]
    assert length([(0, 2), (1, 3), (5, 6)]) == 4
    assert clip([(0, 2), (2, 4), (5, 9), (9, 10)], (2, 6)) == [(2, 4), (5, 6)]
    assert outside([(0, 4), (6, 7)], [(1, 2), (3, 5)]) == 1 + 1 + 1


def test_a_window_holds_what_begins_in_it_but_not_at_its_end() -> None:
    events = [at(0), at(1), at(2), at(3)]
    assert within(events, (1, 3)) == events[1:3]


def test_microseconds_are_read_as_numbers_and_as_text(tmp_path: Path) -> None:
    found = recording(tmp_path, event("cpu_op", "aten::add", 1_500_000, 250), event("cpu_op", "b", "2e6", "3"))
    assert [e.begin_s for e in found.host] == pytest.approx([0.0, 0.5])  # since the first event
    assert [e.seconds for e in found.host] == pytest.approx([250e-6, 3e-6])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])  # the last two write a byte order mark
@pytest.mark.parametrize("bare", [False, True])
def test_a_bare_list_of_events_and_a_byte_order_mark_change_nothing(
    tmp_path: Path, bare: bool, coding: str, packed: bool
) -> None:
    """Chrome's format has both; the list names no device."""
    events = [event("cpu_op", "aten::add", 10, 5), event("kernel", "k", 20, 2, device=0)]
    head = {"deviceProperties": [{"id": 0, "name": "GPU", "totalGlobalMem": 1}]}
    content = json.dumps(events if bare else {**head, "traceEvents": events}).encode(coding)
    path = tmp_path / "recorded.json"
    path.write_bytes(gzip.compress(content) if packed else content)
    found = read_recording(path)
    assert ([e.name for e in found.host], [e.name for e in found.device_events]) == (["aten::add"], ["k"])
    assert found.device == (None if bare else "GPU")


UNWRITABLE = {  # as Kineto writes it → as it is read
    rb"lib\cuda\utils\__init__.py(7): f": "lib\\cuda\\utils\\__init__.py(7): f",
    rb"a\\b\"c": 'a\\b"c',
    b'{"device": "cpu", "n": 1}(3): run': '{"device": "cpu", "n": 1}(3): run',
    b"two\nlines": "two lines",
    b"caf\xe9": "caf\ufffd",
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_names_and_numbers_that_kineto_writes_and_json_does_not_know_are_read(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / "recorded.json"
    path.write_bytes(
        b'{"schemaVersion": 1,\n"traceEvents": [\n{"name": "process_name", "ph": "M", "ts": 1, "pid": 9},\n'
        b'{"ph": "X", "cat": "user_annotation", "name": "' + name + b'", "pid": 9, "tid": 1,\n"ts": 10, "dur": 5,\n'
        b'"args": {"bandwidth (GB/s)": inf, "other": -nan}},\n'
        b'{"ph": "X", "cat": "cpu_op", "name": "aten::add", "pid": 9, "tid": 1, "ts": 11, "dur": 2, "args": {}}\n]}'
    )
    around, inside = read_recording(path).host
    assert (around.name, inside.name, inside.parent) == (UNWRITABLE[name], "aten::add", around)
    assert around.arguments == {"bandwidth (gb/s)": None, "other": None}


def test_times_since_1970_are_as_exact_as_others(tmp_path: Path) -> None:
    """As versions until 2024 write them: a float holds such seconds in steps of 0.24 µs, a quarter of this kernel's."""
    begin_us = 1_700_000_000_000_000
    found = recording(
        tmp_path,
        event("cpu_op", "aten::add", begin_us, 10),
        event("kernel", "k", begin_us + 20, 1, device=0),
        event("kernel", "k", begin_us + 21, 2, device=0),
    )
    assert [e.begin_s for e in found.device_events] == pytest.approx([20e-6, 21e-6], rel=1e-9)
    assert [e.seconds for e in found.device_events] == pytest.approx([1e-6, 2e-6], rel=1e-9)
    assert union(e.span for e in found.device_events) == [pytest.approx((20e-6, 23e-6), rel=1e-9)]


def test_operators_nest_on_their_own_thread_until_they_end(tmp_path: Path) -> None:
    """Inside: a child, a grandchild of the same times. Outside: another thread, what begins at the end.

    Of two that begin together the longer one is around the other, whichever the file names first.
    """
    found = recording(
        tmp_path,
        event("cpu_op", "outer", 0, 10),
        event("cpu_op", "child", 2, 4),
        event("cpu_op", "grandchild", 2, 4),
        event("cpu_op", "other thread", 3, 1, tid=2),
        event("cpu_op", "second child", 6, 4),
        event("cpu_op", "next", 10, 1),
        event("cpu_op", "short", 20, 1),
        event("cpu_op", "long", 20, 2),
    )
    assert {e.name: e.parent.name if e.parent else None for e in found.host} == {
        "outer": None,
        "child": "outer",
        "grandchild": "child",
        "other thread": None,
        "second child": "outer",
        "next": None,
        "long": None,
        "short": "long",
    }
    assert [e.name for e in found.host[0].walk()] == ["outer", "child", "grandchild", "second child"]


@pytest.mark.parametrize(("took_us", "next_us"), [(0.2, 0.3), (1.007, 1.107)])
def test_an_operator_is_not_inside_one_that_ends_where_it_begins_whatever_floats_add_up_to(
    tmp_path: Path, took_us: float, next_us: float
) -> None:
    """0.1 + 0.2 is more than 0.3; 1000 times 1.007 is less than 1007."""
    found = recording(tmp_path, event("cpu_op", "a", 0.1, took_us), event("cpu_op", "b", next_us, 0.2))
    assert [e.parent for e in found.host] == [None, None]
    assert found.host[0].end_s == found.host[1].begin_s


def test_an_event_that_takes_no_time_was_not_cut_off(tmp_path: Path) -> None:
    found = recording(tmp_path, event("cpu_op", "a", 0, 0), event("cpu_op", "b", 0, -1), event("cpu_op", "c", 0, 1))
    assert found.num_cut_off == 1


@pytest.mark.parametrize(("called_us", "owner"), [(2, "child"), (5, "child"), (6, "outer"), (10, None)])
def test_a_kernel_belongs_to_the_innermost_operator_around_the_call(
    tmp_path: Path, called_us: float, owner: str | None
) -> None:
    """The child runs from 2 to 6, the outer operator to 10; a call at a begin is inside, one at an end is not."""
    found = recording(
        tmp_path,
        event("cpu_op", "outer", 0, 10),
        event("cuda_driver", "cuLaunchKernel", called_us, 0.5, correlation=5),
        event("cpu_op", "child", 2, 4),
        event("kernel", "k", 30, 1, correlation=5, device=0),
    )
    assert [e.name for e in found.host if e.kernels] == ([] if owner is None else [owner])


def test_the_names_of_older_versions_mean_the_same(tmp_path: Path) -> None:
    found = recording(
        tmp_path,
        event("Operator", "aten::add", 0, 10, **{"External id": 1}),
        event("Kernel", "k", 20, 1, **{"external id": 1, "device": 0}),
        event("Memcpy", "copy", 22, 1, device=0),
        event("Memset", "fill", 24, 1, device=0),
        event("Runtime", "cudaLaunchKernel", 1, 1),
        {**event("cpu_op", "no duration", 3, 1), "ph": "i"},
        event("python_function", "forward", 0, 30),
        event("gpu_user_annotation", "ProfilerStep#1", 20, 5),
    )
    assert [e.name for e in found.host] == ["aten::add"]
    assert [e.name for e in found.host[0].kernels] == ["k"]
    assert [e.name for e in found.device_events] == ["k", "copy", "fill"]
    assert [e.name for e in found.calls] == ["cudaLaunchKernel"]


def test_of_several_gpus_the_one_that_ran_the_most_is_named(tmp_path: Path) -> None:
    devices = [{"id": i, "name": f"GPU {i}", "totalGlobalMem": 10 + i} for i in range(3)]
    kernels = [event("kernel", "k", i, 1, device=device) for i, device in enumerate((0, 2, 2, 1))]
    found = recording(tmp_path, event("cpu_op", "aten::add", 0, 1), *kernels, deviceProperties=devices)
    assert (found.device, found.memory_bytes) == ("GPU 2", 12)
    idle = recording(tmp_path, event("cpu_op", "aten::add", 0, 1), deviceProperties=devices)
    assert (idle.device, idle.memory_bytes, idle.on_gpu) == (None, None, False)


@pytest.mark.parametrize(
    ("cat", "name", "expected"),
    [
        ("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgs)", True),
        ("kernel", "ncclKernel_AllReduce_RING_LL_Sum_float", True),
        ("kernel", "rcclGenericKernel", True),
        ("kernel", "ampere_sgemm_128x64_nn", False),
        ("cpu_op", "gloo:all_reduce", True),
        ("user_annotation", "mpi:allreduce", True),
        ("cpu_op", "nccl:all_reduce", False),  # the host only launches it
        ("gpu_memcpy", "nccl copy", False),
    ],
)
def test_what_is_communication_while_it_runs(cat: str, name: str, expected: bool) -> None:
    found = Event(name=name, category=cat, thread=("1", "1"), begin_s=0, end_s=1, arguments={})
    assert found.is_collective == expected


def test_the_annotations_of_pytorch_are_no_operators_where_older_versions_call_them_so(tmp_path: Path) -> None:
    names = ["ProfilerStep#1", "Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"]
    names.append("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__")
    others = ["aten::add", "MyFunction", "Optimizer.step", "nccl:all_reduce"]
    events = [event("Operator", name, i, 1) for i, name in enumerate([*names, *others])]
    found = recording(tmp_path, *events)
    assert [e.name for e in found.host if e.category == "user_annotation"] == names
    assert [e.name for e in found.host if e.category == "cpu_op"] == others


@pytest.mark.parametrize("cat", ["hip_runtime", "xpu_runtime", "xpu_driver", "cuda_driver", "privateuse1_runtime"])
def test_calls_of_every_vendor_launch_kernels(tmp_path: Path, cat: str) -> None:
    found = recording(
        tmp_path,
        event("cpu_op", "aten::add", 0, 10),
        event(cat, "hipLaunchKernel", 2, 1, correlation=5),
        event("kernel", "k", 30, 1, correlation=5, device=0),
    )
    assert [e.name for e in found.calls] == ["hipLaunchKernel"]
    assert [e.name for e in found.host[0].kernels] == ["k"]
