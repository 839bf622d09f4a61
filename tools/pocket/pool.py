"""Pools of rendered pictures and captions on disk, and the tokenizer: what pretraining reads instead of the renderer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .art_canvas import pick
from .art_individuals import invent_individual
from .art_looks import invent_look
from .art_textures import draw_texture
from .names import schools, somebodies
from .world import COLOURS, STYLE_WORDS, UNSEEN_STYLES, Scene, caption, is_held_out, render, scenes

CHUNK = 2000  # pictures a worker draws at once
INDIVIDUALS, LOOKS = 0.45, 0.3  # shares of pictures with an individual, with a look
NAMED = 0.35  # share of those whose individual or look has a name and comes again; the others are invented anew


Job = tuple[int, int, int, int]  # seed, number of the chunk, side of the pictures, how many
Draw = Callable[[Job], tuple[np.ndarray, list[str]]]


def draw_chunk(job: Job) -> tuple[np.ndarray, list[str]]:
    """Pictures `[count, size, size, 3]` uint8 and their captions, from the stream of scenes numbered by the seed."""
    seed, chunk, size, count = job
    rng = np.random.default_rng([seed, chunk, 9])
    drawn = [draw_one(scene, seed, size, rng) for scene in islice(scenes(seed * 100_003 + chunk), count)]
    return np.stack([picture for picture, _ in drawn]), [words for _, words in drawn]


def draw_one(scene: Scene, seed: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """The picture of a scene and a caption; now and then of an individual or in a look, named or never there before."""
    individual, words = None, None
    if rng.random() < INDIVIDUALS:
        who = pick(rng, somebodies())
        named = replace(scene, object=who.object, colour=who.colour)
        if rng.random() < NAMED and not is_held_out(named):
            scene, individual, words = named, who.looks, f"{who.name} {who.object}"
        else:
            individual = invent_individual(rng, scene.object, scene.colour, COLOURS)
            words = individual.looks
    look, phrase = None, None
    if rng.random() < LOOKS:
        school = pick(rng, schools())
        look, phrase = (school.look, f"{school.name} style") if rng.random() < NAMED else invent_look(rng, COLOURS)
    return np.asarray(render(scene, size, individual, look)), caption(scene, seed, words, phrase)


def draw_textures(job: Job) -> tuple[np.ndarray, list[str]]:
    """Pictures of nothing `[count, size, size, 3]` uint8, of which there is nothing to say."""
    seed, chunk, size, count = job
    rng = np.random.default_rng([seed, chunk, 10])
    return np.stack([draw_texture(rng, size) for _ in range(count)]), [""] * count


def build_pool(folder: Path, count: int, size: int, seed: int, workers: int, draw: Draw = draw_chunk) -> None:
    """Draw `count` pictures into `pictures.npy` and `captions.json`; one that was broken off goes on, a whole one is kept."""
    pictures_file, captions_file = folder / "pictures.npy", folder / "captions.json"
    if captions_file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    told = {"count": count, "size": size, "seed": seed}
    captions = read_begun(part := folder / "captions.part.jsonl", told)
    mode = "r+" if captions else "w+"
    pictures = np.lib.format.open_memmap(pictures_file, mode=mode, dtype=np.uint8, shape=(count, size, size, 3))
    with get_context("spawn").Pool(workers) as workers_pool, part.open("a") as lines:
        jobs = [(seed, first // CHUNK, size, min(CHUNK, count - first)) for first in range(len(captions), count, CHUNK)]
        for drawn, words in workers_pool.imap(draw, jobs):
            pictures[len(captions) : len(captions) + len(words)] = drawn
            captions += words
            lines.write(json.dumps(words) + "\n")
            lines.flush()
            print(f"{folder.name}: {len(captions)}/{count} pictures", flush=True)
    pictures.flush()
    captions_file.write_text(json.dumps(captions))
    part.unlink()


def read_begun(part: Path, told: dict[str, int]) -> list[str]:
    """The captions of whole chunks in a file of a pool that was broken off; a new file if it is not the same pool."""
    lines = part.read_text().splitlines(keepends=True) if part.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut short
    if not whole or json.loads(whole[0]) != told:
        whole = [json.dumps(told) + "\n"]
    part.write_text("".join(whole))
    return [words for line in whole[1:] for words in json.loads(line)]


def open_pool(folder: Path) -> tuple[np.ndarray, list[str]]:
    """The pictures `[n, size, size, 3]` (memory-mapped uint8) and captions of a finished pool."""
    return np.load(folder / "pictures.npy", mmap_mode="r"), json.loads((folder / "captions.json").read_text())


def write_rows(file: Path, count: int, rows_of: Callable[[slice], np.ndarray], batch: int = 250) -> None:
    """Write an array of `count` rows piece by piece, under its name only once it is whole; one that is there is kept."""
    if file.exists():
        return
    temporary, out = file.with_suffix(".tmp.npy"), None
    for first in range(0, count, batch):
        rows = rows_of(slice(first, first + batch))
        if out is None:
            out = np.lib.format.open_memmap(temporary, mode="w+", dtype=rows.dtype, shape=(count, *rows.shape[1:]))
        out[first : first + batch] = rows
    del out  # flushes
    temporary.rename(file)


def shuffled_batches(count: int, batch: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Endless batches of indices, each epoch a permutation; a pure function of the seed, so `start` resumes exactly."""
    per_epoch = count // batch
    for step in range(start, 1 << 62):
        epoch, place = divmod(step, per_epoch)
        if step == start or place == 0:
            order = np.random.default_rng([seed, epoch]).permutation(count)
        yield np.sort(order[place * batch : (place + 1) * batch])


def build_tokenizer(folder: Path, captions: list[str], merges: int = 900) -> None:
    """A CLIP byte-pair tokenizer learned from captions: any typed word tokenizes; a trigger is spelled, as every name is."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word for phrases in STYLE_WORDS.values() for phrase in phrases for word in phrase.split()]
    corpus = captions[:20_000] + [*UNSEEN_STYLES, *words] * 200
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=512 + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=20)
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in learned]
    vocabulary = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    vocabulary += [word for word in dict.fromkeys("".join(pair) for pair in pairs) if word not in set(vocabulary)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=pairs, model_max_length=77)
    tokenizer.save_pretrained(folder)
