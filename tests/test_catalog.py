"""The catalogue is complete, every name in it resolves, and it is cheap to import."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import paucity
from paucity import catalog
from paucity.catalog import METHODS, Method, as_rows, families, register
from paucity.checks import InputError
from paucity.claims import CLAIMS

PACKAGE = Path(inspect.getfile(paucity)).parent
SHARED_FILES = {
    "__init__",
    "allocate",
    "applied",
    "apply",
    "base",
    "break_even",
    "break_even_report",
    "cached_attention",
    "attention_maps",
    "channels_graph",
    "channels_groups",
    "channels_moves",
    "channels_rules",
    "channels_scores",
    "channels_shrink",
    "group_scales",
    "compute",
    "crossover",
    "gqsa_applied",
    "gqsa_tuning",
    "gqsa_work",
    "gradients",
    "influence",
    "install",
    "interface",
    "kept_sites",
    "layerwise",
    "lemo_fit",
    "lemo_layer",
    "lemo_predict",
    "linear",
    "masked_heads",
    "matrices",
    "needles",
    "policy",
    "portable",
    "prefill",
    "prompt",
    "pruner",
    "pruning",
    "refresh",
    "rotary",
    "scores",
    "shards",
    "site",
    "statistics",
    "to_folder",
    "telemetry",
    "ticket_controls",
    "ticket_folder",
    "usage",
    "votes",
    "watch",
    "files",
    "foreign",
    "rules",
    "sae",
    "saelens",
    "sources",
    "tensors",
    "trainer",
    "wrapped",
    "build",
    "checkpoint",
    "examine",
    "job",
    "ioi_task",
    "judge",
    "live",
    "mixing",
    "parallel",
}
SHARED_PACKAGES = {"cache", "shared_llm", "speculation", "structured"}


def test_names_are_sorted():
    assert list(METHODS) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_target_resolves_and_has_a_docstring_that_names_its_paper(name):
    method = METHODS[name]
    assert callable(method.load())
    module = sys.modules[f"paucity.{method.target.partition(':')[0]}"]
    assert method.paper in module.__doc__


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.step])
def test_every_step_has_options_with_documented_defaults(name):
    options_for, apply_step = METHODS[name].installer()
    options = options_for(name)
    assert issubclass(options, BaseModel)
    assert options.model_config["extra"] == "forbid"
    assert callable(apply_step)


@pytest.mark.parametrize("name", METHODS)
def test_operators_exist_and_claims_are_registered(name):
    source = "".join(p.read_text() for folder in ("ops", "kernels") for p in (PACKAGE / folder).rglob("*.py"))
    defined = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert set(METHODS[name].ops) <= defined
    assert set(METHODS[name].claims) <= set(CLAIMS)


def test_a_method_that_is_no_step_is_refused_by_recipes():
    method = Method("attention.watch:watch", family="attention", paper="0000.00000", title="A tool", step=False)
    with pytest.raises(InputError, match=r"be one that a recipe can use, got attention.watch:watch, which is called"):
        method.installer()


def test_every_method_file_is_in_the_catalogue():
    """One file, one method; packages with parts that methods share, or that one method is made of, are named."""
    targets = {method.target.partition(":")[0] for method in METHODS.values()}
    files = set()
    for family in families():
        for path in (PACKAGE / family).rglob("*.py"):
            inner = path.relative_to(PACKAGE).with_suffix("").parts[1:]
            if inner[-1] not in SHARED_FILES and inner[0] not in SHARED_PACKAGES:
                files.add(".".join((family, *inner)))
    assert files == {target for target in targets if target.split(".")[1] not in SHARED_PACKAGES}


def test_rows_have_the_contract_keys():
    for row in as_rows():
        assert list(row) == ["name", "family", "paper", "title", "operators", "claims"]
    assert {row["family"] for row in as_rows("weights")} == {"weights"}


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"method must be one of .*wanda.*, got wnada \(did you mean 'wanda'\?\)"):
        catalog.get("wnada")
    with pytest.raises(InputError, match="family must be one of"):
        as_rows("weight")


def test_register_refuses_a_taken_name(monkeypatch):
    monkeypatch.setattr(catalog, "METHODS", dict(METHODS))
    method = Method("plugin:score", family="weights", paper="0000.00000", title="A plug-in", package="elsewhere")
    register("plugin", method)
    assert catalog.get("plugin") is method
    with pytest.raises(InputError, match="name must be new, got wanda"):
        register("wanda", method)


def test_the_command_line_and_the_catalogue_do_not_import_torch():
    code = "import sys, paucity, paucity.cli, paucity.catalog; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_readme_lists_every_method_by_family():
    readme = Path("README.md").read_text(encoding="utf-8")
    for family in families():
        names = ", ".join(f"`{name}`" for name, method in sorted(METHODS.items()) if method.family == family)
        assert f"| {family} | {names} |" in readme
