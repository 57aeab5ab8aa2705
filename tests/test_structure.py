"""The structure that the design promises: imports point one way, families are strangers, files stay small."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import paucity
from paucity.catalog import families

PACKAGE = Path(inspect.getfile(paucity)).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LEVELS = {
    "checks": 0,
    "catalog": 1,
    "folder": 1,
    "ops": 1,
    "kernels": 2,
    "measure": 3,
    "report": 3,
    "models": 4,
    "training": 4,
}
LEVELS |= dict.fromkeys(families(), 5) | {
    "recipe": 6,
    "recipe_images": 5,
    "compare_images": 6,
    "pipeline_images": 7,
    "study": 7,
    "claims": 8,
    "bench": 7,
    "compare": 7,
    "pipeline": 8,
    "cli_output": 1,
    "cli_dictionary": 8,
    "cli_essential": 8,
    "cli_evaluate": 8,
    "cli_attention": 8,
    "cli_kinetics": 8,
    "cli_packed": 8,
    "kinetics": 5,
    "cli_study": 8,
    "cli_weights": 8,
    "cli": 9,
    "__main__": 10,
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of this package that a file imports, at the top or inside a function."""
    parts = ["paucity", *path.relative_to(PACKAGE).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {[*base, *name.split(".")][1] for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paucity."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", [f for f in FILES if room(f) != "__init__"], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = room(path)
    for other in imported_rooms(path) - {here, "__init__"}:
        assert LEVELS[other] < LEVELS[here], f"{path.name} in {here} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_stay_small_and_say_what_they_are(path):
    text = path.read_text()
    assert text.count("\n") <= 300, "over 300 lines: an operator is missing"
    assert path.stat().st_size == 0 or ast.get_docstring(ast.parse(text))


def test_public_names_have_docstrings():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if any(isinstance(by, ast.Name) and by.id == "overload" for by in node.decorator_list):
                    continue
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


@pytest.mark.parametrize("module", ["paucity", *(f"paucity.{family}" for family in families())])
def test_all_is_what_is_visible(module):
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__, key=lambda name: (not name.isupper(), name)) == list(loaded.__all__)
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None
