"""The house rules: who may import whom, the numbers to live by, the public names, and docs that cannot rot."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from statistics import median, quantiles

import click
import pytest

import personalize
from personalize.recipe.fields import Recipe
from personalize.recipe.reference import reference
from personalize.recipe.samplers import SAMPLERS
from personalize.recipe.settings import settings
from personalize.registry import BUILT_IN
from tools import architecture
from tools.architecture import FLOORS, PACKAGE, ROOT, circle, file_imports, imported_names, modules, room_of

HOUSE = PACKAGE
LIGHT = {"torch", "safetensors"}  # all that adapters/ may need, so that it works inside any host
REGULAR = re.compile(r"[a-z]{3,}ed")
NO_PARTICIPLES = "bleed breed embed exceed feed need proceed seed speed succeed"  # verbs and nouns that end in -ed
# Participles; not those that are verbs or nouns as well: become, bound, cut, ground, put, run, set, split, wound
IRREGULAR = """
    begun bent born borne bought broken brought built burnt caught chosen dealt done drawn driven drunk eaten fallen fed
    felt forgotten fought found frozen given gone grown heard held hidden hung kept known laid learnt led left lent lit
    lost made meant met paid proven ridden risen said seen sent shaken shown shrunk sold sought spent spilt spoken spun
    stolen stood stuck sunk swept taken taught thought told torn understood won worn woven written
"""
PARTICIPLES_ALLOWED = {
    "personalize/adapters/adapter.py": {"scaled", "weighted"},  # public; a value's changed copy, as Python's `sorted`
    "personalize/adapters/delta.py": {"stored"},  # public; the tensors as a file holds them
}


def functions() -> Iterator[tuple[str, int]]:
    """Every function's name and its length in lines."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(HOUSE)))
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    own, order = room_of(path), list(FLOORS)
    assert own in FLOORS, f"{own} has no floor yet: give it one in tools/architecture.py"
    for name in imported_names(path):
        parts = [*name.split("."), ""]
        if parts[0] == "personalize" and (other := parts[1]) != own and other in FLOORS:
            assert order.index(other) < order.index(own), f"{path.relative_to(ROOT)} imports {other}, which is not below it"


def test_no_files_import_each_other_in_a_circle() -> None:
    assert [str(path.relative_to(ROOT)) for path in circle(file_imports())] == []


def test_the_architecture_page_is_fresh() -> None:
    assert (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8") == architecture.page(), "run `make docs`"


@pytest.mark.parametrize(
    "path",
    sorted([*(HOUSE / "adapters").rglob("*.py"), *(HOUSE / "families").glob("*.py"), *(HOUSE / "formats").glob("*.py")]),
    ids=lambda path: path.name,
)
def test_adapters_need_torch_and_safetensors_only(path: Path) -> None:
    top = ast.parse(path.read_text(encoding="utf-8")).body  # what is imported inside a function is for who has it
    named = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in top if isinstance(node, ast.ImportFrom) and not node.level and node.module]
    outside = {name.split(".")[0] for name in named} - set(sys.stdlib_module_names) - LIGHT - {"personalize"}
    assert not outside
    inside = {name.split(".")[1] for name in imported_names(path) if name.startswith("personalize.")}
    assert inside <= {"adapters", "families", "formats", "errors", "io", "lazy", "text", "registry", "findings"}


def test_numbers_to_live_by(capsys: pytest.CaptureFixture[str]) -> None:
    files = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    lengths = dict(functions())
    longest = sorted(lengths, key=lambda name: -lengths[name])[:3]
    p90 = quantiles(lengths.values(), n=10)[-1]
    with capsys.disabled():
        longest_file = max(files, key=files.__getitem__)
        print(f"\n{len(files)} files, {sum(files.values())} lines, longest: {longest_file} {files[longest_file]}")
        print(f"{len(lengths)} functions, median {median(lengths.values()):g}, p90 {p90:g}, longest: ", end="")
        print(", ".join(f"{name} {lengths[name]}" for name in longest))
    assert {name: count for name, count in files.items() if count > 400} == {}
    assert {name: count for name, count in lengths.items() if count > 60} == {}
    assert p90 <= 30


def test_no_blanket_except_and_no_pickles() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                blanket = node.type is None or (
                    isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                )
                assert not blanket, f"{path.relative_to(ROOT)}:{node.lineno}"
        assert not {"pickle", "shelve", "marshal"} & {name.split(".")[0] for name in imported_names(path)}, path


def is_participle(name: str) -> bool:
    word = name.strip("_")
    return word in IRREGULAR.split() or (REGULAR.fullmatch(word) is not None and word not in NO_PARTICIPLES.split())


def test_a_function_says_what_it_computes_or_does() -> None:
    """No function is called by a bare participle: `encode_header` or `header_bytes`, never `encoded`. Properties may be."""
    found = []
    for path in [*modules(), *sorted((ROOT / "tools").rglob("*.py"))]:
        file = str(path.relative_to(ROOT))
        allowed = PARTICIPLES_ALLOWED.get(file, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and allowed is not None and is_participle(node.name):
                is_property = any(ast.unparse(one).endswith("property") for one in node.decorator_list)
                found += [] if is_property or node.name in allowed else [f"{file}:{node.lineno} {node.name}"]
    assert found == []
    assert all(map(is_participle, ("told", "_kept", "opened"))) and not any(map(is_participle, ("put", "seed", "with_sizes")))


def test_the_public_names() -> None:
    assert personalize.__all__ == [
        "Adapter",
        "Base",
        "PersonalizeError",
        "Recipe",
        "Run",
        "__version__",
        "attach",
        "describe",
        "draw",
        "read_folder",
        "resolve",
        "train",
        "train_fleet",
        "write_report",
    ]
    for name in personalize.__all__:
        value = getattr(personalize, name)
        assert name == "__version__" or callable(value), name
    assert set(personalize.__all__) <= set(dir(personalize))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = personalize.nonsense


def test_a_submodule_does_not_hide_the_function_of_its_name() -> None:
    code = "import personalize.training.loop, personalize as p; assert callable(p.train) and callable(p.attach)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["train", "--help"], {"pydantic"}),
        (["generate", "--help"], set()),
        (["dataset", "--help"], {"pydantic"}),
        (["caption", "--help"], {"pydantic"}),
        (["--version"], set()),
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str], allowed: set[str]) -> None:
    heavy = {"torch", "diffusers", "transformers", "peft", "pydantic", "rich", "numpy", "PIL", "jinja2"} - allowed
    code = (
        f"import sys; from personalize.cli import run; assert run({arguments}) == 0; print(sorted({heavy} & sys.modules.keys()))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.splitlines()[-1] == "[]"


def test_import_is_free() -> None:
    code = "import sys, personalize; print(sorted({'torch', 'pydantic', 'click', 'PIL'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_the_recipe_page_is_fresh() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_every_setting_is_a_flag_and_in_the_docs() -> None:
    from personalize.cli import cli

    context = click.Context(cli.commands["train"])
    flags = {flag for parameter in cli.commands["train"].get_params(context) for flag in parameter.opts}
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for setting in settings().values():
        assert setting.flag in flags or setting.name == "folder", setting.name
        assert f"| `{setting.flag}` |" in page


def test_generate_has_the_defaults_of_the_recipe() -> None:
    from personalize.cli import cli

    defaults = {parameter.name: parameter.default for parameter in cli.commands["generate"].params}
    sampling = Recipe().sampling
    assert (defaults["steps"], defaults["guidance"]) == (sampling.sample_steps, sampling.guidance)
    assert (defaults["sampler"], defaults["precision"]) == (sampling.sampler, Recipe().fitting.precision)
    assert signature(personalize.draw).parameters["steps"].default == sampling.sample_steps


@pytest.mark.parametrize("path", [p for p in modules() if ">>>" in p.read_text(encoding="utf-8")], ids=lambda path: path.stem)
def test_examples_in_docstrings(path: Path) -> None:
    name = ".".join(["personalize", *path.relative_to(HOUSE).with_suffix("").parts])
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_kinds_methods_and_presets_of_adapters_are_in_the_docs() -> None:
    from personalize.adapters.ops.methods import METHODS
    from personalize.adapters.strengths.grammar import PRESETS
    from personalize.registry import table

    docs = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    kinds = table("kinds").values()
    words = {word for kind in kinds for word in (kind.title, *kind.roles)}
    assert [word for word in (*words, *METHODS, *PRESETS) if word not in docs] == []


def test_samplers_are_in_the_docs() -> None:
    docs = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    assert [name for name in SAMPLERS if f"`{name}`" not in docs] == []


def test_every_command_is_in_the_readme() -> None:
    from personalize.cli import cli

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in cli.commands:
        assert f"personalize {name}" in readme, name


def test_code_in_the_extending_page_is_that_of_the_files() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- (\S+) -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(found) == 8
    for name, code in found:
        assert code in (ROOT / name).read_text(encoding="utf-8"), name


def test_every_table_is_in_the_extending_page() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    words = {
        "kinds": "adapter kind",
        "families": "model family",
        "objectives": "objective",
        "optimizers": "optimizer",
        "captioners": "captioner",
        "jobs": "kind of job",
    }
    for name in BUILT_IN:
        assert f"## A {words.get(name, 'backend')}\n" in page or f"## An {words.get(name, 'backend')}\n" in page, name
