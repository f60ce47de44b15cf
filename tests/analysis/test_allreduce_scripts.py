"""The scripts that check all-reduce times: published runs, and the cluster in a box."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
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


def test_fit_allreduce_finds_the_constants_that_made_the_times() -> None:
    fit = load("fit_allreduce")
    frame = fit.load_runs()
    frame = frame[frame.cluster == "azure-nd96asr-v4"].copy()
    truth = fit.nccl.default_fit()
    for _, run in frame.groupby("run"):
        frame.loc[run.index, "seconds"] = fit.predict(run.iloc[0], run.size_bytes.to_numpy(float), truth)
    found = fit.fit_constants(frame, truth)
    assert fit.errors(frame, found).log_error.abs().max() < 0.02


def test_the_cluster_lab_moves_the_bytes_that_were_predicted(tmp_path: Path) -> None:
    lab = load("cluster_lab")
    if reason := lab.missing():
        pytest.skip(f"the cluster lab cannot run here: {reason}")
    command = [sys.executable, str(ANALYSIS / "cluster_lab.py"), "--short", "--ranks", "2"]
    command += ["--rates", "200", "--iterations", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "step: median time error" in done.stdout
    frame = pd.read_csv(tmp_path / "comparison.csv")
    assert [*frame.what] == ["all-reduce 1024", "all-reduce 65536", "all-reduce 524288", "step dense"]
    assert frame.bytes_error.abs().max() < 0.01
    assert frame.predicted_s.gt(0).all()
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "ptsimprobe" not in left


def test_the_lab_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = load("cluster_lab")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "root" in lab.missing()


def test_calibration_recovers_step_latency_and_cpu_cost() -> None:
    lab = load("cluster_lab")
    rate = 300.0  # Mbit/s, of which an idle cable sends 9375 bytes at once
    rows = []
    for size in [2**10, 2**16, 2**20]:
        sent = 1.5 * size  # 4 ranks
        wire = 1.06 * sent
        seconds = 6 * 2e-4 + 3e-9 * sent + (wire - min(wire, 9375)) / (rate * 1e6 / 8)
        rows.append({"bytes": size, "seconds": seconds, "wire": wire, "payload": sent})
    known = lab.calibrate(pd.DataFrame(rows), rate, 4)
    assert known.step_s == pytest.approx(2e-4)
    assert known.cpu_s_per_byte == pytest.approx(3e-9)
    assert known.frame == pytest.approx(1.06)
    assert lab.lab_all_reduce(2**20, rate, 4, known).seconds == pytest.approx(rows[-1]["seconds"])
