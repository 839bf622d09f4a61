"""Where a token is needed, the page asks for it once."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from ..security import COOKIE, LOGIN, cookie_of, same
from ..studio import Studio
from .render import Room, show

YEAR = 365 * 86_400  # seconds

router = APIRouter(route_class=Room)


@router.get(LOGIN)
def login_page(request: Request) -> Response:
    """The form that asks for the token."""
    return show(request, "login", wrong=False)


@router.post(LOGIN)
async def log_in(request: Request) -> Response:
    """A cookie for the token, which scripts cannot read and which no other site's request carries."""
    studio: Studio = request.app.state.studio
    async with request.form(max_files=0, max_fields=2) as form:
        token = form.get("token")
    known = studio.options.token
    if known and not (isinstance(token, str) and same(token.strip(), known)):
        return show(request, "login", 401, wrong=True)
    answer = RedirectResponse("/", 303)
    if known:
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, cookie_of(known), max_age=YEAR, httponly=True, samesite="strict", secure=secure)
    return answer


@router.post("/logout")
def log_out() -> Response:
    """Forget the cookie."""
    answer = RedirectResponse(LOGIN, 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer
