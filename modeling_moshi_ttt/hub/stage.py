"""Make the folder that a Hub repository will show: weights, configuration, code, processor, card, results, and a manifest of them all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..adapters.bases import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AUTO_MAPPING, check_model_type, is_adapter, write_base_config
from ..adapters.models import load_model
from ..common.checkpoint_files import check_links, copy_companions
from ..common.files import atomic_write, inside, read_json, write_manifest
from ..common.run_folder import CURVE, FINAL, FINAL_RUN, METRICS, PICTURES, RESULTS, RUN_CONFIG
from ..common.safetensor_files import DEFAULT_SHARD_SIZE, ShardWriter, TensorFiles
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from .card import CARD_FACTS, SUMMARY, check_facts, summarize, write_card
from .facts import Facts
from .private import without_paths
from .probe import compare, stage_probe
from .verify import verify, verify_adapter

PACKAGE = Path(__file__).parent.parent
HOME_ONLY = ("__init__.py", "cli.py", "former_names.py", "version.py")
MODEL_CLASS = "modeling_moshi_ttt.MoshiTTTForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_moshi_ttt.MoshiTTTConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForTextToWaveform": MODEL_CLASS,
    "AutoModelForMultimodalLM": MODEL_CLASS,
    "AutoProcessor": "processing_moshi_ttt.MoshiTTTProcessor",
}
PROCESSOR_CONFIG = "processor_config.json"
CONFIGURATIONS = ("*config.json", "audio_tokenizer/*config.json")
KINDS = ("full", "adapter", "merged")


def model_files() -> list[Path]:
    """The flat files: the Python that a Hub repository carries."""
    return sorted(path for path in PACKAGE.glob("*.py") if path.name not in HOME_ONLY)


def locate(source: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(the checkpoint's folder, the run's folder) for a run folder or a checkpoint folder, which is then both."""
    root = Path(source)
    if not root.is_dir():
        raise MoshiTTTFileNotFoundError(f"{root}: there is no such folder")
    if not is_adapter(root) and not (root / "config.json").is_file():
        if not (root / FINAL).is_dir():
            raise MoshiTTTFileNotFoundError(
                f"{root} holds neither a config.json, nor an {ADAPTER_CONFIG}, nor a folder {FINAL!r} with one: nothing to push"
            )
        return root / FINAL, root
    run = root.parent if root.name == FINAL and (root.parent / RUN_CONFIG).is_file() else root
    return root, run


def choose_kind(folder: Path, kind: str | None) -> str:
    """What to push: what the folder holds, unless an adapter is to be merged into its base."""
    adapter = is_adapter(folder)
    if kind not in (*KINDS, None):
        raise MoshiTTTError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if adapter and kind == "full":
        raise MoshiTTTError(f"{folder} holds an adapter; push it as --adapter, or with its base as --merged")
    if not adapter and kind in ("adapter", "merged"):
        raise MoshiTTTError(f"{folder} holds a whole model, no adapter; push it as --full")
    return kind or ("adapter" if adapter else "full")


def _is_local(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~"))


def hub_base(adapter_config: dict[str, Any], base: str | None) -> tuple[str, str | None]:
    """(repository, revision) of the base that others can load; ValueError where the adapter only knows a folder of this machine."""
    own = adapter_config.get("base_model_name_or_path")
    if base:
        return base, None
    if not own:
        raise MoshiTTTError(f"{ADAPTER_CONFIG} names no base model; name it with --base user/name, or push the two as one with --merged")
    if _is_local(own):
        raise MoshiTTTError(
            f"the adapter's base is {own!r}, a folder of this machine, which nobody else could load; push the base first and name it with "
            "--base user/name, or push the two as one with --merged"
        )
    return own, adapter_config.get("revision")


def stage(
    source: str | os.PathLike[str],
    target: Path,
    repo_id: str,
    kind: str | None = None,
    base: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    results: str | os.PathLike[str] | None = None,
    pin: str | None = None,
) -> Facts:
    """Fill the empty folder `target` from a run or checkpoint, load it again, and compare its loss on the probe with the source's.

    `results` is the folder of an evaluation; without it the run's own results.json is taken where there is one. `pin` is the revision of
    an adapter's base that the adapter is to name.

    Raises ValueError where the source is no whole checkpoint, or where what was staged is not the same model.
    """
    folder, run = locate(source)
    kind = choose_kind(folder, kind)
    check_links(folder)
    if kind == "full":
        loss = _stage_full(folder, target, max_shard_size)
    else:
        loss = stage_adapter(folder, target, base, pin) if kind == "adapter" else stage_merged(folder, target, max_shard_size)
    copy_companions(folder, target)
    for path in model_files():
        shutil.copyfile(path, target / path.name)
    rewrite_configurations(target)
    copy_run(folder, run, target)
    copy_results(Path(results) if results else run, target, wanted=results is not None)
    facts = verify(target)
    if facts.probe != loss:
        compare(loss, float("nan") if facts.probe is None else facts.probe, getattr(torch, next(iter(facts.dtypes))))
    write_card(target, repo_id, kind, facts)
    write_manifest(target)
    return facts


def _stage_full(folder: Path, target: Path, max_shard_size: int | str) -> float:
    """Weights, configuration and probe of a whole model; returns the source's loss on the probe."""
    check_model_type(read_json(folder / "config.json"), str(folder))
    verify(folder, run_probe=False)
    model = load_model(folder)
    loss = stage_probe(model, folder, target)
    del model
    with ShardWriter(target, max_shard_size) as writer:
        writer.add_all(TensorFiles(folder))
    shutil.copyfile(folder / "config.json", target / "config.json")
    return loss


def stage_adapter(folder: Path, target: Path, base: str | None, pin: str | None = None) -> float:
    """The adapter, naming a base that others can load, at revision `pin`; returns the loss of adapter and base on the probe."""
    from ..adapters.checks import load_adapter  # it needs PEFT

    verify_adapter(folder, run_probe=False)
    adapter_config = read_json(folder / ADAPTER_CONFIG)
    name, revision = hub_base(adapter_config, base)
    model = load_adapter(folder)
    loss = stage_probe(model, folder, target)
    write_base_config(target, model.config)
    adapter_config |= {"base_model_name_or_path": name, "revision": pin or revision, "auto_mapping": AUTO_MAPPING, "task_type": None}
    atomic_write(target / ADAPTER_CONFIG, json.dumps(adapter_config, indent=2, sort_keys=True))
    shutil.copyfile(folder / ADAPTER_WEIGHTS, target / ADAPTER_WEIGHTS)
    return loss


def stage_merged(folder: Path, target: Path, max_shard_size: int | str) -> float:
    """Adapter and base as one whole model; returns its loss on the probe."""
    from ..adapters.checks import load_adapter  # it needs PEFT

    verify_adapter(folder, run_probe=False)
    adapted = load_adapter(folder)
    dtype = adapted.base_model.dtype
    model = adapted.merge_and_unload().to(dtype)
    loss = stage_probe(model, folder, target)
    with ShardWriter(target, max_shard_size) as writer:
        writer.add_all(model.state_dict().items())
    model.config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)
    return loss


def copy_run(folder: Path, run: Path, target: Path) -> None:
    """The run's settings, what it cost and reached, and its loss curve, without the paths of the machine it ran on."""
    for path in (folder / FINAL_RUN, run / RUN_CONFIG, folder / RUN_CONFIG):
        if path.is_file() and not (target / RUN_CONFIG).exists():
            content = read_json(path)
            atomic_write(target / RUN_CONFIG, json.dumps(without_paths(content.get("run", content)), indent=1))
    if (run / METRICS).is_file():
        atomic_write(target / SUMMARY, json.dumps(summarize(run / METRICS), indent=1))
    elif (folder / SUMMARY).is_file():
        atomic_write(target / SUMMARY, json.dumps(without_paths(read_json(folder / SUMMARY)), indent=1))
    if (run / CARD_FACTS).is_file():
        atomic_write(target / CARD_FACTS, json.dumps(check_facts(read_json(run / CARD_FACTS)), indent=1))
    if (run / CURVE).is_file():
        shutil.copyfile(run / CURVE, target / CURVE)


def copy_results(source: Path, target: Path, wanted: bool) -> None:
    """An evaluation's results.json and the pictures of its parts."""
    if not (source / RESULTS).is_file():
        if wanted:
            raise MoshiTTTFileNotFoundError(f"{source} holds no {RESULTS}: it is no folder of an evaluation")
        return
    results = read_json(source / RESULTS)
    atomic_write(target / RESULTS, json.dumps(without_paths(results), indent=1))
    for name in results.get("tasks", {}):
        picture = inside(source / PICTURES, f"{name}.png")
        if picture.is_file():
            (target / PICTURES).mkdir(exist_ok=True)
            shutil.copyfile(picture, target / PICTURES / picture.name)


def rewrite_configurations(target: Path) -> None:
    """Say in the configurations which of the shipped files hold the classes, and nothing of the machine they were written on."""
    for path in [path for pattern in CONFIGURATIONS for path in target.glob(pattern)]:
        content = without_paths(read_json(path))
        if path == target / "config.json":
            content["auto_map"] = AUTO_MAP
        elif path == target / PROCESSOR_CONFIG:
            content["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
