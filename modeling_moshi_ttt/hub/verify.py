"""Check a checkpoint folder: its manifest, every weight the configuration calls for, shapes, finite numbers, the loss on its probe, and its
code.
"""

import argparse
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..adapters.bases import check_model_type, is_adapter
from ..common.files import MANIFEST, check_manifest, read_json
from ..common.safetensor_files import PICKLES, TensorFiles, largest
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from .carried_code import Range, describe_code, folder_code, runs_here
from .probe import compare, probe_loss, read_probe

KINDS = ("temporal", "depth", "embeddings", "heads", "ttt", "gates", "lora")
MAX_PROBLEMS = 20
Shapes = dict[str, tuple[int, ...]]


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


def expected_shapes(config: MoshiTTTConfig) -> Shapes:
    """Name -> shape of every weight the configuration calls for, without making any."""
    with torch.device("meta"):
        model = MoshiTTTForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def weight_problems(files: TensorFiles, config: MoshiTTTConfig) -> list[str]:
    """Missing, unknown, misshapen and non-finite weights, as sentences; every TTT weight that the configuration calls for is looked for."""
    found = {name: shape for name, shape in files.shapes().items() if not name.startswith("audio_encoder.")}
    return shape_problems(found, expected_shapes(config)) + finite_problems(files)


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


def folder_problems(folder: Path) -> list[str]:
    """What is wrong with the files as such: against the manifest where there is one, and pickles."""
    problems = check_manifest(folder) if (folder / MANIFEST).is_file() else []
    return problems + [f"{path.name} is a pickle: it will not be read" for path in sorted(folder.rglob("*")) if path.suffix in PICKLES]


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


def verify(folder: str | os.PathLike[str], run_probe: bool = True) -> Facts:
    """Check a full checkpoint or an adapter and say what it holds.

    Raises ValueError or FileNotFoundError that names every file and weight that is wrong (up to 20 of them).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MoshiTTTFileNotFoundError(f"{folder}: there is no such folder")
    refuse(folder_problems(folder), folder)
    if is_adapter(folder):
        from ..adapters.checks import verify_adapter  # it needs PEFT

        facts = verify_adapter(folder, run_probe)
    else:
        facts = _verify_full(folder, run_probe)
    facts.code, facts.base_code = folder_code(folder), folder_code(Path(facts.base)) if facts.base else None
    facts.size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return facts


def _verify_full(folder: Path, run_probe: bool) -> Facts:
    raw = read_json(folder / "config.json")
    check_model_type(raw, str(folder))
    config = MoshiTTTConfig.from_pretrained(folder)
    files = TensorFiles(folder)
    refuse(weight_problems(files, config), folder)
    facts = Facts("full", ttt_layers=[int(layer) for layer in config.ttt_layers], ttt_mixer=config.ttt_mixer)
    count(facts, files)
    stored = read_probe(folder) if run_probe else None
    if stored is not None:
        model = MoshiTTTForConditionalGeneration.from_pretrained(folder, dtype="auto")
        facts.probe = probe_loss(model, stored[0])
        compare(stored[1], facts.probe, model.dtype)
    return facts


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a checkpoint folder: full or adapter")
    parser.add_argument("--no-probe", action="store_true", help="check files and weights only, without running the model")


def run(args: argparse.Namespace) -> int:
    facts = verify(args.folder, run_probe=not args.no_probe)
    print(facts.describe())
    print("all is well" if facts.code_runs_here else "all is well but the code it carries")
    return 0
