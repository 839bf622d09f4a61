"""Settings that differ by layer, as people type them: `up_blocks=1,down_blocks=0.3` and `1.0:up_blocks,mid; 0.6:down_blocks`."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RecipeError

GRADUAL = "gradual"


def read_scales(texts: Sequence[str]) -> list[tuple[str, float]]:
    """(pattern, scale) pairs of `PATTERN=NUMBER`. Raises RecipeError for what is none."""
    return [_scale(text) for text in texts]


def _scale(text: str) -> tuple[str, float]:
    pattern, _, number = text.rpartition("=")
    scale = _number(number)
    if not pattern.strip() or scale is None or not 0 < scale <= 1000:
        raise RecipeError(
            f"--lr-scale takes PATTERN=NUMBER above 0, not {text!r}", "up_blocks=1,down_blocks=0.3; --freeze leaves layers out"
        )
    return pattern.strip(), scale


def read_thaws(text: str) -> list[tuple[float, list[str]]]:
    """(share of the steps, the last of them, in which they learn; patterns) of an --unfreeze. Raises RecipeError."""
    if text in ("", GRADUAL):
        return []
    return [_thaw(piece) for piece in text.split(";") if piece.strip()]


def _thaw(text: str) -> tuple[float, list[str]]:
    share, _, names = text.partition(":")
    number, patterns = _number(share), [name.strip() for name in names.split(",") if name.strip()]
    if number is None or not 0 < number <= 1 or not patterns:
        raise RecipeError(
            f"--unfreeze takes SHARE:LAYERS, with a share of the steps above 0 and up to 1, not {text.strip()!r}",
            "write gradual, or '1.0:up_blocks,mid; 0.6:down_blocks'",
        )
    return number, patterns


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
