"""What an MLPerf log measured: lines of the published form with numbers made up for hand arithmetic."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ptsim.errors import FileFormatError
from ptsim.measure.mllog import read_mllog
from tests.measure.mllogs import marked, mllog


def test_an_epoch_is_the_median_after_the_first_and_without_evaluation(tmp_path: Path) -> None:
    found = read_mllog(mllog(tmp_path / "result_0.txt"))
    assert (found.epoch_seconds, found.num_epochs, found.num_nodes) == (20.0, 2, 2)
    assert found.images_per_second == 800.0
    assert found.step_seconds == 2.0


def test_epochs_whose_marks_do_not_wait_for_the_accelerators_are_timed_up_to_the_evaluation(tmp_path: Path) -> None:
    """Launched in 1 s each, computed after 40 s: two stretches of two epochs, with 7 s of evaluation behind each."""
    path = mllog(tmp_path / "result_0.txt")
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


def test_a_block_is_shared_out_over_its_epochs(tmp_path: Path) -> None:
    assert read_mllog(mllog(tmp_path / "result_0.txt", blocks=True)).epoch_seconds == 10.0


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
    # as UNet3D of 1.0 on many nodes: 20 s with and without; the same within the epochs is none beside them
    "evaluation beside the blocks": (
        [("block_start", 0), ("block_stop", 40), ("block_start", 40), ("block_stop", 60), ("block_start", 60),
         ("eval_start", 61), ("eval_stop", 77), ("block_stop", 81), ("block_start", 81), ("eval_start", 82),
         ("eval_stop", 98), ("block_stop", 100)],
        20,  # of 20, 21 and 19
    ),
    "evaluation in every block but the slow first": (
        [("block_start", 0), ("block_stop", 40), ("block_start", 40), ("eval_start", 60), ("eval_stop", 80),
         ("block_stop", 80)], 20
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
    assert read_mllog(marked(tmp_path / "result_0.txt", *marks)).epoch_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("count", [0, "two", None])
def test_blocks_of_no_epochs_are_none(tmp_path: Path, count: object) -> None:
    path = marked(tmp_path / "result_0.txt", ("block_start", 0, {"epoch_count": count}), ("block_stop", 9))
    with pytest.raises(FileFormatError, match="holds no whole epoch"):
        read_mllog(path)


@pytest.mark.parametrize("name", ["block", "epoch"])
def test_marks_that_count_samples_begin_no_whole_epoch(tmp_path: Path, name: str) -> None:
    """As of the language models of version 4.0 and later."""
    marks = (f"{name}_start", 0, {"samples_count": 3072}), (f"{name}_stop", 9)
    with pytest.raises(FileFormatError, match="holds no whole epoch"):
        read_mllog(marked(tmp_path / "result_0.txt", *marks))


def test_lines_of_version_0_6_say_the_same_in_another_form(tmp_path: Path) -> None:
    """`:::MLL 1571444841.158 submission_benchmark: {"value": …, "metadata": …}`."""
    new, old = mllog(tmp_path / "new.txt"), []
    for text in new.read_text().splitlines()[1:]:
        line = json.loads(text.removeprefix(":::MLLOG "))
        content = json.dumps({"value": line["value"], "metadata": line.get("metadata", {})})
        old.append(f"0: :::MLL {line['time_ms'] / 1e3:.3f} {line['key']}: {content}\n")
    (tmp_path / "old.txt").write_text("".join(old))
    assert read_mllog(tmp_path / "old.txt") == read_mllog(new)


def test_a_log_that_docker_keeps_as_json_is_read(tmp_path: Path) -> None:
    lines = mllog(tmp_path / "log").read_text().splitlines(keepends=True)
    kept = tmp_path / "kept.log"
    kept.write_text("\n".join(json.dumps({"log": line, "stream": "stdout"}) for line in lines))
    assert read_mllog(kept) == read_mllog(tmp_path / "log")


@pytest.mark.parametrize(
    "benchmark",
    ["bert", "GNMT", "transformer", "rnnt", "dlrm", "dlrm_dcnv2", "minigo", "gpt3", "llama2_70b_lora", "llama31_405b",
     "gnn", "rgat", "stable_diffusion", "flux1", "deepseekv3_671b", "gpt_oss_20b"],
)  # fmt: skip
def test_a_log_of_language_or_ratings_is_no_cnns_whatever_else_it_lacks(tmp_path: Path, benchmark: str) -> None:
    """Sequences, ratings and games are counted as samples, too."""
    log = mllog(tmp_path / "log", submission_benchmark=benchmark, global_batch_size=None, train_samples=None)
    with pytest.raises(FileFormatError, match=f"is of the benchmark {benchmark.lower()}, whose samples are not"):
        read_mllog(log)


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
    first, second = mllog(tmp_path / "a").read_text(), mllog(tmp_path / "b", **changed).read_text()
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
    assert read_mllog(mllog(tmp_path / "log", submission_platform=platform)).num_nodes == nodes


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
    assert read_mllog(mllog(tmp_path / "log", **changed)).train_samples == samples


@pytest.mark.parametrize(
    ("benchmark", "logged", "batch", "samples", "said"),
    [  # as published files have it; RetinaNet trains on 1,170,301 images, Mask R-CNN on 117,266
        ("ssd", {"train_samples": 4572}, 256, 4572 * 256, "ssd: mini-batches of 256"),
        ("ssd", {"train_samples": 4571}, 256, 4571 * 256, "ssd: mini-batches of 256"),
        ("ssd", {"train_samples": 572}, 2048, 572 * 2048, "ssd: mini-batches of 2048"),
        ("ssd", {"train_samples": 576}, 2048, 576 * 2048, "ssd: mini-batches of 2048"),  # 0.8 % more, as on 2,048 GPUs
        ("ssd", {"train_samples": 4617}, 256, 4617 * 256, "ssd: mini-batches of 256"),  # 0.996 % more
        ("ssd", {"train_samples": 4618}, 256, 4618, "ssd (117266 or 118287 or 1170301): the log's number"),
        ("ssd", {"train_samples": 117_266}, 1024, 117_266, None),
        ("maskrcnn", {"train_samples": 40_000}, 96, 117_266, "maskrcnn: 117266 images"),
        ("maskrcnn", {"train_samples": 118_287}, 96, 118_287, None),
        ("resnet", {"train_samples": 1_277_952}, 4096, 1_277_952, None),  # whole mini-batches
        ("resnet", {"train_samples": 16_000}, 1600, 16_000, "resnet (1281167): the log's number"),
        ("unet3d", {"train_samples": 168, "samples_per_epoch": 240}, 80, 240, None),  # filled up to 3 mini-batches
        ("retinanet", {"train_samples": 4572}, 256, 4572 * 256, "retinanet: mini-batches of 256"),  # since 5.0
        ("mine", {"train_samples": 4572}, 256, 4572, "MLPerf's mine has is not known here: its train_samples, 4572"),
        (
            None,
            {"train_samples": 4572},
            256,
            4572,
            "does not name the benchmark: its train_samples, 4572, is taken for",
        ),
    ],
)
def test_a_number_that_is_not_of_the_data_sets_images_is_noted(
    tmp_path: Path, benchmark: str | None, logged: dict[str, Any], batch: int, samples: int, said: str | None
) -> None:
    found = read_mllog(mllog(tmp_path / "log", submission_benchmark=benchmark, global_batch_size=batch, **logged))
    assert found.train_samples == samples
    assert (found.note is None) if said is None else (said in str(found.note))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train_samples": 1599}, "an epoch of 1599 samples is less than one mini-batch of 1600"),
        ({"train_samples": None, "submission_benchmark": "ssd"}, "says nothing of train_samples, expected a"),
        ({"train_samples": None, "input_size": "many"}, "input_size is 'many'"),
        ({"global_batch_size": 0}, "global_batch_size is 0, expected a positive number"),
        ({"global_batch_size": True}, "global_batch_size is True"),
    ],
)
def test_an_epoch_of_no_known_number_of_images_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(FileFormatError, match=said):
        read_mllog(mllog(tmp_path / "log", **changed))


@pytest.mark.parametrize("metadata", ['""', "null", "{}"])
def test_lines_that_say_nothing_more_are_not_torn(tmp_path: Path, metadata: str) -> None:
    """As programs that measure power add them to a finished file."""
    path = mllog(tmp_path / "log")
    head = ':::MLLOG {"namespace": "", "time_ms": 1, "event_type": "INTERVAL_START", "key": "power_measurement_start", '
    path.write_text(f'{head}"value": null, "metadata": {metadata}}}\n{path.read_text()}')
    assert read_mllog(path).epoch_seconds == 20.0


def test_a_packed_file_is_read(tmp_path: Path) -> None:
    path = mllog(tmp_path / "result_0.txt")
    packed = tmp_path / "result_0.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_mllog(packed) == read_mllog(path)


@pytest.mark.parametrize(
    ("marks", "seconds", "count"),
    [
        (  # the form of RetinaNet's logs of MLPerf 2.0: the result comes while the next epoch trains
            [("epoch_start", 0), ("epoch_stop", 30), ("eval_start", 30), ("epoch_start", 33), ("eval_stop", 35),
             ("epoch_stop", 53), ("eval_start", 53), ("epoch_start", 56), ("eval_stop", 58), ("epoch_stop", 60),
             ("run_stop", 60)],
            20, 1,
        ),
        (  # the same without a stretch of the evaluation in the epoch
            [("epoch_start", 0), ("epoch_stop", 30), ("epoch_start", 30), ("epoch_stop", 50), ("eval_start", 50),
             ("eval_stop", 52), ("epoch_start", 52), ("epoch_stop", 65), ("run_stop", 65)],
            20, 1,
        ),
        (  # evaluation follows, so it is whole, however fast
            [("epoch_start", 0), ("epoch_stop", 30), ("epoch_start", 30), ("epoch_stop", 50), ("epoch_start", 50),
             ("epoch_stop", 60), ("eval_start", 60), ("eval_stop", 62), ("run_stop", 62)],
            15, 2,
        ),
        (  # nothing follows, and it took as long
            [("epoch_start", 0), ("epoch_stop", 30), ("epoch_start", 30), ("epoch_stop", 50), ("epoch_start", 50),
             ("epoch_stop", 66), ("run_stop", 66)],
            18, 2,
        ),
    ],
)  # fmt: skip
def test_an_epoch_that_reaching_the_target_broke_off_is_none(
    tmp_path: Path, marks: list[Any], seconds: float, count: int
) -> None:
    found = read_mllog(marked(tmp_path / "log", *marks))
    assert (found.epoch_seconds, found.num_epochs) == (pytest.approx(seconds), count)


def test_evaluation_that_is_marked_from_the_begin_of_a_block_tells_no_training(tmp_path: Path) -> None:
    """As the logs of `ssd` on TPUs in version 0.6: what is left of a block are milliseconds."""
    marks = [("block_start", 0, {"epoch_count": 5}), ("eval_start", 0.002), ("eval_stop", 29), ("block_stop", 29)]
    with pytest.raises(FileFormatError, match="no whole epoch whose training its marks tell from evaluation"):
        read_mllog(marked(tmp_path / "log", *marks))


def test_the_oldest_form_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(":::MLPv0.5.0 resnet 1543785258.927 (train.py:12) train_epoch: 0\n")
    with pytest.raises(FileFormatError, match=r"is of MLPerf 0\.5, whose lines mark no end of an epoch; expected 0\.6"):
        read_mllog(tmp_path / "log")


@pytest.mark.parametrize(("benchmark", "images"), [("ssd", 117_266), ("maskrcnn", 117_266)])
def test_version_0_6_has_the_images_of_coco(tmp_path: Path, benchmark: str, images: int) -> None:
    """Its logs do not say how many; those of later versions do, and other ones."""
    text = mllog(tmp_path / "new", submission_benchmark=benchmark, train_samples=None).read_text()
    old = []
    for line in map(json.loads, text.replace(":::MLLOG ", "").splitlines()[1:]):
        content = json.dumps({"value": line["value"], "metadata": line.get("metadata", {})})
        old.append(f":::MLL {line['time_ms'] / 1e3:.3f} {line['key']}: {content}\n")
    (tmp_path / "old").write_text("".join(old))
    found = read_mllog(tmp_path / "old")
    assert (found.train_samples, found.epoch_seconds) == (images, 20.0)
    assert "does not say of how many images: 117266 are taken" in str(found.note)
