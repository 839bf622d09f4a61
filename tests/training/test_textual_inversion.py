"""`--kind embedding`, and words beside an adapter: what is learned is what torch learns of a table's rows, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from small import LATENT
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.describe import describe
from personalize.adapters.embedding import Embedding, load_learned
from personalize.data.cache import fingerprint
from personalize.errors import AdapterError, PersonalizeError, RecipeError
from personalize.formats.header import read_header
from personalize.models.model import Base
from personalize.recipe.fields import Optim, Recipe
from personalize.recipe.resolve import from_json, resolve, to_json
from personalize.training.events import Derived, Event, Failed, Shared, Started, Step, Warned
from personalize.training.fleet import train_fleet
from personalize.training.inputs import prepare_data, training_batches
from personalize.training.loop import train
from personalize.training.memory.ladder import ComputePlan
from personalize.training.memory.plan import estimate_of
from personalize.training.optimizers import Optimizer
from personalize.training.preflight import check
from personalize.tuning.fleet import Fleet
from personalize.tuning.textual_inversion import begin_words

pytestmark = pytest.mark.usefixtures("short_exam", "one_thread")
Make = Callable[..., Recipe]
ALONE = {"kind": "embedding", "rank": 8, "vectors": 2, "embedding_lr": 1e-2, "warmup": 0}
PIVOTAL = {"vectors": 2, "pivot": 0.5, "warmup": 0}
WORDS = {"zwx": "cat"}
PROMPTS = ["a zwx in the snow", "zwx"]


def learned(recipe: Recipe, name: str = "zwx.safetensors") -> Adapter:
    assert recipe.output
    return load_learned(recipe.output / name)


def vectors(adapter: Adapter) -> Tensor:
    ((tensor,),) = (own.values() for own in adapter.words.values())
    return tensor


# ---------------------------------------------------------------- golden: rows of the table itself


@pytest.fixture(params=["narrow", "sdxl"])
def base(request: pytest.FixtureRequest, narrow_base: Path, tmp_path: Path) -> Base:
    return Base.load(narrow_base if request.param == "narrow" else bases.folder(tmp_path / "base", "sdxl"))


def noise_of(base: Base) -> tuple[Tensor, Tensor]:
    latents = torch.randn(2, base.channels, 8, 8, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([300, 700])


def ids_of(text: Any, prompt: str, rows: list[int]) -> list[int]:
    """A prompt's tokens with both ends and padding, `rows` of the table in the place of its trigger."""
    before, after = (text.tokenizer(piece.strip(), add_special_tokens=False).input_ids for piece in prompt.split("zwx"))
    ids = [text.tokenizer.bos_token_id, *before, *rows, *after, text.tokenizer.eos_token_id]
    return ids + [text.tokenizer.pad_token_id] * (text.window - len(ids))


def plain_cond(base: Base, rows: list[int]) -> Any:
    """The prompts as transformers' own models read them, with rows of their tables as the trigger."""
    read = []
    for text in base.texts:
        ids = torch.tensor([ids_of(text, prompt, rows) for prompt in PROMPTS])
        output = text.model(ids, output_hidden_states=True)
        states = output.last_hidden_state if text.normed else output.hidden_states[-2]
        read.append((states, getattr(output, "text_embeds", None)))
    return base.family.combine(base.family, read)


def test_a_vectors_gradient_is_that_of_its_row_in_the_table(base: Base) -> None:
    """One step's gradient, of both text encoders where there are two, as torch computes it of the plain models."""
    latents, t = noise_of(base)
    start = begin_words(base, WORDS, 2)
    with Fleet(base, [{}], words=[start]) as fleet, fleet.members[0].computing():
        base.denoise(latents, t, base.embed(PROMPTS)).square().mean().backward()
        ours = {part: one.grad for part, one in fleet.members[0].vectors["zwx"].items()}
    rows = [5, 9]  # of the table, which no prompt uses
    for text in base.texts:
        table = text.model.get_input_embeddings().weight
        with torch.no_grad():
            table[rows] = start["zwx"][text.part]
        table.requires_grad_()
    base.denoise(latents, t, plain_cond(base, rows)).square().mean().backward()
    assert ours.keys() == {text.part for text in base.texts}
    for text in base.texts:
        gradient = text.model.get_input_embeddings().weight.grad
        assert ours[text.part].abs().min() > 0
        torch.testing.assert_close(ours[text.part], gradient[rows], rtol=1e-4, atol=1e-7)


def test_steps_are_those_of_diffusers_script(narrow_base: Path) -> None:
    """textual_inversion.py trains the whole table by AdamW, and puts back all rows but the word's after each step."""
    base, optim = Base.load(narrow_base), Optim(embedding_lr=1e-2, warmup=0, schedule="constant", clip=0)
    (text,), (latents, t), rows = base.texts, noise_of(base), [5, 9]
    start = begin_words(base, WORDS, 2)
    with Fleet(base, [{}], words=[start]) as fleet, fleet.members[0].computing():
        member = fleet.members[0]
        opt = Optimizer(member.parameters(), optim, 3)
        for done in range(3):
            base.denoise(latents, t, base.embed(PROMPTS)).square().mean().backward()
            opt.step(done, opt.norm())
        ours = member.vectors["zwx"]["text_encoder"].detach().clone()
    table = text.model.get_input_embeddings().weight
    with torch.no_grad():
        table[rows] = start["zwx"]["text_encoder"]
    before, others = table.detach().clone(), torch.ones(len(table), dtype=torch.bool)
    others[rows] = False
    table.requires_grad_()
    theirs = torch.optim.AdamW([table], lr=1e-2, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    for _ in range(3):
        base.denoise(latents, t, plain_cond(base, rows)).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
        with torch.no_grad():
            table[others] = before[others]
    assert (ours - before[rows]).abs().mean() > 1e-2
    torch.testing.assert_close(ours, table[rows].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("t5", [False, True])
def test_every_text_encoder_learns_the_word(t5: bool, tmp_path: Path) -> None:
    base = Base.load(bases.sd3(tmp_path / "base", t5=t5))
    latents = torch.randn(1, *LATENT)
    with Fleet(base, [{}], words=[begin_words(base, WORDS, 3)]) as fleet, fleet.members[0].computing():
        base.denoise(latents, base.noise.time(torch.tensor([300])), base.embed(["a zwx"])).square().mean().backward()
        found = fleet.members[0].vectors["zwx"]
    assert len(found) == 2 + t5 and all(one.grad is not None and one.grad.abs().max() > 0 for one in found.values())


@pytest.mark.parametrize(
    ("count", "rows"), [(1, [[0, 1, 2]]), (3, [[0], [1], [2]]), (2, [[0], [1, 2]]), (5, [[0], [0], [1], [1], [2]])]
)
def test_vectors_begin_as_what_a_word_says(narrow_base: Path, count: int, rows: list[list[int]]) -> None:
    base = Base.load(narrow_base)
    (text,) = base.texts
    table = text.model.get_input_embeddings().weight[text.tokenizer("cat", add_special_tokens=False).input_ids]
    assert len(table) == 3
    wanted = torch.stack([table[some].mean(0) for some in rows])
    assert torch.allclose(begin_words(base, WORDS, count)["zwx"]["text_encoder"], wanted)
    if count == 3:  # the word says what the other says
        with base.knowing(begin_words(base, WORDS, 3)):
            ours = base.embed(["a zwx", "(zwx:1.3) BREAK zwx, a"], weighted=True)
        assert torch.equal(ours.tokens, base.embed(["a cat", "(cat:1.3) BREAK cat, a"], weighted=True).tokens)


def test_off_and_strengths(narrow_base: Path) -> None:
    base = Base.load(narrow_base)
    plain = base.embed(PROMPTS, weighted=True).tokens
    with Fleet(base, [{}], words=[begin_words(base, WORDS, 2)]) as fleet:
        (word,) = fleet.members
        assert torch.equal(base.embed(PROMPTS).tokens, plain)  # outside of computing, they are nobody's
        with word.computing(), torch.no_grad():
            own = base.embed(PROMPTS, weighted=True).tokens
            assert not torch.equal(own, plain)
            with word.off():
                assert torch.equal(base.embed(PROMPTS, weighted=True).tokens, plain)
            with word.at(1.4):
                stronger = base.embed(PROMPTS, weighted=True).tokens
            brackets = [prompt.replace("zwx", "(zwx:1.4)") for prompt in PROMPTS]
            assert torch.allclose(stronger, base.embed(brackets, weighted=True).tokens)
            assert not torch.allclose(stronger, own)
            assert torch.equal(base.embed(PROMPTS, weighted=True).tokens, own)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def done(narrow_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Event]]:
    """A whole run, with a choice of its checkpoints and samples."""
    from small import small_recipe

    more = {"choose": "best", "sample_prompts": ["{trigger} {class}", "a {class}"], "steps": 6, "seed": 3}
    recipe = small_recipe(narrow_base, pictures, output=tmp_path_factory.mktemp("words") / "run", **ALONE | more)
    return recipe, list(train(recipe))


def test_a_run_leaves_what_uis_read(done: tuple[Recipe, list[Event]], narrow_base: Path) -> None:
    recipe, events = done
    assert recipe.output
    path, base = recipe.output / "zwx.safetensors", Base.load(narrow_base)
    width = base.texts[0].model.get_input_embeddings().weight.shape[1]
    assert {key: entry.shape for key, entry in read_header(path).tensors.items()} == {"emb_params": (2, width)}
    started, steps = events[0], [event for event in events if isinstance(event, Step)]
    assert isinstance(started, Started) and started.parameters == 2 * width
    assert all(event.embedding_lr > 0 == event.lr and event.grad_norm > 0 for event in steps)
    found = describe(path)
    assert (found.kind, found.trigger, dict(found.words)) == ("textual inversion", "zwx", {"zwx": 2})
    assert found.metadata["modelspec.architecture"].endswith("/textual-inversion")
    moved = vectors(learned(recipe)) - begin_words(base, WORDS, 2)["zwx"]["text_encoder"]
    assert moved.norm(dim=1).min() > 1e-3
    assert from_json(found.metadata["personalize.recipe"]).adapter.vectors == 2
    page = (recipe.output / "report.html").read_text() if (recipe.output / "report.html").exists() else ""
    assert "<lora:" not in page


def test_the_base_is_as_it_was(make: Make) -> None:
    plan = check(make(**ALONE))
    before = fingerprint(plan.base.texts[0].model.state_dict())
    from personalize.training.loop import train_plan

    list(train_plan(plan))
    assert fingerprint(plan.base.texts[0].model.state_dict()) == before
    assert not plan.base.texts[0].words


@pytest.mark.parametrize(
    ("flags", "stop"),
    [
        (ALONE | {"caption_dropout": 0.5, "accumulate": 2, "seed": 1}, 4),
        (PIVOTAL | {"prior": "output", "embedding_share": 0.5, "steps": 6}, 3),
        (PIVOTAL | {"prior": "output", "text_encoder_lr": 1e-3, "steps": 6}, 5),
    ],
)
def test_stopped_anywhere_it_ends_with_the_same_bytes(make: Make, tmp_path: Path, flags: dict[str, Any], stop: int) -> None:
    whole, broken = (make(**flags, output=tmp_path / name) for name in ("whole", "broken"))
    list(train(whole))
    events = train(broken)
    list(itertools.islice(events, stop))
    events.close()
    first = next(iter(again := list(train(broken))))
    assert isinstance(first, Started) and first.resumed > 0 and again
    for name in ("zwx.safetensors", "checkpoints/zwx-000002.safetensors", "checkpoints/zwx-000004.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_a_step_without_the_word_teaches_nothing(make: Make) -> None:
    """All captions of a batch may be dropped: there is no gradient then, and no error."""
    recipe = make(**ALONE | {"caption_dropout": 1.0, "steps": 2, "weight_decay": 0.0})
    assert all(event.grad_norm == 0 for event in train(recipe) if isinstance(event, Step))
    start = check(make(**ALONE, output=recipe.output / "other")).words["zwx"]["text_encoder"] if recipe.output else None
    assert start is not None and torch.equal(vectors(learned(recipe)), start)


def test_pivotal_tuning(make: Make) -> None:
    """The word first, then the adapter too; one file holds both, and the word lies beside it."""
    recipe = make(**PIVOTAL, embedding_share=0.75, steps=8, checkpoint_every=1)
    events = list(train(recipe))
    assert recipe.output
    steps = [event for event in events if isinstance(event, Step)]
    assert [event.embedding_lr > 0 for event in steps] == [True] * 6 + [False] * 2
    files = [learned(recipe, f"checkpoints/zwx-{step:06}.safetensors") for step in range(1, 9)]
    moved = [[not torch.equal(vectors(a), vectors(b)) for a, b in itertools.pairwise(files)]]
    moved += [
        [any(not torch.equal(a.deltas[p].delta(), b.deltas[p].delta()) for p in a.deltas) for a, b in itertools.pairwise(files)]
    ]
    assert moved == [[True] * 5 + [False] * 2, [False] * 3 + [True] * 4]
    path = recipe.output / "zwx.safetensors"
    assert [key for key in read_header(path).tensors if key.startswith("bundle_emb")] == ["bundle_emb.zwx.string_to_param.*"]
    (word,) = (event for event in events if isinstance(event, Derived))
    assert word.path == "embeddings/zwx.safetensors"
    assert torch.equal(Embedding.load(recipe.output / word.path).vectors["text_encoder"], vectors(Adapter.load(path)))


def test_a_folder_of_several_words(make: Make, pictures: Path, tmp_path: Path) -> None:
    """An adapter brings all of them, and an embedding is one."""
    for name in ("1_rex dog", "1_tom cat"):
        (tmp_path / "both" / name).mkdir(parents=True)
        (tmp_path / "both" / name / "0.png").write_bytes((pictures / "0.png").read_bytes())
    recipe = make(vectors=1, folder=tmp_path / "both", steps=2)
    list(train(recipe))
    assert recipe.output
    file = recipe.output / f"{check(recipe).run.name}.safetensors"
    assert set(load_learned(file).words) == {"rex", "tom"}
    assert sorted(path.stem for path in (recipe.output / "embeddings").iterdir()) == ["rex", "tom"]
    with pytest.raises(RecipeError, match="--kind embedding learns one word, and the folder has 2: rex, tom"):
        check(make(**ALONE, folder=tmp_path / "both", output=tmp_path / "alone"))


def test_members_of_a_fleet_share_passes(make: Make, tmp_path: Path) -> None:
    """And each learns what it learns alone, with words of its own."""

    def recipes(where: str) -> list[Recipe]:
        words = ("zwx", "vok")
        return [
            make(**ALONE, trigger=one, init_word=one[0], seed=i, output=tmp_path / where / one) for i, one in enumerate(words)
        ]

    told = list(train_fleet(recipes("fleet")))
    assert any(isinstance(event, Shared) and event.members == 2 for _, event in told)
    assert not any(isinstance(event, Failed | Warned) for _, event in told)
    for fleet, alone in zip(recipes("fleet"), recipes("alone"), strict=True):
        list(train(alone))
        name = f"{alone.data.trigger}.safetensors"
        a, b = (vectors(learned(one, name)) for one in (fleet, alone))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert not torch.equal(
            a,
            check(make(**ALONE, trigger=alone.data.trigger, output=tmp_path / "new")).words[str(alone.data.trigger)][
                "text_encoder"
            ],
        )


def test_it_begins_with_a_file(make: Make, tmp_path: Path, done: tuple[Recipe, list[Event]]) -> None:
    assert done[0].output
    file = done[0].output / "zwx.safetensors"
    plan = check(make(**ALONE, init=file, output=tmp_path / "more"))
    assert torch.equal(plan.words["zwx"]["text_encoder"], vectors(load_learned(file)))
    beside = check(make(vectors=2, init=file, output=tmp_path / "beside"))
    assert torch.equal(beside.words["zwx"]["text_encoder"], vectors(load_learned(file))) and beside.start
    with pytest.raises(AdapterError, match=r"holds vectors text_encoder \[2, \d+\], and those to train are .*\[3, .*--vectors 2"):
        check(make(**ALONE | {"vectors": 3}, init=file, output=tmp_path / "more"))
    with pytest.raises(AdapterError, match="layers that would not be trained"):
        check(make(**ALONE, init=trained(make, tmp_path), output=tmp_path / "lora"))


def trained(make: Make, tmp_path: Path) -> Path:
    recipe = make(steps=1, output=tmp_path / "an adapter")
    list(train(recipe))
    return tmp_path / "an adapter" / "zwx.safetensors"


def test_captions_fill_as_many_windows_as_with_the_vectors(make: Make) -> None:
    """A word of 40 vectors, twice in a caption, does not fit into one window."""
    recipe = make(**ALONE | {"vectors": 40}, caption="{trigger} and {trigger}")
    plan = check(recipe)
    assert plan.windows == 2 and check(make(caption="{trigger} and {trigger}")).windows == 1
    with Fleet(plan.base, [{}], words=[plan.words]) as fleet, fleet.members[0].computing():
        inputs = next(training_batches(plan, prepare_data(plan), 0))
    assert inputs.cond.tokens.shape[1] == 2 * 77 and inputs.cond.tokens.requires_grad


def test_an_estimate_holds_the_text_encoders_pass(make: Make, tmp_path: Path) -> None:
    """Vectors need what a text encoder's pass keeps, and the adapter's layers need their own."""
    compute = ComputePlan(precision="float32")
    word, both, plain = (
        estimate_of(check(make(**flags, output=tmp_path / str(i))), compute)
        for i, flags in enumerate([ALONE, {"vectors": 2}, {}])
    )
    assert 16 * vectors_count(make) <= word.adapter <= 16 * vectors_count(make) + 64
    assert both.adapter == plain.adapter + word.adapter
    assert both.activations > plain.activations


def vectors_count(make: Make) -> int:
    return sum(one.numel() for one in check(make(**ALONE)).words["zwx"].values())


# ---------------------------------------------------------------- settings


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prior": ({"prior": "output"}, "--prior output keeps what has no trigger as it is, and --kind embedding changes"),
    "rank": ({"rank": 3}, "--rank is about layers, and --kind embedding changes none"),
    "lr": ({"lr": 1e-2}, "--lr is about layers, .*--embedding-lr is its rate"),
    "dropout": ({"dropout": 0.1}, "--dropout is about layers"),
    "text encoder": ({"text_encoder_lr": 1e-4}, "--text-encoder-lr is about layers"),
    "freeze": ({"freeze": ["mid"]}, "--freeze is about layers"),
    "unfreeze": ({"unfreeze": "gradual"}, "--unfreeze is about layers"),
    "pivot": ({"pivot": 0.5}, "--pivot is about layers.*--kind lora --vectors 2 learns both"),
    "share": ({"embedding_share": 0.5}, "nothing is left to train after --embedding-share"),
    "dialect": ({"dialect": "peft"}, "--dialect peft is about adapters"),
    "none": ({"vectors": 0}, "--vectors 0 leaves --kind embedding nothing to learn"),
    "no vectors": ({"kind": "lora", "vectors": 0, "pivot": 0.5}, "--embedding-lr is about vectors of the trigger, and none"),
    "pivot alone": ({"kind": "lora", "vectors": 0, "pivot": 0.5, "embedding_lr": 5e-3}, "--pivot is about vectors"),
    "both": ({"kind": "lora", "pivot": 0.5, "unfreeze": "gradual"}, "--pivot and --unfreeze exclude each other"),
    "gap": ({"kind": "lora", "pivot": 0.5, "embedding_share": 0.2}, "between --embedding-share 0.2 and --pivot 0.5"),
    "no layers": ({"kind": "lora", "lr": 0, "text_encoder_lr": 1e-4}, "--kind embedding learns the word alone"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_a_line(make: Make, name: str) -> None:
    flags, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message) as caught:
        make(**{**ALONE, **flags})
    assert "\n" not in str(caught.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": "other"}, "know an embedding's word by its file's name, which is other, and the trigger is 'zwx'"),
    "trigger": ({"trigger": "my cat"}, "which is my-cat, and the trigger is 'my cat' .*--trigger my-cat"),
    "captions": ({"caption": "a {class}"}, "no caption holds 'zwx', whose vectors are to be learned"),
    "dialect": ({"kind": "lora", "embedding_lr": 5e-3, "dialect": "peft"}, "words"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_folder_cannot_teach_is_refused_before_anything(make: Make, name: str) -> None:
    flags, message = WRONG[name]
    with pytest.raises(PersonalizeError, match=message):
        check(make(**{**ALONE, **flags}))


def test_presets_speak_of_adapters(pictures: Path) -> None:
    """What a preset says of layers and of the prior falls away; what it says of steps, captions and samples holds."""
    recipe = resolve("pocket-subject", {"folder": pictures, "class": "cat", "kind": "embedding"})
    adapter = resolve("pocket-subject", {"folder": pictures, "class": "cat"})
    assert (recipe.objective.prior, recipe.adapter.rank, recipe.optim.lr) == ("none", 8, 1e-3)
    assert (recipe.steps, recipe.data.caption) == (adapter.steps, adapter.data.caption)
    again = resolve(start=from_json(to_json(recipe)), flags={"seed": 1, "folder": pictures})
    assert again.adapter == recipe.adapter and again.optim == recipe.optim
    faster = resolve(start=adapter, flags={"kind": "embedding", "embedding_lr": 1e-2})
    assert faster.objective.prior == "none" and faster.optim.embedding_lr == 1e-2


def test_runs_without_words_say_nothing_of_them(make: Make) -> None:
    text = to_json(make())
    assert not any(name in text for name in ("vectors", "init_word", "embedding", "pivot"))
