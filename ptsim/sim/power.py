"""How many joules a projected run takes: GPUs that compute, and GPUs that wait."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ptsim.costs.energy import PowerModel, PowerSample, fit_power, is_plausible, published_power, step_energy
from ptsim.costs.scaling import slowdown, slowed
from ptsim.costs.step import StepTime, step_time
from ptsim.sim.planning import Stage
from ptsim.sim.projection import EpochProjection
from ptsim.sim.scenario import Scenario
from ptsim.sim.work import StepResult
from ptsim.trace.schema import Epoch


class Power:
    """The watts of a scenario's device, from the recorded powers where the run was on it, else its data sheet."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.model: PowerModel | None = None
        if scenario.device.power_w > scenario.device.idle_power_w:
            self.model = scenario.cache.get(("power", scenario.device_key), self._fit)

    @property
    def relative_error(self) -> float:
        """Half-width of the 90 % interval of the model's watts."""
        return 0.0 if self.model is None else self.model.relative_error

    def step_j(self, stage: Stage, step: StepTime, result: StepResult) -> float | None:
        """Joules of one step on one GPU: what it computes, and the rest of the step, for which it waits.

        The rest is communication, the gradients' hooks, slower GPUs, input, and by how much a straggler is slowed down.

        Args:
            stage: of the run.
            step: one pass with the update of all parameters.
            result: the simulated step.
        """
        model, scenario = self.model, self.scenario
        if model is None:
            return None
        setting = scenario.setting(stage.batch, stage.epoch)
        passes = scenario.num_passes(stage.batch, stage.epoch)
        own = step.accumulated(passes).updating(setting.update_share)
        slower = slowdown(scenario.cluster, scenario.num_gpus)
        key = ("energy", model, stage.id, scenario.device_key, setting.alone, setting.update_share, passes, slower)
        computing_j = scenario.cache.get(key, lambda: step_energy(own, scenario.device, model=model).joules)
        return computing_j + max(0.0, result.step_s - own.compute_s) * model.waiting_w

    def run_j(self, epochs: Sequence[EpochProjection], fixed_s: float, faults_s: float) -> float | None:
        """Joules of all GPUs over the run; they wait while it reconfigures, and work at their mean power in faults."""
        energies = [epoch.energy_j for epoch in epochs if epoch.energy_j is not None]
        if self.model is None or len(energies) < len(epochs):
            return None
        training_j, training_s = math.fsum(energies), math.fsum(epoch.total_s for epoch in epochs)
        lost = faults_s / training_s if training_s else 0.0
        return training_j * (1 + lost) + self.scenario.num_gpus * fixed_s * self.model.waiting_w

    def run_range_j(
        self, energy_j: float | None, low: float, high: float, low_s: float
    ) -> tuple[float | None, float | None]:
        """The 90 % interval of `run_j`; time, between `low` and `high` times the expected, and power err independently.

        No board takes less than its idle power over the shortest time, `low_s`.
        """
        if energy_j is None:
            return None, None
        idle_j = self.scenario.num_gpus * low_s * self.scenario.device.idle_power_w
        least = max(energy_j * (1 - math.hypot(1 - low, self.relative_error)), idle_j)
        return least, energy_j * (1 + math.hypot(high - 1, self.relative_error))

    def _fit(self) -> PowerModel:
        scenario = self.scenario
        samples = []
        if scenario.measurements.source_device == scenario.device:
            for epoch in scenario.trace.epochs:
                power_w = epoch.mean_power_w
                if power_w is None or not is_plausible(scenario.device, power_w):
                    continue
                step = self._recorded_step_time(epoch)
                waiting_s = max(0.0, epoch.time.wall_s / epoch.num_iterations - step.compute_s)
                samples.append(PowerSample(step=step, waiting_s=waiting_s, power_w=power_w))
        return fit_power(scenario.device, samples) if samples else published_power(scenario.device)

    def _recorded_step_time(self, epoch: Epoch) -> StepTime:
        scenario, setting = self.scenario, self.scenario.trace.setting_of(epoch).alone
        alone = scenario.cache.get(
            ("step", epoch.architecture, scenario.device_key, setting),
            lambda: step_time(
                scenario.trace.network_of(epoch), scenario.device, setting, measurements=scenario.measurements
            ),
        )
        return slowed(alone, epoch.world_size, on_gpus=scenario.device.is_gpu)
