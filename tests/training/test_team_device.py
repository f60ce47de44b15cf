import pytest
import torch

from ptsim.training import distributed


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_under_torchrun_every_local_rank_has_a_gpu_of_its_own_also_when_a_run_is_resumed(monkeypatch, name):
    """A run records "cuda:0", which is rank 0's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert [distributed._device(name, rank).index for rank in range(4)] == [0, 1, 2, 3]
    assert distributed._device("cuda:2", None).index == 2
