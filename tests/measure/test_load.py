"""What the watch says of a quiet machine and of a busy one, from a stand-in for the kernel's files."""

import time

import pytest
import torch

from ptsim.hardware.profile import MachineLoad
from ptsim.measure import load

CPU = torch.device("cpu")


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
        ticks = round(self.ticks)
        # user nice system idle iowait irq softirq steal guest guest_nice: half of the others' time is the hypervisor's
        self.stat.write_text(f"cpu  {ticks // 2} 0 0 99999 777 0 0 {ticks - ticks // 2} 5 5\ncpu0 1 1 1\n")


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
        "other programs kept 1.5 of 4 processor cores busy; the measurement got no processor for 25% of the time"
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
