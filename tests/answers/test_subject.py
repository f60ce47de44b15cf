"""A MODEL or TRACE argument means the same everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from torch import nn

import ptsim
from analysis.public_rows import networks
from ptsim.answers.subject import find_subject, find_trace
from ptsim.errors import FileFormatError, UnknownNameError, UsageError
from ptsim.network import Network, Precision
from tests.traces import residual_network, shrinking_trace

MODEL_FILE = """
from torch import nn

def net(num_classes=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
"""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    shrinking_trace(tmp_path / "run" / "trace.jsonl")
    return tmp_path / "run"


def test_a_trace_is_known_by_its_file_its_folder_and_whatever_its_name(run_folder: Path) -> None:
    shutil.copy(run_folder / "trace.jsonl", run_folder / "without_suffix")
    trace = ptsim.read_trace(run_folder)
    for given in (run_folder, str(run_folder), run_folder / "trace.jsonl", str(run_folder / "without_suffix"), trace):
        subject = find_subject(given)
        assert subject.trace is not None
        assert subject.network == trace.final_network
        assert find_trace(given).epochs == trace.epochs


@pytest.mark.slow
def test_models_are_known_by_name_by_file_and_alive(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(MODEL_FILE)
    by_file = find_subject(f"{tmp_path}/m.py:net", input_shape=(3, 2, 2), num_classes=2)
    assert by_file.network.num_parameters == 12 * 2 + 2
    by_path = find_subject(Path(f"{tmp_path}/m.py:net"), input_shape=(3, 2, 2), num_classes=2)
    assert by_path.network == by_file.network
    alive = find_subject(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), input_shape=(3, 2, 2))
    assert alive.network.num_parameters == by_file.network.num_parameters
    assert find_subject("resnet20").network.num_parameters == 272_474
    network = residual_network()
    assert find_subject(network).network is network


def test_a_file_with_a_models_name_is_a_trace_and_a_folder_without_a_run_is_no_model(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_folder)
    (run_folder / "empty").mkdir()
    with pytest.raises(FileFormatError, match="no trace here"):
        find_subject("empty")
    with pytest.raises(UnknownNameError, match="unknown model 'resnet21'"):
        find_subject("resnet21")
    with pytest.raises(FileFormatError):
        find_subject(Path("resnet20"))


def test_predict_and_cost_mean_the_same_network_and_setting(run_folder: Path) -> None:
    cost, predicted = ptsim.cost(run_folder), ptsim.predict(run_folder, gpu="a100")
    assert cost.batch == predicted.batch == ptsim.read_trace(run_folder).epochs[-1].batch_per_gpu
    assert (cost.precision, cost.memory_format) == (predicted.precision, predicted.memory_format)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    live = ptsim.predict(module, input_shape=(3, 16, 16), num_classes=4, gpu="a100", batch=8)
    assert (
        live.peak_memory_bytes
        == ptsim.cost(module, input_shape=(3, 16, 16), num_classes=4, gpu="a100", batch=8).peak_memory_bytes
    )


def test_amp_is_fp16_in_every_call_that_takes_a_precision(run_folder: Path) -> None:
    network = residual_network()
    assert ptsim.cost(network, precision="amp").precision is Precision.FP16
    assert ptsim.predict(network, precision="amp", gpu="a100", batch=8).precision is Precision.FP16
    by_name = (ptsim.simulate(run_folder, "dgx-a100", precision=name).drop(columns="notes") for name in ("amp", "fp16"))
    assert next(by_name).equals(next(by_name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 3.5}, "batch is 3.5, expected a positive whole number"),
        ({"batch": True}, "batch is True"),
        ({"batch": -4}, "-4"),
        ({"memory_format": "nhwc"}, "memory_format is 'nhwc', expected one of contiguous, channels_last"),
        ({"input_shape": (3, 32)}, r"input_shape is \(3, 32\)"),
        ({"input_shape": (3, -32, 32)}, "input_shape is -32"),
        ({"num_classes": 2.0}, "classes is 2.0"),
    ],
)
def test_python_callers_hear_of_wrong_counts_too(arguments: dict[str, object], message: str) -> None:
    subject: Network | str = "resnet20" if {"input_shape", "num_classes"} & arguments.keys() else residual_network()
    with pytest.raises(UsageError, match=message):
        ptsim.cost(subject, **arguments)
    with pytest.raises(UsageError, match=message):
        ptsim.predict(subject, gpu="a100", **{"batch": 8, **arguments})


@pytest.mark.parametrize("gpus", [0, -1, 2.5])
def test_a_wrong_number_of_gpus_is_named(gpus: object) -> None:
    network: Network = residual_network()
    with pytest.raises(UsageError, match=r"GPUs; at least 1|gpus is 2\.5"):
        ptsim.cost(network, gpus=gpus)
    with pytest.raises(UsageError, match=r"GPUs; at least 1|gpus is 2\.5"):
        ptsim.predict(network, cluster="dgx-a100", gpus=gpus, batch=8)


def test_cost_and_predict_count_the_same_buckets() -> None:
    network = residual_network()
    alone = ptsim.cost(network, batch=8, gpu="a100-sxm4-40gb")
    eight = ptsim.cost(network, batch=8, gpu="a100-sxm4-40gb", gpus=8)
    assert alone.peak_memory_bytes < eight.peak_memory_bytes
    assert eight.peak_memory_bytes == ptsim.predict(network, batch=8, cluster="dgx-a100", gpus=8).peak_memory_bytes
    assert eight.largest_batch is not None
    assert alone.largest_batch is not None
    assert eight.largest_batch <= alone.largest_batch


@pytest.mark.slow
def test_what_ran_on_eight_gpus_is_said_to_fit_by_cost_and_by_predict() -> None:
    """RegNetY-16GF with 64 images a GPU: torchvision's references, whose models were trained on 8 V100s."""
    network = networks()["torchvision:regnet_y_16gf@224"]
    cost = ptsim.cost(network, batch=64, gpu="v100-sxm2-16gb", gpus=8)
    predicted = ptsim.predict(network, batch=64, gpu="v100-sxm2-16gb", cluster="dgx-a100", gpus=8)
    assert cost.fits
    assert predicted.fits
    assert cost.peak_memory_bytes == predicted.peak_memory_bytes
    assert cost.largest_batch is not None
    over = cost.largest_batch + 1
    assert not ptsim.cost(network, batch=over, gpu="v100-sxm2-16gb", gpus=8).fits
    assert not ptsim.predict(network, batch=over, gpu="v100-sxm2-16gb", cluster="dgx-a100", gpus=8).fits


def test_a_run_that_accumulated_gradients_is_asked_about_as_it_ran(run_folder: Path) -> None:
    trace = ptsim.read_trace(run_folder)
    epochs = tuple(msgspec.structs.replace(epoch, passes=4) for epoch in trace.epochs)
    accumulated = msgspec.structs.replace(trace, epochs=epochs)
    subject = find_subject(accumulated)
    assert subject.setting().pass_batch == trace.epochs[-1].batch_per_gpu // 4
    assert subject.setting(batch=32).pass_batch == 32
    assert ptsim.cost(accumulated).peak_memory_bytes < ptsim.cost(trace).peak_memory_bytes


def test_what_is_not_asked_for_is_as_the_last_epoch_was_or_as_usual(tmp_path: Path) -> None:
    trace = ptsim.read_trace(shrinking_trace(tmp_path / "t.jsonl", world_size=4, precision=Precision.BF16))
    recorded = find_subject(trace).setting()
    assert (recorded.batch, recorded.num_gpus, recorded.precision) == (128, 4, Precision.BF16)  # 64 and twice 32 more
    assert (recorded.optimizer, recorded.momentum, recorded.regularizer) == ("sgd", 0.9, None)
    other = find_subject(trace).setting(batch=8, num_gpus=1, precision="fp32", optimizer="adam", default_batch=32)
    assert (other.batch, other.num_gpus, other.precision) == (8, 1, Precision.FP32)
    assert (other.optimizer, other.momentum) == ("adam", None)  # the momentum was SGD's
    assert find_subject(trace).setting(optimizer="sgd").momentum == 0.9
    begun = find_subject(msgspec.structs.replace(trace, epochs=()))
    assert begun.setting(default_batch=32) == msgspec.structs.replace(recorded, batch=32)
    for subject in (begun, find_subject(residual_network())):
        with pytest.raises(UsageError, match="no mini-batch was given"):
            subject.setting()
    usual = find_subject(residual_network()).setting(default_batch=32)
    assert (usual.batch, usual.num_gpus, usual.optimizer, usual.momentum) == (32, 1, "sgd", None)


def test_a_models_file_without_its_function_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text('"""A network."""\n')
    with pytest.raises(UsageError, match=r"a model's file without its function; expected .*net\.py:function"):
        find_subject(str(tmp_path / "net.py"))
