import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import ptsim
from tests.training.runs import NETS, servant, settings, train_as_rank

PLAIN = f"{NETS}:plain"  # no BatchNorm: a split mini-batch then gives the same gradient


def start_team(world_size, folder, fault="", **changes):
    """The processes of the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = [
        servant().Process(target=train_as_rank, args=(rank, world_size, port, folder, changes, fault))
        for rank in range(world_size)
    ]
    for process in team:
        process.start()
    return team


def run_team(world_size, folder, fault="", **changes):
    """Exit statuses of the ranks."""
    team = start_team(world_size, folder, fault, **changes)
    for process in team:
        process.join(timeout=120)
    return [process.exitcode for process in team]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    return ptsim.read_trace(ptsim.train(settings(model=PLAIN, profile=False, num_threads=1), out=folder).trace)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_team_has_the_loss_curve_of_one_process_with_the_same_global_mini_batch(tmp_path, alone, world_size):
    assert run_team(world_size, tmp_path / "run", model=PLAIN, profile=False) == [0] * world_size
    trace = ptsim.read_trace(tmp_path / "run")
    assert trace.run.world_size == world_size
    assert trace.run.backend == "gloo"
    assert trace.complete
    assert sum(r.channels_removed for r in trace.reconfigurations) > 0
    assert [r.after for r in trace.reconfigurations] == [r.after for r in alone.reconfigurations]
    for ours, theirs in zip(trace.epochs, alone.epochs, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=2e-5)
        assert ours.validation_loss == pytest.approx(theirs.validation_loss, rel=2e-5)
        assert ours.penalty == pytest.approx(theirs.penalty, rel=2e-5)
        assert ours.validation_accuracy == pytest.approx(theirs.validation_accuracy, abs=1.5 / 512)
        assert (ours.num_images, ours.batch_per_gpu) == (96, 16 // world_size)
        assert ours.allreduce_bytes == 4 * trace.network_of(ours).num_parameters * ours.num_iterations
        time = ours.time
        assert time.exposed_communication_s >= 0
        parts = (time.data_wait_s, time.forward_s, time.backward_s, time.regularizer_s, time.optimizer_s)
        assert sum(parts) + time.exposed_communication_s <= time.wall_s
    assert any(epoch.time.exposed_communication_s > 0 for epoch in trace.epochs)


@pytest.mark.parametrize("compiled", [{}, {"compile": True, "compile_backend": "aot_eager"}])
def test_with_batch_norm_a_team_learns_and_stores_a_network_that_all_ranks_agree_on(tmp_path, compiled):
    assert run_team(2, tmp_path / "run", profile=False, ema_decay=0.9, **compiled) == [0, 0]
    trace = ptsim.read_trace(tmp_path / "run")
    assert trace.epochs[-1].train_loss < trace.epochs[0].train_loss
    assert sum(r.channels_removed for r in trace.reconfigurations) > 0
    ptsim.load_model(tmp_path / "run", trust=True)


def test_a_team_lets_its_mini_batch_grow_as_one(tmp_path):
    growth = {"dynamic_batch": True, "memory_budget": "1 GiB", "batch_granularity": 4, "max_batch": 32}
    assert run_team(2, tmp_path / "run", profile=False, epochs=4, **growth) == [0, 0]
    trace = ptsim.read_trace(tmp_path / "run")
    assert [epoch.batch_per_gpu for epoch in trace.epochs] == [8, 8, 16, 16]
    assert [epoch.num_iterations for epoch in trace.epochs] == [6, 6, 3, 3]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_without_memory_makes_the_whole_team_step_back(tmp_path, where):
    growth = {"dynamic_batch": True, "memory_budget": "1 GiB", "batch_granularity": 4, "max_batch": 32}
    fault = f"no memory in the {where} pass"
    assert run_team(2, tmp_path / "run", fault=fault, profile=False, epochs=4, **growth) == [0, 0]
    trace = ptsim.read_trace(tmp_path / "run")
    assert trace.complete
    assert [epoch.batch_per_gpu for epoch in trace.epochs] == [8, 8, 12, 12]
    assert trace.reconfigurations[1].notes == ("out of memory with 16 images: the epoch begins again with 12",)


def test_a_mini_batch_that_has_not_grown_ends_the_run_with_the_same_words_on_every_rank(tmp_path):
    fault = "no memory in the forward pass"
    assert run_team(2, tmp_path / "run", fault=fault, profile=False, dynamic_batch=True, batch=32) == [3, 3]
    for rank in range(2):
        message = (tmp_path / f"run.rank{rank}").read_text()
        assert message == "a mini-batch of 32 needs more memory than rank 1 has left"


def test_a_loss_that_is_nan_on_one_rank_is_said_on_every_rank(tmp_path):
    assert run_team(2, tmp_path / "run", fault="nan", profile=False) == [3, 3]
    for rank in range(2):
        message = (tmp_path / f"run.rank{rank}").read_text()
        assert message.startswith("the loss is not a finite number since iteration 2 of epoch 0")


def test_ctrl_c_on_one_rank_ends_the_run_on_every_rank_and_names_it(tmp_path):
    assert run_team(2, tmp_path / "run", fault="SIGINT", profile=False) == [130, 130]
    assert [(tmp_path / f"run.rank{rank}").read_text() for rank in range(2)] == ["SIGINT on rank 1", "SIGINT"]
    end = ptsim.read_trace(tmp_path / "run").end
    assert (end.status, end.reason) == ("interrupted", "SIGINT on rank 1")


@pytest.mark.parametrize(("fault", "failing"), [("fails", 1), ("0 fails", 0)])
def test_what_stops_one_rank_is_said_by_the_others(tmp_path, fault, failing):
    assert run_team(2, tmp_path / "run", fault=fault, profile=False) == [3, 3]
    assert (tmp_path / f"run.rank{failing}").read_text() == "the moon is full"
    other = (tmp_path / f"run.rank{1 - failing}").read_text()
    assert other.endswith(f"lost contact with the other ranks: rank {failing} stopped: the moon is full")


def test_a_layer_that_forward_never_calls_is_left_out_of_the_reduction(tmp_path):
    assert run_team(2, tmp_path / "run", model=f"{NETS}:left_over", profile=False, epochs=3) == [0, 0]
    trace = ptsim.read_trace(tmp_path / "run")
    assert sum(r.channels_removed for r in trace.reconfigurations) > 0
    for epoch in trace.epochs:
        idle = 9 * 7 * 3 * 3 + 9
        assert epoch.allreduce_bytes == 4 * (trace.network_of(epoch).num_parameters - idle) * epoch.num_iterations
    assert ptsim.load_model(tmp_path / "run", trust=True).left_over.weight.shape == (9, 7, 3, 3)


@pytest.mark.slow
def test_a_rank_may_be_slower_than_the_ranks_may_take_to_connect(tmp_path):
    assert run_team(2, tmp_path / "run", fault="is slow", model=PLAIN, profile=False, epochs=3) == [0, 0]


def test_ranks_that_would_prune_differently_stop(tmp_path):
    assert run_team(2, tmp_path / "run", fault="drifts", model=PLAIN, profile=False) == [3, 3]
    message = (tmp_path / "run.rank0").read_text()
    assert message == "the ranks disagree about what to prune: rank 1 differs from rank 0"
    assert ptsim.read_trace(tmp_path / "run").end.status == "failed"


def test_a_rank_that_dies_ends_the_others_with_a_clear_error_and_the_run_goes_on(tmp_path, alone):
    folder = tmp_path / "run"
    assert run_team(2, folder, fault="dies", model=PLAIN, profile=False) == [3, -signal.SIGKILL]
    assert (tmp_path / "run.rank0").read_text().startswith("rank 0 lost contact with the other ranks")
    stopped = ptsim.read_trace(folder)
    assert (stopped.end.status, len(stopped.epochs)) == ("failed", 2)
    assert run_team(2, folder) == [0, 0]
    assert ptsim.read_trace(folder).epochs[-1].train_loss == pytest.approx(alone.epochs[-1].train_loss, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_noticed_within_thirty_seconds(tmp_path, killed):
    """Rank 0 holds the store in which the ranks say why they stop: without it the other one has its sentence too."""
    folder = tmp_path / "run"
    team = start_team(2, folder, model=PLAIN, profile=False, epochs=10_000)
    try:
        trace, deadline = folder / "trace.jsonl", time.monotonic() + 120
        while time.monotonic() < deadline and not (trace.exists() and b'"record":"epoch"' in trace.read_bytes()):
            time.sleep(0.02)
        os.kill(team[killed].pid, signal.SIGKILL)
        other = 1 - killed
        team[other].join(timeout=30)
        assert team[other].exitcode == 3  # None while it runs
        (told,) = (tmp_path / f"run.rank{other}").read_text().splitlines()
        assert re.match(rf"rank {other} lost contact with the other ranks: \w", told)
    finally:
        for process in team:
            process.kill()
            process.join()


def test_a_mini_batch_that_cannot_be_shared_is_refused_on_every_rank(tmp_path):
    assert run_team(2, tmp_path / "run", batch=15) == [3, 3]
    assert "mini-batch of 15 cannot be shared equally by 2 ranks" in (tmp_path / "run.rank1").read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "rank 1 was started with seed = 1, rank 0 with 0"),
        ({"lr": 0.1}, "rank 1 was started with lr = 0.1, rank 0 with 0.05"),
        ({"penalty_ratio": 0.2}, "rank 1 was started with penalty_ratio = 0.2, rank 0 with 0.5"),
        ({"interval": 1}, "rank 1 was started with interval = 1, rank 0 with 2"),
    ],
    ids=["seed", "lr", "penalty", "interval"],
)
def test_ranks_that_were_started_differently_stop_at_once(tmp_path, changes, message):
    assert run_team(2, tmp_path / "run", on_rank_1=changes) == [3, 3]
    assert {(tmp_path / f"run.rank{rank}").read_text() for rank in range(2)} == {message}
    assert not (tmp_path / "run").exists()


def test_a_rank_that_begins_anew_where_the_others_resume_stops_them_at_once(tmp_path):
    assert run_team(2, tmp_path / "run", epochs=1) == [0, 0]
    assert run_team(2, tmp_path / "run", fault="begins anew", epochs=1) == [3, 3]
    told = {(tmp_path / f"run.rank{rank}").read_text() for rank in range(2)}
    assert told == {"rank 1 was started with resume = False, rank 0 with True"}


def test_wrong_input_that_only_rank_0_can_see_is_raised_on_every_rank(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("mine")
    assert run_team(2, tmp_path / "run") == [3, 3]
    assert "is not empty" in (tmp_path / "run.rank1").read_text()


def test_torchrun_restarts_a_team_that_lost_a_rank_and_it_resumes(tmp_path):
    """`train.py` kills rank 1 in its first life, in the second epoch."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys\n"
        "from ptsim.training import loop\n"
        "if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    original = loop.train_epoch\n"
        "    def train_epoch(learner, *arguments, **options):\n"
        "        if learner.next_epoch == 2:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return original(learner, *arguments, **options)\n"
        "    loop.train_epoch = train_epoch\n"
        "from ptsim.cli.main import main\n"
        "main()\n"
    )
    options = [f"--set={key}={str(value).lower() if value is False else value}" for key, value in settings(
        model=PLAIN, profile=False, epochs=3
    ).items()]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*command, str(script), "train", *options, f"--out={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    trace = ptsim.read_trace(tmp_path / "run")
    assert trace.complete
    assert [epoch.epoch for epoch in trace.epochs] == [0, 1, 2]
    assert trace.run.world_size == 2
