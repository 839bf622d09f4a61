"""The page: rooms for people, with the functions that the API has. Nothing inline, for the browser would refuse it.

render.py   templates, and errors as people read them     forms.py    forms of jobs, made of the recipe
enter.py    the token asked for                           train.py    pictures -> coach -> settings -> a training
run.py      a training as it happens                      jobs.py     the queue
library.py  adapters                                      compare.py  checkpoints x strengths, drawn and voted on
dataset.py  pictures, captions, masks                     captioning.py  captions by a model
mix.py      adapters together, then as one
templates/  what they look like                           static/     style and scripts; vendor/ holds htmx, as npm has it
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import FileResponse

from ...reports.kit.page import PALETTE
from . import captioning, compare, dataset, enter, jobs, library, mix, run, train
from .render import STATIC, Room, is_wanted, tell

__all__ = ["STATIC", "is_wanted", "router", "tell"]

router = APIRouter(include_in_schema=False, route_class=Room)
for room in (enter, train, run, jobs, library, compare, dataset, captioning, mix):
    router.include_router(room.router)


@router.get("/static/palette.css")
def palette() -> FileResponse:
    """The colours of the reports, which are the studio's too."""
    return FileResponse(PALETTE, media_type="text/css")
