"""What one chooses about recordings: where they come from, what is done with bad ones, and how they are cut into windows."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ..common.settings import Count, CountOrZero, Flag, NotNegative, Number, Share, settings_group
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER
from .words import Policy

Carry = Literal["none", "state", "state+attention", "state+next"]
# What a parquet column is for, and its usual names; "audio_path" and "speaker_to_channel" are MultiTalkFT's.
COLUMNS = {
    "audio": ("audio",),
    "path": ("audio_path", "path"),
    "alignments": ("alignments",),
    "speakers": ("speaker_to_channel",),
}


def check_columns(columns: dict[str, str]) -> dict[str, str]:
    """The columns as they are; MoshiTTTError for a role that no column has."""
    for role in columns:
        if role not in COLUMNS:
            raise MoshiTTTError(f"must be named by their roles, {', '.join(COLUMNS)}; {role!r} is none.")
    return columns


@settings_group
class DataSettings:
    """Where recordings come from and how they are cut."""

    train: str
    """Recordings, as "path:weight,path:weight"; a path is a .jsonl manifest, a .tar shard or .parquet of sounds, a folder of these, or
    hub:owner/name, hub:owner/name/folder or hub:owner/name/file of a data set on the Hub; "dialogues/train" is a packaged one. "made" draws
    fresh dialogues, as `dialogues` says, with the codes of phrases kept in the cache."""
    evaluation: str | None = None
    """Held-out recordings, given as those of `train`."""
    columns: Annotated[dict[str, str], AfterValidator(check_columns)] = field(default_factory=dict)
    """Names of parquet columns that are not the usual ones, as in {path: file, alignments: words}; the roles are audio, path, alignments
    and speakers."""
    cache: str | None = None
    """Folder of the Mimi codes, encoded once, and of what was downloaded or unpacked; None keeps it in the run folder."""
    window_seconds: Annotated[Number, Field(ge=0.08)] = 100.0
    """Length of one window."""
    batch_size: Count = 1
    """Windows of a micro-batch on one process."""
    accumulation: Count = 1
    """Micro-batches of a step."""
    carry: Carry = "none"
    """What a batch row takes on from window to window ("none": shuffled windows). "state+next" takes the fast weights on into the next
    recording as well, so that a memory learns to live with what others have written."""
    next_share: Share = 0.75
    """Share of the recordings that begin with the fast weights of the one before, with carry "state+next"."""
    tbptt_windows: Count = 1
    """Windows through which gradients flow before the state is cut from its past."""
    own_noise: Share = 0.0
    """Share of frames of Moshi's own codes that are replaced by random ones while labels stay, and with them what the depth decoder is given
    within a frame."""
    user_noise: Share = 0.0
    """Share of frames of the user's codes that are replaced by random ones."""
    text_noise: Share = 0.0
    """Share of frames of text that are replaced by padding while labels stay."""
    user_code_noise: Share = 0.0
    """Share of the user's single codes that are replaced by random ones, so that a sound is not known by exact codes alone."""
    text_weight: NotNegative = 1.0
    """What the text loss counts beside the audio loss, in training and in the loss that is logged and chooses the best checkpoint."""
    user_weight: NotNegative = 0.0
    """What the user's codebooks weigh in the audio loss, as a factor of what Moshi's own weigh; above 0 only for a model whose depth decoder
    predicts them (`moshi-ttt convert --keep-user-slices`)."""
    on_bad_files: Literal["stop", "skip"] = "stop"
    """Stop with a list of them, or skip them."""
    allow_outside: Flag = False
    """Accept absolute paths and '..' in manifests."""
    require_words: Flag = False
    """A recording without words is a bad file."""
    words: Policy = "repair"
    """What is done with odd words. "repair" interpolates missing times, clamps times to the recording, splits words with spaces inside and
    drops what cannot be mended, and counts it; "refuse" takes a file with an odd word for a bad file; "keep" leaves them as they are."""
    words_files: str = ""
    """Where the words of a sound are, from its folder on, with {stem} for its name, as in "../text/{stem}.json"; "" looks beside the sound,
    and for a sound below audio/ below text/, for a .json, .ctm or .TextGrid of its name."""
    main_speaker: str = MAIN_SPEAKER
    """The label of Moshi's words."""
    mono_is: Literal["moshi", "user"] | None = None
    """Whose voice a mono recording is, "moshi" or "user", the other being absent; null refuses mono recordings."""
    workers: CountOrZero = 0
    """Processes that read ahead; 0 reads in the training process."""
