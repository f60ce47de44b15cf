"""NVML through the real pynvml binding, against a stand-in library that answers like the driver."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from ptsim.measure import nvml
from ptsim.measure.nvml import NullMeter, open_meter

GPU = "GPU-01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler, so no stand-in for the NVIDIA driver")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parent / "nvml_stand_in.c"
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return folder


def run_with(driver, code, lacks="", odd=""):
    """The JSON that `code` prints in a fresh process that finds the stand-in as the driver's library."""
    program = (
        "import json, msgspec, time, pynvml\nfrom ptsim.measure.nvml import NvmlMeter\n"
        "def show(x): print(json.dumps(msgspec.to_builtins(x)))\n" + code
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "PTSIM_STAND_IN_LACKS": lacks}
    environment["PTSIM_STAND_IN_ODD"] = odd
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MEASURE = "m = NvmlMeter(index=0, interval_s=0.005)\nm.start()\ntime.sleep(0.2)\nshow(m.stop())\nm.close()"


def test_the_driver_names_the_gpu_its_memory_clocks_and_limit(driver):
    info = run_with(driver, f"show(NvmlMeter(uuid={GPU!r}).info())")
    assert info == {
        "name": "NVIDIA Stand-In 9000",
        "kind": "cuda",
        "memory_bytes": 16 * 2**30,
        "num_threads": None,
        "max_sm_clock_hz": 1.98e9,
        "max_memory_clock_hz": 6e9,
        "power_limit_w": 350.0,
        "driver": "535.104.05",
    }


def test_energy_is_what_the_board_counted_and_power_the_mean_of_the_samples(driver):
    use = run_with(driver, MEASURE)
    assert use["energy_j"] == pytest.approx(5.0)  # the counter grows 5 J between its two readings
    assert 150 < use["power_w"] < 250  # 100, 200, 300, 200 W in turn: 200 W in the mean of whole rounds
    assert use["sm_clock_hz"] == pytest.approx(1.41e9)
    assert use["memory_clock_hz"] == pytest.approx(5e9)
    assert use["temperature_c"] == 61
    assert use["utilization"] == pytest.approx(0.8)
    assert use["peak_memory_bytes"] == 2 * 2**30  # version 2: without what the driver reserves


def test_without_an_energy_counter_power_is_integrated_over_time(driver):
    use = run_with(driver, MEASURE, lacks="energy")
    assert use["energy_j"] >= 0.2 * 100  # at least 0.2 s at no less than 100 W
    assert use["power_w"] > 100


def test_what_a_slice_does_not_tell_is_none_and_not_zero(driver):
    use = run_with(driver, MEASURE, lacks="energy,power")
    assert use["energy_j"] is None
    assert use["power_w"] is None
    assert use["temperature_c"] == 61


def test_an_older_driver_answers_with_version_1_of_the_memory_record(driver):
    assert run_with(driver, MEASURE, lacks="memory_v2")["peak_memory_bytes"] == 3 * 2**30


def test_power_is_that_of_the_moment_where_the_driver_tells_it(driver):
    use = run_with(driver, MEASURE, odd="moment", lacks="energy")
    assert use["power_w"] == pytest.approx(250.0)
    assert use["energy_j"] >= 0.2 * 249


def test_a_moment_of_zero_watts_is_no_reading(driver):
    assert 150 < run_with(driver, MEASURE, odd="zero")["power_w"] < 250  # the mean of whole rounds of the usual one


def test_an_unknown_gpu_is_an_error_of_the_binding(driver):
    code = "try: NvmlMeter(uuid='GPU-x')\nexcept pynvml.NVMLError_NotFound as e: show(str(e))"
    assert run_with(driver, code) == "Not Found"


def test_a_reading_that_no_board_can_draw_counts_as_missing(driver):
    use = run_with(driver, MEASURE, odd="power", lacks="energy")
    assert 150 < use["power_w"] < 250  # 100, –, 300, 200 W in turn, not the megawatt between
    assert 10 < use["energy_j"] < 350


def test_an_energy_counter_that_jumps_is_replaced_by_the_integral_of_the_power(driver):
    use = run_with(driver, MEASURE, odd="energy")
    assert 10 < use["energy_j"] < 350  # 0.2 s of 100 to 300 W, not four gigajoules


# What torch says of a board; the driver's own order and names are not torch's.
TORCH = """
import types, torch, warnings
from ptsim.measure import nvml
def torch_sees(uuid, name="NVIDIA Stand-In 9000", boards=1):
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: boards
    torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(uuid=uuid, name=name, total_memory=2**34)
"""


# What the driver tells oddly, the UUID and the name that CUDA knows; one process for all, because importing torch takes
# seconds.
HIDDEN, KNOWN = "99999999-0000-0000-0000-000000000000", GPU.removeprefix("GPU-")
BOARDS = {
    "among two": ("two", KNOWN, "NVIDIA Stand-In 9000"),
    "slice": ("mig", KNOWN, "NVIDIA Stand-In 9000"),
    "hidden": ("", HIDDEN, "NVIDIA Stand-In 9000"),
    "hidden among two": ("two", HIDDEN, "NVIDIA Stand-In 9000"),
    "hidden slice": ("", HIDDEN, "NVIDIA Stand-In 9000 MIG 1g.5gb"),
}


@pytest.fixture(scope="module")
def boards(driver):
    code = f"""
import os
found = {{}}
for case, (odd, uuid, name) in {BOARDS!r}.items():
    os.environ["PTSIM_STAND_IN_ODD"] = odd
    torch_sees(uuid, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        meter = nvml.open_meter("cuda")
    info = meter.info()
    found[case] = [type(meter).__name__, info.name, info.power_limit_w, [str(c.message) for c in caught]]
show(found)
"""
    return run_with(driver, TORCH + code)


@pytest.mark.parametrize("case", ["among two", "slice", "hidden"])
def test_a_board_is_found_by_cudas_uuid_or_by_being_the_only_one_of_its_name(boards, case):
    assert boards[case] == ["NvmlMeter", "NVIDIA Stand-In 9000", 350.0, []]


@pytest.mark.parametrize("case", ["hidden among two", "hidden slice"])
def test_a_board_that_may_be_another_one_is_not_read(boards, case):
    kind, name, limit_w, said = boards[case]
    assert (kind, name, limit_w) == ("NullMeter", BOARDS[case][2], None)
    assert said[0].startswith("no power or energy is recorded: NVML cannot read")


def test_stop_without_start_measured_nothing(driver):
    assert run_with(driver, "show(NvmlMeter(index=0).stop())") is None


def test_a_cpu_says_what_it_is_and_measures_nothing():
    meter = open_meter(torch.device("cpu"))
    assert isinstance(meter, NullMeter)
    info = meter.info()
    assert info.kind == "cpu"
    assert info.name
    assert info.memory_bytes > 2**28
    assert info.num_threads == torch.get_num_threads()
    meter.start()
    assert meter.stop() is None


def moment(milliwatts, code=0):
    """What a driver answers about one field, with its return code."""
    return [SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(uiVal=milliwatts))]


class Board:
    """A GPU that answers `start` and `stop`, ten seconds later, with the first and the second of its numbers.

    What is None it does not tell.
    """

    def __init__(
        self,
        monkeypatch,
        *,
        energy_mj=(None, None),
        power_mw=(100_000, 300_000),
        limit_mw=350_000,
        moments=(None, None),
    ):
        seconds = iter((50.0, 60.0))
        monkeypatch.setattr(nvml, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
        memory = iter((SimpleNamespace(total=2**34), SimpleNamespace(used=7), SimpleNamespace(used=5)))
        clocks = iter((1000, 400, 2000, 600))  # of the multiprocessors and of the memory in turn
        for name, answers in {
            "Init": lambda: None,
            "Shutdown": lambda: None,
            "DeviceGetCount": lambda: 1,
            "DeviceGetHandleByIndex": lambda _: "handle",
            "DeviceGetName": lambda _: b"board",
            "SystemGetDriverVersion": lambda: "550",
            "DeviceGetMaxClockInfo": lambda _, kind: 1980 if kind == pynvml.NVML_CLOCK_SM else 2619,
            "DeviceGetEnforcedPowerLimit": self.one_of(limit_mw),
            "DeviceGetTotalEnergyConsumption": self.one_of(*energy_mj),
            "DeviceGetPowerUsage": self.one_of(*power_mw),
            "DeviceGetFieldValues": self.one_of(*moments),
            "DeviceGetMemoryInfo": lambda _, version=None: next(memory),
            "DeviceGetClockInfo": lambda _, kind: next(clocks),
            "DeviceGetTemperature": self.one_of(50, 70),
            "DeviceGetUtilizationRates": self.one_of(SimpleNamespace(gpu=40), SimpleNamespace(gpu=90)),
        }.items():
            monkeypatch.setattr(pynvml, f"nvml{name}", answers)
        self.meter = nvml.NvmlMeter(interval_s=1000.0)

    @staticmethod
    def one_of(*answers):
        left = iter(answers)

        def answer(*_):
            told = next(left)
            if told is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return told

        return answer

    def used(self, until_s=None, without=()):
        self.meter.start()
        return self.meter.stop(until_s, without)


def test_readings_become_si_units_and_means(monkeypatch):
    board = Board(monkeypatch)
    info = board.meter.info()
    assert (info.name, info.memory_bytes, info.power_limit_w, info.driver) == ("board", 2**34, 350.0, "550")
    assert (info.max_sm_clock_hz, info.max_memory_clock_hz) == (1.98e9, 2.619e9)
    use = board.used()
    assert (use.sm_clock_hz, use.memory_clock_hz) == (1.5e9, 5e8)
    assert (use.temperature_c, use.utilization, use.peak_memory_bytes) == (60, pytest.approx(0.65), 7)


@pytest.mark.parametrize(
    ("board", "energy_j", "power_w"),
    [
        ({}, 10 * (100 + 300) / 2, 200),  # no counter: the trapezoid
        ({"energy_mj": (1_000_000, 3_500_000)}, 2500, 200),
        ({"moments": (moment(200_000), moment(240_000))}, 10 * (200 + 240) / 2, 220),  # not the means of a second
        ({"moments": (moment(200_000), moment(0))}, 10 * (200 + 100) / 2, 150),  # asked once, the mean says 100 W
        ({"moments": (moment(0, 3), moment(7, 999))}, 2000, 200),  # not supported, unknown
        # in 10 s and one of delay a board of 350 W draws at most 3 · 350 · 11 = 11,550 J
        ({"energy_mj": (1000, 11_550_000)}, 11_549, 200),
        ({"energy_mj": (1000, 11_552_000)}, 2000, 200),
        ({"energy_mj": (2000, 1000)}, 2000, 200),  # a counter that began again
        ({"energy_mj": (1000, 1000)}, 2000, 200),  # a counter that was not renewed meanwhile: no board draws nothing
        ({"energy_mj": (1000, 1000), "power_mw": (None, None)}, None, None),
        ({"energy_mj": (None, 1000)}, 2000, 200),
        ({"power_mw": (100_000, 1_049_000)}, 10 * (100 + 1049) / 2, 574.5),
        ({"power_mw": (100_000, 1_051_000)}, None, 100),  # no board of 350 W draws that; one point has no integral
        ({"power_mw": (100_000, 9_000_000), "limit_mw": None}, 45_500, 4550),
        ({"power_mw": (None, None)}, None, None),
    ],
)
def test_energy_is_the_counters_where_it_can_be_true_else_that_of_the_samples(monkeypatch, board, energy_j, power_w):
    use = Board(monkeypatch, **board).used()
    assert use.energy_j == (None if energy_j is None else pytest.approx(energy_j))
    assert use.power_w == (None if power_w is None else pytest.approx(power_w))


@pytest.mark.parametrize(
    ("board", "until_s", "energy_j"),
    [
        # 100 W rise to 300 W in the ten seconds from 50 to 60
        ({}, 60.0, 2000),
        ({}, 70.0, 2000),
        ({}, 54.0, 4 * (100 + 180) / 2),
        ({}, 50.0, 0),
        ({}, 40.0, 0),
        # the counter's 2,500 J are shared out as the power is: 560 of 2,000
        ({"energy_mj": (1_000_000, 3_500_000)}, 54.0, 2500 * 560 / 2000),
        ({"energy_mj": (1_000_000, 3_500_000), "power_mw": (None, None)}, 54.0, 1000),  # or as the time is
        ({"energy_mj": (1_000_000, 3_500_000), "power_mw": (None, 100_000)}, 54.0, 1000),
        ({"energy_mj": (1_000_000, 3_500_000), "power_mw": (0, 0)}, 54.0, 2500),  # nobody can tell
        ({"power_mw": (None, 100_000)}, 54.0, None),
    ],
)
def test_what_was_used_after_a_moment_does_not_count(monkeypatch, board, until_s, energy_j):
    use = Board(monkeypatch, **board).used(until_s)
    assert use.energy_j == (None if energy_j is None else pytest.approx(energy_j))


def test_samples_after_the_moment_are_in_no_mean_and_the_first_one_is_in_every(monkeypatch):
    use = Board(monkeypatch).used(59.9)
    assert (use.power_w, use.sm_clock_hz, use.temperature_c) == (100, 1e9, 50)
    assert (use.utilization, use.peak_memory_bytes) == (pytest.approx(0.4), 7)
    assert Board(monkeypatch).used(10.0).power_w == 100
    assert Board(monkeypatch).used(60.0).power_w == 200


@pytest.mark.parametrize(
    ("power_w", "until_s", "energy_j", "share"),
    [
        ((None, 100, 300, None), None, 10 * 100 + 10 * 200 + 10 * 300, 1),
        ((None, 100, 300, None), 5.0, 5 * 100, 500 / 6000),
        ((None, 100, 300, None), 25.0, 10 * 100 + 10 * 200 + 5 * 300, 4500 / 6000),
        ((None, None, 100, 200), None, 20 * 100 + 10 * 150, 1),
        ((100, None, None, 400), None, 30 * 250, 1),  # in between it goes along a line
        ((None, 100, None, None), None, None, 1),
    ],
)
def test_power_that_is_not_told_at_the_ends_is_that_of_the_nearest_reading(
    monkeypatch, power_w, until_s, energy_j, share
):
    """Readings every ten seconds; without a counter, and with one that has grown by 2,500 J."""
    unknown = dict.fromkeys(("sm_clock_hz", "memory_clock_hz", "temperature_c", "utilization", "memory_bytes"))
    samples = [nvml._Sample(time_s=10.0 * i, power_w=told, **unknown) for i, told in enumerate(power_w)]
    for before_j, after_mj, expected in ((None, None, energy_j), (1000.0, 3_500_000, 2500 * share)):
        meter = Board(monkeypatch, energy_mj=(after_mj,)).meter
        meter._sampler, meter._energy_before_j = SimpleNamespace(finish=lambda: samples), before_j
        assert meter.stop(until_s).energy_j == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("without", "until_s", "energy_j"),
    [
        ([(52.0, 54.0)], None, 2000 - 2 * 160),  # 100 W rise to 300 W in the ten seconds from 50 to 60
        ([(51.0, 52.0), (58.0, 60.0)], None, 2000 - 130 - 2 * 280),
        ([(52.0, 54.0), (57.0, 59.0)], 58.0, 8 * 180 - 2 * 160 - 250),  # the second one is over a second later
        ([(52.0, 54.0), (59.0, 60.0)], 58.0, 8 * 180 - 2 * 160),
        ([(50.0, 60.0)], None, 0),
    ],
)
def test_what_was_used_while_the_run_was_judged_does_not_count(monkeypatch, without, until_s, energy_j):
    """The counter's 2,500 J are shared out as the power is, or as the time is."""
    assert Board(monkeypatch).used(until_s, without).energy_j == pytest.approx(energy_j)
    counted = Board(monkeypatch, energy_mj=(1_000_000, 3_500_000)).used(until_s, without)
    assert counted.energy_j == pytest.approx(2500 * energy_j / 2000)
    dark = Board(monkeypatch, energy_mj=(1_000_000, 3_500_000), power_mw=(None, None)).used(until_s, without)
    judged_s = sum(min(end, until_s or 60) - min(begin, until_s or 60) for begin, end in without)
    assert dark.energy_j == pytest.approx(250 * ((until_s or 60) - 50 - judged_s))


def test_samples_that_were_taken_while_the_run_was_judged_are_in_no_mean(monkeypatch):
    """Readings at 0, 10, 20 and 30 s; the third one lies in a validation."""
    unknown = dict.fromkeys(("sm_clock_hz", "memory_clock_hz", "temperature_c", "utilization"))
    readings = ((100.0, 5), (200.0, 6), (900.0, 9), (300.0, 7))
    samples = [
        nvml._Sample(time_s=10.0 * i, power_w=power_w, memory_bytes=size, **unknown)
        for i, (power_w, size) in enumerate(readings)
    ]
    meter = Board(monkeypatch, energy_mj=(None,)).meter
    meter._sampler, meter._energy_before_j = SimpleNamespace(finish=lambda: samples), None
    use = meter.stop(None, [(15.0, 25.0)])
    assert (use.power_w, use.peak_memory_bytes) == (200.0, 7)
