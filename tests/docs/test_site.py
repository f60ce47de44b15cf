"""The site of `make docs`: every page is in its navigation, every public name has its entry, nothing is fetched."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ptsim

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIGURATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
FETCHED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="?https?://', re.IGNORECASE)


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"[\w]+\.md", CONFIGURATION.split("\nnav:")[1])
    assert sorted(navigation) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.slow
def test_the_site_builds_strictly_with_every_public_name_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 10
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert [name for name in ptsim.__all__ if name != "__version__" and f'id="ptsim.{name}"' not in reference] == []
    for page in pages:
        assert not FETCHED.search(page.read_text(encoding="utf-8")), page.name
