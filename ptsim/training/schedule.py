"""What happens in which epoch: learning rate, regulariser, reconfiguration. Pure functions of the configuration."""

from __future__ import annotations

import msgspec

from ptsim.errors import UsageError
from ptsim.textfile import LARGEST
from ptsim.training.config import Config
from ptsim.training.rates import rate


class EpochPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch of the plan.

    Attributes:
        learning_rate: before the factor by which a dynamic mini-batch scales it.
        regularized: the group lasso acts.
        reconfigures: the network is pruned after this epoch.
    """

    epoch: int
    learning_rate: float
    regularized: bool
    reconfigures: bool


def epoch_plans(config: Config) -> tuple[EpochPlan, ...]:
    """The plan of every epoch.

    The first `pretrain_epochs` train dense. With the schedule "ssl" the learning-rate schedule runs twice, once over
    them and once over the rest (Wen et al., NeurIPS 2016, sparsify a trained network with a fresh rate). A continuous
    run also reconfigures when the regulariser ends, so that what it hands over is as small as it can be.

    Raises:
        UsageError: a learning rate that is no number or that no optimizer can hold.
    """
    pretrain = (config.pretrain_epochs or 0) if config.schedule != "one_time" else 0
    restart = pretrain if config.schedule == "ssl" else 0  # of the learning rate
    finetune = config.finetune_epochs if config.regularized else 0
    sparse_end = config.epochs - finetune  # the first epoch after the regulariser
    plans = []
    for epoch in range(config.epochs):
        start, length = (0, restart) if epoch < restart else (restart, config.epochs - restart)
        regularized = config.regularized and pretrain <= epoch < sparse_end
        plans.append(
            EpochPlan(
                epoch=epoch,
                learning_rate=rate(epoch - start, length, config),
                regularized=regularized,
                reconfigures=regularized and _reconfigures_after(config, epoch - pretrain + 1, sparse_end - pretrain),
            )
        )
    for plan in plans:
        if not 0 <= plan.learning_rate <= LARGEST:
            found = f"the learning rate of epoch {plan.epoch} is {plan.learning_rate:g}"
            raise UsageError(f"{found}, expected 0 to {LARGEST:g}", hint="lr and lr_gamma decide it")
    return tuple(plans)


def _reconfigures_after(config: Config, done: int, length: int) -> bool:
    """Whether the network is pruned once `done` of `length` regularised epochs are over."""
    if config.schedule == "one_time":
        return done == config.reconfigure_epoch
    if config.schedule == "ssl":
        return done == length
    return done % config.interval == 0 or done == length
