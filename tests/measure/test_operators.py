import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from ptsim.hardware.profile import Operator, OperatorSetting
from ptsim.measure import operators
from ptsim.measure.operators import copy_bandwidth_bytes_per_s, launch_overhead_s, time_operator
from ptsim.network import LayerKind, Precision
from tests.measure.casts import Casts

CPU = torch.device("cpu")
FP32 = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")


def conv(channels, **changes):
    options = {
        "kind": LayerKind.CONV,
        "op": "conv2d",
        "setting": FP32,
        "batch": 8,
        "inputs": ((channels, 16, 16),),
        "output": (channels, 16, 16),
        "kernel": (3, 3),
        "padding": (1, 1),
    }
    return Operator(**(options | changes))


def test_every_pass_of_a_convolution_is_timed_by_itself():
    time = time_operator(conv(32), CPU)
    assert min(time.forward_s, time.backward_s, time.weight_gradient_s, time.input_gradient_s) > 0
    assert time.host_s is None
    assert time.context == "alone"


def test_the_first_layer_has_no_input_gradient():
    time = time_operator(conv(3, input_needs_gradient=False), CPU)
    assert time.input_gradient_s is None
    assert time.weight_gradient_s > 0


def test_sixty_four_times_the_products_take_longer():
    assert time_operator(conv(128), CPU).forward_s > time_operator(conv(16), CPU).forward_s


def test_an_operator_without_parameters_has_one_backward_time_and_in_place_ones_run_on_copies():
    relu = Operator(
        kind=LayerKind.ACTIVATION,
        op="relu",
        setting=FP32,
        batch=4,
        inputs=((8, 16, 16),),
        output=(8, 16, 16),
        inplace=True,
    )
    time = time_operator(relu, CPU)
    assert time.backward_s > 0
    assert time.weight_gradient_s is None


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_sixteen_bit_operators_run_in_either_layout(memory_format):
    setting = OperatorSetting(precision=Precision.BF16, memory_format=memory_format)
    assert time_operator(conv(16, setting=setting), CPU).backward_s > 0


def test_timing_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    time_operator(conv(4), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_machine_copies_and_launches():
    assert 1e8 < copy_bandwidth_bytes_per_s(CPU) < 1e13
    assert 1e-8 < launch_overhead_s(CPU) < 1e-2


class Ticks:
    """A clock of which every second reading is later by what `took` says of its number; the others are not."""

    def __init__(self, monkeypatch, took):
        self.took, self.calls, self.now = took, 0, 0.0
        monkeypatch.setattr(operators, "time", SimpleNamespace(perf_counter=self.read))

    def read(self):
        self.calls += 1
        if self.calls % 2 == 0:
            self.now += self.took(self.calls // 2 - 1)
        return self.now


def test_a_pass_takes_the_median_of_seven_rounds_after_the_first(monkeypatch):
    """Round n takes n, 10 n, 100 n and 1,000 n seconds forward, backward, for the weights and for the input."""
    Ticks(monkeypatch, lambda number: number // 4 * 10 ** (number % 4))
    time = time_operator(conv(4), CPU)
    assert (time.forward_s, time.backward_s, time.weight_gradient_s, time.input_gradient_s) == (4, 40, 400, 4000)


def test_a_copy_reads_and_writes_and_an_addition_is_one_of_a_thousand(monkeypatch):
    """The median of 1 to 9 seconds."""
    Ticks(monkeypatch, lambda number: number + 1)
    assert copy_bandwidth_bytes_per_s(CPU) == 2 * 64 * 2**20 / 5
    Ticks(monkeypatch, lambda number: number + 1)
    assert launch_overhead_s(CPU) == 5 / 1000


def test_a_gpu_is_measured_by_its_own_clock(monkeypatch):
    """Run n takes n seconds of the GPU. Three are over when 0.3 s of the host have woken it, and one more warms up."""
    gpu = SimpleNamespace(runs=0, seconds=0.0)

    class Event:
        def record(self, _stream):
            self.at = gpu.seconds

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    def run():
        gpu.seconds += gpu.runs
        gpu.runs += 1

    tenths = itertools.count()
    monkeypatch.setattr(operators, "cuda_event", Event)
    monkeypatch.setattr(operators, "time", SimpleNamespace(perf_counter=lambda: next(tenths) / 10))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    assert operators._median_seconds(run, torch.device("cuda")) == 8  # of 4 to 12
    assert gpu.runs == 13


@pytest.mark.parametrize(("precision", "casts"), [(Precision.BF16, 8), (Precision.FP32, 0)])
def test_every_round_casts_the_weights_as_a_training_step_does(precision, casts):
    """The first of the eight rounds is not counted; one forward before them sees what the output is like."""
    setting = OperatorSetting(precision=precision, memory_format="contiguous")
    with Casts((5, 4, 3, 3)) as seen:
        time_operator(conv(4, output=(5, 16, 16), setting=setting), CPU)
    assert seen.number == (casts + 1 if casts else 0)


def test_a_pass_that_cannot_be_captured_is_timed_with_its_gaps_on_the_usual_stream(monkeypatch):
    """Ten calls of two seconds each in every one of five spans, whatever stream a failed capture has left.

    Random numbers that it has left as captured begin anew.
    """
    gpu = SimpleNamespace(seconds=0.0, stream="usual", seen=[], random="usual")

    class Event:
        def record(self, stream):
            gpu.seen.append(stream.name)
            self.at = gpu.seconds

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Capture:
        def __init__(self, _graph):
            pass

        def __enter__(self):
            gpu.stream = gpu.random = "capture"

        def __exit__(self, *_):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    class Generator:
        def __init__(self, device):
            assert device == torch.device("cuda")

        def manual_seed(self, seed):
            self.seed = seed
            return self

        def initial_seed(self):
            return 7

        def graphsafe_set_state(self, other):
            gpu.random = f"begins with {other.seed}"

    def stream(name=None):
        return SimpleNamespace(name=name or gpu.stream, wait_stream=lambda _: None)

    def call():
        gpu.seconds += 2.0

    monkeypatch.setattr(operators, "cuda_event", Event)
    monkeypatch.setattr(operators, "_side_stream", lambda _: stream("side"))
    monkeypatch.setattr(torch, "Generator", Generator)
    for name, stand_in in {
        "current_stream": lambda _: stream(),
        "set_stream": lambda to: setattr(gpu, "stream", to.name),
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda _: None,
        "CUDAGraph": lambda: None,
        "graph": Capture,
        "current_device": lambda: 0,
        "default_generators": (Generator(torch.device("cuda")),),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert operators._kernel_seconds(call, torch.device("cuda")) == 2.0
    assert gpu.seen == ["usual"] * 10
    assert gpu.random == "begins with 7"
