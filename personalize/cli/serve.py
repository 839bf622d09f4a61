"""`personalize serve`: the jobs, datasets and adapters of a workspace over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import RecipeError
from .messages import answer, echo
from .values import PATH

EXTRA = "pip install 'personalize[serve]'"


@click.command()
@click.option(
    "--workspace", type=PATH, metavar="DIR", help="where jobs, datasets and adapters are kept [default: your data folder]"
)
@click.option("--port", "-p", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any that is free")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="address to listen on; others than this machine's need a token"
)
@click.option("--folder", "-f", "folders", type=PATH, multiple=True, metavar="DIR",
              help="a folder that requests may name: pictures, base models, where an image UI keeps its adapters")  # fmt: skip
@click.option("--name", "names", multiple=True, metavar="HOST", help="a host name by which it is called, such as a proxy's")
@click.option(
    "--device", "devices", multiple=True, metavar="cpu|cuda:0|...", help="where jobs run [default: every GPU, else the CPU]"
)
def serve(
    workspace: Path | None, port: int, host: str, folders: tuple[Path, ...], names: tuple[str, ...], devices: tuple[str, ...]
) -> int:
    """Serve a workspace: an API of its own under /api, OpenAI's under /v1, and the page.

    On this machine alone no token is needed. Elsewhere one is: that of PERSONALIZE_TOKEN, or one that is made and kept in the
    workspace.
    """
    try:
        from ..service import serve as service
    except ModuleNotFoundError as error:
        raise RecipeError(f"serving needs the package {error.name}", EXTRA) from error
    from ..jobs import Workspace
    from ..service.options import Options, find_token, is_local

    for folder in folders:
        if not folder.is_dir():
            raise RecipeError(f"there is no folder {folder}", "--folder names one that is there")
    place = Workspace(workspace).root
    token, file = find_token(place, needed=not (is_local(host) and all(map(is_local, names))))
    options = Options(place, host, port, token, tuple(folder.absolute() for folder in folders), names)

    def on_ready(address: str) -> None:
        echo(f"{place} is served on {address}")
        if token:
            echo(f"it needs the token {f'in {file}' if file else 'of PERSONALIZE_TOKEN'}")
        answer(address=address, workspace=place)

    return service.serve(options, devices or devices_here(), on_ready)


def devices_here() -> tuple[str, ...]:
    """Every GPU, else the CPU; counted without torch, which the service's own process does not need."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    return tuple(f"cuda:{number}" for number in range(len(gpus))) or ("cpu",)
