"""What tensors weigh and what operations cost, counted while a program runs: with fake tensors, without a card and in seconds."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

KINDS = ("weights", "gradients", "moments", "activations", "states", "buffers", "unsharded")
_aten = torch.ops.aten
_SDPA, _SDPA_BACKWARD = (
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
_ANY = "is_any"  # on a fake truth value: whether some row or number is an exception, which is False; every other one is True
_FREE = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided, _aten.detach, _aten.lift_fresh}
_LOOK_UPS = {_aten.embedding, _aten.index_select, _aten.gather, _aten.index}  # read of a table what they give


class Cost(NamedTuple):
    """What one operation does.

    flops: multiplications and additions. bytes: read and written. arithmetic: "bfloat16", "float32", or "" where nothing is multiplied.
    programs: how many multiprocessors it can keep busy at most; 0 where as many as there are.
    """

    flops: int
    bytes: int
    arithmetic: str
    programs: int = 0


class Ledger(TorchDispatchMode):
    """As a context, follows every storage from its making to its end, and every operation.

    Of fake tensors no number is known: all conditions hold, no exception is met (`any`), and numbers are 1.
    A storage is of the kind that `mark` gave it, "unsharded" where FSDP2 or a collective made or resized it, and else "activations".

    Attributes:
        paused: takes nothing in.
        peak: bytes held at once at most, since `forget_peak`. at_peak: of each kind then.
        costs: how often each `Cost` came up. sent: bytes that collectives moved, of each of them.
        operations: how many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.held: Counter[str] = Counter()
        self.total = self.peak = self.operations = 0
        self.at_peak: dict[str, int] = {}
        self.costs: Counter[Cost] = Counter()
        self.sent: Counter[str] = Counter()
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """The storages of these tensors are of this kind."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._follow(local.untyped_storage(), kind)

    def forget_peak(self) -> None:
        """Begin anew with what is held now, and count operations from 0."""
        self.peak, self.at_peak, self.operations = self.total, dict(self.held), 0
        self.costs.clear()
        self.sent.clear()

    def spend(self, cost: Cost) -> None:
        """Count an operation that is not torch's."""
        self.costs[cost] += 1

    def __enter__(self) -> Ledger:
        self._resize = resize = torch.UntypedStorage.resize_

        def followed(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self._follow(storage, "unsharded")
            return result

        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign, assignment]  # how FSDP2 takes and frees memory; no operation
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its local operations come here next
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1 if args[0].dtype != torch.bool else not getattr(args[0], _ANY, False)
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        if func is _aten.any.default:
            setattr(out, _ANY, True)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for result in results:
            self._follow(result.untyped_storage(), "unsharded" if func.namespace in ("fsdp", "c10d") else "activations", new=True)
        self.operations += 1
        if func.namespace == "c10d":
            self._communicate(func, given)
        elif not func.is_view and func.overloadpacket not in _FREE:
            self._count(func, args, kwargs or {}, given, results, out)
        return out

    def _follow(self, storage: Any, kind: str, new: bool = False) -> None:
        """Take a storage in, or, unless only `new` ones are meant, take over its kind and size."""
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None:
            if new:
                return
            self._change(known[2], -known[1])
        reference = weakref.ref(storage, lambda _: self._let_go(key)) if known is None else known[0]
        self._storages[key] = (reference, size, kind)
        self._change(kind, size)

    def _let_go(self, key: int) -> None:
        _, size, kind = self._storages.pop(key)
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        self.held[kind] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.held)

    def _communicate(self, func: Any, given: list[Tensor]) -> None:
        name = func.overloadpacket.__name__.strip("_")
        self.sent[name] += max((x.nbytes for x in given), default=0)
        if name.startswith("reduce_scatter"):
            self.mark(given[:1], "gradients")

    def _count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], results: list[Tensor], out: Any) -> None:
        packet = func.overloadpacket
        read = 0 if packet in _LOOK_UPS else sum(_bytes(x) for x in given)
        written = sum(_bytes(x) for x in results)
        flops = 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is _SDPA:
            flops = sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif packet is _SDPA_BACKWARD:
            flops = sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape)
        arithmetic = "" if not flops else "bfloat16" if given[-1].dtype == torch.bfloat16 else "float32"
        self.costs[Cost(int(flops), read + (2 * written if packet in _LOOK_UPS else written), arithmetic)] += 1


def _bytes(x: Tensor) -> int:
    """What a tensor holds; of an expanded one, what is there."""
    return min(x.nbytes, x.untyped_storage().nbytes())
