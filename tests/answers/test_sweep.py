from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ptsim
from ptsim.answers import revision
from ptsim.answers.repredict import device_profile_of
from ptsim.answers.revision import model_revision, revision_of
from ptsim.answers.study import Configuration, configurations, read_study
from ptsim.answers.sweep import Progress, forget, project_all, run_study
from ptsim.cli.main import run
from ptsim.errors import FileFormatError, PtsimError, UnknownNameError, UsageError
from ptsim.hardware import catalog
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.profile_file import write_device_profile
from ptsim.sim import budget
from ptsim.sim.options import Options
from ptsim.sim.projection import projection_row
from ptsim.sim.run import change, project
from ptsim.trace.io import read_trace
from tests.traces import dense_trace, shrinking_trace

STUDY = """
traces = ["pruned", "dense"]
clusters = ["dgx-a100"]
gpus = [1, 8]
what_ifs = ["as-recorded", "gpu=v100-sxm2-16gb", "channels-rounded-to=8 + bf16-gradients", "tiny buckets"]

[options]
scaling = "strong"

[what_if."tiny buckets"]
bucket_bytes = 65536
"""


class InProcess(Executor):
    """Runs a task when it is submitted, and counts."""

    def __init__(self) -> None:
        self.num_tasks = self.num_configurations = 0

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.num_tasks += 1
        self.num_configurations += len(args[0])
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except RuntimeError as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for name in ("pruned", "dense"):
        (folder / name).mkdir()
    shrinking_trace(folder / "pruned", num_train=20_000)
    dense_trace(folder / "dense", num_train=20_000)
    return folder


def study(folder: Path, text: str = STUDY, name: str = "study.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


class TestExpansion:
    def test_every_combination_is_there_once(self, folder: Path) -> None:
        read = read_study(study(folder))
        expanded = list(configurations(read))
        assert len(expanded) == read.num_configurations == 4 * 2 * 1 * 2
        assert [c.index for c in expanded] == list(range(16))
        assert len({c.key for c in expanded}) == 16

    def test_what_ifs_change_their_options_only(self, folder: Path) -> None:
        options = {c.labels["what_if"]: c.options for c in configurations(read_study(study(folder)))}
        recorded = Options(scaling="strong")
        assert options["as-recorded"] == recorded
        assert options["gpu=v100-sxm2-16gb"] == msgspec.structs.replace(recorded, device="v100-sxm2-16gb")
        assert options["tiny buckets"] == msgspec.structs.replace(recorded, bucket_bytes=65536)
        joined = msgspec.structs.replace(recorded, channel_multiple=8, gradient_format="bf16")
        assert options["channels-rounded-to=8 + bf16-gradients"] == joined

    @pytest.mark.parametrize(
        ("name", "changed"),
        [
            ("memory=80 GiB", {"memory_bytes": 80 * 2**30, "minibatch": "planned"}),
            ("no-dynamic-minibatch", {"minibatch": "fixed"}),
            ("planned-minibatch", {"minibatch": "planned"}),
            ("max-minibatch=256", {"max_batch": 256, "minibatch": "planned"}),
            ("channels-rounded-to=16", {"channel_multiple": 16}),
            ("fp16-gradients", {"gradient_format": "fp16"}),
            ("bf16-gradients", {"gradient_format": "bf16"}),
            ("compressed-gradients=0.25", {"compression": 0.25}),
            ("precision=bf16", {"precision": "bf16"}),
            ("micro-batches=4", {"micro_batches": 4}),
            ("strong-scaling", {"scaling": "strong"}),
            ("strong-scaling + weak-scaling", {"scaling": "weak"}),
            ("recorded-jitter", {"jitter": "recorded"}),
            ("shared-links=3", {"jobs": 3}),
            ("link-by-link", {"network": "links"}),
            ("bucket=50 MiB", {"bucket_bytes": 50 * 2**20}),
            ("one-time-reconfiguration=3", {"one_time_epoch": 3}),
            ("input=dali", {"input": "dali"}),
            ("slow-input=2500", {"input_images_per_s": 2500.0}),
            ("failures=50000", {"faults": {"mtbf_gpu_hours": 50000.0}}),
        ],
    )
    def test_built_in_what_ifs(self, folder: Path, name: str, changed: dict[str, Any]) -> None:
        text = f'traces = ["dense"]\nclusters = ["dgx-a100"]\ngpus = [8]\nwhat_ifs = ["{name}"]\n'
        (only,) = configurations(read_study(study(folder, text)))
        assert only.options == change(Options(), changed)

    @pytest.mark.parametrize("name", ["interval", "penalty-ratio", "trace"])
    def test_another_interval_or_ratio_is_another_trace(self, folder: Path, name: str) -> None:
        text = f'traces = ["pruned"]\nclusters = ["dgx-a100"]\ngpus = [8]\nwhat_ifs = ["as-recorded", "{name}=dense"]\n'
        recorded, other = configurations(read_study(study(folder, text)))
        assert (recorded.trace.parent.name, other.trace.parent.name) == ("pruned", "dense")

    def test_patterns_find_traces(self, folder: Path) -> None:
        text = 'traces = ["*/trace.jsonl"]\nclusters = ["dgx-a100"]\ngpus = [8]\n'
        assert len(read_study(study(folder, text)).traces) == 2

    def test_a_grid_is_multiplied_out(self, folder: Path) -> None:
        text = STUDY + "[grid]\ncontention = [0.0, 0.2]\nmicro_batches = [1, 2, 4]\n"
        expanded = list(configurations(read_study(study(folder, text))))
        assert len(expanded) == 16 * 6
        assert {(c.labels["contention"], c.labels["micro_batches"]) for c in expanded} == {
            (c, m) for c in (0.0, 0.2) for m in (1, 2, 4)
        }

    def test_the_key_depends_on_the_traces_content(self, folder: Path, tmp_path: Path) -> None:
        keys = []
        for train in (5000, 6000):
            (tmp_path / "trace.jsonl").unlink(missing_ok=True)
            shrinking_trace(tmp_path, num_train=train)
            text = 'traces = ["trace.jsonl"]\nclusters = ["dgx-a100"]\ngpus = [8]\n'
            (only,) = configurations(read_study(study(tmp_path, text)))
            keys.append(only.key)
        assert keys[0] != keys[1]

    def test_the_key_depends_on_the_profiles_content_and_not_on_its_name(self, folder: Path, tmp_path: Path) -> None:
        profile = device_profile_of([read_trace(folder / "dense")])
        later = msgspec.structs.replace(profile, created="2026-11-28T13:00:00Z")
        keys = []
        for name, written in (("a.toml", profile), ("b.toml", profile), ("a.toml", later)):
            write_device_profile(folder / name, written)
            text = f'traces = ["dense"]\nclusters = ["dgx-a100"]\ngpus = [8]\nprofile = "{name}"\n'
            (only,) = configurations(read_study(study(folder, text)))
            keys.append(only.key)
        assert keys[0] == keys[1] != keys[2]


class TestRunning:
    def test_rows_are_those_of_single_projections(self, folder: Path, tmp_path: Path) -> None:
        rows = run_study(read_study(study(folder)), InProcess(), tmp_path / "out.jsonl")
        assert [row["index"] for row in rows] == list(range(16))
        trace = read_trace(folder / "pruned")
        expected = projection_row(project(trace, load_cluster("dgx-a100"), 8, Options(scaling="strong")))
        assert rows[1].items() >= {k: v for k, v in expected.items() if k != "trace"}.items()

    @pytest.mark.slow
    def test_processes_give_the_same_rows(self, folder: Path, tmp_path: Path) -> None:
        read = read_study(study(folder))
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            parallel = run_study(read, pool, tmp_path / "parallel.jsonl")
        assert parallel == run_study(read, InProcess(), tmp_path / "serial.jsonl")

    @pytest.mark.slow
    def test_a_dask_cluster_gives_the_same_rows(self, folder: Path, tmp_path: Path) -> None:
        distributed = pytest.importorskip("distributed")
        read = read_study(study(folder))
        with (
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
            ) as local,
            distributed.Client(local) as client,
        ):
            rows = run_study(read, client.get_executor(), tmp_path / "dask.jsonl")
        assert rows == run_study(read, InProcess(), tmp_path / "serial.jsonl")

    def test_a_second_run_computes_nothing(self, folder: Path, tmp_path: Path) -> None:
        read, out = read_study(study(folder)), tmp_path / "out.jsonl"
        first = run_study(read, InProcess(), out)
        content, executor = out.read_bytes(), InProcess()
        assert run_study(read, executor, out) == first
        assert executor.num_configurations == 0
        assert out.read_bytes() == content

    def test_a_second_run_names_devices_and_copies_of_a_trace_as_the_first(self, folder: Path, tmp_path: Path) -> None:
        """A copy has the key of its original: what is stored of one is the other one's, too."""
        shutil.copytree(folder / "dense", tmp_path / "copy")
        traces = f'traces = ["{folder / "dense"}", "{tmp_path / "copy"}"]\n'
        text = traces + 'clusters = ["dgx-a100"]\ngpus = [8]\n[grid]\ndevice = ["a100", "t4"]\n'
        read, out, executor = read_study(study(tmp_path, text)), tmp_path / "out.jsonl", InProcess()
        first = run_study(read, InProcess(), out)
        named = [(row["device"], Path(row["trace"]).parent.name) for row in first]
        assert named == [(device, name) for device in ("a100-sxm4-40gb", "t4") for name in ("dense", "copy")]
        assert run_study(read, executor, out) == first
        assert executor.num_configurations == 0

    def test_a_study_that_was_moved_goes_on_and_names_its_own_files(self, folder: Path, tmp_path: Path) -> None:
        catalog = Path(sys.modules["ptsim"].__file__ or "").parent / "hardware" / "catalog" / "devices" / "t4.toml"
        text = f'traces = ["{folder / "dense"}"]\nclusters = ["dgx-a100"]\ngpus = [8]\n'
        text += '[grid]\nmixed_devices = [{ "t.toml" = 1 }]\n'
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
            shutil.copy(catalog, tmp_path / name / "t.toml")
        here, there = (read_study(study(tmp_path / name, text)) for name in ("here", "there"))
        out, executor = tmp_path / "out.jsonl", InProcess()
        (first,), (second,) = run_study(here, InProcess(), out), run_study(there, executor, out)
        assert executor.num_configurations == 0
        assert second == {**first, "mixed_devices": {str(tmp_path / "there" / "t.toml"): 1}}

    def test_a_doubt_about_a_device_file_is_told_where_the_study_is_read_and_by_no_worker(
        self, folder: Path, tmp_path: Path
    ) -> None:
        devices = Path(sys.modules["ptsim"].__file__ or "").parent / "hardware" / "catalog" / "devices"
        (tmp_path / "own.toml").write_text((devices / "t4.toml").read_text().replace('"65 TFLOP/s"', '"130 TFLOP/s"'))
        text = f'traces = ["{folder / "dense"}"]\nclusters = ["dgx-a100"]\ngpus = [8]\nwhat_ifs = ["gpu=own.toml"]\n'
        with pytest.warns(UserWarning, match="is it a peak with sparsity"):
            read = read_study(study(tmp_path, text))
        expanded = list(configurations(read))
        catalog._say.cache_clear()  # as in a process of its own
        assert [row["status"] for row in project_all(expanded)] == ["ok"]

    def test_an_interrupted_study_goes_on_where_it_was(self, folder: Path, tmp_path: Path) -> None:
        read, out = read_study(study(folder)), tmp_path / "out.jsonl"
        rows = run_study(read, InProcess(), out)
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # torn while the sixth line was written
        executor = InProcess()
        assert run_study(read, executor, out) == rows
        assert executor.num_configurations == 11
        assert sorted(out.read_bytes().splitlines()) == sorted(line.rstrip() for line in lines)

    def test_a_configuration_that_fails_is_reported_and_the_others_go_on(self, folder: Path, tmp_path: Path) -> None:
        text = STUDY.replace('"tiny buckets"]', '"micro-batches=1000"]')
        seen: list[Progress] = []
        rows = run_study(read_study(study(folder, text)), InProcess(), tmp_path / "out.jsonl", progress=seen.append)
        failed = [row for row in rows if row["status"] == "failed"]
        assert {row["what_if"] for row in failed} == {"micro-batches=1000"}
        assert all("micro_batches is 1000" in row["error"] for row in failed)
        assert len(rows) - len(failed) == 12
        assert (seen[-1].done, seen[-1].failed, seen[-1].total) == (16, 4, 16)

    def test_failures_are_tried_again(self, folder: Path, tmp_path: Path) -> None:
        text = STUDY.replace('"tiny buckets"]', '"micro-batches=1000"]')
        read, out = read_study(study(folder, text)), tmp_path / "out.jsonl"
        run_study(read, InProcess(), out)
        executor = InProcess()
        run_study(read, executor, out)
        assert executor.num_configurations == 4

    def test_a_crash_in_one_configuration_costs_only_that_one(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def crash_once(chunk: tuple[Configuration, ...]) -> list[dict[str, Any]]:
            if any(configuration.index == 3 for configuration in chunk):
                raise RuntimeError("a bug")
            return project_all(chunk)

        monkeypatch.setattr("ptsim.answers.sweep.project_all", crash_once)
        rows = run_study(read_study(study(folder)), InProcess(), tmp_path / "out.jsonl", window=1)
        assert [row["index"] for row in rows if row["status"] == "failed"] == [3]
        assert rows[3]["error"] == "RuntimeError: a bug"

    def test_a_worker_that_dies_is_one_sentence(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(chunk: tuple[Configuration, ...]) -> list[dict[str, Any]]:
            raise BrokenProcessPool("a process was terminated abruptly")

        monkeypatch.setattr("ptsim.answers.sweep.project_all", die)
        with pytest.raises(PtsimError, match="a worker process died"):
            run_study(read_study(study(folder)), InProcess(), tmp_path / "out.jsonl")

    def test_results_come_as_they_are_computed(self, folder: Path, tmp_path: Path) -> None:
        out, lines = tmp_path / "out.jsonl", []
        text = STUDY + "[grid]\ncontention = [0.0, 0.05, 0.1, 0.15, 0.2]\n"
        run_study(
            read_study(study(folder, text)),
            InProcess(),
            out,
            progress=lambda _: lines.append(out.read_bytes().count(b"\n")),
            window=1,
        )
        assert lines == [32, 64, 80]

    def test_a_device_profile_is_used_where_the_trace_measured_nothing(self, folder: Path, tmp_path: Path) -> None:
        profile = device_profile_of([read_trace(folder / "pruned"), read_trace(folder / "dense")])
        write_device_profile(folder / "a100.toml", profile)
        text = 'traces = ["dense"]\nclusters = ["dgx-a100"]\ngpus = [8]\nwhat_ifs = ["micro-batches=2"]\n'
        without, with_it = (
            run_study(read_study(study(folder, head + text)), InProcess(), tmp_path / "out.jsonl")
            for head in ("", 'profile = "a100.toml"\n')
        )
        assert without[0]["key"] != with_it[0]["key"]
        assert (without[0]["tier"], with_it[0]["tier"]) == ("scaled", "profiled")

    def test_a_profile_of_no_device_of_the_study_is_refused(self, folder: Path) -> None:
        profile = device_profile_of([read_trace(folder / "dense")])
        write_device_profile(folder / "here.toml", msgspec.structs.replace(profile, device="AMD EPYC"))
        study = folder / "foreign.toml"
        study.write_text('traces = ["dense"]\nclusters = ["dgx-a100"]\ngpus = [8]\nprofile = "here.toml"\n')
        with pytest.raises(FileFormatError, match=r"profile here\.toml is of 'AMD EPYC', the study has a100-sxm4"):
            read_study(study)

    def test_a_device_profile_is_left_out_for_other_devices(self, folder: Path, tmp_path: Path) -> None:
        write_device_profile(folder / "a100.toml", device_profile_of([read_trace(folder / "dense")]))
        text = 'traces = ["dense"]\nclusters = ["dgx-a100"]\ngpus = [8]\nwhat_ifs = ["gpu=t4"]\nprofile = "a100.toml"\n'
        (row,) = run_study(read_study(study(folder, text)), InProcess(), tmp_path / "out.jsonl")
        assert (row["status"], row["device"], row["tier"]) == ("ok", "t4", "scaled")


class TestWrongInput:
    @pytest.mark.parametrize(
        ("change_", "error", "problem"),
        [
            (("gpus = [1, 8]", "gpu = [1, 8]"), FileFormatError, "gpu"),
            (("gpus = [1, 8]", "gpus = []"), FileFormatError, "gpus is empty"),
            (("gpus = [1, 8]", "gpus = [0]"), FileFormatError, "gpus holds 0"),
            (("gpus = [1, 8]", 'gpus = ["many"]'), FileFormatError, "gpus"),
            (('"dense"]', '"nowhere"]'), FileFormatError, "nowhere"),
            (('"dense"]', '"no*where"]'), FileFormatError, "nothing matches"),
            (('"dense"]', '"no**where"]'), FileFormatError, "is no pattern"),
            (("gpus = [1, 8]", "gpus = [1e400]"), FileFormatError, "is not finite"),
            (("gpus = [1, 8]", "gpus = [1.5]"), FileFormatError, "gpus"),
            (("gpus = [1, 8]", "gpus = [-8]"), FileFormatError, "gpus holds -8"),
            (("gpus = [1, 8]", f"gpus = [{10**30}]"), FileFormatError, "more than 63 bits"),
            (("bucket_bytes = 65536", "contention = nan"), FileFormatError, "is not finite"),
            (("bucket_bytes = 65536", "contention = -0.5"), UsageError, "contention is -0.5"),
            (("bucket_bytes = 65536", "compression = 1e-300"), FileFormatError, "expected a number between"),
            (("bucket_bytes = 65536", 'jitter = "0.1"'), UsageError, "jitter"),
            (("gpu=v100-sxm2-16gb", "compressed-gradients=nan"), UsageError, "compression is nan"),
            (("gpu=v100-sxm2-16gb", "failures=-3"), UsageError, "mtbf_gpu_hours is -3"),
            (("gpu=v100-sxm2-16gb", f"micro-batches={'9' * 5000}"), FileFormatError, "micro-batches"),
            (("[options]", "[grid]\nmax_batch = [0]\n[options]"), UsageError, "max_batch is 0"),
            (("[options]", "[grid]\nmax_batch = [true]\n[options]"), UsageError, "max_batch"),
            (("[options]", 'profile = "none.toml"\n[options]'), PtsimError, "none.toml"),
            (("dgx-a100", "dgx-z9"), UnknownNameError, "unknown cluster 'dgx-z9'"),
            (("as-recorded", "as-recordet"), UnknownNameError, "unknown what-if 'as-recordet'"),
            (("as-recorded", "as-recorded=5"), FileFormatError, "takes no value"),
            (("gpu=v100-sxm2-16gb", "gpu"), FileFormatError, "needs a value"),
            (("gpu=v100-sxm2-16gb", "gpu=gpu9000"), UnknownNameError, "gpu9000"),
            (("gpu=v100-sxm2-16gb", "interval=*/trace.jsonl"), FileFormatError, "names 2 traces, expected one"),
            (("gpu=v100-sxm2-16gb", "memory=80"), FileFormatError, "no unit"),
            (("gpu=v100-sxm2-16gb", "shared-links=-1"), FileFormatError, "-1 is negative"),
            (("[options]", "[grid]\nseed = []\n[options]"), FileFormatError, "grid.seed is empty"),
            (("[options]", "[grid]\ntrace = [1]\n[options]"), FileFormatError, "trace is no option"),
            (("gpu=v100-sxm2-16gb", "bucket=huge"), FileFormatError, "bucket=huge"),
            (('scaling = "strong"', 'scaling = "strongish"'), UsageError, "scaling"),
            (("bucket_bytes = 65536", "bucket_bites = 65536"), UsageError, "bucket_bites"),
            (("[options]", "[options"), FileFormatError, "not TOML"),
        ],
    )
    def test_a_broken_study_says_what_is_wrong(
        self, folder: Path, change_: tuple[str, str], error: type[PtsimError], problem: str
    ) -> None:
        assert change_[0] in STUDY
        with pytest.raises(error, match=problem) as caught:
            read_study(study(folder, STUDY.replace(*change_), "broken.toml"))
        assert "\n" not in caught.value.message

    def test_a_missing_study_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileFormatError, match=r"none\.toml: cannot be read"):
            read_study(tmp_path / "none.toml")

    def test_a_pipe_in_the_place_of_a_trace_is_not_waited_for(self, folder: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jsonl")
        asked = read_study(study(tmp_path, STUDY.replace('"pruned", "dense"', '"pipe.jsonl"')))
        with pytest.raises(FileFormatError, match="it is a pipe or a device"):
            list(configurations(asked))

    def test_a_second_sweep_into_the_same_results_is_refused(self, folder: Path, tmp_path: Path) -> None:
        asked, out = read_study(study(folder)), tmp_path / "out.jsonl"

        class Second(InProcess):
            def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
                with pytest.raises(UsageError, match="is being written by another process"):
                    run_study(asked, InProcess(), out)
                return super().submit(task, *args, **kwargs)

        assert len(run_study(asked, Second(), out)) == 16
        assert len(out.read_bytes().splitlines()) == 16

    def test_a_result_file_that_is_none_is_left_alone(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "precious.txt"
        out.write_text("my thesis\n")
        with pytest.raises(FileFormatError, match=":1: not a line of sweep results"):
            run_study(read_study(study(folder)), InProcess(), out)
        assert out.read_text() == "my thesis\n"

    def test_earlier_results_are_deleted_on_demand_and_nothing_else(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        run_study(read_study(study(folder)), InProcess(), out)
        forget(out)
        assert not out.exists()
        forget(out)  # there is nothing
        out.write_text("my thesis\n")
        with pytest.raises(FileFormatError, match="not a line of sweep results"):
            forget(out)
        assert out.read_text() == "my thesis\n"


class TestCommand:
    @pytest.mark.slow
    def test_its_table_tells_runs_apart_that_lie_in_one_folder(
        self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "runs").mkdir()
        for name in ("gentle", "harsh"):
            shutil.copy(folder / "pruned" / "trace.jsonl", tmp_path / "runs" / f"{name}.jsonl")
        text = f'traces = ["runs/*.jsonl", "{folder / "dense"}"]\nclusters = ["dgx-a100"]\ngpus = [1]\n'
        (tmp_path / "s.toml").write_text(text)
        assert run(["sweep", str(tmp_path / "s.toml"), "--workers", "1"]) == 0
        table = capsys.readouterr().out
        assert [table.count(f" {name} ") for name in ("gentle", "harsh", "dense", "runs")] == [1, 1, 1, 0]

    @pytest.mark.slow
    def test_its_table_tells_the_values_of_the_grid_apart(
        self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = f'traces = ["{folder / "dense"}"]\nclusters = ["dgx-a100"]\ngpus = [8]\n'
        (tmp_path / "s.toml").write_text(text + "[grid]\nbucket_bytes = [77777, 88888]\n")
        assert run(["sweep", str(tmp_path / "s.toml"), "--workers", "1"]) == 0
        table = capsys.readouterr().out
        assert "bucket bytes" in table
        assert [table.count(f" {value} ") for value in (77777, 88888)] == [1, 1]
        rows = [json.loads(line) for line in (tmp_path / "s.results.jsonl").read_text().splitlines()]
        assert " MFU " in table
        assert all(f" {row['mfu_fraction']:.1%} " in table for row in rows)

    @pytest.mark.slow
    def test_it_prints_rows_and_keeps_them(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = study(folder, STUDY, "command.toml")
        assert run(["sweep", str(path), "--workers", "1", "--json"]) == 0
        captured = capsys.readouterr()
        rows = json.loads(captured.out)
        assert len(rows) == 16
        assert rows[0]["total_seconds"] > 0
        assert len((folder / "command.results.jsonl").read_text().splitlines()) == 16
        assert "16 of 16 configurations" in captured.err

    def test_millions_are_counted_and_asked_for(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        values = ", ".join(str(i) for i in range(1, 1001))
        text = STUDY + f"[grid]\nseed = [{values}]\nmicro_batches = [{values}]\n"
        path = study(folder, text, "huge.toml")
        assert run(["sweep", str(path)]) == 2
        error = capsys.readouterr().err
        assert "16,000,000 configurations" in error
        assert "--yes" in error
        assert not (folder / "huge.results.jsonl").exists()

    def test_long_simulations_fail_unless_the_study_is_told_to_run_them(self, folder: Path, tmp_path: Path) -> None:
        asked = read_study(study(folder, STUDY + "[grid]\nmicro_batches = [8]\n", "long.toml"))
        token = budget._limit.set(5)
        try:
            rows = run_study(asked, InProcess(), tmp_path / "few.jsonl")
            assert {row["status"] for row in rows} == {"failed"}
            assert all("would take about" in row["error"] for row in rows)
            rows = run_study(asked, InProcess(), tmp_path / "all.jsonl", any_length=True)
            assert {row["status"] for row in rows} == {"ok"}
        finally:
            budget._limit.reset(token)

    def test_no_workers_are_refused(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["sweep", str(study(folder)), "--workers", "0"]) == 2
        assert "workers is 0" in capsys.readouterr().err


class TestRevision:
    def test_a_change_of_code_data_or_catalog_is_another_model(self, tmp_path: Path) -> None:
        package = Path(sys.modules["ptsim"].__file__ or "").parent
        copy = tmp_path / "ptsim"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "models"))
        first = revision_of(copy)
        assert first == model_revision()
        for part in ("costs/kernels.py", "costs/efficiency.toml", "hardware/catalog/devices/t4.toml", "network.py"):
            content = (copy / part).read_text()
            (copy / part).write_text(content + "\n# changed\n")
            assert revision_of(copy) != first
            (copy / part).write_text(content)
        (copy / "report" / "page.py").write_text("")  # decides no number of a projection
        assert revision_of(copy) == first

    def test_results_of_an_older_model_are_computed_again(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, out = study(folder), tmp_path / "out.jsonl"
        run_study(read_study(path), InProcess(), out)
        again, other = InProcess(), InProcess()
        run_study(read_study(path), again, out)
        assert again.num_configurations == 0
        monkeypatch.setattr("ptsim.answers.study.model_revision", lambda: "another")
        rows = run_study(read_study(path), other, out)
        assert other.num_configurations == len(rows) == read_study(path).num_configurations

    def test_a_device_file_that_changed_under_its_name_is_another_configuration(
        self, folder: Path, tmp_path: Path
    ) -> None:
        catalog = Path(sys.modules["ptsim"].__file__ or "").parent / "hardware" / "catalog" / "devices" / "t4.toml"
        device = tmp_path / "own.toml"
        device.write_text(catalog.read_text())
        text = f'traces = ["pruned"]\nclusters = ["dgx-a100"]\ngpus = [1]\nwhat_ifs = ["gpu={device}"]\n'
        before = [c.key for c in configurations(read_study(study(folder, text, "own.toml")))]
        device.write_text(catalog.read_text().replace('"16 GiB"', '"24 GiB"'))
        assert [c.key for c in configurations(read_study(study(folder, text, "own.toml")))] != before

    @pytest.mark.parametrize("group", ["optimizers", "criteria", "tiers", "collectives"])
    def test_what_another_package_adds_and_changes_is_another_configuration(
        self, group: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site, path = tmp_path / "site", study(folder)
        (site / "lion-1.0.dist-info").mkdir(parents=True)
        (site / "lion-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lion\nVersion: 1.0\n")
        (site / "lion-1.0.dist-info" / "entry_points.txt").write_text(f"[ptsim.{group}]\nlion = lion:LION\n")
        (site / "lion.py").write_text("LION = 1\n")

        def keys() -> list[str]:
            return [configuration.key for configuration in configurations(read_study(path))]

        alone = keys()
        monkeypatch.syspath_prepend(site)
        installed = keys()
        (site / "lion.py").write_text("LION = 2\n")
        assert len({alone[0], installed[0], keys()[0]}) == 3
        assert "lion" not in sys.modules


@pytest.mark.slow
def test_workers_end_when_the_study_is_killed() -> None:
    """SIGKILL leaves no time for anything: only the workers themselves can notice."""
    code = (
        "import os, signal, time\n"
        "from ptsim.cli.sweep import _executor\n"
        "if __name__ == '__main__':\n"
        "    with _executor(2, None) as executor:\n"
        "        print(*[executor.submit(os.getpid).result() for _ in range(4)], flush=True)\n"
        "        executor.submit(time.sleep, 600)\n"
        "        time.sleep(1)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=120, check=False)
    assert script.returncode == -9  # and the pipe was closed, which the workers held too
    assert len(script.stdout.split()) == 4


def test_the_revision_covers_all_that_the_cost_model_imports() -> None:
    package = Path(ptsim.__file__).parent
    parts = [package / part for part in revision._PARTS]
    files = [file for part in parts for file in ([part] if part.is_file() else part.rglob("*.py"))]
    imported = {
        node.module.split(".")[1]
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ptsim.")
    }
    only_for_types = {"prune"}
    no_numbers = {"errors", "registry", "textfile", "loglines", "consistency"}
    assert imported - {part.stem for part in parts} == only_for_types | no_numbers
