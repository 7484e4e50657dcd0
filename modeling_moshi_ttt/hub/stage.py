"""Make the folder that a Hub repository will show: weights, configuration, code, processor, card, results, and a manifest of them all."""

import json
import os
import shutil
from pathlib import Path

import torch

from ..adapters.bases import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_model_type, is_adapter
from ..common.files import MANIFEST, atomic_write, read_json, write_manifest
from ..common.run_folder import CURVE, FINAL, FINAL_RUN, METRICS, PICTURES, RESULTS, RUN_CONFIG
from ..common.safetensor_files import DEFAULT_SHARD_SIZE, INDEX, PICKLES, SINGLE, ShardWriter, TensorFiles
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from .card import CARD, CARD_FACTS, SUMMARY, check_facts, summarise, without_paths, write_card
from .probe import OLD_PROBE, compare, stage_probe
from .verify import Facts, verify

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
    if kind == "full":
        loss = _stage_full(folder, target, max_shard_size)
    else:
        from ..adapters.checks import stage_adapter, stage_merged  # they need PEFT

        loss = stage_adapter(folder, target, base, pin) if kind == "adapter" else stage_merged(folder, target, max_shard_size)
    copy_others(folder, target)
    for path in model_files():
        shutil.copyfile(path, target / path.name)
    add_auto_map(target)
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
    model = MoshiTTTForConditionalGeneration.from_pretrained(folder, dtype="auto")
    loss = stage_probe(model, folder, target)
    del model
    with ShardWriter(target, max_shard_size) as writer:
        writer.add_all(TensorFiles(folder))
    shutil.copyfile(folder / "config.json", target / "config.json")
    return loss


REWRITTEN = (MANIFEST, OLD_PROBE, CARD, CARD_FACTS, SUMMARY, "config.json", ADAPTER_CONFIG, FINAL_RUN, RUN_CONFIG, RESULTS)


def _is_weights(path: Path) -> bool:
    return path.name in (SINGLE, INDEX, ADAPTER_WEIGHTS) or (path.name.startswith("model-") and path.suffix == ".safetensors")


def copy_others(folder: Path, target: Path) -> None:
    """Processor, tokenizer, codec, generation configuration: what stands beside the weights, apart from pickles, code and hidden files.

    Links are followed where they stay in the folder, or lead to the blobs of a snapshot in the Hub's cache; ValueError names any other.
    """
    homes = [folder.resolve()] + ([folder.resolve().parents[1] / "blobs"] if folder.resolve().parent.name == "snapshots" else [])
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        replaced = len(name.parts) == 1 and (_is_weights(path) or path.name in REWRITTEN)
        if hidden or replaced or path.suffix in (*PICKLES, ".py", ".pyc"):
            continue
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise MoshiTTTError(f"{path} is a link to {path.resolve()}, outside its folder; put the file itself there, or remove the link")
        if path.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if not (target / name).exists():
                shutil.copyfile(path, target / name)


def copy_run(folder: Path, run: Path, target: Path) -> None:
    """The run's settings, what it cost and reached, and its loss curve, without the paths of the machine it ran on."""
    for path in (folder / FINAL_RUN, run / RUN_CONFIG, folder / RUN_CONFIG):
        if path.is_file() and not (target / RUN_CONFIG).exists():
            content = read_json(path)
            atomic_write(target / RUN_CONFIG, json.dumps(without_paths(content.get("run", content)), indent=1))
    if (run / METRICS).is_file():
        atomic_write(target / SUMMARY, json.dumps(summarise(run / METRICS), indent=1))
    elif (folder / SUMMARY).is_file():
        shutil.copyfile(folder / SUMMARY, target / SUMMARY)
    if (run / CARD_FACTS).is_file():
        atomic_write(target / CARD_FACTS, json.dumps(check_facts(read_json(run / CARD_FACTS)), indent=1))
    if (run / CURVE).is_file():
        shutil.copyfile(run / CURVE, target / CURVE)


def copy_results(source: Path, target: Path, wanted: bool) -> None:
    """An evaluation's results.json and pictures."""
    if not (source / RESULTS).is_file():
        if wanted:
            raise MoshiTTTFileNotFoundError(f"{source} holds no {RESULTS}: it is no folder of an evaluation")
        return
    atomic_write(target / RESULTS, json.dumps(without_paths(read_json(source / RESULTS)), indent=1))
    for picture in sorted((source / PICTURES).glob("*.png")):
        (target / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(picture, target / PICTURES / picture.name)


def add_auto_map(target: Path) -> None:
    """Say in the configurations which of the shipped files hold the classes."""
    for name in ("config.json", PROCESSOR_CONFIG):
        if (target / name).is_file():
            content = read_json(target / name)
            content["auto_map"] = AUTO_MAP if name == "config.json" else {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
            (target / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
