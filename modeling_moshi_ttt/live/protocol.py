"""Kyutai's live protocol, as `moshi.client` 0.2.13 and the Rust server speak it: binary WebSocket messages, the first byte their kind.

The server sends HANDSHAKE when a row is ready. AUDIO is Ogg Opus both ways (24 kHz, mono), or with `format=pcm` bare little-endian 16-bit
samples; TEXT is UTF-8 pieces of what Moshi says; METADATA is JSON; ERROR is words; a PING is answered with a PING. The caller's CONTROL has
a second byte.
"""

from __future__ import annotations

import hmac
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import sphn

from ..errors_moshi_ttt import MoshiTTTError
from ..sampling_moshi_ttt import MAX_SEED

HANDSHAKE, AUDIO, TEXT, CONTROL, METADATA, ERROR, PING = range(7)
START, END_TURN, PAUSE, RESTART = range(4)  # of a CONTROL
SAVE = 16  # a CONTROL of this server alone
LONGEST_MESSAGE = 1 << 16  # bytes
LONGEST_PROMPT = 1000  # characters

# Kyutai's page sends these with every call: where they ask for nothing, or are its own affair, they are passed over.
NEUTRAL = {"pad_mult": (0.0,), "repetition_penalty": (1.0,)}
PASSED_OVER = {"repetition_penalty_context", "email", "user_feedback", "worker_addr", "worker_auth_id"}
NUMBERS: dict[str, type] = {"seed": int, "text_seed": int, "audio_seed": int, "text_topk": int, "audio_topk": int}
NUMBERS |= {"text_temperature": float, "audio_temperature": float}
OTHERS = ("text_prompt", "voice_prompt", "resume", "format", "stats", "token")


class Unauthorized(MoshiTTTError):
    """The token is missing or wrong."""


@dataclass(frozen=True)
class Call:
    """What a caller asks for in the query."""

    sampling: dict[str, Any]  # of `new_stream`
    text_prompt: str | None
    voice_prompt: str | None
    resume: str | None
    pcm: bool
    stats: bool


def read_query(query: Mapping[str, str], token: str | None, defaults: Mapping[str, Any]) -> Call:
    """What the query of `/api/chat` asks for, over the server's defaults.

    Raises:
        Unauthorized: `token` is not the server's.
        ValueError: an unknown field, or a value out of range.
    """
    if token is not None and not hmac.compare_digest(query.get("token", "").encode(), token.encode()):
        raise Unauthorized("`token` is missing or wrong; open the address with the token that the server was started with.")
    known = [*NUMBERS, *OTHERS, *NEUTRAL, *PASSED_OVER]
    if unknown := sorted(set(query) - set(known)):
        raise MoshiTTTError(f"`{unknown[0]}` is no field of a call; they are {', '.join(sorted([*NUMBERS, *OTHERS]))}.")
    for name, neutral in NEUTRAL.items():
        if name in query and _number(name, query[name], float) not in neutral:
            raise MoshiTTTError(f"`{name}={query[name]}` is not supported; leave it out.")
    if query.get("format", "opus") not in ("opus", "pcm"):
        raise MoshiTTTError(f"`format={query['format']}` must be opus or pcm.")
    if len(query.get("text_prompt", "")) > LONGEST_PROMPT:
        raise MoshiTTTError(f"`text_prompt` has {len(query['text_prompt'])} characters; it may have {LONGEST_PROMPT}.")
    if query.get("resume") and (own := [name for name in (*NUMBERS, "text_prompt", "voice_prompt") if query.get(name)]):
        raise MoshiTTTError(f"`{own[0]}` cannot be given with `resume`: a conversation goes on with its own settings.")
    return Call(
        _sampling(query, defaults),
        query.get("text_prompt") or None,
        query.get("voice_prompt") or None,
        query.get("resume") or None,
        query.get("format") == "pcm",
        query.get("stats") == "1",
    )


def _sampling(query: Mapping[str, str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `new_stream`; as with Kyutai, a temperature of 0 takes the likeliest token."""
    numbers = {name: _number(name, query[name], kind) for name, kind in NUMBERS.items() if query.get(name)}
    found = dict(defaults)
    for name, ours in (("text_temperature", "text_temperature"), ("audio_temperature", "temperature")):
        found |= {ours: numbers[name]} if name in numbers else {}
    for name, ours in (("text_topk", "text_top_k"), ("audio_topk", "top_k")):
        found |= {ours: numbers[name]} if name in numbers else {}
    for temperature, top_k in (("text_temperature", "text_top_k"), ("temperature", "top_k")):
        if found.get(temperature) == 0:
            found |= {temperature: 1.0, top_k: 1}
    seeds = [numbers[name] for name in ("seed", "text_seed", "audio_seed") if name in numbers]  # one serves text and codes
    if seeds:
        if not 0 <= seeds[0] <= MAX_SEED:
            raise MoshiTTTError(f"`seed={seeds[0]}` must be a whole number from 0 to {MAX_SEED}.")
        found["seeds"] = [seeds[0]]
    return found


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise MoshiTTTError(f"`{name}={text[:40]}` must be a {'whole ' if kind is int else ''}number.") from None


def message(kind: int, payload: bytes | str = b"") -> bytes:
    return bytes([kind]) + (payload.encode() if isinstance(payload, str) else payload)


def metadata(**fields: Any) -> bytes:
    return message(METADATA, json.dumps(fields))


class SoundCodec(Protocol):
    """A caller's two directions of sound."""

    def decode(self, data: bytes) -> np.ndarray: ...

    def encode(self, pcm: np.ndarray) -> bytes: ...


class OpusSound:
    """Ogg Opus. What has met bad bytes stays broken: hang up."""

    def __init__(self, sample_rate: int) -> None:
        self._reader, self._writer = sphn.OpusStreamReader(sample_rate), sphn.OpusStreamWriter(sample_rate)

    def decode(self, data: bytes) -> np.ndarray:
        """Samples [n] float32, n from 0.

        Raises:
            ValueError: no Ogg Opus.
        """
        try:
            return self._reader.append_bytes(data)
        except ValueError as error:
            raise MoshiTTTError(f"the sound is no Ogg Opus ({error}); send 24 kHz mono, or bare samples with `format=pcm`.") from None

    def encode(self, pcm: np.ndarray) -> bytes:
        return self._writer.append_pcm(np.clip(pcm, -1, 1))


class PcmSound:
    """Bare samples, for callers that have no Opus."""

    def decode(self, data: bytes) -> np.ndarray:
        """As `OpusSound.decode`."""
        try:
            count = len(data) // 2
            return np.array(struct.unpack(f"<{count}h", data), np.float32) / 32768
        except struct.error:
            raise MoshiTTTError(f"a message holds {len(data)} bytes of sound; send whole 16-bit samples.") from None

    def encode(self, pcm: np.ndarray) -> bytes:
        return np.rint(np.clip(pcm, -1, 1) * 32767).astype("<i2").tobytes()
