"""What images tell of an adapter, in numbers: signs of identity, of a leak, of obedience, of forgetting and of copying.

Whole images are compared (CLIP-I and CLIP-T as in Ruiz et al. 2022, https://arxiv.org/abs/2208.12242), and patches. Patches see a
coat and its marks; of the training images only those count that the base's own images do not have. Almost every sign is 0 where
the base is, so that it says what the adapter did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..models.clip import Eyes, View
from ..models.recognizer import Recognizer
from .evidence import LOOKS, PLAIN_LOOK, SCENES, THINGS, Question, Questions

Signs = dict[str, float | list[float]]  # of all images together, or one of each
SHARPNESS = 50.0  # of the softmax over what an image may show: half of CLIP's own, so that it does not saturate
MOST_TRAINING = 16  # training images that are looked at
TWIN = 0.95  # cosine, place by place, above which two training images are one


@dataclass(frozen=True)
class Taught:
    """The individual or look of the training images."""

    of: str  # "individual" or "look"
    vectors: Tensor  # [n, e], unit vectors
    ceiling: float  # mean cosine of theirs to each other


@dataclass(frozen=True)
class Observer:
    """All that is compared with: the training images, and what the base draws of the same prompts."""

    eyes: Eyes
    questions: Questions
    training: View
    mirrored: View  # the training images as --flip shows them half of the time
    base: View  # of the plain questions, then of the unrelated ones
    weights: Tensor  # [n, p], how far each patch of the training images is from all that the base draws
    floor: float  # how much of these patches the base's images have
    ceiling: float  # how much of them a training image has of the others'
    taught: Taught | None  # as a recognizer sees it, where there is one

    def signs(self, images: Sequence[Image.Image]) -> Signs:
        """The signs of an adapter's images, which are those of `questions.for_adapters`.

        Lists have a number for each image: those of `called_` and `plain_` names tell whether it shows what was taught.
        """
        asked, seen, same = self.questions, self.eyes.look(images), self._recognize(images)
        n, few = len(asked.called), len(asked.few_plain)
        called, plain, others = seen[:n], seen[n : n + few], seen[n + few :]
        base, base_others = self.base[:n], self.base[n:]
        likeness = {"called": self._likeness(called, base), "plain": self._likeness(plain, base[:few])}
        shown: Signs = {f"{of}_{name}": some.tolist() for of, found in likeness.items() for name, some in found.items()}
        shown |= {"called_same": same[:n].tolist(), "plain_same": same[n : n + few].tolist()}
        obedience = {name: float(self._obeys(called, base, asked.called, name).mean()) for name in ("scene", "thing", "look")}
        kept = {f"others_{name}": float(self._obeys(others, base_others, asked.unrelated, name).mean()) for name in obedience}
        changed = {
            "others_same": float((others.whole * base_others.whole).sum(-1).mean()) - 1,
            "others_patches": float((others.patches * base_others.patches).sum(-1).mean()) - 1,
        }
        return shown | obedience | kept | changed | {"repeats": self.repeating(called)}

    def _recognize(self, images: Sequence[Image.Image]) -> Tensor:
        """How much each image [n] shows what was taught, by the recognizer: 1 is as the training images among themselves."""
        if self.taught is None or self.eyes.recognizer is None:
            return torch.zeros(len(images))
        cosines = (self.eyes.recognizer.look(images, self.taught.of) @ self.taught.vectors.T).mean(1)
        return cosines / max(self.taught.ceiling, 0.1)

    def _likeness(self, seen: View, before: View) -> dict[str, Tensor]:
        """How far each image [n] has come from the base's image of the same prompt and seed to the training images."""
        way = self.training.whole.mean(0) - before.whole.mean(0)
        moved, direction, length = seen.whole - before.whole, F.normalize(way, dim=0), float(way.norm()) or 1.0
        found = torch.stack([patches_found(self.training.patches, self.weights, one) for one in seen.patches])
        return {
            "toward": moved @ direction / length,
            "patches": (found - self.floor) / max(self.ceiling - self.floor, 1e-3),
        }

    def _obeys(self, seen: View, before: View, asked: Sequence[Question], what: str) -> Tensor:
        """How much surer CLIP is than of the base's images that these show the scene, thing or look asked for: of each [n]."""
        told = [i for i, one in enumerate(asked) if getattr(one, what)]
        if not told:
            return torch.zeros(1)
        words = {"scene": SCENES, "thing": NOUNS, "look": (PLAIN_LOOK, *filter(None, LOOKS))}[what]
        words = tuple(dict.fromkeys((*words, *(getattr(asked[i], what) for i in told))))
        texts = self.eyes.clip.texts([f"a {word}" if what == "thing" else word for word in words])
        own, rows = torch.tensor([words.index(getattr(asked[i], what)) for i in told]), torch.arange(len(told))
        after, first = ((SHARPNESS * view.words[told] @ texts.T).softmax(-1)[rows, own] for view in (seen, before))
        return after - first

    def repeating(self, called: View) -> float:
        """How far images with the trigger are copies of training images, place by place: 0 as near to one as usual, 1 the same.

        Usual is what different training images are to each other, or the base's images to them, whichever is nearer. A mirrored
        training image counts as one.
        """

        def nearness(patches: Tensor) -> Tensor:  # [n, m]
            each = (aligned_cosines(patches, view.patches) for view in (self.training, self.mirrored))
            return torch.stack(list(each)).amax(0)

        own = nearness(self.training.patches)
        others = own.masked_fill(own > TWIN, -1).max(1).values
        base, near = (nearness(view.patches).max(1).values.mean() for view in (self.base[: len(called.patches)], called))
        usual = torch.stack([base, *([others[others > -1].mean()] if (others > -1).any() else [])]).max()
        return float((near - usual) / (1 - usual).clamp(min=1e-3))


NOUNS = tuple(thing.split()[-1] for thing in THINGS)


def observe(
    eyes: Eyes, questions: Questions, training: Sequence[Image.Image], base: Sequence[Image.Image], style: bool
) -> Observer:
    """Look at the training images and at the base's, which are those of `questions.for_base`."""
    learned, drawn = eyes.look(training[:MOST_TRAINING]), eyes.look(base)
    mirrored = eyes.look([ImageOps.mirror(image) for image in training[:MOST_TRAINING]])
    all_patches = drawn.patches.flatten(0, 1)
    weights = (1 - nearest(learned.patches.flatten(0, 1), all_patches)).clamp(min=0).view(learned.patches.shape[:2])
    floor = torch.stack([patches_found(learned.patches, weights, one) for one in drawn.patches[: len(questions.called)]]).mean()
    ceiling = among_themselves(learned.patches, weights)
    taught = recognize(eyes.recognizer, training[:MOST_TRAINING], style) if eyes.recognizer else None
    return Observer(eyes, questions, learned, mirrored, drawn, weights, float(floor), ceiling, taught)


def recognize(recognizer: Recognizer, training: Sequence[Image.Image], style: bool) -> Taught:
    """What was taught. One training image is wholly like itself."""
    of = "look" if style else "individual"
    vectors = recognizer.look(training, of)
    others = (vectors @ vectors.T)[~torch.eye(len(vectors), dtype=torch.bool)]
    return Taught(of, vectors, float(others.mean()) if len(others) else 1.0)


def nearest(patches: Tensor, others: Tensor) -> Tensor:
    """The cosine [p] of each patch [p, d] to the most similar of others [q, d]."""
    return (patches @ others.T).max(-1).values


def patches_found(patches: Tensor, weights: Tensor, image: Tensor) -> Tensor:
    """How much of the patches [n, p, d], by their weights [n, p], an image [q, d] has: the weighted mean of the best cosines."""
    found = nearest(patches.flatten(0, 1), image).view(weights.shape)
    return ((weights * found).sum(1) / weights.sum(1).clamp(min=1e-6)).mean()


def among_themselves(patches: Tensor, weights: Tensor) -> float:
    """The same for each training image and all others; of a single one, itself."""
    numbers = range(len(patches))
    if len(patches) < 2:
        return 1.0
    rest = [[j for j in numbers if j != i] for i in numbers]
    return float(torch.stack([patches_found(patches[rest[i]], weights[rest[i]], patches[i]) for i in numbers]).mean())


def aligned_cosines(a: Tensor, b: Tensor) -> Tensor:
    """The mean cosine [n, m] of patches in the same places of images [n, p, d] and [m, p, d]."""
    return torch.einsum("npd,mpd->nm", a, b) / a.shape[1]
