"""Which words a run learns, what their vectors begin as, and what is wrong about them before anything expensive is done."""

from __future__ import annotations

from ..data.captions import missing_trigger
from ..data.dataset import Dataset
from ..errors import RecipeError
from ..families.notation import variants
from ..models.model import Base
from ..recipe.adapter import EMBEDDING
from ..recipe.fields import Recipe
from ..tuning import textual_inversion
from ..tuning.textual_inversion import STYLE, Vectors


def begin_words(recipe: Recipe, base: Base, dataset: Dataset) -> Vectors:
    """The vectors of each trigger, if the recipe learns any. Raises RecipeError for triggers that cannot be learned so."""
    spec = recipe.adapter
    if not spec.vectors:
        return {}
    if spec.kind == EMBEDDING:
        check_name(recipe, dataset)
    captions = [way for example in dataset.examples for way in variants(example.caption)]
    for trigger in dataset.triggers:
        if len(missing_trigger(trigger, captions)) == len(captions):
            hint = "--caption-prefix '{trigger}, ' writes it before all"
            raise RecipeError(f"no caption holds {trigger!r}, whose vectors are to be learned", hint)
    begun = {one.trigger: spec.init_word or one.class_name or STYLE for one in dataset.concepts}
    return textual_inversion.begin_words(base, begun, spec.vectors)


def check_name(recipe: Recipe, dataset: Dataset) -> None:
    """Raise RecipeError where an embedding's file cannot say what its word is: programs know that by the file's name."""
    if len(dataset.triggers) > 1:
        what = f"--kind embedding learns one word, and the folder has {len(dataset.triggers)}: {', '.join(dataset.triggers)}"
        raise RecipeError(what, "personalize batch learns each by itself; --kind lora --vectors 1 learns all in one file")
    (trigger,), name = dataset.triggers, recipe.name
    if str(name).casefold() != trigger.casefold():
        what = f"programs know an embedding's word by its file's name, which is {name}, and the trigger is {trigger!r}"
        raise RecipeError(what, f"--trigger {name}, and no other --name")
