"""The page inside of an image UI, whose own address the browser sees: there it lies below a prefix, at `/personalize/...`.

The UI's plugin passes requests on with the prefix taken away and told in a header. Routes know nothing of it; what leaves is put
below it: the addresses in pages, and those that a browser is sent to. Another header tells the checkpoint that the UI draws with.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .options import is_local
from .security import has_bearer

HEADER, BASE = "x-forwarded-prefix", "x-personalize-base"
SHAPE = re.compile(r"(/[A-Za-z0-9._~-]+)+")
LONGEST = 200  # letters
# Attributes that hold addresses of this service, and the slash that an address begins with
ADDRESSES = re.compile(
    r'(\s(?:href|src|action|sse-connect|hx-(?:get|post|put|patch|delete)|data-(?:view|brush|before|masks))=")/(?!/)'
)
SENT_TO = ("location", "hx-redirect")


class Prefix:
    """ASGI middleware that notes the prefix of a request, and puts what browsers are sent to below it.

    It is believed from this machine alone, or with the service's token: nobody else passes requests on.
    """

    def __init__(self, app: ASGIApp, token: str = "") -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = self.prefix(scope) if scope["type"] == "http" else ""
        if not prefix:
            await self.app(scope, receive, send)
            return

        async def send_below(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in SENT_TO:
                    if (address := headers.get(name, "")).startswith("/"):
                        headers[name] = prefix + address
            await send(message)

        scope["prefix"], scope["base"] = prefix, unquote(Headers(scope=scope).get(BASE, ""))
        await self.app(scope, receive, send_below)

    def prefix(self, scope: Scope) -> str:
        """The prefix of a request; "" for none, and for what is no path."""
        headers = Headers(scope=scope)
        given = headers.get(HEADER, "").rstrip("/")
        host = (scope.get("client") or ("",))[0]
        trusted = is_local(host) or bool(self.token and has_bearer(headers, self.token))
        return given if trusted and len(given) <= LONGEST and SHAPE.fullmatch(given) else ""


def base_of_host(request: Request) -> str:
    """The checkpoint that the image UI draws with in which the page is shown; "" outside of one."""
    return str(request.scope.get("base", ""))


def below_prefix(request: Request, html: str) -> str:
    """A page, or a part of one, with its addresses below the prefix that the browser sees."""
    prefix: str = request.scope.get("prefix", "")
    return ADDRESSES.sub(rf"\g<1>{prefix}/", html) if prefix else html
