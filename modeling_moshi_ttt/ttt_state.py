"""What the TTT ops take, and the memory of a TTT layer between two calls.

Shape letters: B rows (streams), H heads, D head dimension, F hidden width of the MLP (4 D), b mini-batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors_moshi_ttt import MoshiTTTError
from .rows import Entry, check_entries, check_names, row_mask

WEIGHT_NAMES = ("W1", "b1", "W2", "b2")
TOKEN_NAMES = ("k", "v", "lr", "frames")


class TTTInputs(NamedTuple):
    """What an op takes beside its state; bodies that run whole mini-batches get tokens as `[B, N, b, ...]` in place of `[B, T, ...]`."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, T, H, D]
    v: Tensor  # [B, T, H, D]: target + k
    lr: Tensor  # [B, T, H]
    token_weight: Tensor  # [b]
    norm_weight: Tensor  # [H, D]
    norm_bias: Tensor  # [H, D]


@dataclass(frozen=True, eq=False)
class TTTState:
    """Fast weights, and the tokens of the mini-batch that is not full yet. It goes in and comes out by argument; nothing changes in place.

    The open mini-batch is kept as raw tokens: all its gradients are taken at the weights it started from, so taking them again when the
    mini-batch goes on gives the same numbers, and lets gradients flow across calls.

    Attributes:
        W1, b1: `[B, H, D, F]`, `[B, H, 1, F]` for the MLP; `[B, H, D, D]`, `[B, H, 1, D]` for the linear mixer. float32 (or float64).
        W2, b2: `[B, H, F, D]`, `[B, H, 1, D]`; None for the linear mixer.
        k, v: `[B, b, H, D]`, the open mini-batch's tokens, zeros in the slots still empty; b is 0 before the first call.
        lr: `[B, b, H]`, their step sizes, zeros in the slots still empty.
        frames: `[B]` int64, tokens that each row has consumed since its start.
    """

    W1: Tensor
    b1: Tensor
    W2: Tensor | None
    b2: Tensor | None
    k: Tensor
    v: Tensor
    lr: Tensor
    frames: Tensor
    # What decoding steps keep of the open mini-batch; made again from k, v and lr whenever it is missing.
    open_factors: Any = field(default=None, repr=False)
    # The number in `frames`, where all rows are known to have the same: asking a GPU for it would have the host wait for all work before.
    lockstep_frames: int | None = None

    @classmethod
    def initial(cls, W1: Tensor, b1: Tensor, W2: Tensor | None = None, b2: Tensor | None = None, *, batch_size: int) -> TTTState:
        """The state before the first token: every row at the learned weights `[H, ...]`, through which gradients flow back.

        Raises:
            ValueError: batch_size < 1, one of W2 and b2 without the other, or shapes that do not fit together.
        """
        if batch_size < 1:
            raise MoshiTTTError(f"batch_size is {batch_size}; it must be at least 1")
        if (W2 is None) != (b2 is None):
            raise MoshiTTTError("W2 and b2 come together (MLP) or not at all (linear)")
        heads, dim = _check_initial_shapes(W1, b1, W2, b2)
        weights = tuple(w.unsqueeze(0).expand(batch_size, *w.shape) for w in (W1, b1, W2, b2) if w is not None)
        none = W1.new_zeros(batch_size, 0, heads, dim)
        fresh = cls.of(weights, none, none, none[..., 0], torch.zeros(batch_size, dtype=torch.int64, device=W1.device))
        return replace(fresh, lockstep_frames=0)

    @classmethod
    def of(cls, weights: tuple[Tensor, ...], k: Tensor, v: Tensor, lr: Tensor, frames: Tensor, open_factors: Any = None) -> TTTState:
        """From the weights as `weights` gives them."""
        W2, b2 = weights[2:] if len(weights) == 4 else (None, None)
        return cls(weights[0], weights[1], W2, b2, k, v, lr, frames, open_factors)

    @property
    def batch_size(self) -> int:
        return self.W1.shape[0]

    @property
    def mini_batch_size(self) -> int:
        """Tokens a mini-batch; 0 before the first call."""
        return self.k.shape[1]

    @property
    def mixer(self) -> str:
        return "linear" if self.W2 is None else "mlp"

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """(W1, b1) or (W1, b1, W2, b2)."""
        if self.W2 is None or self.b2 is None:
            return self.W1, self.b1
        return self.W1, self.b1, self.W2, self.b2

    @property
    def position(self) -> Tensor:
        """`[B]` int64: how many tokens of its open mini-batch each row has seen."""
        return self.frames % max(self.mini_batch_size, 1)

    @property
    def between_mini_batches(self) -> bool:
        """Whether no row has an open mini-batch; read from the device only where the host does not know."""
        if self.mini_batch_size == 0:
            return True
        if self.lockstep_frames is not None:
            return self.lockstep_frames % self.mini_batch_size == 0
        return not bool(self.position.any())

    def select(self, rows: Sequence[int] | Tensor) -> TTTState:
        """The rows at these indices, in this order (a row may occur more than once)."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.W1.device)
        return self.map(lambda x: x.index_select(0, index))

    def reset(self, rows: Sequence[int] | Tensor, initial: TTTState) -> TTTState:
        """These rows as in `initial` (of batch size 1 or B, before its first call), the others as they are.

        `rows` holds indices, or is a bool tensor `[B]`. Gradients reach the initial weights through the rows that were reset.

        Raises:
            ValueError: another mixer or batch size, a used `initial`, or a row that does not exist.
        """
        if initial.mixer != self.mixer:
            raise MoshiTTTError(f"a state of mixer '{self.mixer}' cannot be reset to one of mixer '{initial.mixer}'")
        if initial.batch_size not in (1, self.batch_size):
            raise MoshiTTTError(
                f"initial has {initial.batch_size} rows; the state has {self.batch_size}, so it needs 1 or {self.batch_size}"
            )
        if initial.mini_batch_size:
            raise MoshiTTTError("initial has already consumed frames; make it with TTTState.initial(...)")
        chosen = row_mask(rows, self.batch_size, self.W1.device)

        def blend(x: Tensor, fresh: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *(1,) * (x.dim() - 1)), fresh.to(x), x)

        weights = tuple(blend(w, fresh) for w, fresh in zip(self.weights, initial.weights))
        return TTTState.of(weights, *(blend(x, torch.zeros_like(x)) for x in (self.k, self.v, self.lr, self.frames)))

    def with_slots(self, b: int) -> TTTState:
        """A state before its first token with empty slots for a mini-batch of b."""
        rows, _, heads, dim = self.k.shape
        empty = self.W1.new_zeros(rows, b, heads, dim)
        return replace(self, k=empty, v=empty, lr=empty[..., 0])

    def filled(self, b: int) -> TTTState:
        """This state with slots for a mini-batch of b, tensors of its own, and rows that are not taken to be in lockstep."""
        slotted = self if self.mini_batch_size else self.with_slots(b)
        return replace(slotted.map(lambda x: x.contiguous().clone()), lockstep_frames=None)

    def detach(self) -> TTTState:
        """The same numbers, cut from the graph that made them."""
        return self.map(Tensor.detach)

    def clone(self) -> TTTState:
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str) -> TTTState:
        return self.map(lambda x: x.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to save and restore it, by name; `from_tensors` is the way back."""
        return dict(zip(WEIGHT_NAMES, self.weights)) | {name: getattr(self, name) for name in TOKEN_NAMES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TTTState:
        """The state that gave these `tensors()`.

        Raises:
            ValueError: a tensor is missing, unknown, or of a shape or dtype that does not fit the others.
        """
        names = WEIGHT_NAMES if "W2" in tensors or "b2" in tensors else WEIGHT_NAMES[:2]
        check_names("TTT state", tensors, (*names, *TOKEN_NAMES))
        W1, k = tensors["W1"], tensors["k"]
        if W1.dim() != 4 or k.dim() != 4:
            raise MoshiTTTError(f"W1 {tuple(W1.shape)} and k {tuple(k.shape)} of the saved TTT state must have 4 dimensions")
        rows, heads, dim, width = W1.shape
        check_entries("TTT state", tensors, saved_entries(rows, heads, dim, width if "W2" in names else None, k.shape[1]))
        frames = tensors["frames"].tolist()
        state = cls.of(tuple(tensors[name] for name in names), *(tensors[name] for name in TOKEN_NAMES))
        return replace(state, lockstep_frames=frames[0] if len(set(frames)) == 1 else None)

    def map(self, change: Callable[[Tensor], Tensor]) -> TTTState:
        """The state with every tensor changed; the decoding factors are dropped, to be made again from the tokens."""
        changed = TTTState.of(tuple(map(change, self.weights)), *(change(x) for x in (self.k, self.v, self.lr, self.frames)))
        return replace(changed, lockstep_frames=self.lockstep_frames)


def _check_initial_shapes(W1: Tensor, b1: Tensor, W2: Tensor | None = None, b2: Tensor | None = None) -> tuple[int, int]:
    if W1.dim() != 3:
        raise MoshiTTTError(f"W1 has shape {tuple(W1.shape)}; it must be [H, D, F] (MLP) or [H, D, D] (linear)")
    heads, dim, width = W1.shape
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {"b1": (b1, (heads, 1, width))}
    if W2 is not None and b2 is not None:
        wanted |= {"W2": (W2, (heads, width, dim)), "b2": (b2, (heads, 1, dim))}
    elif width != dim:
        raise MoshiTTTError(f"W1 has shape {tuple(W1.shape)}; without W2 (linear mixer) its last two sizes must be equal")
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise MoshiTTTError(f"{name} has shape {tuple(tensor.shape)}; with W1 {tuple(W1.shape)} it must be {shape}")
    return heads, dim


def saved_entries(rows: int, heads: int, dim: int, width: int | None, slots: int) -> dict[str, Entry]:
    """What `TTTState.tensors()` gives by name; `width` is F of the MLP, None for the linear mixer."""
    inner = dim if width is None else width
    shapes: dict[str, tuple[int, ...]] = {"W1": (rows, heads, dim, inner), "b1": (rows, heads, 1, inner)}
    if width is not None:
        shapes |= {"W2": (rows, heads, width, dim), "b2": (rows, heads, 1, dim)}
    shapes |= {"k": (rows, slots, heads, dim), "v": (rows, slots, heads, dim), "lr": (rows, slots, heads)}
    return {name: (shape, torch.float32) for name, shape in shapes.items()} | {"frames": ((rows,), torch.int64)}
