import os
import resource
import signal

import msgspec
import pytest

import ptsim
from ptsim.errors import FileFormatError, TrainingError
from ptsim.trace.schema import End, Epoch, Profile, Reconfiguration, Run, StepDistribution
from tests.training.kills import TINY, half_made, killed_at
from tests.training.runs import servant, settings, train_in_own_group, train_until_killed

# (function, n): SIGKILL at its n-th call. "" counts every Python call inside ptsim; all other names are places where
# a run is in the middle of something. Each kill is followed by a resume, which is killed at the next.
KILLS = [
    ("", 40),  # nothing is written yet
    ("write_whole", 1),
    ("_run_record", 1),
    ("", 2500),
    ("write_whole", 1),  # the very first checkpoint
    ("write_whole", 3),
    ("sync_folder", 5),
    ("train_epoch", 1),
    ("add_gradient", 4),
    ("_stored", 2),
    ("save", 2),
    ("write_whole", 7),
    ("reconfigure", 1),  # the first reconfiguration
    ("cut_model", 1),
    ("cut_optimizer", 1),
    ("settled", 2),
    ("_forget_old", 1),
    ("_remove", 2),
    ("validate", 1),
    ("write", 2),
    ("", 9000),
    ("profile_network", 1),
    ("cut_optimizer", 1),
    ("spend_time", 1),
    ("update_average", 9),
    ("close", 1),
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The same run, never killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert _run(folder, None) == 0
    return folder


def _run(folder, kill, changes=None):
    process = servant().Process(
        target=train_until_killed, args=(folder, {"ema_decay": 0.9, "momentum": 0.8} | (changes or {}), kill)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _without_times(record):
    """The record with everything that is measured taken out."""
    match record:
        case Run():
            return msgspec.structs.replace(record, created="", git_revision=None)
        case Profile():
            return record.architecture, record.batch
        case Epoch():
            times = msgspec.structs.replace(record.time, **dict.fromkeys(record.time.__struct_fields__, 0.0))
            steps = StepDistribution(median_s=0, p10_s=0, p90_s=0, std_s=0)
            return msgspec.structs.replace(record, measured_time=times, measured_step=steps)
        case Reconfiguration():
            return msgspec.structs.replace(record, measured_duration_s=0)
        case End():
            return msgspec.structs.replace(record, wall_s=0)
    return record


def _records(folder):
    return [_without_times(record) for _, record in ptsim.trace.io.read_records(folder)]


def test_a_run_killed_at_more_than_twenty_moments_ends_bit_for_bit_like_one_that_was_not(tmp_path, whole_run):
    folder = tmp_path / "run"
    killed = [kill for kill in KILLS if _run(folder, kill) == -signal.SIGKILL]
    assert len(killed) >= 20
    assert {("reconfigure", 1), ("cut_model", 1), ("write_whole", 7)} <= set(killed)
    assert _run(folder, None) == 0
    stored = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert stored == sorted(path.relative_to(whole_run) for path in whole_run.rglob("*.safetensors"))
    for path in stored:
        assert (folder / path).read_bytes() == (whole_run / path).read_bytes(), path
    assert _records(folder) == _records(whole_run)
    assert not list(folder.rglob(".*"))  # no remains of what was cut off


def _started(folder):
    process = servant().Process(target=train_in_own_group, args=(folder, TINY))
    process.start()
    return process


@pytest.mark.slow
def test_what_a_kill_before_the_first_checkpoint_leaves_is_gone_after_the_next_start(tmp_path):
    """Killed from outside, as soon as what is in the folder has changed so often."""
    killed, torn = 0, 0
    for change in range(1, 7):
        folder = tmp_path / str(change) / "run"
        folder.parent.mkdir()
        process = _started(folder)
        there = killed_at(process.pid, lambda process=process: not process.is_alive(), folder, change)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed, torn = killed + (there is not None), torn + bool(half_made(folder))
        for unfinished in folder.parent.glob(".run.*"):
            os.utime(unfinished, (0, 0))  # it has to be older than a second
        again = _started(folder)
        again.join(timeout=120)
        assert again.exitcode == 0
        assert half_made(folder) == []
        assert ptsim.read_trace(folder).complete
    assert killed >= 3  # the others were faster than this loop looks
    assert torn >= 1


def test_a_run_killed_between_its_last_checkpoint_and_its_last_record_still_gets_its_end(tmp_path, whole_run):
    folder = tmp_path / "run"
    assert _run(folder, ("close", 1)) == -signal.SIGKILL
    assert not ptsim.read_trace(folder).complete
    assert _run(folder, None) == 0
    assert _records(folder) == _records(whole_run)


def test_resuming_a_finished_run_changes_nothing(whole_run):
    before = (whole_run / "trace.jsonl").read_bytes()
    result = ptsim.train(resume=whole_run)
    assert result.epochs == 6
    assert (whole_run / "trace.jsonl").read_bytes() == before


def test_a_pickle_in_a_checkpoints_place_is_refused(tmp_path):
    folder = tmp_path / "run"
    assert _run(folder, ("train_epoch", 3)) == -signal.SIGKILL
    newest = folder / "checkpoints" / "epoch-0001"
    (newest / "state.safetensors").write_bytes(b"\x80\x04\x95rest of a pickle")
    with pytest.raises(FileFormatError, match="found a pickle"):
        ptsim.train(resume=folder)


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_good_state(tmp_path):
    """A limit on the size of files stands for the full disk: EFBIG instead of ENOSPC, at the same calls."""
    folder = tmp_path / "run"
    whole = tmp_path / "whole"
    made = settings(profile=False, keep_every=1)
    ptsim.train(made, out=whole)
    enough = (whole / "trace.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (enough * 2 // 3, before[1]))
    try:
        with pytest.raises(TrainingError, match=r"trace\.jsonl cannot be written: File too large") as caught:
            ptsim.train(made, out=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "--resume" in caught.value.hint
    done = len(ptsim.read_trace(folder).epochs)
    assert 0 < done < 6
    ptsim.train(resume=folder)
    for name in ("weights.safetensors", "state.safetensors"):
        file = f"checkpoints/epoch-0005/{name}"
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    folder = tmp_path / "run"
    made = settings(profile=False, epochs=2, interval=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(TrainingError, match="cannot be written"):
            ptsim.train(made, out=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ptsim.train(resume=folder).epochs == 2
