import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptsim.training.config import make_config
from ptsim.training.schedule import epoch_plans


def planned(**changes):
    return epoch_plans(make_config({"dataset": "digits"} | changes))


def reconfigured(epochs):
    return [p.epoch for p in epochs if p.reconfigures]


def test_the_papers_cifar_run_decays_at_91_and_136():
    rates = [p.learning_rate for p in planned(epochs=182)]
    assert rates[90] == 0.1
    assert rates[91] == pytest.approx(0.01)
    assert rates[135] == pytest.approx(0.01)
    assert rates[136] == pytest.approx(0.001)


def test_milestones_of_one_or_more_are_epochs():
    rates = [p.learning_rate for p in planned(epochs=90, lr_milestones=[41, 61, 81])]
    assert [rates[40], rates[41], rates[61], rates[81]] == pytest.approx([0.1, 0.01, 1e-3, 1e-4])


@pytest.mark.parametrize(
    ("epochs", "milestone", "falls"),
    [
        (4, 1, 1),  # an epoch, not the whole run
        (1, 0.5, 1),  # the first epoch has the initial rate
        (3, 0.2, 1),
        (7, 0.5, 3),
        (10, 0.99, 9),
        (100, 0.29, 29),  # 0.29 · 100 is a little less in binary
        (100, 0.58, 58),
    ],
)
def test_a_milestone_below_1_is_a_fraction_rounded_down_to_epochs(epochs, milestone, falls):
    rates = [p.learning_rate for p in planned(epochs=epochs, lr_milestones=[milestone])]
    assert rates == pytest.approx([0.1] * falls + [0.01] * (epochs - falls))


def test_a_warm_up_leaves_an_epoch_at_the_full_rate():
    rates = [p.learning_rate for p in planned(epochs=3, warmup_epochs=9, lr_schedule="cosine")]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])


def test_the_papers_cifar_run_reconfigures_18_times_and_at_the_end():
    assert reconfigured(planned(epochs=182)) == [*range(9, 180, 10), 181]


def test_a_dense_run_never_reconfigures():
    epochs = planned(epochs=20, penalty_ratio=0.0)
    assert reconfigured(epochs) == []
    assert not any(p.regularized for p in epochs)


def test_fine_tuning_is_without_regulariser_and_comes_after_a_last_reconfiguration():
    epochs = planned(epochs=10, interval=3, finetune_epochs=3)
    assert reconfigured(epochs) == [2, 5, 6]
    assert [p.regularized for p in epochs] == [True] * 7 + [False] * 3


def test_the_interval_counts_from_the_first_regularised_epoch():
    assert reconfigured(planned(epochs=12, pretrain_epochs=4, interval=3)) == [6, 9, 11]


def test_one_time_reconfigures_once():
    assert reconfigured(planned(epochs=12, schedule="one_time", reconfigure_epoch=5)) == [4]


def test_ssl_trains_dense_then_sparsifies_with_a_fresh_rate_and_prunes_at_the_end():
    epochs = planned(epochs=20, schedule="ssl", pretrain_epochs=8, finetune_epochs=2, lr_milestones=[0.5])
    assert [p.regularized for p in epochs] == [False] * 8 + [True] * 10 + [False] * 2
    assert reconfigured(epochs) == [17]
    assert [epochs[e].learning_rate for e in (3, 4, 8, 14)] == pytest.approx([0.1, 0.01, 0.1, 0.01])


@pytest.mark.slow
@given(st.integers(1, 60), st.integers(1, 60))
def test_the_last_regularised_epoch_always_reconfigures(epochs, interval):
    assert planned(epochs=epochs, interval=interval)[-1].reconfigures
