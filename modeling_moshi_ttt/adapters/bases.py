"""Adapters and their bases: the configuration that a base must have, and the base loaded with it, so that nobody has to guess either."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import MoshiConfig, set_seed

from ..common.files import atomic_write, read_json
from ..common.packaged import resolve
from ..common.run_folder import FINAL_RUN
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from .models import load_model

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_CONFIG = "base_config.json"
# PEFT loads a base through a class of one of the libraries that it trusts; transformers then finds the repository's own.
AUTO_MAPPING = {"base_model_class": "AutoModel", "parent_library": "transformers"}
TTT_LAYER = re.compile(r"decoder\.model\.layers\.(\d+)\.(ttt|ttt_gate|ttt_layernorm)\.")
# What an adapter and its base must agree on, and how a message calls it. Of another size, a base would lose or gain layers unnoticed.
_SIZES = ("hidden_size", "num_hidden_layers", "ffn_dim", "num_codebooks", "vocab_size", "audio_vocab_size")
_LOSS_WEIGHTS = ("text_padding_weight", "semantic_loss_weight", "user_loss_weight")
_TTT = {"ttt_layers": "TTT layers", "ttt_mixer": "TTT mixer", "ttt_mini_batch_size": "TTT mini-batch size"}


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def check_model_type(config: dict[str, Any], where: str) -> None:
    """Refuse another kind of model, with a way on for those that can be converted."""
    model_type = config.get("model_type")
    if model_type == "moshi_ttt":
        return
    if model_type is None and "dep_q" not in config:
        raise MoshiTTTError(f"{where} holds no config.json that says its model_type, as `save_pretrained` writes one")
    hint = "; turn it into one with: moshi-ttt convert SRC DST" if model_type in ("moshi", "hibiki") or "dep_q" in config else ""
    raise MoshiTTTError(f"{where} holds a model of type {model_type!r}, not 'moshi_ttt'{hint}")


def check_loadable(config: dict[str, Any], where: str) -> None:
    """Refuse a configuration whose weights are not ours to load: neither ours nor transformers' own Moshi, which loads as it is."""
    if not _is_plain(config):
        check_model_type(config, where)


def write_base_config(folder: Path, config: MoshiTTTConfig) -> None:
    """Every field of the base's configuration, those at their defaults too, which a later version may change."""
    fields = json.loads(config.to_json_string(use_diff=False))
    fields.pop("_name_or_path", None)  # a folder of the machine it was loaded on
    atomic_write(folder / BASE_CONFIG, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def name_auto_class(folder: Path, config: MoshiTTTConfig) -> None:
    """Let `AutoPeftModel` load an adapter whose base has by itself the TTT layers of `config`: it takes the base as it stands."""
    base, revision = named_base(folder)
    raw = raw_config(base, "the adapter's base", revision) if base else None
    if raw is None or _is_plain(raw):
        return
    own = _as_ours(raw)
    if all(getattr(own, name) == getattr(config, name) for name in config.__dataclass_fields__ if name.startswith("ttt_")):
        content = read_json(folder / ADAPTER_CONFIG) | {"auto_mapping": AUTO_MAPPING}
        atomic_write(folder / ADAPTER_CONFIG, json.dumps(content, indent=2, sort_keys=True))


def named_base(folder: Path) -> tuple[str, str | None]:
    """(folder or Hub name, revision) of the base that an adapter names; "" where it names none."""
    adapter_config = read_json(folder / ADAPTER_CONFIG)
    return str(adapter_config.get("base_model_name_or_path") or ""), adapter_config.get("revision")


def adapter_layers(folder: Path) -> list[int]:
    """The TTT layers whose weights an adapter holds, from its file's header."""
    return _held_ttt(folder).get("ttt_layers", [])


def _held_ttt(folder: Path) -> dict[str, Any]:
    """The TTT settings that follow from the weights of an adapter; {} where it holds no TTT weights."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise MoshiTTTFileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if TTT_LAYER.search(name)]  # noqa: SIM118
            sizes = [file.get_slice(name).get_shape()[0] for name in names if name.endswith("ttt.learnable_token_weight")]
    except SafetensorError as error:
        raise MoshiTTTError(f"{path} cannot be read ({error})") from None
    held: dict[str, Any] = {}
    if names:
        held["ttt_layers"] = sorted({int(found[1]) for name in names if (found := TTT_LAYER.search(name))})
    if any(name.endswith("ttt.W1") for name in names):
        held["ttt_mixer"] = "mlp" if any(name.endswith("ttt.W2") for name in names) else "linear"
    if sizes:
        held["ttt_mini_batch_size"] = sizes[0]
    return held


def adapter_run(folder: Path) -> dict[str, Any]:
    """The settings of the run that made the adapter, as far as they lie beside it."""
    return read_json(folder / FINAL_RUN).get("run", {}) if (folder / FINAL_RUN).is_file() else {}


def _run_fields(folder: Path) -> dict[str, Any]:
    """Fields that the run put on top of its base's configuration."""
    model = adapter_run(folder).get("model", {})
    return dict(model.get("ttt") or {}) | {name: model[name] for name in _LOSS_WEIGHTS if model.get(name) is not None}


def base_config(folder: Path, base: str | None = None, revision: str | None = None) -> MoshiTTTConfig:
    """The configuration an adapter's base must have: from beside it, or from the base itself with the TTT settings of the adapter's run.

    The base is `base` at `revision`, or the one that the adapter names; where it names none, the fresh weights that its run started from.
    Raises ValueError for a base that is missing, of another type, or with other TTT layers than the adapter's weights.
    """
    if base is None:
        base, revision = named_base(folder)
    if (folder / BASE_CONFIG).is_file():
        config = MoshiTTTConfig.from_dict(read_json(folder / BASE_CONFIG))
    elif base:
        config = _as_ours(raw_config(base, "the adapter's base", revision), **_run_fields(folder))
    else:
        config = _as_ours(read_json(_fresh_start(folder)), **_run_fields(folder))
    check_weights(folder, config, base)
    return config


def _fresh_start(folder: Path) -> str:
    """The config.json whose fresh weights the adapter's run started from; ValueError where it started from none."""
    path = resolve("model", str(adapter_run(folder).get("model", {}).get("path", "")))
    if not path.endswith(".json"):
        raise MoshiTTTError(f"the adapter names no base model: name it in {folder / ADAPTER_CONFIG}, as base_model_name_or_path")
    return path


def fresh_model(config: MoshiTTTConfig, dtype: str, seed: int) -> MoshiTTTForConditionalGeneration:
    """A model with fresh weights, the same for the same seed in every process."""
    set_seed(seed)
    return MoshiTTTForConditionalGeneration(config).to(getattr(torch, dtype))


def raw_config(name: str, what: str, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a model that can be loaded here, as it is written; ValueError, which calls it `what`, where there is none."""
    try:
        raw, _ = MoshiConfig.get_config_dict(name, revision=revision)  # as it stands there, under its own model type
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise MoshiTTTError(f"{what} {name!r}{f' at {revision}' if revision else ''} is missing: {reason}") from None
    check_loadable(raw, name)
    return raw


def _is_plain(raw: dict[str, Any]) -> bool:
    """Whether it is transformers' own Moshi, which loads as it is, with fresh TTT layers."""
    return raw.get("model_type") == MoshiConfig.model_type and "hidden_size" in raw


def _as_ours(raw: dict[str, Any], **fields: Any) -> MoshiTTTConfig:
    return MoshiTTTConfig.from_dict(raw | {"model_type": MoshiTTTConfig.model_type}, **fields)


def check_weights(folder: Path, config: MoshiTTTConfig, base: str) -> None:
    """Refuse a configuration that the adapter's TTT weights do not fit."""
    for name, held in _held_ttt(folder).items():
        _check_same(_TTT[name], held, getattr(config, name), base)


def check_layers(adapter_layers: list[int], base_layers: Any, base: str) -> None:
    if adapter_layers:
        _check_same(_TTT["ttt_layers"], adapter_layers, list(base_layers), base)


def _check_same(what: str, wanted: Any, found: Any, base: str) -> None:
    if wanted != found:
        raise MoshiTTTError(f"the adapter is for {what} {wanted}, its base {base} has {found}: they do not belong together")


def checked_config(folder: Path, base: str, revision: str | None = None) -> MoshiTTTConfig:
    """As `base_config`, compared with the base's own configuration too; no weights of the base are read.

    Fields that the adapter's run set itself may differ, and a base without TTT layers gets fresh ones, which the adapter then fills.
    """
    config, raw = base_config(folder, base, revision), raw_config(base, "the adapter's base", revision)
    own, chosen = _as_ours(raw), set(_run_fields(folder))
    has_ttt = own.ttt_layers and not _is_plain(raw)  # a configuration of ours without the field stands for its default
    named = {name: name for name in _SIZES} | (_TTT if has_ttt else {})
    if base == named_base(folder)[0]:
        named.pop("ttt_mini_batch_size", None)  # base_config.json knows what the run chose for its own base, also without run.json
    for name in [name for name in named if name not in chosen]:
        _check_same(named[name], getattr(config, name), getattr(own, name), base)
    return config


def load_base(folder: Path, base: str | None = None, revision: str | None = None, dtype: Any = "auto") -> MoshiTTTForConditionalGeneration:
    """The base of an adapter, as in `base_config`, whose configuration is compared before any weights are read; ValueError where it differs.

    Fresh weights are made again in the dtype of the run.
    """
    if base is None:
        base, revision = named_base(folder)
    if not base:
        _fresh_start(folder)
        run = adapter_run(folder)
        return fresh_model(base_config(folder, base), run["model"].get("dtype", "float32"), int(run["seed"]))
    config = checked_config(folder, base, revision)
    options: dict[str, Any] = {"revision": revision} if revision else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # fresh TTT layers are the same each time
        return load_model(base, dtype, config=config, **options)


def load_merged(folder: Path, base: str, dtype: Any = "auto") -> Any:
    """The base, with the TTT layers that the adapter needs, and the adapter's weights put into it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(folder, base, dtype=dtype), folder).merge_and_unload()
