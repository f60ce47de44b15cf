import copy
import shutil

import pytest
import torch
from torch import nn

from ptsim.errors import TrainingError
from ptsim.training.wrapping import CompiledOnce, synchronised
from tests.training.nets import small


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
