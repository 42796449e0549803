"""What an installation consists of: every package of the tree, under its name."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("cli", "drivers", "journal", "ops", "recovery")


def test_every_package_is_installed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = sorted(path.parent for layer in LAYERS for path in (ROOT / layer).rglob("__init__.py"))
    expected = {f"safeimg.{folder.relative_to(ROOT).as_posix().replace('/', '.')}": folder for folder in folders}
    assert len(expected) > len(LAYERS)
    assert set(tools["packages"]) == set(expected)
    assert {name: ROOT / folder for name, folder in tools["package-dir"].items()} == expected
    assert all((folder / "py.typed").is_file() for folder in folders)
