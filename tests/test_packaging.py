"""What pyproject.toml says of packages, data files and markers is what the tree holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_folder_with_modules_is_listed_as_a_package() -> None:
    found = {
        "ptsim" + ".".join(("", *folder.relative_to(ROOT / "ptsim").parts))
        for folder in {path.parent for path in (ROOT / "ptsim").rglob("*.py")}
    }
    assert found | {"ptsim.models"} == set(SETUPTOOLS["packages"])


def test_every_data_file_is_shipped() -> None:
    shipped = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
        if path.is_file()
    }
    present = {
        path
        for path in (ROOT / "ptsim").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert present - shipped == set()


def test_setuptools_takes_no_data_folder_for_a_package() -> None:
    # With include-package-data (its default) it warns "Package would be ignored" of catalog/ and templates/.
    assert SETUPTOOLS["include-package-data"] is False


def test_the_license_is_shipped() -> None:
    assert PROJECT["project"]["license"] == "MIT"
    assert all((ROOT / name).is_file() for name in PROJECT["project"]["license-files"])
