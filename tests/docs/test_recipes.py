"""The recipes of CONTRIBUTING.md work: each code block is run from outside the package, and what it adds is used."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ptsim
from ptsim import zoo
from ptsim.costs.algorithms import remove_algorithm
from ptsim.criteria import CRITERIA
from ptsim.hardware.catalog import load_cluster, load_device
from ptsim.network import Precision
from ptsim.report.facts import Facts
from ptsim.report.figures.registry import FIGURES, figures_of
from tests.traces import dense_trace, residual_network

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(heading: str, language: str) -> str:
    """The code block under the heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return str(code)


def run_recipe(heading: str) -> dict[str, Any]:
    """The names that the code block under the heading defines."""
    code = block(heading, "python")
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)  # the page is ours
    return names


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    vars(zoo)["_ENTRIES"].pop("tiny", None)
    CRITERIA.remove("gentle_lasso")
    FIGURES.remove("epoch_seconds")
    remove_algorithm("star")


def test_the_recipe_for_a_network() -> None:
    run_recipe("Add a network")
    assert ptsim.inspect("tiny").exact


@pytest.mark.slow
def test_the_recipe_for_a_criterion() -> None:
    run_recipe("Add a pruning criterion")
    gradients = []
    for criterion in ("group_lasso", "gentle_lasso"):
        torch.manual_seed(0)
        model = zoo.find("resnet20").build(num_classes=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = ptsim.PruneTrain(model, optimizer, input_shape=(3, 32, 32), criterion=criterion)
        images = torch.randn(2, 3, 32, 32)
        loss = model(images).square().mean()
        loss.backward()
        weight = next(model.parameters())
        before = weight.grad.clone()
        pruner.step(loss)
        gradients.append(weight.grad - before)
        pruner.close()
    torch.testing.assert_close(gradients[1], gradients[0] / 2, rtol=1e-3, atol=1e-7)


def test_the_recipe_for_a_figure(tmp_path: Path) -> None:
    run_recipe("Add a figure to the report")
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", epochs=2, blocks=(1, 1, 1), widths=(4, 8, 8)))
    shown = {name: (row, frame) for name, row, frame in figures_of("runs", Facts([trace], []))}
    row, frame = shown["epoch_seconds"]
    assert row.draw(frame).axes


def test_the_recipe_for_a_cluster_starts_from_a_file_that_is_read() -> None:
    assert load_cluster(ROOT / "examples" / "own_cluster.toml").gpus_per_node == 4


def test_the_recipe_for_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "my-gpu.toml").write_text(block("Add a GPU", "toml"), encoding="utf-8")
    device = load_device(tmp_path / "my-gpu.toml")
    assert device.peak_flops_per_s[Precision.FP32] == 2 * 128 * 80 * 2.5e9  # 128 cores an SM
    assert ptsim.predict(residual_network(), gpu=tmp_path / "my-gpu.toml", batch=64).step_seconds > 0


def test_the_recipe_for_an_all_reduce_algorithm() -> None:
    """GPU 0 takes 7 messages in and sends 7 out, where every GPU of a ring sends 2 · 7/8 of one."""
    run_recipe("Add an all-reduce algorithm")
    star, ring = (ptsim.allreduce("dgx-a100", 8, 10**9, algorithm=name) for name in ("star", "ring"))
    assert star.algorithm == "star"
    assert star.seconds == pytest.approx(8 * ring.seconds, rel=0.2)
