"""How is the network measured layer by layer while it trains? On a copy, with the run's optimizer and penalty."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ptsim.errors import MissingMeasurementError
from ptsim.measure.profile import profile_network

if TYPE_CHECKING:
    from ptsim.trace.schema import Profile
    from ptsim.training.recorder import Recorder


def layer_profile(recorder: Recorder, batch: int | None = None) -> Profile | None:
    """The present architecture's profile; None before a mini-batch is known, or where the copy does not fit.

    `batch` is the mini-batch of the steps to come; None is that of the last ones, which is also taken where the copy
    does not fit with more images: a mini-batch that has grown leaves hardly any memory for it.
    """
    told = recorder.facts.hyperparameters.get("batch")
    # Of several passes to an update one; not that of a larger mini-batch among the usual ones.
    seen = recorder.watch.batch and min(recorder.watch.batch, recorder.batch_per_gpu)
    usual = seen or (told // recorder.team.world_size if isinstance(told, int) else 0)
    problem = ""
    for images in dict.fromkeys((batch or usual, min(usual, batch or usual))):
        try:
            if images:
                return _profile(recorder, images)
        except MissingMeasurementError as error:  # the copy does not fit beside what trains; the run itself does
            problem = error.message
    if problem:
        warnings.warn(f"no profile of the architecture {recorder.architecture.id}: {problem}", stacklevel=3)
    return None


def _profile(recorder: Recorder, batch: int) -> Profile:
    with recorder.watch.paused():
        return profile_network(
            recorder.network,
            recorder.architecture,
            batch=batch,
            precision=recorder.precision,
            memory_format=recorder.memory_format,
            optimizer=recorder.optimizer,
            regularizer=recorder.regularizer,
            device=recorder.device,
        )
