"""One recording as codes, in the order in which its frames are."""

from typing import NamedTuple

from torch import Tensor


class CodeSequence(NamedTuple):
    """One recording as aligned codes. A stream that is None is absent: its embedding is exactly zero, and it is not scored."""

    moshi: Tensor  # [K, T] int64
    user: Tensor | None = None  # [U, T]
    text: Tensor | None = None  # [T]
