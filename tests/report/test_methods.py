"""What the page says of its assumptions and of how the runs were made."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.costs.scaling import load_scaling
from ptsim.report.facts import Facts
from ptsim.report.methods import assumptions_table, methods_facts
from ptsim.sim.options import Options
from ptsim.trace.trace import Trace
from tests.report.simulated import FixedProjector, epoch_projection, run_projection
from tests.traces import CPU, dense_trace, shrinking_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return ptsim.read_trace(dense_trace(tmp_path_factory.mktemp("methods") / "d.jsonl"))


def assumed(trace: Trace, options: Options, *tiers: str) -> dict[str, str]:
    """What the table says of the run on four GPUs, whose epochs' times come from these tiers."""
    epochs = tuple(epoch_projection(epoch=number, tier=tier) for number, tier in enumerate(tiers or ("measured",)))
    projector = FixedProjector({False: run_projection(epochs=epochs)}, options=options, grid_grams_per_kwh=400.0)
    frame = assumptions_table(Facts([trace], [], projectors=[projector], sizes=[4], focus=4)).frame
    return dict(zip(frame.what, frame.value, strict=True))


def test_what_the_numbers_rest_on_by_hand(trace: Trace) -> None:
    usual, fitted = assumed(trace, Options()), load_scaling()
    assert usual == {
        "step time, epoch 0: all runs": "measured here",
        "all-reduce times, 4 GPUs: all runs": "data sheet",
        "GPU to GPU, one direction": "NVLink 3 over NVSwitch, 300 GB/s",
        "node to node, one direction": "8 x HDR InfiniBand 200 Gbit/s, 200 GB/s",
        "a100-sxm4-40gb: memory": "40.0 GiB",
        "a100-sxm4-40gb: memory bandwidth": "1,555 GB/s",
        "a100-sxm4-40gb: fp32 peak": "19.5 TFLOP/s",
        "price": "none",
        "CO₂ of a kWh": "400 g",
        "overlap": "the default of the kind of link",
        "on several GPUs": f"computation {100 * fitted.slowdown:.1f} % longer, and {100 * fitted.straggle:.1f} % more "
        f"for every doubling of the nodes; {1e6 * fitted.tensor_s:.1f} µs per gradient tensor",
        "input pipeline": "keeps up",
        "mini-batch": "weak scaling",
    }
    given = {"contention": 0.35, "scaling": "strong", "input_images_per_s": 250.0, "price_usd_per_gpu_hour": 1.5}
    other = assumed(trace, msgspec.structs.replace(Options(), **given))
    assert (other["overlap"], other["mini-batch"], other["price"]) == (
        "35 % slower",
        "strong scaling",
        "1.50 USD per GPU-hour",
    )
    assert other["input pipeline"] == "250.0 images/s"
    assert assumed(trace, Options(input="dali"))["input pipeline"] == "dali on 128 cores per node"


def test_by_how_much_a_link_is_held_up_is_said_as_fitted(trace: Trace) -> None:
    epochs = (epoch_projection(),)
    facts = Facts([trace], [], projectors=[FixedProjector({False: run_projection(epochs=epochs)})], sizes=[4], focus=4)
    frame = assumptions_table(facts).frame.set_index("what")
    assert "(over TCP by 5 %, elsewhere by 20 %, unless given)" in frame.source["overlap"]


def test_every_stretch_of_epochs_has_the_tier_that_made_its_times(trace: Trace) -> None:
    here, there = "measured", "scaled"
    rows = assumed(trace, Options(), here, here, there, here, there, there, here, here, here)
    steps = {what: value for what, value in rows.items() if what.startswith("step time")}
    assert steps == {
        "step time, epochs 0 to 1, 3 and 6 to 8: all runs": "measured here",
        "step time, epochs 2 and 4 to 5: all runs": "carried over",
    }


def test_what_runs_share_is_said_once_and_what_they_do_not_beside_them(tmp_path: Path) -> None:
    runs = [dense_trace(tmp_path / "d.jsonl", device=CPU), shrinking_trace(tmp_path / "p.jsonl", world_size=4)]
    facts = dict(methods_facts([ptsim.read_trace(path) for path in runs]))
    shared = facts["configuration of all"]
    assert "epochs 6" in shared
    assert "penalty_ratio" not in shared
    dense, pruned = (name for name in facts if name.endswith(": configuration"))
    assert (facts[dense], facts[pruned]) == ("penalty_ratio 0.0", "penalty_ratio 0.2")
    images = "5,000 training and 1,000 validation images of 3 × 32 × 32, 10 classes"
    first, second = (facts[name.removesuffix(": configuration")] for name in (dense, pruned))
    assert images in first
    assert f"CPU {CPU}; started 2026-11-22" in first
    assert "4 GPUs NVIDIA A100-SXM4-40GB, driver 580.95.05; started" in second
    assert facts["software"] == "python 3.12.3, torch 2.15.0, ptsim 0.1.0"


def test_what_only_some_runs_share_is_said_of_each(tmp_path: Path) -> None:
    """Two of 6 epochs, and a third of 4."""
    runs = [dense_trace(tmp_path / "d.jsonl"), shrinking_trace(tmp_path / "p.jsonl")]
    runs += [shrinking_trace(tmp_path / "s.jsonl", epochs=4)]
    facts = dict(methods_facts([ptsim.read_trace(path) for path in runs]))
    assert "epochs" not in facts["configuration of all"]
    told = [said.split(", ")[0] for name, said in facts.items() if name.endswith(": configuration")]
    assert told == ["epochs 6", "epochs 6", "epochs 4"]


def test_a_run_that_went_on_with_more_ranks_names_both_numbers(tmp_path: Path) -> None:
    trace = ptsim.read_trace(dense_trace(tmp_path / "d.jsonl", epochs=2))
    epochs = (trace.epochs[0], msgspec.structs.replace(trace.epochs[1], world_size=4))
    said = " ".join(dict(methods_facts([msgspec.structs.replace(trace, epochs=epochs)])).values())
    assert "1 GPU, then 4 GPUs NVIDIA A100-SXM4-40GB, driver 580.95.05; started" in said
