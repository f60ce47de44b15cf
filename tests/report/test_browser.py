import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ptsim.report.build import write_report
from tests.traces import shrinking_trace

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; the page's form is checked without one in test_page.py")
def test_a_browser_shows_the_page_without_complaint_or_request_and_sorts_its_tables(tmp_path: Path) -> None:
    page = write_report([shrinking_trace(tmp_path / "t.jsonl")], tmp_path / "out", gpus=[1, 8])
    text = page.read_text(encoding="utf-8")
    # press the heading of the first numeric column twice: descending
    press = (
        "<script>for (const i of [1, 2]) document.querySelector('#table-projections th:nth-child(2) button').click();"
    )
    report = "document.title = performance.getEntriesByType('resource').map((entry) => entry.name).join(' ');</script>"
    page.write_text(text.replace("</body>", f"{press}{report}</body>"), encoding="utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    requests = re.search(r"<title>(.*?)</title>", done.stdout)
    assert requests
    assert [name for name in requests.group(1).split() if not name.startswith("data:")] == []
    table = re.search(r'<table[^>]*id="table-projections".*?</table>', done.stdout, re.DOTALL)
    assert table
    assert 'aria-sort="descending"' in table.group(0)
    gpus = [float(cell) for cell in re.findall(r'<tr><td[^>]*>.*?</td><td[^>]*data-sort="([\d.]+)', table.group(0))]
    assert gpus == sorted(gpus, reverse=True)
