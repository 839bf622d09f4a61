"""OFT (Qiu et al. 2023, https://arxiv.org/abs/2306.07280) and BOFT (Liu et al. 2023, https://arxiv.org/abs/2311.06243).

dW = R W - W, as LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) writes and applies them. R is a rotation of blocks of rows,
made from `oft_blocks` [blocks, size, size]; of butterflies [stages, blocks, size, size]. `rescale` multiplies each row.
alpha * out limits how far R turns; 0 or none is no limit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...errors import AdapterError
from ...families.family import Shape
from .kind import ALPHA, Kind, MisfitError, Shapes, Size, check, largest_divisor

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .kind import Tensors


def shape(shapes: Shapes) -> Shape:
    """(out, -1): the blocks tell how many rows there are, and nothing of what stands in them."""
    *stages, blocks, size, other = shapes["oft_blocks"]
    if size != other:
        raise MisfitError(f"oft_blocks of shape {list(shapes['oft_blocks'])} are not square")
    check(len(stages) <= 1 and 0 not in shapes["oft_blocks"], shapes, "oft_blocks")
    for count in stages:  # stage i swaps halves over 2^i blocks
        check(size % 2 == 0 and count <= blocks.bit_length() and blocks % 2 ** (count - 1) == 0, shapes, "oft_blocks")
    check(math.prod(shapes.get("rescale", (blocks * size,))) == blocks * size, shapes, "oft_blocks", "rescale")
    return (blocks * size, -1)


def rank(shapes: Shapes) -> int:
    """The size of a block."""
    return shapes["oft_blocks"][-1]


def delta(tensors: Tensors, weight: Tensor | None, alpha: float | None) -> Tensor:
    """R W - W: blocks turn groups of rows; butterflies turn them in stages, stage i over 2^i blocks. In fp64 inside."""
    assert weight is not None
    blocks = tensors["oft_blocks"]
    if not weight.shape[0] == blocks.shape[-3] * blocks.shape[-1]:
        raise AdapterError(f"OFT blocks {list(blocks.shape)} do not fit a weight of {list(weight.shape)}")
    turns, flat = rotations(blocks, (alpha or 0.0) * len(weight)), weight.flatten(1).double()
    turned = _blocks(turns, flat) if turns.ndim == 3 else _butterflies(turns, flat)
    if "rescale" in tensors:
        turned = turned * tensors["rescale"].flatten()[:, None]
    return (turned - flat).to(weight.dtype).reshape(weight.shape)


def rotations(blocks: Tensor, limit: float) -> Tensor:
    """Cayley: R = (1 + Q)(1 - Q)^-1 with Q = B - B^T, whose norm over all blocks is held under `limit` (0: free). In fp64.

    Raises AdapterError where no R can be computed.
    """
    import torch

    q = (blocks - blocks.transpose(-1, -2)).double()
    size = torch.linalg.vector_norm(q) + 1e-8
    q = q * (limit / size).clamp(max=1.0) if limit > 0 else q
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    try:
        return torch.linalg.solve(eye - q, eye + q, left=False)
    except torch.linalg.LinAlgError:  # entries so large that 1 is lost beside them
        raise AdapterError(f"OFT blocks {list(blocks.shape)} turn by nothing that can be computed") from None


def _blocks(turns: Tensor, flat: Tensor) -> Tensor:
    import torch

    return torch.einsum("knm,knc->kmc", turns, flat.unflatten(0, turns.shape[:2])).flatten(0, 1)


def _butterflies(turns: Tensor, flat: Tensor) -> Tensor:
    import torch

    for stage, blocks in enumerate(turns):
        pairs = (-1, 2, 2**stage * turns.shape[-1] // 2)
        mixed = flat.unflatten(0, pairs).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, turns.shape[-1]))
        mixed = torch.einsum("bij,bjc->bic", blocks, mixed).flatten(0, 1)
        flat = mixed.unflatten(0, (-1, pairs[2], 2)).transpose(1, 2).flatten(0, 2)
    return flat


def start(weight: Tensor, size: Size, generator: Generator) -> dict[str, Tensor]:
    """dW = 0: blocks of zeros, the largest that divide the rows of W and hold as many as wanted; of two rows at least."""
    import torch

    rows = len(weight)
    block = largest_divisor(rows, size.block or size.rank)
    if block == 1:  # which turns nothing
        block = next(divisor for divisor in range(2, rows + 1) if rows % divisor == 0) if rows > 1 else 1
    return {"oft_blocks": torch.zeros(rows // block, block, block)}


OFT = Kind(
    "OFT",
    ("oft_blocks",),
    ("rescale", ALPHA),
    shape,
    rank,
    delta,
    needs_base=True,
    alpha_scales=False,
    unset_alpha=0.0,  # no limit either way; ComfyUI wants it said
    start=start,
    settings=("oft_block",),
)
