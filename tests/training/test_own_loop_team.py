"""PruneTrain in an own loop with DistributedDataParallel on two ranks."""

import socket
import warnings

import pytest
import torch
from torch import nn

import ptsim
from tests.training.nets import plain
from tests.training.runs import servant
from tests.training.test_own_loop import images_and_labels, made, sgd, train


def loop_as_rank(rank, world_size, port, folder):
    """Each rank takes its half of every mini-batch; its weights end in `folder`.rank."""
    warnings.filterwarnings("ignore", "the network has collapsed")
    torch.set_num_threads(1)
    if world_size > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    network = plain(10)  # no BatchNorm: half a mini-batch then gives half of the gradient
    optimizer = sgd(network)
    wrap = nn.parallel.DistributedDataParallel if world_size > 1 else nn.Identity
    pruner = made(
        wrap(network) if world_size > 1 else network,
        optimizer,
        record=folder,
        rewrap=wrap if world_size > 1 else None,
        facts=ptsim.RunFacts(model="plain"),
    )
    share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
    batches = [(images[share], labels[share]) for images, labels in images_and_labels()]
    for _ in range(4):
        train(pruner, pruner.recorder.module, optimizer, 1, batches)
    torch.save([p.detach() for p in network.parameters()], folder.with_suffix(f".rank{rank}"))
    pruner.close()
    if world_size > 1:
        torch.distributed.destroy_process_group()


def run(world_size, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = [servant().Process(target=loop_as_rank, args=(rank, world_size, port, folder)) for rank in range(world_size)]
    for process in team:
        process.start()
    for process in team:
        process.join(timeout=180)
    assert [process.exitcode for process in team] == [0] * world_size
    return ptsim.read_trace(folder)


def test_two_ranks_prune_alike_and_as_one_process_with_the_whole_mini_batch(tmp_path):
    alone, team = run(1, tmp_path / "alone"), run(2, tmp_path / "team")
    ours, theirs = (torch.load(tmp_path / f"team.rank{rank}", weights_only=True) for rank in range(2))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert sum(event.channels_removed for event in team.reconfigurations) > 0
    assert [event.after for event in team.reconfigurations] == [event.after for event in alone.reconfigurations]
    assert (team.run.world_size, team.run.backend) == (2, "gloo")
    assert (team.bucket_views, team.broadcasts_buffers) == (False, True)  # DistributedDataParallel's defaults
    assert "broadcast_buffers" not in alone.run.hyperparameters
    for pair in zip(team.epochs, alone.epochs, strict=True):
        assert pair[0].penalty_coefficient == pytest.approx(pair[1].penalty_coefficient, rel=1e-5)
        assert pair[0].train_loss == pytest.approx(pair[1].train_loss, rel=1e-4)
        assert (pair[0].num_images, pair[0].batch_per_gpu) == (64, 8)
    assert team.epochs[0].allreduce_bytes == 4 * 4 * team.network_of(team.epochs[0]).num_parameters
