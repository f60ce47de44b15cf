import copy

import torch

from ptsim.training.wrapping import synchronised
from tests.training.nets import small


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
