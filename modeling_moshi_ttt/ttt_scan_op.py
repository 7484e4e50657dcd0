"""The scan as one operator for graphs: what is compiled or exported keeps it whole, with any number of mini-batches. Without gradients."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from .ttt_scan import scan_mini_batches
from .ttt_state import TTTInputs

Weights = tuple[Tensor, ...]

# A copy of this file loaded from the Hub beside the installed package must not take over the other's operator.
_NAMESPACE = "moshi_ttt" if __name__ == "modeling_moshi_ttt.ttt_scan_op" else f"moshi_ttt_{zlib.crc32(__name__.encode()):08x}"


@torch.library.custom_op(f"{_NAMESPACE}::scan", mutates_args=())
def _scan(tensors: list[Tensor], complete: Tensor, group_size: int, eps: float, inner_norm: str) -> list[Tensor]:
    inputs, weights = TTTInputs(*tensors[:7]), tuple(tensors[7:])
    out, after = scan_mini_batches(inputs, weights, complete, group_size=group_size, eps=eps, inner_norm=inner_norm)
    return [out, *after]


@_scan.register_fake
def _(tensors: list[Tensor], complete: Tensor, group_size: int, eps: float, inner_norm: str) -> list[Tensor]:
    weights = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in tensors[7:]]
    return [torch.empty_like(tensors[0], dtype=weights[0].dtype, memory_format=torch.contiguous_format), *weights]


def scan_as_one(
    inputs: TTTInputs, weights: Weights, complete: Tensor, *, group_size: int, eps: float, inner_norm: str
) -> tuple[Tensor, Weights]:
    """As `scan_mini_batches`, without gradients."""
    out, *after = _scan([*inputs, *weights], complete, group_size, eps, inner_norm)
    return out, tuple(after)
