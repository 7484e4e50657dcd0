"""How long a memory takes to be written over: one key is told value v1 for one mini-batch, then v2, until its answer is nearer to v2 than
to v1.

Both inner losses in one run, for every mixer, mini-batch size and inner learning rate, on the op alone with a layer's start values, D = 32,
gate 1/2. "one frame": each value is told in the last frame of a mini-batch only, and the other frames write nothing.

    python benchmarks/overwrite.py --out benchmarks/overwrite.json --figure docs/pictures/overwrite
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from modeling_moshi_ttt.configuration_moshi_ttt import INNER_NORMS, MIXERS, default_base_lr
from modeling_moshi_ttt.evaluation.drawing import save
from modeling_moshi_ttt.ttt_layer import TTTMLP, TTTLinear
from modeling_moshi_ttt.ttt_ops import TTTState, ttt_linear, ttt_mlp

OPS = {"linear": (ttt_linear, TTTLinear), "mlp": (ttt_mlp, TTTMLP)}
MINI_BATCHES = (1, 4, 16, 64)
BASE_LRS = (0.1, 1.0, 4.0, 16.0, 64.0)
MOST = 100  # mini-batches that are waited for
GATE = 0.5  # of a fresh layer


class Memory:
    """One head of a fresh layer in `rows` streams with a key each, which is told values and asked for them."""

    def __init__(
        self, mixer: str, inner_norm: str, b: int, base_lr: float, rows: int = 64, dim: int = 32, seed: int = 0, one_frame: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.op, layer = OPS[mixer]
        self.options: dict[str, Any] = {"mini_batch_size": b, "inner_norm": inner_norm}
        self.key = F.normalize(torch.randn(rows, 1, 1, dim, generator=g), dim=-1)
        self.values = [F.layer_norm(torch.randn(rows, 1, 1, dim, generator=g), (dim,)) for _ in range(2)]
        shapes = layer.fast_weight_shapes(1, dim)
        weights = [torch.randn(1, *shape, generator=g) * layer.start_std.get(name, 0.0) for name, shape in shapes.items()]
        self.state = TTTState.initial(*weights, batch_size=rows)
        writes = torch.arange(b) == b - 1 if one_frame else torch.ones(b)
        self.lr = (base_lr / dim * GATE * writes)[None, :, None].expand(rows, b, 1)
        self.shared = 1 / torch.arange(1, b + 1), torch.ones(1, dim), torch.zeros(1, dim)

    @torch.no_grad()
    def tell(self, value: Tensor) -> None:
        k, v = (x.expand(-1, self.lr.shape[1], -1, -1) for x in (self.key, value + self.key))
        _, self.state = self.op(k, k, v, self.lr, *self.shared, self.state, **self.options)

    @torch.no_grad()
    def cosines(self) -> list[float]:
        """Of the answer with both values, means over the rows. The key is asked in a frame that writes nothing."""
        k = self.key.expand(-1, self.lr.shape[1], -1, -1)
        out, _ = self.op(k, k, k, torch.zeros_like(self.lr), *self.shared, self.state, **self.options)
        return [float(F.cosine_similarity((out - k)[:, :1], value, dim=-1).mean()) for value in self.values]


def mini_batches_to_turn(memory: Memory) -> int | None:
    """After one mini-batch of the first value, how many of the second until the answer is nearer to it; None: more than MOST."""
    first, second = memory.values
    memory.tell(first)
    for count in range(1, MOST + 1):
        memory.tell(second)
        to_first, to_second = memory.cosines()
        if to_second > to_first:
            return count
    return None


def measure(mixer: str, b: int, seeds: int, one_frame: bool) -> list[dict[str, Any]]:
    rows = []
    for inner_norm in INNER_NORMS:
        own = default_base_lr(mixer, inner_norm, head_dim=32)
        for base_lr in sorted({*BASE_LRS, own}):
            counts = [mini_batches_to_turn(Memory(mixer, inner_norm, b, base_lr, seed=seed, one_frame=one_frame)) for seed in range(seeds)]
            rows.append({"mixer": mixer, "inner_norm": inner_norm, "mini_batch": b, "told": "one frame" if one_frame else "all frames",
                         "base_lr": base_lr,
                         "default": base_lr == own, "mini_batches": counts})  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """One panel for each mixer and way of telling, at mini-batches of 16: medians over the seeds; at the upper edge, more than MOST."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (mixer, told) in zip(panels.flat, itertools.product(MIXERS, ("all frames", "one frame"))):
        for inner_norm, marker in zip(INNER_NORMS, "os"):
            found = [
                row for row in rows if (row["mixer"], row["told"], row["inner_norm"], row["mini_batch"]) == (mixer, told, inner_norm, 16)
            ]
            counts = [statistics.median(count or MOST for count in row["mini_batches"]) for row in found]
            axes.loglog([row["base_lr"] for row in found], counts, marker=marker, label=f'ttt_inner_norm "{inner_norm}"')
            axes.plot(
                *zip(*[(row["base_lr"], count) for row, count in zip(found, counts) if row["default"]]), "k*", markersize=12, zorder=3
            )
        axes.set_title(f"TTT-{mixer}, each value told in {told} of a mini-batch", fontsize="medium")
        axes.grid(alpha=0.3)
    figure.supxlabel("ttt_base_lr (star: the default)")
    figure.supylabel("mini-batches of 16 frames to turn an answer")
    panels[0, 0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="each draws keys, values and start weights anew")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--figure", type=Path, help="draw them to this path, .svg and .png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"mini-batches to turn an answer, of each seed; -: more than {MOST}; *: the default inner learning rate")
    print(f"{'mixer':8}{'told in':12}{'b':>3}  {'inner norm':12}base_lr: mini-batches")
    for mixer, one_frame, b in itertools.product(MIXERS, (False, True), MINI_BATCHES):
        if one_frame and b == 1:
            continue
        found = measure(mixer, b, options.seeds, one_frame)
        rows += found
        for inner_norm in INNER_NORMS:
            ours = [row for row in found if row["inner_norm"] == inner_norm]
            cells = [f"{row['base_lr']:g}{'*' * row['default']}: " + "/".join(str(n or "-") for n in row["mini_batches"]) for row in ours]
            print(f"{mixer:8}{ours[0]['told']:12}{b:3}  {inner_norm:12}" + "   ".join(cells), flush=True)
    if options.out:
        facts = {"date": date.today().isoformat(), "torch": torch.__version__, "command": "python benchmarks/overwrite.py"}
        facts |= {"seeds": list(range(options.seeds)), "rows": 64, "head_dim": 32, "gate": GATE, "most": MOST}  # type: ignore[dict-item]
        options.out.write_text(json.dumps(facts | {"settings": rows}) + "\n")
    if options.figure:
        save(draw(rows), options.figure)


if __name__ == "__main__":
    main()
