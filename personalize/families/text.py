"""Text encoders: prompts => hidden states, with prompts of any length and weights as UIs read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .emphasis import pieces
from .words import Words, everywhere, speaking, spell, tokenize

BACKTRACK = 20  # tokens that a window may leave unused to end behind a comma, as in AUTOMATIC1111

Token = tuple[int, float]
Chunks = list[list[Token]]  # of a prompt, one for each window


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A CLIP text model, its tokenizer, and which of its layers the denoiser listens to."""

    part: str  # "text_encoder" or "text_encoder_2"
    tokenizer: Any
    model: Any
    layer: int = 1  # counted from the last; 2 is what UIs call clip skip 2
    normed: bool = True  # SDXL takes a layer as it is, SD 1 and 2 through the final norm
    words: Words = field(default_factory=dict)  # that stand for vectors, and not for the tokenizer's tokens
    emphasis: float = 1.0  # of these words, in prompts whose weights are read: (word:emphasis)

    @property
    def window(self) -> int:
        """Tokens that the model reads at once, 77 with both ends."""
        return int(self.model.config.max_position_embeddings)

    def windows(self, prompt: str, weighted: bool = False, shuffled: bool = False) -> int:
        """How many windows a prompt fills, or may fill once its tags are shuffled and each window ends behind a comma."""
        chunks = self.chunks(prompt, weighted)
        return -(-sum(map(len, chunks)) // (self.window - 2 - BACKTRACK)) if shuffled and len(chunks) > 1 else len(chunks)

    def embed(self, prompts: Sequence[Chunks], windows: int) -> tuple[Tensor, Tensor | None]:
        """Prompts in chunks => hidden states [b, windows * 77, d]; of a model that projects, the first window's end too [b, p].

        A weight multiplies its tokens' states, and the window's mean is kept, as in AUTOMATIC1111 (there: that of the batch).
        """
        padded = [chunks + [[]] * (windows - len(chunks)) for chunks in prompts]
        rows = [self._frame(chunk) for prompt in padded for chunk in prompt]
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[token for token, _ in row] for row in rows], device=device)
        last = self.layer == 1 and self.normed
        with speaking(self.model, ids, self.words) as known:
            output = self.model(known, output_hidden_states=not last)
        states = output.last_hidden_state if last else output.hidden_states[-self.layer]
        if self.normed and not last:
            states = self._final_norm(states)
        if any(weight != 1 for row in rows for _, weight in row):
            weights = torch.tensor([[weight for _, weight in row] for row in rows], device=device, dtype=states.dtype)
            weighed = states * weights[..., None]
            mean, kept = weighed.mean(dim=(1, 2), keepdim=True), states.mean(dim=(1, 2), keepdim=True)
            states = weighed * torch.where(mean == 0, 1, kept / mean)
        projected = getattr(output, "text_embeds", None)
        pooled = None if projected is None else projected.reshape(len(prompts), windows, -1)[:, 0]
        return states.reshape(len(prompts), -1, states.shape[-1]), pooled

    def vectors_of(self, text: str, count: int) -> Tensor:
        """So many vectors [count, width] that say what a text says, as far as so many can: see `spell`."""
        return spell(self.model, self._ids(text), count)

    def blank(self, rows: int, windows: int, dtype: torch.dtype, run: bool) -> tuple[Tensor, Tensor | None]:
        """The shapes of what so many prompts would give, in zeros; what the model itself gives for zeros, if it is to `run`."""
        config = self.model.config
        pooled = torch.zeros(rows, config.projection_dim, dtype=dtype) if hasattr(self.model, "text_projection") else None
        if not run:
            return torch.zeros(rows, self.window * windows, config.hidden_size, dtype=dtype), pooled
        ids = torch.zeros(rows * windows, self.window, dtype=torch.long)
        with everywhere(self.model, self.words):
            states = self.model(ids, output_hidden_states=True).hidden_states[-1]
        return states.reshape(rows, self.window * windows, -1), pooled

    def _final_norm(self, states: Tensor) -> Tensor:
        model = getattr(self.model, "text_model", self.model)  # CLIPTextModel lost its inner one in transformers 5.6
        normed: Tensor = model.final_layer_norm(states)
        return normed

    def chunks(self, prompt: str, weighted: bool) -> Chunks:
        """A prompt's tokens with their weights, window by window, without the windows' ends; at least one window."""
        tokens: list[list[Token]] = [[]]
        for text, weight in pieces(prompt) if weighted else [(prompt, 1.0)]:
            if weight is None:
                tokens.append([])
            else:
                own = weight * self.emphasis if weighted else weight
                tokens[-1] += [(token, own if token < 0 else weight) for token in tokenize(text, self.words, self._ids)]
        return [chunk for run in tokens for chunk in self._split(run)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _split(self, run: list[Token]) -> list[list[Token]]:
        """Tokens in windows; where one is full, it ends behind a comma if there is one near its end."""
        room, comma = self.window - 2, self.tokenizer.convert_tokens_to_ids(",</w>")
        chunks: list[list[Token]] = []
        while len(run) > room:
            near = [i for i in range(room - BACKTRACK, room) if i > 0 and run[i][0] == comma]
            end = near[-1] + 1 if near else room
            chunks.append(run[:end])
            run = run[end:]
        return [*chunks, run] if run or not chunks else chunks

    def _frame(self, chunk: list[Token]) -> list[Token]:
        """A window: beginning, tokens, end, and padding."""
        one = self.tokenizer
        row = [(one.bos_token_id, 1.0), *chunk, (one.eos_token_id, 1.0)]
        return row + [(one.pad_token_id, 1.0)] * (self.window - len(row))
