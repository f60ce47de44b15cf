"""The scripts that check all-reduce times: published runs, and the cluster in a box."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

ANALYSIS = Path(__file__).resolve().parents[2] / "analysis"


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(ANALYSIS))
    try:
        spec = importlib.util.spec_from_file_location(name, ANALYSIS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ANALYSIS))


@pytest.mark.slow
def test_check_allreduce_keeps_the_stated_errors() -> None:
    check = load("check_allreduce")
    frame = check.load_runs()
    calibrated = check.calibrated_errors(frame)
    assert calibrated.groupby(["part", "run"]).error.mean().groupby("part").median().max() < 0.05
    assert check.scaled_errors(frame).error.max() < 0.2
    catalog = check.catalog_errors(frame)
    systems = catalog[~catalog.left_out_of_fit].groupby(["part", "cluster"]).error.mean()
    assert systems["first"].max() < 0.2
    assert systems["later"].median() < 0.2


@pytest.mark.slow
def test_fit_allreduce_finds_the_constants_that_made_the_times() -> None:
    fit = load("fit_allreduce")
    frame = fit.load_runs()
    frame = frame[frame.cluster == "azure-nd96asr-v4"].copy()
    truth = fit.nccl.default_fit()
    for _, run in frame.groupby("run"):
        frame.loc[run.index, "seconds"] = fit.predict(run.iloc[0], run.size_bytes.to_numpy(float), truth)
    found = fit.fit_constants(frame, truth)
    assert fit.errors(frame, found).log_error.abs().max() < 0.02


@pytest.mark.slow
def test_the_cluster_lab_moves_the_bytes_that_were_predicted(tmp_path: Path) -> None:
    lab = load("cluster_lab")
    if reason := lab.missing():
        pytest.skip(f"the cluster lab cannot run here: {reason}")
    command = [sys.executable, str(ANALYSIS / "cluster_lab.py"), "--short", "--ranks", "2"]
    command += ["--rates", "200", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "step: median time error" in done.stdout
    frame = pd.read_csv(tmp_path / "comparison.csv")
    assert [*frame.what] == [*(f"all-reduce {size}" for size in (2**10, 2**14, 2**16, 2**19)), "step dense"]
    assert frame.bytes_error.abs().max() < 0.01
    assert frame.predicted_s.gt(0).all()
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "probe" not in left


def test_the_lab_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = load("cluster_lab")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "root" in lab.missing()


@pytest.mark.slow
def test_a_killed_lab_takes_its_ranks_along_and_the_next_removes_its_namespaces(tmp_path: Path) -> None:
    lab = load("cluster_lab")
    if reason := lab.missing():
        pytest.skip(f"the cluster lab cannot run here: {reason}")
    code = """
import sys, time
from pathlib import Path
import cluster_lab
lab = cluster_lab.Lab(2).__enter__()
ranks = lab.start(["sleep", "600"], team=False, log=Path(sys.argv[1]))
print(*(rank.pid for rank in ranks), *lab.hosts, lab.switch, flush=True)
time.sleep(600)
"""
    killed = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], cwd=ANALYSIS, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    with killed.stdout as said:
        *pids, first, second, switch = said.readline().split()
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_runs(pid) for pid in pids)
    with lab.Lab(2):
        names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not {first, second, switch} & set(names.split())


def _runs(pid: str) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_idle_cable_lets_its_burst_through_at_once() -> None:
    lab = load("cluster_lab")
    rate = 100.0  # Mbit/s: 12.5 bytes per us; the bucket holds a packet of 9014 bytes and 3125 bytes
    cable = lab.Cable(step_s=1e-4, timer_s=5e-5, frame=1.0)
    assert lab.burst_bytes(rate) == 12139
    # two ranks: two steps of 8000 bytes, each in 6 messages with gloo's 48 and TCP/IP's 66 bytes. The first is free;
    # 3455 bytes are left and 1250 come in while it has its latency, so that the second waits for 3979
    said = cable.all_reduce(16_000, rate, 2).seconds
    assert said == pytest.approx(2e-4 + (8684 - (12139 - 8684) - 1250) / 12.5e6 + 5e-5)
    # far more than the bucket: both steps wait, for all but the bucket and what comes in between
    said = cable.all_reduce(2_000_000, rate, 2).seconds
    assert said == pytest.approx(2e-4 + (2_001_368 - 12139 - 1250) / 12.5e6 + 1e-4)


def test_calibration_recovers_the_latencies() -> None:
    lab = load("cluster_lab")
    truth = lab.Cable(step_s=2e-4, timer_s=7e-5, frame=1.011)
    rows = [
        {"bytes": size, "mbit": rate, "seconds": truth.all_reduce(size, rate, 4).seconds, "wire": 1.011, "payload": 1.0}
        for rate in (150.0, 300.0)
        for size in (2**10, 2**14, 2**16, 2**20)
    ]
    rows.append({"bytes": 2**14, "mbit": 150.0, "seconds": 1.0, "wire": 1.0, "payload": 1.0})  # a disturbed one
    cable = lab.calibrate(pd.DataFrame(rows), 4)
    assert cable.frame == pytest.approx(1.011)
    assert cable.step_s == pytest.approx(2e-4, rel=0.03)
    assert cable.timer_s == pytest.approx(7e-5, rel=0.1)
    assert cable.all_reduce(2**20, 400.0, 4).seconds == pytest.approx(
        truth.all_reduce(2**20, 400.0, 4).seconds, rel=1e-3
    )
