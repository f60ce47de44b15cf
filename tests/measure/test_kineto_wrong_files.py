"""Profiles that no program records: refused in one sentence, or read without what nothing can have."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from ptsim.cli.main import run
from ptsim.errors import FileFormatError, UsageError
from ptsim.hardware.catalog import load_device
from ptsim.hardware.profile_file import read_device_profile, write_device_profile
from ptsim.measure.kineto import import_kineto
from ptsim.measure.kineto_events import read_recording
from ptsim.measure.kineto_steps import read_steps
from tests.measure.recordings import STRIDED_CONV, gpu_trace, write


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not json", "not a profile of torch.profiler"),
        (b" \n", "is empty"),
        (b"[]", "holds no operator"),
        (b"[1]", "not a profile of torch.profiler"),
        (b"[" * 5000, "not a profile of torch.profiler"),
        (b'{"traceEvents": []}', "holds no operator"),
        (b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a", "ts": "soon", "dur": 1}]}', "not times"),
        (b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a", "ts": 1, "dur": 1e307}]}', "not times"),
        (b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 1, "dur": 1}]}', "training step"),
        (gzip.compress(bytes(1000), mtime=0)[:20], "gzip"),
    ],
)
def test_a_wrong_file_is_named_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    assert run(["import", "kineto", str(path), "-o", str(tmp_path / "out.toml")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(path) in error
    assert not (tmp_path / "out.toml").exists()


@pytest.mark.parametrize("key", ["Input Dims", "Input type", "Input Strides", "Concrete Inputs", "Sequence number"])
@pytest.mark.parametrize("value", ["text", 7, [["a"]], {"a": 1}, [[]], [None]])
def test_arguments_of_another_kind_than_kinetos_are_not_recorded_shapes(
    tmp_path: Path, key: str, value: object
) -> None:
    document = gpu_trace()
    for event in document["traceEvents"]:
        if event["name"] == "aten::conv2d":
            event["args"][key] = value
    found = import_kineto([write(tmp_path / "a.json", document)])
    assert found.step_seconds == pytest.approx(12e-3, rel=0.2)


def test_files_of_different_networks_are_refused(tmp_path: Path) -> None:
    """As of two runs in one folder: 32 filters, and 16; without shapes only the number of tensors counts."""
    files = [write(tmp_path / f"{i}.json", gpu_trace()) for i in range(2)]
    other = gpu_trace()
    gradients = [event["args"] for event in other["traceEvents"] if "AccumulateGrad" in event["name"]]
    for arguments in gradients:
        arguments["Input Dims"] = [[16, 8, 3, 3]]
    write(files[1], other)
    with pytest.raises(UsageError, match=r"different networks: .* 1 tensors of 2,304 elements and .* 1,152 elements"):
        import_kineto(files)
    for arguments in gradients:
        del arguments["Input Dims"]
    write(files[1], other)
    assert len(import_kineto(files).ranks) == 2


def test_files_of_different_devices_are_refused(tmp_path: Path) -> None:
    other = gpu_trace(deviceProperties=[{"id": 0, "name": "Tesla V100-SXM2-32GB", "totalGlobalMem": 1}])
    files = [write(tmp_path / "a.json", gpu_trace()), write(tmp_path / "b.json", other)]
    with pytest.raises(UsageError, match="different devices"):
        import_kineto(files)


def test_a_step_that_lasts_longer_than_a_day_is_none(tmp_path: Path) -> None:
    document = gpu_trace()
    document["traceEvents"][-1]["ts"] = 1e15  # the last kernel begins thirty years later
    with pytest.raises(FileFormatError, match=r"a training step of 1e\+09 s; expected at most a day"):
        import_kineto([write(tmp_path / "a.json", document)])


@pytest.mark.parametrize(
    "conv",
    [
        STRIDED_CONV | {"Input Dims": [[10**400, 8, 16, 16], [32, 8, 3, 3], [], [], [], [], []]},
        STRIDED_CONV | {"Input Dims": [[4, 8, 16, 16], [32, 8, -3, 3], [], [], [], [], []]},
        STRIDED_CONV | {"Input Dims": [[4, 8, 0, 16], [32, 8, 3, 3], [], [], [], [], []]},
        STRIDED_CONV | {"Concrete Inputs": ["", "", "", "[0, 2]", "[1, 1]", "[1, 1]", "1"]},
        STRIDED_CONV | {"Concrete Inputs": ["", "", "", "[2, 2]", "[1, 1]", "[1, 1]", "3"]},
        STRIDED_CONV | {"Input Dims": [[4, 8, 16.5, 16], [32, 8, 3, 3], [], [], [], [], []]},
        STRIDED_CONV | {"Input Dims": [[4, 8, "16", 16], [32, 8, 3, 3], [], [], [], [], []]},
        STRIDED_CONV | {"Input Dims": [[4, 8, True, 16], [32, 8, 3, 3], [], [], [], [], []]},
    ],
    ids=["sizes beyond all", "negative", "an empty image", "no stride", "groups that do not divide", "half a pixel",
         "a text", "a truth value"],
)  # fmt: skip
def test_a_shape_that_no_operator_has_is_no_shape_and_the_profile_can_be_read(
    tmp_path: Path, conv: dict[str, Any]
) -> None:
    document = gpu_trace()
    for event in document["traceEvents"]:
        if event["name"] == "aten::conv2d":
            event["args"] |= conv
    found = import_kineto([write(tmp_path / "a.json", document)])
    assert (found.operators[0].shape, found.batch) == (None, None)
    write_device_profile(tmp_path / "p.toml", found.profile)
    assert read_device_profile(tmp_path / "p.toml").operators == ()


@pytest.mark.parametrize(
    "team",
    [{"rank": 0, "world_size": 10**400}, {"rank": 0, "world_size": "8"}, {"rank": 0, "world_size": 0},
     {"rank": -1, "world_size": 8}, {"rank": 8, "world_size": 8}, {"rank": 0.5}, [8]],
)  # fmt: skip
def test_a_number_of_ranks_that_none_can_be_is_refused_and_not_taken_for_one(tmp_path: Path, team: object) -> None:
    """images per second are those of all ranks: a world size that is left out makes them eight times too few."""
    path = write(tmp_path / "a.json", gpu_trace(distributedInfo=team))
    with pytest.raises(FileFormatError, match=r"rank|world_size|distributedInfo|JSON") as caught:
        import_kineto([path])
    assert str(path) in caught.value.message


def test_ranks_of_different_jobs_are_no_mean(tmp_path: Path) -> None:
    one, other = gpu_trace(), gpu_trace(rank=1, distributedInfo={"rank": 1, "world_size": 16})
    files = [write(tmp_path / "a.json", one), write(tmp_path / "b.json", other)]
    with pytest.raises(UsageError, match="of jobs of 8 and 16 ranks"):
        import_kineto(files)
    twice = import_kineto([files[0], files[0]])  # as a schedule that repeats writes several files of a rank
    assert twice.step_seconds == import_kineto(files[:1]).step_seconds


def test_events_that_were_cut_off_take_no_time_and_are_said(tmp_path: Path) -> None:
    document = gpu_trace()
    for event in document["traceEvents"]:
        if event["name"] == "sgd_update":
            event["dur"] = -1
    found = import_kineto([write(tmp_path / "a.json", document)])
    assert found.optimizer_seconds == 0
    assert any(note.startswith("2 events have a negative duration") for note in found.notes)


def test_steps_that_take_no_time_or_less_are_refused(tmp_path: Path) -> None:
    """Every kernel at one moment; kernels of the second step before those of the first."""
    none, backwards = gpu_trace(), gpu_trace()
    for event in none["traceEvents"]:
        if event["cat"] == "kernel":
            event |= {"ts": 5000.0, "dur": 1.0}
    for event in backwards["traceEvents"]:
        if event["cat"] == "kernel" and event["args"]["External id"] > 100:
            event["ts"] -= 24_000.0  # 12 ms before the first step's
    with pytest.raises(FileFormatError, match="a training step of 0 s; expected a time above 0"):
        import_kineto([write(tmp_path / "none.json", none)])
    with pytest.raises(FileFormatError, match=r"a training step of -0\.012 s; expected a time above 0"):
        import_kineto([write(tmp_path / "backwards.json", backwards)])


def test_operators_without_sequence_numbers_are_refused_with_the_reason(tmp_path: Path) -> None:
    document = gpu_trace()
    for event in document["traceEvents"]:
        event["args"].pop("Sequence number", None)
    with pytest.raises(FileFormatError, match=r"have no sequence numbers.*; record it with PyTorch 2"):
        import_kineto([write(tmp_path / "a.json", document)])


def test_a_gpus_work_without_its_kernels_is_refused(tmp_path: Path) -> None:
    """As recorded with ProfilerActivity.CPU alone: the host's times are those of launches."""
    document = gpu_trace()
    document["traceEvents"] = [event for event in document["traceEvents"] if event["cat"] != "kernel"]
    path = write(tmp_path / "a.json", document)
    assert import_kineto([path], memory_bytes=2**34).profile.kind == "cpu"
    for device in (load_device("a100"), "NVIDIA H100 80GB HBM3"):
        with pytest.raises(UsageError, match=r"a\.json holds no kernels of (a100|h100)-") as caught:
            import_kineto([path], device=device)
        assert "ProfilerActivity.CUDA" in str(caught.value.hint)
    for event in document["traceEvents"]:
        event["name"] = event["name"].replace("aten::convolution_backward", "aten::cudnn_convolution_backward")
    with pytest.raises(UsageError, match="holds aten::cudnn_convolution_backward, which runs on a GPU, but no kernels"):
        import_kineto([write(path, document)], memory_bytes=2**34)


@pytest.mark.parametrize(
    ("category", "name", "refused"),
    [
        ("cuda_runtime", "cudaLaunchKernel", True),
        ("cuda_driver", "cuLaunchKernelEx", True),
        ("hip_runtime", "hipExtModuleLaunchKernel", True),
        ("mtia_runtime", "runFunction - job_prep_and_submit_for_execution", True),
        ("cuda_runtime", "cudaDeviceSynchronize", False),  # the profiler's own, of training on a processor
    ],
)
def test_calls_that_launch_kernels_of_which_none_was_recorded_are_no_processors_work(
    tmp_path: Path, category: str, name: str, refused: bool
) -> None:
    document = gpu_trace()
    document["traceEvents"] = [event for event in document["traceEvents"] if event["cat"] != "kernel"]
    call = {"ph": "X", "cat": category, "name": name, "pid": 99, "tid": 1, "ts": 110.0, "dur": 1.0}
    document["traceEvents"].append(call)
    path = write(tmp_path / "a.json", document)
    if refused:
        with pytest.raises(UsageError, match=f"holds {name}, which runs on a GPU, but no kernels"):
            import_kineto([path], memory_bytes=2**34)
    else:
        assert import_kineto([path], memory_bytes=2**34).profile.kind == "cpu"


def test_kernels_without_the_id_of_their_operator_tell_nothing_of_a_step(tmp_path: Path) -> None:
    document = gpu_trace()
    for event in document["traceEvents"]:
        if event["cat"] == "kernel":
            del event["args"]["External id"]
    with pytest.raises(FileFormatError, match="whose operators took no time"):
        import_kineto([write(tmp_path / "a.json", document)])


def test_begins_beyond_the_microseconds_of_a_float_are_refused(tmp_path: Path) -> None:
    document = gpu_trace()
    for event in document["traceEvents"]:
        event["ts"] += 2e16
    with pytest.raises(FileFormatError, match="not times"):
        import_kineto([write(tmp_path / "a.json", document)])


@pytest.mark.timeout(60)
def test_what_no_program_records_is_read_or_refused_soon(tmp_path: Path) -> None:
    """Each would take minutes if every event were compared with every other one."""
    deep, many, wide = gpu_trace(), gpu_trace(num_steps=1500), gpu_trace()
    deep["traceEvents"] += [
        {"ph": "X", "cat": "cpu_op", "name": "aten::add", "pid": 9, "tid": 9, "ts": n, "dur": 1e9}
        for n in range(20_000)
    ]
    wide["traceEvents"] += [
        {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 9e3, "dur": 1, "args": {"device": n}}
        for n in range(20_000)
    ]
    with pytest.raises(FileFormatError, match="more than 500 operators that run inside each other"):
        read_recording(write(tmp_path / "deep.json", deep))
    assert len(read_steps(read_recording(write(tmp_path / "many.json", many)))) == 1500
    read_recording(write(tmp_path / "wide.json", wide))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"nothing\.json"):
        import_kineto([tmp_path / "nothing.json"])
