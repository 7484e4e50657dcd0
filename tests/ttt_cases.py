"""Inputs for the tests of the TTT ops, and comparisons that look at outputs, final state and every gradient."""

from types import SimpleNamespace

import torch
from torch import Tensor

from modeling_moshi_ttt.ttt_ops import TTTState, ttt_linear, ttt_mlp

OPS = {"linear": ttt_linear, "mlp": ttt_mlp}
INPUTS = ("q", "k", "v", "lr", "token_weight", "norm_weight", "norm_bias")
AT_THE_BOUND = {"linear": 3.0, "mlp": 0.6}  # values of `write` at which the bound of inner_norm "none" holds some shares, and leaves others
WEIGHTS = {"linear": ("W1", "b1"), "mlp": ("W1", "b1", "W2", "b2")}


def make_inputs(
    mixer: str, rows: int, length: int, heads: int, dim: int, b: int, dtype=torch.float64, seed: int = 0, write: float = 1.0
) -> dict[str, Tensor]:
    """Random op inputs and initial weights by name, all requiring grad; `write` scales the rates."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    tokens = {name: normal(rows, length, heads, dim) for name in "qkv"}
    tokens |= {name: torch.nn.functional.normalize(tokens[name], dim=-1) for name in "qk"}
    width = dim if mixer == "linear" else 4 * dim
    values = tokens | {
        "lr": torch.rand(rows, length, heads, generator=g, dtype=torch.float64) * 0.3 * write,
        "token_weight": 1 / torch.arange(1, b + 1, dtype=torch.float64) + 0.1 * torch.rand(b, generator=g, dtype=torch.float64),
        "norm_weight": 1 + normal(heads, dim, scale=0.1),
        "norm_bias": normal(heads, dim, scale=0.1),
        "W1": normal(heads, dim, width, scale=0.3),
        "b1": normal(heads, 1, width, scale=0.1),
    }
    if mixer == "mlp":
        values |= {"W2": normal(heads, width, dim, scale=0.3), "b2": normal(heads, 1, dim, scale=0.1)}
    return {name: x.to(dtype).requires_grad_() for name, x in values.items()}


def start(mixer: str, values: dict[str, Tensor], rows: int) -> TTTState:
    return TTTState.initial(*(values[name] for name in WEIGHTS[mixer]), batch_size=rows)


def run(mixer: str, values: dict[str, Tensor], state: TTTState, frames: slice = slice(None), mask: Tensor | None = None, **options):
    """The op on some frames of `values`; the mini-batch size is that of token_weight."""
    inputs = [values[name][:, frames] for name in INPUTS[:4]] + [values[name] for name in INPUTS[4:]]
    mask = None if mask is None else mask[:, frames]
    return OPS[mixer](*inputs, state, mini_batch_size=len(values["token_weight"]), mask=mask, **options)


def run_all(mixer: str, values: dict[str, Tensor], cuts: tuple[int, ...] = (), mask: Tensor | None = None, **options) -> dict[str, Tensor]:
    """Everything one can compare, after the frames were given in pieces: out, final state, gradients of one weighted sum of them."""
    rows, length = values["q"].shape[:2]
    state, outputs = start(mixer, values, rows), []
    bounds = (0, *cuts, length)
    for first, last in zip(bounds, bounds[1:]):
        out, state = run(mixer, values, state, slice(first, last), mask, **options)
        outputs.append(out)
    result = {"out": torch.cat(outputs, 1)} | {f"final_{name}": x for name, x in state.tensors().items()}
    g = torch.Generator().manual_seed(7)
    parts = [x for x in result.values() if x.requires_grad]
    total = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in parts)
    names = [name for name, x in values.items() if x.requires_grad]
    gradients = torch.autograd.grad(total, [values[name] for name in names])
    return {name: x.detach() for name, x in (result | {f"grad_{n}": x for n, x in zip(names, gradients)}).items()}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference over all tensors, relative to each tensor's largest value where that is above 1."""
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp(min=1)) for n in ours if ours[n].numel())


def layer_config(**changes) -> SimpleNamespace:
    """A small configuration with the fields that the layer reads."""
    fields = {
        "hidden_size": 24, "ttt_mixer": "mlp", "ttt_num_heads": 3, "ttt_head_dim": 8, "ttt_mini_batch_size": 4, "ttt_base_lr": 1.0,
        "ttt_inner_norm": "layer_norm", "ttt_write_threshold": 0.0, "ttt_rope": "mini_batch", "ttt_norm_eps": 1e-6, 
        "scan_checkpoint_group_size": 3, "ttt_implementation": "scan",
    }  # fmt: skip
    assert changes.keys() <= fields.keys()
    return SimpleNamespace(**(fields | changes))
