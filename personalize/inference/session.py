"""A loaded base that draws requests for as long as one likes, says how far it is, and can be stopped.

import personalize as p
from personalize.inference.session import Library, Request, Session

session = Session(p.Base.load("pocket"), Library(folder=Path("adapters")))
for event in session.draw([Request.parse("a <lora:rex:0.8> rex dog", seed=seed) for seed in range(4)]):
    print(event)                     # Progress, Notice, Picture; Cancelled after session.cancel()
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..models.model import Base
from ..models.processes import share
from ..models.threads import few_threads, is_small
from .events import Cancelled, Event, Notice, Picture, Progress
from .img2img import InitLatents, encode_image, fit_start
from .library import Library
from .request import InitImage, Request
from .sampling import Steps, draw_batch, to_images
from .schedulers import latent_shape
from .stacks import Stacks

MANY, FEW = 8, 4  # images at once: a small base gains nothing by more, and two of its batches are drawn by two cores
Numbered = tuple[int, Request]
Latents = dict[tuple[InitImage, tuple[int, int] | None], tuple[Tensor, InitImage]]


class _Stop(Exception):
    """Raised where drawing stops because it was cancelled."""


class Session:
    """Draws requests with one base, and with adapters of a library: by name from memory, from files or from a folder.

    Adapters are attached batch by batch and detached after each: the base is never loaded again, and between two batches it is
    as it was, whether drawing ended well, failed or was cancelled. Stacks that were drawn with are kept ready. One thread draws
    at a time; any thread may cancel. Batches of a small base are shared among CPU cores.
    """

    def __init__(self, base: Base, library: Library | None = None, *, batch_size: int | None = None) -> None:
        self.base, self.library = base, library or Library()
        most = FEW if is_small(base) else MANY
        self.batch_size = 1 if base.tiled else batch_size or most  # tiled: memory is short
        self._stacks = Stacks(base)
        self._busy, self._stop = threading.Lock(), threading.Event()

    def draw(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Draw every request, in order, and yield events; neighbours that differ in prompt and seed only share a batch.

        Requests without adapters are drawn with whatever is attached to the base. Raises RecipeError for names that are no
        adapters or samplers and sizes that the base cannot draw, AdapterError and FamilyMismatchError for adapters that cannot
        be read or do not fit, RuntimeError while another `draw` of this session goes on.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this session is drawing already: end or close that iteration first")
        try:
            self._stop.clear()
            requests = list(requests)
            left = dict(enumerate(requests))
            try:
                for event in self._events([self.library.resolve(request) for request in requests]):
                    if isinstance(event, Picture):
                        del left[event.number]
                    yield event
            except _Stop:
                yield Cancelled(tuple(left))
        finally:
            self._busy.release()

    def cancel(self) -> None:
        """Stop what is being drawn before its next denoising step, from any thread; nothing happens if nothing is drawn."""
        self._stop.set()

    def _events(self, requests: Sequence[Request]) -> Iterator[Event]:
        for request in requests:
            latent_shape(self.base, request.size)
        names = {use.name for request in requests for use in request.adapters}
        adapters, hashes = self.library.load(names), {name: self.library.sha256(name) for name in names}
        latents, batches = Latents(), list[tuple[list[Numbered], InitLatents | None]]()
        for _, alike in groupby(enumerate(requests), key=lambda pair: pair[1].settings):
            while batch := list(islice(alike, self.batch_size)):
                batches.append((batch, (yield from self._start(batch[0][1], latents))))
        with (
            few_threads(self.base),
            contextlib.closing(share(self.base, lambda one: self._batch(one[0], adapters, hashes, one[1]), batches)) as events,
        ):
            for event in events:
                yield event
                if isinstance(event, Progress) and self._stop.is_set():  # a copy of this process does not see that
                    raise _Stop

    def _start(self, request: Request, latents: Latents) -> Generator[Event, None, InitLatents | None]:
        """Where a request with an image begins; each image is encoded once for all requests."""
        if request.image is None or request.denoise is None:
            return None
        key = request.image, request.size
        if key not in latents:
            image, notice = fit_start(self.base, request.image, request.size)
            if notice:
                yield Notice(notice)
            assert image.picture
            latents[key] = encode_image(self.base, image.picture), image
        return InitLatents(latents[key][0], request.denoise, latents[key][1])

    def _batch(
        self, batch: Sequence[Numbered], adapters: Mapping[str, Adapter], hashes: Mapping[str, str], start: InitLatents | None
    ) -> Iterator[Event]:
        """Draw requests that are drawn alike, at once."""
        numbers, requests = tuple(number for number, _ in batch), [request for _, request in batch]
        uses = requests[0].adapters
        stack = [(adapters[use.name], use.weighting) for use in uses]
        steps = draw_batch(self.base, requests, stack, start, self._stacks)
        pixels = yield from self._progress(steps, numbers)
        if not pixels.isfinite().all():
            yield Notice(not_finite(self.base))
        own = {use.name: hashes[use.name] for use in uses}
        words = [use.name for use in uses if not adapters[use.name].deltas]
        for (number, request), image in zip(batch, to_images(pixels), strict=True):
            whole = start.paste(image) if start else image
            yield Picture(number, request.complete(self.base, image.size, own, words), whole)

    def _progress(self, steps: Steps, numbers: tuple[int, ...]) -> Generator[Event, None, Tensor]:
        """Go on step by step until the pixels are there. Raises _Stop as soon as drawing was cancelled."""
        with contextlib.closing(steps):
            while not self._stop.is_set():
                try:
                    step, count = next(steps)
                except StopIteration as end:
                    pixels: Tensor = end.value
                    return pixels
                yield Progress(step, count, numbers)
        raise _Stop


def not_finite(base: Base) -> str:
    """What to say of pixels that are not finite."""
    hint = "its weights or an adapter's are damaged" if base.dtype == torch.float32 else "try --precision float32"
    dtype = str(base.dtype).removeprefix("torch.")
    return f"{base.name} drew what is no picture, but numbers that are not finite in {dtype}: {hint}"
