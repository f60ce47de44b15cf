"""`ptsim predict`: alone and on a cluster, from a model and from a trace; wrong input in one sentence."""

import json
import math
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.answers.repredict import device_profile_of
from ptsim.cli.main import run
from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.datasheet import load_intervals
from ptsim.costs.memory import iteration_memory
from ptsim.costs.scaling import load_scaling
from ptsim.errors import MissingMeasurementError, UnknownNameError, UsageError
from ptsim.hardware.catalog import load_device
from ptsim.hardware.profile import MachineLoad
from ptsim.hardware.profile_file import read_device_profile, write_device_profile
from ptsim.hardware.spec import AllReduceTable, Cluster, Link
from ptsim.network import Parameter, Precision
from ptsim.setting import StepSetting
from ptsim.sim.options import Options
from ptsim.sim.run import project
from tests.traces import dense_trace, residual_network, shrinking_trace

NETWORK = residual_network((16, 32, 64))


def test_throughput_and_step_time_agree():
    prediction = ptsim.predict(NETWORK, gpu="v100", batch=128, precision="amp")
    assert prediction.images_per_second == pytest.approx(128 / prediction.step_seconds)
    assert prediction.low < prediction.step_seconds < prediction.high
    assert prediction.low_images_per_second == pytest.approx(128 / prediction.high)
    assert prediction.tier == "datasheet"
    assert prediction.precision is Precision.FP16


def test_peak_memory_is_that_of_the_memory_model():
    prediction = ptsim.predict(NETWORK, gpu="t4", batch=64)
    assert prediction.peak_memory_bytes > iteration_memory(NETWORK, StepSetting(batch=64)).activation_bytes
    assert prediction.fits


def test_a_mini_batch_that_is_too_large_does_not_fit():
    assert not ptsim.predict(NETWORK, gpu="1080ti", batch=200_000).fits


def test_predict_and_cost_agree_on_what_fits():
    largest = ptsim.cost(NETWORK, gpu="1080ti").largest_batch
    assert ptsim.predict(NETWORK, gpu="1080ti", batch=largest).fits
    assert not ptsim.predict(NETWORK, gpu="1080ti", batch=largest + 1).fits


def test_a_parameter_that_gets_no_gradient_has_no_hook():
    idle = Parameter(name="idle", layer="", shape=(3,))
    network = msgspec.structs.replace(NETWORK, parameters=(*NETWORK.parameters, idle))
    alone, beside = (ptsim.predict(n, cluster="dgx-a100", batch=8).hook_seconds for n in (NETWORK, network))
    assert beside == alone > 0


def test_the_buckets_of_several_gpus_need_memory():
    alone = ptsim.predict(NETWORK, cluster="dgx-a100", gpus=1, batch=8)
    assert ptsim.predict(NETWORK, cluster="dgx-a100", gpus=2, batch=8).peak_memory_bytes > alone.peak_memory_bytes


def test_a_cluster_says_where_the_all_reduce_time_comes_from():
    assert ptsim.predict(NETWORK, gpu="a100", batch=8).network_tier is None
    assert ptsim.predict(NETWORK, cluster="dgx-a100", gpus=2, batch=8).network_tier == "datasheet"


def test_an_unknown_optimizer_says_which_exist():
    with pytest.raises(UnknownNameError, match="unknown optimizer 'lion'; known: adam, adamw, rmsprop, sgd"):
        ptsim.predict(NETWORK, gpu="a100", batch=8, optimizer="lion")


def test_one_gpu_of_a_cluster_needs_no_communication():
    alone = ptsim.predict(NETWORK, gpu="a100", batch=64)
    one = ptsim.predict(NETWORK, cluster="dgx-a100", gpus=1, gpu="a100", batch=64)
    assert one.step_seconds == alone.step_seconds
    assert one.exposed_communication_seconds == 0


def test_a_cluster_adds_what_communication_is_exposed():
    alone = ptsim.predict(NETWORK, gpu="a100", batch=64)
    sixteen = ptsim.predict(NETWORK, cluster="dgx-a100", gpus=16, gpu="a100", batch=64)
    assert sixteen.gpus == 16
    assert 0 <= sixteen.communication_wait_seconds <= sixteen.exposed_communication_seconds
    assert sixteen.step_seconds >= alone.step_seconds + 0.99 * sixteen.exposed_communication_seconds
    assert sixteen.images_per_second == pytest.approx(16 * 64 / sixteen.step_seconds)
    assert sixteen.allreduce_bytes_per_gpu > 0


def test_a_trace_is_predicted_by_its_last_architecture_and_scaled_from_its_profile(tmp_path):
    trace = shrinking_trace(tmp_path / "trace.jsonl")
    last = ptsim.read_trace(trace).epochs[-1]
    here = ptsim.predict(trace, gpu="a100", batch=last.batch_per_gpu)
    there = ptsim.predict(trace, gpu="v100", batch=last.batch_per_gpu)
    assert here.tier == "measured"
    assert there.tier == "scaled"


@pytest.mark.parametrize(
    ("driver_names", "tier"), [("", "scaled"), ('driver_names = ["NVIDIA A100-SXM4-40GB"]', "measured")]
)
def test_a_device_file_of_ones_own_says_whose_measurements_count(tmp_path, driver_names, tier):
    file = tmp_path / "mine.toml"
    file.write_text(
        f"""
name = "mine"
{driver_names}
architecture = "ampere"
memory = "40 GiB"
memory_bandwidth = "1500 GB/s"
num_sms = 100
boost_clock = "1410 MHz"
l2_cache = "40 MiB"
power = "400 W"
idle_power = "50 W"
peak = {{ fp32 = "19.5 TFLOP/s" }}
sources = {{ default = "a data sheet" }}
"""
    )
    trace = shrinking_trace(tmp_path / "trace.jsonl")
    batch = ptsim.read_trace(trace).epochs[-1].batch_per_gpu
    assert ptsim.predict(trace, gpu=str(file), batch=batch).tier == tier


def test_json_has_the_keys_that_scripts_rely_on(tmp_path, capsys):
    trace = dense_trace(tmp_path / "trace.jsonl")
    assert run(["predict", str(trace), "--gpu", "h100", "--batch", "32", "--precision", "tf32", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"step_seconds", "images_per_second", "tier", "low", "high", "peak_memory_bytes"} <= set(document)


def test_the_table_says_throughput_tier_and_memory(tmp_path, capsys):
    trace = dense_trace(tmp_path / "trace.jsonl")
    assert run(["predict", str(trace), "--cluster", "dgx-a100", "--batch", "32"]) == 0
    out = capsys.readouterr().out
    assert "images/s" in out
    assert "tier" in out
    assert "peak memory" in out
    assert "the last network of the run, at" in " ".join(out.split())


@pytest.mark.slow
def test_a_zoo_model_is_captured(capsys):
    assert run(["predict", "resnet20", "--gpu", "3090", "--batch", "128", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "resnet20"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpu", "a1000", "--batch", "8"], "unknown device 'a1000'"),
        (["--gpu", "a100", "--batch", "0"], "mini-batch 0 is not positive"),
        (["--gpu", "v100", "--batch", "8", "--precision", "tf32"], "does not support tf32"),
        (["--gpu", "v100", "--batch", "8", "--gpus", "8"], "without a cluster"),
        (["--gpu", "v100", "--batch", "8", "--sharding", "zero1"], "sharding zero1 was asked for without a cluster"),
        (["--batch", "8"], "neither a device nor a cluster"),
        (["--gpu", "v100", "--batch", "8", "--input", "3,32"], "not CHANNELS,HEIGHT,WIDTH"),
        (["--gpu", "v100", "--batch", "8", "--input", "3,32,32"], "leave both out"),
        (["--cluster", "nowhere", "--batch", "8"], "unknown cluster 'nowhere'"),
        (
            ["--gpu", "a100", "--batch", "8", "--torch-version", "21.07"],
            "torch_version is '21.07', expected a version of",
        ),
        (
            ["--gpu", "a100", "--torch-version", "1.8"],
            "torch_version is for steps that are predicted from the data sheet",
        ),
        (["--gpu", "v100", "--batch", "eight"], "eight"),
    ],
)
def test_a_wrong_input_is_one_sentence_and_status_2(tmp_path, capsys, options, complaint):
    trace = dense_trace(tmp_path / "trace.jsonl")
    assert run(["predict", str(trace), *options]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error


@pytest.mark.parametrize("classes", ["0", "-3"])
def test_a_network_without_classes_is_one_sentence(capsys, classes):
    assert run(["predict", "resnet20", "--gpu", "v100", "--batch", "8", "--classes", classes]) == 2
    assert f"classes is {classes}, expected a positive number" in capsys.readouterr().err


def test_an_unknown_model_is_one_sentence(capsys):
    assert run(["predict", "resnet999", "--gpu", "v100", "--batch", "8"]) == 2
    assert "unknown model 'resnet999'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["devices", "clusters"])
def test_the_catalog_is_listed(capsys, command):
    assert run([command]) == 0
    assert "a100" in capsys.readouterr().out
    assert run([command, "--json"]) == 0
    assert all(entry["sources"] for entry in json.loads(capsys.readouterr().out))


@pytest.fixture
def processor(tmp_path):
    """A profile of a processor that no catalog knows, made of a run on it."""
    run = ptsim.read_trace(shrinking_trace(tmp_path / "run.jsonl", device="Test CPU 9"))
    out = tmp_path / "here.toml"
    write_device_profile(out, device_profile_of([run]))
    return out, next(iter(run.networks.values()))


def test_a_profile_stands_for_the_processor_that_it_was_measured_on(processor):
    out, network = processor
    known = ptsim.predict(network, batch=64, profile=out)
    assert (known.device, known.tier) == ("Test CPU 9", "profiled")
    assert known.step_seconds == pytest.approx(read_device_profile(out).steps[0].step_s, rel=0.02)
    assert known.energy_joules is None
    assert known.notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, "holds fp32 contiguous, not bf16 contiguous"),
        ({"memory_format": "channels_last"}, "holds fp32 contiguous, not fp32 channels_last"),
        ({"optimizer": "adam"}, "no training step with the optimizer 'adam'"),
        ({"gpu": "a100"}, "measured on 'Test CPU 9', which is not the a100"),
    ],
)
def test_what_a_profile_does_not_hold_is_an_error_and_no_worse_tier(processor, options, message):
    out, network = processor
    with pytest.raises(MissingMeasurementError, match=message):
        ptsim.predict(network, batch=64, profile=out, **options)


def test_a_profile_of_a_gpu_that_the_catalog_does_not_know_needs_a_device_file(processor, tmp_path):
    out, network = processor
    gpu = msgspec.structs.replace(read_device_profile(out), device="NVIDIA X9000", kind="cuda")
    write_device_profile(out, gpu)
    with pytest.raises(UsageError, match="is of 'NVIDIA X9000', which the catalog does not have") as caught:
        ptsim.predict(network, batch=64, profile=out)
    assert "--gpu FILE.toml" in str(caught.value.hint)


def test_a_prediction_from_a_busy_machine_says_so(processor, capsys):
    out, network = processor
    loaded = MachineLoad(num_cores=4, other_cores=3.5)
    write_device_profile(out, msgspec.structs.replace(read_device_profile(out), load=loaded))
    notes = ptsim.predict(network, batch=64, profile=out).notes
    assert notes == (
        "the device profile was not measured on a quiet machine: other programs kept 3.5 of 4 CPU cores busy",
    )
    assert run(["predict", str(out.parent / "run.jsonl"), "--batch", "48", "--profile", str(out)]) == 0
    assert "note: the device profile was not measured on a quiet machine" in " ".join(capsys.readouterr().out.split())
    own = ptsim.predict(ptsim.read_trace(out.parent / "run.jsonl"), profile=out)
    assert (own.tier, own.notes) == ("measured", ())  # by the run itself


def test_a_cluster_that_names_no_gpu_has_the_one_that_the_profile_was_measured_on(processor):
    out, network = processor
    unnamed = msgspec.structs.replace(node(0.01), device=None)
    assert ptsim.predict(network, batch=64, profile=out, cluster=unnamed, gpus=1).device == "Test CPU 9"


def node(seconds: float) -> Cluster:
    """Four A100s whose all-reduces take so long whatever their size."""
    table = AllReduceTable(
        num_gpus=4, num_nodes=1, size_bytes=(4, 2**30), seconds=(seconds, seconds), relative_jitter=0.0, source="t"
    )
    link = Link(name="l", bandwidth_bytes_per_s=1e10)
    return Cluster(name="t", device=load_device("a100"), gpus_per_node=4, intra=link, tables=(table,))


def test_a_measured_step_by_hand(tmp_path: Path) -> None:
    """Watts of an A100: 50 idle, and of the 350 up to its limit products take 0.85, streams 0.65 and gaps 0.25."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl"))
    network, profile = trace.final_network, trace.profiles[0]
    one = ptsim.predict(trace, gpu="a100")
    gap_s = profile.step_s - profile.forward_s - profile.backward_s - profile.optimizer_s
    assert (one.step_seconds, one.gpus, one.batch) == (pytest.approx(profile.step_s), 1, 64)
    assert (one.forward_seconds, one.backward_seconds, one.optimizer_seconds, one.overhead_seconds) == pytest.approx(
        (profile.forward_s, profile.backward_s, profile.optimizer_s, gap_s)
    )
    kinds = {layer.name: layer.kind for layer in network.layers}
    forward_s, backward_s = defaultdict[str, float](float), defaultdict[str, float](float)
    for layer in profile.layers:
        forward_s[kinds[layer.layer]] += layer.forward_s
        backward_s[kinds[layer.layer]] += layer.backward_s or 0.0
    assert {row.kind: row.forward_seconds for row in one.by_kind} == pytest.approx(dict(forward_s))
    assert {row.kind: row.backward_seconds for row in one.by_kind} == pytest.approx(dict(backward_s))
    both = [row.forward_seconds + row.backward_seconds for row in one.by_kind]
    assert both == sorted(both, reverse=True)
    flops = 2 * 64 * (3 * network.forward_macs - network.layer("conv1").forward_macs)
    assert one.mfu_fraction == pytest.approx(flops / (19.5e12 * profile.step_s))
    product_s = sum(forward_s[kind] + backward_s[kind] for kind in ("conv", "linear"))
    stream_s = profile.forward_s + profile.backward_s - product_s + profile.optimizer_s
    joules = 347.5 * product_s + 277.5 * stream_s + 137.5 * gap_s
    assert one.energy_joules == pytest.approx(joules)
    assert (one.communication_seconds, one.allreduce_bytes_per_gpu, one.hook_seconds) == (0, 0, 0)

    four = ptsim.predict(trace, cluster=node(0.01), gpus=4)
    assert four.step_seconds > one.step_seconds + 0.01
    slower = 1 + load_scaling().slowdown
    beyond_s = four.step_seconds - slower * profile.step_s - four.hook_seconds
    assert four.exposed_communication_seconds == pytest.approx(beyond_s)
    assert four.images_per_second == pytest.approx(4 * 64 / four.step_seconds)
    assert four.low_images_per_second == pytest.approx(4 * 64 / four.high)
    assert four.high_images_per_second == pytest.approx(4 * 64 / four.low)
    assert four.mfu_fraction == pytest.approx(flops / (19.5e12 * four.step_seconds))
    waiting_s = four.step_seconds - slower * profile.step_s
    assert four.energy_joules == pytest.approx(4 * (slower * joules + 137.5 * waiting_s))
    assert four.energy_joules is not None
    below, above = 1 - four.low / four.step_seconds, four.high / four.step_seconds - 1
    assert min(below, above) > 0.05  # what many GPUs add to the interval
    assert four.low_energy_joules == pytest.approx(four.energy_joules * (1 - math.hypot(below, 0.25)))
    assert four.high_energy_joules == pytest.approx(four.energy_joules * (1 + math.hypot(above, 0.25)))


def test_another_optimizer_than_the_measured_one_takes_as_its_bytes_say(tmp_path: Path) -> None:
    """SGD with momentum reads and writes 11 values for every parameter, without it 6, Adam 21."""
    # so many images that the GPU never waits for its host
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", widths=(64, 128, 256), batch=1024))
    sgd, adam = (ptsim.predict(trace, gpu="a100", optimizer=name) for name in (None, "adam"))
    assert (sgd.tier, adam.tier) == ("measured", "scaled")
    assert adam.optimizer_seconds == pytest.approx(sgd.optimizer_seconds * 21 / 11)
    assert adam.step_seconds - sgd.step_seconds == pytest.approx(adam.optimizer_seconds - sgd.optimizer_seconds)
    assert ptsim.predict(trace, gpu="a100", optimizer="sgd") == sgd
    settings = {**trace.run.hyperparameters, "momentum": 0.0}
    plain = msgspec.structs.replace(trace, run=msgspec.structs.replace(trace.run, hyperparameters=settings))
    assert ptsim.predict(plain, gpu="a100", optimizer="adam").optimizer_seconds == pytest.approx(
        sgd.optimizer_seconds * 21 / 6
    )
    foreign = {**trace.run.hyperparameters, "optimizer": "lamb"}  # of a package that nobody here knows
    unknown = msgspec.structs.replace(trace, run=msgspec.structs.replace(trace.run, hyperparameters=foreign))
    assert ptsim.predict(unknown, gpu="a100", optimizer="adam").step_seconds == pytest.approx(sgd.step_seconds)


def test_a_gpu_that_keeps_a_quarter_of_the_state_updates_a_quarter(tmp_path: Path) -> None:
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl"))
    whole, sharded = (ptsim.predict(trace, cluster=node(0.01), gpus=4, sharding=name) for name in ("none", "zero1"))
    assert sharded.optimizer_seconds == pytest.approx(whole.optimizer_seconds / 4)
    # scattering and gathering take half of an all-reduce each
    assert sharded.step_seconds == pytest.approx(whole.step_seconds - 0.75 * whole.optimizer_seconds)
    assert sharded.peak_memory_bytes < whole.peak_memory_bytes
    assert whole.energy_joules is not None
    saved_j = 4 * 277.5 * 0.75 * whole.optimizer_seconds  # the watts of streams
    assert sharded.energy_joules == pytest.approx(whole.energy_joules - saved_j)


def test_a_run_is_predicted_as_it_is_simulated_and_a_model_with_ddps_defaults(tmp_path: Path) -> None:
    """DDP broadcasts BatchNorm's statistics before every step, unless told not to, and its buckets are apart."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", widths=(64, 128, 256), profiles=False))
    run = ptsim.predict(trace, cluster=node(1e-3), gpus=4)
    epoch = project(trace, node(1e-3), 4).epochs[-1]
    assert run.step_seconds == pytest.approx(epoch.step_s, rel=1e-9)
    setting = {"batch": run.batch, "precision": run.precision, "memory_format": run.memory_format}
    model = ptsim.predict(trace.final_network, cluster=node(1e-3), gpus=4, **setting)
    assert model.exposed_communication_seconds > run.exposed_communication_seconds + 0.5e-3
    assert model.peak_memory_bytes > run.peak_memory_bytes
    told = {**trace.run.hyperparameters, "gradient_as_bucket_view": False, "broadcast_buffers": True}
    own_loop = msgspec.structs.replace(trace, run=msgspec.structs.replace(trace.run, hyperparameters=told))
    defaults = ptsim.predict(own_loop, cluster=node(1e-3), gpus=4)
    assert defaults.exposed_communication_seconds == pytest.approx(model.exposed_communication_seconds)
    assert defaults.peak_memory_bytes == model.peak_memory_bytes
    projected = project(own_loop, node(1e-3), 4).epochs[-1]
    assert defaults.step_seconds == pytest.approx(projected.step_s, rel=1e-9)
    assert (run.peak_memory_bytes, defaults.peak_memory_bytes) == (epoch.peak_memory_bytes, projected.peak_memory_bytes)
    without = project(own_loop, node(1e-3), 4, Options(broadcast_buffers=False)).epochs[-1]
    assert without.step_s == pytest.approx(epoch.step_s, rel=1e-9)


def test_a_compiled_run_hides_no_communication_elsewhere_either(tmp_path: Path) -> None:
    eager = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", widths=(64, 128, 256)))
    settings = {**eager.run.hyperparameters, "compile": True}
    compiled = msgspec.structs.replace(eager, run=msgspec.structs.replace(eager.run, hyperparameters=settings))
    usual, at_once = (ptsim.predict(trace, cluster=node(1e-3), gpus=4) for trace in (eager, compiled))
    assert at_once.exposed_communication_seconds == pytest.approx(at_once.communication_seconds)
    assert usual.communication_seconds == pytest.approx(at_once.communication_seconds)
    assert usual.exposed_communication_seconds < 0.9 * usual.communication_seconds
    assert (usual.notes, at_once.notes) == ((), (compiled.compiled_note,))
    own_s = usual.forward_seconds + usual.backward_seconds + usual.optimizer_seconds + usual.overhead_seconds
    beyond_s = usual.step_seconds - own_s - usual.hook_seconds
    assert usual.exposed_communication_seconds == pytest.approx(beyond_s)
    assert usual.communication_wait_seconds < 0.99 * beyond_s  # beside all-reduces it computes more slowly


def test_a_run_that_reduced_in_every_pass_is_said_to_be_predicted_with_one_reduction(tmp_path: Path) -> None:
    """Without no_sync, four passes send the gradients four times."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", world_size=4, profiles=False))
    for times in (1, 4):
        epochs = tuple(
            msgspec.structs.replace(
                epoch,
                passes=4,
                allreduce_bytes=times * epoch.num_iterations * trace.network_of(epoch).gradient_bytes,
            )
            for epoch in trace.epochs
        )
        accumulated = msgspec.structs.replace(trace, epochs=epochs)
        note = accumulated.reductions_note
        assert (note is None) is (times == 1)
        if note is not None:
            assert note.startswith("the run reduced its gradients 4 times per update of 4 passes")
        said = () if note is None else (note,)
        assert ptsim.predict(accumulated, cluster=node(1e-3), gpus=4).notes == said
        assert ptsim.predict(accumulated, cluster=node(1e-3), gpus=1).notes == ()
        assert ptsim.predict(accumulated, cluster=node(1e-3), gpus=4, batch=32).notes == ()  # in one pass
        notes = [project(accumulated, node(1e-3), count).notes for count in (1, 4)]
        assert [note in these for these in notes] == [False, times == 4]


def test_what_runs_once_a_pass_is_counted_in_every_pass(tmp_path: Path) -> None:
    """Four passes of 16 images: a layer whose work does not depend on the images does it four times."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl"))
    network = trace.final_network
    layers = tuple(msgspec.structs.replace(layer, once=layer.name == "conv1") for layer in network.layers)
    once = msgspec.structs.replace(network, layers=layers)
    accumulated = msgspec.structs.replace(
        trace,
        networks=dict.fromkeys(trace.networks, once),
        epochs=tuple(msgspec.structs.replace(epoch, passes=4) for epoch in trace.epochs),
    )
    predicted = ptsim.predict(accumulated, gpu="a100-sxm4-40gb")
    first = network.layer("conv1").forward_macs  # needs no gradient of its input
    flops = 2 * (64 * 3 * (network.forward_macs - first) + 4 * 2 * first)
    assert predicted.mfu_fraction == pytest.approx(flops / (19.5e12 * predicted.step_seconds))


def test_the_parts_of_an_accumulated_step_on_several_gpus_add_up_to_it(tmp_path: Path) -> None:
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl"))
    passes = tuple(msgspec.structs.replace(epoch, passes=4) for epoch in trace.epochs)
    p = ptsim.predict(msgspec.structs.replace(trace, epochs=passes), cluster=node(0.01), gpus=4)
    computed_s = p.forward_seconds + p.backward_seconds + p.optimizer_seconds + p.overhead_seconds + p.hook_seconds
    assert p.step_seconds == pytest.approx(computed_s + p.exposed_communication_seconds)


def test_a_step_from_the_data_sheet_is_as_unsure_among_many_gpus_as_was_measured_there() -> None:
    """All-reduces of no time; `residuals.toml` has the ends of the interval in units of those of one GPU."""
    one, four = (
        ptsim.predict(NETWORK, cluster=node(1e-12), gpus=gpus, batch=64, torch_version="2.8") for gpus in (1, 4)
    )
    assert (one.tier, four.tier) == ("datasheet", "datasheet")
    many = load_intervals().of_many_gpus(known=True)
    assert math.log(four.low / four.step_seconds) == pytest.approx(
        -many.low * math.log(one.low / one.step_seconds), rel=1e-6
    )
    assert math.log(four.high / four.step_seconds) == pytest.approx(
        many.high * math.log(one.high / one.step_seconds), rel=1e-6
    )


def test_the_network_tier_is_the_worst_that_gradients_and_sharded_parameters_come_from() -> None:
    """The table reaches over every bucket, and not over all parameters, which are gathered at once."""
    network = residual_network((64, 128, 256))
    largest = max(bucket.num_bytes for bucket in ddp_buckets(network))
    made = node(0.01)
    table = msgspec.structs.replace(made.tables[0], size_bytes=(4, largest))
    known = msgspec.structs.replace(made, tables=(table,))
    tiers = [ptsim.predict(network, cluster=known, gpus=4, batch=8, sharding=s).network_tier for s in ("none", "zero1")]
    assert tiers == ["measured", "scaled"]


@pytest.mark.parametrize(
    ("gpu", "version", "note"),
    [
        (
            "a100",
            "1.9",
            "with PyTorch before 1.10, kernels on a100-sxm4-40gb take 14% longer; the prediction includes this",
        ),
        (
            "a100",
            None,
            "took 14% longer; no version of PyTorch was given, so the upper end of the interval includes this",
        ),
        ("a100", "2.8", None),
        ("v100", "1.9", None),
        ("v100", None, None),
    ],
)
def test_a_prediction_says_what_it_takes_of_the_software(gpu, version, note) -> None:
    notes = ptsim.predict(NETWORK, gpu=gpu, batch=64, torch_version=version).notes
    assert len(notes) == (note is not None)
    assert all(note in found for found in notes)


def test_runs_are_of_a_version_that_ptsim_trains_with(tmp_path: Path) -> None:
    """So their interval holds no young software, projected onto Ampere or not."""
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl"))
    said = ptsim.predict(trace, gpu="a100-sxm4-80gb", batch=64, precision="tf32", torch_version="2.8")
    usual = ptsim.predict(trace, gpu="a100-sxm4-80gb", batch=64, precision="tf32")
    assert (said.torch_version, usual.torch_version) == ("2.8", None)
    assert msgspec.structs.replace(said, torch_version=None) == usual
