"""Who may call the service: Host and Origin are checked before anything else, then the token; and what browsers may load.

A page of another site can make a browser send requests to this machine. It is kept out by the Host header, which names the
site even where its name was made to point here (DNS rebinding), and by Origin and Sec-Fetch-Site (CSRF).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
from collections.abc import Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refusal, error_response
from .options import Options, address_of, is_local

COOKIE = "personalize"
LOGIN = "/login"
OPEN = ("/health", LOGIN)  # what answers without a token; files of the page do as well
STATIC = "/static/"
# Nothing is loaded from elsewhere, nothing inline runs, and no other site may show the page in a frame.
POLICY = "; ".join(
    ("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:", "font-src 'self'",
     "connect-src 'self'", "form-action 'self'", "base-uri 'none'", "frame-src 'self'", "frame-ancestors 'self'")
)  # fmt: skip
# A run's report is one file with its style and pictures inside; its scripts do not run here.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; sandbox"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with none at all, browsers send forms with the origin "null"
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}

TOO_LARGE = Refusal(413, "too_large", "the body of the request is too large", "send less at a time")


class Guard:
    """ASGI middleware in front of everything: refuses what must not come in, and sets the headers of what goes out."""

    def __init__(self, app: ASGIApp, options: Options, large: Sequence[re.Pattern[str]] = ()) -> None:
        self.app, self.options, self.large = app, options, large
        limits = options.limits
        self.limited = {size: RequestBodyLimitMiddleware(app, max_body_size=size) for size in (limits.body, limits.upload)}
        own = () if is_local(options.host) else (options.host.lower(), socket.gethostname().lower())
        self.names = {name.lower() for name in (*options.names, *own)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are no web sockets here
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = self.answer(scope["method"], scope["path"], headers)
        limits, is_large = self.options.limits, any(pattern.match(scope["path"]) for pattern in self.large)
        app = self.limited[limits.upload if is_large else limits.body]
        await (answer or app)(scope, receive, _with_headers(scope, receive, send))

    def answer(self, method: str, path: str, headers: Headers) -> Response | None:
        """What a request that may not come in is told; None for one that may."""
        try:
            self.check_host(headers)
            check_origin(method, headers)
            self.check_token(path, headers)
        except Refusal as refusal:
            if refusal.status == 401 and method == "GET" and "text/html" in headers.get("accept", ""):
                return RedirectResponse(LOGIN, 303)
            return error_response(refusal)
        return None

    def check_host(self, headers: Headers) -> None:
        """Raise Refusal for a request that was meant for another host."""
        hosts = headers.getlist("host")
        name = host_name(hosts[0]) if len(hosts) == 1 else ""
        known = is_local(name) or name in self.names or (not is_local(self.options.host) and address_of(name) is not None)
        if not name or not known:
            raise Refusal(421, "unknown_host", "this service does not go by that host name", "--name HOST allows one")

    def check_token(self, path: str, headers: Headers) -> None:
        """Raise Refusal for a request without the token, where there is one."""
        if not self.options.token or path in OPEN or path.startswith(STATIC):
            return
        if not (has_bearer(headers, self.options.token) or has_cookie(headers, self.options.token)):
            raise Refusal(401, "no_token", "a token is needed", "send it as Authorization: Bearer TOKEN")


def host_name(host: str) -> str:
    """The name in a Host header, without its port; "" for what is none.

    >>> host_name("Localhost:8765"), host_name("[::1]:8765"), host_name("a b"), host_name("x@localhost")
    ('localhost', '::1', '', '')
    """
    try:
        found = urlsplit(f"//{host}")
        return (found.hostname or "") if found.netloc == host and "@" not in host and not found.path and " " not in host else ""
    except ValueError:
        return ""


def check_origin(method: str, headers: Headers) -> None:
    """Raise Refusal for what a page of another site, or of another port, made a browser send."""
    refusal = Refusal(403, "other_origin", "requests from pages of other sites are refused", "open the page of this service")
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower():
        raise refusal
    links = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"  # somebody followed a link to here
    if site not in ("none", "same-origin") and not (links and headers.get("sec-fetch-dest") == "document"):
        raise refusal


def cookie_of(token: str) -> str:
    """What the cookie holds: proof of the token, and not the token itself."""
    return hmac.new(token.encode(), b"personalize session", hashlib.sha256).hexdigest()


def same(given: str, known: str) -> bool:
    """Whether two secrets are equal, in a time that says nothing about where they differ."""
    return hmac.compare_digest(given.encode(errors="surrogatepass"), known.encode())


def has_bearer(headers: Mapping[str, str], token: str) -> bool:
    """Whether a request carries the token."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and same(given.strip(), token)


def has_cookie(headers: Mapping[str, str], token: str) -> bool:
    """Whether a request carries a cookie that the token was given for."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return False
    return morsel is not None and same(morsel.value, cookie_of(token))


def _with_headers(scope: Scope, receive: Receive, send: Send) -> Send:
    """Sending, with the headers that every answer has unless it sets them itself; what is refused as too large, as JSON."""
    replaced = False

    async def send_with_headers(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if message["status"] == 413 and "json" not in headers.get("content-type", ""):  # by the limit of bodies itself
                replaced = True
                await error_response(TOO_LARGE)(scope, receive, send_with_headers_of_json)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        if not replaced:
            await send(message)

    async def send_with_headers_of_json(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return send_with_headers
