"""Which files of a checkpoint's folder belong to the checkpoint. Everything else there is somebody's own, and is not carried along."""

import re
import shutil
from pathlib import Path

from ..errors_moshi_ttt import MoshiTTTError

# What `save_pretrained` and `convert` write beside weights and configuration: generation settings, processor, tokenizer, codec.
COMPANIONS = re.compile(
    r"generation_config\.json|processor_config\.json|preprocessor_config\.json|chat_template\.jinja"
    r"|tokenizer\.json|tokenizer_config\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.json|vocab\.txt|merges\.txt"
    r"|audio_tokenizer/(config\.json|preprocessor_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json)"
)
# What is read otherwise, and written anew where a checkpoint is staged: weights, configurations, code, card, what a run says of itself.
OWN = re.compile(
    r"(adapter_)?config\.json|base_config\.json|(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|manifest\.json|(probe/)?probe\.safetensors|README\.md|\.gitattributes|card\.json|loss\.png|pictures/[^/]+\.png"
    r"|training_summary\.json|run\.json|run_config\.json|results\.json|[a-z0-9_]+\.py"
)


def companions(folder: Path) -> list[str]:
    """Names of the files beside the weights that belong to a checkpoint."""
    return [name for name in _files(folder) if COMPANIONS.fullmatch(name)]


def left_out(folder: Path) -> list[str]:
    """Names of the files that belong to no checkpoint."""
    return [name for name in _files(folder) if not COMPANIONS.fullmatch(name) and not OWN.fullmatch(name)]


def _files(folder: Path) -> list[str]:
    """Links to folders are not followed, and count as one file each."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def check_links(folder: Path) -> None:
    """Links may stay in a checkpoint's folder, or lead to the blobs of a snapshot in the Hub's cache; hidden files are nobody's concern.

    Raises:
        MoshiTTTError: another one leads elsewhere; the message names both ends.
    """
    place = folder.resolve()
    homes = [place] + ([place.parents[1] / "blobs"] if place.parent.name == "snapshots" else [])
    for name in _files(folder):
        end, hidden = (folder / name).resolve(), name.startswith(".") or "/." in name
        if not hidden and not any(end.is_relative_to(home) for home in homes):
            raise MoshiTTTError(f"{folder / name} is a link to {end}, outside its folder; put the file itself there, or remove the link")


def copy_companions(folder: Path, target: Path) -> None:
    """Copy what belongs beside the weights, links as the files they lead to; what `target` has already stays.

    Raises:
        MoshiTTTError: as `check_links`.
    """
    check_links(folder)
    for name in companions(folder):
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)
