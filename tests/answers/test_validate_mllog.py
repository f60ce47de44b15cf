"""MLPerf logs beside predictions: lines of the published form with numbers made up for hand arithmetic."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ptsim.answers.predict import predict
from ptsim.answers.validate_mllog import validate_mllog
from ptsim.cli.main import run
from ptsim.errors import FileFormatError, UsageError
from ptsim.measure.mllog import read_mllog
from ptsim.network import Network
from tests.traces import residual_network


def _log(path: Path, *, blocks: bool = False, **changed: Any) -> Path:
    """Three epochs of 30, 20 and 20 s after 5 s of evaluation each; 2 × 8 GPUs, 1,600 images a step, 16,000 images."""
    values = {
        "submission_benchmark": "resnet",
        "submission_platform": "2xNVIDIA DGX A100",
        "global_batch_size": 1600,
        "train_samples": 16_000,
        "opt_name": "sgd",
    } | changed
    lines = [{"key": key, "value": value, "time_ms": 0} for key, value in values.items() if value is not None]
    now = 1_000_000
    for epoch, seconds in enumerate((30, 20, 20), 1):
        name, count = ("block", 2) if blocks else ("epoch", 1)
        metadata = {"epoch_num": epoch, "epoch_count": count}
        lines.append({"key": f"{name}_start", "value": None, "time_ms": now, "metadata": metadata})
        now += seconds * 1000
        lines.append({"key": f"{name}_stop", "value": None, "time_ms": now, "metadata": metadata})
        now += 5000
    text = "\n".join(f":::MLLOG {json.dumps({'namespace': '', 'event_type': 'X', **line})}" for line in lines)
    path.write_text(f"0: some other output\n{text}\n", encoding="utf-8")
    return path


def test_an_epoch_is_the_median_after_the_first_and_without_evaluation(tmp_path: Path) -> None:
    found = read_mllog(_log(tmp_path / "result_0.txt"))
    assert (found.epoch_seconds, found.num_epochs, found.num_nodes) == (20.0, 2, 2)
    assert found.images_per_second == 800.0
    assert found.step_seconds == 2.0


def test_epochs_whose_marks_do_not_wait_for_the_accelerators_are_timed_up_to_the_evaluation(tmp_path: Path) -> None:
    """Launched in 1 s each, computed after 40 s: two stretches of two epochs, with 7 s of evaluation behind each."""
    path = _log(tmp_path / "result_0.txt")
    head = [line for line in path.read_text().splitlines() if "epoch" not in line]
    now, lines = 2_000_000, []
    for epoch in range(1, 5):
        for key, at in (("epoch_start", 0), ("epoch_stop", 1000)):
            lines.append({"key": key, "value": None, "time_ms": now + at, "metadata": {"epoch_num": epoch}})
        now += 1000
        if epoch % 2 == 0:
            now += 38_000
            lines.append({"key": "eval_start", "value": None, "time_ms": now, "metadata": {}})
            now += 7000
    path.write_text("\n".join([*head, *(f":::MLLOG {json.dumps(line)}" for line in lines)]))
    found = read_mllog(path)
    assert (found.epoch_seconds, found.num_epochs) == (20.0, 3)


# The form of a published result file (MLPerf Training v2.1, ResNet-50 with MXNet on 8 A100): a shell trace, lines of
# several processes that tear each other, epochs inside blocks, evaluation between blocks; numbers made up.
PUBLISHED = """+ docker exec -it image_classification python -c '
mlperf_log_utils.mlperf_submission_log(constants.RESNET)'
:::MLLOG {"namespace": "", "time_ms": 1665498514139, "event_type": "POINT_IN_TIME", "key": "submission_benchmark", "value": "resnet", "metadata": {"file": "mlperf_log_utils.py", "lineno": 84}}
:::MLLOG {"namespace": "", "time_ms": 1665498514146, "event_type": "POINT_IN_TIME", "key": "submission_platform", "value": "1xESC8000A-E11", "metadata": {"file": "mlperf_log_utils.py", "lineno": 101}}
num_gpus=8 num_sockets = 2 num_nodes=8 cores_per_socket=64
0: :::MLLOG {"namespace": "", "time_ms": 1665498536497, "event_type": "INTERVAL_START", "key": "init_start", "value": null, "metadata": {"file": "train_imagenet.py", "lineno": 117}}
1: :::MLLOG {"namespace": "", "time_ms": 1665498536497, "event_type": "INTERVAL_START", "key": "init_start", "value": null, "metadata": {"file": "train_im[14:29:03] ../src/storage/storage.cc:199: Using Pooled
:::MLLOG {"namespace": "", "time_ms": 1665498553508, "event_type": "POINT_IN_TIME", "key": "weights_initialization", "value": null, "metadata": {"file": "train_imagenet.py", "lineno": 88, "tensor": "bn0_beta"}}--dali-roi-decode 0
:::MLLOG {"namespace": "", "time_ms": 1665498554750, "event_type": "POINT_IN_TIME", "key": "d_batch_size", "value": 200, "metadata": {"file": "fit.py", "lineno": 1176}}
:::MLLOG {"namespace": "", "time_ms": 1665498554751, "event_type": "POINT_IN_TIME", "key": "global_batch_size", "value": 1600, "metadata": {"file": "fit.py", "lineno": 1180}}
:::MLLOG {"namespace": "", "time_ms": 1665498554751, "event_type": "POINT_IN_TIME", "key": "train_samples", "value": 1280000, "metadata": {"file": "fit.py", "lineno": 1184}}
:::MLLOG {"namespace": "", "time_ms": 1665498554752, "event_type": "POINT_IN_TIME", "key": "opt_name", "value": "lars", "metadata": {"file": "fit.py", "lineno": 700}}
:::MLLOG {"namespace": "", "time_ms": 1665499000000, "event_type": "INTERVAL_START", "key": "block_start", "value": null, "metadata": {"file": "fit.py", "lineno": 1075, "first_epoch_num": 1, "epoch_count": 2}}
:::MLLOG {"namespace": "", "time_ms": 1665499000000, "event_type": "INTERVAL_START", "key": "epoch_start", "value": null, "metadata": {"file": "fit.py", "lineno": 915, "epoch_num": 1}}
2022-10-11 14:53:17,881 Node[0] Epoch[0] Batch [0-20]	Speed: 24614.64 samples/sec	accuracy=nan
:::MLLOG {"namespace": "", "time_ms": 1665499080000, "event_type": "INTERVAL_END", "key": "epoch_stop", "value": null, "metadata": {"file": "fit.py", "lineno": 988, "epoch_num": 1}}
:::MLLOG {"namespace": "", "time_ms": 1665499080000, "event_type": "POINT_IN_TIME", "key": "tracked_stats", "value": {"imgs_sec": 16000.0}, "metadata": {"file": "fit.py", "lineno": 1004, "step": 1}}
:::MLLOG {"namespace": "", "time_ms": 1665499080000, "event_type": "INTERVAL_START", "key": "epoch_start", "value": null, "metadata": {"file": "fit.py", "lineno": 915, "epoch_num": 2}}
:::MLLOG {"namespace": "", "time_ms": 1665499131200, "event_type": "INTERVAL_END", "key": "epoch_stop", "value": null, "metadata": {"file": "fit.py", "lineno": 988, "epoch_num": 2}}:::MLLOG {"namespace": "", "time_ms": 1665499131200, "event_type": "POINT_IN_TIME", "key": "throughput", "value": 25000.0, "metadata": {"file": "fit.py", "lineno": 1007}}
:::MLLOG {"namespace": "", "time_ms": 1665499131300, "event_type": "INTERVAL_START", "key": "eval_start", "value": null, "metadata": {"file": "fit.py", "lineno": 1027, "epoch_num": 2}}
:::MLLOG {"namespace": "", "time_ms": 1665499139000, "event_type": "POINT_IN_TIME", "key": "eval_accuracy", "value": 0.72732, "metadata": {"file": "fit.py", "lineno": 1056, "epoch_num": 2}}
:::MLLOG {"namespace": "", "time_ms": 1665499139000, "event_type": "INTERVAL_END", "key": "block_stop", "value": null, "metadata": {"file": "fit.py", "lineno": 1059, "first_epoch_num": 1}}
:::MLLOG {"namespace": "", "time_ms": 1665499140000, "event_type": "INTERVAL_END", "key": "run_stop", "value": null, "metadata": {"file": "fit.py", "lineno": 1100, "status": "success"}}
"""  # noqa: E501


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


def test_a_block_is_shared_out_over_its_epochs(tmp_path: Path) -> None:
    assert read_mllog(_log(tmp_path / "result_0.txt", blocks=True)).epoch_seconds == 10.0


def test_the_measured_step_stands_beside_the_prediction_of_the_same_cluster(tmp_path: Path, network: Network) -> None:
    check = validate_mllog(_log(tmp_path / "log"), cluster="dgx-a100", model=network)
    expected = predict(network, batch=100, precision="amp", memory_format="channels_last", cluster="dgx-a100", gpus=16)
    assert (check.gpus, check.batch) == (16, 100)
    assert check.measured_step_seconds == 2.0
    assert check.predicted_step_seconds == expected.step_seconds
    assert check.error == pytest.approx(expected.step_seconds / 2.0 - 1)
    assert not check.inside


def test_gradients_that_accumulate_are_noted_and_a_pass_does_not_tell_the_number_of_gpus(
    tmp_path: Path, network: Network
) -> None:
    """16 GPUs of 100 images in two passes of 50: 1,600 over 50 would be 32 GPUs."""
    log = _log(tmp_path / "log", d_batch_size=50, gradient_accumulation_steps=2)
    check = validate_mllog(log, cluster="dgx-a100", model=network)
    assert (check.gpus, check.batch) == (16, 100)
    assert "the run added up gradients of 2 passes; one of the whole mini-batch is predicted" in check.notes
    alone = _log(tmp_path / "one", d_batch_size=50, gradient_accumulation_steps=1)
    once = validate_mllog(alone, cluster="dgx-a100", model=network)
    assert (once.gpus, once.batch) == (32, 50)
    assert not any("added up" in note for note in once.notes)


def test_another_optimizer_is_noted(tmp_path: Path, network: Network) -> None:
    check = validate_mllog(_log(tmp_path / "log", opt_name="lars"), cluster="dgx-a100", model=network)
    assert any("lars" in note for note in check.notes)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"global_batch_size": None}, FileFormatError, "global_batch_size is None"),
        ({"train_samples": "many"}, FileFormatError, "train_samples"),
        ({"gradient_accumulation_steps": 0}, FileFormatError, "gradient_accumulation_steps is 0"),
        ({"submission_platform": "a machine"}, UsageError, "how many GPUs"),
        ({"submission_benchmark": "bert"}, UsageError, "bert"),
        ({"global_batch_size": 1601}, UsageError, "evenly"),
    ],
)
def test_what_the_log_does_not_say_is_asked_for(
    tmp_path: Path, network: Network, changed: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = None if "submission_benchmark" in changed else network
    with pytest.raises(error, match=said):
        validate_mllog(_log(tmp_path / "log", **changed), cluster="dgx-a100", model=model)


def _marked(path: Path, *marks: tuple[str, float] | tuple[str, float, dict[str, Any]]) -> Path:
    """A log of these marks, at seconds."""
    head = [line for line in _log(path).read_text().splitlines() if not re.search("epoch|block", line)]
    lines = [
        {"key": key, "value": None, "time_ms": 1000 * seconds, "metadata": more[0] if more else {}}
        for key, seconds, *more in marks
    ]
    path.write_text("\n".join([*head, *(f":::MLLOG {json.dumps(line)}" for line in lines)]))
    return path


# Marks, and the median of all epochs but the first.
TIMED: dict[str, tuple[list[Any], float]] = {
    # as Keras callbacks log it: 21, 20 and 22 s of an epoch are no evaluation
    "evaluation inside the epochs": (
        [("epoch_start", 0), ("eval_start", 20), ("eval_stop", 25), ("epoch_stop", 26),
         ("epoch_start", 26), ("eval_start", 45), ("eval_stop", 52), ("epoch_stop", 53),
         ("epoch_start", 53), ("eval_start", 74), ("eval_stop", 80), ("epoch_stop", 81)],
        (20 + 22) / 2,  # 53 - 26 - 7 = 20; 81 - 53 - 6 = 22
    ),
    "evaluation inside every other epoch": (
        [("epoch_start", 0), ("epoch_stop", 20), ("epoch_start", 20), ("eval_start", 41), ("eval_stop", 48),
         ("epoch_stop", 48), ("epoch_start", 48), ("epoch_stop", 71), ("epoch_start", 71), ("eval_start", 96),
         ("eval_stop", 100), ("epoch_stop", 100)],
        23,  # of 21, 23 and 25
    ),
    "its end is that of the epoch": (
        [("epoch_start", 0), ("epoch_stop", 20), ("epoch_start", 20), ("eval_start", 42), ("epoch_stop", 50)], 22
    ),
    "evaluation inside one epoch and behind the next": (
        [("epoch_start", 0), ("eval_start", 15), ("eval_stop", 20), ("epoch_stop", 20), ("epoch_start", 20),
         ("epoch_stop", 50), ("eval_start", 50), ("eval_stop", 55)],
        30,
    ),
    # 40 s and 44 s of two epochs each
    "evaluation inside the blocks": (
        [("block_start", 0, {"epoch_count": 2}), ("eval_start", 50), ("eval_stop", 57), ("block_stop", 58),
         ("block_start", 60, {"epoch_count": 2}), ("eval_start", 100), ("eval_stop", 109), ("block_stop", 109),
         ("block_start", 110, {"epoch_count": 2}), ("eval_start", 154), ("block_stop", 160)],
        (20 + 22) / 2,
    ),
    "evaluation between the blocks": (
        [("block_start", 0, {"epoch_count": 4}), ("block_stop", 80), ("eval_start", 80), ("eval_stop", 90),
         ("block_start", 91, {"epoch_count": 4}), ("block_stop", 167), ("eval_start", 168), ("eval_stop", 170)],
        19,  # (167 - 91) / 4
    ),
    # the next epoch goes on while it is judged, so that nothing is taken off
    "evaluation beside the next epoch": (
        [("epoch_start", 0), ("epoch_stop", 20), ("eval_start", 20), ("epoch_start", 21), ("eval_stop", 30),
         ("epoch_stop", 41)],
        20,
    ),
    "several processes": (
        [("epoch_start", 0), ("epoch_start", 1), ("epoch_stop", 20), ("epoch_stop", 20.5), ("eval_start", 21),
         ("eval_start", 21.5), ("eval_stop", 25), ("eval_stop", 26), ("epoch_start", 27), ("epoch_start", 28),
         ("epoch_stop", 48), ("epoch_stop", 49)],
        20,
    ),
    # marks that hold 90 % of the time up to an evaluation do not wait for the accelerators; a little more, and they do
    "marks of nine tenths": ([("epoch_start", 0), ("epoch_stop", 18), ("eval_start", 20)], 20),
    "marks of more": ([("epoch_start", 0), ("epoch_stop", 18.1), ("eval_start", 20)], 18.1),
    "epochs with a number and a count of samples": (
        [("epoch_start", 0, {"epoch_num": 1, "samples_count": 0}), ("epoch_stop", 30)], 30
    ),
    "blocks that count epochs and samples": (
        [("block_start", 0, {"first_epoch_num": 1, "epoch_count": 2, "samples_count": 0}), ("block_stop", 40)], 20
    ),
    "blocks that count the 16,000 samples of their epochs": (
        [("block_start", 0, {"epoch_count": 32_000}), ("block_stop", 40)], 20
    ),
    # as RetinaNet of 4.1: the target is reached while the next epoch runs
    "an epoch that the end of the run breaks off": (
        [("epoch_start", 0), ("epoch_stop", 30), ("epoch_start", 30), ("epoch_stop", 50), ("eval_start", 50),
         ("epoch_start", 51), ("eval_stop", 55), ("run_stop", 55), ("epoch_stop", 55)],
        20,
    ),
    "a block that counts no epochs": ([("block_start", 0), ("block_stop", 30)], 30),
    "an end without a begin, and epochs without a duration": (
        [("epoch_stop", 5), ("epoch_start", 6), ("epoch_stop", 6), ("epoch_start", 7), ("epoch_stop", 37)], 30
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TIMED)
def test_an_epoch_is_what_its_training_took_wherever_the_evaluation_is(tmp_path: Path, case: str) -> None:
    marks, seconds = TIMED[case]
    assert read_mllog(_marked(tmp_path / "result_0.txt", *marks)).epoch_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("count", [0, "two", None])
def test_blocks_of_no_epochs_are_none(tmp_path: Path, count: object) -> None:
    path = _marked(tmp_path / "result_0.txt", ("block_start", 0, {"epoch_count": count}), ("block_stop", 9))
    with pytest.raises(FileFormatError, match="holds no whole epoch"):
        read_mllog(path)


@pytest.mark.parametrize("name", ["block", "epoch"])
def test_marks_that_count_samples_begin_no_whole_epoch(tmp_path: Path, name: str) -> None:
    """As of the language models of version 4.0 and later."""
    marks = (f"{name}_start", 0, {"samples_count": 3072}), (f"{name}_stop", 9)
    with pytest.raises(FileFormatError, match="holds no whole epoch"):
        read_mllog(_marked(tmp_path / "result_0.txt", *marks))


def test_lines_of_version_0_6_say_the_same_in_another_form(tmp_path: Path) -> None:
    """`:::MLL 1571444841.158 submission_benchmark: {"value": …, "metadata": …}`."""
    new, old = _log(tmp_path / "new.txt"), []
    for text in new.read_text().splitlines()[1:]:
        line = json.loads(text.removeprefix(":::MLLOG "))
        content = json.dumps({"value": line["value"], "metadata": line.get("metadata", {})})
        old.append(f"0: :::MLL {line['time_ms'] / 1e3:.3f} {line['key']}: {content}\n")
    (tmp_path / "old.txt").write_text("".join(old))
    assert read_mllog(tmp_path / "old.txt") == read_mllog(new)


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
    ],
)
def test_the_gpus_are_named_or_follow_from_the_mini_batches_or_from_the_nodes(
    tmp_path: Path, network: Network, changed: dict[str, Any], named: int | None, gpus: int, batch: int
) -> None:
    check = validate_mllog(_log(tmp_path / "log", **changed), cluster="dgx-a100", model=network, gpus=named)
    assert (check.gpus, check.batch) == (gpus, batch)


def test_nodes_that_only_evaluate_are_asked_about(tmp_path: Path, network: Network) -> None:
    """As in MLPerf's unet3d: 56 images on 7 of 9 nodes, 168 in 20 s."""
    changed = {"submission_benchmark": "unet3d", "submission_platform": "9xDGX", "train_samples": 168}
    log = _log(tmp_path / "log", global_batch_size=56, **changed)
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
        validate_mllog(_log(tmp_path / "log"), cluster="dgx-a100", model=network, gpus=0)


@pytest.mark.parametrize(("factor", "inside"), [(1.0, True), (100.0, False), (0.01, False)])
def test_the_interval_holds_a_step_that_takes_what_is_predicted(
    tmp_path: Path, network: Network, factor: float, inside: bool
) -> None:
    """An epoch of one step: its seconds are the step's, and its images per second the mini-batch over them."""
    path = _log(tmp_path / "log", train_samples=1600)
    predicted_s = validate_mllog(path, cluster="dgx-a100", model=network).predicted_step_seconds
    _marked(path, ("epoch_start", 0), ("epoch_stop", factor * predicted_s))
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
    ("changed", "said"),
    [
        ({"global_batch_size": 3200}, "global_batch_size is 1600 and 3200"),
        ({"submission_platform": "4xDGX"}, "submission_platform is '2xNVIDIA DGX A100' and '4xDGX'"),
        ({"train_samples": 32_000}, "train_samples is 16000 and 32000"),
        ({"opt_name": "lars"}, "opt_name is 'sgd' and 'lars'"),
    ],
)
def test_runs_of_different_settings_in_one_file_are_no_run(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    first, second = _log(tmp_path / "a").read_text(), _log(tmp_path / "b", **changed).read_text()
    (tmp_path / "both").write_text(first + second)
    with pytest.raises(FileFormatError, match=f"is of several runs: {said}"):
        read_mllog(tmp_path / "both")
    (tmp_path / "twice").write_text(first + first)  # as two processes log the same run
    assert read_mllog(tmp_path / "twice").epoch_seconds == 20.0
    (tmp_path / "null").write_text(first + ':::MLLOG {"key": "train_samples", "value": null, "time_ms": 9}\n')
    assert read_mllog(tmp_path / "null").train_samples == 16_000


@pytest.mark.parametrize(
    ("platform", "nodes"),
    [
        ("8xA100_80GB-methods", None),  # GPUs
        ("8xH100", None),
        ("2x NVIDIA A10", None),
        ("2xDSS8440x8A100-PCIE-40GB", 2),
        ("1xNVIDIA DGX A100", 1),
        ("8xSUBMISSION_PLATFORM_PLACEHOLDER", 8),
        ("4x", 4),
    ],
)
def test_a_number_of_gpus_is_none_of_nodes(tmp_path: Path, platform: str, nodes: int | None) -> None:
    assert read_mllog(_log(tmp_path / "log", submission_platform=platform)).num_nodes == nodes


@pytest.mark.parametrize(
    ("platform", "named"),
    [("1xNVIDIA DGX A100", None), ("XE8545x4A100-SXM-80GB", None), ("8xH100", "h100"), ("ND96amsr_H100_v5", "h100"),
     ("2xDSS8440x8A30", "a30"), ("1xA100 and H100", None), ("1xESC-A1001", None)],
)  # fmt: skip
def test_a_platform_that_names_other_gpus_than_the_clusters_is_noted(
    tmp_path: Path, network: Network, platform: str, named: str | None
) -> None:
    log = _log(tmp_path / "log", submission_platform=platform)
    notes = validate_mllog(log, cluster="dgx-a100", model=network, gpus=8).notes
    said = f"the log's platform, {platform.lower()}, names {named}; dgx-a100 has a100-sxm4-40gb"
    assert [note for note in notes if "platform" in note] == ([said] if named else [])


def test_passes_whose_gradients_add_up_do_not_tell_the_gpus(tmp_path: Path, network: Network) -> None:
    """50 images of a GPU are those of one of two passes, or of both: 16 GPUs or 32; the nodes tell."""
    path = _log(tmp_path / "log", d_batch_size=50, gradient_accumulation_steps=2)
    check = validate_mllog(path, cluster="dgx-a100", model=network)
    assert (check.gpus, check.batch) == (16, 100)
    assert any("gradients of 2 passes" in note for note in check.notes)
    check = validate_mllog(
        _log(path, d_batch_size=50, gradient_accumulation_steps=1), cluster="dgx-a100", model=network
    )
    assert check.gpus == 32
    assert not any("passes" in note for note in check.notes)


@pytest.mark.parametrize(
    ("changed", "samples"),
    [
        ({"train_samples": None}, 1_281_167),  # no log of version 0.6 says it
        ({"train_samples": None, "input_size": 1_280_000}, 1_280_000),
        ({"train_samples": 1600}, 1600),
    ],
)
def test_the_images_of_an_epoch_are_the_logs_or_the_benchmarks(
    tmp_path: Path, changed: dict[str, Any], samples: int
) -> None:
    assert read_mllog(_log(tmp_path / "log", **changed)).train_samples == samples


@pytest.mark.parametrize(
    ("benchmark", "logged", "batch", "samples", "said"),
    [  # as published files have it; RetinaNet trains on 1,170,301 images, Mask R-CNN on 117,266
        ("ssd", {"train_samples": 4572}, 256, 4572 * 256, "ssd: mini-batches of 256"),
        ("ssd", {"train_samples": 4571}, 256, 4571 * 256, "ssd: mini-batches of 256"),
        ("ssd", {"train_samples": 572}, 2048, 572 * 2048, "ssd: mini-batches of 2048"),
        ("ssd", {"train_samples": 4573}, 256, 4573, "ssd (117266 or 118287 or 1170301): the log's number"),
        ("ssd", {"train_samples": 117_266}, 1024, 117_266, None),
        ("maskrcnn", {"train_samples": 40_000}, 96, 117_266, "maskrcnn: 117266 images"),
        ("maskrcnn", {"train_samples": 118_287}, 96, 118_287, None),
        ("resnet", {"train_samples": 1_277_952}, 4096, 1_277_952, None),  # whole mini-batches
        ("resnet", {"train_samples": 16_000}, 1600, 16_000, "resnet (1281167): the log's number"),
        ("unet3d", {"train_samples": 168, "samples_per_epoch": 240}, 80, 240, None),  # filled up to 3 mini-batches
        ("retinanet", {"train_samples": 4572}, 256, 4572 * 256, "retinanet: mini-batches of 256"),  # since 5.0
        ("mine", {"train_samples": 4572}, 256, 4572, "MLPerf's mine has is not known here: its train_samples, 4572"),
        (None, {"train_samples": 4572}, 256, 4572, None),
    ],
)
def test_a_number_that_is_not_of_the_data_sets_images_is_noted(
    tmp_path: Path, benchmark: str | None, logged: dict[str, Any], batch: int, samples: int, said: str | None
) -> None:
    found = read_mllog(_log(tmp_path / "log", submission_benchmark=benchmark, global_batch_size=batch, **logged))
    assert found.train_samples == samples
    assert (found.note is None) if said is None else (said in str(found.note))


def test_images_of_one_gpu_are_those_of_all_over_their_number(tmp_path: Path, network: Network) -> None:
    """160,000 × 8 are ImageNet's within 1 %: 64,000 images/s; 16,000 × 8 are nobody's."""
    for samples, of_all in ((160_000, 1_280_000), (16_000, 16_000)):
        path = _log(tmp_path / "log", train_samples=samples)
        check = validate_mllog(path, cluster="dgx-a100", model=network, gpus=8)
        assert check.measured_images_per_second == of_all / 20
        assert any(f"train_samples, {samples}, " in note for note in check.notes)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train_samples": 1599}, "an epoch of 1599 samples is less than one mini-batch of 1600"),
        ({"train_samples": None, "submission_benchmark": "ssd"}, "train_samples is None"),
        ({"train_samples": None, "input_size": "many"}, "input_size is 'many'"),
        ({"global_batch_size": 0}, "global_batch_size is 0, expected a positive number"),
        ({"global_batch_size": True}, "global_batch_size is True"),
    ],
)
def test_an_epoch_of_no_known_number_of_images_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(FileFormatError, match=said):
        read_mllog(_log(tmp_path / "log", **changed))


@pytest.mark.parametrize("metadata", ['""', "null", "{}"])
def test_lines_that_say_nothing_more_are_not_torn(tmp_path: Path, metadata: str) -> None:
    """As programs that measure power add them to a finished file."""
    path = _log(tmp_path / "log")
    head = ':::MLLOG {"namespace": "", "time_ms": 1, "event_type": "INTERVAL_START", "key": "power_measurement_start", '
    path.write_text(f'{head}"value": null, "metadata": {metadata}}}\n{path.read_text()}')
    assert read_mllog(path).epoch_seconds == 20.0


def test_a_packed_file_is_read(tmp_path: Path) -> None:
    path = _log(tmp_path / "result_0.txt")
    packed = tmp_path / "result_0.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_mllog(packed) == read_mllog(path)


@pytest.fixture
def network() -> Network:
    return residual_network()
