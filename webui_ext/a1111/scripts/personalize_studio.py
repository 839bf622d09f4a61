"""The studio of personalize as a tab of A1111, Forge and their kin. Nothing heavy is imported or installed in this process."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path
from typing import Any

import gradio as gr
from modules import script_callbacks, scripts

HOME = str(Path(__file__).resolve().parent.parent)
if HOME not in sys.path:
    sys.path.append(HOME)

from personalize_a1111 import host  # noqa: E402
from personalize_a1111.studio import CARD, PREFIX, app, bridge  # noqa: E402

# The browser asks for the studio when the tab is opened, and not before: javascript/personalize.js
FRAME = f'<iframe id="personalize_frame" title="personalize" data-src=".{PREFIX}/-/"></iframe>'


def make_tab() -> list[tuple[gr.Blocks, str, str]]:
    """One page, whatever gradio there is."""
    with gr.Blocks(analytics_enabled=False) as tab:
        gr.HTML(FRAME)
    return [(tab, "Personalize", "personalize")]


def add_routes(demo: Any, server: Any) -> None:
    """The studio, below the host's own address; before the host's own routes, some of which take any path."""
    if demo is None:  # --nowebui: there is no page that it could be shown in
        return
    server.mount(PREFIX, app)
    server.router.routes.insert(0, server.router.routes.pop())
    CARD.start()


class ModelIsBack(scripts.Script):
    """Who draws while a training runs gets the model back at once."""

    def title(self) -> str:
        return "personalize"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        return []

    def before_process(self, p: Any, *args: Any) -> None:
        CARD.load_back()


atexit.register(bridge.close)
script_callbacks.on_ui_tabs(make_tab)
script_callbacks.on_ui_settings(host.add_options)
script_callbacks.on_app_started(add_routes)
