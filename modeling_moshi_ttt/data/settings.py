"""What one chooses about recordings: where they come from, what is done with bad ones, and how they are cut into windows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors_moshi_ttt import MoshiTTTError

Carry = Literal["none", "state", "state+attention"]
# What a parquet column is for, and its usual names; "audio_path" and "speaker_to_channel" are MultiTalkFT's.
COLUMNS = {
    "audio": ("audio",),
    "path": ("audio_path", "path"),
    "alignments": ("alignments",),
    "speakers": ("speaker_to_channel",),
}


@dataclass
class DataSettings:
    """Where recordings come from and how they are cut.

    train: "made" draws fresh dialogues, as `dialogues` says, with the codes of phrases kept in the cache.
    train, evaluation: "path:weight,path:weight"; a path is a .jsonl manifest, a .tar shard or .parquet of sounds, a folder of these, or
        hub:owner/name, hub:owner/name/folder or hub:owner/name/file of a data set on the Hub; "dialogues/train" is a packaged one.
    columns: names of parquet columns that are not the usual ones, as in {path: file, alignments: words}; the roles are audio, path,
        alignments and speakers.
    cache: folder of the Mimi codes, encoded once, and of what was downloaded or unpacked; None keeps it in the run folder.
    window_seconds: length of one window.
    carry: what a batch row takes on from window to window ("none": shuffled windows).
    tbptt_windows: windows through which gradients flow before the state is cut from its past.
    batch_size, accumulation: windows of a micro-batch on one process, and micro-batches of a step.
    own_noise, user_noise, text_noise: share of frames whose input is replaced by random codes (text: by padding) while labels stay, and
        with them what the depth decoder is given within a frame.
    user_code_noise: share of the user's single codes that are replaced by random ones, so that a sound is not known by exact codes alone.
    text_weight: what the text loss counts beside the audio loss, in training and in the loss that is logged and chooses the best
        checkpoint.
    on_bad_files: stop with a list of them, or skip them.
    allow_outside: accept absolute paths and '..' in manifests.
    require_words: a recording without words is a bad file.
    workers: processes that read ahead; 0 reads in the training process.
    """

    train: str
    evaluation: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    cache: str | None = None
    window_seconds: float = 100.0
    batch_size: int = 1
    accumulation: int = 1
    carry: Carry = "none"
    tbptt_windows: int = 1
    own_noise: float = 0.0
    user_noise: float = 0.0
    text_noise: float = 0.0
    user_code_noise: float = 0.0
    text_weight: float = 1.0
    on_bad_files: Literal["stop", "skip"] = "stop"
    allow_outside: bool = False
    require_words: bool = False
    workers: int = 0


def check_columns(columns: dict[str, str]) -> None:
    """ValueError for a role that no column has."""
    for role in columns:
        if role not in COLUMNS:
            raise MoshiTTTError(f"data.columns names the role {role!r}; the roles are {', '.join(COLUMNS)}.")
