"""The rehearsal of the GPU campaign on a CPU: every piece, in turn, each going on where it was."""

import argparse
import collections
import json
import tarfile
import types

import pytest
import torch

import ptsim
from analysis import gpu_campaign
from analysis.gpu_campaign import (
    Campaign,
    around_the_limit,
    in_own_process,
    main,
    memory_limit,
    runs_steps,
    work_through,
)
from ptsim import zoo
from ptsim.hardware.profile_file import read_device_profile
from ptsim.network import Precision


def campaign_at(folder, minutes=5.0):
    options = argparse.Namespace(out=folder, work=None, device="cpu", tiny=True, cifar=None, minutes=minutes)
    folder.mkdir(exist_ok=True)
    (folder / "work").mkdir(exist_ok=True)
    return Campaign(options)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("campaign")
    campaign = campaign_at(out)
    left = work_through(campaign, lambda name, _minutes: campaign.pieces[name].work())
    return out, left, campaign


def test_one_call_does_piece_after_piece_and_leaves_nothing(results):
    _, left, campaign = results
    assert left == []
    assert [entry["piece"] for entry in campaign.log] == ["tests", "calibrate", "vgg11", "steps", "memory", "validate"]
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
    }
    assert all(path.stat().st_size <= 16 * 2**20 for path in files)


def test_steps_are_measured_beside_their_prediction(results):
    rows = json.loads((results[0] / "steps.json").read_text())
    assert [row["model"] for row in rows] == ["resnet20", "pruned 0.5 resnet20"]
    assert all(row["measured_step_s"] > 0 and row["predicted_peak_bytes"] > 0 for row in rows)
    assert all("failed" not in row for row in rows)
    assert rows[1]["predicted_peak_bytes"] < rows[0]["predicted_peak_bytes"]


def test_both_runs_are_whole_and_have_profiles(results, tmp_path):
    with tarfile.open(results[0] / "runs.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    for kind in ("dense", "pruned"):
        trace = ptsim.read_trace(tmp_path / f"resnet20-{kind}-s1.jsonl")
        assert trace.complete
        assert trace.profiles
    assert trace.run.hyperparameters["penalty_ratio"] == 0.25


def test_the_profile_can_be_read_and_the_validation_says_what_was_possible(results):
    assert read_device_profile(results[0] / "device.toml").kind == "cpu"
    validation = json.loads((results[0] / "validation.json").read_text())
    assert set(validation) == {"inputs", "own_profiles", "device_profile", "each_other"}
    assert validation["own_profiles"]["epoch_mape"] >= 0


def test_a_validation_of_older_runs_is_made_again_and_a_damaged_result_too(results, tmp_path):
    for path in results[0].glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    campaign = campaign_at(tmp_path)
    assert campaign.left() == []  # the traces come from runs.tar: the work folder is empty
    trace = campaign.kept("resnet20-dense-s1")
    trace.write_text("".join(trace.read_text().splitlines(keepends=True)[:-1]))  # as if interrupted at the end
    (tmp_path / "steps.json").write_text("[{")
    assert campaign.left() == ["vgg11", "steps", "resnet32", "validate", "more-steps"]


def test_a_trace_that_has_got_further_is_not_overwritten_by_a_run_begun_anew(results, tmp_path):
    (tmp_path / "runs.tar").write_bytes((results[0] / "runs.tar").read_bytes())
    campaign = campaign_at(tmp_path)
    whole = campaign.kept("resnet20-dense-s1").read_text()
    again = tmp_path / "work" / "resnet20-dense-s1"
    again.mkdir(parents=True)
    (again / "trace.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]))  # its first lines: no epoch yet
    campaign.keep(["resnet20-dense-s1"])
    assert campaign.kept("resnet20-dense-s1").read_text() == whole


def test_the_plan_names_every_piece_with_its_minutes(capsys):
    assert main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][:3] == ["tests", "calibrate", "vgg11"]
    assert "182 epochs" in lines[2]
    assert len(lines) == 11


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


def test_no_piece_begins_when_time_is_over(tmp_path):
    assert "steps" in work_through(campaign_at(tmp_path, minutes=0.5), lambda *_: pytest.fail("began"))


def test_a_piece_in_its_own_process_says_what_stopped_it(tmp_path):
    (tmp_path / "steps.json").write_text("[{")
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny"]
    failed = in_own_process(arguments, "steps", 1.0, tmp_path / "log")
    assert failed is not None
    assert failed.startswith("status 1: msgspec.DecodeError")


def test_an_error_of_the_device_is_a_row_and_ends_the_process(tmp_path, monkeypatch):
    campaign = campaign_at(tmp_path)

    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(gpu_campaign, "profile_network", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        campaign.pieces["steps"].work()
    rows = json.loads((tmp_path / "steps.json").read_text())
    assert [row["failed"] for row in rows] == ["CUDA error: an illegal memory access was encountered"]
    assert "steps" in campaign.left()  # the next process goes on with the other combination


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
    found = around_the_limit(lambda batch: batch <= (10**9 if capacity == 1000 else capacity), said)
    assert found == {"fits": fits, "largest_that_ran": ran, "smallest_that_failed": failed}


def test_the_allocator_gets_what_cudas_context_leaves_of_the_limit(monkeypatch):
    fractions = []
    fake = types.SimpleNamespace(
        mem_get_info=lambda _: (90 * 2**30, 100 * 2**30),
        memory_reserved=lambda _: 9 * 2**30,  # so 1 GiB is neither free nor the allocator's
        set_per_process_memory_fraction=lambda fraction, _: fractions.append(fraction),
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda _: None,
    )
    monkeypatch.setattr(gpu_campaign.torch, "cuda", fake)
    with memory_limit(torch.device("cuda"), 8 * 2**30):
        assert fractions == [pytest.approx(7 / 100)]
    assert fractions[-1] == 1.0


def test_steps_that_do_not_fit_are_told_from_steps_that_run(monkeypatch):
    model, cpu = zoo.create("resnet20"), torch.device("cpu")
    assert runs_steps(model, (3, 32, 32), 2, Precision.FP32, "channels_last", cpu)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_campaign.F, "cross_entropy", full)
    assert not runs_steps(model, (3, 32, 32), 2, Precision.FP32, "contiguous", cpu)


def test_an_unknown_piece_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--device", "cpu", "--piece", "lunch"])
    assert "known: tests, calibrate, vgg11, peaks, pruned-steps, steps, memory, resnet32" in capsys.readouterr().err
