"""How long does the input pipeline need for a GPU's mini-batch, and from how many GPUs on does a run wait for it?"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import msgspec

from ptsim.costs.input import SPREAD, STORED_PIXELS, Supply, find_pipeline, limiting_gpus, supply
from ptsim.sim.ddp import Bound
from ptsim.sim.scenario import Scenario
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace
from ptsim.units import shown_number

_SMALL_PIXELS = 128 * 128  # images of data sets below it are stored as large as they are seen


class Feed:
    """The input of one scenario's GPUs."""

    def __init__(self, scenario: Scenario) -> None:
        """Look up what feeds them.

        Raises:
            UsageError: a pipeline, and a cluster that does not say how many cores a node has.
        """
        self.scenario, self.options, self.cluster = scenario, scenario.options, scenario.cluster
        if self.options.input_storage_bytes_per_s is not None:
            self.cluster = msgspec.structs.replace(
                self.cluster, storage_bandwidth_bytes_per_s=self.options.input_storage_bytes_per_s
            )
        self.supply: Supply | None = None if self.options.input == "none" else self._supply()

    @functools.cached_property
    def images_per_s(self) -> float | None:
        """What one GPU is given; None where input keeps up."""
        rate = self.options.input_images_per_s
        if self.supply is not None:
            return self.supply.images_per_s
        if isinstance(rate, str):  # "recorded"
            fastest = _fastest_that_waited(self.scenario.trace)
            return None if fastest is None else 1 / _pace_s(fastest)
        return rate

    def interval_s(self, batch: int, bound: Bound = "expected") -> float:
        """Seconds that the pipeline needs for one GPU's mini-batch; 0: it keeps up.

        Args:
            batch: images of the mini-batch.
            bound: end of the interval; only a pipeline's own rate is uncertain.
        """
        if self.images_per_s is None:
            return 0.0
        if self.supply is None or bound == "expected":
            return batch / self.images_per_s
        return batch / self._supply(SPREAD if bound == "low" else 1 / SPREAD).images_per_s

    def limiting_gpus(self, needed: Iterable[float], among: Iterable[float] | None = None) -> int | None:
        """From how many GPUs of a node on the pipeline is the limit of the epoch that needs most.

        Args:
            needed: images per second and GPU, of every epoch, that the GPUs could train on.
            among: the same of a GPU among others, if `needed` is of one that is alone.

        Returns:
            None where no number of GPUs of one node is, or where no pipeline was named.
        """
        if self.supply is None:
            return None
        return limiting_gpus(
            find_pipeline(self.options.input),
            self.cluster,
            max(needed),
            among=None if among is None else max(among),
            output_pixels=self._output_pixels,
            stored_pixels=self._stored_pixels,
        )

    def notes(self, needed: Iterable[float], among: Iterable[float] | None = None) -> list[str]:
        """What is to be known of the pipeline; the numbers are those of `limiting_gpus`."""
        found, cluster, name = self.supply, self.cluster, self.options.input
        if found is None:
            return self._recorded_notes()
        needed = tuple(needed)
        number = self.limiting_gpus(needed, among)
        on_gpu = find_pipeline(name).decode_pixels_per_s_gpu is not None
        what = {
            "cores": f"the {cluster.cores_per_node} cores of a node",
            "GPU": "what one GPU decodes" if on_gpu else "what one loader process hands over",
            "storage": "the storage of a node",
        }[found.limit]
        said = f"{name} gives each GPU up to {found.images_per_s:,.0f} images/s ({what})"
        per_node = cluster.gpus_per_node
        fewer = self.scenario.num_gpus * self.options.jobs < per_node  # more may each take a little less than these
        verdict = (
            f"{'if every GPU takes as many, ' if fewer else ''}the pipeline is the limit from {number} of {per_node} "
            "GPUs per node on"
            if number
            else f"the pipeline is no limit, even with all {per_node} GPUs of a node"
        )
        notes = [f"{said}; the GPU could take {max(needed):,.0f}: {verdict}"]
        if self._output_pixels < _SMALL_PIXELS:
            notes.append(f"the published rates of {name} are of larger images: they are scaled by the number of pixels")
        return notes

    def _recorded_notes(self) -> list[str]:
        """Which rate was taken from the recorded run, and how much that says of its loader."""
        if self.options.input_images_per_s != "recorded":
            return []
        fastest = _fastest_that_waited(self.scenario.trace)
        if fastest is None:
            return ["the recorded run did not wait for data, so the projection has no waiting for input either"]
        rate, share = shown_number(None, 1 / _pace_s(fastest)), fastest.time.data_wait_s / fastest.time.wall_s
        return [
            f"each GPU is given {rate} images/s, the pace of the recorded run, which "
            f"waited for data {share:.0%} of the time: a loader that was not busy the rest of the time can give more"
        ]

    @property
    def _output_pixels(self) -> int:
        return math.prod(self.scenario.trace.run.dataset.input_shape[1:])

    @property
    def _stored_pixels(self) -> int:
        given = self.options.input_stored_pixels
        if given is not None:
            return given
        return STORED_PIXELS if self._output_pixels >= _SMALL_PIXELS else self._output_pixels

    def _supply(self, speed: float = 1.0) -> Supply:
        return supply(
            find_pipeline(self.options.input),
            self.cluster,
            self.scenario.num_gpus * self.options.jobs,  # however they are placed, they fill nodes one after the other
            output_pixels=self._output_pixels,
            stored_pixels=self._stored_pixels,
            speed=speed,
        )


def _fastest_that_waited(trace: Trace) -> Epoch | None:
    """The fastest recorded epoch in which the loader ever made the run wait; None: it was no limit.

    It was busy all the time then, and can do what it did in that epoch.
    """
    waited = [
        epoch
        for epoch in trace.epochs
        if epoch.measured_time is not None and epoch.time.data_wait_s >= 0.01 * epoch.time.wall_s and epoch.num_images
    ]
    return min(waited, key=_pace_s, default=None)


def _pace_s(epoch: Epoch) -> float:
    """Seconds per image of one rank."""
    return epoch.time.wall_s * epoch.world_size / epoch.num_images
