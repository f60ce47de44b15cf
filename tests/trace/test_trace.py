"""What a whole run tells of its steps, its network and its penalty."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ptsim.network import LayerKind
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace, product_sizes
from tests.traces import dense_trace, residual_network, shrinking_trace


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return read_trace(shrinking_trace(tmp_path_factory.mktemp("run") / "t.jsonl"))


def test_the_steps_of_an_epoch_are_those_of_its_own_ranks_passes_and_mini_batch(pruned: Trace) -> None:
    """Of a run that began on one GPU and went on with four, two passes and no penalty."""
    first, second, *rest = pruned.epochs
    later = msgspec.structs.replace(second, world_size=4, batch_per_gpu=96, passes=2, penalty_coefficient=0.0)
    trace = msgspec.structs.replace(pruned, epochs=(first, later, *rest))
    assert trace.run.world_size == 1
    found = [trace.setting_of(epoch) for epoch in trace.epochs[:2]]
    assert [(s.num_gpus, s.batch, s.passes, s.regularizer) for s in found] == [
        (1, 64, 1, "group_lasso"),
        (4, 96, 2, None),
    ]


def test_a_layer_that_forward_calls_again_has_the_weights_of_its_first_call() -> None:
    """A convolution of 3 · 3 · 16 · 16 weights; what it is called the second time counts neither them nor its 16."""
    network = residual_network()
    channels, weights = product_sizes(network)
    again = msgspec.structs.replace(network.layer("layer1.0.conv1"), name="layer1.0.conv1:1")
    twice, beside = (
        product_sizes(msgspec.structs.replace(network, layers=(*network.layers, layer)))
        for layer in (again, msgspec.structs.replace(again, name="other"))
    )
    assert twice == (channels, weights)
    assert beside == (channels + 16, weights + 9 * 16 * 16)
    products = [layer for layer in network.layers if layer.kind in (LayerKind.CONV, LayerKind.LINEAR)]
    assert channels == sum(layer.out_channels for layer in products)


@pytest.mark.parametrize(
    ("noted", "regularized", "expected"),
    [
        (0.2, True, 0.2),
        (0.0, True, None),  # a recorder that saw no pruner when the run began
        (0.0, False, 0.0),
        (None, True, None),
        (None, False, 0.0),
    ],
)
def test_the_penaltys_share_is_what_the_run_noted_unless_its_epochs_contradict_it(
    tmp_path: Path, noted: float | None, regularized: bool, expected: float | None
) -> None:
    trace = read_trace((shrinking_trace if regularized else dense_trace)(tmp_path / "t.jsonl"))
    settings = {name: value for name, value in trace.run.hyperparameters.items() if name != "penalty_ratio"}
    settings |= {} if noted is None else {"penalty_ratio": noted}
    run = msgspec.structs.replace(trace.run, hyperparameters=settings)
    assert msgspec.structs.replace(trace, run=run).penalty_ratio == expected
