"""Convert a checkpoint: Kyutai's repositories, transformers' Moshi and earlier TTT experiments into this package's layout, this layout into
Kyutai's, and moshi-finetune's LoRA files and PEFT adapters into each other.

SRC is a folder, a .safetensors file or a Hub repository; what it is shows in its files. DST appears whole or not at all. Weights pass
through one at a time: a checkpoint of any size needs little memory.
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor
from transformers import MimiConfig, MimiModel

from ..adapters.bases import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_config, write_base_config
from ..common.checkpoint_files import copy_companions
from ..common.files import atomic_folder, atomic_write, parse_json, read_json
from ..common.hub import hub_errors, is_hub_name
from ..common.run_folder import final_of
from ..common.safetensor_files import DEFAULT_SHARD_SIZE, SINGLE, ShardWriter, TensorFiles, largest
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError, MoshiTTTOSError
from . import old_ttt
from .kyutai_config import MOSHI_7B, kyutai_from_config, published
from .lora import lora_to_peft, peft_config, peft_to_lora
from .mimi import fast_tokenizer, kyutai_mimi, mimi_config, stream_mimi_to_here, stream_mimi_to_kyutai
from .tables import OwnSlices, check_names, config_from_kyutai, moshi_groups, stream_to_here, stream_to_kyutai, ttt_names

KYUTAI_MIMI, KYUTAI_TOKENIZER, KYUTAI_LORA = "tokenizer-mimi.safetensors", "tokenizer_spm.model", "lora.safetensors"
KYUTAI_MIMI_CONFIG = "mimi_config.json"
PUBLISHED_MIMI, PUBLISHED_TOKENIZER = "tokenizer-e351c8d8-checkpoint125.safetensors", "tokenizer_spm_32k_3.model"
KEPT_TTT = "ttt_config.json"  # beside Kyutai's layout with TTT weights: their settings, which its config.json has no place for
CODEC, SENTENCEPIECE = "audio_tokenizer", "tokenizer.model"
CODEC_PREFIX = "audio_encoder."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ONE_FILE = 1 << 62


@dataclass
class Options:
    """What one may choose.

    ttt: fields of MoshiTTTConfig. dtype: of the written weights, theirs unless given. keep_ttt, fused: for Kyutai's layout.
    base: the base model an adapter names. own_codebooks: how many audio codebooks are Moshi's, where the depth transformer has the user's
        too.
    keep_user_slices: keep the depth transformer's slices of the user's codebooks, for training them (`data.user_weight`).
    """

    ttt: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    max_shard_size: int | str = DEFAULT_SHARD_SIZE
    keep_ttt: bool = False
    fused: bool = False
    base: str | None = None
    own_codebooks: int | None = None
    keep_user_slices: bool = False

    def cast(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the dtype asked for; ValueError for weights that are not finite, or are too large for it."""
        for name, tensor in tensors:
            if not tensor.is_floating_point():
                yield name, tensor
                continue
            dtype, most = self.dtype or tensor.dtype, largest(tensor)
            if not math.isfinite(most):
                raise MoshiTTTError(f"{name} holds values that are not finite: the checkpoint is damaged or its training diverged")
            if most > torch.finfo(dtype).max:
                raise MoshiTTTError(f"{name} holds values up to {most:g}, too large for {dtype}; use --dtype bfloat16")
            yield name, tensor.to(dtype)


def find_kind(folder: Path, weights: Path | None) -> str:
    """What a source is: "here", "moshi" (transformers'), "kyutai", "old-ttt", "kyutai-lora" or "peft"."""
    if (folder / ADAPTER_CONFIG).is_file():
        return "peft"
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if weights is None and config.get("model_type") == "moshi_ttt":
        return "here"
    if weights is None and "hidden_size" in config and config.get("model_type") == "moshi":
        return "moshi"
    path = weights or _kyutai_weights(folder, config)
    if path is None:
        kind = config.get("model_type")
        raise MoshiTTTError(f"{folder} holds {f'a model of type {kind!r}' if kind else 'no checkpoint'}: nothing that can be converted")
    names = TensorFiles(path).names
    if any(".lora_A." in name for name in names):
        return "kyutai-lora"
    return "old-ttt" if old_ttt.is_old_ttt(names) else "kyutai"


def _kyutai_weights(folder: Path, config: dict[str, Any]) -> Path | None:
    for name in (config.get("moshi_name", SINGLE), config.get("lora_name") or KYUTAI_LORA, "consolidated.safetensors"):
        if (folder / Path(str(name)).name).is_file():
            return folder / Path(str(name)).name
    return None


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], options: Options | None = None, api: HfApi | None = None) -> str:
    """Convert `src` into the new folder `dst`; returns one sentence saying what was done. `api` is the Hub that `src` may be on.

    Raises ValueError, FileNotFoundError or FileExistsError that says what does not fit; then there is no `dst`.
    """
    options, dst = options or Options(), Path(dst)
    if dst.exists():
        raise MoshiTTTOSError(f"{dst} exists already; choose a new folder")
    source = _local(str(src), api or HfApi())
    folder, weights = (source.parent, source) if source.is_file() else (source, None)
    converter, what, used = CONVERTERS[find_kind(folder, weights)]
    for option in fields(Options):
        if option.name not in used and getattr(options, option.name) != getattr(Options(), option.name):
            named = ", ".join(_flag(name) for name in used)
            raise MoshiTTTError(f"{_flag(option.name)} means nothing for {src}, which is {what} and takes {named}: leave it out")
    with atomic_folder(dst) as out:
        return f"{dst}: {converter(folder, weights, out, options)}"


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _local(src: str, api: HfApi) -> Path:
    """The source on this machine; a Hub repository is fetched into the Hub's cache, without pickles."""
    path = Path(src)
    if path.exists():
        return final_of(path)
    if not is_hub_name(src):
        raise MoshiTTTFileNotFoundError(f"{src}: there is no such file or folder")
    with hub_errors(f"fetching {src}", then="run the same command again to go on"):
        return Path(api.snapshot_download(src, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))


def _lm_kwargs(folder: Path) -> dict[str, Any]:
    return dict(published(read_json(folder / "config.json"))) if (folder / "config.json").is_file() else dict(MOSHI_7B)


def _write_model(out: Path, config: MoshiTTTConfig, tensors: Iterable[tuple[str, Tensor]], options: Options) -> None:
    """Weights, then the configuration, which names their dtype."""
    with ShardWriter(out, options.max_shard_size) as writer:
        writer.add_all(options.cast(tensors))
    config.architectures = ["MoshiTTTForConditionalGeneration"]
    config.dtype = TensorFiles(out).fetch("decoder.lm_head.weight").dtype
    config.save_pretrained(out)


def from_kyutai(folder: Path, weights: Path | None, out: Path, options: Options) -> str:
    """Model, codec and tokenizer of a Kyutai repository, and TTT weights that `to_kyutai` has kept in it."""
    raw = _lm_kwargs(folder)
    kept = read_json(folder / KEPT_TTT) if (folder / KEPT_TTT).is_file() else {}
    config = config_from_kyutai(raw, options.own_codebooks, options.keep_user_slices, **kept | options.ttt)
    files = TensorFiles(weights or _kyutai_weights(folder, raw) or folder / SINGLE)
    own = OwnSlices(files.names, files.fetch, config.num_predicted_codebooks, raw["dep_q"])
    _write_model(out, config, stream_to_here(own.names, own.fetch, config), options)
    said = "Kyutai's Moshi"
    if config.num_codebooks < raw["dep_q"]:
        kept_or_not = "with" if options.keep_user_slices else "without"
        said += f" with {config.num_codebooks} codebooks of its own, {kept_or_not} the depth slices of the user's"
    return f"{said}, {_processor_from_kyutai(folder, raw, out, config)}"


def from_old_ttt(folder: Path, weights: Path | None, out: Path, options: Options) -> str:
    """A Kyutai model with TTT layers of earlier experiments."""
    raw = _lm_kwargs(folder)
    files = TensorFiles(weights or _kyutai_weights(folder, raw) or folder / SINGLE)
    unwrapped = old_ttt.unwrap(files.names)
    ttt: dict[str, Any] = old_ttt.ttt_fields(unwrapped, files.fetch) | options.ttt
    config = config_from_kyutai(raw, **ttt)
    read = old_ttt.reader(unwrapped, files.fetch, config)
    _write_model(out, config, stream_to_here([*unwrapped.names, *unwrapped.absent], read, config), options)
    said = (
        f"; {sorted(unwrapped.absent)[0]} and {len(unwrapped.absent) - 1} more were not there and start neutral" if unwrapped.absent else ""
    )
    processor = _processor_from_kyutai(folder, raw, out, config)
    return f"an earlier TTT checkpoint with layers {unwrapped.layers} ({unwrapped.mixer}), {processor}{said}"


def _processor_from_kyutai(folder: Path, raw: dict[str, Any], out: Path, config: MoshiTTTConfig) -> str:
    """Codec and tokenizer, as far as they are there; says what was found."""
    codec = folder / Path(str(raw.get("mimi_name", PUBLISHED_MIMI))).name
    spm = folder / Path(str(raw.get("tokenizer_name", PUBLISHED_TOKENIZER))).name
    if codec.is_file():
        settings = folder / Path(str(raw.get("mimi_config_name"))).name if raw.get("mimi_config_name") else None
        codec_config = mimi_config(read_json(settings) if settings else None)
        files = TensorFiles(codec)
        _write_codec(out, codec_config, stream_mimi_to_here(files.names, files.fetch, codec_config))
    if spm.is_file():
        shutil.copyfile(spm, out / SENTENCEPIECE)
    if codec.is_file() and spm.is_file():
        _write_processor(out, fast_tokenizer(spm), config)
        return "its codec and its tokenizer"
    found = [word for word, path in (("codec", codec), ("tokenizer", spm)) if path.is_file()]
    return f"its {found[0]} alone, hence without a processor" if found else "without codec and tokenizer, which are not beside it"


def _write_codec(out: Path, config: MimiConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    config.architectures = ["MimiModel"]
    config.save_pretrained(out / CODEC)
    with ShardWriter(out / CODEC, ONE_FILE) as writer:
        writer.add_all(tensors)


def _write_processor(out: Path, tokenizer: Any, config: MoshiTTTConfig) -> None:
    from transformers import EncodecFeatureExtractor

    from ..processing_moshi_ttt import MoshiTTTProcessor

    codec = MimiModel.from_pretrained(out / CODEC, use_safetensors=True)
    extractor = EncodecFeatureExtractor(feature_size=codec.config.audio_channels, sampling_rate=codec.config.sampling_rate)
    processor = MoshiTTTProcessor(extractor, tokenizer, codec, config.num_codebooks, config.text_padding_ids)
    processor.save_pretrained(out)
    processor.complete(config)
    config.save_pretrained(out)


def from_moshi(folder: Path, weights: Path | None, out: Path, options: Options) -> str:
    """transformers' own Moshi: the same names; its codec becomes the processor's."""
    config = MoshiTTTConfig.from_pretrained(folder, **{"ttt_layers": [], **options.ttt})
    files = TensorFiles(folder)
    codec = [name for name in files.names if name.startswith(CODEC_PREFIX)]
    own = [name for name in files.names if not name.startswith(CODEC_PREFIX)]
    check_names(own, [name for group in moshi_groups(config) for name in group.here], "transformers' Moshi")
    _write_model(out, config, ((name, files.fetch(name)) for name in own), options)
    if codec:
        _write_codec(out, MimiConfig(**_codec_fields(folder)), ((name.removeprefix(CODEC_PREFIX), files.fetch(name)) for name in codec))
    copy_companions(folder, out)
    if codec and (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        _write_processor(out, AutoTokenizer.from_pretrained(folder), config)
        return "transformers' Moshi with its processor"
    return "transformers' Moshi, without a processor"


def _codec_fields(folder: Path) -> dict[str, Any]:
    fields = dict(read_json(folder / "config.json").get("audio_encoder_config") or {})
    return {key: value for key, value in fields.items() if key in MimiConfig.__dataclass_fields__}


def to_kyutai(folder: Path, weights: Path | None, out: Path, options: Options) -> str:
    """This package's checkpoint in Kyutai's layout."""
    config, files = MoshiTTTConfig.from_pretrained(folder), TensorFiles(folder)
    names, said = _without_ttt(files, config, options.keep_ttt)
    options = replace(options, dtype=options.dtype or files.fetch("decoder.lm_head.weight").dtype)  # Kyutai's loader reads one file
    with ShardWriter(out, ONE_FILE) as writer:
        writer.add_all(options.cast(stream_to_kyutai(names, files.fetch, config, options.fused)))
    raw = kyutai_from_config(config) | {"model_type": "moshi", "moshi_name": SINGLE}
    if (folder / CODEC).is_dir():
        codec_config, codec = MimiConfig.from_pretrained(folder / CODEC), TensorFiles(folder / CODEC)
        save_file(dict(stream_mimi_to_kyutai(codec.names, codec.fetch, codec_config)), out / KYUTAI_MIMI)
        atomic_write(out / KYUTAI_MIMI_CONFIG, json.dumps(kyutai_mimi(codec_config), indent=2))
        raw |= {"mimi_name": KYUTAI_MIMI, "mimi_config_name": KYUTAI_MIMI_CONFIG}
    if (folder / SENTENCEPIECE).is_file():
        shutil.copyfile(folder / SENTENCEPIECE, out / KYUTAI_TOKENIZER)
        raw["tokenizer_name"] = KYUTAI_TOKENIZER
    if any(name in names for name in ttt_names(config)):
        settings = {key: value for key, value in config.to_dict().items() if key.startswith("ttt_") and key != "ttt_implementation"}
        atomic_write(out / KEPT_TTT, json.dumps(settings, indent=2))
    atomic_write(out / "config.json", json.dumps(raw, indent=2))
    spm = "" if "tokenizer_name" in raw else "; there is no sentencepiece model beside it, so none was written"
    return f"Kyutai's layout{said}{spm}"


def _without_ttt(files: TensorFiles, config: MoshiTTTConfig, keep: bool) -> tuple[list[str], str]:
    """The names to convert: with TTT weights only where that is wished; without them only where they do nothing."""
    ttt = [name for name in files.names if name in set(ttt_names(config))]
    if not ttt:
        return files.names, ""
    if keep:
        return files.names, f" with the {len(ttt)} TTT weights under their own names"
    speaking = [layer for layer in config.ttt_layers if _speaks(files, int(layer))]
    if speaking:
        raise MoshiTTTError(
            f"the TTT layers {speaking} change what the model says (their gates are not 0), and Kyutai's code has no place for them; "
            "keep their weights under their own names with --keep-ttt, or set the gates to 0"
        )
    return [name for name in files.names if name not in set(ttt)], " without the TTT layers, whose gates are 0"


def _speaks(files: TensorFiles, layer: int) -> bool:
    """Whether a TTT layer adds anything: its gate and its output projection are both other than 0."""
    stem = f"decoder.model.layers.{layer}."
    output = any(bool(files.fetch(stem + f"ttt.wo.{kind}").any()) for kind in ("weight", "bias"))
    return output and bool(files.fetch(stem + "ttt_gate.gating_alpha").any())


def from_kyutai_lora(folder: Path, weights: Path | None, out: Path, options: Options) -> str:
    """moshi-finetune's LoRA file as a PEFT adapter."""
    raw = _lm_kwargs(folder)
    config = config_from_kyutai(raw, **options.ttt)
    files = TensorFiles(weights or folder / Path(str(raw.get("lora_name") or KYUTAI_LORA)).name)
    state = {name: files.fetch(name) for name in files.names}
    rank = next(tensor for name, tensor in state.items() if name.endswith("lora_A.weight") and name.startswith("transformer.")).shape[0]
    converted = dict(options.cast(lora_to_peft(state, config).items()))
    save_file(converted, out / ADAPTER_WEIGHTS, {"format": "pt"})
    settings = peft_config(converted, config, rank, float(raw.get("lora_scaling", 2.0)), options.base)
    atomic_write(out / ADAPTER_CONFIG, json.dumps(settings, indent=2))
    write_base_config(out, config)
    missing = "" if options.base else "; it names no base model yet: set base_model_name_or_path, or give --base"
    return f"a PEFT adapter of rank {rank}{missing}"


def from_peft(folder: Path, weights: Path | None, out: Path, options: Options) -> str:
    """A PEFT adapter as moshi-finetune's LoRA file."""
    from ..adapters.checks import read_adapter_config  # it needs PEFT

    settings, config = read_adapter_config(folder), base_config(folder)
    if settings.get("use_rslora") or settings.get("use_dora") or settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise MoshiTTTError(f"{folder / ADAPTER_CONFIG}: rsLoRA, DoRA and ranks that differ by layer have no counterpart in moshi-finetune")
    files, rank = TensorFiles(folder / ADAPTER_WEIGHTS), int(settings["r"])
    state = {name: files.fetch(name) for name in files.names}
    converted = dict(options.cast(peft_to_lora(state, config, rank, options.keep_ttt).items()))
    save_file(converted, out / KYUTAI_LORA)
    new_rank = next(tensor for name, tensor in converted.items() if name.endswith("lora_A.weight")).shape[0]
    raw = kyutai_from_config(config) | {"model_type": "moshi", "lora": True, "lora_name": KYUTAI_LORA, "lora_rank": new_rank}
    raw["lora_scaling"] = settings["lora_alpha"] / rank
    atomic_write(out / "config.json", json.dumps(raw, indent=2))
    return f"a LoRA file of rank {new_rank} for moshi-finetune"


# What a source is: (its converter, its name in messages, the options that mean something for it)
CONVERTERS = {
    "kyutai": (from_kyutai, "a model in Kyutai's layout", ("ttt", "dtype", "max_shard_size", "own_codebooks", "keep_user_slices")),
    "old-ttt": (from_old_ttt, "a model of earlier TTT experiments", ("ttt", "dtype", "max_shard_size")),
    "moshi": (from_moshi, "transformers' Moshi", ("ttt", "dtype", "max_shard_size")),
    "here": (to_kyutai, "a model in this package's layout", ("dtype", "keep_ttt", "fused")),
    "kyutai-lora": (from_kyutai_lora, "a LoRA file of moshi-finetune", ("ttt", "dtype", "base")),
    "peft": (from_peft, "a PEFT adapter", ("dtype", "keep_ttt")),
}


def parse_ttt(given: Iterable[str]) -> dict[str, Any]:
    """["layers=23-31", "mini_batch_size=8"] -> {"ttt_layers": "23-31", "ttt_mini_batch_size": 8}; unknown or repeated fields are refused."""
    settings: dict[str, Any] = {}
    for setting in given:
        name, equals, value = setting.partition("=")
        name = f"ttt_{name}" if f"ttt_{name}" in MoshiTTTConfig.__dataclass_fields__ else name
        if not equals or not name.startswith("ttt_") or name not in MoshiTTTConfig.__dataclass_fields__:
            known = ", ".join(key.removeprefix("ttt_") for key in MoshiTTTConfig.__dataclass_fields__ if key.startswith("ttt_"))
            raise MoshiTTTError(f"--ttt {setting!r} is not understood; write name=value with one of {known}")
        if name in settings:
            raise MoshiTTTError(f"--ttt sets {name.removeprefix('ttt_')} twice, the second time by {setting!r}: leave one of them out")
        try:
            settings[name] = parse_json(value)
        except ValueError:
            settings[name] = value
        if name == "ttt_layers" and isinstance(settings[name], int):
            settings[name] = value  # "5" is the range of one layer
    return settings


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src", metavar="SRC", help="a folder, a .safetensors file, or a Hub repository user/name; of a run's folder, its final"
    )
    parser.add_argument("dst", metavar="DST", help="a new folder")
    parser.add_argument(
        "--ttt", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="TTT settings of the new model, as layers=23-31"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the written weights (default: as they are)")
    parser.add_argument("--max-shard-size", default=DEFAULT_SHARD_SIZE, help="largest weight file (default: %(default)s)")
    parser.add_argument("--keep-ttt", action="store_true", help="into Kyutai's layout: keep TTT weights, under their own names")
    parser.add_argument("--fused", action="store_true", help="into Kyutai's layout: the older one, with joint projections")
    parser.add_argument(
        "--own-codebooks", type=int, help="from Kyutai's layout: audio codebooks that are Moshi's, where dep_q has the user's too"
    )
    parser.add_argument(
        "--keep-user-slices",
        action="store_true",
        help="from Kyutai's layout: keep the user's depth slices, to train them (data.user_weight)",
    )
    parser.add_argument("--base", help="the base model that a converted adapter names")


def run(args: argparse.Namespace) -> int:
    options = Options(
        parse_ttt(args.ttt),
        DTYPES.get(args.dtype),
        args.max_shard_size,
        args.keep_ttt,
        args.fused,
        args.base,
        args.own_codebooks,
        args.keep_user_slices,
    )
    print(convert(args.src, args.dst, options))
    return 0
