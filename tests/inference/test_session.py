"""Sessions: events, cancelling, failing and going on, adapters that come and go; requests from flags to PNG and back."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from slow import every
from test_pipeline import adapter_of, everything, photo

from personalize.adapters.adapter import Adapter
from personalize.errors import AdapterError, FamilyMismatchError, RecipeError
from personalize.inference import library as libraries
from personalize.inference.events import Cancelled, Event, Notice, Picture, Progress, Saved
from personalize.inference.generate import generate
from personalize.inference.library import Library, Named
from personalize.inference.pipeline import draw
from personalize.inference.png import infotext, parse_infotext, read_request, save_picture
from personalize.inference.prompts import parse
from personalize.inference.request import InitImage, Request
from personalize.inference.session import Session
from personalize.models.model import Base
from personalize.recipe.fields import AdapterSpec
from personalize.recipe.samplers import SAMPLERS
from personalize.tuning.attach import attach

# diffusers' samplers, beside numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


@pytest.fixture(scope="module")
def adapters(base: Base) -> dict[str, Adapter]:
    return {"rex": adapter_of(base, 0), "ink": adapter_of(base, 1, rank=3)}


@pytest.fixture(scope="module")
def folder(adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rex.safetensors and ink.safetensors."""
    there = tmp_path_factory.mktemp("adapters")
    for name, adapter in adapters.items():
        adapter.save(there / name)
    return there


def requests(count: int, prompt: str = "a cat", **settings: Any) -> list[Request]:
    return [Request.parse(prompt, seed=seed, **({"steps": 3} | settings)) for seed in range(count)]


def pictures(events: Iterator[Event] | list[Event]) -> dict[int, bytes]:
    return {event.number: event.image.tobytes() for event in events if isinstance(event, Picture)}


# ---------------------------------------------------------------- events


@pytest.mark.parametrize("sampler", every(3, SAMPLERS))
@pytest.mark.parametrize("denoise", [None, 0.5, 0.0])
def test_progress_counts_every_step_once(base: Base, sampler: str, denoise: float | None) -> None:
    image = None if denoise is None else InitImage(photo())
    events = list(Session(base).draw(requests(1, sampler=sampler, steps=4, image=image, denoise=denoise)))
    count = 4 if denoise is None else int(4 * denoise)
    count += sampler == "PLMS" and count > 1  # takes its second step twice
    assert events[:-1] == [Progress(i + 1, count, (0,)) for i in range(count)]
    assert isinstance(events[-1], Picture)


def test_progress_names_the_images_of_its_batch(base: Base) -> None:
    wanted = [*requests(3), *requests(1, negative="fog"), *requests(1)]
    events = list(Session(base, batch_size=2).draw(wanted))
    last = [event.numbers for event in events if isinstance(event, Progress) and event.step == event.steps]
    assert last == [(0, 1), (2,), (3,), (4,)]
    assert [event.number for event in events if isinstance(event, Picture)] == [0, 1, 2, 3, 4]
    assert len(events) == 4 * 3 + 5


def test_warnings_are_events_and_warnings_at_the_edge(base: Base) -> None:
    large = photo(300, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events = list(Session(base).draw(requests(2, steps=1, image=InitImage(large), denoise=0.5, guidance=1.0)))
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert events[0] == notice and "300x200 is drawn over at 80x56" in notice.text
    with pytest.warns(UserWarning) as caught:
        draw(base, ["a cat"], [0], steps=1, image=large, denoise=0.5)
    assert [(str(one.message), one.filename) for one in caught] == [(notice.text, __file__)]


# ---------------------------------------------------------------- cancelling and failing


def test_another_thread_cancels_between_two_steps(
    base: Base, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, session = everything(base), Session(base, Library(adapters), batch_size=2)
    wanted = requests(5, "a <lora:rex:1@0,0@1> cat", steps=4)
    whole = pictures(session.draw(wanted))
    calls, reached, cancelled, real = [], threading.Event(), threading.Event(), Base.denoise

    def denoise(self: Base, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # the second step of the second batch
            reached.set()
            assert cancelled.wait(60)
        return real(self, *arguments)

    def cancel() -> None:
        assert reached.wait(60)
        session.cancel()
        cancelled.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    with monkeypatch.context() as patch:
        patch.setattr(Base, "denoise", denoise)
        events = list(session.draw(wanted))
    thread.join()
    assert len(calls) == 6, "the step that was going on is the last"
    assert [event for event in events if isinstance(event, Progress)][-1] == Progress(2, 4, (2, 3))
    assert pictures(events) == {number: whole[number] for number in (0, 1)}
    assert events[-1] == Cancelled((2, 3, 4))
    assert everything(base) == before
    assert pictures(session.draw(wanted)) == whole, "the next request is drawn as if nothing had been"


@pytest.mark.parametrize("at", [Progress(1, 2, (0,)), Progress(2, 2, (0,))])
def test_who_listens_can_cancel(base: Base, adapters: dict[str, Adapter], at: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    before, session, decode, decoded = everything(base), Session(base, Library(adapters)), Base.decode, []
    monkeypatch.setattr(Base, "decode", lambda self, latents: decoded.append(1) or decode(self, latents))
    events = []
    for event in session.draw(requests(1, "a <lora:rex:1> cat", steps=2)):
        events.append(event)
        if event == at:
            session.cancel()
    assert events[-2:] == [at, Cancelled((0,))] and not decoded
    assert everything(base) == before


def test_cancelling_nothing_is_nothing(base: Base) -> None:
    session = Session(base)
    session.cancel()
    assert len(pictures(session.draw(requests(1)))) == 1
    session.cancel()
    assert len(pictures(session.draw(requests(1)))) == 1


def test_an_iteration_that_is_left_leaves_nothing_behind(base: Base, adapters: dict[str, Adapter]) -> None:
    before, session = everything(base), Session(base, Library(adapters))
    events = session.draw(requests(1, "a <lora:rex:1> cat"))
    assert next(events) == Progress(1, 3, (0,)) and "attached" in vars(base)
    with pytest.raises(RuntimeError, match="is drawing already"):
        next(session.draw(requests(1)))
    events.close()  # type: ignore[attr-defined]
    assert everything(base) == before and len(pictures(session.draw(requests(1)))) == 1


def test_a_failed_request_leaves_the_session_usable(
    base: Base, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(base)
    path = "unet.mid_block.resnets.0.conv1"
    strange = Adapter({path: replace(adapter_of(base, 2, every=1).deltas[path], up=torch.ones(3, 2, 1, 1))})  # type: ignore[type-var]
    session = Session(base, Library(adapters | {"strange": strange}))
    whole = pictures(session.draw(requests(2, "a <lora:rex:1> cat")))
    real, calls = Base.denoise, []

    def denoise(self: Base, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Base, "denoise", denoise)
        list(session.draw(requests(2, "a <lora:rex:1> cat")))
    for prompt, error, settings in [
        ("a <lora:nobody:1> cat", RecipeError, {}),
        ("a <lora:strange:1> cat", (AdapterError, FamilyMismatchError), {}),
        ("a cat", RecipeError, {"size": (50, 64)}),
        ("a cat", RecipeError, {"steps": 1001}),
        ("a cat", RecipeError, {"image": InitImage(None, "gone.png")}),
    ]:
        with pytest.raises(error):  # type: ignore[arg-type]
            list(session.draw(requests(2, prompt, **settings)))
    assert everything(base) == before
    assert pictures(session.draw(requests(2, "a <lora:rex:1> cat"))) == whole


# ---------------------------------------------------------------- adapters


def test_adapters_come_and_go_while_the_base_stays(base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr(Base, "load", never)
    kept = [parameter.data_ptr() for parameter in base.unet.parameters()]
    session = Session(base, Library(folder=folder))
    prompts = ["a <lora:rex:0.8> cat", "a cat", "a <lora:INK:1> cat"]
    wanted = [Request.parse(prompt, steps=2) for prompt in prompts]
    first, again = pictures(session.draw(wanted)), pictures(session.draw(reversed(wanted)))
    assert [first[0], first[1], first[2]] == [again[2], again[1], again[0]] and len(set(first.values())) == 3
    assert [parameter.data_ptr() for parameter in base.unet.parameters()] == kept


def test_what_is_attached_counts_for_requests_without_adapters(base: Base, adapters: dict[str, Adapter]) -> None:
    session = Session(base, Library(adapters))
    tagged = pictures(session.draw(requests(1, "a <lora:rex:0.7> cat")))
    with attach(base, [(adapters["rex"], 0.7)]):
        assert pictures(session.draw(requests(1))) == tagged


def test_a_file_is_read_once_and_again_when_it_has_changed(
    base: Base, adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load = Adapter.load
    monkeypatch.setattr(libraries.Adapter, "load", lambda path: read.append(path.stem) or load(path))
    adapters["rex"].save(tmp_path / "rex")
    session, wanted = Session(base, Library(folder=tmp_path)), requests(1, "a <lora:rex:1> cat")
    one = pictures(session.draw(wanted))
    assert pictures(session.draw(wanted)) == one and read == ["rex"]
    adapters["ink"].save(tmp_path / "rex")
    other = pictures(session.draw(wanted))
    assert other != one and read == ["rex", "rex"]
    monkeypatch.setattr(libraries, "MOST", 2)
    for number in range(4):
        adapters["ink"].save(tmp_path / f"ink{number}")
        session.library.load([session.library.find(f"ink{number}")])
    assert list(session.library._loaded) == ["ink2", "ink3"], "memory is bounded"


# ---------------------------------------------------------------- from flags to PNG and back


@pytest.mark.parametrize("typed", ["a cat", "a <lora:rex:0.8:0.5:lbw=MID:stop=0.5> (cat:1.2), <lora:ink:1@0,0@1>"])
@pytest.mark.parametrize(
    "settings", [{}, {"size": (96, 48), "negative": "fog, ünscharf", "guidance": 4.5, "sampler": "dpmpp_2m_sde_karras"}]
)
def test_a_request_from_its_png_gives_the_same_image(tiny_base: Path, tmp_path: Path, typed: str, settings: Any) -> None:
    base = Base.load(tiny_base)  # blocks have names where the family is known
    for name, seed in (("rex", 0), ("ink", 1)):
        adapter_of(base, seed).save(tmp_path / name)
    session = Session(base, Library(folder=tmp_path))
    (one,) = (event for event in session.draw(requests(1, typed, **settings)) if isinstance(event, Picture))
    path = save_picture(one.image, tmp_path / "a.png", one.request)
    back = read_request(path)
    assert back == one.request and all(len(digest) == 64 for digest in back.hashes.values())
    assert set(back.hashes) == {use.name for use in parse(typed).uses} and back.model == base.name
    with Image.open(path) as picture:
        text = str(picture.info["parameters"])
    assert infotext(parse_infotext(text), "1") == infotext(replace(back, hashes={}), "1")
    for request in (back, parse_infotext(text)):
        assert pictures(session.draw([request])) == {0: one.image.tobytes()}


def test_the_image_that_a_request_begins_with_is_only_a_name_in_its_png(base: Base, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    wanted = requests(1, image=InitImage.open(tmp_path / "photo.png"), denoise=0.6)
    (one,) = (event for event in Session(base).draw(wanted) if isinstance(event, Picture))
    back = read_request(save_picture(one.image, tmp_path / "a.png", one.request))
    assert back.image and back.image.name == "photo.png" and back.denoise == 0.6
    again = replace(back, image=InitImage.open(tmp_path / back.image.name))
    assert pictures(Session(base).draw([again])) == {0: one.image.tobytes()}


def test_the_parameters_of_other_programs_are_read() -> None:
    text = "a (cat:1.2) <lora:rex:0.8>, snow\nsecond line\nNegative prompt: fog\nblur\n"
    line = "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 96x64, Model: v1-5"
    line += ', Lora hashes: "rex: ab, x: 1"'
    found = parse_infotext(text + line)
    assert (found.prompt, found.negative) == ("a (cat:1.2), snow\nsecond line", "fog\nblur")
    assert (found.steps, found.sampler, found.guidance, found.seed, found.size) == (30, "DPM++ 2M Karras", 7.0, 5, (96, 64))
    assert [use.name for use in found.adapters] == ["rex"]
    for broken in ("", "a cat", "a cat\nSteps: x, Seed: 1"):
        with pytest.raises(RecipeError):
            parse_infotext(broken)


def test_generating_is_events_too(narrow_base: Path, folder: Path, tmp_path: Path) -> None:
    library = Library(folder=folder)
    settings = Request.parse("", adapters=library.add([Named(folder / "rex.safetensors")]), steps=2)
    events = list(generate(["a cat", "a <lora:rex:0> cat"], [0, 1], settings, library, base={"base": str(narrow_base)},
                           grid=True, batch_size=2, output=tmp_path))  # fmt: skip
    assert [event.numbers for event in events if isinstance(event, Progress)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    saved = [event for event in events if isinstance(event, Saved)]
    assert [event.number for event in saved] == [0, 1, 2, 3, None] and all(event.path.is_file() for event in saved)
    assert [str(read_request(event.path).adapters[0].weighting) for event in saved[:4]] == ["1", "1", "0", "0"]


# ---------------------------------------------------------------- words that adapters bring


def with_words(adapter: Adapter, words: dict[str, dict[str, torch.Tensor]]) -> Adapter:
    return replace(adapter, words=words)


def own_vectors(base: Base, text: str) -> torch.Tensor:
    """The vectors [tokens, width] that the base's text encoder has for a text."""
    ids = base.texts[0].tokenizer(text, add_special_tokens=False).input_ids
    return base.texts[0].model.get_input_embeddings().weight[ids].clone()


def test_a_word_inside_an_adapter_stands_for_its_vectors(base: Base) -> None:
    """A word with the vectors of `red cat` draws what `red cat` does: in any case, weighted, in the negative prompt too."""
    rex = with_words(attach(base, AdapterSpec(rank=1)).detach(), {"zorb thing": {"emb_params": own_vectors(base, "red cat")}})
    how = {"seeds": [3], "adapters": {"rex": rex}, "steps": 1}

    def image(text: str, **more: Any) -> Image.Image:
        return draw(base, [f"{text} <lora:rex>"], **how, **more)[0]

    assert image("a Zorb Thing, snow") == image("a red cat, snow") != image("a zorb, thing, snow")
    assert image("a (zorb thing:1.3)") == image("a (red cat:1.3)") != image("a zorb thing")
    assert image("a dog", negative="zorb thing") == image("a dog", negative="red cat") != image("a dog")
    assert image("zorb things") != image("red cats")  # whole words only
    without = draw(base, ["a zorb thing"], [3], steps=1)[0]
    assert without != draw(base, ["a red cat"], [3], steps=1)[0], "known beyond its adapter"


def test_a_word_of_another_width_is_refused_and_the_base_is_as_it_was(base: Base, adapters: dict[str, Adapter]) -> None:
    wide = with_words(adapters["rex"], {"zorb": {"emb_params": torch.zeros(1, 768)}})
    texts = base.texts
    with pytest.raises(FamilyMismatchError, match="'zorb' has vectors of 768"):
        draw(base, ["a zorb <lora:rex>"], [0], adapters={"rex": wide}, steps=1)
    assert base.texts is texts and attach(base, [(adapters["rex"], 1.0)]).detach()


def test_words_that_no_prompt_says_or_two_adapters_bring_or_nobody_reads_are_told(
    base: Base, narrow_base: Path, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    vectors = own_vectors(base, "red")
    words = {"a": {"zorb": {"emb_params": vectors}}, "b": {"zorb": {"emb_params": 2 * vectors}, "out": {"clip_l_out": vectors}}}
    files = {name: with_words(adapters["rex"], own).save(tmp_path / name) for name, own in words.items()}
    library = Library()
    uses = library.add([Named(path) for path in files.values()])

    def notices(prompt: str) -> list[str]:
        request = Request.parse("", adapters=uses, steps=1)
        events = generate([prompt], [0], request, library, base={"base": str(narrow_base)}, output=tmp_path / "drawn")
        return [event.text for event in events if isinstance(event, Notice)]

    with pytest.warns(UserWarning, match=r"b.safetensors brings the word 'out' in vectors that are not read here"):
        told = notices("a cat")
    both = "a and b both bring the word 'zorb': where both are used, it is the first one's"
    assert told == ["a brings 'zorb', which no prompt says", "b brings 'zorb', which no prompt says", both]
    assert notices("a Zorb, snow") == [both]
