import errno
import math
import os
import re

import msgspec
import pytest

from ptsim.errors import FileFormatError, MissingMeasurementError, NewerVersionError
from ptsim.hardware.profile import (
    DeviceProfile,
    MachineLoad,
    Operator,
    OperatorSetting,
    OperatorTime,
    StepMeasurement,
    operator_of,
)
from ptsim.hardware.profile_file import read_device_profile, write_device_profile
from ptsim.hardware.profile_merge import mean_time, merge_operators, with_round
from ptsim.network import Layer, LayerKind, Precision

FP32 = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")
BF16 = OperatorSetting(precision=Precision.BF16, memory_format="channels_last")
CONV = OperatorTime(
    operator=Operator(
        kind=LayerKind.CONV,
        op="conv2d",
        setting=FP32,
        batch=128,
        inputs=((16, 32, 32),),
        output=(24, 32, 32),
        kernel=(3, 3),
        padding=(1, 1),
    ),
    forward_s=1.25e-3,
    backward_s=3.5e-3,
    weight_gradient_s=2e-3,
    input_gradient_s=1.5e-3,
    host_s=2e-6,
)
STEP = StepMeasurement(
    architecture="0123456789abcdef",
    name="resnet20",
    setting=FP32,
    batch=128,
    optimizer="sgd",
    num_parameters=272474,
    num_tensors=65,
    num_layers=60,
    num_samples=5,
    forward_s=0.25,
    backward_s=0.5,
    optimizer_s=1e-3,
    regularizer_s=None,
    step_s=0.751,
    step_low_s=0.75,
    step_high_s=0.8,
    layers_forward_s=0.26,
    layers_backward_s=0.55,
    peak_memory_bytes=12345678,
)
SLIM = msgspec.structs.replace(STEP, batch=64, regularizer_s=1e-4, criterion="slimming")
PROFILE = DeviceProfile(
    created="2026-11-22T13:00:00Z",
    complete=True,
    device="AMD EPYC",
    kind="cpu",
    memory_bytes=8 * 2**30,
    num_threads=2,
    software={"torch": "2.15.0"},
    copy_bandwidth_bytes_per_s=11.5e9,
    launch_overhead_s=4e-6,
    power_w=200.0,
    sm_clock_hz=1.41e9,
    reconfiguration_s=0.25,
    input_s_per_image={"cifar10": 2e-5},
    sources=("runs/a/trace.jsonl",),
    operators=(CONV,),
    steps=(STEP, SLIM),
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "here.toml"
    write_device_profile(path, PROFILE)
    return path


def broken(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return file


def test_what_is_written_is_read_back_to_six_digits(file, tmp_path):
    again = read_device_profile(file)
    assert again.operators[0].operator == CONV.operator
    assert again.operators[0].weight_gradient_s == pytest.approx(2e-3)
    assert again.steps[0].step_s == pytest.approx(0.751)
    assert again.steps[0].regularizer_s is None
    assert [step.criterion for step in again.steps] == ["group_lasso", "slimming"]
    assert again.steps[0].peak_memory_bytes == 12345678
    assert again.copy_bandwidth_bytes_per_s == pytest.approx(11.5e9)
    assert again.input_s_per_image == {"cifar10": pytest.approx(2e-5)}
    copy = tmp_path / "copy.toml"
    write_device_profile(copy, again)
    assert copy.read_text() == file.read_text()


def test_momentum_and_proximal_step_come_back_and_a_file_that_has_them_says_so_in_its_version(tmp_path):
    proximal = msgspec.structs.replace(SLIM, momentum=0.0, proximal=True)
    new = tmp_path / "new.toml"
    write_device_profile(new, msgspec.structs.replace(PROFILE, steps=(STEP, proximal)))
    assert new.read_text().startswith("ptsim_device_profile = 2\n")
    assert [(step.momentum, step.proximal) for step in read_device_profile(new).steps] == [(None, False), (0.0, True)]


def test_the_fingerprints_of_its_runs_come_back_and_a_file_that_has_them_says_so_in_its_version(tmp_path):
    new = tmp_path / "new.toml"
    write_device_profile(new, msgspec.structs.replace(PROFILE, runs=("2f8a", "77c1")))
    assert new.read_text().startswith("ptsim_device_profile = 4\n")
    assert read_device_profile(new).runs == ("2f8a", "77c1")


def test_a_data_parallel_step_comes_back_and_a_file_that_has_one_says_so_in_its_version(tmp_path):
    new = tmp_path / "new.toml"
    among = msgspec.structs.replace(STEP, data_parallel=True)
    write_device_profile(new, msgspec.structs.replace(PROFILE, runs=("2f8a",), steps=(STEP, among)))
    assert new.read_text().startswith("ptsim_device_profile = 5\n")
    again = read_device_profile(new)
    assert [step.data_parallel for step in again.steps] == [False, True]
    said = [again.doubts(num_gpus=number) for number in (1, 2, None)]
    assert [any("one of several GPUs" in text for text in doubts) for doubts in said] == [True, False, False]


def test_a_second_writing_replaces_the_file_and_leaves_nothing_beside_it(file):
    write_device_profile(file, msgspec.structs.replace(PROFILE, complete=False))
    assert not read_device_profile(file).complete
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('forward = "1250 us"', 'forward = "1250"', r"operators\[0\]\.forward: '1250' has no unit"),
        ('forward = "1250 us"', 'forward = "1250 GB/s"', "has the unit 'GB/s'; one of"),
        ('forward = "1250 us"', 'forward = "-3 us"', "'-3 us' is negative"),
        ('forward = "1250 us"', "forward = 1250", r"operators\[0\]\.forward: '1250' has no unit"),
        ('copy_bandwidth = "11.5 GB/s"', 'copy_bandwidth = "-1 GB/s"', "machine.copy_bandwidth: '-1 GB/s'"),
        ('memory = "8589934592 B"', 'memory = "8"', "device.memory: '8' has no unit"),
        ('setting = "fp32 contiguous"', 'setting = "fp31 contiguous"', "found 'fp31 contiguous', expected a precision"),
        ("kernel = [3, 3]", "kernel = [3, 0]", r"kernel\[1\] is 0, expected a whole number of at least 1"),
        ("kernel = [3, 3]", "kernel = [3, 3], groups = 5", "channels in 5 groups, expected a multiple of the groups"),
        ('forward = "1250 us"', 'forward = "1e300 s"', "is not between 1e-15 and 3.2e\\+09 s"),
        ('fastest = "750000 us"', 'fastest = "9 s"', "expected between its fastest and its slowest"),
        ('fastest = "750000 us"', 'fastest = "0 us"', r"step\[0\] \(resnet20\) takes no time, expected more"),
        ('optimizer_name = "sgd"', 'optimizer_name = "sgd"\nmomentum = -0.5', "momentum is -0.5, expected a number of"),
        ('optimizer_name = "sgd"', 'optimizer_name = "sgd"\nproximal = 1', "proximal is 1, expected true or false"),
        ("batch = 128", "batch = 0", "batch is 0, expected a whole number of at least 1"),
        (
            "num_threads = 2",
            "num_thread = 2",
            "device.num_thread is not a known key, expected one of name, kind",
        ),
        ('name = "AMD EPYC"', "", "device.name is missing"),
        ('fastest = "750000 us"', "", r"step\[0\].fastest is missing"),
        ("ptsim_device_profile = 1", "ptsim_device_profile = 'one'", "not a device profile"),
        ("ptsim_device_profile = 1", "ptsim_device_profile =", "is not TOML"),
    ],
)
def test_a_broken_profile_says_file_place_and_what_was_expected(file, old, new, message):
    with pytest.raises(FileFormatError, match=message) as caught:
        read_device_profile(broken(file, old, new))
    assert str(file) in str(caught.value)


def test_foreign_missing_and_newer_files_are_refused(file, tmp_path):
    with pytest.raises(FileFormatError, match="cannot be read: No such file"):
        read_device_profile(tmp_path / "none.toml")
    other = tmp_path / "device.toml"
    other.write_text('name = "a100"\nmemory = "40 GiB"\n')
    with pytest.raises(FileFormatError, match="not a device profile"):
        read_device_profile(other)
    with pytest.raises(NewerVersionError, match="version 6 is newer than the 5"):
        read_device_profile(broken(file, "ptsim_device_profile = 1", "ptsim_device_profile = 6"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match="is not TOML"):
        read_device_profile(tmp_path / "binary.toml")


def test_a_profile_speaks_for_no_other_device_and_no_other_precision():
    PROFILE.check_device("AMD EPYC")
    PROFILE.check_setting(FP32)
    with pytest.raises(MissingMeasurementError, match="measured on 'AMD EPYC', not on 'NVIDIA L4'"):
        PROFILE.check_device("NVIDIA L4")
    with pytest.raises(MissingMeasurementError, match=re.escape("holds fp32 contiguous, not bf16 channels_last")):
        PROFILE.check_setting(BF16)


@pytest.mark.parametrize(
    ("op", "kind", "image", "taps", "kernel"),
    [
        ("conv3d", LayerKind.CONV, (4, 8, 8), 27, (9, 3)),
        ("conv3d", LayerKind.CONV, (4, 8, 8), 9, (3, 3)),  # a filter of one image of the row
        ("conv3d", LayerKind.CONV, (0, 8, 8), 27, (1, 3)),  # nothing is left of it
        ("conv2d", LayerKind.CONV, (8, 8), 9, (3, 3)),
        ("max_pool3d", LayerKind.POOL, (4, 8, 8), 27, (3, 3)),
    ],
)
def test_a_filter_of_another_depth_is_another_operators(op, kind, image, taps, kernel):
    layer = Layer(
        name="c", kind=kind, op=op, in_channels=2, out_channels=3, kernel_size=(3, 3), padding=(1, 1),
        input_shapes=((2, *image),), output_shape=(3, *image), forward_macs=2 * 3 * taps * math.prod(image),
    )  # fmt: skip
    assert operator_of(layer, batch=1, setting=FP32).kernel == kernel


@pytest.mark.parametrize(
    ("op", "kind", "one", "other"),
    [
        ("max_pool3d", LayerKind.POOL, (1, 1, 0, 1), (3, 1, 1, 1)),  # of as many images of the row before as after
        ("conv3d", LayerKind.CONV, (3, 1, 1, 1), (3, 1, 2, 2)),  # with a hole between its images
        ("conv3d", LayerKind.CONV, (3, 1, 1, 1), None),  # an older ptsim did not say
    ],
)
def test_operators_of_equal_shapes_that_differ_in_depth_share_no_time(op, kind, one, other, tmp_path):
    """A file that names a depth says so in its version."""
    operators = [
        operator_of(
            Layer(
                name="c", kind=kind, op=op, in_channels=2, out_channels=2, kernel_size=(3, 3), padding=(1, 1),
                input_shapes=((2, 4, 8, 8),), output_shape=(2, 4, 8, 8), forward_macs=4 * 27 * 256, depth=depth,
            ),
            batch=1, setting=FP32,
        )
        for depth in (one, other)
    ]  # fmt: skip
    times = [
        OperatorTime(operator=o, forward_s=s, backward_s=None) for o, s in zip(operators, (1e-3, 2e-3), strict=True)
    ]
    assert merge_operators(times[:1], times[1:]) == tuple(times)
    write_device_profile(tmp_path / "p.toml", msgspec.structs.replace(PROFILE, operators=tuple(times)))
    assert (tmp_path / "p.toml").read_text().startswith("ptsim_device_profile = 3\n")
    assert [time.operator for time in read_device_profile(tmp_path / "p.toml").operators] == operators


def test_what_is_folded_into_the_mini_batch_is_the_operators_own():
    """Five patches of each of seven images."""
    layer = Layer(
        name="c", kind=LayerKind.CONV, op="conv2d", in_channels=2, out_channels=3, kernel_size=(3, 3), padding=(1, 1),
        input_shapes=((5, 2, 8, 8),), output_shape=(5, 3, 8, 8),
    )  # fmt: skip
    operator = operator_of(layer, batch=7, setting=FP32)
    assert (operator.batch, operator.inputs, operator.output) == (35, ((2, 8, 8),), (3, 8, 8))


def test_of_two_measurements_of_one_operator_the_new_one_stays():
    again = msgspec.structs.replace(CONV, forward_s=7.0)
    inside = msgspec.structs.replace(CONV, context="step")
    assert merge_operators([CONV, inside], [again]) == (again, inside)


def test_a_further_round_makes_means_and_widens_the_range_of_the_steps():
    slower = msgspec.structs.replace(
        STEP, forward_s=4 * STEP.forward_s, step_low_s=2 * STEP.step_low_s, step_high_s=2 * STEP.step_high_s
    )
    (twice,) = with_round((STEP,), slower)
    (thrice,) = with_round((twice,), slower)
    assert thrice.forward_s == pytest.approx(3 * STEP.forward_s)  # (1 + 4 + 4) / 3
    assert thrice.backward_s == pytest.approx(STEP.backward_s)
    assert (thrice.num_rounds, thrice.num_samples) == (3, 3 * STEP.num_samples)
    assert (thrice.step_low_s, thrice.step_high_s) == (STEP.step_low_s, 2 * STEP.step_high_s)
    others = [{"architecture": "another"}, {"momentum": 0.0}, {"criterion": "slimming"}, {"proximal": True}]
    for changes in others:
        other = msgspec.structs.replace(STEP, **changes)
        assert with_round((STEP,), other) == (STEP, other)


def test_repeated_measurements_of_an_operator_become_their_mean():
    time = OperatorTime(operator=CONV.operator, forward_s=1.0, backward_s=None, host_s=0.5)
    again = msgspec.structs.replace(time, forward_s=3.0, backward_s=2.0, host_s=None)
    mean = mean_time([time, again])
    assert (mean.forward_s, mean.backward_s, mean.host_s) == (2.0, 2.0, 0.5)


def test_a_full_disk_is_one_sentence_and_leaves_the_file_that_was_there(file, monkeypatch):
    before = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileFormatError, match=r"cannot be written: No space left on device; what was saved before"):
        write_device_profile(file, read_device_profile(file))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_profile_of_a_busy_machine_or_of_other_software_says_so(file, tmp_path):
    quiet = MachineLoad(num_cores=2, other_cores=0.1, waited=0.0, drift=1.02)
    busy = MachineLoad(num_cores=2, other_cores=1.25, waited=0.3, drift=1.02)
    profile = msgspec.structs.replace(read_device_profile(file), software={"torch": "2.11.0+cu130"}, num_threads=1)
    for load, doubts in ((None, 0), (quiet, 0), (busy, 1)):
        out = tmp_path / "load.toml"
        write_device_profile(out, msgspec.structs.replace(profile, load=load))
        known = read_device_profile(out)
        assert known.load == load
        assert len(known.doubts({"torch": "2.11.0"})) == doubts
    assert "other programs kept 1.2 of 2 CPU cores busy" in known.doubts()[0]
    assert known.doubts({"torch": "2.15.0"})[1].endswith("with torch 2.11.0+cu130, the run used torch 2.15.0")


@pytest.mark.parametrize(("taken", "share"), [((1, 1), "0%"), ((2, 1), "33%"), ((4, 3), "60%"), ((5, 1), None)])
def test_a_profile_of_few_steps_says_how_many_lie_in_their_range(taken, share):
    """Of n values and one more, each is as likely as the others to be the largest, and to be the smallest."""
    steps = tuple(msgspec.structs.replace(STEP, num_samples=number) for number in taken)
    said = msgspec.structs.replace(PROFILE, steps=steps).doubts()
    assert len(said) == (share is not None)
    assert all(f"that of the {taken[0]} in the device profile; on average {share} of all" in text for text in said)
    assert msgspec.structs.replace(PROFILE, steps=()).doubts() == ()


@pytest.mark.parametrize(
    ("load", "num_threads", "said"),
    [
        # five cores, one of which measures: a quarter of the four others may be busy
        ({"other_cores": 1.0}, 1, None),
        ({"other_cores": 1.01}, 1, "other programs kept 1.0 of 5 CPU cores busy"),
        ({"other_cores": 1.01}, None, "other programs kept 1.0 of 5 CPU cores busy"),
        ({"other_cores": 0.75}, 2, None),
        ({"other_cores": 0.76}, 2, "other programs kept 0.8 of 5 CPU cores busy"),
        ({"other_cores": 0.25}, 9, None),  # a quarter of one core where none is left over
        ({"other_cores": 0.26}, 9, "other programs kept 0.3 of 5 CPU cores busy"),
        ({"waited": 0.05}, 1, None),
        ({"waited": 0.06}, 1, "the measurement waited for a CPU core 6% of the time"),
        ({"drift": 1.15}, 1, None),
        ({"drift": 1.16}, 1, "the same kernel took up to 1.16 times as long from one moment to another"),
        ({}, 1, None),
    ],
)
def test_a_disturbance_is_more_than_a_quarter_of_the_free_cores_a_twentieth_of_the_time_or_15_percent(
    load, num_threads, said
):
    assert MachineLoad(num_cores=5, **load).disturbance(num_threads) == said


def test_a_round_without_a_time_leaves_the_earlier_one_and_memory_is_the_largest():
    first = msgspec.structs.replace(STEP, optimizer_s=1e-3, regularizer_s=None, peak_memory_bytes=30)
    second = msgspec.structs.replace(STEP, optimizer_s=None, regularizer_s=4e-3, peak_memory_bytes=20)
    third = msgspec.structs.replace(STEP, optimizer_s=7e-3, regularizer_s=None, peak_memory_bytes=None)
    steps = with_round(with_round((first,), second), third)
    assert [step.num_rounds for step in steps] == [3]
    assert steps[0].optimizer_s == pytest.approx(3e-3)  # (2 · 1 + 7) / 3
    assert steps[0].regularizer_s == pytest.approx(4e-3)
    assert steps[0].peak_memory_bytes == 30


def test_the_mean_of_operator_times_is_each_passs_own():
    time = OperatorTime(
        operator=CONV.operator, forward_s=1.0, backward_s=None, weight_gradient_s=2.0, input_gradient_s=3.0, host_s=4.0
    )
    again = msgspec.structs.replace(time, weight_gradient_s=6.0, input_gradient_s=9.0, host_s=8.0)
    mean = mean_time([time, again])
    assert (mean.backward_s, mean.weight_gradient_s, mean.input_gradient_s, mean.host_s) == (None, 4.0, 6.0, 6.0)
