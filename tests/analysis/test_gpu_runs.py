"""How the GPU campaign lets a dense and a PruneTrain run take turns."""

import importlib
import math
import sys
import tarfile
from pathlib import Path

import pytest

from ptsim.errors import FileFormatError

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
gpu_runs = importlib.import_module("gpu_runs")
Pair, Turn, next_turn = gpu_runs.Pair, gpu_runs.Turn, gpu_runs.next_turn
PAIR = Pair("resnet20", 1)
DENSE, PRUNED = PAIR.runs


@pytest.mark.parametrize(
    ("epochs", "turn"),
    [
        ({"dense": 0, "pruned": 0}, ("dense", math.inf, 50.0, 50.0)),
        ({"dense": 7, "pruned": 0}, ("pruned", 7, 100.0, 50.0)),
        ({"dense": 7, "pruned": 9}, ("dense", 9, 100.0, 50.0)),
        ({"dense": 7, "pruned": 7}, ("dense", math.inf, 50.0, 50.0)),
        ({"pruned": 7}, ("pruned", math.inf, 100.0, 100.0)),
    ],
    ids=str,
)
def test_the_run_that_is_behind_catches_up_and_of_equals_each_has_its_part(epochs, turn):
    assert next_turn(epochs, 100.0) == Turn(*turn)


class Trained(gpu_runs.Runs):
    """Runs with a clock of their own: epochs of so many seconds; those in `broken` fail.

    A turn begins after `start_s`; that a run has caught up is seen `late` epochs later.
    """

    def __init__(self, folder, seconds, time_s, broken=(), start_s=0.0, late=0):
        super().__init__(folder, folder, "cpu", tiny=False, cifar=None)
        self.seconds, self.left_s, self.broken = seconds, time_s, broken
        self.start_s, self.late = start_s, late
        self.got, self.turns = dict.fromkeys(seconds, 0), []
        self.remaining_s = lambda: self.left_s

    def trained(self, name):
        return self.got[name] >= 182

    def epochs(self, name):
        return self.got[name]

    def keep(self):
        pass

    def turn(self, turn, pair):
        self.turns.append(turn.name)
        if turn.name in self.broken:
            self.left_s -= 1
            raise RuntimeError(f"{turn.name}: status 1")
        taken_s = self.start_s
        while not self.trained(turn.name):
            end_s = turn.least_s if self.got[turn.name] >= turn.epochs + self.late else turn.seconds
            if taken_s + self.seconds[turn.name] > end_s:
                taken_s = max(taken_s, end_s)
                break
            self.got[turn.name] += 1
            taken_s += self.seconds[turn.name]
        self.left_s -= taken_s


def test_runs_of_different_speed_have_the_same_epochs_when_time_is_over(tmp_path):
    """400 s: dense has 200 of them, 100 epochs; PruneTrain needs 100 for as many. Of the other 100 dense has half."""
    runs = Trained(tmp_path, {DENSE: 2.0, PRUNED: 1.0}, 400.0)
    runs.train([PAIR])
    assert runs.turns == [DENSE, PRUNED, DENSE, PRUNED]
    assert runs.got == {DENSE: 125, PRUNED: 125}


def test_a_run_that_is_seen_late_to_have_caught_up_makes_no_turn_of_a_few_epochs(tmp_path):
    """Of 1,200 s dense has half: 20 and 72 epochs of 8 s. PruneTrain is stopped after 75, which take 20 + 300 s. Dense
    does not go back after the 6 epochs by which it would be ahead, but has half of the 280 s: 15 epochs. PruneTrain
    follows, 20 + 15 x 4 s; in the last 60 s dense makes 5.
    """
    runs = Trained(tmp_path, {DENSE: 8.0, PRUNED: 4.0}, 1200.0, start_s=20.0, late=3)
    runs.train([PAIR])
    assert runs.turns == [DENSE, PRUNED, DENSE, PRUNED, DENSE]
    assert runs.got == {DENSE: 92, PRUNED: 90}
    assert runs.left_s == 0


def test_a_run_that_fails_takes_no_other_runs_turn(tmp_path):
    runs = Trained(tmp_path, {DENSE: 1.0, PRUNED: 1.0}, 400.0, broken=(DENSE,))
    with pytest.raises(RuntimeError, match=f"{DENSE}: status 1"):
        runs.train([PAIR])
    assert runs.turns == [DENSE, PRUNED]
    assert runs.trained(PRUNED)


def test_a_run_that_gets_no_further_has_no_second_turn(tmp_path):
    runs = Trained(tmp_path, {DENSE: 1000.0, PRUNED: 1.0}, 600.0)
    runs.train([PAIR])
    assert runs.turns == [DENSE, PRUNED]


def test_the_second_pair_comes_when_the_first_is_finished(tmp_path):
    other = Pair("resnet20", 2)
    names = [*PAIR.runs, *other.runs]
    runs = Trained(tmp_path, dict.fromkeys(names, 1.0), 2 * 182 + 200.0)
    runs.train([PAIR, other])
    assert [runs.got[name] for name in names] == [182, 182, 100, 100]


@pytest.mark.parametrize("least_s", [0.0, 60.0])
def test_a_turn_ends_when_the_run_has_caught_up_but_not_before_its_part_is_over(tmp_path, monkeypatch, least_s):
    runs = gpu_runs.Runs(tmp_path, tmp_path, "cpu", tiny=True, cifar=None)
    seen, epochs = [], iter((1, 3, 5, 6))  # before, and whenever somebody looks
    monkeypatch.setattr(runs, "epochs", lambda _: next(epochs))

    def run_together(_commands, remaining_s, _meanwhile, *, program):
        assert program[1:] == (gpu_runs.gpu_parts.__file__, str(tmp_path / f"{DENSE}.parts"))
        seen.extend(remaining_s() for _ in range(3))

    monkeypatch.setattr(gpu_runs, "run_together", run_together)
    runs.turn(Turn(DENSE, 6, 100.0, least_s), PAIR)
    assert seen == [pytest.approx(100, abs=5), pytest.approx(100, abs=5), pytest.approx(least_s, abs=5)]
    assert [turn["run"] for turn in runs.turns] == [DENSE]


def test_without_an_archive_a_run_has_as_many_synthetic_images_of_the_papers_schedule(tmp_path):
    data = gpu_runs.Runs(tmp_path, tmp_path, "cuda", tiny=False, cifar=None).data()
    given = dict(zip(data[::2], data[1::2], strict=True))
    assert given == {
        "--batch": "128", "--epochs": "182", "--interval": "10", "--lr": "0.1",
        "--dataset": "synthetic", "--train-limit": "50000",
    }  # fmt: skip


def test_an_archive_without_training_images_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "note.txt").write_text("nothing")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "note.txt", arcname="note.txt")
    runs = gpu_runs.Runs(tmp_path / "out", tmp_path / "work", "cpu", tiny=False, cifar=tmp_path / "a.tar")
    with pytest.raises(FileFormatError, match="holds no folder called train"):
        runs.images()


def test_images_that_do_not_fit_on_the_disk_do_not_fill_it_for_the_others(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass

    def extractall(_archive, folder, *, filter):
        (folder / "train").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", extractall)
    runs = gpu_runs.Runs(tmp_path / "out", tmp_path / "work", "cpu", tiny=False, cifar=tmp_path / "a.tar")
    with pytest.raises(OSError, match="No space"):
        runs.images()
    assert not (tmp_path / "work" / "cifar10").exists()
