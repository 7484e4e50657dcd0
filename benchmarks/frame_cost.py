"""What a live frame costs whatever the machine: operations, reads by the host, and the bytes that each caller holds at 7B.

Operations and reads are counted at 32 layers with 9 TTT layers, as many as in the 7B, of small width. A read by the host (`.item()`, a
branch on a number) makes a GPU wait. Bytes are of a stream's state after its window is full, from the shapes of a model without weights.
`benchmarks/streaming.py` prints both.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.conversion.kyutai_config import MOSHI_7B, config_from_kyutai

LAYERS, TTT_LAYERS = 32, list(range(23, 32))
WINDOWS = (250, 750, 3000)
READ = "aten._local_scalar_dense"
# Views move no data and launch nothing.
VIEWS = {
    f"aten.{name}"
    for name in (
        *("view", "_unsafe_view", "expand", "slice", "select", "transpose", "t", "permute", "unsqueeze", "squeeze", "detach"),
        *("unbind", "split", "split_with_sizes", "chunk", "alias", "as_strided", "unflatten"),
    )
}


class Counted(TorchDispatchMode):
    """Counts every operation that torch runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def operations(self) -> int:
        """Those that compute or copy."""
        return sum(count for name, count in self.calls.items() if name not in VIEWS)

    @property
    def host_reads(self) -> int:
        return self.calls[READ]


def deep(ttt_layers: list[int]) -> MoshiTTTForConditionalGeneration:
    """A model as deep as the 7B, and narrow."""
    depth = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "ffn_dim": 128}
    sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_dim": 256}
    torch.manual_seed(0)
    config = MoshiTTTConfig(**sizes, sliding_window=200, ttt_layers=ttt_layers, depth_decoder_config=depth)
    return MoshiTTTForConditionalGeneration(config).eval()


def frame_operations(model: MoshiTTTForConditionalGeneration, rows: int = 4) -> dict[str, dict[str, int]]:
    """Operations and host reads of one frame: of rows that began together, and of rows one of which was reset."""
    config = model.config

    def codes() -> torch.Tensor:
        return torch.randint(0, config.audio_vocab_size, (rows, config.num_user_codebooks))

    stream, found = model.new_stream(rows), {}
    for _ in range(config.ttt_mini_batch_size + 4):
        stream.step(codes())
    for name, reset in (("rows together", []), ("rows apart", [1])):
        stream.reset(reset)
        stream.step(codes())
        with Counted() as counted:
            stream.step(codes())
        found[name] = {"operations": counted.operations, "host_reads": counted.host_reads}
    return found


def bytes_a_caller(window: int, ttt_layers: list[int], dtype: torch.dtype = torch.bfloat16) -> int:
    """Of one row of a stream of Moshi 7B in the middle of a mini-batch, its window full."""
    config = config_from_kyutai({**MOSHI_7B, "context": window}, ttt_layers=ttt_layers)
    with FakeTensorMode(), torch.no_grad():  # shapes without numbers
        model = MoshiTTTForConditionalGeneration._from_config(config, dtype=dtype).eval()
        cache = model.new_cache(1)
        cache.fill(model)
        model.step_frame(cache.initial_tokens[None, :, 0], cache)
    tensors: list[torch.Tensor] = []
    cache.state.map(lambda tensor: (tensors.append(tensor), tensor)[1])
    factors = [state.open_factors for state in cache.state.ttt_states if state is not None]
    tensors += [tensor for tensor in tree_leaves(factors) if isinstance(tensor, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
