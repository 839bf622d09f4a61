"""The one bridge of this process: it outlives a reload of the UI, and the studio goes on meanwhile."""

from __future__ import annotations

from typing import Any

from personalize_studio import Bridge
from personalize_studio.proxy import Refusal

from . import host
from .asgi import App
from .card import Card

PREFIX = "/personalize"


def tell_lora(given: dict[str, Any]) -> dict[str, str]:
    """Where the LoRA of a card lies. Raises Refusal."""
    if not (path := host.find_lora(str(given.get("name", "")))):
        raise Refusal(404, "not_found", "this UI has no LoRA file of that name", "refresh its list")
    return {"path": path}


def refresh(_: dict[str, Any]) -> dict[str, bool]:
    """Let the host see a new LoRA."""
    host.refresh_loras()
    return {"done": True}


bridge = Bridge(host.settings, PREFIX, {"lora": tell_lora, "refresh": refresh}, base=host.checkpoint)
app = App(bridge, host.may_enter)
CARD = Card(bridge, lambda name: bool(host.option(name)))
