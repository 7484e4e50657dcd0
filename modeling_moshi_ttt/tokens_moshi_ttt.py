"""Special tokens and the text stream: the one place that knows their ids, and how timed words are spread over frames.

The ids of text padding are a model's own (`MoshiTTTConfig.text_padding_ids`, and its processor's); Moshi's are the default of both.
"""

import math
from collections.abc import Sequence
from typing import Any

from .errors_moshi_ttt import MoshiTTTError

FRAME_RATE = 12.5  # frames a second
ZERO = -1  # the zero token, where a stream is absent: embeds to exactly zero and is not trained
UNGENERATED = -2  # yet to be generated, or not yet complete
IGNORED = -100  # a label that is not trained
TEXT_PADDING_IDS = (3, 0)  # Moshi's padding (nobody speaks, or a word's tokens are all said), and its end (right before a word)
MAIN_SPEAKER, USER_SPEAKER = "SPEAKER_MAIN", "SPEAKER_USER"  # Moshi and the user in word files
PERSONAPLEX_TONE = (430, 1268, 381, 1611, 1095, 1495, 56, 472)  # Mimi's codes of the tone that PersonaPlex hears while it is prompted
WORD_START = "\u2581"  # begins the first token of a word


def check_padding_ids(ids: Any) -> None:
    """ValueError unless `ids` are two token ids: padding and end of padding."""
    whole = isinstance(ids, (list, tuple)) and all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
    if not whole or len(ids) != 2 or min(ids) < 0:
        raise MoshiTTTError(
            f"`text_padding_ids={ids}` must hold two token ids of 0 or more, of padding and of its end; Moshi's are {[*TEXT_PADDING_IDS]}."
        )


def parse_word(index: int, word: Any) -> tuple[str, float, float, str]:
    """(text, start, end, speaker) of a word in either layout; ValueError naming its number and what is wrong with it."""
    try:
        text, start, end, speaker = word if len(word) == 4 else (word[0], *word[1], word[2])
        start, end = float(start), float(end)
    except (TypeError, ValueError, IndexError, KeyError):
        raise MoshiTTTError(f"words[{index}] is {word!r}; it must be (word, start, end, speaker) with times in seconds.") from None
    if not (isinstance(text, str) and math.isfinite(start) and math.isfinite(end)):
        raise MoshiTTTError(f"words[{index}] is {word!r}; the word must be a string and its times finite seconds.")
    if end < start:
        raise MoshiTTTError(f"words[{index}] is {word!r}; it ends at {end} s, before its start at {start} s. Mend the alignment.")
    return text, start, end, speaker


def text_stream(
    words: Sequence[tuple[Sequence[int], float]],
    n_frames: int,
    frame_rate: float = FRAME_RATE,
    keep_and_shift: bool = False,
    padding_ids: Sequence[int] = TEXT_PADDING_IDS,
) -> list[int]:
    """Spreads the tokens of timed words over frames, by moshi-finetune's rules (interleaver.build_token_stream).

    words: (token ids, start in seconds) in order of start. Every frame takes one token. A word that begins while another is still being
    written replaces what is left of it, or waits behind it when `keep_and_shift`. padding_ids: padding, and the end of padding that
    stands right before a word. Returns n_frames ids. Of words past the last frame nothing remains.
    """
    padding, end_of_padding = padding_ids
    stream = [padding] * n_frames
    pending: list[int] = []
    following = 0
    for t in range(n_frames):
        while following < len(words) and words[following][1] * frame_rate < t + 1:
            tokens = list(words[following][0])
            pending = pending + tokens if keep_and_shift else tokens
            following += 1
        if pending:
            if t > 0 and stream[t - 1] == padding:
                stream[t - 1] = end_of_padding
            stream[t] = pending.pop(0)
    return stream
