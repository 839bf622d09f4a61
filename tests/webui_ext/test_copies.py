"""What the plugins share is the same in each, is standard library alone, and Python 3.10."""

from __future__ import annotations

import ast
import doctest
import importlib
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).resolve().parents[2] / "webui_ext"
SHARED = PLUGINS / "a1111" / "personalize_studio"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_copies_are_equal() -> None:
    assert contents(PLUGINS / "comfyui" / "personalize_studio") == contents(SHARED), "run `make plugins`"


def test_the_panel_follows_the_theme_as_the_studio_does() -> None:
    studio = PLUGINS.parent / "personalize" / "service" / "page" / "static" / "theme.js"
    assert (SHARED / "theme.js").read_bytes() == studio.read_bytes()
    assert b'src="theme.js"' in (SHARED / "panel.html").read_bytes()


@pytest.mark.parametrize("path", sorted(SHARED.glob("*.py")), ids=lambda path: path.name)
def test_the_standard_library_is_enough(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert {name.split(".")[0] for name in named} <= {*sys.stdlib_module_names, "personalize_studio"}


def test_numbers_to_live_by() -> None:
    for path in PLUGINS.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


@pytest.mark.parametrize("name", ["personalize_studio.proxy", "personalize_studio.environment", "personalize_a1111.asgi"])
def test_the_examples_are_true(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
