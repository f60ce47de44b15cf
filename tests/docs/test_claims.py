import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pandas as pd
import pytest

from ptsim.trace.schema import Epoch, Reconfiguration
from tests.traces import shrinking_records, write_trace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    return importlib.import_module


@pytest.fixture
def script(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("check_claims")


def claim(script: ModuleType, **fields: str) -> object:
    common = {"id": "one", "area": "a", "claim": "two networks", "command": "make test", "machine": "any", "date": "–"}
    return script.Claim(**common | fields)


def test_every_figure_of_the_readme_and_of_the_docs_stands_in_its_source(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    status = script.main([])
    assert status == 0, capsys.readouterr().out


def test_a_changed_figure_is_found(script: ModuleType) -> None:
    claims = script.read_claims()
    right = next(c for c in claims if c.id == "fits")
    changed = claim(script, id="fits", value=right.value.replace("80 are", "81 are"), source=right.source)
    assert {sentence.split(":")[0] for sentence in script.wrong_claims((changed,))} == {"fits"}


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("time 8 % of dense", []),
        ("time 8 % of dense, accuracy 61 %", ["nothing computes 61"]),
        ("time 8 % of dense, −8 % before", ["nothing computes −8"]),
        ("time 18 % of dense", ["says 'time 8 %'", "nothing computes 18"]),
        ("time −8 % of dense", ["says 'time 8 %'", "nothing computes −8"]),
        ("time 8 % of dense on 4 GPUs", ["nothing computes 4"]),
        ("time 8 % of dense on A100s, with bf16", []),
    ],
)
def test_every_number_of_a_computed_claim_has_to_be_computed(script: ModuleType, value: str, wrong: list[str]) -> None:
    found = list(script.wrong_figures(claim(script, value=value, source="a.csv"), ["time 8 %"]))
    assert len(found) == len(wrong)
    assert all(expected in sentence for expected, sentence in zip(wrong, found, strict=True))


def test_a_figure_that_the_value_does_not_need_may_stand_in_the_words_around_it(script: ModuleType) -> None:
    one = claim(script, value="3 %", claim="on 40 rows", machine="8 GPUs", seen="it was 5 %")
    assert list(script.wrong_figures(one, ["3 %", "40 rows", "8 GPUs", "it was 5 %"])) == []
    assert len(list(script.wrong_figures(one, ["3 %", "41 rows"]))) == 1


@pytest.mark.parametrize(
    ("goal", "reached", "verdict"),
    [
        ("saved time over saved FLOPs 0.9 (met)", [0.86], "missed"),  # 0.9 as the value has it
        ("saved time over saved FLOPs 0.9 (met)", [0.9, 1.1], None),
        ("saved time over saved FLOPs 0.9 (missed by the whole run)", [0.7, 1.1], None),
        ("saved time over saved MACs 0.9 (missed)", [1.0], "met"),
        ("saved time over saved MACs 0.9 (within the scatter)", [1.0], None),
        ("", [0.1], None),
    ],
)
def test_a_goal_is_met_by_the_numbers_before_they_are_rounded(
    script: ModuleType, goal: str, reached: list[float], verdict: str | None
) -> None:
    found = list(script.wrong_verdict(claim(script, value="0.9", source="a.csv", goal=goal), reached))
    assert [f"so that the goal is {verdict}:" in sentence for sentence in found] == [True] * (verdict is not None)


@pytest.mark.parametrize("name", ["recorded-seeds", "recorded-vgg11-steps"])
def test_a_verdict_that_the_recorded_runs_do_not_bear_out_is_found(script: ModuleType, name: str) -> None:
    right = next(one for one in script.read_claims() if one.id == name)
    other = {"met": "missed", "missed": "met"}
    goal = re.sub(r"\((met|missed)", lambda told: f"({other[told[1]]}", right.goal)
    (found,) = script.wrong_claims((msgspec.structs.replace(right, goal=goal),))
    assert "the goal is" in found


def test_a_source_from_which_nothing_is_computed_is_found(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    one = claim(script, value="3 %", source="a.csv")
    assert list(script.wrong_claims((one,), tmp_path)) == ["one: nothing computes it from a.csv"]
    assert list(script.wrong_claims((one,), tmp_path, {"one": lambda root: ["3 %"]})) == []
    both = claim(script, value="3 %", source="a.csv, b.csv")
    assert list(script.wrong_claims((both,), tmp_path, {"one": lambda root: ["3 %"]})) == ["one: there is no b.csv"]


@pytest.mark.parametrize(
    ("source", "value", "wrong"),
    [
        ("page.md", "2.5 and 0.2 %", ["2.5 and 0.2 %"]),
        ("page.md", "2.5 %, then 0.2 %", []),
        ("page.md", "−0.2 and +1.5 %", []),
        ("page.md", "2.5 s", ["2.5 s"]),
        ("page.md", "+0.2 %", ["+0.2 %", "+0.2"]),
        ("page.md", "7 of 8", ["8"]),
        ("test.py", "2.5 s", []),
        ("test.py", "2.4 s", ["2.4"]),
    ],
)
def test_a_figure_that_its_page_or_its_test_does_not_have_is_found(
    script: ModuleType, tmp_path: Path, source: str, value: str, wrong: list[str]
) -> None:
    text = "the errors are 2.5 % and, of 7 rows, -0.2 % and +1.5 %"
    (tmp_path / source).write_text(text, encoding="utf-8")
    found = list(script.wrong_claims((claim(script, value=value, source=source),), tmp_path))
    assert found == [f"one: {figure} does not stand in {source}" for figure in wrong]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("| [how far?](docs/accuracy.md#one) | 3 % of two networks |", False),
        ("| [how far?](docs/accuracy.md#one) | 4 % |", True),
        ("| [how far?](docs/accuracy.md#two) | 3 % |", True),
        ("It is 3 % faster.", True),
        ("Python 3.11 is needed.", False),
        ("```\n50 %\n```", False),
    ],
)
def test_a_percentage_in_the_readme_needs_a_claim_that_holds_it(script: ModuleType, line: str, wrong: bool) -> None:
    assert bool(list(script.wrong_quotes(line, (claim(script, value="3 %"),)))) == wrong


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("It takes 12 s.", True),
        ("A run of 1.5 h and 0.9 kWh.", True),
        ("It is 1.2 times as fast.", True),
        ('Twice as fast on 8 A100s, with `--memory 40 GiB` or "8 GiB".', False),
        ("Every answer has a 90 %\ninterval.", False),
        ("It takes [3 %](accuracy.md#one), on 7 networks.", False),
        ("It takes [4 %](accuracy.md#one).", True),
        ("It takes [−3 %](accuracy.md#one).", True),
        ("It takes [4 instead of 3 %](accuracy.md#one).", True),
        ("It takes [4, 3 and 3 %](accuracy.md#one).", True),
        ("It takes [3 %](accuracy.md#one) at 18 GMAC/s.", True),
        ("It takes [3 s](accuracy.md#one).", True),
        ("It takes [5, 3 and 3 ms](accuracy.md#two).", False),
        ("It takes [5 to 3 ms](accuracy.md#two).", False),
        ("It takes [3, 5 and 3 ms](accuracy.md#two).", True),
    ],
)
def test_a_measured_figure_on_a_page_needs_a_claim_that_holds_it(script: ModuleType, line: str, wrong: bool) -> None:
    claims = (claim(script, value="3 %"), claim(script, id="two", value="5, 3 and 3 ms"))
    found = list(script.wrong_quotes(line, claims, only_quantities=True))
    assert bool(found) == wrong


def test_a_new_page_needs_claims_or_a_line_that_says_where_its_figures_come_from(
    script: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    (tmp_path / "docs" / "new.md").write_text("It takes 12 s.", encoding="utf-8")
    common = {"figures": "times", "machine": "any", "date": "–"}
    page = script.Page(page="docs/new.md", command="ptsim cost", **common)
    gone = script.Page(page="docs/old.md", command="python analysis/none.py", **common)
    assert [text.split(":")[0] for text in script.wrong_pages((), (), tmp_path)] == ["docs/new.md"]
    assert list(script.wrong_pages((), (page,), tmp_path)) == []
    assert len(list(script.wrong_pages((), (page, gone), tmp_path))) == 2


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md", "traces/README.md"])
def test_pages_with_tables_of_their_own_are_read_too(script: ModuleType, tmp_path: Path, page: str) -> None:
    for folder in ("docs", "traces"):
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    text = "<!-- table: x -->\n| 5 % |\n<!-- end -->\n\nIt takes 12 s."
    (tmp_path / page).write_text(text, encoding="utf-8")
    assert list(script.wrong_pages((), (), tmp_path)) == [f"{page}: no claim is linked by: 'It takes 12 s.'"]


@pytest.mark.parametrize("page", ["docs/evidence.md", "traces/README.md"])
def test_a_changed_cell_of_a_table_is_found(script: ModuleType, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    makers = script.tables(script.read_claims())
    tables = list(script.TABLE.finditer(text))
    assert len(tables) >= 4
    for table in tables:
        changed = text[: table.start()] + table.group().replace("5", "6") + text[table.end() :]
        assert changed != text
        assert script.filled(changed, makers) == text


def test_a_command_of_a_script_that_is_gone_is_found(script: ModuleType) -> None:
    old = claim(script, value="3 %", command="python analysis/gone.py --all")
    assert list(script.wrong_claims((old,))) == ["one: its command names analysis/gone.py, which is not there"]


def two_runs(root: Path) -> None:
    """Twelve epochs of 10 s; in the pruned run the last one, after a reconfiguration of 2 s, takes 4 s."""
    for name, ratio in (("dense", 0.0), ("pruned", 0.2)):
        records = []
        for record in shrinking_records(epochs=12, interval=11, penalty_ratio=ratio, batch_step=0, profiles=False):
            if isinstance(record, Epoch):
                wall_s = 4.0 if ratio and record.epoch == 11 else 10.0
                time = msgspec.structs.replace(record.time, wall_s=wall_s)
                record = msgspec.structs.replace(record, measured_time=time)
            elif isinstance(record, Reconfiguration):
                record = msgspec.structs.replace(record, measured_duration_s=2.0)
            records.append(record)
        write_trace(root / "traces" / "runs" / f"{name}.jsonl", records)


def test_times_of_recorded_runs_are_those_of_their_epochs_and_reconfigurations(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    two_runs(tmp_path)
    recorded, tables = module("claims_recorded"), module("claims_tables")
    pruned, dense = (recorded.read_recorded(tmp_path, "runs", name) for name in ("pruned", "dense"))
    assert recorded.own_pace(dense) == pytest.approx(1.0)
    assert recorded.own_pace(pruned) == pytest.approx(114 / 12 / 10)
    assert recorded.recorded(tmp_path, "runs", "pruned", "dense")["time"] == pytest.approx(116 / 120)
    columns = [tables.Column(name, name, "dense") for name in ("dense", "pruned")]
    marked = tables.Column("again", "pruned", "dense", marked=True)
    text = tables.runs_table(tmp_path, folder="runs", columns=[*columns, marked])
    rows = {cells[1]: cells[2:] for cells in ([c.strip() for c in line.split("|")] for line in text.splitlines())}
    assert rows["training time with reconfigurations, without validation"][:3] == [
        "120 s", "116 s, 97 % of dense", "116 s *",
    ]  # fmt: skip
    assert rows["first → last epoch"][:3] == ["10.0 → 10.0 s", "10.0 → 4.0 s", "10.0 → 4.0 s *"]
    assert rows["validation accuracy, last epoch"][:3] == ["90.0 %"] * 3
    assert rows["training FLOPs, of dense"][0] == ""
    assert "mini-batch" not in rows


def test_a_run_that_is_pruned_early_has_no_pace_of_ten_unpruned_epochs(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    records = shrinking_records(epochs=12, interval=5, penalty_ratio=0.2, batch_step=0, profiles=False)
    write_trace(tmp_path / "traces" / "runs" / "early.jsonl", records)
    recorded = module("claims_recorded")
    with pytest.raises(ValueError, match=r"early.jsonl is pruned from epoch 5 on"):
        recorded.own_pace(recorded.read_recorded(tmp_path, "runs", "early"))


def test_a_table_of_layers_adds_up_those_of_a_kind(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    rows = [
        ("layer1.conv", "conv", 600, 300, 0.010, 0.008),
        ("layer2.conv", "conv", 200, 60, 0.030, 0.006),
        ("layer1.bn", "batch_norm", 0, 0, 0.004, 0.005),
    ]
    names = ["layer", "kind", "dense_macs", "pruned_macs", "dense_seconds", "pruned_seconds"]
    folder = tmp_path / "traces" / "runs" / "by_layer"
    folder.mkdir(parents=True)
    pd.DataFrame(rows, columns=names).to_csv(folder / "layers.csv", index=False)
    tables = module("claims_tables")
    selected = {
        "all": tables.of_kind("conv"),
        "first": tables.of_kind("conv", "layer1."),
        "BN": tables.of_kind("batch_norm"),
    }
    text = tables.layers_text(tmp_path, title="ms", folder="runs", rows=selected)
    assert [line.split() for line in text.splitlines()[2:-1]] == [
        ["all", "40.0", "14.0", "35", "%", "45", "%"],
        ["first", "10.0", "8.0", "80", "%", "50", "%"],
        ["BN", "4.0", "5.0", "125", "%"],
    ]


def test_claims_of_single_runs_say_what_their_lines_hold(module: Callable[[str], ModuleType]) -> None:
    def lines(folder: str, run: str, record: str) -> list[dict[str, Any]]:
        text = (ROOT / "traces" / folder / f"{run}.jsonl").read_text(encoding="utf-8")
        return [line for line in map(json.loads, text.splitlines()) if line["record"] == record]

    checks = module("check_claims").CHECKS
    walls = [epoch["time"]["wall_s"] for epoch in lines("cifar10-resnet20", "prunetrain-r0.3", "epoch")]
    penalties = [epoch["time"]["regularizer_s"] for epoch in lines("cifar10-resnet20", "prunetrain-r0.3", "epoch")]
    paid_s = sum(line["duration_s"] for line in lines("cifar10-resnet20", "prunetrain-r0.3", "reconfiguration"))
    typical = sorted(zip(walls[:12], penalties[:12], strict=True))[6]  # of the twelve before the first pruning
    share = (sum(walls) + paid_s) / (30 * (typical[0] - typical[1]))
    assert f"time {100 * share:.0f} % of 30 unpruned epochs" in checks["recorded-r03"](ROOT)
    steps = {
        run: [1e3 * profile["step_s"] for profile in lines("cifar10-resnet20", run, "profile")[-2:]]
        for run in ("gating-r0.2", "prunetrain-r0.2")
    }
    gating, union = (f"{a:.0f} and {b:.0f} ms" for a, b in steps.values())
    assert f"steps of {gating} where union has {union}" in checks["recorded-gating"](ROOT)
    profile = lines("cifar10-resnet32", "mode-gating", "profile")[-1]
    gathers = [layer["forward_s"] + layer["backward_s"] for layer in profile["layers"] if "gather" in layer["layer"]]
    assert f"{len(gathers)} gathers take {1e3 * sum(gathers):.1f} ms" in checks["recorded-modes-layers"](ROOT)[0]
    pruned, dense = (lines("cifar10-resnet20", f"long-{run}", "epoch") for run in ("prunetrain-r0.2", "dense"))
    lost = [100 * (dense[-1][f"{of}_accuracy"] - pruned[-1][f"{of}_accuracy"]) for of in ("validation", "train")]
    assert f"120 epochs: {lost[0]:.1f} points, in training {lost[1]:.1f} points" in checks["recorded-longer"](ROOT)
    shares = [100 * line["penalty"] / (line["penalty"] + line["train_loss"]) for line in pruned]
    told = f"ResNet-20, 120 epochs: {shares[0]:.0f}, {min(shares):.0f} and {shares[-1]:.0f} %"
    assert told in checks["recorded-penalty-share"](ROOT)
    table = (ROOT / "traces" / "public" / "carry_over.csv").read_text(encoding="utf-8")
    row = next(line.split(",") for line in table.splitlines() if line.startswith("prunetrain-r0.2,prunetrain-r0.3"))
    training, bn, epoch = (abs(float(cell)) for cell in row[6:9])
    told = checks["carried-over"](ROOT)[2]
    assert told.endswith(f": {epoch:.1f}, {training:.1f} and {bn:.1f} points")
