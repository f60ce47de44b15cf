import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.answers.repredict import device_profile_of, fit_power_model
from ptsim.answers.utilization import epochs_utilization
from ptsim.answers.validate import validate
from ptsim.cli.main import run
from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.collectives import all_reduce
from ptsim.costs.energy import PowerSample, fit_power
from ptsim.costs.flops import layer_macs
from ptsim.costs.measured import measured_step
from ptsim.costs.memory import iteration_memory
from ptsim.costs.run import run_cost
from ptsim.costs.scaling import load_scaling
from ptsim.costs.times import LayerTime, StepTime
from ptsim.errors import MissingMeasurementError, UsageError
from ptsim.hardware.catalog import load_device
from ptsim.hardware.profile import MachineLoad
from ptsim.hardware.profile_file import read_device_profile, write_device_profile
from ptsim.hardware.spec import AllReduceTable, Cluster, Link
from ptsim.network import LayerKind, Precision
from ptsim.trace.io import read_trace
from ptsim.trace.pairs import time_differences
from ptsim.trace.schema import Epoch, Profile
from tests.traces import CPU, dense_trace, profile_of, shrinking_records, shrinking_trace, write_trace

SCALING = load_scaling()
SLOWDOWN, TENSOR_S = SCALING.slowdown, SCALING.tensor_s
LONG = {"num_train": 50000, "batch_step": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return shrinking_trace(folder / "pruned.jsonl", **LONG), dense_trace(folder / "dense.jsonl", **LONG)


def slower(path, factor, only=lambda epoch: True, **options):
    """The same run with epochs that took `factor` times as long as its profiles say."""

    def changed(record):
        if isinstance(record, Epoch) and only(record):
            t = record.time
            return msgspec.structs.replace(record, measured_time=msgspec.structs.replace(t, wall_s=factor * t.wall_s))
        return record

    return write_trace(path, [changed(record) for record in shrinking_records(**LONG, **options)])


def test_runs_that_go_as_their_profiles_say_have_almost_no_error(runs):
    result = validate(runs)
    assert result.whole_run_error < 0.02
    assert result.epoch_mape < 0.02
    assert abs(result.saving_error_points) < 1
    assert result.tiers == ("measured",)
    assert result.source == "own profiles"
    assert result.savings[0].measured_saving > 0.05
    assert list(result.reasons) == ["communication_error"]  # one rank; all else was measured here


def test_an_epoch_that_took_a_fifth_longer_than_profiled_has_a_sixth_of_error(tmp_path):
    path = slower(tmp_path / "t.jsonl", 1.2, only=lambda epoch: epoch.epoch == 5)
    errors = [epoch.error for epoch in validate([path]).runs[0].epochs]
    assert errors[5] == pytest.approx(1 / 1.2 - 1, abs=0.03)
    assert max(map(abs, errors[:5])) < 0.03


def test_later_epochs_are_predicted_without_a_look_at_them(tmp_path):
    """All epochs but the first take twice as long: the prediction may not change."""
    path = slower(tmp_path / "t.jsonl", 2.0, only=lambda epoch: epoch.epoch > 0)
    plain = shrinking_trace(tmp_path / "plain.jsonl", **LONG)
    assert validate([path]).runs[0].predicted_seconds == pytest.approx(validate([plain]).runs[0].predicted_seconds)
    assert validate([path]).runs[0].error == pytest.approx(-0.5, abs=0.1)


def test_the_saving_is_in_percentage_points_of_time_per_epoch(tmp_path, runs):
    pruned, _ = runs
    dense = dense_trace(tmp_path / "dense.jsonl", epochs=3, **LONG)
    saving = validate([pruned, dense]).savings[0]
    per_epoch = [check.measured_seconds / len(check.epochs) for check in validate(runs).runs]
    assert saving.measured_saving == pytest.approx(1 - per_epoch[0] / per_epoch[1], abs=0.01)
    assert saving.error_points == pytest.approx(100 * (saving.predicted_saving - saving.measured_saving))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"batch": 32}, "mini-batch at the start 64 with 32"),
        ({"num_train": 40000}, "training images 50000 with 40000"),
        ({"precision": Precision.BF16}, "precision fp32 with bf16"),
        ({"device": "NVIDIA L4"}, "device NVIDIA A100-SXM4-40GB with NVIDIA L4"),
    ],
)
def test_runs_that_differ_by_more_than_pruning_tell_no_saving(tmp_path, runs, other, difference):
    dense = dense_trace(tmp_path / "dense.jsonl", **{**LONG, **other})
    result = validate([runs[0], dense])
    assert result.saving_error_points is None
    assert result.reasons["saving_error_points"] == (
        f"no pair differs by pruning alone: {runs[0]} beside {dense} would compare {difference}"
    )


def test_a_run_that_was_stopped_and_a_machine_that_was_not_steady_are_said(tmp_path, runs):
    assert validate(runs).runs[0].notes == validate(runs).runs[1].notes == ()
    cut = shrinking_trace(tmp_path / "cut.jsonl", truncated=True, **LONG)
    with pytest.warns(UserWarning, match="dropped an incomplete last line"):
        notes = validate([cut]).runs[0].notes
    assert notes == ("the run is not whole: 6 of 6 epochs are compared",)  # its end is missing
    drifting = slower(tmp_path / "drift.jsonl", 1.4, only=lambda epoch: epoch.epoch == 5)
    assert "did the same work took up to 1.4" in validate([drifting]).runs[0].notes[0]


def test_a_profile_of_a_busy_machine_or_other_software_is_said_beside_the_errors(tmp_path, runs):
    known = device_profile_of([ptsim.read_trace(path) for path in runs])
    busy = msgspec.structs.replace(
        known, load=MachineLoad(num_cores=8, other_cores=5.0), software={"torch": "2.0.0"}, sources=()
    )
    notes = validate(runs, busy).runs[0].notes
    assert "other programs kept 5.0 of 8 CPU cores busy" in notes[0]
    assert "measured with torch 2.0.0, the run used torch" in notes[1]


@pytest.mark.parametrize("energy_j", [0.0, 1e15])
def test_an_energy_that_no_such_gpu_can_take_is_said_and_not_compared(tmp_path, energy_j):
    records = [
        msgspec.structs.replace(record, device=msgspec.structs.replace(record.device, energy_j=energy_j))
        if isinstance(record, Epoch) and record.epoch == 3
        else record
        for record in shrinking_records(**LONG)
    ]
    result = validate([write_trace(tmp_path / "t.jsonl", records)])
    assert result.energy_error is None
    assert result.runs[0].notes == (
        "the recorded energy of epoch 3 is impossible for the NVIDIA A100-SXM4-40GB: energy is not compared",
    )


def test_what_was_not_measured_is_null_with_a_reason(tmp_path):
    records = [
        msgspec.structs.replace(record, peak_memory_bytes=None) if isinstance(record, Epoch) else record
        for record in shrinking_records(energy=False)
    ]
    result = validate([write_trace(tmp_path / "t.jsonl", records)])
    assert result.memory_mape is None
    assert result.saving_error_points is None
    assert result.energy_error is None
    assert set(result.reasons) == {"memory_mape", "saving_error_points", "energy_error", "communication_error"}


def test_energy_is_the_first_epochs_power_times_the_predicted_time(runs):
    result = validate(runs)
    assert result.energy_error < 0.03  # the synthetic GPU draws 300 W all the time


def test_the_power_model_is_fitted_to_what_nvml_sampled(tmp_path, runs):
    model = fit_power_model(ptsim.read_trace(runs[0]))
    assert model.source == "NVML samples"
    assert model.waiting_w < 300 < model.product_w  # 300 W is the mean of epochs that multiply, stream and wait
    trace = ptsim.read_trace(runs[0])  # the same steps as one of two passes, each of which was profiled
    passes = [msgspec.structs.replace(e, passes=2, batch_per_gpu=2 * e.batch_per_gpu) for e in trace.epochs]
    assert fit_power_model(msgspec.structs.replace(trace, epochs=tuple(passes))) is not None
    silent = shrinking_trace(tmp_path / "silent.jsonl", energy=False)
    assert fit_power_model(ptsim.read_trace(silent)) is None


@pytest.mark.slow
def test_a_hold_out_predicts_a_run_from_the_other_runs_profiles(tmp_path):
    seen = [
        shrinking_trace(tmp_path / f"seen{keep}.jsonl", keep=keep, remove_layers=False, batch_step=0, seed=seed)
        for seed, keep in enumerate((0.9, 0.7, 0.55), start=1)
    ]
    unseen = shrinking_trace(tmp_path / "unseen.jsonl", keep=0.8, remove_layers=False, batch_step=0)
    result = validate([unseen, *seen], holdout=True)
    assert result.source == "other runs"
    assert result.tiers == ("profiled",)
    assert abs(result.runs[0].error) < 0.05


def test_a_device_profile_stands_in_for_the_runs_own(tmp_path, runs):
    seen = shrinking_trace(tmp_path / "seen.jsonl", keep=0.7, **LONG)
    file = tmp_path / "device.toml"
    profile = device_profile_of([ptsim.read_trace(path) for path in (seen, *runs)])
    write_device_profile(file, profile)
    result = validate(runs, file)
    assert result.source == "device profile"
    assert result.whole_run_error < 0.02
    with pytest.raises(UsageError, match="was calibrated on"):
        validate(runs, file, holdout=True)


def test_a_profile_of_another_device_threads_or_precision_is_refused(tmp_path, runs):
    profile = device_profile_of([ptsim.read_trace(path) for path in runs])
    with pytest.raises(MissingMeasurementError, match="measured on 'NVIDIA L4', not on 'NVIDIA A100"):
        validate(runs, msgspec.structs.replace(profile, device="NVIDIA L4"))
    with pytest.raises(MissingMeasurementError, match="ran with None threads, the device profile with 4"):
        validate(runs, msgspec.structs.replace(profile, num_threads=4))
    half = shrinking_trace(tmp_path / "half.jsonl", precision=Precision.BF16)
    with pytest.raises(MissingMeasurementError, match="holds fp32 contiguous, not bf16 contiguous"):
        validate([half], profile)


def test_without_a_time_for_input_or_reconfigurations_the_output_says_so(runs):
    profile = device_profile_of([ptsim.read_trace(path) for path in runs])
    result = validate(runs, msgspec.structs.replace(profile, input_s_per_image={}, reconfiguration_s=None))
    assert "the time to load cifar10 was not measured: it counts as 0 s" in result.runs[0].notes
    assert "no reconfiguration was measured: they count as 0 s" in result.runs[0].notes


@pytest.mark.parametrize("arguments", [[], ["--holdout"]])
def test_a_trace_without_profiles_is_one_sentence_and_exit_2(tmp_path, capsys, arguments):
    path = shrinking_trace(tmp_path / "bare.jsonl", profiles=False)
    other = shrinking_trace(tmp_path / "other.jsonl", profiles=False, keep=0.7, seed=1)
    assert run(["validate", str(path), str(other), *arguments]) == 2
    assert "profiles to predict from" in capsys.readouterr().err


def test_one_run_alone_is_no_hold_out(runs):
    with pytest.raises(UsageError, match="a second run"):
        validate(runs[:1], holdout=True)


def test_a_pruned_run_that_the_dense_one_alone_cannot_predict_is_named(tmp_path, capsys):
    dense, pruned = dense_trace(tmp_path / "d.jsonl", epochs=1), shrinking_trace(tmp_path / "p.jsonl", epochs=1)
    says = r"p\.jsonl cannot be predicted: the other runs' profile of NVIDIA A100.* holds no step with a regulariser"
    with pytest.raises(MissingMeasurementError, match=says):
        validate([dense, pruned], holdout=True)
    assert run(["validate", str(dense), str(pruned), "--holdout"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "device profile" not in error
    assert hint == "hint: name other runs that measured it, too, or a device profile that did: --profile"


@pytest.mark.parametrize(
    ("mine", "others", "says"),
    [
        (
            {},
            {"device": "NVIDIA L4"},
            "the other runs' profile was measured on 'NVIDIA L4', not on 'NVIDIA A100-SXM4-40GB'",
        ),
        ({"precision": Precision.BF16}, {}, "the other runs' profile of NVIDIA A100-SXM4-40GB holds fp32 "),
    ],
)
def test_runs_of_another_setting_predict_nothing_and_no_device_profile_is_spoken_of(tmp_path, mine, others, says):
    """Nobody gave one: the prediction is from what the other runs measured."""
    runs = [dense_trace(tmp_path / "a.jsonl", **mine), dense_trace(tmp_path / "b.jsonl", seed=1, **others)]
    with pytest.raises(MissingMeasurementError) as caught:
        validate(runs, holdout=True)
    assert f"a.jsonl cannot be predicted: {says}" in caught.value.message


def test_a_hold_out_says_what_is_to_be_known_of_the_other_runs(tmp_path):
    mine, other = (ptsim.read_trace(dense_trace(tmp_path / f"{n}.jsonl", seed=n, **LONG)) for n in (0, 1))
    older = msgspec.structs.replace(other.run, versions={**other.run.versions, "torch": "2.0.0"})
    notes = validate([mine, msgspec.structs.replace(other, run=older)], holdout=True).runs[0].notes
    assert any(note.startswith("the other runs' profile was measured with torch 2.0.0") for note in notes)
    assert not any("device profile" in note for note in notes)


def test_a_profile_that_lacks_an_epochs_mini_batch_is_named(tmp_path):
    records = shrinking_records()
    kept = [r for r in records if not (isinstance(r, Profile) and r.batch != 64)]
    with pytest.raises(MissingMeasurementError, match="none of the 1 profiles is of the architecture"):
        validate([write_trace(tmp_path / "t.jsonl", kept)])


def test_the_command_prints_one_json_document_with_the_promised_keys(runs, capsys):
    assert run(["validate", *map(str, runs), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"whole_run_error", "epoch_mape", "memory_mape", "saving_error_points", "tiers", "runs"} <= set(document)
    assert document["runs"][0]["epochs"][0]["tier"] == "measured"


def test_the_command_prints_a_table_for_people(runs, capsys):
    assert run(["validate", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert "largest error of a whole run" in out
    assert "predicted from: own profiles" in out


def test_flops_are_those_of_the_recorded_images_over_what_the_gpu_could_do_in_either_time(runs, capsys):
    (check,) = validate([runs[0]]).runs
    trace = ptsim.read_trace(runs[0])
    peak = load_device(trace.run.device.name).peak_flops_per_s[trace.run.precision]
    flops = []
    for epoch, found in zip(trace.epochs, check.epochs, strict=True):
        macs = sum(layer_macs(layer).training for layer in trace.network_of(epoch).layers)
        flops.append(2 * macs * epoch.num_images)
        assert found.measured_mfu_fraction == pytest.approx(flops[-1] / peak / epoch.time.wall_s)
        assert found.predicted_mfu_fraction == pytest.approx(flops[-1] / peak / found.predicted_seconds)
    steps_s = sum(epoch.time.wall_s for epoch in trace.epochs)
    assert check.measured_mfu_fraction == pytest.approx(sum(flops) / peak / steps_s)
    predicted_s = sum(epoch.predicted_seconds for epoch in check.epochs)
    assert check.predicted_mfu_fraction == pytest.approx(sum(flops) / peak / predicted_s)
    assert run(["validate", str(runs[0])]) == 0
    assert " MFU " in capsys.readouterr().out


def test_every_gpu_of_a_run_counts_for_its_flops(tmp_path: Path) -> None:
    """Four times the images among four times the GPUs."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", epochs=2))
    (alone,) = validate([trace]).runs
    wide = in_epochs(trace, world_size=[4, 4], num_images=[4 * epoch.num_images for epoch in trace.epochs])
    (among,) = validate([wide]).runs
    assert among.measured_mfu_fraction == pytest.approx(alone.measured_mfu_fraction)
    assert among.epochs[1].measured_mfu_fraction == pytest.approx(alone.epochs[1].measured_mfu_fraction)


@pytest.mark.parametrize("device", ["NVIDIA X9000", CPU])
def test_without_a_known_peak_no_flops_utilisation_is_said(tmp_path: Path, capsys, device) -> None:
    path = dense_trace(tmp_path / "t.jsonl", epochs=2, device=device)
    assert run(["validate", str(path)]) == 0
    assert "MFU" not in capsys.readouterr().out
    assert run(["validate", str(path), "--json"]) == 0
    (check,) = json.loads(capsys.readouterr().out)["runs"]
    for found in (check, *check["epochs"]):
        assert found["measured_mfu_fraction"] is None
        assert found["predicted_mfu_fraction"] is None


def test_a_broken_profile_file_is_one_sentence(runs, tmp_path, capsys):
    file = tmp_path / "x.toml"
    file.write_text("name = 'a100'\n")
    assert run(["validate", str(runs[0]), "--profile", str(file)]) == 2
    assert "not a device profile" in capsys.readouterr().err


def constant_all_reduces(seconds, num_gpus=4):
    """A node of four GPUs whose all-reduces were measured: so many seconds at every size."""
    table = AllReduceTable(
        num_gpus=num_gpus,
        num_nodes=1,
        size_bytes=(4, 2**30),
        seconds=(seconds, seconds),
        relative_jitter=0.0,
        source="t",
    )
    link = Link(name="l", bandwidth_bytes_per_s=1e10)
    return Cluster(name="t", device=load_device("a100"), gpus_per_node=num_gpus, intra=link, tables=(table,))


def test_communication_of_several_ranks_is_predicted_on_their_cluster(tmp_path):
    """One bucket, ready when backward ends, is waited for as long as its all-reduce takes."""
    run = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", world_size=4, **LONG))
    assert 4 * run.network_of(run.epochs[0]).num_parameters < 2**20
    result = validate([run], cluster=constant_all_reduces(0.25))
    for check, epoch in zip(result.runs[0].epochs, run.epochs, strict=True):
        assert check.predicted_exposed_communication_seconds == pytest.approx(0.25 * epoch.num_iterations)
        assert check.measured_exposed_communication_seconds == epoch.time.exposed_communication_s
    measured_s = sum(epoch.time.exposed_communication_s for epoch in run.epochs)
    off_s = 0.25 * sum(epoch.num_iterations for epoch in run.epochs) - measured_s
    assert result.communication_error == pytest.approx(off_s / result.runs[0].measured_seconds)


def test_a_run_that_went_on_with_another_number_of_ranks_is_predicted_with_both(tmp_path):
    one, four = (ptsim.read_trace(dense_trace(tmp_path / f"{n}.jsonl", world_size=n, **LONG)) for n in (1, 4))
    mixed = msgspec.structs.replace(one, epochs=(*one.epochs[:3], *four.epochs[3:]))
    assert mixed.world_sizes == (1, 4)
    result = validate([mixed], cluster=constant_all_reduces(0.25))
    predicted = [check.predicted_exposed_communication_seconds for check in result.runs[0].epochs]
    assert predicted == [None] * 3 + [pytest.approx(0.25 * epoch.num_iterations) for epoch in mixed.epochs[3:]]
    (difference,) = time_differences(mixed, one)
    assert str(difference) == "ranks 1, then 4 with 1"


@pytest.mark.parametrize(("fastest", "slowest"), [(1.0, 1.0), (0.75, 1.5)])
def test_steps_of_several_gpus_have_the_hooks_and_the_interval_that_they_are_predicted_with(
    tmp_path: Path, fastest: float, slowest: float
) -> None:
    """A table of two sizes is known to exp(±1.645 · 0.1) between them, and 0.017 of jitter independent of that.

    What many GPUs add stands in `scaling.toml`.

    Hooks are computation: they are as much faster and slower as the rest of it, which is a little slower among GPUs.
    """
    read = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", world_size=4, **LONG))
    (profile,) = read.profiles
    ends = {"step_low_s": fastest * profile.step_s, "step_high_s": slowest * profile.step_s}
    trace = msgspec.structs.replace(read, profiles=(msgspec.structs.replace(profile, **ends),))
    made = constant_all_reduces(0.25)
    clusters = (msgspec.structs.replace(made, library=library) for library in ("gloo", "nccl"))
    cpus, gpus = (validate([trace], cluster=cluster).runs[0].epochs[1] for cluster in clusters)
    n = trace.epochs[1].num_iterations
    alone_s = profile.forward_s + profile.backward_s + profile.optimizer_s
    added_s = SLOWDOWN * alone_s + TENSOR_S * len(trace.final_network.gradients)
    assert gpus.predicted_seconds - cpus.predicted_seconds == pytest.approx(n * added_s)

    def ends_of(computed_s: float) -> list[float]:
        scales = (1.0, 0), (fastest, -1), (slowest, 1)
        sure = 1.645 * math.hypot(0.1, 0.017)
        return [scale * computed_s + 0.25 * math.exp(end * sure) for scale, end in scales]

    step_s, least_s, most_s = ends_of(alone_s)
    assert cpus.predicted_seconds - cpus.low_seconds == pytest.approx(n * (step_s - least_s))
    assert cpus.high_seconds - cpus.predicted_seconds == pytest.approx(n * (most_s - step_s))
    step_s, least_s, most_s = ends_of(alone_s + added_s)
    below = math.hypot(math.log(step_s / least_s), SCALING.low)
    above = math.hypot(math.log(most_s / step_s), SCALING.high)
    assert gpus.predicted_seconds - gpus.low_seconds == pytest.approx(n * step_s * (1 - math.exp(-below)))
    assert gpus.high_seconds - gpus.predicted_seconds == pytest.approx(n * step_s * (math.exp(above) - 1))


def test_a_compiled_step_hides_no_communication(tmp_path):
    """Its gradients become ready together, at its end: every bucket is waited for."""
    eager = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", world_size=4, widths=(64, 128, 256), **LONG))
    settings = {**eager.run.hyperparameters, "compile": True}
    compiled = msgspec.structs.replace(eager, run=msgspec.structs.replace(eager.run, hyperparameters=settings))
    num_buckets = len(ddp_buckets(eager.network_of(eager.epochs[0])))
    assert num_buckets > 1
    num_steps = sum(epoch.num_iterations for epoch in eager.epochs)
    checks = [validate([trace], cluster=constant_all_reduces(1e-4)).runs[0] for trace in (eager, compiled)]
    waits = [check.predicted_exposed_communication_seconds for check in checks]
    assert waits[1] == pytest.approx(num_buckets * 1e-4 * num_steps)
    assert waits[0] < 0.8 * waits[1]
    assert [compiled.compiled_note in check.notes for check in checks] == [False, True]


def test_without_a_cluster_exposed_communication_is_as_measured_and_said_so(tmp_path):
    path = dense_trace(tmp_path / "t.jsonl", world_size=4, **LONG)
    result = validate([path])
    assert result.communication_error is None
    assert result.whole_run_error == pytest.approx(0, abs=1e-9)  # all epochs did the same, waiting included
    assert "taken as measured" in result.reasons["communication_error"]
    assert "exposed communication is taken as measured" in result.runs[0].notes[0]
    assert result.runs[0].predicted_exposed_communication_seconds is None


def test_a_cluster_that_no_run_can_have_used_is_refused(tmp_path, runs, capsys):
    with pytest.raises(UsageError, match="every run had one rank"):
        validate(runs, cluster=constant_all_reduces(0.25))
    path = dense_trace(tmp_path / "t.jsonl", world_size=4)
    with pytest.raises(UsageError, match="2"):
        validate([path], cluster=constant_all_reduces(0.25, num_gpus=2))
    assert run(["validate", str(path), "--cluster", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def in_epochs(trace: ptsim.Trace, *, walls: Sequence[float] = (), **columns: Sequence[object]) -> ptsim.Trace:
    """The run with other values in its epochs; `walls` are factors on the recorded wall times."""
    epochs = []
    for number, epoch in enumerate(trace.epochs):
        time = epoch.time
        if walls:
            time = msgspec.structs.replace(time, wall_s=walls[number] * time.wall_s)
        changes = {name: values[number] for name, values in columns.items()}
        epochs.append(msgspec.structs.replace(epoch, **{"measured_time": time, **changes}))
    return msgspec.structs.replace(trace, epochs=tuple(epochs))


def test_errors_intervals_memory_and_energy_of_a_run_by_hand(tmp_path: Path) -> None:
    """Every epoch is predicted as long as the first; the others took 5/4 and 4/5 of that, on a GPU of no catalog."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", epochs=3, device="NVIDIA X9000"))
    first, (profile,) = trace.epochs[0], trace.profiles
    need = iteration_memory(trace.network_of(first), trace.setting_of(first)).peak_bytes
    energy_j = first.device.energy_j
    trace = in_epochs(
        trace,
        walls=(1.0, 1.25, 0.8),
        peak_memory_bytes=(2 * need, need, None),
        device=[msgspec.structs.replace(first.device, energy_j=n * energy_j) for n in (1, 1, 2)],
    )
    wide = msgspec.structs.replace(profile, step_low_s=0.9 * profile.step_s, step_high_s=1.1 * profile.step_s)
    result = validate([msgspec.structs.replace(trace, profiles=(wide,))])
    (run,) = result.runs
    assert [epoch.error for epoch in run.epochs] == pytest.approx([0.0, -0.2, 0.25], abs=1e-9)
    assert result.epoch_mape == pytest.approx((0.2 + 0.25) / 3)
    assert run.error == pytest.approx(3 / 3.05 - 1)
    assert result.whole_run_error == pytest.approx(1 - 3 / 3.05)
    assert result.interval_coverage == pytest.approx(1 / 3)  # the steps, nearly all of the time, may be 10 % off
    assert result.memory_mape == pytest.approx((0.5 + 0.0) / 2)
    assert (run.measured_energy_joules, run.predicted_energy_joules) == pytest.approx((4 * energy_j, 3 * energy_j))
    assert result.energy_error == pytest.approx(0.25)
    t = first.time
    steps_s = t.forward_s + t.backward_s + t.optimizer_s
    assert run.predicted_seconds == pytest.approx(3 * t.wall_s)
    assert run.low_seconds == pytest.approx(3 * (t.wall_s - 0.1 * steps_s))
    assert run.high_seconds == pytest.approx(3 * (t.wall_s + 0.1 * steps_s))


@pytest.mark.parametrize(("ratio", "said"), [(1.14, False), (1.16, True)])
def test_a_machine_is_judged_by_its_steps_without_input_after_the_first_epoch(
    tmp_path: Path, ratio: float, said: bool
) -> None:
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", epochs=4, device="NVIDIA X9000"))
    time, count = trace.epochs[0].time, trace.epochs[0].num_iterations
    steps_s = time.wall_s - time.data_wait_s
    spent = [(3.0, 1.0), (1.0, 5.0), (0.5, 1.0), (ratio, 1.0)]  # in steps and input: warming up, starving, half as many
    times = [
        msgspec.structs.replace(
            time, wall_s=steps * steps_s + wait * time.data_wait_s, data_wait_s=wait * time.data_wait_s
        )
        for steps, wait in spent
    ]
    changed = in_epochs(trace, measured_time=times, num_iterations=(count, count, count // 2, count))
    notes = validate([changed]).runs[0].notes
    assert [f"took up to {ratio:.2f} times as long" in note for note in notes] == [True] * said


def test_a_machine_is_not_judged_by_steps_among_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Two epochs on one rank, then two on four, whose steps wait for each other and take half as long again."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", epochs=4, device="NVIDIA X9000"))
    for sizes, said in (((1, 1, 4, 4), False), ((1, 1, 1, 1), True)):
        changed = in_epochs(trace, walls=(1.0, 1.0, 1.5, 1.5), world_size=sizes)
        assert any("did the same work" in note for note in validate([changed]).runs[0].notes) is said


def test_every_change_of_the_network_is_predicted_as_the_first_and_what_changed_nothing_as_no_time(
    tmp_path: Path,
) -> None:
    trace = ptsim.read_trace(shrinking_trace(tmp_path / "t.jsonl", **LONG))
    first, second = (
        msgspec.structs.replace(event, measured_duration_s=seconds)
        for event, seconds in zip(trace.reconfigurations, (0.5, 1.0), strict=True)
    )
    idle = msgspec.structs.replace(second, epoch=4, before=second.after, measured_duration_s=0.125)
    unmeasured = msgspec.structs.replace(second, measured_duration_s=None)
    epochs_s = sum(epoch.time.wall_s for epoch in trace.epochs)
    for events, measured_s, predicted_s in (
        ((first, second, idle), 1.625, 1.0),
        ((first, unmeasured, idle), 0.625, 0.5),
    ):
        check = validate([msgspec.structs.replace(trace, reconfigurations=events)]).runs[0]
        assert (check.measured_reconfiguration_seconds, check.predicted_reconfiguration_seconds) == (
            measured_s,
            predicted_s,
        )
        assert check.measured_seconds == pytest.approx(epochs_s + measured_s)
        for name in ("predicted_seconds", "low_seconds", "high_seconds"):
            steps_s = sum(getattr(epoch, name) for epoch in check.epochs)
            assert getattr(check, name) == pytest.approx(steps_s + predicted_s)
        assert check.error == pytest.approx(check.predicted_seconds / check.measured_seconds - 1)
        said = "reconfigurations that were not measured count as 0 s in both times"
        assert (said in check.notes) == (unmeasured in events)


def test_the_first_step_after_every_wrapping_waits_for_all_gradients_in_one_bucket(tmp_path: Path) -> None:
    trace = ptsim.read_trace(
        shrinking_trace(tmp_path / "t.jsonl", epochs=4, world_size=4, widths=(64, 128, 256), **LONG)
    )
    link = Link(name="l", bandwidth_bytes_per_s=1e10, latency_s=1e-6)
    cluster = Cluster(name="t", device=load_device("a100"), gpus_per_node=4, intra=link)
    waits = [c.predicted_exposed_communication_seconds for c in validate([trace], cluster=cluster).runs[0].epochs]
    for first, later in ((0, 1), (2, 3)):  # the network changes after epoch 1
        epoch = trace.epochs[first]
        one_s = all_reduce(4 * trace.network_of(epoch).num_parameters, cluster, 4).seconds
        hidden_s = one_s - waits[later] / epoch.num_iterations
        assert hidden_s > 0
        assert waits[first] - waits[later] == pytest.approx(hidden_s)


def test_of_several_other_runs_the_middle_one_counts_whatever_their_order(tmp_path: Path) -> None:
    runs = []
    for ms in (1, 6, 2):  # of input for every image, and as many seconds of a reconfiguration
        trace = ptsim.read_trace(shrinking_trace(tmp_path / f"{ms}.jsonl", device=CPU, energy=False))
        times = []
        for epoch in trace.epochs:
            t = epoch.time
            steps_s = t.forward_s + t.backward_s + t.regularizer_s + t.optimizer_s
            times.append(msgspec.structs.replace(t, wall_s=steps_s + 1e-3 * ms * epoch.num_images))
        events = [msgspec.structs.replace(event, measured_duration_s=float(ms)) for event in trace.reconfigurations]
        runs.append(msgspec.structs.replace(in_epochs(trace, measured_time=times), reconfigurations=tuple(events)))
    for some in itertools.permutations(runs):
        profile = device_profile_of(some)
        assert profile.input_s_per_image == {"cifar10": pytest.approx(2e-3)}
        assert profile.reconfiguration_s == 2.0
    assert (profile.device, profile.kind, profile.memory_bytes, profile.num_threads) == (CPU, "cpu", 8 * 2**30, 2)


def test_a_profile_that_does_not_say_its_threads_is_taken_with_a_note(tmp_path: Path) -> None:
    """As those are that another profiler recorded on a processor."""
    path = dense_trace(tmp_path / "t.jsonl", device=CPU, energy=False)
    known = device_profile_of([ptsim.read_trace(path)])
    said, untold = (validate([path], msgspec.structs.replace(known, num_threads=threads)) for threads in (2, None))
    assert untold.runs[0].predicted_seconds == said.runs[0].predicted_seconds
    note = "the device profile does not say how many threads it was recorded with, the run had 2"
    assert set(untold.runs[0].notes) - set(said.runs[0].notes) == {note}


def test_runs_on_another_number_of_threads_are_runs_of_another_device(tmp_path: Path) -> None:
    two = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", device=CPU, energy=False))
    eight = msgspec.structs.replace(
        two, run=msgspec.structs.replace(two.run, device=msgspec.structs.replace(two.run.device, num_threads=8))
    )
    with pytest.raises(MissingMeasurementError, match=r"different devices: .* with 2 threads, .* with 8 threads"):
        device_profile_of([two, eight])


def test_a_hold_out_knows_a_run_by_another_spelling_of_its_path_and_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dense_trace(tmp_path / "t.jsonl", **LONG)
    profile = device_profile_of([ptsim.read_trace(path)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"was calibrated on t\.jsonl"):
        validate(["t.jsonl"], profile, holdout=True)
    with pytest.raises(UsageError, match="a second run"):
        validate(["t.jsonl", path], holdout=True)
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="a second run"):
        validate(["t.jsonl", "copy.jsonl"], holdout=True)


@pytest.mark.parametrize("epochs", [None, 3], ids=["copy", "copy from before its end"])
def test_a_device_profile_of_a_runs_copy_is_no_hold_out(tmp_path: Path, epochs: int | None) -> None:
    path = dense_trace(tmp_path / "run.jsonl", **LONG)
    copy = ptsim.read_trace(dense_trace(tmp_path / "copy.jsonl", recorded_epochs=epochs, **LONG))
    file = tmp_path / "device.toml"
    write_device_profile(file, device_profile_of([copy]))
    copy.path.unlink()
    with pytest.raises(UsageError, match=r"was calibrated on .*run\.jsonl"):
        validate([path], file, holdout=True)
    with pytest.raises(UsageError, match="a second run"):
        validate([path, copy], holdout=True)
    repeat = ptsim.read_trace(dense_trace(tmp_path / "repeat.jsonl", seed=1, **LONG))
    assert validate([path], device_profile_of([repeat]), holdout=True).source == "device profile"


def test_a_device_profile_knows_the_runs_it_was_calibrated_on_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dense_trace(Path("t.jsonl"), **LONG)
    write_device_profile(tmp_path / "device.toml", device_profile_of([ptsim.read_trace("t.jsonl")]))
    profile = read_device_profile("device.toml")
    Path("elsewhere").mkdir()
    Path("t.jsonl").rename("elsewhere/other.jsonl")
    with pytest.raises(UsageError, match="was calibrated on"):
        validate(["elsewhere/other.jsonl"], profile, holdout=True)
    another = slower(Path("t.jsonl"), 1.2, penalty_ratio=0.0)  # at the place where that run was
    assert validate([another], profile, holdout=True).source == "device profile"
    with pytest.raises(UsageError, match="was calibrated on"):  # as older files name them
        validate([another], msgspec.structs.replace(profile, runs=()), holdout=True)


def test_a_saving_that_is_predicted_too_small_is_as_wrong_as_one_that_is_too_large(tmp_path: Path) -> None:
    pruned, dense = (
        ptsim.read_trace(make(tmp_path / f"{make.__name__}.jsonl", **LONG)) for make in (shrinking_trace, dense_trace)
    )
    result = validate([in_epochs(pruned, walls=(1.0, *[0.8] * 5)), dense])
    (saving,) = result.savings
    assert saving.predicted_saving < saving.measured_saving - 0.05
    assert saving.error_points == pytest.approx(100 * (saving.predicted_saving - saving.measured_saving))
    assert result.saving_error_points == pytest.approx(-saving.error_points)


def test_energy_is_predicted_from_the_power_of_the_first_epoch_alone(tmp_path: Path) -> None:
    """300 W in the first epoch; later 390 W, which change what was measured and nothing of what is predicted."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", epochs=3, **LONG))
    spent = [
        msgspec.structs.replace(e.device, energy_j=(1.3 if e.epoch else 1) * e.device.energy_j) for e in trace.epochs
    ]
    hot = in_epochs(trace, device=spent)
    steady, heated = (validate([run]).runs[0] for run in (trace, hot))
    assert heated.predicted_energy_joules == steady.predicted_energy_joules
    assert heated.measured_energy_joules == pytest.approx((1 + 2 * 1.3) / 3 * steady.measured_energy_joules)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_power_model_is_fitted_to_what_steps_compute_in_all_their_passes_and_to_what_they_wait(
    tmp_path: Path, passes: int
) -> None:
    """An epoch takes twice as long as its steps, so that the GPU waits for half of it, at 250 W in the mean."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl"))
    first, (profile,) = trace.epochs[0], trace.profiles
    kinds = {layer.name: layer.kind for layer in trace.final_network.layers}
    product_s = sum(t.forward_s + (t.backward_s or 0) for t in profile.layers if kinds[t.layer] in ("conv", "linear"))
    stream_s = profile.forward_s + profile.backward_s - product_s
    gap_s = profile.step_s - profile.forward_s - profile.backward_s - profile.optimizer_s
    updating_s = (1 + (passes - 1) * 3 / 11) * profile.optimizer_s  # a sum of gradients moves 3 values, an update 11
    step_s = passes * (product_s + stream_s + gap_s) + updating_s
    wall_s = 2 * step_s * first.num_iterations
    epoch = msgspec.structs.replace(
        first,
        passes=passes,
        batch_per_gpu=passes * first.batch_per_gpu,
        measured_time=msgspec.structs.replace(first.time, wall_s=wall_s),
        device=msgspec.structs.replace(first.device, energy_j=250.0 * wall_s),
    )
    layers = tuple(
        LayerTime(layer=kind, kind=kind, forward_s=passes * seconds, backward_s=0.0, tier="measured")
        for kind, seconds in ((LayerKind.CONV, product_s), (LayerKind.BATCH_NORM, stream_s))
    )
    step = StepTime(
        layers=layers, optimizer_s=updating_s, regularizer_s=0.0, overhead_s=passes * gap_s, low_s=0.0, high_s=0.0,
        tier="measured",
    )  # fmt: skip
    expected = fit_power(load_device("a100"), [PowerSample(step=step, waiting_s=step_s, power_w=250.0)])
    found = fit_power_model(msgspec.structs.replace(trace, epochs=(epoch,)))
    assert found is not None
    watts = (found.product_w, found.stream_w, found.waiting_w)
    assert watts == pytest.approx((expected.product_w, expected.stream_w, expected.waiting_w))


def test_a_power_model_takes_a_gpu_among_others_for_as_slow_as_its_prediction(tmp_path: Path) -> None:
    """A rank's step of 1 s, recorded alone, in an epoch of 2 s a step, at 250 W in the mean."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", world_size=4, **LONG))
    first, network = trace.epochs[0], trace.final_network
    step = measured_step(network, trace.profiles, trace.setting_of(first))
    step = step.scaled(1 / step.compute_s)
    (profile,) = trace.profiles
    phases = ("forward_s", "backward_s", "optimizer_s", "step_s")
    profile = msgspec.structs.replace(profile, **{name: getattr(profile, name) / profile.step_s for name in phases})
    wall_s = 2.0 * first.num_iterations
    use = msgspec.structs.replace(first.device, energy_j=250.0 * wall_s)
    epoch = msgspec.structs.replace(first, measured_time=msgspec.structs.replace(first.time, wall_s=wall_s), device=use)
    trace = msgspec.structs.replace(trace, epochs=(epoch,), profiles=(profile,))
    for cluster, slower in ((None, 1.0), (constant_all_reduces(0.25), 1 + SLOWDOWN)):
        sample = PowerSample(step=step.scaled(slower), waiting_s=2 - slower, power_w=250.0)
        expected, found = fit_power(load_device("a100"), [sample]), fit_power_model(trace, cluster=cluster)
        assert found is not None
        watts = (found.product_w, found.stream_w, found.waiting_w)
        assert watts == pytest.approx((expected.product_w, expected.stream_w, expected.waiting_w), rel=1e-9)


def test_a_dense_run_measured_no_penalty_whatever_passed_between_two_clocks(tmp_path: Path) -> None:
    dense, pruned = (
        ptsim.read_trace(make(tmp_path / f"{make.__name__}.jsonl")) for make in (dense_trace, shrinking_trace)
    )
    noted = tuple(msgspec.structs.replace(profile, regularizer_s=2e-6) for profile in dense.profiles)
    assert [s.regularizer_s for s in device_profile_of([msgspec.structs.replace(dense, profiles=noted)]).steps] == [
        None
    ]
    assert device_profile_of([pruned]).steps[0].regularizer_s == pruned.profiles[0].regularizer_s > 0


def test_epochs_of_one_network_with_and_without_the_penalty_are_told_apart_on_a_cluster(tmp_path: Path) -> None:
    """Of four ranks; the last epoch only tunes what is left."""
    trace = ptsim.read_trace(shrinking_trace(tmp_path / "t.jsonl", epochs=2, world_size=4, **LONG))
    tuned = in_epochs(trace, penalty_coefficient=(trace.epochs[0].penalty_coefficient, 0.0))
    first, last = validate([tuned], cluster=constant_all_reduces(0.25)).runs[0].epochs
    penalty_s = (1 + SLOWDOWN) * trace.profiles[0].regularizer_s * trace.epochs[0].num_iterations
    assert first.predicted_seconds - last.predicted_seconds == pytest.approx(penalty_s)


def test_epochs_of_one_network_with_other_mini_batches_or_passes_are_told_apart_on_a_cluster(tmp_path: Path) -> None:
    """64 images, twice as many in two passes, and in one; a sum of gradients moves 3 numbers, an update 11."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", epochs=3, world_size=4, **LONG))
    (small,) = trace.profiles
    large = profile_of(trace.final_network, batch=128, device=trace.run.device, regularizer=False)
    assert (small.batch, small.regularizer_s) == (64, 0)
    trace = msgspec.structs.replace(trace, profiles=(small, large))
    found = in_epochs(trace, batch_per_gpu=(64, 128, 128), passes=(1, 2, 1))
    checks = validate([found], cluster=constant_all_reduces(0.25)).runs[0].epochs
    computed = (
        small.forward_s + small.backward_s + small.optimizer_s,
        2 * (small.forward_s + small.backward_s) + (1 + 3 / 11) * small.optimizer_s,
        large.forward_s + large.backward_s + large.optimizer_s,
    )
    beside_s = 0.25 + TENSOR_S * len(trace.final_network.gradients)
    beyond = [
        check.predicted_seconds - epoch.num_iterations * ((1 + SLOWDOWN) * step_s + beside_s)
        for check, epoch, step_s in zip(checks, found.epochs, computed, strict=True)
    ]
    # what is beside the first epoch's steps, an image at a time, is the same for all, which have as many
    assert beyond == pytest.approx([beyond[0]] * 3, rel=1e-6)
    assert beyond[0] < 0.2 * min(check.predicted_seconds for check in checks)


def test_the_energy_of_a_single_epoch_is_not_predicted_from_itself(tmp_path: Path) -> None:
    result = validate([dense_trace(tmp_path / "t.jsonl", epochs=1, **LONG)])
    (check,) = result.runs
    assert check.epochs[0].measured_energy_joules is not None
    assert (check.epochs[0].predicted_energy_joules, check.predicted_energy_joules, result.energy_error) == (None,) * 3


def test_memory_is_predicted_for_the_gpu_that_recorded_the_run(tmp_path: Path) -> None:
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", **LONG))
    epoch = trace.epochs[0]
    on_gpu, anywhere = (
        iteration_memory(trace.network_of(epoch), trace.setting_of(epoch), device=device).peak_bytes
        for device in (load_device("a100-sxm4-40gb"), None)
    )
    assert validate([trace]).runs[0].epochs[0].predicted_memory_bytes == on_gpu
    assert on_gpu > anywhere  # with the libraries' work space


def test_the_largest_error_of_several_runs_is_shown(tmp_path: Path) -> None:
    """Every epoch is predicted as long, and with as much energy, as the first."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", epochs=3, device="NVIDIA X9000"))
    use = trace.epochs[0].device
    runs = [
        in_epochs(
            trace,
            walls=(1.0, wall, wall),
            device=[msgspec.structs.replace(use, energy_j=n * use.energy_j) for n in (1, energy, energy)],
        )
        for wall, energy in ((1.1, 1.5), (1.25, 2.0), (1.0, 1.0))
    ]
    result = validate(runs)
    assert result.whole_run_error == pytest.approx(1 - 3 / 3.5)
    assert result.energy_error == pytest.approx(1 - 3 / 5)


def test_the_largest_error_of_several_runs_communication_is_shown(tmp_path: Path) -> None:
    """0.25 s a step are predicted; 0.2, 0.4 and 0.26 s were waited for."""
    read = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", world_size=4, **LONG))
    runs = []
    for waited_s in (0.2, 0.4, 0.26):
        times = [
            msgspec.structs.replace(epoch.time, exposed_communication_s=waited_s * epoch.num_iterations)
            for epoch in read.epochs
        ]
        runs.append(in_epochs(read, measured_time=times))
    result = validate(runs, cluster=constant_all_reduces(0.25))
    steps, walls_s = (sum(of) for of in zip(*((e.num_iterations, e.time.wall_s) for e in read.epochs), strict=True))
    assert result.communication_error == pytest.approx(0.15 * steps / walls_s)


def test_the_largest_error_of_several_savings_is_shown(tmp_path: Path) -> None:
    pruned, dense = (
        ptsim.read_trace(make(tmp_path / f"{make.__name__}.jsonl", **LONG)) for make in (shrinking_trace, dense_trace)
    )
    result = validate([in_epochs(pruned, walls=(1.0, *[wall] * 5)) for wall in (0.9, 0.6, 0.8)] + [dense])
    errors = [abs(saving.error_points) for saving in result.savings]
    assert len(errors) == 3
    assert min(errors) < max(errors) - 5
    assert result.saving_error_points == max(errors)


def test_the_utilisation_of_epochs_is_that_of_all_their_flops_in_all_their_time(tmp_path):
    """Two epochs on 2 GPUs, in 1 and 3 s: 2 FLOPs a MAC over 2 · 4 GPU seconds of 19.5 TFLOP/s in fp32."""
    trace = read_trace(shrinking_trace(tmp_path / "trace.jsonl", world_size=2, precision=Precision.FP32))
    a100, epochs = load_device("a100-sxm4-40gb"), trace.epochs[:2]
    macs = sum(cost.training_macs for cost in run_cost(trace)[:2])
    found = epochs_utilization(trace, a100, zip(epochs, (1.0, 3.0), strict=True))
    assert found == pytest.approx(2 * macs / (8 * 19.5e12))
    assert epochs_utilization(trace, None, zip(epochs, (1.0, 3.0), strict=True)) is None
    slow = msgspec.structs.replace(a100, peak_flops_per_s={Precision.BF16: 312e12})
    assert epochs_utilization(trace, slow, zip(epochs, (1.0, 3.0), strict=True)) is None
