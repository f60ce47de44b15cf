import html
import html.parser
import json
import re
from pathlib import Path

import msgspec
import pytest

from ptsim.cli.main import run
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.report.build import make_report, write_report
from ptsim.units import together
from tests.traces import CPU, dense_trace, shrinking_trace

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(html.parser.HTMLParser):
    """Follows the nesting of tags, and collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.targets.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def checked(page: Path) -> Checker:
    checker = Checker()
    checker.feed(page.read_text(encoding="utf-8"))
    checker.close()
    return checker


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    traces = [dense_trace(folder / "dense.jsonl"), shrinking_trace(folder / "pruned.jsonl")]
    return write_report(traces, folder / "out")


@pytest.mark.slow
def test_every_tag_of_the_page_is_closed_and_every_id_is_unique(page: Path) -> None:
    checker = checked(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


@pytest.mark.slow
def test_the_page_fetches_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert all(target.startswith(("#", "data:")) for target in checked(page).targets)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)[^)]*\)", text) == []
    assert re.findall(r"https?://", text) == []
    assert "fetch(" not in text


@pytest.mark.slow
def test_references_inside_the_figures_lead_to_ids_of_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ids = set(checked(page).ids)
    references = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
    assert references
    assert all((a or b) in ids for a, b in references)


@pytest.mark.slow
def test_the_same_traces_give_the_same_bytes(page: Path, tmp_path: Path) -> None:
    again = write_report([page.parent.parent / "dense.jsonl", page.parent.parent / "pruned.jsonl"], tmp_path)
    assert again.read_bytes() == page.read_bytes()


@pytest.mark.slow
def test_figures_and_tables_lie_beside_the_page(page: Path) -> None:
    assert {path.suffix for path in (page.parent / "figures").iterdir()} == {".csv", ".svg"}
    assert (page.parent / "tables" / "runs.csv").read_text().count("\n") == 3


@pytest.mark.slow
def test_an_interrupted_run_is_marked(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", status="interrupted", recorded_epochs=3)
    text = write_report([trace], tmp_path / "out").read_text()
    assert "interrupted after 3 of 6 planned epochs" in text


@pytest.mark.slow
def test_a_torn_trace_is_reported_and_marked(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", truncated=True)
    with pytest.warns(UserWarning, match="incomplete last line"):
        text = write_report([trace], tmp_path / "out").read_text()
    assert "cut off after 6 of 6 planned epochs" in text


@pytest.mark.slow
def test_a_run_without_profiles_energy_or_gpu_is_reported(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", profiles=False, energy=False, device=CPU)
    text = write_report([trace], tmp_path / "out").read_text()
    assert "could not be checked on the runs themselves; “Predicted against measured” says why" in text
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL).lower().split()


@pytest.mark.slow
def test_a_run_of_one_epoch_is_reported_and_marked(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", epochs=1)
    text = write_report([trace], tmp_path / "out").read_text()
    assert "a single epoch" in text
    assert "every epoch trained the same network, so pruning could save no training time" in text


def test_a_run_that_was_cut_off_before_its_first_epoch_is_reported(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", recorded_epochs=0, status="interrupted")
    assert "interrupted after 0 of 6 planned epochs" in write_report([trace], tmp_path / "out").read_text()


@pytest.mark.slow
def test_a_run_name_with_markup_is_shown_as_text(tmp_path: Path) -> None:
    trace = dense_trace(tmp_path / "t.jsonl", model="<script>alert(1)</script>")
    assert "<script>alert" not in write_report([trace], tmp_path / "out").read_text()


def test_no_traces_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one trace"):
        write_report([], tmp_path)


@pytest.mark.slow
def test_a_file_in_the_place_of_the_folder_is_a_usage_error(tmp_path: Path) -> None:
    trace = dense_trace(tmp_path / "t.jsonl")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        write_report([trace], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.jsonl", "-o", "out"], "no trace here"),
        (["-o", "out"], "at least one trace"),
        (["broken.jsonl", "-o", "out"], "broken.jsonl:1"),
        (["good.jsonl", "good.jsonl", "-o", "out"], "given twice"),
        (["good.jsonl", "-o", "out", "--cluster", "dgx-b52"], "unknown cluster 'dgx-b52'"),
        (["good.jsonl", "-o", "out", "--gpus", "0"], "positive whole numbers"),
        (["good.jsonl", "-o", "out", "--cluster", "abci-a", "--gpus", "1000000"], "abci-a"),
        (["good.jsonl", "-o", "out", "--price", "-1"], "price_usd_per_gpu_hour is -1"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text("{}\n")
    dense_trace(Path("good.jsonl"), epochs=1)
    assert run(["report", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_command_prints_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = [str(dense_trace(tmp_path / "dense.jsonl")), str(shrinking_trace(tmp_path / "pruned.jsonl"))]
    options = ["--cluster", "dgx-a100", "--gpus", "1,8", "--price", "2", "--json"]
    assert run(["report", *traces, "-o", str(tmp_path / "out"), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert Path(document["report"]).is_file()
    assert [row["gpus"] for row in document["savings"]] == [1, 8]
    assert len(document["projections"]) == 4
    row = document["savings"][1]
    assert row["saved_usd"] == pytest.approx(2 * 8 * row["saved_seconds"] / 3600)
    assert row["saved_seconds_low"] <= row["saved_seconds"] <= row["saved_seconds_high"]


@pytest.mark.slow
def test_the_command_prints_what_the_page_says_is_to_be_read_with_care(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = shrinking_trace(tmp_path / "p.jsonl", model="a<b", status="interrupted", recorded_epochs=3)
    traces = [str(dense_trace(tmp_path / "d.jsonl")), str(cut)]
    command = ["report", *traces, "-o", str(tmp_path / "out"), "--cluster", "dgx-a100", "--gpus", "8"]
    assert run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    assert "This page holds runs of 2 tasks; its head is about one of them, the tables show all." in notes
    assert any("a<b" in note and "interrupted after 3 of 6 planned epochs" in note for note in notes)
    (shown,) = re.findall(r'<div class="notice".*?</div>', Path(lines[-1]).read_text(encoding="utf-8"), re.DOTALL)
    items = re.findall(r"<li>(.*?)</li>", shown, re.DOTALL)
    assert [together(note) for note in notes] == [html.unescape(item) for item in items]
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notices"] == notes


@pytest.mark.slow
def test_runs_of_several_networks_share_a_page(tmp_path: Path) -> None:
    traces = [
        dense_trace(tmp_path / "a.jsonl", epochs=3, model="resnet14"),
        shrinking_trace(tmp_path / "b.jsonl", epochs=3, model="resnet14"),
        shrinking_trace(tmp_path / "c.jsonl", epochs=3, model="other", penalty_ratio=0.3),
    ]
    text = write_report(traces, tmp_path / "out", cluster="dgx-a100", gpus=[8]).read_text()
    assert "2 networks" in text
    assert "resnet14, PruneTrain" in text
    assert "no dense run was recorded" in text  # for the other one


@pytest.mark.slow
def test_money_is_reported_only_with_a_price(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "t.jsonl", epochs=3)
    without = write_report([trace], tmp_path / "a", cluster="dgx-a100", gpus=[8]).read_text()
    priced = write_report([trace], tmp_path / "b", cluster="dgx-a100", gpus=[8], price_usd_per_gpu_hour=2.0).read_text()
    assert "Money" not in without
    assert "Money" in priced


@pytest.mark.slow
def test_a_list_price_is_shown_with_its_day_and_a_given_one_takes_its_place(tmp_path: Path) -> None:
    pruned = shrinking_trace(tmp_path / "p.jsonl", epochs=3, interval=1, batch_step=0)
    traces = [dense_trace(tmp_path / "d.jsonl", epochs=3), pruned]
    both = ["aws-p3-16xlarge", "dgx-a100"]
    listed = make_report(traces, cluster=both, gpus=[8])
    (money,) = (tile for tile in listed.answer.tiles if tile.name.startswith("Money"))
    assert " at 3.06 USD per GPU-hour, the list price of 2026-09-24 for whole instances of 8 GPUs; " in money.detail
    assert "Money on aws-p3-16xlarge is at a list price, whose day stands beside it" in listed.byline
    assert "No price of a GPU-hour is known for dgx-a100." in listed.byline
    (saving,) = listed.savings.to_dict("records")
    assert saving["saved_usd"] == pytest.approx(3.06 * 8 * saving["saved_seconds"] / 3600)
    assert list(listed.scenarios.groupby("cluster").cost_usd.count()) == [3, 0]
    (sides,) = (table for section in listed.sections for table in section.tables if table.name == "scenarios")
    assert "Prices: aws-p3-16xlarge 3.06 USD per GPU-hour, the list price of 2026-09-24 for whole" in sides.caption
    assert "not all that it saves is due to pruning" in sides.caption  # of the row with a dynamic mini-batch
    few = make_report(traces, cluster=both, gpus=[4])  # of an instance of 8
    (money,) = (tile for tile in few.answer.tiles if tile.name.startswith("Money"))
    assert " for whole instances of 8 GPUs: 4 GPUs are billed as 8; " in money.detail
    (saving,) = few.savings.to_dict("records")
    assert saving["dense_usd"] == pytest.approx(3.06 * 8 * saving["dense_seconds"] / 3600)
    tables = {table.name: table for section in few.sections for table in section.tables}
    for name in ("scenarios", "energy", "saved_energy"):
        assert "4 GPUs are billed as 8" in tables[name].caption
    assert set(few.projections.billed_gpus) == {8}
    given = make_report(traces, cluster=both, gpus=[8], price_usd_per_gpu_hour=2.0)
    assert "list price" not in given.byline
    assert given.byline.endswith("Money is at the price that was given.")
    (money,) = (tile for tile in given.answer.tiles if tile.name.startswith("Money"))
    assert " at 2.00 USD per GPU-hour; " in money.detail


def test_different_clusters_of_one_name_are_refused(tmp_path: Path) -> None:
    whole = load_cluster("dgx-a100")
    other = msgspec.structs.replace(whole, nics_per_node=4)
    with pytest.raises(UsageError, match="two different clusters are called 'dgx-a100'"):
        make_report([dense_trace(tmp_path / "d.jsonl", epochs=1)], cluster=[whole, other], gpus=[8])


@pytest.mark.slow
def test_a_report_replaces_its_own_files_and_no_others(tmp_path: Path) -> None:
    traces = [dense_trace(tmp_path / "d.jsonl", epochs=1), shrinking_trace(tmp_path / "p.jsonl", epochs=2)]
    out = tmp_path / "paper"
    mine = [out / "figures" / "mine.svg", out / "figures" / "mine.csv", out / "tables" / "mine.csv", out / "notes.txt"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    page = write_report(traces, out, gpus=[1])
    first = set(out.rglob("*.*"))
    write_report(traces[:1], out, gpus=[1])
    alone = write_report(traces[:1], tmp_path / "alone", gpus=[1]).parent
    assert {path.relative_to(out) for path in set(out.rglob("*.*")) - set(mine)} == {
        path.relative_to(alone) for path in alone.rglob("*.*")
    }
    assert len(first) > len(set(out.rglob("*.*")))
    assert all(path.read_text() == "mine" for path in mine)
    page.write_text("<html>my own</html>")
    with pytest.raises(UsageError, match=r"index\.html is no report of ptsim, and is not written over"):
        write_report(traces, out, gpus=[1])
    assert page.read_text() == "<html>my own</html>"
