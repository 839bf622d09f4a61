"""Textual inversions in prompts: by file and by name, beside adapters, and as diffusers draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.embedding import Embedding, load_learned
from personalize.errors import RecipeError
from personalize.inference.events import Event, Notice, Saved
from personalize.inference.generate import generate
from personalize.inference.library import Library, Named
from personalize.inference.png import parse_infotext, read_request
from personalize.inference.request import Request
from personalize.inference.sampling import denoise
from personalize.models.model import Base
from personalize.models.sources import locate
from personalize.recipe.fields import AdapterSpec
from personalize.tuning.attach import attach

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


def word(base: Base, count: int = 3, seed: int = 0) -> Embedding:
    """Vectors as long as a table's rows."""
    generator = torch.Generator().manual_seed(seed)
    tables = {text.part: text.model.get_input_embeddings().weight for text in base.texts}
    return Embedding({part: torch.randn(count, t.shape[1], generator=generator) * t.std() for part, t in tables.items()})


@pytest.fixture
def folder(base: Base, tmp_path: Path) -> Path:
    (tmp_path / "embeddings" / "deep").mkdir(parents=True)
    word(base).save(tmp_path / "embeddings" / "zwx")
    word(base, seed=1).save(tmp_path / "embeddings" / "deep" / "Bad Hands")
    return tmp_path / "embeddings"


def drawn(
    base: Base, prompt: str, library: Library, output: Path, *, uses: tuple = (), negative: str = ""
) -> tuple[Image.Image, list[Event], Path]:
    """The picture of one prompt, what was told, and its file."""
    settings = Request.parse("", adapters=uses, negative=negative, steps=2)
    events = list(generate([prompt], [0], settings, library, base={"base": str(base.path)}, precision="float32", output=output))
    (saved,) = (event for event in events if isinstance(event, Saved))
    with Image.open(saved.path) as image:
        return image.convert("RGB"), events, saved.path


def parameters(path: Path) -> str:
    """What UIs read in a picture."""
    with Image.open(path) as image:
        return str(image.info["parameters"])


def latents(base: Base, prompt: str, words: dict | None = None) -> torch.Tensor:
    with base.knowing(words or {}), torch.no_grad():
        return denoise(base, [Request(prompt, steps=2, size=(64, 64))])


def test_by_file_and_by_name_it_is_the_same(base: Base, folder: Path, tmp_path: Path) -> None:
    plain, _, _ = drawn(base, "a zwx", Library(), tmp_path / "plain")
    by_name, events, path = drawn(base, "a ZWX, (zwx:1.2)", Library(embeddings=folder), tmp_path / "name")
    assert not [event for event in events if isinstance(event, Notice)]
    library = Library()
    by_file, _, _ = drawn(
        base, "a zwx, (zwx:1.2)", library, tmp_path / "file", uses=library.add([Named(folder / "zwx.safetensors")])
    )
    assert by_name.tobytes() == by_file.tobytes() != plain.tobytes()
    renamed = Library()
    other, _, _ = drawn(base, "a vok, (vok:1.2)", renamed, tmp_path / "vok",
                        uses=renamed.add([Named(folder / "zwx.safetensors", name="vok")]))  # fmt: skip
    assert other.tobytes() == by_file.tobytes()
    text = parameters(path)
    assert (
        text.startswith("a ZWX, (zwx:1.2)\n")
        and 'TI hashes: "zwx: ' in text
        and "<lora" not in text
        and "Lora hashes" not in text
    )
    again = parse_infotext(text)
    assert not again.adapters and again.prompt == "a ZWX, (zwx:1.2)"
    (use,) = read_request(path).adapters
    assert use.name == "zwx"


def test_only_what_is_said_is_read(base: Base, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.safetensors").write_bytes(b"no file")
    library = Library(embeddings=folder)
    _, _, path = drawn(base, "a zwxy cat", library, tmp_path / "a")
    assert not read_request(path).adapters
    _, _, path = drawn(base, "a cat", library, tmp_path / "b", negative="bad hands, zwxy")
    assert [use.name for use in read_request(path).adapters] == ["Bad Hands"]


def test_beside_an_adapter(base: Base, folder: Path, tmp_path: Path) -> None:
    with attach(base, AdapterSpec(rank=2), seed=3) as attached:
        for layer in attached.layers.values():
            for factor in layer.factors.values():
                torch.nn.init.normal_(factor.weight, std=0.3)
        adapter = attached.snapshot()
    adapter.save(tmp_path / "rex.safetensors")
    library = Library(folder=tmp_path, embeddings=folder)
    both, events, path = drawn(base, "a zwx <lora:rex:0.5>", library, tmp_path / "both")
    assert not [event for event in events if isinstance(event, Notice)]
    with attach(base, [(Adapter.load(tmp_path / "rex.safetensors"), 0.5)]):
        wanted = latents(base, "a zwx", {"zwx": word(base).vectors})
    from personalize.inference.sampling import to_images

    levels = [np.asarray(image, int) for image in (to_images(base.decode(wanted))[0], both)]
    assert np.abs(levels[0] - levels[1]).max() <= 1  # sums are rounded otherwise in a batch
    assert parameters(path).startswith("a zwx <lora:rex:0.5>\n")


def test_many_vectors_long_prompts_and_breaks(base: Base) -> None:
    """A word of 40 vectors is as 40 words: two do not fit into a window, and BREAK begins a new one."""
    words = {"zwx": word(base, 40).vectors}
    with base.knowing(words):
        assert base.windows(["zwx"]) == 1 and base.windows(["zwx zwx"]) == 2 and base.windows(["zwx BREAK a"], weighted=True) == 2
        long = base.embed(["zwx, zwx"]).tokens
        strong = base.embed(["(zwx:1.5)", "zwx"], weighted=True).tokens
        split = base.embed(["zwx BREAK a"], weighted=True).tokens
    assert long.shape[1] == split.shape[1] == 2 * 77
    assert not torch.allclose(strong[0], strong[1])
    with base.knowing(words):
        alone = base.embed(["zwx"]).tokens
    assert torch.allclose(split[:, :77], alone, atol=1e-5)


def test_what_is_odd_is_told(base: Base, folder: Path, tmp_path: Path) -> None:
    library = Library()
    uses = library.add([Named(folder / "zwx.safetensors", Request.parse("<lora:a:0.5>").adapters[0].weighting)])
    _, events, _ = drawn(base, "a cat", library, tmp_path / "odd", uses=uses)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert told == ["zwx is a word, which counts as much as the prompt says: (zwx:0.8)", "zwx brings 'zwx', which no prompt says"]
    with pytest.raises(RecipeError, match=r"there is no folder .*--embedding-dir"):
        Library(embeddings=tmp_path / "nowhere")


@pytest.mark.parametrize("prompt", ["a zwx cat in the snow", "zwx, a photo of zwx at night"])
def test_diffusers_draws_the_same(tmp_path: Path, prompt: str) -> None:
    """`load_textual_inversion` of a file of three vectors, on the embedded base, draws our latents."""
    from diffusers import StableDiffusionPipeline

    base = Base.load("pocket")
    path = word(base).save(tmp_path / "zwx")
    request = Request(prompt, seed=5, steps=6, size=(64, 64))
    with base.knowing({"zwx": Embedding.load(path).vectors}), torch.no_grad():
        ours = denoise(base, [request])
        assert not torch.allclose(ours, latents(base, prompt), atol=1e-2)
    pipe = StableDiffusionPipeline.from_pretrained(
        locate("pocket"), dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(str(path), token="zwx")
    seeded = torch.Generator().manual_seed(5)
    theirs = pipe(prompt, generator=seeded, num_inference_steps=6, guidance_scale=request.guidance, output_type="latent").images
    assert (ours - theirs).abs().max() < 1e-3


def test_diffusers_reads_the_words_of_sdxl(tmp_path: Path) -> None:
    """As the report says it: each text encoder gets its own vectors."""
    import bases
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import load_file

    folder = bases.folder(tmp_path / "base", "sdxl")
    base = Base.load(folder)
    path = word(base).save(tmp_path / "zwx")
    with base.knowing({"zwx": Embedding.load(path).vectors}), torch.no_grad():
        ours = base.embed(["a zwx"])
    parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    own = {row.part: text.model for row, text in zip(base.family.texts, base.texts, strict=True)}
    own |= {
        row.part.replace("text_encoder", "tokenizer"): text.tokenizer
        for row, text in zip(base.family.texts, base.texts, strict=True)
    }
    pipe = StableDiffusionXLPipeline(vae=base.vae, unet=base.denoiser, scheduler=None, **{part: own[part] for part in parts})
    words = load_file(path)
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            words[key], token="zwx", text_encoder=getattr(pipe, f"text_encoder{end}"), tokenizer=getattr(pipe, f"tokenizer{end}")
        )
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt("a zwx", device="cpu", do_classifier_free_guidance=False)
    assert ours.pooled is not None
    torch.testing.assert_close(ours.tokens, tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, rtol=1e-4, atol=1e-5)


def test_an_adapter_in_memory_may_be_a_word(folder: Path) -> None:
    adapter = load_learned(folder / "zwx.safetensors")
    assert not adapter.deltas and set(adapter.words) == {"zwx"}
