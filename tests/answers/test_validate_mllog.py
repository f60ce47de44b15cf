"""MLPerf logs beside predictions: lines of the published form with numbers made up for hand arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptsim.answers.predict import predict
from ptsim.answers.validate_mllog import validate_mllog
from ptsim.cli.main import run
from ptsim.costs.flops import training_macs
from ptsim.errors import FileFormatError, UsageError
from ptsim.measure.mllog import read_mllog
from ptsim.network import Network
from tests.measure.mllogs import PUBLISHED, marked, mllog
from tests.traces import residual_network


def test_a_published_file_is_read_with_its_torn_lines_left_out(tmp_path: Path, network: Network) -> None:
    path = tmp_path / "result_0.txt"
    path.write_text(PUBLISHED, encoding="utf-8")
    with pytest.warns(UserWarning, match="1 of its :::MLLOG lines are damaged"):
        found = read_mllog(path)
    assert (found.benchmark, found.platform, found.optimizer) == ("resnet", "1xesc8000a-e11", "lars")
    assert (found.num_nodes, found.batch_per_gpu, found.global_batch) == (1, 200, 1600)
    assert (found.epoch_seconds, found.num_epochs) == (51.2, 1)  # the second epoch, without evaluation
    assert found.images_per_second == 25_000.0  # as the submitter's own line says
    with pytest.warns(UserWarning, match="damaged"):
        check = validate_mllog(path, cluster="abci-v", model=network)
    assert (check.gpus, check.batch) == (8, 200)


def test_the_measured_step_stands_beside_the_prediction_of_the_same_cluster(tmp_path: Path, network: Network) -> None:
    check = validate_mllog(mllog(tmp_path / "log"), cluster="dgx-a100", model=network)
    expected = predict(network, batch=100, precision="amp", memory_format="channels_last", cluster="dgx-a100", gpus=16)
    assert (check.gpus, check.batch) == (16, 100)
    assert check.measured_step_seconds == 2.0
    assert check.predicted_step_seconds == expected.step_seconds
    assert check.error == pytest.approx(expected.step_seconds / 2.0 - 1)
    assert not check.inside


def test_flops_utilisation_is_that_of_either_step(tmp_path: Path, network: Network) -> None:
    check = validate_mllog(mllog(tmp_path / "log"), cluster="dgx-a100", model=network)
    flops_per_s = 2 * training_macs(network, images=100) / 2.0
    assert check.measured_mfu_fraction == pytest.approx(flops_per_s / 312e12)
    assert check.predicted_mfu_fraction == pytest.approx(flops_per_s / 312e12 * 2.0 / check.predicted_step_seconds)


@pytest.mark.slow
def test_the_command_prints_the_flops_utilisation_of_both_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["validate", "--mllog", str(mllog(tmp_path / "log")), "--cluster", "dgx-a100", "--model", "resnet20"]
    assert run([*command, "--json"]) == 0
    check = json.loads(capsys.readouterr().out)
    assert run(command) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["MFU"]]
    assert line.split()[1:] == [f"{check[f'{which}_mfu_fraction']:.1%}" for which in ("measured", "predicted")]


def test_gradients_that_accumulate_are_noted_and_a_pass_does_not_tell_the_number_of_gpus(
    tmp_path: Path, network: Network
) -> None:
    """16 GPUs of 100 images in two passes of 50: 1,600 over 50 would be 32 GPUs."""
    log = mllog(tmp_path / "log", d_batch_size=50, gradient_accumulation_steps=2)
    check = validate_mllog(log, cluster="dgx-a100", model=network)
    assert (check.gpus, check.batch) == (16, 100)
    assert "the run added up gradients of 2 passes; one of the whole mini-batch is predicted" in check.notes
    alone = mllog(tmp_path / "one", d_batch_size=50, gradient_accumulation_steps=1)
    once = validate_mllog(alone, cluster="dgx-a100", model=network)
    assert (once.gpus, once.batch) == (32, 50)
    assert not any("added up" in note for note in once.notes)


@pytest.mark.parametrize(
    ("benchmark", "trained"),
    [
        ("resnet", "images of 224 × 224 pixels"),
        ("ssd", "images of 300 × 300 or 800 × 800 pixels"),
        ("retinanet", "images of 800 × 800 pixels"),
        ("maskrcnn", "images whose shorter side has 800 pixels"),
        ("unet3d", "volumes of 128 × 128 × 128 voxels"),
        ("mine", None),
        (None, None),
    ],
)
def test_a_model_for_other_images_than_the_benchmarks_is_noted(
    tmp_path: Path, network: Network, benchmark: str | None, trained: str | None
) -> None:
    """The network of these tests takes 32 × 32."""
    check = validate_mllog(mllog(tmp_path / "log", submission_benchmark=benchmark), cluster="dgx-a100", model=network)
    said = [note for note in check.notes if " trains on " in note]
    expected = f"MLPerf's {benchmark} trains on {trained}, {check.model} on images of 32 × 32"
    assert said == ([expected] if trained else [])


@pytest.mark.slow
def test_the_benchmarks_own_network_has_its_images(tmp_path: Path) -> None:
    check = validate_mllog(mllog(tmp_path / "log"), cluster="dgx-a100")
    assert not any(" trains on " in note for note in check.notes)


def test_a_single_epoch_is_noted(tmp_path: Path, network: Network) -> None:
    whole = mllog(tmp_path / "whole")
    cut = tmp_path / "cut"
    cut.write_text("\n".join(whole.read_text().splitlines()[:8]))  # up to the first epoch_stop
    for log, noted in ((whole, False), (cut, True)):
        check = validate_mllog(log, cluster="dgx-a100", model=network)
        assert any("time of one epoch only" in note for note in check.notes) == noted


def test_another_optimizer_is_noted(tmp_path: Path, network: Network) -> None:
    check = validate_mllog(mllog(tmp_path / "log", opt_name="lars"), cluster="dgx-a100", model=network)
    assert any("lars" in note for note in check.notes)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"global_batch_size": None}, FileFormatError, "says nothing of global_batch_size"),
        ({"train_samples": "many"}, FileFormatError, "train_samples"),
        ({"gradient_accumulation_steps": 0}, FileFormatError, "gradient_accumulation_steps is 0"),
        ({"submission_platform": "a machine"}, UsageError, "how many GPUs"),
        ({"submission_benchmark": "ssd"}, UsageError, "ssd"),
        ({"global_batch_size": 1601}, UsageError, "evenly"),
    ],
)
def test_what_the_log_does_not_say_is_asked_for(
    tmp_path: Path, network: Network, changed: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = None if "submission_benchmark" in changed else network
    with pytest.raises(error, match=said):
        validate_mllog(mllog(tmp_path / "log", **changed), cluster="dgx-a100", model=model)


@pytest.mark.parametrize(
    ("changed", "named", "gpus", "batch"),
    [
        ({}, None, 16, 100),  # two nodes of eight
        ({}, 8, 8, 200),
        ({"submission_platform": " 4X machines"}, None, 32, 50),
        ({"submission_platform": "a machine", "d_batch_size": 50}, None, 32, 50),
        ({"local_batch_size": 400}, None, 4, 400),
        ({"d_batch_size": 300}, None, 16, 100),  # 1,600 images are no whole number of those
        ({"d_batch_size": 50}, 8, 8, 200),
        ({"d_batch_size": 50.5}, None, 16, 100),  # a mean, as over GPUs of which some evaluate
    ],
)
def test_the_gpus_are_named_or_follow_from_the_mini_batches_or_from_the_nodes(
    tmp_path: Path, network: Network, changed: dict[str, Any], named: int | None, gpus: int, batch: int
) -> None:
    check = validate_mllog(mllog(tmp_path / "log", **changed), cluster="dgx-a100", model=network, gpus=named)
    assert (check.gpus, check.batch) == (gpus, batch)


def test_nodes_that_only_evaluate_are_asked_about(tmp_path: Path, network: Network) -> None:
    """As in MLPerf's unet3d: 56 images on 7 of 9 nodes, 168 in 20 s."""
    changed = {"submission_benchmark": "unet3d", "submission_platform": "9xDGX", "train_samples": 168}
    log = mllog(tmp_path / "log", global_batch_size=56, **changed)
    with pytest.raises(UsageError, match="56 images does not share out evenly over 72 GPUs") as caught:
        validate_mllog(log, cluster="dgx-a100", model=network)
    assert caught.value.hint == "--gpus names those that train, where others evaluate"
    with pytest.raises(UsageError, match="over 72 GPUs") as caught:
        validate_mllog(log, cluster="dgx-a100", model=network, gpus=72)
    assert caught.value.hint is None
    check = validate_mllog(log, cluster="dgx-a100", model=network, gpus=56)
    assert (check.gpus, check.batch, check.measured_images_per_second) == (56, 1, pytest.approx(168 / 20))


def test_a_run_on_no_gpus_is_refused(tmp_path: Path, network: Network) -> None:
    with pytest.raises(UsageError, match="evenly over 0 GPUs"):
        validate_mllog(mllog(tmp_path / "log"), cluster="dgx-a100", model=network, gpus=0)


@pytest.mark.parametrize(("factor", "inside"), [(1.0, True), (100.0, False), (0.01, False)])
def test_the_interval_holds_a_step_that_takes_what_is_predicted(
    tmp_path: Path, network: Network, factor: float, inside: bool
) -> None:
    """An epoch of one step: its seconds are the step's, and its images per second the mini-batch over them."""
    path = mllog(tmp_path / "log", train_samples=1600)
    predicted_s = validate_mllog(path, cluster="dgx-a100", model=network).predicted_step_seconds
    marked(path, ("epoch_start", 0), ("epoch_stop", factor * predicted_s))
    path.write_text(path.read_text().replace('"value": 16000,', '"value": 1600,'))
    check = validate_mllog(path, cluster="dgx-a100", model=network)
    assert check.measured_step_seconds == pytest.approx(factor * predicted_s)
    assert check.measured_images_per_second == pytest.approx(1600 / (factor * predicted_s))
    assert check.error == pytest.approx(1 / factor - 1, abs=1e-9)
    assert check.inside == inside


def test_files_without_such_lines_and_broken_ones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, said in (
        ("nothing here\n", "holds no :::MLLOG line"),
        (":::MLLOG {\n", ":1: not a :::MLLOG line"),
        (f":::MLLOG {'[' * 5000}\n", ":1: not a :::MLLOG line"),
    ):
        path = tmp_path / "log"
        path.write_text(text, encoding="utf-8")
        assert run(["validate", "--mllog", str(path), "--cluster", "dgx-a100"]) == 2
        assert said in capsys.readouterr().err
    assert run(["validate"]) == 2
    assert "no trace was named" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "named"),
    [("1xNVIDIA DGX A100", None), ("XE8545x4A100-SXM-80GB", None), ("8xH100", "h100"), ("ND96amsr_H100_v5", "h100"),
     ("2xDSS8440x8A30", "a30"), ("1xA100 and H100", None), ("1xESC-A1001", None), ("1x7920T_2xA5000", "a5000"),
     ("1xRTX A6000", "a6000"), ("8xSXM4", None)],
)  # fmt: skip
def test_a_platform_that_names_other_gpus_than_the_clusters_is_noted(
    tmp_path: Path, network: Network, platform: str, named: str | None
) -> None:
    log = mllog(tmp_path / "log", submission_platform=platform)
    notes = validate_mllog(log, cluster="dgx-a100", model=network, gpus=8).notes
    said = f"the log's platform, {platform.lower()}, names {named}; dgx-a100 has a100-sxm4-40gb"
    assert [note for note in notes if "platform" in note] == ([said] if named else [])


def test_passes_whose_gradients_add_up_do_not_tell_the_gpus(tmp_path: Path, network: Network) -> None:
    """50 images of a GPU are those of one of two passes, or of both: 16 GPUs or 32; the nodes tell."""
    path = mllog(tmp_path / "log", d_batch_size=50, gradient_accumulation_steps=2)
    check = validate_mllog(path, cluster="dgx-a100", model=network)
    assert (check.gpus, check.batch) == (16, 100)
    assert any("gradients of 2 passes" in note for note in check.notes)
    once = mllog(path, d_batch_size=50, gradient_accumulation_steps=1)
    check = validate_mllog(once, cluster="dgx-a100", model=network)
    assert check.gpus == 32
    assert not any("passes" in note for note in check.notes)


def test_images_of_one_gpu_are_those_of_all_over_their_number(tmp_path: Path, network: Network) -> None:
    """160,000 × 8 are ImageNet's within 1 %: 64,000 images/s; 16,000 × 8 are nobody's."""
    for samples, of_all in ((160_000, 1_280_000), (16_000, 16_000)):
        path = mllog(tmp_path / "log", train_samples=samples)
        check = validate_mllog(path, cluster="dgx-a100", model=network, gpus=8)
        assert check.measured_images_per_second == of_all / 20
        assert any(f"train_samples, {samples}, " in note for note in check.notes)


@pytest.mark.parametrize(("times", "inside"), [(1.0, True), (10.0, False), (0.1, False)])
def test_a_step_is_inside_the_interval_of_its_prediction_or_beyond_either_end(
    tmp_path: Path, network: Network, times: float, inside: bool
) -> None:
    """Steps `times` as long as predicted: as many of 1,600 images fill the 20 s of an epoch."""
    asked: dict[str, Any] = {"precision": "amp", "memory_format": "channels_last", "cluster": "dgx-a100"}
    step_s = predict(network, batch=100, gpus=16, **asked).step_seconds
    images = round(1600 * 20 / (times * step_s))
    log = mllog(tmp_path / "log", submission_benchmark="mine", train_samples=images)
    check = validate_mllog(log, cluster="dgx-a100", model=network)
    assert check.measured_step_seconds == pytest.approx(times * step_s, rel=1e-3)
    assert check.inside == inside
    assert check.error == pytest.approx(1 / times - 1, rel=1e-3, abs=1e-3)


@pytest.fixture
def network() -> Network:
    return residual_network()
