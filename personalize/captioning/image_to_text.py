"""Sentences by a model of transformers that turns images into text: BLIP, GIT, BLIP-2, Florence-2, and those that one talks to.

Safetensors alone are opened, and no code that comes with a model is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.sources import CONFIG, read_json
from .captioner import AUTO, Captioner, Manner, Say, load_with_processor, opening

if TYPE_CHECKING:
    import torch
    from PIL import Image

TOKENS = 100  # most that a caption has
PROMPTS = {"florence2": "<DETAILED_CAPTION>"}  # what models are asked that must be asked something
WRITE = ("ForConditionalGeneration", "ForCausalLM", "ForImageTextToText", "VisionEncoderDecoderModel")  # endings of classes
QUESTION = "Describe this image in one sentence."  # to those that one talks to


def recognise(folder: Path) -> bool:
    """Whether a folder holds such a model, as its config tells: one that looks and writes."""
    if not (folder / CONFIG).is_file():
        return False
    config = read_json(folder / CONFIG)
    looks, kinds = {"vision_config", "encoder"} & config.keys(), config.get("architectures")
    return bool(looks) and any(str(kind).endswith(WRITE) for kind in kinds or ())


class Writer:
    """A model with its processor."""

    def __init__(self, model: Any, processor: Any, prompt: str, place: tuple[torch.device, torch.dtype]) -> None:
        self.model, self.processor, self.place = model.to(place[0]), processor, place
        self.talks = bool(getattr(processor, "chat_template", None))
        self.prompt = prompt or PROMPTS.get(model.config.model_type, QUESTION if self.talks else "")
        tokenizer = getattr(processor, "tokenizer", None)
        if self.talks and tokenizer is not None:
            tokenizer.padding_side = "left"  # what is written follows what was asked

    def say(self, images: Sequence[Image.Image]) -> list[str]:
        """A sentence for each image."""
        import torch

        from ..models.model import quiet

        with quiet(), torch.no_grad():
            asked = self._ask(images).to(*self.place)
            written = self.model.generate(**asked, max_new_tokens=TOKENS, do_sample=False)
            before = asked.get("input_ids")
            if before is not None and torch.equal(written[:, : before.shape[1]], before):
                written = written[:, before.shape[1] :]
            return [" ".join(text.split()) for text in self.processor.batch_decode(written, skip_special_tokens=True)]

    def _ask(self, images: Sequence[Image.Image]) -> Any:
        """The model's inputs."""
        if self.talks:
            content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            return self.processor(images=[[one] for one in images], text=[text] * len(images), padding=True, return_tensors="pt")
        words = {"text": [self.prompt] * len(images), "padding": True} if self.prompt else {}
        return self.processor(images=list(images), return_tensors="pt", **words)


def open_model(folder: Path, manner: Manner) -> Say:
    """A model with its processor. Raises BaseModelError."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoProcessor, GenerationConfig

    device, dtype = manner.place
    with opening(folder):
        model, processor = load_with_processor(folder, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoProcessor, dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return Writer(model, processor, manner.prompt or "", (device, dtype)).say


IMAGE_TO_TEXT = Captioner("an image-to-text model", recognise, open_model, Manner(prompt="", device=AUTO, precision=AUTO))
