"""GPUs by their makers' data sheets, and the least time that counted work takes on them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from .ledger import Cost


class Card(NamedTuple):
    """One GPU.

    memory: bytes. bandwidth: bytes a second of its memory. bfloat16, tf32, float32: operations a second (dense, float32 sums).
    link: bytes a second to another GPU of the node, each way. host_link: to the host's memory. multiprocessors: how many. shared: bytes of shared memory that one program
    may use, which decides whether the TTT kernels fit.
    """

    name: str
    memory: float
    bandwidth: float
    bfloat16: float
    tf32: float
    float32: float
    link: float
    host_link: float
    multiprocessors: int
    shared: int


GB = 1e9
# NVIDIA's data sheets of A100 SXM 80 GB, H100 SXM, H200 SXM; the Ada architecture's white paper. Shared memory: CUDA's compute capabilities.
CARDS = {
    card.name: card
    for card in (
        Card("A100", 80 * GB, 2039 * GB, 312e12, 156e12, 19.5e12, 300 * GB, 32 * GB, 108, 163 * 1024),
        Card("H100", 80 * GB, 3350 * GB, 989e12, 495e12, 67e12, 450 * GB, 64 * GB, 132, 227 * 1024),
        Card("H200", 141 * GB, 4800 * GB, 989e12, 495e12, 67e12, 450 * GB, 64 * GB, 132, 227 * 1024),
        Card("RTX 4090", 24 * GB, 1008 * GB, 165e12, 82.6e12, 82.6e12, 32 * GB, 32 * GB, 128, 99 * 1024),
    )
}
CONTEXT = 1.5 * GB  # CUDA's context, cuBLAS's and NCCL's workspaces
FRAGMENTS = 0.04  # of the peak: what the allocator's blocks waste with expandable segments


def seconds(costs: Counter[Cost], card: Card, tf32: bool) -> float:
    """The roofline: each operation takes as long as its arithmetic or its bytes, whichever is longer, one after the other.

    Args:
        tf32: float32 products run on the tensor cores.
    """
    speeds = {"": float("inf"), "bfloat16": card.bfloat16, "float32": card.tf32 if tf32 else card.float32}
    total = 0.0
    for cost, count in costs.items():
        busy = min(cost.programs / card.multiprocessors, 1) if cost.programs else 1
        total += count * max(cost.flops / (speeds[cost.arithmetic] * busy), cost.bytes / card.bandwidth)
    return total


def needed(peak: float) -> float:
    """Bytes that a card must have for this peak of tensors."""
    return peak * (1 + FRAGMENTS) + CONTEXT
