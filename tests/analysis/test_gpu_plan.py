"""What the GPU campaign is predicted to take, and the calls that this makes of it."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

import ptsim
from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.hardware.catalog import load_device

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
gpu_campaign = importlib.import_module("gpu_campaign")
gpu_plan = importlib.import_module("gpu_plan")
gpu_runs = importlib.import_module("gpu_runs")
gpu_steps = importlib.import_module("gpu_steps")
H100 = "h100-sxm5-80gb"


def cost_of(epoch_s, checkpoint_bytes=74_000_000, low=0.5, high=2.0):
    parts = dict.fromkeys(("waits_s", "validation_s", "loop_s"), 0.0)
    return gpu_plan.RunCost(epochs=(epoch_s,) * 182, low=low, high=high, checkpoint_bytes=checkpoint_bytes, **parts)


def costs(vgg_s=(1.75, 1.4), resnet_s=(5.0, 5.0)):
    """Seconds of an epoch, dense and pruned."""
    campaign = gpu_campaign.Campaign(options())
    of = {"vgg11": (vgg_s, 74_000_000), "resnet32": (resnet_s, 4_000_000)}
    return {
        name: cost_of(of[pair.model][0][index], of[pair.model][1])
        for pair in campaign.pairs
        for index, name in enumerate(pair.runs)
    }


def options(minutes=8.5, tiny=False):
    return argparse.Namespace(
        out=Path("nowhere"), work=None, device="cuda", tiny=tiny, cifar=None, minutes=minutes, gpu=H100, noted=None
    )


def rehearsal(minutes=8.5, **allowed):
    given = gpu_plan.Allowed(**allowed)
    return gpu_plan.Rehearsal(options(minutes), gpu_campaign.Campaign, gpu_campaign.work_through, given)


def names(call):
    return [did.name for did in call.did]


def test_the_calls_of_the_first_half_hour_by_hand():
    """VGG-11 has 510 s: dense half of them, of which 20 go by before its first epoch: 134 of 1.75 s. PruneTrain needs
    20 + 134 x 1.4 = 207.6 s for as many. What is left, 47.4 s, is too short for a turn of each, but not for steps. The
    48 epochs left take 20 + 84 and 20 + 67.2 s of the next call.
    """
    first, second, third = rehearsal().calls(costs(), loans=1)
    assert names(first) == ["tests", "calibrate", "peaks"]
    assert sum(did.seconds for did in first.did) == pytest.approx(8.5 * 60)
    assert names(second) == ["vgg11", "resnet50"]
    vgg, steps = second.did
    assert steps.seconds == pytest.approx(510 - 255 - 207.6)
    assert vgg.epochs == {"vgg11-dense-s1": 134, "vgg11-pruned-s1": 134}
    assert vgg.seconds == pytest.approx(255 + 207.6)
    assert names(third) == ["vgg11", "resnet50", "steps", "memory"]
    assert set(third.did[0].epochs.values()) == {182}
    assert third.did[0].seconds == pytest.approx(20 + 84 + 20 + 67.2)
    assert [call.minutes for call in (first, second, third)] == [8.5, 8.5, 8.5]


def test_a_pair_that_does_not_travel_begins_again_and_one_that_does_goes_on():
    """At 3 s an epoch VGG-11 has not ended after half an hour; ResNet-32, 5 s, goes on from call to call."""
    calls = rehearsal().calls(costs(vgg_s=(3.0, 3.0)), loans=2)
    vgg = [(call.loan, did.epochs["vgg11-dense-s1"]) for call in calls for did in call.did if did.name == "vgg11"]
    most = max(number for loan, number in vgg if loan == 1)
    assert 100 < most < 182
    assert next(number for loan, number in vgg if loan == 2) < most
    calls = rehearsal().calls(costs(), loans=3)
    resnet = [did.epochs["resnet32-dense-s1"] for call in calls for did in call.did if did.name == "resnet32"]
    assert resnet == sorted(resnet)
    assert resnet[-1] == 182


def test_both_runs_of_a_pair_are_about_as_far_whenever_a_call_ends():
    for call in rehearsal().calls(costs(resnet_s=(5.0, 3.0)), loans=3):
        for did in call.did:
            reached = list(did.epochs.values())
            assert all(abs(one - other) <= 1 for one, other in zip(reached[::2], reached[1::2], strict=True))


def test_a_run_is_as_slow_as_the_end_of_its_interval():
    fast, usual, slow = (rehearsal().calls(costs(), end, loans=1)[1].did[0].epochs for end in ("low", "", "high"))
    assert set(fast.values()) == {182}
    assert set(usual.values()) == {134}
    assert set(slow.values()) == {67}  # 235 s of 3.5 s each


def test_what_was_measured_takes_the_place_of_what_is_assumed():
    """Of VGG-11's 510 s the piece starts for 5. Dense has half of the rest, 252.5 s: 12.5 to start, then epochs of
    1.75 s with a checkpoint of 0.74 s and 0.1 of 182 parts of a profile: 92 of 2.59 s.
    """
    allowed = {"piece_s": 5.0, "turn_s": 12.5, "checkpoint_s_per_byte": 1e-8, "profile_s": 18.2}
    known = {name: cost._replace(num_architectures=2) for name, cost in costs(vgg_s=(1.75, 1.75)).items()}
    (did, *_) = rehearsal(**allowed).calls(known, loans=1)[1].did
    assert did.epochs == {"vgg11-dense-s1": 92, "vgg11-pruned-s1": 92}
    assert did.seconds == pytest.approx(5 + 252.5 + 12.5 + 92 * 2.59)


def test_runs_at_the_same_time_take_the_longest_or_what_the_gpu_does():
    dense, pruned = cost_of(10.0)._replace(waits_s=1500.0, validation_s=100.0, loop_s=20.0), cost_of(5.0)
    assert gpu_plan.together_s([dense, pruned]) == 1820
    assert gpu_plan.together_s([dense, dense]) == 1820
    assert gpu_plan.together_s([pruned, pruned]) == 2 * 910


def test_a_half_hour_is_not_longer_than_it_is():
    for minutes in (3.0, 8.5, 60.0):
        calls = rehearsal(minutes).calls(costs(), loans=1)
        worked_s = sum(did.seconds for call in calls for did in call.did)
        assert worked_s <= 1800 - 120 - 30 * len(calls)
        assert worked_s > 900


def test_a_run_is_predicted_with_its_validation_and_the_loop_around_its_steps():
    """79 mini-batches of validation for 391 of training, each at most a step; 27 operators of 8 µs an iteration."""
    device = load_device(H100)
    found = gpu_plan.run_cost("resnet32", device, pruned=False)
    step = ptsim.predict("resnet32", gpu=device, batch=128, precision="fp32")
    assert found.loop_s == pytest.approx(182 * 391 * 27 * 8e-6)
    assert found.validation_s == pytest.approx(182 * 79 * (step.forward_seconds + step.overhead_seconds))
    assert found.waits_s == pytest.approx(182 * 391 * step.overhead_seconds)
    steps_s = found.seconds - found.loop_s - found.validation_s
    assert steps_s == pytest.approx(182 * 391 * step.step_seconds, rel=1e-3)
    assert found.low == pytest.approx(step.low / step.step_seconds, rel=1e-3)
    parameters = sum(p.numel() for p in zoo.create("resnet32").parameters())
    assert found.checkpoint_bytes == 8 * parameters  # fp32, weights and momentum


def test_the_steps_of_a_row_by_hand():
    """2 to warm up, then 5 with a clock and 3 with one around every layer. With power: half a second of them, here 50,
    a quarter of which again, 100 under load and 200 with the meter."""
    assert gpu_steps.step_seconds(0.01, power=False) == pytest.approx(10 * 0.01)
    assert gpu_steps.step_seconds(0.01, power=True) == pytest.approx((2 + 50 + 12 + 100 + 200) * 0.01)
    assert gpu_steps.step_seconds(1.0, power=True) == pytest.approx(2 + 5 + 3 + 10 + 10)


def test_what_a_memory_row_tries_takes_two_steps_of_each_mini_batch(monkeypatch):
    monkeypatch.setattr(gpu_steps, "largest_batch", lambda *_, **__: 100)
    tried = []

    def step_time(_network, _device, setting):
        tried.append(setting.batch)
        return argparse.Namespace(compute_s=0.5)

    monkeypatch.setattr(gpu_steps, "step_time", step_time)
    entry = zoo.find("resnet20")
    network = capture_network(
        zoo.create("resnet20"), name="r", input_shape=entry.input_shape, num_classes=entry.num_classes
    )
    setting = gpu_plan.StepSetting(batch=1)
    seconds = gpu_steps.limit_seconds(network, setting, load_device(H100))
    assert seconds == pytest.approx(2 * 0.5 * (1 + 1.05 + 1.1 + 1.2 + 1.4 + 1.8))
    assert tried == [100]


def test_the_plan_says_what_each_piece_costs_what_fits_and_what_becomes_of_the_rest(capsys, monkeypatch):
    monkeypatch.setattr(gpu_plan, "run_costs", lambda *_: costs())
    monkeypatch.setattr(gpu_plan, "steps_cost", lambda *_, power: 90.0 if power else 6.0)
    monkeypatch.setattr(gpu_plan, "limits_cost", lambda *_: 12.0)
    assert gpu_campaign.main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 160 for line in lines)
    table = {line.split()[0]: line for line in lines[3:14]}
    assert list(table)[:4] == ["tests", "calibrate", "vgg11", "peaks"]
    # 182 x (1.75 + 1.4) + 2 x 20 s, and half and twice the epochs
    assert "10.2 (5.4 to 19.8)" in table["vgg11"]
    assert "182 epochs" in table["vgg11"]
    assert "1.5 in 8 rows' steps" in table["resnet50"]
    assert "0.1 in 20 rows' steps" in table["peaks"]
    assert "at most 0.2 in steps" in table["memory"]
    text = "\n".join(lines)
    assert "call 2, --minutes 8.5: vgg11 7.7 (134 of 182 epochs)" in text
    assert "resnet32 does not fit into the first half hour (0 of 182 epochs)" in text
    assert "its checkpoints travel in runs.tar" in text
    assert "vgg11 does not fit" not in text


def test_the_plan_takes_what_is_noted_and_says_what_every_piece_has_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_plan, "run_costs", lambda *_: costs())
    monkeypatch.setattr(gpu_plan, "steps_cost", lambda *_, power: 6.0)
    monkeypatch.setattr(gpu_plan, "limits_cost", lambda *_: 12.0)

    def part(number, seconds, size=0):
        return {"number": number, "seconds": seconds, "size": size}

    parts = {"before": part(1, 8.0), "data": part(1, 3.0, 60_000), "checkpoints": part(100, 50.0, 10_000_000_000)}
    turn = {"run": "vgg11-dense-s1", "seconds": 400.0, "parts": parts}
    entry = {"piece": "vgg11", "seconds": 410.0, "failed": None, "further": True, "device": "NVIDIA H100"}
    entry |= {"parts": {"start": part(1, 6.0)}, "turns": [turn]}
    (tmp_path / "campaign.json").write_text(json.dumps([entry]))
    assert gpu_campaign.main(["--plan", "--noted", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(len(line) <= 160 for line in said.splitlines())
    # 182 x (1.75 + 1.4 + 2 x 0.37) + 2 x 8 s
    assert "12.1 (7.3 to" in next(line for line in said.splitlines() if line.startswith("vgg11 "))
    assert "taken  410 s in 1 call (start 6, turns 400, before 8, checkpoints 50)" in said
    assert said.count("taken  nothing yet") == 10
    assert "the start of every turn of a training: 8.0 s, measured (turns on the GPU: 1)" in said
    assert "a checkpoint of 74 MB after every epoch: 0.4 s, measured" in said
    assert "profile of an architecture: in no number" in said


def test_results_without_a_log_are_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_campaign.main(["--plan", "--noted", str(tmp_path)])
    assert "campaign.json" in capsys.readouterr().err


def test_a_gpu_that_is_not_in_the_catalog_is_refused_in_one_sentence(capsys):
    with pytest.raises(SystemExit):
        gpu_campaign.main(["--plan", "--gpu", "h1000"])
    said = capsys.readouterr().err
    assert "unknown device 'h1000'" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_a_call_needs_time(capsys, minutes):
    with pytest.raises(SystemExit):
        gpu_campaign.main(["--plan", "--minutes", minutes])
    assert "expected a positive number" in capsys.readouterr().err


@pytest.mark.slow
def test_the_docstring_says_what_is_predicted():
    pairs = gpu_campaign.Campaign(options()).pairs[:2]
    found = gpu_plan.run_costs(pairs, load_device(H100))
    minutes = {pair.model: sum(found[name].seconds for name in pair.runs) / 60 for pair in pairs}
    assert {model: round(value) for model, value in minutes.items()} == {"vgg11": 10, "resnet32": 30}
