"""How to use the adapter: here, in diffusers, A1111/Forge and ComfyUI."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ...adapters.hosts import HOSTS
from ...families.names import ROWS
from ...families.notation import plain_text, settle
from ...recipe.adapter import EMBEDDING
from ...recipe.settings import settings
from ...text import command_line, transfer_command
from .read import Run, number

DEFAULT_BASE = settings()["base"].default
UI_FAMILIES = set(next(host.families for host in HOSTS if host.name == "A1111"))  # whose bases those UIs can load


@dataclass(frozen=True)
class Program:
    """One program: its name, a line before each piece of code, and a remark."""

    title: str
    parts: tuple[tuple[str, str], ...]  # (what to do, code to copy)
    remark: str = ""


def programs(run: Run, prompt: str) -> list[Program]:
    """Commands that use the run's adapter on a prompt; none before there is an adapter."""
    if not run.adapter:
        return []
    untried = _family(run) and not any(_family(run) in host.families for host in HOSTS)  # what UIs make of it is not known
    return [_here(run, prompt), _diffusers(run, prompt), *([] if untried else [_a1111(run, prompt), _comfyui(run, prompt)])]


def strength(run: Run) -> float:
    """The strength to recommend: the one in NAME.json, else 0.8."""
    preferred = number(run.sidecar.get("preferred weight"))
    return preferred if preferred and preferred > 0 else 0.8


def generate_command(run: Run, prompt: str) -> str:
    """The command that draws with this adapter."""
    if is_embedding(run):
        return command_line("personalize", "generate", with_emphasis(run, prompt), "--adapter", _relative_path(_file(run)))
    return command_line("personalize", "generate", prompt, "--adapter", f"{_relative_path(_file(run))}:{strength(run):g}")


def is_embedding(run: Run) -> bool:
    """Whether the run learned a word alone."""
    return run.recipe.get("kind") == EMBEDDING


def with_emphasis(run: Run, prompt: str) -> str:
    """A prompt in which the word counts as much as is recommended."""
    weight = strength(run)
    return prompt if weight == 1 else re.sub(rf"(?<!\w){re.escape(run.trigger)}(?!\w)", f"({run.trigger}:{weight:g})", prompt)


def finish_command(run: Run) -> str:
    """The command that makes an adapter of where a stopped run stands."""
    return command_line("personalize", "finish", _relative_path(run.folder))


def train_command(run: Run) -> str:
    """The command that trains the same adapter again."""
    folder = str(run.recipe.get("folder") or "FOLDER")
    recipe = str(_relative_path(run.folder / "recipe.toml"))
    return command_line("personalize", "train", folder, "--preset", recipe, "--output", f"{_relative_path(run.folder)}-again")


def _here(run: Run, prompt: str) -> Program:
    parts = (("Draw with it", generate_command(run, prompt)), ("Train the same adapter again", train_command(run)))
    return Program("personalize", parts)


def _diffusers(run: Run, prompt: str) -> Program:
    name = run.trigger if run.trigger.isidentifier() else "mine"
    pipeline = ROWS.get(_family(run), ROWS["sd1"]).pipeline
    reader = "from_single_file" if _base(run).endswith(".safetensors") else "from_pretrained"
    lines = [
        *(["from importlib.resources import files", ""] if _is_bundled(run) else []),
        "import torch",
        f"from diffusers import {pipeline}",
        "",
        f"base = {_folder_of_base(run)}",
        f"adapter = {str(_relative_path(_file(run)))!r}",
        f"pipe = {pipeline}.{reader}(base)",
        *(_load_words(run) if is_embedding(run) else []),
        *(
            []
            if is_embedding(run)
            else [
                f"pipe.load_lora_weights(adapter, adapter_name={name!r})",
                f"pipe.set_adapters({name!r}, {strength(run):g})",
            ]
        ),
        "image = pipe(",
        f"    {plain_text(settle(prompt))!r},",  # which reads every letter as it is
        f"    num_inference_steps={int(number(run.recipe.get('sample_steps')) or 20)},",
        f"    guidance_scale={number(run.recipe.get('guidance')) or 3.0:g},",
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
        'image.save("out.png")',
    ]
    return Program("diffusers", (("pip install diffusers peft transformers", "\n".join(lines)),))


def _load_words(run: Run) -> list[str]:
    """How diffusers reads the word: where a base has two text encoders, for each its own vectors."""
    if len(ROWS.get(_family(run), ROWS["sd1"]).texts) < 2:
        return [f"pipe.load_textual_inversion(adapter, token={run.trigger!r})"]
    load = "pipe.load_textual_inversion(words[{key!r}], token={word!r}, text_encoder=pipe.{part}, tokenizer=pipe.{reader})"
    pairs = (("clip_l", "text_encoder", "tokenizer"), ("clip_g", "text_encoder_2", "tokenizer_2"))
    calls = [load.format(key=key, word=run.trigger, part=part, reader=reader) for key, part, reader in pairs]
    return ["from safetensors.torch import load_file", "words = load_file(adapter)", *calls]


def _a1111(run: Run, prompt: str) -> Program:
    if is_embedding(run):
        folder = "stable-diffusion-webui/embeddings/"
        parts = ((f"Put it into {folder}", _copy(run, folder)), ("Type this as the prompt", with_emphasis(run, prompt)))
        return Program("A1111 and Forge", parts, _remark(run))
    folder = "stable-diffusion-webui/models/Lora/"
    tag = f"<lora:{_file(run).stem}:{strength(run):g}> {prompt}"
    parts = ((f"Put it into {folder}", _copy(run, folder)), ("Type this as the prompt", tag))
    return Program("A1111 and Forge", (*_conversion(run), *parts), _remark(run))


def _comfyui(run: Run, prompt: str) -> Program:
    if is_embedding(run):
        folder, text = (
            "ComfyUI/models/embeddings/",
            with_emphasis(run, prompt).replace(run.trigger, f"embedding:{_file(run).stem}"),
        )
        return Program(
            "ComfyUI", ((f"Put it into {folder}", _copy(run, folder)), ("Type this as the prompt", text)), _remark(run)
        )
    folder, weight = "ComfyUI/models/loras/", round(strength(run), 4)
    node = f"""{{"class_type": "LoraLoader", "inputs": {{
  "lora_name": {json.dumps(_file(run).name, ensure_ascii=False)},
  "strength_model": {weight}, "strength_clip": {weight},
  "model": ["4", 0], "clip": ["4", 1]}}}}"""
    parts = ((f"Put it into {folder}", _copy(run, folder)), ("Add a Load LoRA node (as API json)", node))
    return Program("ComfyUI", (*_conversion(run), *parts), _remark(run))


def _conversion(run: Run) -> tuple[tuple[str, str], ...]:
    """UIs take the kohya dialect only; other files are converted first."""
    if run.recipe.get("dialect", "kohya") == "kohya":
        return ()
    path = str(_relative_path(_file(run)))
    code = f"from personalize.adapters import Adapter; Adapter.load({path!r}).save({path!r}, dialect='kohya')"
    what = f"This file is in the {run.recipe['dialect']} dialect: make it a kohya file first"
    return ((what, command_line("python", "-c", code)),)


def _copy(run: Run, folder: str) -> str:
    files = [_file(run).with_suffix(suffix) for suffix in (".safetensors", ".json", ".png")]
    return transfer_command([_relative_path(path) for path in files if path.is_file()], folder)


def _remark(run: Run) -> str:
    if _family(run) in UI_FAMILIES or (not _family(run) and not _is_bundled(run)):
        return ""
    return (
        f"These programs load Stable Diffusion checkpoints, and {Path(_base(run)).name} is not one: "
        "for pictures there, train on a Stable Diffusion folder."
    )


def _file(run: Run) -> Path:
    return run.adapter or run.folder / f"{run.name}.safetensors"


def _base(run: Run) -> str:
    return str(run.recipe.get("base") or DEFAULT_BASE)


def _family(run: Run) -> str:
    facts = run.started.get("base")
    return str(facts.get("family") or "") if isinstance(facts, dict) else ""


def _is_bundled(run: Run) -> bool:
    """Whether the base's name means a folder inside this package."""
    name = _base(run)
    return name.isidentifier() and (Path(__file__).parents[2] / name).is_dir()


def _folder_of_base(run: Run) -> str:
    return f'str(files("personalize") / "{_base(run)}/weights")' if _is_bundled(run) else repr(_base(run))


def _relative_path(path: Path) -> Path:
    """A path as one would type it from here."""
    here, there = Path.cwd(), path.resolve()
    return there.relative_to(here) if there.is_relative_to(here) else path
