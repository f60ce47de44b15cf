"""The rehearsal of the GPU campaign on a CPU: every piece, in turn, each going on where it was."""

import argparse
import collections
import contextlib
import importlib
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image
from torch import nn
from torch.cuda._utils import _get_device_index

import ptsim
from ptsim import zoo
from ptsim.hardware.profile import OperatorSetting, StepMeasurement
from ptsim.hardware.profile_file import read_device_profile, write_device_profile
from ptsim.network import Precision
from ptsim.setting import StepSetting

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
gpu_campaign = importlib.import_module("gpu_campaign")
gpu_runs = importlib.import_module("gpu_runs")
gpu_steps = importlib.import_module("gpu_steps")
gpu_tests = importlib.import_module("gpu_tests")
processes = importlib.import_module("processes")
work_through, main = gpu_campaign.work_through, gpu_campaign.main


def campaign_at(folder, minutes=5.0, device="cpu", cifar=None):
    tiny = device == "cpu"
    options = argparse.Namespace(out=folder, work=None, device=device, tiny=tiny, cifar=cifar, minutes=minutes)
    folder.mkdir(exist_ok=True)
    (folder / "work").mkdir(exist_ok=True)
    return gpu_campaign.Campaign(options)


def archive_at(folder):
    """Images as CIFAR-10's archive has them: train/CLASS/0000.jpg and test/CLASS/0000.jpg, 32×32."""
    for split, count in (("train", 40), ("test", 35)):
        for number, name in enumerate(("airplane", "truck")):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), (100 * number, 3 * index, 50)).save(place / f"{index:04d}.jpg")
    with tarfile.open(folder / "images.tar.xz", "w:xz") as archive:
        for split in ("train", "test"):
            archive.add(folder / split, arcname=split)
    return folder / "images.tar.xz"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("campaign")
    campaign = campaign_at(out, cifar=archive_at(tmp_path_factory.mktemp("archive")))
    left = work_through(campaign, lambda name, _minutes: campaign.pieces[name].work())
    return out, left, campaign


def test_one_call_does_piece_after_piece_and_leaves_nothing(results):
    _, left, campaign = results
    assert left == []
    assert [entry["piece"] for entry in campaign.log] == [
        "tests",
        "calibrate",
        "vgg11",
        "peaks",
        "steps",
        "memory",
        "seeds",
        "validate",
    ]
    assert not any(entry["failed"] for entry in campaign.log)


def test_there_are_at_most_eight_small_files(results):
    out, _, _ = results
    files = [path for path in out.iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "campaign.json",
        "device.toml",
        "steps.json",
        "runs.tar",
        "tests.txt",
        "memory.json",
        "validation.json",
        "logs.txt",
    }
    assert all(path.stat().st_size <= 16 * 2**20 for path in files)


def test_steps_are_measured_beside_their_prediction(results):
    rows = json.loads((results[0] / "steps.json").read_text())
    assert [row["model"] for row in rows] == ["vgg11", "resnet20", "pruned 0.5 resnet20"]
    assert all(row["measured_step_s"] > 0 and row["predicted_peak_bytes"] > 0 for row in rows)
    assert all("failed" not in row for row in rows)
    assert rows[2]["predicted_peak_bytes"] < rows[1]["predicted_peak_bytes"]
    assert rows[0]["measured_peak_bytes"] == pytest.approx(rows[0]["predicted_peak_bytes"], rel=0.05)


def test_the_tests_marked_gpu_are_collected_and_skip_themselves_on_a_cpu(results):
    said = (results[0] / "tests.txt").read_text()
    assert "test_events_time_what_the_gpu_does SKIPPED" in said
    assert "PASSED" not in said
    assert "pytest ended with status 0" in said
    assert "measure/nvml.py:" in said  # a list of lines that none has run


def test_both_runs_are_whole_and_have_profiles(results, tmp_path):
    with tarfile.open(results[0] / "runs.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    for kind in ("dense", "pruned"):
        trace = ptsim.read_trace(tmp_path / f"resnet20-{kind}-s1.jsonl")
        assert trace.complete
        assert trace.profiles
        assert (trace.run.dataset.name, trace.run.dataset.num_train) == ("imagefolder", 64)
    assert trace.run.hyperparameters["penalty_ratio"] == 0.25


def test_every_turn_notes_its_parts_and_a_rehearsal_reads_all_images(results):
    _, _, campaign = results
    turns = {turn["run"]: turn["parts"] for turn in campaign.trainings.turns}
    assert set(turns) == {"resnet20-dense-s1", "resnet20-pruned-s1", "vgg11-dense-s2", "vgg11-pruned-s2"}
    for parts in turns.values():
        assert set(parts) == {"start", "before", "data", "checkpoints", "profiles", "epochs"}
        assert (parts["data"]["size"], parts["epochs"]["number"]) == (64 + 64, 2)
        assert parts["checkpoints"]["number"] == 3  # one before the first epoch
        assert 0 < parts["start"]["seconds"] < parts["before"]["seconds"]
    weights = sum(parameter.numel() for parameter in zoo.create("vgg11").parameters())
    dense = turns["vgg11-dense-s2"]["checkpoints"]["size"]
    assert dense == pytest.approx(4 * weights * (1 + 2 + 2), rel=0.01)  # without momentum before the first step
    found = campaign.trainings.parts.found
    assert found["unpacked"].number == 1
    assert found["data"].size == 2 * (40 + 35)


def test_what_a_piece_has_noted_stands_in_its_entry_once(tmp_path):
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--piece", "peaks", "--minutes", "60"]) == 0
    campaign = campaign_at(tmp_path)
    for _ in range(2):
        campaign.note("peaks", 12.0, None, further=True)
    first, second = campaign.log
    assert (first["turns"], first["parts"]["networks"]["number"]) == ([], 1)
    assert first["parts"]["start"]["seconds"] >= 0
    assert "parts" not in second


def test_the_profile_can_be_read_and_the_validation_says_what_was_possible(results):
    assert read_device_profile(results[0] / "device.toml").kind == "cpu"
    validation = json.loads((results[0] / "validation.json").read_text())
    assert set(validation) == {"inputs", "own_profiles", "device_profile", "each_other"}
    assert validation["own_profiles"]["epoch_mape"] >= 0


def test_a_validation_is_made_of_the_results_alone_where_there_is_no_gpu(results, tmp_path):
    for path in results[0].glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "validation.json").unlink()
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--piece", "validate"]) == 0
    assert json.loads((tmp_path / "validation.json").read_text())["own_profiles"]["epoch_mape"] >= 0


def test_a_validation_of_older_runs_is_made_again_and_a_damaged_result_too(results, tmp_path):
    for path in results[0].glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    campaign = campaign_at(tmp_path)
    assert campaign.left() == []  # the traces come from runs.tar: the work folder is empty
    trace = campaign.trainings.kept("resnet20-dense-s1")
    trace.write_text("".join(trace.read_text().splitlines(keepends=True)[:-1]))  # as if interrupted at the end
    (tmp_path / "steps.json").write_text("[{")
    assert campaign.left() == ["vgg11", "peaks", "steps", "resnet32", "more-steps", "validate"]


def test_a_trace_that_has_got_further_is_not_overwritten_by_a_run_begun_anew(results, tmp_path):
    (tmp_path / "runs.tar").write_bytes((results[0] / "runs.tar").read_bytes())
    campaign = campaign_at(tmp_path)
    whole = campaign.trainings.kept("resnet20-dense-s1").read_text()
    again = tmp_path / "work" / "resnet20-dense-s1"
    again.mkdir(parents=True)
    (again / "trace.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]))  # its first lines: no epoch yet
    campaign.trainings.keep()
    assert campaign.trainings.kept("resnet20-dense-s1").read_text() == whole


@pytest.mark.parametrize("written", [0, 0.5, 1, 3.5], ids="{} lines".format)
def test_a_trace_that_is_being_written_is_kept_as_soon_as_its_first_line_is_whole(results, tmp_path, written):
    (tmp_path / "runs.tar").write_bytes((results[0] / "runs.tar").read_bytes())
    campaign = campaign_at(tmp_path)
    lines = campaign.trainings.kept("resnet20-dense-s1").read_text().splitlines(keepends=True)
    whole = int(written)
    text = "".join(lines[:whole]) + (lines[whole][:20] if written % 1 else "")
    (tmp_path / "work" / "new").mkdir()
    (tmp_path / "work" / "new" / "trace.jsonl").write_text(text)
    campaign.trainings.keep()
    assert campaign.trainings.kept("new").exists() == (written >= 1)
    assert not campaign.trainings.trained("new")


def test_a_trace_that_is_no_trace_any_more_is_replaced(results, tmp_path):
    (tmp_path / "runs.tar").write_bytes((results[0] / "runs.tar").read_bytes())
    campaign = campaign_at(tmp_path)
    kept = campaign.trainings.kept("resnet20-dense-s1")
    whole, again = kept.read_text(), tmp_path / "work" / "resnet20-dense-s1"
    again.mkdir(parents=True, exist_ok=True)
    (again / "trace.jsonl").write_text(whole)
    kept.write_text("")
    campaign.trainings.keep()
    assert kept.read_text() == whole


def test_a_command_does_not_outlive_an_error_beside_it(monkeypatch):
    monkeypatch.setattr(processes, "PTSIM", (sys.executable, "-c"))
    begun = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: begun.append(real(*args, **kwargs)) or begun[-1])
    with pytest.raises(OSError, match="disk"):
        processes.run_together(
            {"one": ["import time; time.sleep(60)"]}, lambda: 0.1, lambda: (_ for _ in ()).throw(OSError("disk"))
        )
    assert [process.poll() for process in begun] == [-9]


def test_a_piece_that_fails_costs_the_others_nothing_and_is_given_up_after_three_attempts(tmp_path):
    campaign = campaign_at(tmp_path)
    ran = collections.Counter()

    def run(name, _minutes):
        ran[name] += 1
        return "the driver has gone" if name == "vgg11" else None

    for _ in range(4):
        left = work_through(campaign, run)
    assert ran["vgg11"] == 3
    assert ran["validate"] == 4  # nobody did it, but nobody failed
    assert "vgg11" not in left
    assert [entry["failed"] for entry in campaign.log if entry["piece"] == "vgg11"] == ["the driver has gone"] * 3


def test_a_piece_that_failed_but_got_further_goes_on_at_once_until_its_part_is_over(tmp_path):
    campaign = campaign_at(tmp_path)
    ran = collections.Counter()

    def run(name, _minutes):
        ran[name] += 1
        if name != "steps":
            return None
        (tmp_path / "steps.json").write_text("[" + " " * ran[name] + "]")  # one more of whatever it measures
        return "one network" if ran[name] < 4 else None

    work_through(campaign, run)
    assert ran["steps"] == 4
    assert {number for name, number in ran.items() if name != "steps"} == {1}
    campaign.note("steps", 60 * campaign.pieces["steps"].minutes, None, further=True)
    ran.clear()
    work_through(campaign, run)
    assert ran["steps"] == 1


@pytest.mark.parametrize(("ticks", "seconds"), [(98_750, 12.5), (0, 0.0), (200_000, 0.0), (None, 0.0)])
def test_what_a_process_took_to_start_is_part_of_its_call(tmp_path, monkeypatch, ticks, seconds):
    """A thousand seconds after the machine began, whose clock ticks a hundred times a second."""
    stat = tmp_path / "stat"
    if ticks is not None:
        stat.write_text(f"7 (a) b) S {'3 ' * 18}{ticks} 9 9")
    monkeypatch.setattr(processes, "_STAT", stat)
    clock = types.SimpleNamespace(clock_gettime=lambda _: 1000.0, CLOCK_BOOTTIME=7)
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(processes.os, "sysconf", lambda _: 100)
    assert processes.running_s() == seconds


def test_no_piece_begins_when_time_is_over(tmp_path):
    assert "steps" in work_through(campaign_at(tmp_path, minutes=0.5), lambda *_: pytest.fail("began"))


def test_a_piece_in_its_own_process_says_what_stopped_it(tmp_path):
    (tmp_path / "steps.json").write_text("[{")
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny"]
    failed = processes.in_own_process(Path(gpu_campaign.__file__), arguments, "steps", 1.0, tmp_path / "log")
    assert failed is not None
    assert failed.startswith("status 1: msgspec.DecodeError")


def test_an_error_of_the_device_is_a_row_and_ends_the_process(tmp_path, monkeypatch):
    campaign = campaign_at(tmp_path)

    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(gpu_steps, "profile_network", broken)
    monkeypatch.setattr(gpu_steps, "free", broken)  # as everything that is asked of the GPU from then on
    with pytest.raises(RuntimeError, match="illegal memory access"):
        campaign.pieces["steps"].work()
    rows = json.loads((tmp_path / "steps.json").read_text())
    assert [row["failed"] for row in rows] == ["CUDA error: an illegal memory access was encountered"]
    assert "steps" in campaign.left()  # the next process goes on with the other combination


def test_an_error_of_a_networks_own_code_is_a_row_and_the_others_are_measured(tmp_path, monkeypatch):
    campaign, right = campaign_at(tmp_path), gpu_steps.profile_network

    def odd(model, network, **how):
        if network.name == "resnet20":
            raise TypeError("forward() takes\n1 argument")
        return right(model, network, **how)

    monkeypatch.setattr(gpu_steps, "profile_network", odd)
    campaign.pieces["steps"].work()
    first, second = json.loads((tmp_path / "steps.json").read_text())
    assert first["failed"] == "TypeError: forward() takes 1 argument"
    assert "failed" not in second
    assert "steps" not in campaign.left()


@pytest.mark.parametrize(
    ("capacity", "fits", "ran", "failed"),
    [
        (1000, True, 1800, None),
        (110, True, 110, 120),
        (100, True, 100, 105),
        (99, False, 95, 100),
        (50, False, None, 60),
    ],
)
def test_the_memory_limit_is_looked_for_around_what_was_said_to_fit(capacity, fits, ran, failed):
    said = 1000 if capacity == 1000 else 100
    found = gpu_steps.around_the_limit(lambda batch: batch <= (10**9 if capacity == 1000 else capacity), said)
    assert found == {"fits": fits, "largest_that_ran": ran, "smallest_that_failed": failed}


def test_the_allocator_gets_what_cudas_context_leaves_of_the_limit(tmp_path, monkeypatch):
    fractions = []
    device = campaign_at(tmp_path, device="cuda").device
    fake = types.SimpleNamespace(
        mem_get_info=lambda _: (90 * 2**30, 100 * 2**30),
        memory_reserved=lambda _: 9 * 2**30,  # so 1 GiB is neither free nor the allocator's
        # torch refuses a device without a number here, and only here
        set_per_process_memory_fraction=lambda fraction, on: fractions.append(fraction * 10 ** _get_device_index(on)),
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda _: None,
        is_initialized=lambda: True,
        device=torch.cuda.device,  # torch looks whether it is one
    )
    monkeypatch.setattr(gpu_steps.torch, "cuda", fake)
    with gpu_steps.memory_limit(device, 8 * 2**30):
        assert fractions == [pytest.approx(7 / 100)]
    assert fractions[-1] == 1.0


def test_a_row_that_fails_before_the_gpu_is_asked_anything_is_a_row(tmp_path):
    steps = gpu_steps.Steps(tmp_path, torch.device("cuda", 0), tiny=True, remaining_s=lambda: 100.0)
    steps.measure([("nowhere", 1, "fp32", "contiguous")], power=False)
    (row,) = json.loads((tmp_path / "steps.json").read_text())
    assert "unknown model 'nowhere'" in row["failed"]


def test_steps_that_do_not_fit_are_told_from_steps_that_run(monkeypatch):
    model, cpu = zoo.create("resnet20"), torch.device("cpu")
    setting = StepSetting(batch=2, precision=Precision.FP32, memory_format="channels_last")
    assert gpu_steps.runs_steps(model, (3, 32, 32), setting, cpu)

    def fail(*_, **__):
        raise errors.pop()

    monkeypatch.setattr(gpu_steps.F, "cross_entropy", fail)
    no_engine = RuntimeError("GET was unable to find an engine to execute this computation")
    errors = [RuntimeError("CUDA error: misaligned address"), torch.OutOfMemoryError("CUDA out of memory"), no_engine]
    assert not gpu_steps.runs_steps(model, (3, 32, 32), setting, cpu)
    assert not gpu_steps.runs_steps(model, (3, 32, 32), setting, cpu)
    with pytest.raises(RuntimeError, match="misaligned"):
        gpu_steps.runs_steps(model, (3, 32, 32), setting, cpu)


@pytest.mark.parametrize(("precision", "scales"), [(Precision.FP32, False), (Precision.FP16, True)])
def test_power_is_measured_in_steps_that_scale_the_loss_where_training_does(monkeypatch, precision, scales):
    done = []

    class Scaler:
        def __init__(self, device, *, enabled):
            done.append((device, enabled))

        def scale(self, loss):
            done.append("scale")
            return loss

        def step(self, optimizer):
            done.append("step")
            optimizer.step()

        def update(self):
            done.append("update")

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    model, cpu = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.device("cpu")
    setting = StepSetting(batch=2, precision=precision, memory_format="contiguous")
    gpu_steps.training_step(model, (3, 2, 2), setting, cpu)()
    assert done == [("cpu", scales), "scale", "step", "update"]


def test_a_network_whose_limit_cannot_be_found_is_a_row_and_the_next_process_goes_on(tmp_path, monkeypatch):
    tried = []

    def limit(_steps, name, _setting):
        tried.append(name)
        if len(tried) == 2:
            raise RuntimeError("CUDA error: misaligned address")
        if len(tried) == 4:
            raise ValueError("Expected a torch.device with a specified index")
        return {"fits": True}

    monkeypatch.setattr(gpu_steps.Steps, "_limit", limit)
    for _ in range(3):
        steps = gpu_steps.Steps(tmp_path, torch.device("cuda"), tiny=True, remaining_s=lambda: 100.0)
        assert not steps.limits_done()
        with contextlib.suppress(RuntimeError, ValueError):
            steps.limits()
    assert steps.limits_done()
    assert tried == [name for name, *_ in gpu_steps.LIMITED]
    rows = json.loads((tmp_path / "memory.json").read_text())
    odd = "ValueError: Expected a torch.device with a specified index"
    assert [row.get("failed") for row in rows] == [None, "CUDA error: misaligned address", None, odd, None]


def test_an_unknown_piece_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--device", "cpu", "--piece", "lunch"])
    assert "known: tests, calibrate, vgg11, peaks, resnet50, steps, memory, resnet32, seeds" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_the_work_folder_was_lost(results, tmp_path):
    whole = results[2].work / "resnet20-pruned-s1"
    first, second = tmp_path / "first", tmp_path / "second"
    campaign = campaign_at(first)
    (first / "runs.tar").write_bytes((results[0] / "runs.tar").read_bytes())
    for name in ("resnet20-dense-s1", "resnet20-pruned-s1"):
        campaign.trainings.kept(name)
    (campaign.work / "traces" / "resnet20-pruned-s1.jsonl").unlink()
    shutil.copytree(whole, campaign.work / whole.name)
    trace = campaign.work / whole.name / "trace.jsonl"
    lines = trace.read_bytes().splitlines(keepends=True)
    trace.write_bytes(b"".join(lines[:-1]))  # without its end
    campaign.trainings.keep()
    later = campaign_at(second)
    later.take_over(first)
    assert not later.trainings.trained("resnet20-pruned-s1")
    assert later.trainings.trained("resnet20-dense-s1")
    command = later.trainings.train_arguments("resnet20-pruned-s1", gpu_campaign.Pair("resnet20", 1), 0.25)
    assert command == ["train", "--resume", str(later.work / "resnet20-pruned-s1")]
    later.pieces["vgg11"].work()
    assert later.trainings.trained("resnet20-pruned-s1")
    with tarfile.open(second / "runs.tar") as archive:  # who is finished needs no checkpoint any more
        runs = ("resnet20-dense-s1", "resnet20-pruned-s1", "vgg11-dense-s2", "vgg11-pruned-s2")
        assert archive.getnames() == [f"{name}.jsonl" for name in runs]


def test_a_piece_that_has_had_its_part_of_the_half_hour_comes_after_the_others(tmp_path):
    campaign = campaign_at(tmp_path)
    assert campaign.left()[:3] == ["tests", "calibrate", "vgg11"]
    assert campaign.left()[-2:] == ["more-steps", "validate"]  # have no part
    campaign.note("calibrate", 190.0, None, further=True)
    assert campaign.left()[1] == "calibrate"  # its four minutes are not over
    assert campaign.minutes_for("calibrate") == pytest.approx(50 / 60, abs=0.01)
    campaign.note("calibrate", 15.0, None, further=True)  # what is left of them is too short to begin with
    assert "calibrate" in campaign.left()[-5:]
    assert campaign.left()[1] == "vgg11"
    assert campaign.minutes_for("calibrate") == pytest.approx(campaign.remaining_s() / 60, abs=0.01)
    campaign.note("vgg11", 12 * 60 - 100.0, None, further=True)  # of a training more has to be left
    assert campaign.left()[1] == "peaks"


def test_the_parts_fit_into_three_calls_of_half_an_hour_of_a_machine(tmp_path):
    assert sum(piece.minutes for piece in campaign_at(tmp_path).pieces.values()) <= 3 * 8.5


def test_what_a_run_needs_to_go_on_elsewhere_is_kept_while_it_is_running(results, tmp_path, monkeypatch):
    """A call that is cut off does not come back to do it; also while another pair trains."""
    campaign = campaign_at(tmp_path)
    whole = results[2].work / "resnet20-pruned-s1"
    other = campaign.work / "resnet32-pruned-s1"
    shutil.copytree(whole, other)
    lines = (other / "trace.jsonl").read_bytes().splitlines(keepends=True)
    (other / "trace.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:9])  # is being written
    campaign.trainings.keep()
    newest = max((other / "checkpoints").glob("epoch-*"))
    with tarfile.open(tmp_path / "runs.tar") as archive:
        stored = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
    checkpoint = {f"{other.name}/checkpoints/{newest.name}/{path.name}": path for path in newest.iterdir()}
    config = {f"{other.name}/config.toml": other / "config.toml"}
    traces = ("resnet32-pruned-s1.jsonl", f"{other.name}/trace.jsonl")
    assert stored == {name: path.read_bytes() for name, path in (checkpoint | config).items()} | dict.fromkeys(
        traces, b"".join(lines[:-1])
    )
    with monkeypatch.context() as patch:
        patch.setattr(gpu_runs, "MAX_FILE_BYTES", 100_000)  # less than it has
        campaign.trainings.keep()
    assert names_in(tmp_path / "runs.tar") == traces[:1]
    (newest / "state.safetensors.gone").symlink_to(newest / "nothing")  # as if the run let it go meanwhile
    campaign.trainings.keep()
    assert names_in(tmp_path / "runs.tar") == traces[:1]


def names_in(path):
    with tarfile.open(path) as archive:
        return tuple(archive.getnames())


def test_what_a_killed_piece_has_half_written_is_no_result(tmp_path):
    """It would be a ninth file, grow the results, and go from call to call."""
    first, second = campaign_at(tmp_path / "first"), campaign_at(tmp_path / "second")

    def run(_name, _minutes):
        for name in (".runs.tar.abcd1234", ".notes"):
            (first.out / name).write_text("half")

    work_through(first, run)
    assert {path.name for path in first.out.glob(".*")} == {".notes"}
    assert not any(entry["further"] for entry in first.log)
    run("", 0)
    (first.out / "steps.json").write_text("[]")
    second.take_over(first.out)
    names = {path.name for path in second.out.iterdir() if path.is_file()}
    assert names == {"campaign.json", "logs.txt", "steps.json"}


def test_a_work_folder_without_room_costs_no_piece_its_success(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_campaign, "write", full)
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--piece", "memory", "--minutes", "60"]) == 0
    assert (tmp_path / "memory.json").exists()


@pytest.mark.parametrize(("free", "told"), [(10**9, True), (10**11, False)])
def test_too_little_room_to_work_in_is_told_at_once(tmp_path, monkeypatch, capsys, free, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_campaign, "board_name", lambda: None)
    monkeypatch.setattr(gpu_campaign, "work_through", lambda *_: [])
    monkeypatch.setattr(gpu_campaign.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    assert main(["--out", str(tmp_path)]) == 0
    assert ("954 MiB free, and images and a pair of VGG-11 take about 2.00 GiB" in capsys.readouterr().err) == told


def test_the_installed_package_runs_where_a_checkout_is_the_current_folder(tmp_path):
    (tmp_path / "ptsim").mkdir()
    (tmp_path / "ptsim" / "__init__.py").write_text("raise SystemExit('the checkout')")
    ran = subprocess.run([*processes.PTSIM, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, ptsim.__version__)


def test_the_tests_marked_gpu_find_the_installed_package_before_the_checkout(tmp_path):
    root = str(gpu_tests.ROOT)
    made = gpu_tests.environment({"PYTHONPATH": f"{tmp_path}:relative", "HOME": "/h"})
    assert made["PYTHONPATH"].split(":") == [str(tmp_path), str(Path("relative").absolute()), root]
    assert made["HOME"] == "/h"
    assert gpu_tests.environment({})["PYTHONPATH"] == root
    command = gpu_tests.command(measured=True)
    assert command[1] == "-P"
    assert command[-1] == f"{root}/tests/gpu"


@pytest.mark.parametrize(
    ("minutes", "begun", "least_s"),
    [(20.0, False, 504), (8.5, False, 357), (8.5, True, 120), (5.0, False, 210), (2.0, False, 120)],
)
def test_runs_whose_checkpoints_do_not_fit_into_the_results_begin_where_their_part_is_left(
    tmp_path, minutes, begun, least_s
):
    """Seven tenths of twelve minutes, or of a shorter call; once begun, as those that can go on elsewhere."""
    if begun:
        (tmp_path / "work" / "vgg11-pruned-s1" / "checkpoints").mkdir(parents=True)
    pieces = campaign_at(tmp_path, minutes, device="cuda").pieces
    assert pieces["vgg11"].least_s == pytest.approx(least_s)
    assert (pieces["resnet32"].least_s, pieces["seeds"].least_s, pieces["steps"].least_s) == (120, 120, 40)


def test_the_number_format_of_the_runs_is_calibrated_first(tmp_path, monkeypatch):
    """Four tenths of ten minutes, then all but the 20 seconds in which the command starts and ends."""
    commands = []

    def ran(command, *, check):
        commands.append(command[len(processes.PTSIM) :])
        (tmp_path / "device.toml").touch()

    monkeypatch.setattr(subprocess, "run", ran)
    campaign = campaign_at(tmp_path, 10.0, device="cuda")
    campaign.calibrate()
    first, second = commands
    assert first[:6] == ["calibrate", "gpu", "--device", "cuda", "--out", str(tmp_path / "device.toml")]
    assert first[-4:] == ["--precision", "fp32", "--memory-format", "contiguous"]
    assert "--resume" not in first
    assert (second[-1], "--precision" in second) == ("--resume", False)
    minutes = [float(command[command.index("--minutes") + 1]) for command in commands]
    assert minutes == pytest.approx([4.0, 10 - 1 / 3], abs=0.02)
    campaign.calibrate()
    assert len(commands) == 3
    assert [part for place, part in enumerate(commands[2]) if place != 7] == [*second[:7], *second[8:]]  # the minutes


def step_of(setting):
    numbers = dict.fromkeys(("num_parameters", "num_tensors", "num_layers", "num_samples"), 1)
    phases = ("forward_s", "backward_s", "optimizer_s", "layers_forward_s", "layers_backward_s")
    seconds = dict.fromkeys(phases, 0.1) | dict.fromkeys(("step_s", "step_low_s", "step_high_s"), 0.3)
    return StepMeasurement(
        architecture="a1",
        name="net",
        setting=setting,
        batch=8,
        optimizer="sgd",
        regularizer_s=None,
        **numbers,
        **seconds,
    )


def test_a_calibration_is_done_when_other_number_formats_are_measured_too(results, tmp_path):
    profile = msgspec.structs.replace(read_device_profile(results[0] / "device.toml"), complete=True)
    campaign = campaign_at(tmp_path, device="cuda")
    assert not campaign.calibrated()
    settings = [
        OperatorSetting(precision=Precision.FP32, memory_format=layout) for layout in ("contiguous", "channels_last")
    ]
    more = tuple(step_of(setting) for setting in settings)
    write_device_profile(tmp_path / "device.toml", msgspec.structs.replace(profile, steps=more[:1]))
    assert not campaign.calibrated()
    write_device_profile(tmp_path / "device.toml", msgspec.structs.replace(profile, steps=more))
    assert campaign.calibrated()
    write_device_profile(tmp_path / "device.toml", msgspec.structs.replace(profile, steps=more, complete=False))
    assert not campaign.calibrated()


def test_a_way_to_predict_that_fails_oddly_takes_no_other_with_it(tmp_path, monkeypatch):
    def validate(_runs, profile=None, *, holdout=False):
        if profile is not None:
            raise KeyError("conv1")
        return {"held out": holdout}

    monkeypatch.setattr(ptsim, "validate", validate)
    campaign_at(tmp_path).validate()
    found = json.loads((tmp_path / "validation.json").read_text())
    assert found["own_profiles"] == {"held out": False}
    assert found["device_profile"] == {"failed": "KeyError: 'conv1'"}
    assert found["each_other"] == {"held out": True}


class Process:
    """Ends with a status when it gets a signal, or by itself; what was done to it."""

    def __init__(self, ends_by, status):
        self.ends_by, self.status, self.done = ends_by, status, []

    def __call__(self, command, *, stderr, **how):
        self.done.append((command, stderr, how))
        return self

    def wait(self, timeout=None):
        self.done.append(timeout)
        if self.ends_by in (None, *self.done):
            return self.status
        raise subprocess.TimeoutExpired("pytest", timeout)

    def send_signal(self, number):
        self.done.append(number)


@pytest.mark.parametrize(
    ("ends_by", "status", "done"),
    [
        (None, 1, [90.0]),
        (signal.SIGINT, 2, [90.0, signal.SIGINT, 8.0]),
        (signal.SIGKILL, -9, [90.0, signal.SIGINT, 8.0, signal.SIGKILL, None]),
    ],
)
def test_a_command_has_its_time_then_it_is_interrupted_and_killed_where_it_goes_on(monkeypatch, ends_by, status, done):
    process = Process(ends_by, status)
    monkeypatch.setattr(subprocess, "Popen", process)
    assert processes.stopped_after(["pytest"], 90.0, cwd="/") == status
    assert process.done == [(["pytest"], subprocess.STDOUT, {"cwd": "/"}), *done]


@pytest.mark.parametrize(("seconds", "given"), [(150.0, 135.0), (20.0, 15.0)])
def test_what_the_tests_have_said_until_they_were_stopped_is_a_result(tmp_path, monkeypatch, seconds, given):
    def stopped(command, patience_s, *, cwd, env, stdout):
        assert (command, patience_s, cwd) == (gpu_tests.command(measured=False), given, gpu_tests.ROOT)
        stdout.write("test_one PASSED\ntest_two ")
        return 2

    monkeypatch.setattr(gpu_tests, "stopped_after", stopped)
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda _: None)
    campaign = campaign_at(tmp_path, device="cuda")
    monkeypatch.setattr(campaign, "remaining_s", lambda: seconds)
    assert not campaign.tested()
    campaign.test()
    assert campaign.tested()
    said = (tmp_path / "tests.txt").read_text().splitlines()
    assert said[:3] == ["test_one PASSED", "test_two ", "pytest ended with status 2"]
    assert said[-1] == "not known: there is no coverage.py here"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("ERROR collecting tests/gpu/test_on_a_gpu.py\nImportError: No module named 'PIL'\n", 2),
        ("ERROR: unknown configuration option 'timeout'\n", 4),
    ],
)
def test_tests_of_which_none_could_run_are_no_result_that_nobody_hears_of(tmp_path, monkeypatch, said, status):
    """Another try would say the same."""
    monkeypatch.setattr(gpu_tests, "stopped_after", lambda *_, stdout, **__: stdout.write(said) and status)
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda _: None)
    campaign = campaign_at(tmp_path, device="cuda")
    with pytest.raises(RuntimeError, match=rf"no test marked gpu has run: pytest ended with status {status}"):
        campaign.test()
    assert campaign.tested()
    assert said in (tmp_path / "tests.txt").read_text()


def test_results_of_another_kind_of_gpu_are_not_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    began = []
    monkeypatch.setattr(gpu_campaign, "work_through", lambda campaign, _run: began.append(campaign.board) or [])
    arguments = ["--out", str(tmp_path / "out"), "--earlier", str(tmp_path)]
    campaign_at(tmp_path / "out")
    for board, said in (
        ("NVIDIA H100 80GB HBM3", None),  # nothing is there yet
        (None, None),  # NVML does not say
        ("NVIDIA H100 80GB HBM3", None),
        ("NVIDIA H200", "has results of NVIDIA H100 80GB HBM3, and here is NVIDIA H200: choose another --out"),
    ):
        monkeypatch.setattr(gpu_campaign, "board_name", lambda board=board: board)
        if said is None:
            assert main(arguments) == 0
            campaign = campaign_at(tmp_path)  # what the earlier call left
            campaign.board = board
            campaign.note("tests", 1.0, None, further=True)
            (tmp_path / "out" / "campaign.json").unlink(missing_ok=True)
        else:
            with pytest.raises(SystemExit):
                main(arguments)
            assert said in capsys.readouterr().err
    assert began == ["NVIDIA H100 80GB HBM3", None, "NVIDIA H100 80GB HBM3"]


def test_the_board_is_named_by_the_driver_or_not_at_all(monkeypatch):
    class Meter:
        def __init__(self, *, index):
            assert index == 0

        def info(self):
            return types.SimpleNamespace(name="NVIDIA H200")

        def close(self):
            pass

    monkeypatch.setattr(gpu_steps, "NvmlMeter", Meter)
    assert gpu_steps.board_name() == "NVIDIA H200"

    def missing(*, index):
        raise gpu_steps.pynvml.NVMLError(gpu_steps.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(gpu_steps, "NvmlMeter", missing)
    assert gpu_steps.board_name() is None
