"""What the GPU campaign notes of its parts, and what a plan finds there."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from ptsim.errors import FileFormatError

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
gpu_parts = importlib.import_module("gpu_parts")


def noted_in(log):
    return gpu_parts.Noted(msgspec.convert(log, list[gpu_parts.Entry]))


def part(number, seconds, size=0):
    return {"number": number, "seconds": seconds, "size": size}


# A rehearsal: 128 images a run; 30,000 in ten seconds once; checkpoints of a megabyte in a tenth of a second.
TURN = {
    "start": part(1, 5.0),
    "before": part(1, 9.0),
    "data": part(1, 0.5, 128),
    "checkpoints": part(3, 0.3, 3_000_000),
    "profiles": part(1, 2.0),
    "epochs": part(2, 1.0),
}
PEAKS = {
    "piece": "peaks",
    "seconds": 60.0,
    "device": None,
    "parts": {"start": part(1, 4.0), "networks": part(20, 30.0)},
}
TRAINED = {
    "piece": "vgg11",
    "seconds": 100.0,
    "device": None,
    "parts": {"start": part(1, 6.0), "data": part(1, 10.0, 30_000)},
    "turns": [{"run": "vgg11-dense-s1", "seconds": 50.0, "parts": TURN}],
}
ON_GPU = TRAINED | {
    "device": "NVIDIA H100 80GB HBM3",
    "turns": [
        {"run": "vgg11-dense-s1", "seconds": 50.0, "parts": TURN | {"data": part(1, 7.0, 60_000), "before": part(1, b)}}
        for b in (18.0, 22.0)
    ],
}


def test_parts_of_a_kind_are_counted_together(monkeypatch):
    clock = iter((1.0, 3.0, 10.0, 15.0, 20.0))
    monkeypatch.setattr(gpu_parts.time, "perf_counter", lambda: next(clock))
    parts, owner = gpu_parts.Parts(), SimpleNamespace(read=lambda number: "x" * number)
    with parts.timed("data"):
        pass
    parts.watch(owner, "read", "data", lambda result, number: len(result) + number)
    assert owner.read(4) == "xxxx"
    with pytest.raises(ValueError, match="half"), parts.timed("data"):
        raise ValueError("half of it is no part")
    assert parts.found == {"data": gpu_parts.Part(number=2, seconds=2 + 5, size=8)}


def test_a_rehearsal_tells_what_needs_no_gpu():
    noted = noted_in([PEAKS, TRAINED])
    assert noted.start() == (5.0, "measured (processes: 3)")  # the middle of 4, 6 and 5
    assert noted.reading().seconds == 60_000 * 10 / 30_000  # not at the rate of 128 images
    assert noted.turn().seconds == 5 + 20
    assert "without a GPU" in noted.turn().source
    assert noted.profile() is None


def test_a_half_hour_tells_the_whole_start_of_a_turn_and_the_profiles():
    noted = noted_in([TRAINED, ON_GPU])
    assert noted.turn() == (20.0, "measured (turns on the GPU: 2)")
    assert noted.profile() == (2.0, "measured (turns on the GPU: 2)")


@pytest.mark.parametrize(
    ("num_bytes", "seconds"), [(1_000_000, 0.1), (4_000_000, 0.4), (250_000, 0.025), (4_100_000, None), (240_000, None)]
)
def test_a_checkpoint_is_stored_as_fast_as_one_of_about_its_size(num_bytes, seconds):
    found = noted_in([TRAINED]).checkpoint(num_bytes)
    assert (found and found.seconds) == (seconds and pytest.approx(seconds))


def test_the_checkpoint_of_the_nearest_size_counts():
    larger = TURN | {"checkpoints": part(2, 0.2, 8_000_000)}
    log = [TRAINED | {"turns": [*TRAINED["turns"], {"run": "b", "seconds": 1.0, "parts": larger}]}]
    assert noted_in(log).checkpoint(3_900_000).seconds == pytest.approx(3.9 * 0.025)
    assert noted_in(log).checkpoint(1_100_000).seconds == pytest.approx(1.1 * 0.1)


def test_what_a_piece_has_taken_is_said_with_the_parts_that_are_known():
    noted = noted_in([PEAKS, TRAINED, {"piece": "vgg11", "seconds": 20.0}])
    assert noted.taken("peaks") == "60 s in 1 call (start 4, networks 30)"
    assert noted.taken("vgg11") == "120 s in 2 calls (start 6, data 10, turns 50, before 9, epochs 1, profiles 2)"
    assert noted.taken("steps") == "nothing yet"
    assert noted_in([{"piece": "steps", "seconds": 3.0}]).taken("steps") == "3 s in 1 call (no parts noted)"


def test_without_results_nothing_is_known():
    noted = gpu_parts.Noted()
    assert (noted.start(), noted.reading(), noted.turn(), noted.checkpoint(1e6), noted.profile()) == (None,) * 5


@pytest.mark.parametrize("content", [None, b"[{", b'{"a": 1}', b'[{"seconds": 1.0}]', b'[{"piece": "a", "parts": 1}]'])
def test_results_without_a_log_are_refused_in_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "campaign.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"campaign\.json"):
        gpu_parts.Noted.of(tmp_path)


def test_a_process_that_was_killed_has_noted_nothing(tmp_path):
    assert gpu_parts.read(tmp_path / "none") == {}
    (tmp_path / "half").write_bytes(b'{"start": {"number"')
    assert gpu_parts.read(tmp_path / "half") == {}
    (tmp_path / "whole").write_bytes(msgspec.json.encode({"start": part(1, 2.0)}))
    assert gpu_parts.read(tmp_path / "whole") == {"start": gpu_parts.Part(number=1, seconds=2.0)}
