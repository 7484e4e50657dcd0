"""Check a checkpoint folder: its manifest, every weight the configuration calls for, shapes, finite numbers, the loss on its probe, and its
code.
"""

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import MimiConfig, MimiModel

from ..adapters.bases import ADAPTER_WEIGHTS, base_config, check_model_type, is_adapter
from ..adapters.models import Shapes, dtype_problems, header_problems, load_model
from ..common.files import MANIFEST, check_manifest, read_json
from ..common.run_folder import final_of
from ..common.safetensor_files import PICKLES, TensorFiles
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from ..processing_moshi_ttt import MoshiTTTProcessor
from ..stored_config_moshi_ttt import check_codec
from .carried_code import folder_code
from .facts import Facts, count, finite_problems, refuse, shape_problems
from .probe import compare, probe_loss, read_probe

CODEC = MoshiTTTProcessor.CODEC_FOLDER


def expected_shapes(config: MoshiTTTConfig) -> Shapes:
    """Name -> shape of every weight the configuration calls for, without making any."""
    with torch.device("meta"):
        model = MoshiTTTForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def weight_problems(files: TensorFiles, config: MoshiTTTConfig) -> list[str]:
    """Missing, unknown, misshapen and non-finite weights, as sentences; every TTT weight that the configuration calls for is looked for."""
    found = {name: shape for name, shape in files.shapes().items() if not name.startswith("audio_encoder.")}
    return shape_problems(found, expected_shapes(config)) + finite_problems(files)


def codec_problems(folder: Path) -> list[str]:
    """As `weight_problems`, of a codec's folder, where there is one."""
    if not (folder / "config.json").is_file():
        return []
    raw = read_json(folder / "config.json")
    check_codec(raw, str(folder / "config.json"))
    files = TensorFiles(folder)
    with torch.device("meta"):
        model = MimiModel(MimiConfig.from_dict(raw))
    # By the last part of their names: transformers has other names for a codec's weights in files than in memory.
    wanted = Counter((name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in model.state_dict().items())
    found = Counter((name.rpartition(".")[2], shape) for name, shape in files.shapes().items())
    problems = [
        f"{leaf}: {number} of shape {list(shape)} are missing; the configuration asks for them"
        for (leaf, shape), number in sorted((wanted - found).items())
    ]
    problems += dtype_problems(files) + finite_problems(files)
    return [f"{folder.name}/{problem}" for problem in problems]


def folder_problems(folder: Path) -> list[str]:
    """What is wrong with the files as such: against the manifest where there is one, and pickles."""
    problems = check_manifest(folder) if (folder / MANIFEST).is_file() else []
    return problems + [f"{path.name} is a pickle: it will not be read" for path in sorted(folder.rglob("*")) if path.suffix in PICKLES]


def verify(folder: str | os.PathLike[str], run_probe: bool = True) -> Facts:
    """Check a full checkpoint or an adapter and say what it holds.

    Raises ValueError or FileNotFoundError that names every file and weight that is wrong (up to 20 of them).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MoshiTTTFileNotFoundError(f"{folder}: there is no such folder")
    refuse(folder_problems(folder), folder)
    if is_adapter(folder):
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
    refuse(header_problems(config, files.shapes()) + dtype_problems(files), folder)
    refuse(weight_problems(files, config) + codec_problems(folder / CODEC), folder)
    facts = Facts("full", ttt_layers=[int(layer) for layer in config.ttt_layers], ttt_mixer=config.ttt_mixer)
    count(facts, files)
    stored = read_probe(folder) if run_probe else None
    if stored is not None:
        model = load_model(folder)
        facts.probe = probe_loss(model, stored[0])
        compare(stored[1], facts.probe, model.dtype)
    return facts


def verify_adapter(folder: Path, run_probe: bool) -> Facts:
    """As `verify`, for an adapter: its own weights, its base's configuration, and the two together on the probe."""
    from ..adapters.checks import expected_weights, load_adapter, read_adapter_config  # they need PEFT

    adapter_config, config = read_adapter_config(folder), base_config(folder)
    files = TensorFiles(folder / ADAPTER_WEIGHTS)
    refuse(dtype_problems(files), folder)
    refuse(shape_problems(files.shapes(), expected_weights(folder, config)) + finite_problems(files), folder)
    layers = [int(layer) for layer in config.ttt_layers]
    base = str(adapter_config.get("base_model_name_or_path") or "")
    facts = Facts("adapter", ttt_layers=layers, ttt_mixer=config.ttt_mixer, base=base)
    count(facts, files)
    stored = read_probe(folder) if run_probe else None
    if stored is not None:
        model: Any = load_adapter(folder)
        facts.probe = probe_loss(model, stored[0])
        try:
            compare(stored[1], facts.probe, model.base_model.dtype)
        except ValueError as error:
            raise MoshiTTTError(f"{error}; either the adapter or its base {base or '(of its run)'} has changed since then") from None
    return facts


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN_OR_FOLDER", help="a checkpoint folder, full or adapter, or a run's, whose final is taken")
    parser.add_argument("--no-probe", action="store_true", help="check files and weights only, without running the model")


def run(args: argparse.Namespace) -> int:
    facts = verify(final_of(Path(args.folder)), run_probe=not args.no_probe)
    print(facts.describe())
    print("all is well" if facts.code_runs_here else "all is well but the code it carries")
    return 0
