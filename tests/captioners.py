"""Captioners of true structure and random weights, so small that they are made in a moment; and a WD tagger in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

WORDS = ("a", "the", "red", "blue", "cat", "dog", "on", "in", "grass", "snow", "of", "drawing", "(", ")", "_", ",", "big", "sits")
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SMALL | {"image_size": 32, "patch_size": 16, "initializer_range": 1.0}  # so wide that other images give other words
TEXT = SMALL | {"max_position_embeddings": 128, "initializer_range": 0.3}


def tokenizer(folder: Path) -> Any:
    """BERT's, of a few words."""
    from transformers import BertTokenizerFast

    (vocabulary := folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizerFast(vocab_file=str(vocabulary), vocab=str(vocabulary), model_input_names=["input_ids", "attention_mask"])


def build_blip(folder: Path) -> Path:
    """BLIP (Li et al. 2022), which looks and then writes."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    folder.mkdir(parents=True)
    words = tokenizer(folder)
    ids = {"vocab_size": len(words), "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(1)
    config = BlipConfig(text_config=TEXT | ids | {"encoder_hidden_size": 32}, vision_config=VISION, projection_dim=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), words).save_pretrained(folder)
    return folder


def build_git(folder: Path) -> Path:
    """GIT (Wang et al. 2022), in which one stream holds the image and the words."""
    from transformers import CLIPImageProcessorPil, GitConfig, GitForCausalLM, GitProcessor

    folder.mkdir(parents=True)
    words = tokenizer(folder)
    ids = {"vocab_size": len(words), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(1)
    GitForCausalLM(GitConfig(vision_config=VISION, **TEXT, **ids)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(images, words).save_pretrained(folder)
    return folder


def build_classifier(folder: Path, tags: Sequence[str], many: bool = True) -> Path:
    """A vision transformer that tells tags apart: the first is likely of everything, the others get ever less so."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    kind = "multi_label_classification" if many else "single_label_classification"
    labels = dict(enumerate(tags))
    config = ViTConfig(**VISION, id2label=labels, label2id={name: i for i, name in labels.items()}, problem_type=kind)
    torch.manual_seed(1)
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(3 - 2 * torch.arange(len(tags)))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- a WD tagger, written as ONNX has it


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message: a number, or bytes."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def node(kind: str, inputs: Sequence[str], output: str, *attributes: bytes) -> bytes:
    found = b"".join(field(1, one.encode()) for one in inputs) + field(2, output.encode()) + field(4, kind.encode())
    return field(1, found + b"".join(field(5, one) for one in attributes))


def value_info(number: int, name: str, shape: Sequence[int | str]) -> bytes:
    sides = b"".join(field(1, field(1, one) if isinstance(one, int) else field(2, one.encode())) for one in shape)
    return field(number, field(1, name.encode()) + field(2, field(1, field(1, 1) + field(2, sides))))


def constant(name: str, tensor: torch.Tensor) -> bytes:
    shape = b"".join(field(1, side) for side in tensor.shape)
    return field(5, shape + field(2, 1) + field(8, name.encode()) + field(9, tensor.float().numpy().tobytes()))


def build_wd(folder: Path, rows: Sequence[tuple[str, int]], likely: torch.Tensor, side: int = 8) -> Path:
    """A tagger whose tag n is as likely as `likely` [3, tags] makes of the mean blue, green and red, 0 to 255."""
    folder.mkdir(parents=True)
    lines = [f"{number},{name},{category},1" for number, (name, category) in enumerate(rows)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *lines]) + "\n")
    axes = field(1, b"axes") + field(20, 7) + b"".join(field(8, axis) for axis in (1, 2))
    flat = field(1, b"keepdims") + field(20, 2) + field(3, 0)
    graph = node("ReduceMean", ["input"], "mean", axes, flat) + node("MatMul", ["mean", "weights"], "output")
    graph += field(2, b"wd") + constant("weights", likely)
    graph += value_info(11, "input", ["n", side, side, 3]) + value_info(12, "output", ["n", len(rows)])
    model = field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 13))
    (folder / "model.onnx").write_bytes(model)
    return folder


def plain_picture(file: Path, colour: tuple[int, int, int] = (250, 40, 40), size: tuple[int, int] = (48, 32)) -> Path:
    """A picture of one colour."""
    Image.new("RGB", size, colour).save(file)
    return file
