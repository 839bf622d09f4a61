"""personalize in ComfyUI: nodes whose work the studio does, and the studio in the sidebar. Nothing is installed here."""

from __future__ import annotations

from typing import Any

from server import PromptServer

from .personalize_comfyui.nodes import NODES
from .personalize_comfyui.routes import add_routes
from .personalize_comfyui.table import as_v1, as_v3

WEB_DIRECTORY = "./web"

try:
    from comfy_api import latest
    from comfy_api.latest import ComfyExtension, io  # noqa: F401
except ImportError:  # where both were there, ComfyUI would take V1
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = as_v1(NODES)
else:

    async def comfy_entrypoint() -> Any:
        """The nodes as an extension."""
        return as_v3(NODES, latest)


if getattr(PromptServer, "instance", None) is not None:  # not where only the nodes are listed
    add_routes(PromptServer.instance)
