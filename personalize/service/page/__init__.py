"""The page. Templates lie in templates/, style and scripts in static/: nothing inline, for the browser would refuse it."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.templating import Jinja2Templates

from ...version import __version__
from ..security import COOKIE, LOGIN, cookie_of, same
from ..studio import Studio

HERE = Path(__file__).parent
STATIC = HERE / "static"
TEMPLATES = Jinja2Templates(
    env=Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(HERE / "templates"),
    )
)
TEMPLATES.env.globals["version"] = __version__
YEAR = 365 * 86_400  # seconds

router = APIRouter(include_in_schema=False)


def show(request: Request, name: str, status: int = 200, **values: object) -> HTMLResponse:
    """A page from a template."""
    return TEMPLATES.TemplateResponse(request, name, values, status_code=status)


@router.get("/")
def home(request: Request) -> Response:
    """The studio."""
    studio: Studio = request.app.state.studio
    return show(request, "home.html.j2", workspace=str(studio.workspace.root))


@router.get(LOGIN)
def login_page(request: Request) -> Response:
    """The form that asks for the token."""
    return show(request, "login.html.j2", wrong=False)


@router.post(LOGIN)
async def log_in(request: Request) -> Response:
    """A cookie for the token, which scripts cannot read and which no other site's request carries."""
    studio: Studio = request.app.state.studio
    async with request.form(max_files=0, max_fields=2) as form:
        token = form.get("token")
    known = studio.options.token
    if known and not (isinstance(token, str) and same(token.strip(), known)):
        return show(request, "login.html.j2", 401, wrong=True)
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
