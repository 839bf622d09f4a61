"""Words that stand for vectors of their own (textual inversions), as text encoders read them in prompts: without the encoder's
tokens for them, in any case, and as whole words only.

Among a prompt's tokens they are numbers below zero: token -1 - i is the i-th of all their vectors.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Words = Mapping[str, "Tensor"]  # word => its vectors [tokens, width]


def words_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Finds whole words, a group for each; the longest that fits counts.

    >>> [match[0] for match in words_pattern(["my", "my style"]).finditer("My style, army, my cat")]
    ['My style', 'my']
    """
    groups = ((number, word) for number, word in enumerate(words))
    longest_first = sorted(groups, key=lambda pair: -len(pair[1]))
    return re.compile("|".join(rf"(?P<w{i}>(?<!\w){re.escape(word)}(?!\w))" for i, word in longest_first), re.IGNORECASE)


def tokenize(text: str, words: Words, plain: Callable[[str], list[int]]) -> list[int]:
    """A text's tokens: `plain` tells those of what stands between the words."""
    if not words:
        return plain(text)
    tokens, end, firsts = list[int](), 0, [*accumulate(map(len, words.values()), initial=0)]
    for match in words_pattern(words).finditer(text):
        number = int(str(match.lastgroup)[1:])
        tokens += plain(text[end : match.start()].strip())
        tokens += [-1 - i for i in range(firsts[number], firsts[number + 1])]
        end = match.end()
    return tokens + plain(text[end:].strip() if end else text)


def table_of(model: Any) -> Any:
    """The module in which a text model looks up its tokens; T5's goes by two names, and only the encoder's is called."""
    return getattr(getattr(model, "encoder", None), "embed_tokens", None) or model.get_input_embeddings()


@contextlib.contextmanager
def speaking(model: Any, ids: Tensor, words: Words) -> Iterator[Tensor]:
    """Tokens [b, n] that a text model has, in the place of those below zero; inside, it embeds these as the words' vectors."""
    if not words:
        yield ids
        return
    import torch

    own = ids < 0
    table = torch.cat([vectors.to(ids.device) for vectors in words.values()])[-1 - ids[own]]
    handle = table_of(model).register_forward_hook(
        lambda module, inputs, output: output.masked_scatter(own[..., None], table.to(output))
    )
    try:
        yield ids.clamp(min=0)
    finally:
        handle.remove()


@contextlib.contextmanager
def everywhere(model: Any, words: Words) -> Iterator[None]:
    """Inside, words take part in whatever a text model reads: for shapes, where nothing can be known of tokens."""
    rows = [vectors[:1] for vectors in words.values()]
    handles = [table_of(model).register_forward_hook(lambda module, inputs, output, row=row: output + row.to(output))
               for row in rows]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spell(model: Any, tokens: Sequence[int], count: int) -> Tensor:
    """Tokens as so many vectors [count, width], from a text model's table: more vectors than tokens repeat them one after the
    other, as AUTOMATIC1111 begins a textual inversion, and fewer are the means of neighbours.
    """
    table: Tensor = table_of(model).weight.detach()
    rows, many = table[list(tokens)].float(), len(tokens)
    ends = [(i * many // count, max((i + 1) * many // count, i * many // count + 1)) for i in range(count)]
    import torch

    return torch.stack([rows[first:last].mean(0) for first, last in ends])
