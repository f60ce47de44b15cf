"""The scripts behind the data-sheet tier: published rows as cases, the fit, and its cross-validation."""

import importlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ptsim.costs.datasheet import kernel_seconds, load_fit, waiting_seconds

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))

    return importlib.import_module  # once for all tests of this file: the cases take seconds to make


def test_the_shipped_fit_is_near_the_published_throughputs(script):
    rows = script("public_rows")
    cases = [case for case in rows.training_cases() if case.row.framework == "PyTorch" and case.row.batch >= 16]
    fit = load_fit()
    networks = rows.Predictor(cases)
    gpu = np.array([fit.devices[case.device] for case in cases])
    predicted = networks.steps(
        networks.kernel_seconds(fit.efficiency),
        networks.update_seconds(fit.efficiency),
        fit.host,
        gpu=gpu,
        hosts=np.ones(len(cases)),
    )
    error = np.abs(networks.seconds / predicted - 1)
    assert np.median(error) < 0.08
    assert np.quantile(error, 0.9) < 0.25


def test_cases_evaluated_together_are_those_evaluated_one_by_one(script):
    rows = script("public_rows")
    cases = [case for case in rows.training_cases() if case.row.batch == 12][::37]
    fit, networks = load_fit(), rows.Predictor(cases)
    update_s, ones = networks.update_seconds(fit.efficiency), np.ones(len(cases))
    together = networks.steps(networks.kernel_seconds(fit.efficiency), update_s, fit.host, gpu=ones, hosts=3 * ones)
    for case, seconds, update in zip(cases, together, update_s, strict=True):
        kernels_s = kernel_seconds(case.kernels, case.chip, fit.efficiency)
        host = fit.host.times(3.0)
        streaming = fit.efficiency.stream_bandwidth * case.chip.bandwidth_bytes_per_s
        assert update == pytest.approx(case.update.seconds(streaming, fit.efficiency.launch_s))
        waits = waiting_seconds(case.kernels, kernels_s, update, case.update.num_launches, host)
        before = case.extra_s + case.num_zeroed * host.update_s
        assert seconds == pytest.approx(before + kernels_s.sum() + update + waits)


def test_boards_of_one_chip_share_most_of_their_factor(script):
    """Only V100s of 16 GB are slow. Of what they say, 0.09² / (0.09² + 0.04²) is their chip's, so that of 32 GB too."""
    rows, script = script("public_rows"), script("fit_efficiency")
    wanted = ("v100-sxm2-16gb", "v100-sxm2-32gb", "rtx-3090")
    cases = [case for case in rows.training_cases() if case.device in wanted and case.row.batch >= 16]
    problem = script.Problem(cases, rows.layer_cases()[:10])
    slow = np.array([case.device == "v100-sxm2-16gb" for case in cases])
    everywhere = script.Efficiency(**{name: center for name, (center, _) in script.PRIORS.items()})
    problem.networks.seconds = problem.networks(everywhere) * np.where(slow, 1.3, 1.0)
    kept = np.array([case.device != "v100-sxm2-32gb" for case in cases])
    weights = problem.weights(kept, np.zeros(10, np.bool_))
    factor = problem.fitted(problem.solve(weights), weights).device_factor
    own, other, foreign = (math.log(factor[name]) for name in wanted)
    assert other / own == pytest.approx(0.09**2 / (0.09**2 + 0.04**2), abs=0.01)
    assert own - foreign > 0.5 * math.log(1.3)


@pytest.mark.parametrize(("date", "zeroed"), [("2023-02", 161), ("2023-03", 0)])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_the_update_is_that_of_a_rows_software(script, date, zeroed, with_optimizer):
    """161 tensors of 25,557,032 parameters: SGD moves 44 bytes each; zeros, written and added to, 16 more."""
    rows = script("public_rows")
    row = rows.training_table().query("host_copy and model == 'resnet50' and device == 't4' and precision == 'fp32'")
    row = row.assign(date=date, software="torch 1.x", with_optimizer=with_optimizer)
    (case,) = rows.cases_of(row)
    update = 44 * 25_557_032 * with_optimizer
    assert case.num_zeroed == zeroed
    if zeroed:
        kernels = 4 * 161 * with_optimizer
        assert case.update == (update + 16 * 25_557_032, kernels + 2 * 161, kernels)
    else:
        assert case.update == (update, 0, 161 * with_optimizer)
    (streamed,) = rows.cases_of(row.assign(host_copy=False))
    assert streamed.num_zeroed == 0
    (other,) = rows.cases_of(row.assign(framework="TensorFlow"))
    assert (other.num_zeroed, other.update.num_kernels) == (0, 0)


def test_every_published_row_says_where_it_is_from():
    for name in ("training", "training_depthwise", "training_later", "layers", "odd_channels"):
        path = ROOT / "traces" / "public" / f"{name}.csv"
        rows = pd.read_csv(path)
        assert rows[["source", "source_path", "source_rev"]].notna().all().all(), path


def test_single_convolutions_are_predicted_within_a_factor_of_two(script):
    rows = script("public_rows")
    cases = [c for c in rows.layer_cases() if c.row.get("phase") == "forward" and c.row.precision == "fp32"]
    log_ratio = np.log(rows.Predictor(cases)(load_fit().efficiency) / np.array([c.seconds for c in cases]))
    assert np.quantile(np.abs(log_ratio), 0.8) < np.log(2)


def test_a_fit_follows_slower_rows_as_far_as_its_priors_let_it(script):
    rows, fitting = script("public_rows"), script("fit_efficiency")
    cases = [case for case in rows.training_cases() if case.device == "rtx-3090" and case.row.batch > 12][::8]
    layers = rows.layer_cases()[::200]
    first = fitting.fit(cases, layers)
    slower = [type(case)(**(vars(case) | {"seconds": 1.2 * case.seconds})) for case in cases]
    second = fitting.fit(slower, layers)
    networks, known = rows.Predictor(cases), ["rtx-3090"]
    ratio = second.predict(networks, second.shipped(known)) / first.predict(networks, first.shipped(known))
    assert 1.1 < np.median(ratio) < 1.21


def test_rows_are_left_out_near_the_fit_as_they_would_be_by_a_fit_of_their_own(script):
    rows, fitting = script("public_rows"), script("fit_efficiency")
    cases = [case for case in rows.training_cases() if case.row.batch > 12][::6]
    layers = rows.layer_cases()[::100]
    problem = fitting.Problem(cases, layers)
    every, single = np.ones(len(cases), np.bool_), np.ones(len(layers), np.bool_)
    start = problem.solve(problem.weights(every, single))
    kept = np.array([not case.model.startswith("vgg") for case in cases])
    weights = problem.weights(kept, single)
    near = problem.solve(weights, start, problem.jacobian(start))
    own = problem.solve(weights)
    predicted = [
        problem.fitted(x, weights).predict(problem.networks, problem.fitted(x, weights).shipped(["rtx-3090"]))[~kept]
        for x in (near, own)
    ]
    np.testing.assert_allclose(predicted[0], predicted[1], rtol=0.02)


def test_many_rows_of_one_network_on_one_gpu_share_their_weight(script):
    rows, fitting = script("public_rows"), script("fit_efficiency")
    case = next(case for case in rows.training_cases() if case.row.framework == "PyTorch")
    assert sum(fitting._training_weight([case] * 16) ** 2) == pytest.approx(1.0)


def rows_of(way, group, log_ratios, *, device_known=False, waits=False):
    return pd.DataFrame(
        [
            {
                "way": way,
                "device": f"gpu {group}",
                "chip": f"chip {group}",
                "network": f"network {group}",
                "model": "resnet50",
                "precision": "fp16",
                "memory_format": "contiguous",
                "kind": "plain convolutions",
                "waits": waits,
                "measured_images_per_s": 110.0,
                "predicted_images_per_s": 100.0,
                "log_ratio": ratio,
                "below": 0.0,
                "above": 0.0,
                "device_known": device_known,
            }
            for ratio in log_ratios
        ]
    )


def test_intervals_of_normal_residuals_hold_ninety_percent_of_one_more_gpu(script):
    validate = script("cross_validate")
    random = np.random.default_rng(0)
    held = []
    for _ in range(200):
        per_gpu = random.normal(0.05, 0.15, 9)
        rows = pd.concat([rows_of("gpu", g, per_gpu[g] + random.normal(0, 0.02, 5)) for g in range(8)])
        made = validate.interval(rows, "new_device")
        low, high = made.around(1.0, 0.0, 0.0)
        held.append(low <= np.exp(per_gpu[8]) <= high)
    assert 0.83 < np.mean(held) < 0.97


def test_a_gpu_with_many_rows_counts_no_more_than_one_with_few(script):
    validate = script("cross_validate")
    few = pd.concat([rows_of("gpu", g, [g / 10]) for g in range(5)])
    many = pd.concat([rows_of("gpu", g, [g / 10] * (1000 if g == 0 else 1)) for g in range(5)])
    assert validate.interval(many, "new_device").high == pytest.approx(
        validate.interval(few, "new_device").high, abs=0.15
    )


def test_a_row_is_not_asked_of_an_interval_that_its_own_gpu_made(script):
    validate = script("cross_validate")
    calm = [rows_of("gpu", g, [0.0, 0.01, -0.01]) for g in range(6)]
    rows = pd.concat([*calm, rows_of("gpu", "wild", [3.0])], ignore_index=True)
    held = validate.covered(rows, rows[rows.device == "gpu wild"])
    assert not held.inside.any()


def test_the_accuracy_page_states_errors_and_coverage(script, monkeypatch):
    validate = script("cross_validate")
    for name in ("young", "networks_added"):
        monkeypatch.setattr(validate.many_gpus, name, lambda: pd.DataFrame({"of": ["published rows"]}))
    rows = pd.concat(
        [
            rows_of(way, g, [float(g)], device_known=way == "network")
            for way in ("network", "gpu", "both")
            for g in range(3)
        ],
        ignore_index=True,
    )
    many = pd.DataFrame(
        {
            "way": ["GPU", "GPU", "source", "source"],
            "device": ["a10", "a100", "a10", "a100"],
            "num_gpus": [8, 64, 8, 64],
            "log_ratio": [0.1, 0.1, 0.0, 0.0],
            "source": ["x/one", "x/two"] * 2,
            "stepwise": False,
            "below": 0.1,
            "above": 0.1,
            "inside": [True, False, True, True],
            "device_known": [False, False, True, True],
            "alone_log_ratio": [0.0, math.nan, 0.2, math.nan],
            "added_log_ratio": [0.1, math.nan, -0.2, math.nan],
            "measured_efficiency": [0.9, 0.8, 0.9, 0.8],
            "predicted_efficiency": [0.92, 0.84, 0.9, 0.8],
        }
    )
    later = many.head(2).assign(way="later", model="resnet50", precision="fp32", source=["x/two", "x/new"])
    later["log_ratio"] = [0.1, -0.1]
    parts = validate.made(rows, many, later)
    marks = "".join(f"<!-- made: {name} -->\n<!-- end -->\n" for name in parts)
    text = validate.filled(marks, parts)
    assert text.count("| published rows |") == 2
    assert "3 rows, 3 GPUs" in text
    assert "| GPU left out | 3 | 3 | 10.0 |" in text
    # ln(measured / predicted) of 0.1 is a throughput 1 - exp(-0.1) = 9.5 % below the prediction.
    assert "| GPU left out | 2 | 2 | 9.5 | 9.5 | 10.5 | 50.0 | 50.0 | 3.0 | 3.0 |" in text
    # The source's error of 0 is one GPU's 1 - exp(-0.2) = 18.1 % and exp(0.2) - 1 = 22.1 % that the others add less.
    assert "| source | one | 1 | 0.0 | 0.0 | 18.1 | 22.1 | 22.1 | -18.1 | 100.0 |" in text
    assert "| two | 1 | 9.5 | 10.5 | – | – | – | – | 0.0 |" in text
    assert "| two | resnet50 | fp32 | 1 | 10.5 |" in text
    assert parts["later-of-known"] == "9.5 %, with a bias of 10.5 % and 100.0 % inside."
    assert parts["later"] == "10.5 %, with a bias of -9.5 % and 0.0 % inside."


def test_rows_of_many_gpus_are_asked_of_the_interval_of_other_gpus_and_of_the_other_source(script):
    many_gpus = script("many_gpus")
    devices = ["a10", "a100", "t4", "v100", "gtx-1080-ti", "rtx-4090"]
    rows = pd.DataFrame(
        [
            {"way": way, "device": device, "source": source, "group": group, "log_ratio": ratio}
            for device in devices
            for way in ("GPU", "source")
            for source in ("x", "y")
            for group in [many_gpus.chip_name(device) if way == "GPU" else source]
            # one GPU misses by ten times as much as all others, and so does a source
            for ratio in (np.array([-0.01, 0.01]) * (10 if device == "t4" else 1) * (30 if source == "y" else 1))
        ]
    ).assign(below=0.1, above=0.1, device_known=lambda made: made.way == "source")
    rows = pd.concat([rows, *[rows[rows.device == "a10"]] * 9], ignore_index=True)
    inside = many_gpus.covered(rows)
    assert not inside[(rows.way == "GPU") & (rows.device == "t4") & (rows.source == "y")].any()
    assert inside[(rows.way == "source") & (rows.source == "x")].all()
    assert not inside[(rows.way == "source") & (rows.source == "y") & (rows.device == "t4")].any()
    few = rows[(rows.source == "x") & (rows.device != "t4")]
    made = many_gpus.interval(many_gpus.telling(few, known=False))
    # Every GPU has as many at -0.1 as at 0.1: they are not alike, and all of 10 · 2 + 4 · 2 rows count. Student's t of
    # 28 (1.703) over the normal deviate of 90 % (1.282) and sqrt(29 / 28)
    assert made.high - made.low == pytest.approx(2 * 0.1353, rel=0.005)


def test_steps_that_wait_for_the_host_are_a_line_of_their_own(script):
    validate = script("cross_validate")
    usual = pd.concat([rows_of(way, g, [0.0, 0.1]) for way in ("gpu", "both") for g in range(4)])
    waiting = pd.concat([rows_of("both", g, [2.0], waits=True) for g in range(4)])
    table = validate.summary(pd.concat([usual, waiting], ignore_index=True)).set_index("left out")
    assert table.loc["GPU and network left out", "rows"] == 8
    assert table.loc["steps that may wait for the host, GPU and network left out", "rows"] == 4


@pytest.mark.parametrize(
    ("software", "date", "version"),
    [
        ("PyTorch NGC 20.10", "2020-10", (1, 7)),
        ("PyTorch NGC 22.10", "2022-10", (1, 13)),
        ("NGC pytorch-21.03", "2021-04-20", (1, 9)),
        ("NGC pytorch-21.07", "2021-08", (1, 10)),
        ("torch 1.9.0a0+df837d0; CUDA V11.2.142", "2022-01", (1, 9)),
        ("PyTorch 1.8 CUDA 11.1", "2021", (1, 8)),
        ("pt112 (PyTorch 1.12), CUDA 11.3, NGC-like; native AMP", "2022-07-27", (1, 12)),
        ("torch 2.12.1", "2026-11", (2, 12)),
        ("not stated; AMP", "2021", (1, 10)),  # no newer one was there
        ("not stated; AMP", "2021-02-03", (1, 7)),
        ("torch 1.x / CUDA 10.0", "2019", (1, 1)),
        ("not stated", "2018-05", (1, 0)),
        ("not stated", "2025", (2, 0)),
    ],
)
def test_the_version_of_a_row_is_stated_or_the_newest_of_its_date(script, software, date, version):
    row = pd.Series({"software": software, "date": date})
    assert script("public_rows").version_of(row) == version
    assert script("public_rows").version_of(pd.concat([row, pd.Series({"framework": "TensorFlow"})])) is None


PAGE = "# T\n\n<!-- made: a -->\nold\n<!-- end -->\n\ntext 5 %\n<!-- made: b-2 -->\n<!-- end -->\n"


def test_what_is_made_is_filled_between_the_pages_marks_and_nowhere_else(script):
    filled = script("cross_validate").filled
    once = filled(PAGE, {"b-2": "| x |\n| \\1 |", "a": "new"})
    assert once == PAGE.replace("old", "new").replace("b-2 -->\n", "b-2 -->\n| x |\n| \\1 |\n")
    assert filled(once, {"b-2": "", "a": "old"}) == PAGE.replace("b-2 -->\n", "b-2 -->\n\n")
    for parts in ({"a": "new"}, {"a": "", "b-2": "", "c": ""}, {"a": "", "c": ""}):
        with pytest.raises(ValueError, match="the page has marks"):
            filled(PAGE, parts)
