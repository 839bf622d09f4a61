"""A layer with updates as they are: of its weight, of its bias, or of both; of norms, linear layers and convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import AdapterLayer

BIAS = ".bias"  # behind a module's path: the update of its bias
NORMS = (nn.LayerNorm, nn.GroupNorm)


def weight_role(layer: nn.Module) -> str:
    """What files call the update of a layer's weight."""
    return "w_norm" if isinstance(layer, NORMS) else "diff"


def bias_role(layer: nn.Module) -> str:
    """What files call the update of a layer's bias."""
    return "b_norm" if isinstance(layer, NORMS) else "diff_b"


class DenseLayer(AdapterLayer):
    """A frozen layer, and what is added to its weight and to its bias."""

    def _forward_one(self, x: Tensor, number: int) -> Tensor:
        layer, several = self.base_layer, len(self.strengths) > 1
        own = {role: factor.weight[number] if several else factor.weight for role, factor in self.factors.items()}
        if (role := weight_role(layer)) in own:  # by the row of its file
            own[role] = self.kind.delta(own, None, None)
        weight, bias = (
            None if one is None else self.strengths[number] * one for one in (own.get(role), own.get(bias_role(layer)))
        )
        if isinstance(layer, NORMS):
            return self._norm(layer, x, weight, bias)
        if weight is None:
            assert bias is not None
            return layer(x) + bias.to(x.dtype).reshape(-1, *[1] * (2 * isinstance(layer, nn.Conv2d)))
        both = total(self.bias, bias)
        whole = (self.weight.float() + weight).to(x.dtype)  # summed in fp32, as a checkpoint of the sum is made
        return self._compute(x, whole, None if both is None else both.to(x.dtype))

    def _norm(self, layer: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if x.dtype == torch.float32:
            return normalize(layer, x, total(self.weight, weight), total(self.bias, bias))
        change = total(torch.zeros_like(self.weight, dtype=torch.float32), weight)  # in low precision W + dW would be W
        assert change is not None
        return layer(x) + normalize(layer, x, change.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _forward_sum(self, x: Tensor, number: int) -> Tensor:
        return self._forward_one(x, number)


def total(own: Tensor | None, change: Tensor | None) -> Tensor | None:
    """What a layer has and what is added to it, where there is any."""
    return own if change is None else change if own is None else own + change


def normalize(layer: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A norm of the kind of `layer` with these values."""
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    assert isinstance(layer, nn.LayerNorm)
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
