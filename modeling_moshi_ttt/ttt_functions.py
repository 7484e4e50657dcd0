"""LayerNorm and GELU with their derivatives, in as few passes over memory as there can be: what the scan and the decoding step share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def normalize(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """z `[..., D]` at mean 0 and variance 1, and its mean and inverse standard deviation `[..., 1]`."""
    normed: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(z, z.shape[-1:], None, None, eps)
    return normed


def normalize_backward(d: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """dz: d without its mean and its part along the normalized z, times rstd."""
    dz: Tensor = torch.ops.aten.native_layer_norm_backward.default(d, z, z.shape[-1:], mean, rstd, None, None, [True, False, False])[0]
    return dz


def square(x: Tensor) -> Tensor:
    """||x||^2 of every token, `[..., 1]`."""
    return x.square().sum(-1, keepdim=True)


# The tanh form of GELU is z gate with gate = (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3). Everything is taken
# from
# the sigmoid, which costs a tenth of tanh, and from r, a third of (2 u)', and z r: 2 u = z (r + 2 S / 3).
_SCALE, _CUBE = 1.5957691216057308, 0.044715  # S and c in r = S (1 / 3 + c z^2)


class Gelu(NamedTuple):
    rise: Tensor  # r
    lift: Tensor  # z r
    gate: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Gelu:
        rise = torch.rsub(z * z, _SCALE / 3, alpha=-_SCALE * _CUBE)
        lift = z * rise
        return cls(rise, lift, torch.add(lift, z, alpha=2 * _SCALE / 3).sigmoid_())

    def slope(self) -> Tensor:
        """First derivative: gate + z (2 u)' gate (1 - gate)."""
        return torch.add(self.gate, torch.ops.aten.sigmoid_backward(self.lift, self.gate), alpha=3)

    def curvature(self) -> Tensor:
        """Second derivative: gate (1 - gate) (2 (2 u)' + z (2 u)'' + z (2 u)'^2 (1 - 2 gate)), where z (2 u)'' = 6 r - 2 S."""
        inner = torch.rsub(self.gate, 9, alpha=18).mul_(self.lift).add_(12).mul_(self.rise).sub_(2 * _SCALE)
        curved: Tensor = torch.ops.aten.sigmoid_backward(inner, self.gate)
        return curved

    def rows(self, count: int) -> Gelu:
        """Of the first so many rows."""
        return Gelu(*(x[:, :count] for x in self))


def refuse_second_derivative(backend: str) -> None:
    """For the backward of an autograd function. torch's `once_differentiable` lets some through, with wrong numbers."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"backend '{backend}' has no second derivative (create_graph=True); use backend 'reference'")
