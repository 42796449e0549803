"""Imports point downward only: cli → recovery → ops → journal, drivers (docs/design.md, "Layers")."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECORDS = "safeimg.drivers.records."  # below everything: what records are made of
BELOW = {
    "cli": {"cli", "recovery", "ops", "journal", "drivers"},
    "recovery": {"recovery", "ops", "journal", "drivers"},
    "ops": {"ops", "journal", "drivers"},
    "journal": {"journal"},
    "drivers": {"drivers"},
}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it; strings given to import_module too."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("safeimg.")
        ):
            yield node.value


@pytest.mark.parametrize("layer", BELOW)
def test_imports_point_downward(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        names = {name for name in imported(path) if name.startswith("safeimg.") and not name.startswith(RECORDS)}
        layers = {name.split(".")[1] for name in names}
        assert layers <= BELOW[layer], f"{path.relative_to(ROOT)} imports {layers - BELOW[layer]}"
