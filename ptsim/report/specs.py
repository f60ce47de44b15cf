"""What the report's tables show: columns of the tidy frames under headings in words, and which of them share a unit."""

from __future__ import annotations

from ptsim.costs.kernels import LOADED_HALVES
from ptsim.report.tables import TableSpec

PROJECTIONS = TableSpec(
    name="projections",
    title="Whole runs.",
    caption="Projected: training without validation. Intervals are 90 %.",
    headings={
        "run": "run",
        "epochs": "epochs",
        "gpus": "GPUs",
        "total_seconds": "time",
        "low_seconds": "90 % from",
        "high_seconds": "to",
        "compute_seconds": "computing",
        "exposed_communication_seconds": "exposed communi\u00adcation",
        "input_wait_seconds": "waiting for input",
        "gpu_seconds": "GPU time",
        "mfu_fraction": "MFU",
        "allreduce_bytes_per_gpu": "all-reduced per GPU",
        "peak_memory_bytes": "peak memory",
        "tier": "times from",
    },
    together=(("total_seconds", "low_seconds", "high_seconds", "compute_seconds"),),
)

ENERGY = TableSpec(
    name="energy",
    title="Energy and money of whole runs.",
    caption="Projected, all GPUs together: energy of the boards, money for holding them. Intervals are 90 %.",
    headings={
        "run": "run",
        "gpus": "GPUs",
        "energy_joules": "energy",
        "low_energy_joules": "90 % from",
        "high_energy_joules": "to",
        "co2_grams": "CO₂",
        "low_co2_grams": "90 % from",
        "high_co2_grams": "to",
        "cost_usd": "cost",
        "low_cost_usd": "90 % from",
        "high_cost_usd": "to",
        "tier": "times from",
    },
    together=(
        ("energy_joules", "low_energy_joules", "high_energy_joules"),
        ("co2_grams", "low_co2_grams", "high_co2_grams"),
        ("cost_usd", "low_cost_usd", "high_cost_usd"),
    ),
    folded=True,
)

SCENARIOS = TableSpec(
    name="scenarios",
    title="Side by side.",
    caption="Every run on every cluster, projected; savings are against the dense run on the same cluster. Intervals "
    "are 90 %. Model FLOPs utilisation (MFU) is the share of the GPUs' peak arithmetic that the training FLOPs use.",
    headings={
        "cluster": "cluster",
        "gpus": "GPUs",
        "run": "run",
        "epochs": "epochs",
        "total_seconds": "time",
        "low_seconds": "90 % from",
        "high_seconds": "to",
        "mfu_fraction": "MFU",
        "saved_fraction": "time saved",
        "saved_fraction_low": "90 % from",
        "saved_fraction_high": "to",
        "cost_usd": "cost",
        "saved_usd": "money saved",
        "energy_joules": "energy",
        "co2_grams": "CO₂",
        "accuracy": "accuracy",
        "tier": "times from",
    },
    together=(("total_seconds", "low_seconds", "high_seconds"), ("cost_usd", "saved_usd")),
)

BREAK_EVEN = TableSpec(
    name="break_even",
    title="From where on pruning pays.",
    caption="One thing changes at a time. The bandwidth is that of a node's network or, if all GPUs are in one node, "
    "of each GPU's links inside it, in one direction. The mini-batch is that of a GPU at the start.",
    headings={
        "lever": "what changes",
        "at_value": "at",
        "outcome": "pruning",
        "gpus": "GPUs",
        "dense_seconds": "dense",
        "pruned_seconds": "pruned",
        "saved_fraction": "saved",
        "saved_fraction_low": "90 % from",
        "saved_fraction_high": "to",
    },
    together=(("dense_seconds", "pruned_seconds"),),
    folded=True,
)

EXCESS = TableSpec(
    name="excess",
    title="What keeps the time from shrinking with the MACs.",
    caption="Of the run in the headline. If time followed the MACs, every part would shrink to the same share; the "
    "excess is what a part takes above that. Pruning cannot shorten what a mini-batch of one image would take as well: "
    "launches, and the least times of kernels.",
    headings={
        "part": "part",
        "dense_seconds": "dense",
        "pruned_seconds": "pruned",
        "excess_seconds": "excess",
        "rounded_seconds": f"pruned, channels in multiples of {LOADED_HALVES}",
        "macs_fraction": "training MACs left",
        "floor_fraction": "share that one image would take",
    },
    together=(("dense_seconds", "pruned_seconds", "excess_seconds", "rounded_seconds"),),
    folded=True,
)

SAVINGS = TableSpec(
    name="savings",
    title="What pruning saves.",
    caption="Differences of the projections; negative numbers are losses. Intervals are 90 %; parts of the saving have "
    "none.",
    headings={
        "run": "run",
        "baseline": "against",
        "gpus": "GPUs",
        "dense_seconds": "dense",
        "pruned_seconds": "pruned",
        "saved_seconds": "saved",
        "saved_seconds_low": "90 % from",
        "saved_seconds_high": "to",
        "saved_fraction": "saved share",
        "saved_compute_seconds": "of that, computing",
        "saved_communication_seconds": "communi\u00adcating",
        "saved_input_wait_seconds": "waiting for input",
        "saved_reconfiguration_seconds": "start and reconfi\u00adguring",
        "tier": "times from",
    },
    together=(
        (
            "dense_seconds",
            "pruned_seconds",
            "saved_seconds",
            "saved_seconds_low",
            "saved_seconds_high",
            "saved_compute_seconds",
            "saved_input_wait_seconds",
        ),
        ("saved_communication_seconds", "saved_reconfiguration_seconds"),
    ),
)

SAVED_ENERGY = TableSpec(
    name="saved_energy",
    title="Energy and money that pruning saves.",
    caption="Differences of the projections; negative numbers are losses. Intervals are 90 %.",
    headings={
        "run": "run",
        "baseline": "against",
        "gpus": "GPUs",
        "saved_joules": "energy saved",
        "saved_joules_low": "90 % from",
        "saved_joules_high": "to",
        "saved_co2_grams": "CO₂ saved",
        "saved_co2_grams_low": "90 % from",
        "saved_co2_grams_high": "to",
        "saved_usd": "money saved",
        "saved_usd_low": "90 % from",
        "saved_usd_high": "to",
        "tier": "times from",
    },
    together=(
        ("saved_joules", "saved_joules_low", "saved_joules_high"),
        ("saved_co2_grams", "saved_co2_grams_low", "saved_co2_grams_high"),
        ("saved_usd", "saved_usd_low", "saved_usd_high"),
    ),
    folded=True,
)

MEASURED_SAVINGS = TableSpec(
    name="measured_savings",
    title="What pruning saved where it was recorded.",
    caption="Measured, no projection: training epochs and reconfigurations, without validation; one machine, so no "
    "interval. “Against its first epochs” compares the pruned run with what it would have taken had all its epochs "
    "been as long as its first, unpruned ones; a machine whose speed drifted between the runs does not distort that. "
    "“Same network” is the time of the unpruned network in the pruned run over that in the dense run: 100 % means that "
    "the machine was equally fast in both.",
    headings={
        "run": "run",
        "baseline": "against",
        "device": "on",
        "epochs": "epochs",
        "training_macs_fraction": "training MACs",
        "dense_seconds": "dense",
        "pruned_seconds": "pruned",
        "time_fraction": "time",
        "own_start_fraction": "time, against its first epochs",
        "pace_fraction": "same network",
        "dense_accuracy": "accuracy, dense",
        "pruned_accuracy": "accuracy, pruned",
    },
    together=(("dense_seconds", "pruned_seconds"),),
)

LAYERS = TableSpec(
    name="layers",
    title="Every layer.",
    headings={
        "layer": "layer",
        "kind": "kind",
        "first_channels": "channels, first",
        "last_channels": "channels, last",
        "first_macs_per_image": "forward, first",
        "last_macs_per_image": "forward, last",
        "first_seconds_per_image": "time, first",
        "last_seconds_per_image": "time, last",
        "last_fraction": "last / first",
        "tier": "times from",
    },
    together=(
        ("first_macs_per_image", "last_macs_per_image"),
        ("first_seconds_per_image", "last_seconds_per_image"),
    ),
    folded=True,
)

ARCHITECTURES = TableSpec(
    name="architectures",
    title="Every architecture of the runs.",
    headings={
        "run": "run",
        "first_epoch": "from epoch",
        "last_epoch": "to epoch",
        "batch_per_gpu": "mini-batch per GPU",
        "passes": "passes",
        "num_gpus": "GPUs",
        "parameters": "parameters",
        "inference_macs_per_image": "inference",
        "training_macs_per_image": "training",
        "bn_bytes_per_image": "BatchNorm traffic",
        "peak_memory_bytes": "peak memory, measured",
        "estimated_memory_bytes": "peak memory where recorded, estimated",
        "projected_memory_bytes": "peak memory, projected",
        "epoch_allreduce_bytes": "gradients per epoch",
        "epoch_seconds": "measured epoch (the middle one)",
    },
    together=(("peak_memory_bytes", "estimated_memory_bytes", "projected_memory_bytes"),),
)

RUNS = TableSpec(
    name="runs",
    title="The recorded runs.",
    caption="Measured on the recording machine; training time is without validation and reconfiguration, energy is of "
    "one GPU.",
    headings={
        "run": "run",
        "model": "network",
        "dataset": "data",
        "seed": "seed",
        "state": "state",
        "epochs": "epochs",
        "final_accuracy": "validation accuracy",
        "measured_seconds": "measured training time",
        "energy_joules": "measured energy",
        "first_parameters": "parameters, first",
        "last_parameters": "parameters, last",
        "first_inference_macs_per_image": "inference, first",
        "last_inference_macs_per_image": "inference, last",
        "num_reconfigurations": "reconfigu\u00adrations",
        "reconfiguration_seconds": "time in them",
    },
    together=(
        ("first_parameters", "last_parameters"),
        ("first_inference_macs_per_image", "last_inference_macs_per_image"),
    ),
)

RECONFIGURATIONS = TableSpec(
    name="reconfigurations",
    title="Reconfigurations.",
    caption="What every shrinking removed, and what it cost; measured.",
    headings={
        "run": "run",
        "after_epoch": "after epoch",
        "channels_removed": "channels removed",
        "layers_removed": "layers removed",
        "parameters_before": "parameters before",
        "parameters_after": "parameters after",
        "inference_macs_per_image_after": "inference after",
        "batch_before": "mini-batch before",
        "batch_after": "mini-batch after",
        "duration_seconds": "duration",
        "notes": "notes",
    },
    together=(("parameters_before", "parameters_after"),),
)

VALIDATION = TableSpec(
    name="validation",
    title="Whole runs on the recording machine.",
    caption="Training epochs and reconfigurations. An error is the predicted less the measured time, as a share of the "
    "measured one.",
    headings={
        "run": "run",
        "measured_seconds": "measured",
        "predicted_seconds": "predicted",
        "low_seconds": "90 % from",
        "high_seconds": "to",
        "error": "error of the run",
        "epoch_error": "mean error of an epoch",
        "inside_fraction": "epochs inside their interval",
        "notes": "notes",
    },
    together=(("measured_seconds", "predicted_seconds", "low_seconds", "high_seconds"),),
)

SAVINGS_CHECKED = TableSpec(
    name="savings_checked",
    title="Savings on the recording machine.",
    caption="Time per epoch that pruning saved, reconfigurations included, as a share of the dense time; negative if "
    "it cost time. An error is the predicted less the measured share.",
    headings={
        "pruned": "pruned",
        "dense": "dense",
        "measured_saving": "measured",
        "predicted_saving": "predicted",
        "error_points": "error",
    },
)

ASSUMPTIONS = TableSpec(
    name="assumptions",
    title="Assumptions, and where every time comes from.",
    headings={"what": "what", "value": "value", "source": "where it comes from"},
)
