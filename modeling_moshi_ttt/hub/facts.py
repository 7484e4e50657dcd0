"""What a checkpoint holds, and what is wrong with its weights, in words."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..adapters.models import Shapes
from ..common.safetensor_files import TensorFiles, largest
from ..errors_moshi_ttt import MoshiTTTError
from .carried_code import Range, describe_code, runs_here

KINDS = ("temporal", "depth", "embeddings", "heads", "ttt", "gates", "lora")
MAX_PROBLEMS = 20


@dataclass
class Facts:
    """What a checkpoint holds."""

    kind: str  # "full" or "adapter"
    parameters: dict[str, int] = field(default_factory=dict)  # by kind, see KINDS
    dtypes: dict[str, int] = field(default_factory=dict)  # parameters by dtype
    ttt_layers: list[int] = field(default_factory=list)
    ttt_mixer: str = ""
    base: str = ""
    size: int = 0  # bytes of all files
    probe: float | None = None
    code: Range | None = None  # the transformers that its own code, if any, is for
    base_code: Range | None = None  # the same of its base

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def describe(self) -> str:
        """A few lines for people."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.parameters.items() if count)
        dtypes = ", ".join(f"{name} {count / max(self.total, 1):.0%}" for name, count in self.dtypes.items())
        layers = ", ".join(map(str, self.ttt_layers)) or "none"
        lines = [
            f"{self.kind} checkpoint" + (f" on {self.base}" if self.base else "") + f", {human_size(self.size)}",
            f"parameters: {self.total:,} ({kinds})",
            f"TTT layers: {layers}" + (f" ({self.ttt_mixer})" if self.ttt_layers else ""),
            f"dtype: {dtypes}",
            "probe: none stored" if self.probe is None else f"probe: loss {self.probe:.6f}, as stored",
        ]
        codes = (("code", self.code), ("its base's code", self.base_code))
        lines += [describe_code(code, what) for what, code in codes if code is not None]
        return "\n".join(lines)

    @property
    def code_runs_here(self) -> bool:
        """Whether the installed transformers is one that all of its code is for."""
        return all(runs_here(code) for code in (self.code, self.base_code) if code is not None)


def human_size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def kind_of(name: str) -> str:
    """Which part of the model a weight belongs to, for counting."""
    if "lora_" in name:
        return "lora"
    if "gating_alpha" in name:
        return "gates"
    if ".ttt." in name or ".ttt_layernorm." in name:
        return "ttt"
    if "depth_decoder." in name:
        return "depth"
    if "lm_head" in name:
        return "heads"
    return "embeddings" if "embed_tokens" in name else "temporal"


def shape_problems(found: Shapes, wanted: Shapes) -> list[str]:
    """Weights that are missing, unknown or misshapen."""
    missing = wanted.keys() - found.keys()
    fresh = bool(missing) and all(".ttt" in name for name in missing)
    cure = "; fresh TTT layers (`convert --ttt`) have no weights until they are trained" if fresh else ""
    problems = [f"{name} is missing: the configuration calls for it{cure}" for name in missing]
    problems += [f"{name} is unknown to this configuration" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        if wanted[name] != found[name]:
            problems.append(f"{name} has shape {list(found[name])}; the configuration asks for {list(wanted[name])}")
    return sorted(problems)


def finite_problems(files: TensorFiles) -> list[str]:
    problems = []
    for name, tensor in files:
        if tensor.is_floating_point() and not math.isfinite(largest(tensor)):
            bad = int((~torch.isfinite(tensor)).sum())
            problems.append(f"{name} holds {bad} values that are NaN or infinite")
    return problems


def refuse(problems: list[str], folder: Path) -> None:
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise MoshiTTTError("\n  ".join([f"{folder} is not a whole checkpoint:", *problems[:MAX_PROBLEMS], *more]))


def count(facts: Facts, files: TensorFiles) -> None:
    parameters: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, tensor in files:
        if not name.startswith("audio_encoder."):
            parameters[kind_of(name)] += tensor.numel()
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    facts.parameters = {kind: parameters[kind] for kind in KINDS if parameters[kind]}
    facts.dtypes = dict(dtypes.most_common())
