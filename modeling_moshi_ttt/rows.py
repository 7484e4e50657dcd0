"""What the codec's and the model's streams share: rows by index or by mask, the check of saved entries, and how a live call runs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors_moshi_ttt import MoshiTTTError

# What a saved entry has to be: its shape and its dtype.
Entry = tuple[tuple[int, ...], torch.dtype]
F = TypeVar("F", bound=Callable[..., Any])


def without_gradients(function: F) -> F:
    """Run without gradients, and outside of inference mode: what is kept there could not be changed in place later on."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


class InUse:
    """Which thread is in a call of a stream; a copy of the stream has its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: Any) -> InUse:
        return InUse()


def one_at_a_time(method: F) -> F:
    """Refuse a call while another thread is in one of the object's calls: what a stream remembers has one order.

    The object has an [`InUse`] as `in_use`.

    Raises:
        ValueError: another thread is in a call.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.in_use.lock.acquire(blocking=False):
            raise MoshiTTTError("this stream is in a call of another thread; give each conversation a stream or a lock of its own.")
        try:
            return method(self, *args, **kwargs)
        finally:
            self.in_use.lock.release()

    return run  # type: ignore[return-value]


def check_names(what: str, tensors: Iterable[str], wanted: Iterable[str]) -> None:
    """ValueError unless the saved `what` has exactly these entries."""
    given, wanted = set(tensors), list(wanted)
    if missing := [name for name in wanted if name not in given]:
        raise MoshiTTTError(f"the saved {what} lacks {_some(missing)}; load all of a state that the same model saved.")
    if unknown := sorted(given - set(wanted)):
        raise MoshiTTTError(f"the saved {what} has unknown entries {_some(unknown)}; load a state that the same model saved.")


def check_entries(what: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Entry]) -> None:
    """ValueError unless these entries of the saved `what` have these shapes and dtypes; floats may be of another width."""
    for name, (shape, dtype) in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != shape:
            raise MoshiTTTError(f"{name} of the saved {what} has shape {tuple(found.shape)} where {shape} is needed; make it alike.")
        if found.dtype != dtype and not (found.is_floating_point() and dtype.is_floating_point):
            raise MoshiTTTError(
                f"{name} of the saved {what} has dtype {found.dtype} where {dtype} is needed; save what `state_dict()` gives."
            )


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def row_mask(rows: Sequence[int] | Tensor, batch_size: int, device: torch.device) -> Tensor:
    """`[B]` bool from indices (none of them: no row) or from such a mask.

    Raises:
        ValueError: a mask of another length, or a row that does not exist; rows are not counted from the end.
    """
    rows = torch.as_tensor(rows, device=device)
    if rows.dtype == torch.bool:
        if rows.shape != (batch_size,):
            raise MoshiTTTError(
                f"rows is a mask of shape {tuple(rows.shape)}; the state has {batch_size} rows, so it needs as many entries"
            )
        return rows
    if rows.is_floating_point() and rows.numel():  # an empty list comes as float
        raise MoshiTTTError(f"rows {rows.tolist()} are {rows.dtype}; they must be integers, or a bool mask [{batch_size}]")
    rows = rows.to(torch.int64).reshape(-1)
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < batch_size):
        raise MoshiTTTError(f"rows {rows.tolist()} are out of range; the state has rows 0 to {batch_size - 1}")
    return torch.zeros(batch_size, dtype=torch.bool, device=device).index_fill(0, rows, True)


def active_rows(active: Any, batch_size: int, device: torch.device) -> Tensor:
    """`[B]` bool from what a caller gives as `active`.

    Raises:
        ValueError: it is not bool, or of another length.
    """
    mask = torch.as_tensor(active)
    if mask.dtype != torch.bool or tuple(mask.shape) != (batch_size,):
        raise MoshiTTTError(f"`active` is {mask.dtype} {tuple(mask.shape)}; it must be bool ({batch_size},), one a row.")
    return mask.to(device)
