"""docs/architecture.md, drawn from the imports: `python -m tools.architecture > docs/architecture.md`, or `make docs`.

FLOORS is the one list of what may import what; tests/test_house.py enforces it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "personalize"

# Room => what it is for, the lowest floor first. A file imports only from floors below its own, or from its own room.
FLOORS = {
    "version": "the version, which written files carry",
    "errors": "every error a user can meet, in one tree",
    "lazy": "packages whose names are imported when they are first used",
    "registry": "tables of what varies: kinds, families, objectives, captioners, jobs, ...; entry points come in here",
    "text": "numbers and texts as people read them",
    "findings": "what a check found: one type for adapter files and for datasets",
    "io": "atomic writes",
    "lock": "one writer at a time in a folder",
    "pictures": "what lies in a folder of pictures, by names alone: one answer for whoever counts, trains, draws or advises",
    "formats": "safetensors on disk: headers checked before they are believed, tensors one at a time, checkpoints as a view",
    "families": "one file per model family; what they share: UNet, CLIP, noise, names",
    "adapters": "the adapter file and its algebra: kinds, strengths, operations, doctor; torch and safetensors only",
    "recipe": "every setting of a run with its default, bounds and help text",
    "models": "a loaded base model with four verbs: encode, embed, denoise, decode",
    "data": "a folder of images -> batches of latents",
    "captioning": "captions written by a model, beside the pictures of a folder that have none",
    "tuning": "what learns on a model: adapter layers, attached and removed",
    "inference": "images from a base model and adapters: sessions, requests, samplers, contact sheets",
    "training": "one loop for one run or many; objectives, optimizers, memory, run folders",
    "backends": "where runs are trained",
    "reports": "what a run, an adapter file or a dataset is like: pages, tables, pictures",
    "api": "what Python and the command share: a recipe from a folder, a run and its report",
    "jobs": "jobs that survive: a queue in one SQLite file, worked off by child processes",
    "service": "the jobs, datasets and adapters of a workspace over HTTP: its own routes, OpenAI's, and the page",
    "cli": "the `personalize` command",
    "__init__": "the public names",
    "__main__": "`python -m personalize`",
}
LOW = (
    "version",
    "errors",
    "lazy",
    "registry",
    "text",
    "findings",
    "io",
    "lock",
    "__init__",
    "__main__",
)  # everybody's: not drawn

INTRO = """# Architecture

A file imports only from floors below its own, or from its own room. `tests/test_house.py` enforces the list, and that no files
import each other in a circle. Generated from the imports by `make docs`; do not edit.

| floor | room | what is in it | files | lines |
|---|---|---|---|---|
"""


def modules() -> list[Path]:
    """Every Python file of the package."""
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def room_of(path: Path) -> str:
    """`recipe` for recipe/fields.py, `errors` for errors.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(path: Path, *, typing: bool = True) -> Iterator[str]:
    """Absolute names of what a file imports, wherever in the file; without `typing`, not those that only type checkers see."""
    package = ["personalize", *path.relative_to(PACKAGE).parts[:-1]]
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), typing):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def _nodes(tree: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """All nodes, with or without the bodies of `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if not typing and isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _nodes(node, typing)


def file_of(name: str) -> Path | None:
    """The package's file that an absolute name lies in, or is."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        path = PACKAGE.joinpath(*parts[1:length])
        for found in (path.with_suffix(".py"), path / "__init__.py"):
            if parts[0] == "personalize" and found.is_file():
                return found
    return None


def file_imports() -> dict[Path, set[Path]]:
    """File => the package's other files that it imports when it runs."""
    found = {path: {file for name in imported_names(path, typing=False) if (file := file_of(name))} for path in modules()}
    return {path: files - {path} for path, files in found.items()}


def circle(graph: dict[Path, set[Path]]) -> list[Path]:
    """Some files that import each other in a circle; empty if there are none."""
    done: set[Path] = set()

    def search(path: Path, way: list[Path]) -> list[Path]:
        if path in way:
            return way[way.index(path) :]
        if path in done:
            return []
        for other in sorted(graph[path]):
            if found := search(other, [*way, path]):
                return found
        done.add(path)
        return []

    return next((found for path in sorted(graph) if (found := search(path, []))), [])


def arrows() -> list[tuple[str, str]]:
    """(room, a room that it imports from), without the rooms that everybody uses."""
    pairs = {(room_of(path), room_of(other)) for path, others in file_imports().items() for other in others}
    return sorted(pair for pair in pairs if pair[0] != pair[1] and not {*pair} & {*LOW})


def shortest(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows that no way over other rooms implies (transitive reduction)."""
    below: dict[str, set[str]] = {}
    for room in FLOORS:  # lowest first: what lies below a room is known before the room is
        own = {other for one, other in pairs if one == room}
        below[room] = own.union(*(below[other] for other in own))
    return [
        (room, other)
        for room, other in pairs
        if not any(other in below[via] for one, via in pairs if one == room and via != other)
    ]


def page() -> str:
    """The whole page."""
    rows = []
    for floor, (room, about) in enumerate(FLOORS.items()):
        files = [path for path in modules() if room_of(path) == room]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        rows.append(f"| {floor} | `{room}` | {about} | {len(files)} | {lines:,} |\n")
    drawn = "".join(f"    {above} --> {below}\n" for above, below in shortest(arrows()))
    picture = f"\n```mermaid\nflowchart TD\n{drawn}```\n"
    everybody = ", ".join(f"`{room}`" for room in LOW)
    note = f"\nAn arrow points to what is imported; those that a longer way implies are left out, and {everybody}.\n"
    return INTRO + "".join(reversed(rows)) + picture + note + inside()


def inside() -> str:
    """Every file of each room with the first line of its docstring."""
    told = ["\n## File by file\n"]
    for room in FLOORS:
        files = [path for path in modules() if room_of(path) == room and path.stem != "__init__"]
        if len(files) > 1:
            told.append(f"\n### {room}\n\n")
            told += [f"- `{path.relative_to(PACKAGE / room)}`: {_summary(path)}\n" for path in files]
    return "".join(told)


def _summary(path: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    whole = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(whole.partition("\n\n")[0].split())


if __name__ == "__main__":
    print(page(), end="")
