"""Pictures with adapters: each prompt its own stack, equal to baking, schedules step by step, and nothing left behind."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import LATENT
from tiny import NARROW
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import Decomposed, Dense, LowRank, Structured
from personalize.adapters.ops.bake import bake
from personalize.adapters.strengths.grammar import read
from personalize.errors import AdapterError, PersonalizeError, RecipeError
from personalize.inference import img2img, schedulers
from personalize.inference import sampling as sample
from personalize.inference.events import images
from personalize.inference.library import Library
from personalize.inference.pipeline import draw
from personalize.inference.prompts import Use
from personalize.inference.request import Request
from personalize.inference.session import Session
from personalize.models.model import Base
from personalize.tuning.attach import attach
from personalize.tuning.targets import adaptable

STEPS = 4
NORM, BIAS = "unet.conv_norm_out", "unet.mid_block.attentions.0.proj_in.bias"
WIDE = NARROW["cross_attention_dim"]  # of the middle block, and of text


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> Base:
    return Base.load(narrow_base)


def adapter_of(base: Base, seed: int, rank: int = 2, every: int = 3) -> Adapter:
    """LoRA on every third layer, a full update of one, and updates of a norm and a bias."""
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Any] = {}
    for path, module in list(adaptable(base).items())[seed % every :: every]:
        out, *fan_in = module.weight.shape  # type: ignore[union-attr, misc]
        up = torch.randn(out, rank, *[1] * (len(fan_in) - 1), generator=generator)
        deltas[path] = LowRank(up, 0.03 * torch.randn(rank, *fan_in, generator=generator), 1.5)
    outer, *_, inner = 2 * base.denoiser.config["block_out_channels"]
    deltas["unet.mid_block.attentions.0.proj_in"] = Dense(0.02 * torch.randn(inner, inner, 1, 1, generator=generator))
    deltas[NORM] = Dense(0.3 * torch.randn(outer, generator=generator))
    deltas[BIAS] = Dense(0.3 * torch.randn(inner, generator=generator))
    return Adapter(deltas, {"ss_output_name": f"a{seed}"})


@pytest.fixture(scope="module")
def adapters(base: Base) -> dict[str, Adapter]:
    return {"rex": adapter_of(base, 0), "ink": adapter_of(base, 1, rank=3)}


@pytest.fixture(scope="module")
def wide(tiny_base: Path) -> Base:
    """Of pocket's own widths: blocks have names where the family is known."""
    return Base.load(tiny_base)


def latents(base: Base, stack: Any = (), steps: int = STEPS, **how: Any) -> Tensor:
    """[1, c, h, w] in fp32, with a stack attached."""
    requests = [Request("a zwx cat", **({"steps": steps, "guidance": 3.0, "negative": "fog"} | how))]
    if not stack:
        return sample.denoise(base, requests)
    with attach(base, stack):
        return sample.denoise(base, requests)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def everything(base: Base) -> dict[str, Any]:
    """All that a call could leave behind in a base: modules, hooks, parameters and buffers to the bit, and where they lie."""
    kept: dict[str, Any] = {"rng": torch.get_rng_state().tolist()}
    for part, model in base.models.items():
        for name, module in model.named_modules():
            hooks = [len(value) for key, value in vars(module).items() if key.endswith("hooks") and value is not None]
            kept[f"{part}.{name}"] = (type(module), module.training, sorted(vars(module)), hooks)
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            kept[f"{part}:{name}"] = (value.data_ptr(), value.requires_grad, value.detach().numpy().tobytes())
    return kept


# ---------------------------------------------------------------- equal to baking


@pytest.mark.parametrize("typed", ["0.8:0.3", "-0.5:lbw=BASE+MID+OUT00", "1:*attn2*=0.25:unet.conv_*=2", "0.6@0:stop=1"])
def test_pictures_are_those_of_the_baked_checkpoint(wide: Base, typed: str, tmp_path: Path) -> None:
    base, adapters = wide, {"rex": adapter_of(wide, 0), "ink": adapter_of(wide, 1, rank=3)}
    first, second = read(typed.split(":")), read(["0.4"])
    seen = latents(base, [(adapters["rex"], first), (adapters["ink"], second)])
    fixed = [(adapters["rex"].weighted(first.at(0, 1)), 1.0), (adapters["ink"].weighted(second), 1.0)]
    bake(base.path, fixed, tmp_path / "baked")
    baked = Base.load(tmp_path / "baked")
    assert apart(seen, latents(baked)) < 1e-4 < 0.05 < apart(seen, latents(base))
    request = Request("a zwx cat", 0, steps=STEPS)
    tags = replace(request, adapters=(Use("rex", first), Use("ink", second)))
    sessions = (Session(base, Library(adapters)), tags), (Session(baked), request)
    one, two = (np.asarray(next(images(session.draw([what]))), dtype=int) for session, what in sessions)
    assert abs(one - two).max() <= 1


# ---------------------------------------------------------------- schedules


def by_hand(base: Base, strengths: list[list[tuple[Adapter, Any]]]) -> Tensor:
    """The sampler's loop written out, with another stack attached at every step."""
    sampler = schedulers.make_sampler(base, len(strengths))
    noise = [torch.randn(schedulers.latent_shape(base, None), generator=torch.Generator().manual_seed(0))]
    now = torch.stack(noise) * sampler.init_noise_sigma
    with torch.no_grad():
        for stack, t in zip(strengths, sampler.timesteps, strict=True):
            with attach(base, stack):
                cond = sample.conditioning(base, ["a zwx cat"], "fog", 3.0)
                now = sampler.step(sample.predict(base, now, t, cond, 3.0), t, now).prev_sample
    return now


@pytest.mark.parametrize(
    ("typed", "levels"),
    [
        ("1:stop=0.5", [(1, 1), (1, 1), (0, 0), (0, 0)]),
        ("0.8:start=2", [(0, 0), (0, 0), (0.8, 0.8), (0.8, 0.8)]),
        ("1@0,0@1", [(1, 1), (2 / 3, 2 / 3), (1 / 3, 1 / 3), (0, 0)]),
        ("unet=0@0,1@3:te=0.5", [(0, 0.5), (1 / 3, 0.5), (2 / 3, 0.5), (1, 0.5)]),
        ("unet=0.5:te=1@0,-1@2", [(0.5, 1), (0.5, 0), (0.5, -1), (0.5, -1)]),
    ],
)
def test_a_schedule_is_another_strength_at_every_step(
    base: Base, adapters: dict[str, Adapter], typed: str, levels: list[tuple[float, float]]
) -> None:
    wanted = by_hand(
        base, [[(adapters["rex"], {"unet": unet, "text_encoder": te}), (adapters["ink"], 0.4)] for unet, te in levels]
    )
    seen = latents(base, [(adapters["rex"], typed), (adapters["ink"], 0.4)])
    assert apart(seen, wanted) < 1e-4
    assert apart(seen, latents(base, [(adapters["rex"], 1.0), (adapters["ink"], 0.4)])) > 0.02


def test_two_schedules_at_once(base: Base, adapters: dict[str, Adapter]) -> None:
    seen = latents(base, [(adapters["rex"], "1:stop=2"), (adapters["ink"], "1:start=2")])
    assert apart(seen, by_hand(base, [[(adapters["rex"], 1.0)]] * 2 + [[(adapters["ink"], 1.0)]] * 2)) < 1e-4


def test_prompts_are_read_anew_only_where_the_text_encoder_changes(
    base: Base, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, embed = [], Base.embed
    monkeypatch.setattr(Base, "embed", lambda self, prompts, **how: read.append(prompts) or embed(self, prompts, **how))
    counts = {}
    for name, adapter, typed in [
        ("all", adapters["rex"], "0@0,1@1"),
        ("text at rest", adapters["rex"], "unet=0@0,1@1:te=1"),
        ("no text", adapters["rex"].part("unet"), "0@0,1@1"),
        ("one turn", adapters["rex"], "1:stop=2"),
    ]:
        latents(base, [(adapter, typed)], guidance=1)
        counts[name] = len(read)
        read.clear()
    assert counts == {"all": STEPS, "text at rest": 1, "no text": 1, "one turn": 2}


def test_a_schedule_that_stays_is_the_constant(base: Base, adapters: dict[str, Adapter]) -> None:
    constant = latents(base, [(adapters["rex"], 0.7)])
    for typed in ("0.7@0,0.7@1", "0.7:start=0:stop=1", "0.7@0:stop=99"):
        assert apart(latents(base, [(adapters["rex"], typed)]), constant) < 1e-5
    assert torch.equal(latents(base, [(adapters["rex"], "0@0,0@1")]), latents(base))


def test_steps_are_steps_where_the_sampler_asks_twice_for_each(base: Base, adapters: dict[str, Adapter]) -> None:
    """Heun's method calls the model 2 n - 1 times: a schedule counts n steps."""
    heun = replace(base, scheduler_config={**base.scheduler_config, "_class_name": "HeunDiscreteScheduler"})
    turns: list[tuple[int, int]] = []
    with attach(heun, adapters["rex"]) as attached:
        attached.turn = lambda step, steps, t=0: turns.append((step, steps)) or set()  # type: ignore[method-assign, func-returns-value]
        latents(heun)
    assert turns == [*((step, STEPS) for step in (0, 0, 1, 1, 2, 2, 3)), (0, 1)]


# ---------------------------------------------------------------- tags, batches


def test_every_prompt_gets_its_own_stack(base: Base, adapters: dict[str, Adapter]) -> None:
    prompts = ["a <lora:rex:0.5> cat", "a cat", "a cat <lora:ink:1><lora:REX:0.5>", "a <lora:rex:0.5> cat"]
    seen = draw(base, prompts, [0, 0, 0, 1], adapters=adapters, steps=2)
    stacks: list[list[tuple[Adapter, float]]] = [[(adapters["rex"], 0.5)], [], [(adapters["ink"], 1), (adapters["rex"], 0.5)]]
    for picture, stack in zip(seen, stacks, strict=False):
        with attach(base, stack):
            (alone,) = draw(base, ["a cat"], [0], steps=2)
        assert abs(np.asarray(picture, dtype=int) - np.asarray(alone, dtype=int)).max() <= 1
    assert len({picture.tobytes() for picture in seen}) == 4


def test_names_that_are_not_there_are_told_before_anything_is_drawn(base: Base, adapters: dict[str, Adapter]) -> None:
    with pytest.raises(RecipeError, match=r"no adapter is called 'rexx' \(did you mean rex\?\)"):
        draw(base, ["a <lora:rexx:1> cat"], [0], adapters=adapters)
    with pytest.raises(RecipeError, match="no adapter is called 'rex'"):
        draw(base, ["a <lora:rex:1> cat"], [0])
    with pytest.warns(UserWarning, match="no prompt says <lora:ink:1>"):
        draw(base, ["a <lora:rex:1> cat"], [0], adapters=adapters, steps=1)


def test_attached_adapters_and_tags_do_not_mix(base: Base, adapters: dict[str, Adapter]) -> None:
    with attach(base, adapters["rex"]), pytest.raises(AdapterError, match="already carries an adapter"):
        draw(base, ["a <lora:rex:1> cat"], [0], adapters={"rex": adapters["rex"]}, steps=1)


# ---------------------------------------------------------------- nothing leaks


def test_a_call_leaves_nothing_behind(base: Base, adapters: dict[str, Adapter]) -> None:
    before = everything(base)
    prompts = ["a <lora:rex:1@0,0@1:te=1@0,0@1> cat", "a cat", "a <lora:ink:1:stop=1> cat"]
    draw(base, prompts, [0, 1, 2], adapters=adapters, steps=2)
    assert everything(base) == before


def test_even_the_sign_of_a_zero_is_kept(base: Base) -> None:
    bias = base.unet.mid_block.attentions[0].proj_in.bias
    kept = bias.detach().clone()
    bias.data.fill_(-0.0)
    with attach(base, Adapter({BIAS: Dense(torch.ones(WIDE))})) as attached, attached.off():
        pass
    assert bool(bias.signbit().all())
    bias.data.copy_(kept)


def test_nothing_is_attached_while_a_picture_is_handed_over(base: Base, adapters: dict[str, Adapter]) -> None:
    before = everything(base)
    requests = [Request.parse("a <lora:rex:1:stop=0.5> cat", seed=seed, steps=2) for seed in range(3)]
    pictures = images(Session(base, Library(adapters), batch_size=1).draw(requests))
    next(pictures)
    assert everything(base) == before
    pictures.close()
    assert everything(base) == before


@pytest.mark.parametrize("failing", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_fails_half_way_leaves_nothing_behind(
    base: Base, adapters: dict[str, Adapter], failing: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(base)
    verb = {"unet": "denoise", "text_encoder": "embed", "vae": "decode"}[failing]
    calls, real = [], getattr(Base, verb)

    def failed(self: Base, *arguments: Any, **how: Any) -> Any:
        calls.append(verb)
        if failing == "vae" or len(calls) == 3:
            raise error
        return real(self, *arguments, **how)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(Base, verb, failed)
        draw(base, ["a <lora:rex:1@0,0@1> cat"], [0], adapters={"rex": adapters["rex"]}, steps=3)
    assert everything(base) == before


def test_an_attachment_that_fails_half_way_leaves_nothing_behind(
    base: Base, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["personalize.tuning.attach"]
    before, real, placed = everything(base), module.layer_with, []

    def layer_with(*arguments: Any) -> Any:
        placed.append(arguments)
        if len(placed) > 5:
            raise MemoryError
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(module, "layer_with", layer_with)
        attach(base, adapters["rex"])
    assert everything(base) == before


def test_a_schedule_on_a_held_base_begins_anew_with_every_call(base: Base, adapters: dict[str, Adapter]) -> None:
    before = everything(base)
    wanted = draw(base, ["a <lora:rex:1@0,0@1> cat"], [0], adapters={"rex": adapters["rex"]}, steps=3)
    with attach(base, [(adapters["rex"], "1@0,0@1")]):
        seen = predicted(base)
        assert draw(base, ["a cat"], [0], steps=3) == draw(base, ["a cat"], [0], steps=3) == wanted
        assert torch.equal(predicted(base), seen)
    assert everything(base) == before and "attached" not in vars(base)


def test_taking_off_twice_leaves_the_next_ones_alone(base: Base, adapters: dict[str, Adapter]) -> None:
    before = everything(base)
    with attach(base, adapters["rex"]) as first:
        first.detach()
        second = attach(base, adapters["ink"])
        seen = predicted(base)
    assert torch.equal(predicted(base), seen)
    with pytest.raises(AdapterError, match="nothing of this is on"):
        first.swap(adapters["rex"])
    second.detach()
    assert everything(base) == before


# ---------------------------------------------------------------- swapping


def predicted(base: Base) -> Tensor:
    with torch.no_grad():
        x = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(1))
        return base.denoise(x, torch.tensor([3, 700]), base.embed(["zwx", "a cat"]))


def test_swapping_is_detaching_and_attaching(base: Base, adapters: dict[str, Adapter]) -> None:
    before = everything(base)
    rex, ink = (latents(base, [(adapters[name], "0.9@0,0@1")]) for name in ("rex", "ink"))
    with attach(base, [(adapters["rex"], "0.9@0,0@1")]) as attached:
        for name, wanted in (("ink", ink), ("rex", rex)):
            attached.swap([(adapters[name], "0.9@0,0@1")])
            assert torch.equal(latents(base), wanted)
        seen_before = predicted(base)
        stranger = Adapter({"unet.nowhere": LowRank(torch.ones(4, 1), torch.ones(1, 4), 1)})
        with pytest.raises(PersonalizeError, match="does not fit"):
            attached.swap(stranger)
        assert torch.equal(predicted(base), seen_before)
    assert everything(base) == before


def test_a_swap_reads_no_weights(base: Base, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr(Base, "load", never)
    kept = [parameter.data_ptr() for parameter in base.unet.parameters()]
    with attach(base, adapters["rex"]) as attached:
        attached.swap(adapters["ink"])
    assert [parameter.data_ptr() for parameter in base.unet.parameters()] == kept


# ---------------------------------------------------------------- pictures to begin with


def photo(width: int = 64, height: int = 64) -> Image.Image:
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    picture.paste((200, 40, 90), (10, 10, 40, 40))
    return picture


def test_all_of_the_way_is_a_new_picture(base: Base) -> None:
    """At zero terminal SNR nothing of the picture is left in the first step."""
    one = draw(base, ["a cat"], [3], steps=3)
    assert one == draw(base, ["a cat"], [3], steps=3, image=photo(), denoise=1.0)


def test_none_of_the_way_is_the_picture_through_the_vae(base: Base) -> None:
    with torch.no_grad():
        (wanted,) = sample.to_images(base.decode(img2img.encode_image(base, photo())))
    assert draw(base, ["a cat"], [3], steps=3, image=photo(), denoise=0.0) == [wanted]


def test_the_size_follows_the_picture(base: Base, tmp_path: Path) -> None:
    photo(70, 49).save(tmp_path / "a.png")
    (one,) = draw(base, ["a cat"], [0], steps=2, image=tmp_path / "a.png", denoise=0.5)
    assert one.size == (64, 48)
    (two,) = draw(base, ["a cat"], [0], steps=2, image=photo(70, 49), denoise=0.5, size=(32, 64))
    assert two.size == (32, 64)
    with pytest.raises(RecipeError, match="too small"):
        draw(base, ["a cat"], [0], image=photo(70, 4))
    with pytest.raises(RecipeError, match="--denoise must be 0 to 1"):
        draw(base, ["a cat"], [0], steps=1, image=photo(), denoise=1.5)


def test_a_very_large_picture_is_shrunk_to_the_bases_area(base: Base) -> None:
    how: dict[str, Any] = {"steps": 1, "guidance": 1.0, "denoise": 0.1}
    large, said = photo(3000, 2000), "3000x2000 is drawn over at 80x56, as large as .* draws: --size 3000x2000 keeps it large"
    with pytest.warns(UserWarning, match=said):
        (small,) = draw(base, ["a cat"], [0], image=large, **how)
    assert small.size == (80, 56)
    assert draw(base, ["a cat"], [0], image=large, size=(80, 56), **how) == [small]
    shrunk, warning = img2img.fit_image(base, photo(1007, 2015))
    assert shrunk.size == (48, 88) and "--size 1000x2008 keeps" in warning
    for size in ((128, 128), (160, 100)):  # up to four times the base's area is kept, whatever the shape
        whole, warning = img2img.fit_image(base, photo(*size))
        assert whole.size == (size[0], size[1] // 8 * 8) and not warning
    for asked in (64, (96, 200)):
        fitted, warning = img2img.fit_image(base, large, asked)
        assert fitted.size == ((64, 64) if asked == 64 else asked) and not warning


def test_the_picture_and_how_much_of_it_matter(base: Base) -> None:
    def seen(**how: Any) -> bytes:
        return draw(base, ["a cat"], [0], steps=4, **how)[0].tobytes()

    different = [seen(), seen(image=photo()), seen(image=photo(), denoise=0.25), seen(image=photo().rotate(90))]
    assert len(set(different)) == 4


# ---------------------------------------------------------------- every kind


def kinds(base: Base) -> dict[str, Any]:
    """One update of each kind that is not LoRA, on layers of different shapes."""
    draw = torch.Generator().manual_seed(7)

    def some(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=draw)

    query, conv = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.mid_block.resnets.0.conv1"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    halves = {f"hada_w{i}_{side}": some(*shape) for i in (1, 2) for side, shape in (("a", (WIDE, 3)), ("b", (3, WIDE)))}
    factors, blocks = {"lokr_w1": some(4, 4), "lokr_w2": some(WIDE // 4, WIDE // 4)}, some(4, WIDE // 4, WIDE // 4)
    square = WIDE, WIDE
    return {
        "LoHa": {query: Structured("LoHa", halves, 3.0, square)},
        "LoKr": {query: Structured("LoKr", factors, None, square)},
        "OFT": {query: Structured("OFT", {"oft_blocks": blocks}, None, square)},
        "DoRA": {text: Decomposed(LowRank(some(WIDE, 2), some(2, WIDE), 2), 1 + some(1, WIDE).abs())},
        "full": {conv: Dense(0.2 * some(WIDE, WIDE, 3, 3)), query: Dense(some(WIDE, WIDE))},
        "norm and bias": {NORM: Dense(some(NARROW["block_out_channels"][0])), BIAS: Dense(some(WIDE))},
    }


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "OFT", "DoRA", "full", "norm and bias"])
def test_every_kind_can_change_from_step_to_step(base: Base, adapters: dict[str, Adapter], kind: str) -> None:
    before, adapter = everything(base), Adapter(kinds(base)[kind])
    seen = latents(base, [(adapter, "1@0,0@0.7"), (adapters["rex"], 0.5)], steps=3)
    wanted = by_hand(base, [[(adapter, level), (adapters["rex"], 0.5)] for level in (1.0, 1 - 0.5 / 0.7, 0.0)])
    assert apart(seen, wanted) < 1e-4 < apart(seen, latents(base, [(adapters["rex"], 0.5)], steps=3))
    assert everything(base) == before
