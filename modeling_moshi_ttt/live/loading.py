"""A model that is to talk, from a folder or the Hub, with its processor."""

from __future__ import annotations

from typing import Any

import torch

from ..adapters.bases import check_loadable, is_adapter, load_merged
from ..adapters.models import load_model as load_whole
from ..common.files import read_json
from ..common.hub import local_folder
from ..errors_moshi_ttt import MoshiTTTError
from ..processing_moshi_ttt import MoshiTTTProcessor

# What the commands that talk say of these options.
MODEL = "folder or Hub name of a model with its processor, or a run's folder, whose final is taken"
ADAPTER = "folder or Hub name of an adapter to put into it"


def load_model(name: str, adapter_name: str | None, option: str = "--model") -> tuple[Any, Any]:
    """Model and processor, on a GPU where there is one.

    Args:
        name: a folder, a packaged model or a Hub name; `option` is what the command calls it.
        adapter_name: of an adapter to put into it, likewise.

    Raises:
        ValueError: there is no model or no processor, or an adapter stands in a model's place.
    """
    folder = local_folder(name)
    if is_adapter(folder):
        raise MoshiTTTError(f"{option} is {name}, an adapter; give its base as {option} and {name} as --adapter.")
    adapter = local_folder(adapter_name) if adapter_name else None
    if adapter is None:
        check_loadable(read_json(folder / "config.json"), name)
        model: Any = load_whole(folder)
    else:
        model = load_merged(adapter, str(folder))
    own = [place for place in (folder, adapter) if place is not None and (place / "processor_config.json").is_file()]
    if not own:
        raise MoshiTTTError(f"{option} is {name}, which holds no processor (processor_config.json); save it there with save_pretrained.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), MoshiTTTProcessor.from_pretrained(own[0])
