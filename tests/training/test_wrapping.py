import copy
import shutil

import pytest
import torch
from torch import nn

from ptsim.errors import TrainingError
from ptsim.training import wrapping
from ptsim.training.config import make_config
from ptsim.training.distributed import Reduction, Team
from ptsim.training.wrapping import CompiledOnce, synchronised, wrap
from tests.training.nets import small
from tests.training.runs import settings


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler for a CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_inductor_really_compiles_once_gives_the_same_and_refuses_a_second_shape():
    from torch._dynamo.utils import counters

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    alone = copy.deepcopy(model)
    counters.clear()
    compiled = CompiledOnce(model, backend="inductor")
    for seed in range(3):
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        ours, theirs = compiled(images), alone(images)
        torch.testing.assert_close(ours, theirs)
        ours.square().sum().backward()
        theirs.square().sum().backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert compiled.num_compilations == counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == 2  # and backward
    with pytest.raises(TrainingError, match="would be compiled a second time"):
        compiled(torch.rand(3, 3, 8, 8))


def test_the_synchronised_twin_shares_parameters_and_statistics_and_leaves_the_model_as_it_is():
    model = small(10)
    alone = copy.deepcopy(model)
    twin = synchronised(model)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in twin.modules())
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    images = torch.rand(4, 3, 8, 8)
    twin(images).sum().backward()  # one rank: nothing to synchronise
    alone(images).sum().backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert model.stem[1].num_batches_tracked == 1


@pytest.mark.parametrize("alike", [False, True])
def test_a_rank_without_memory_only_finishes_a_pass_whose_exchanges_are_the_gradients_alone(
    tmp_path, monkeypatch, alike
):
    """Synchronised statistics are exchanged in forward and backward: zeros for gradients would meet those."""
    monkeypatch.setattr(wrapping, "synchronised", lambda model: model)  # DDP takes a synchronised twin on GPUs only
    config = make_config(settings(dynamic_batch=True, sync_batch_norm=alike))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = wrap(small(10), config, Team(rank=0, world_size=2, backend="gloo", device=torch.device("cpu")))
        assert Reduction(module).can_be_finished is not alike
    finally:
        torch.distributed.destroy_process_group()


def test_a_machine_without_memory_is_no_fault_of_the_compiled_model():
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    compiled = CompiledOnce(torch.nn.Linear(3, 2), backend=lambda *_: full)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        compiled(torch.rand(4, 3))
