"""`personalize serve` and `ui`: the jobs, datasets and adapters of a workspace over HTTP; and its page in the browser."""

from __future__ import annotations

import threading
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RecipeError
from .messages import answer, echo
from .values import PATH

if TYPE_CHECKING:
    from ..jobs import Workspace

EXTRA = "pip install 'personalize[serve]'"


def service_options(command: Callable[..., int]) -> Callable[..., int]:
    """What `serve` and `ui` are told alike."""
    for option in (
        click.option("--device", "devices", multiple=True, metavar="cpu|cuda:0|...",
                     help="where jobs run [default: every GPU, else the CPU]"),
        click.option("--name", "names", multiple=True, metavar="HOST",
                     help="a host name by which it is called, such as a proxy's"),
        click.option("--folder", "-f", "folders", type=PATH, multiple=True, metavar="DIR",
                     help="a folder that requests may name: pictures, base models, where an image UI keeps its adapters"),
        click.option("--host", default="127.0.0.1", show_default=True,
                     help="address to listen on; others than this machine's need a token"),
        click.option("--port", "-p", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any that is free"),
        click.option("--workspace", type=PATH, metavar="DIR",
                     help="where jobs, datasets and adapters are kept [default: your data folder]"),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@service_options
def serve(workspace: Path | None, **options: Any) -> int:
    """Serve a workspace: an API of its own under /api, OpenAI's under /v1, and the page.

    On this machine alone no token is needed. Elsewhere one is: that of PERSONALIZE_TOKEN, or one that is made and kept in the
    workspace.
    """
    return run_service(place_of(workspace), **options)


@click.command()
@service_options
@click.option("--browser/--no-browser", default=True, show_default=True, help="open the page in the browser")
def ui(workspace: Path | None, port: int, browser: bool, **options: Any) -> int:
    """Open the studio in the browser: pictures in, an adapter out. Where it already runs, that one is opened.

    It ends with Ctrl-C. Work that was begun goes on at the next start. Folders of A1111, Forge and ComfyUI in your home folder
    are found, so that adapters can be sent there; --folder names others.
    """
    place = place_of(workspace)
    from ..service.hosts import usual_hosts
    from ..service.serve import address_of_running, is_free

    if address := address_of_running(place):
        echo(f"the studio of {place.root} is open at {address}")
        answer(address=address, workspace=place.root)
        show(address, browser)
        return 0
    port = port if is_free(options["host"], port) else 0
    return run_service(place, port, hosts=usual_hosts(Path.home()), on_address=lambda address: show(address, browser), **options)


def show(address: str, browser: bool) -> None:
    """Open a page in the browser; some of them keep who opens one waiting."""
    if browser:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def place_of(workspace: Path | None) -> Workspace:
    """The workspace. Raises RecipeError where the packages of the service are missing."""
    try:
        from ..service import serve as service
    except ModuleNotFoundError as error:
        raise RecipeError(f"serving needs the package {error.name}", EXTRA) from error
    from ..jobs import Workspace

    assert service
    return Workspace(workspace)


def run_service(
    place: Workspace,
    port: int,
    host: str,
    folders: tuple[Path, ...],
    names: tuple[str, ...],
    devices: tuple[str, ...],
    hosts: Sequence[Path] = (),
    on_address: Callable[[str], None] = lambda _: None,
) -> int:
    """Serve a workspace until it is asked to end."""
    from ..service import serve as service
    from ..service.options import Options, find_token, is_local

    for folder in folders:
        if not folder.is_dir():
            raise RecipeError(f"there is no folder {folder}", "--folder names one that is there")
    token, file = find_token(place.root, needed=not (is_local(host) and all(map(is_local, names))))
    named = tuple(folder.absolute() for folder in folders)
    options = Options(place.root, host, port, token, named, names, hosts=tuple(hosts))

    def on_ready(address: str) -> None:
        echo(f"{place.root} is served on {address}")
        if token:
            echo(f"it needs the token {f'in {file}' if file else 'of PERSONALIZE_TOKEN'}")
        answer(address=address, workspace=place.root)
        on_address(address)

    return service.serve(options, devices or devices_here(), on_ready)


def devices_here() -> tuple[str, ...]:
    """Every GPU, else the CPU; counted without torch, which the service's own process does not need."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    return tuple(f"cuda:{number}" for number in range(len(gpus))) or ("cpu",)
