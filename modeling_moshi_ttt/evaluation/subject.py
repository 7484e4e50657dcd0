"""The model that is evaluated: loaded at first use, and told from others by a fingerprint."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..adapters.bases import check_loadable, checked_config, is_adapter, load_merged
from ..adapters.models import load_model
from ..common.files import read_json, sha256
from ..common.hub import local_folder
from ..common.settings import Count, Seed, settings_group
from ..errors_moshi_ttt import MoshiTTTError
from ..processing_moshi_ttt import MoshiTTTProcessor


@settings_group
class ModelSettings:
    """The model, and what holds for every evaluation of it."""

    output: Path = Path("runs/evaluate")
    """Folder of the report, of results.json and of the pictures."""
    model: str | None = None
    """Folder or Hub name of the model, or a run's folder, whose final is taken."""
    adapter: str | None = None
    """A PEFT folder, a run's or a Hub name, to be put into the model."""
    device: str = "auto"
    """A device: auto (a GPU where there is one), cpu, cuda, or one of several by its number, as in cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""
    batch_size: Count = 16
    """Recordings that are scored at once."""
    seed: Seed = 0
    """Seed of what is drawn: answers, shuffled windows, resamples for the intervals."""


class Subject:
    """The model under evaluation, loaded at first use, and its fingerprint. ValueError where its settings cannot be."""

    def __init__(self, settings: ModelSettings) -> None:
        self.settings = settings
        self.folder = local_folder(settings.model) if settings.model else None
        self.adapter = local_folder(settings.adapter) if settings.adapter else None
        self.device = _device(settings.device)
        if self.folder is not None and is_adapter(self.folder):  # transformers would load another model in silence, the adapter's base
            raise MoshiTTTError(
                f"{self.folder} is an adapter, no whole model; give model=BASE adapter={self.folder}, or merge the two first."
            )
        self.config = self._config() if self.folder is not None else {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and contents of the weights and configurations of model and adapter, and the TTT settings in effect."""
        digest = hashlib.sha256(self.settings.dtype.encode())
        if self.adapter is not None:
            digest.update(json.dumps(self.ttt, sort_keys=True).encode())
        for folder in (self.folder, self.adapter):
            files = [] if folder is None else sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
            for path in files:
                digest.update(f"{path.relative_to(folder)} {sha256(path)}\n".encode())  # type: ignore[arg-type]
        return digest.hexdigest()

    def load(self) -> tuple[Any, Any]:
        """(model, processor); ValueError where they do not belong together."""
        self._processor.check_model(self.model.config)
        return self.model, self._processor

    @cached_property
    def model(self) -> Any:
        """The model on its device, the adapter merged into it."""
        dtype = getattr(torch, self.settings.dtype)
        if self.adapter is None:
            model: Any = load_model(str(self.folder), dtype)
        else:
            model = load_merged(self.adapter, str(self.folder), dtype)
        return model.to(self.device).eval()

    @cached_property
    def _processor(self) -> Any:
        """From the model's folder, or the adapter's where only that has a processor, as on a plain base."""
        both = [folder for folder in (self.folder, self.adapter) if folder is not None and (folder / "processor_config.json").is_file()]
        return MoshiTTTProcessor.from_pretrained(str(both[0] if both else self.folder))

    @property
    def ttt(self) -> dict[str, Any]:
        """The TTT settings in effect."""
        return {key: value for key, value in self.config.items() if key.startswith("ttt_")}

    def _config(self) -> dict[str, Any]:
        """The configuration in effect: an adapter may bring TTT layers that its base lacks. ValueError where the two do not fit."""
        if self.adapter is not None:
            return dict(json.loads(checked_config(self.adapter, str(self.folder)).to_json_string(use_diff=False)))
        config = read_json(self.folder / "config.json")  # type: ignore[operator]
        check_loadable(config, str(self.folder))
        return config

    def about(self) -> dict[str, Any]:
        if self.folder is None:
            return {"name": "no model", "fingerprint": "", "ttt": {}}
        name = f"{self.settings.model}" + (f" with {self.settings.adapter}" if self.settings.adapter else "")
        return {"name": name, "fingerprint": self.digest, "ttt": self.ttt}


def _device(name: str) -> str:
    """The device by its name, after a first number on it; ValueError where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        raise MoshiTTTError(
            f"device is {name!r}, which cannot be used here ({str(error).splitlines()[0]}); give auto, cpu or cuda."
        ) from None
    return name
