"""What the watch says of a quiet machine and of a busy one, from a stand-in for the kernel's files."""

import time

import pytest
import torch

from ptsim.hardware.profile import MachineLoad
from ptsim.measure import load

CPU = torch.device("cpu")
REFERENCE_S = load.LoadWatch._reference_s


class Clock:
    """A machine whose processor times and speed are what a test says, at any moment."""

    def __init__(self, monkeypatch, tmp_path, *, others, share):
        self.wall_s, self.others, self.share = 0.0, others, share
        self.ticks = 1e6
        self.stat = tmp_path / "stat"
        monkeypatch.setattr(load, "_STAT", self.stat)
        monkeypatch.setattr(load.time, "perf_counter", lambda: self.wall_s)
        monkeypatch.setattr(load.time, "thread_time", lambda: self.share * self.wall_s)
        monkeypatch.setattr(load.time, "process_time", lambda: self.share * self.wall_s)
        monkeypatch.setattr(load.os, "cpu_count", lambda: 4)
        monkeypatch.setattr(load.LoadWatch, "_reference_s", lambda _: 0.01)
        monkeypatch.setattr(load.os, "sysconf", lambda _: 100)
        self.go(0.0)

    def go(self, seconds):
        self.wall_s += seconds
        self.ticks += 100 * (self.share + self.others) * seconds
        part, rest = divmod(round(self.ticks), 6)
        rests = round(1000 * self.wall_s)  # nobody's
        # user nice system idle iowait irq softirq steal guest guest_nice: guests are in user and nice already
        self.stat.write_text(
            f"cpu  {part + rest} {part} {part} {rests} {rests} {part} {part} {part} {rests} {rests}\ncpu0 1 1 1\n"
        )


def test_other_programs_and_waiting_are_what_the_kernel_counted(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, tmp_path, others=1.5, share=0.75)
    watch = load.LoadWatch(CPU)
    for _ in range(5):
        with watch.measuring():
            clock.go(2.0)
    seen = watch.load()
    assert seen.num_cores == 4
    assert seen.other_cores == pytest.approx(1.5, abs=0.02)
    assert seen.waited == pytest.approx(0.25)
    assert seen.disturbance(1) == (
        "other programs kept 1.5 of 4 CPU cores busy; the measurement waited for a CPU core 25% of the time"
    )


def test_what_happens_between_measurements_does_not_count(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, tmp_path, others=0.0, share=1.0)
    watch = load.LoadWatch(CPU)
    for _ in range(3):
        with watch.measuring():
            clock.go(2.0)
        clock.others = 3.0
        clock.go(5.0)
        clock.others = 0.0
    assert watch.load().other_cores == pytest.approx(0.0, abs=0.01)


def test_a_machine_that_slows_down_is_noticed_by_the_same_kernel(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, tmp_path, others=0.0, share=1.0)
    watch = load.LoadWatch(CPU)
    durations = iter([0.010] * 5 + [0.013] * 5)
    monkeypatch.setattr(watch, "_reference_s", lambda: next(durations))
    for _ in range(10):
        with watch.measuring():
            clock.go(2.5)
    assert watch.load().drift == pytest.approx(1.3)
    assert "took up to 1.30 times as long" in watch.load().disturbance(1)


def test_a_quiet_machine_is_no_matter_and_a_resumed_session_keeps_the_worse(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, tmp_path, others=0.05, share=0.99)
    watch = load.LoadWatch(CPU, MachineLoad(num_cores=4, other_cores=2.0))
    with watch.measuring():
        clock.go(4.0)
    seen = watch.load()
    assert seen.other_cores == 2.0
    assert seen.waited == pytest.approx(0.01)
    assert MachineLoad(num_cores=4, other_cores=0.05, waited=0.01, drift=1.05).disturbance(1) is None


def test_where_the_kernel_tells_nothing_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "_STAT", tmp_path / "none")
    watch = load.LoadWatch(CPU)
    with watch.measuring():
        end = time.perf_counter() + 1.05
        while time.perf_counter() < end:
            pass
    assert watch.load().other_cores is None
    assert load.LoadWatch(CPU).load() is None  # too short to tell


def test_on_many_cores_a_few_busy_ones_disturb_one_thread_no_more():
    assert MachineLoad(num_cores=64, other_cores=6.0).disturbance(1) is None
    assert MachineLoad(num_cores=64, other_cores=6.0).disturbance(64) is not None


def watched(monkeypatch, clock, references, *, every_s=2.0, device=CPU):
    """The load after one measurement for each reference time; each time is the shortest of three."""
    times = iter([second for fastest in references for second in (9 + fastest, fastest, 9 + fastest)])
    monkeypatch.setattr(load.LoadWatch, "_reference_s", REFERENCE_S)

    def run():
        clock.wall_s += next(times)

    monkeypatch.setattr(load, "_Reference", lambda device: run)
    watch = load.LoadWatch(device)
    for _ in references:
        with watch.measuring():
            clock.go(every_s)
    assert next(times, None) is None
    return watch.load()


@pytest.mark.parametrize(
    ("references", "drift"),
    [
        (range(1, 12), 5.0),  # tenths of 1 to 11 s: from 2 to 10
        ((1, 2, 3, 4, 5), 4.6 / 1.4),
        ((5, 1, 4, 2, 3), 4.6 / 1.4),
        ((1, 2, 3, 4), None),  # too few to tell
    ],
)
def test_drift_is_the_ratio_of_the_outer_tenths_of_the_fastest_of_three(monkeypatch, tmp_path, references, drift):
    clock = Clock(monkeypatch, tmp_path, others=0.0, share=1.0)
    assert watched(monkeypatch, clock, tuple(references)).drift == (None if drift is None else pytest.approx(drift))


def test_the_reference_runs_again_after_two_seconds(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, tmp_path, others=0.0, share=1.0)
    seen = []
    watch = load.LoadWatch(CPU)
    monkeypatch.setattr(watch, "_reference_s", lambda: seen.append(clock.wall_s) or 0.01)
    for _ in range(4):
        with watch.measuring():
            clock.go(1.0)
    assert seen == [0.0, 2.0]


@pytest.mark.parametrize(("seconds", "other_cores"), [(0.99, None), (1.0, 2.0)])
def test_less_than_a_second_tells_nothing(monkeypatch, tmp_path, seconds, other_cores):
    clock = Clock(monkeypatch, tmp_path, others=2.0, share=1.0)
    watch = load.LoadWatch(CPU)
    with watch.measuring():
        clock.go(seconds)
    seen = watch.load()
    assert (None if seen is None else seen.other_cores) == (None if other_cores is None else pytest.approx(other_cores))


def test_shares_below_zero_are_none_and_a_gpus_thread_may_wait(monkeypatch, tmp_path):
    """The kernel counts in hundredths of a second, so that others may seem to have taken less than nothing."""
    clock = Clock(monkeypatch, tmp_path, others=-0.5, share=1.2)
    seen = watched(monkeypatch, clock, (1,))
    assert (seen.other_cores, seen.waited) == (0.0, 0.0)
    clock = Clock(monkeypatch, tmp_path, others=0.0, share=0.1)
    assert watched(monkeypatch, clock, (1,), device=torch.device("cuda")).waited is None
