"""A conversation in sound: samples of the user in, Moshi's samples and words out, and all of its memory in a folder.

Letters: B rows, n samples at the caller's rate, m of any number of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..common.files import atomic_folder, check_folder, check_manifest, of_shape, read_json, tensors_written, write_manifest
from ..errors_moshi_ttt import MoshiTTTError
from ..frames_moshi_ttt import initial_tokens
from ..mimi_stream import check_samples
from ..resampling import Resampler
from ..rows import active_rows, check_entries, check_names, row_mask, without_gradients
from ..tokens_moshi_ttt import UNGENERATED, WORD_START

FORMAT = 2  # of a saved session; 1, of version 0.2, had no `prompted`
ABOUT, TENSORS = "session.json", "session.safetensors"
PARTS = ("stream", "audio", "sound")  # of a row's state
KEPT = ("heard", "said", "lead", "tokens", "prompted")  # tensors of a row's sound beside its resamplers'
MOST_TOKENS = 4  # of one character, which a tokenizer may write byte by byte
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "architectures")  # fields of a configuration


class SessionFrame(NamedTuple):
    """What a call returns.

    Attributes:
        pcm: `[B, n]` float32 at the session's rate, silence where there is nothing yet.
        text: what was said in this call, a row; the pieces of a row put together are its text.
        valid: `[B]` bool, whether the call completed a frame of the row, and so has new text and sound.
    """

    pcm: Tensor
    text: list[str]
    valid: Tensor


@dataclass
class RowSound:
    """One row between the caller's samples and the codec's frames. Its tensors never change in place."""

    ears: Resampler  # from the caller's rate to the codec's
    mouth: Resampler  # and back
    heard: Tensor  # [m] at the codec's rate, less than a frame
    said: Tensor  # [m] at the caller's rate, not returned yet
    lead: Tensor  # [] int64 samples of silence that were put before what was said
    tokens: Tensor  # [m] int64 text tokens that were not returned yet: of a character that is not whole
    prompted: Tensor  # [] int64 how many of the next frames are the prompt's last ones, which nobody is to hear

    def draft(self) -> RowSound:
        """A copy that goes its own way."""
        return replace(self, ears=copy.copy(self.ears), mouth=copy.copy(self.mouth))

    def take(self, count: int, lead: int) -> Tensor:
        """`[count]` samples of what was said; where that is too little, behind as much silence as makes `lead` in all, or as is needed."""
        if (short := count - len(self.said)) > 0:
            silence = max(short, lead - int(self.lead))
            self.said, self.lead = F.pad(self.said, (silence, 0)), self.lead + silence
        taken, self.said = self.said[:count], self.said[count:]
        return taken

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        rates = {f"{name}.{key}": x for name in ("ears", "mouth") for key, x in getattr(self, name).state_dict().items()}
        return rates | {name: getattr(self, name) for name in KEPT}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on where `tensors` were taken."""
        for name in ("ears", "mouth"):
            getattr(self, name).load_state_dict({key: tensors[f"{name}.{key}"] for key in ("tail", "offset")})
        for name in KEPT:
            setattr(self, name, tensors[name])


class MoshiTTTSession:
    """A batch of conversations in sound with one model: 80 ms or less go in, as many samples come out.

    Call after call the samples in `pcm` are one unbroken sound at `sample_rate`, and so are those that come out. Moshi's frame of the
    same 80 ms as the user's comes out of the call that makes these whole: at the codec's own rate, 24 kHz, and 1920 samples a call at once
    (M - 1 frames later where the model's largest delay M is more than 1). Calls of less than 80 ms come out later by a frame and the
    resamplers' delay, whatever their sizes; where they begin in the middle of a conversation, that much silence is put in between, once.
    The model's first call, which hears nothing, is the session's own. After a `prompt`, which nobody hears, the user's first sound meets
    Moshi's first frame of its own; a row that is [`reset`] begins without it.

    A row depends on nothing but its own past and its seed, and a call that raises has changed nothing.

    Args:
        model: `MoshiTTTForConditionalGeneration`.
        processor: its `MoshiTTTProcessor`, with a codec.
        batch_size: rows.
        sample_rate: of the samples in and out, in Hz.
        sampling: as in the model's `new_stream`, `seeds` and `prompt` among them.

    Raises:
        ValueError: a model and a processor that do not belong together, a rate that is no whole number of Hz or too odd a one, or what
            `new_stream` refuses.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 1, sample_rate: int = 24000, **sampling: Any) -> None:
        processor.check_model(model.config)
        self.processor, self.sample_rate = processor, sample_rate
        self.stream = model.new_stream(batch_size, **sampling)
        self.audio = processor.new_audio_stream(batch_size)
        after = torch.where(self.stream.state.calls > 0, max(model.config.delays), 0).cpu()
        self.sounds = [replace(self._silent(), prompted=count) for count in after]
        self.largest_step = (
            int(sample_rate) * processor.frame_size // processor.sampling_rate
        )  # samples; so that a call is one frame at most
        if self.largest_step < 1:
            raise MoshiTTTError(
                f"`sample_rate={sample_rate}` has no sample in a frame of 80 ms; give the rate of the sound in Hz, as 24000."
            )
        self._before_sound()

    def _silent(self) -> RowSound:
        rates, none, zero = (self.sample_rate, self.processor.sampling_rate), torch.zeros(0), torch.tensor(0)
        return RowSound(Resampler(*rates), Resampler(*rates[::-1]), none, none, zero, none.long(), zero)

    @property
    def longest_delay(self) -> int:
        """By how many samples Moshi's may be later than the user's of the same time: a frame that is not whole, and both resamplers."""
        sound = self.sounds[0]
        return sound.ears.latency - -(self.audio.frame_size - 1 + sound.mouth.latency) * self.sample_rate // self.processor.sampling_rate

    @property
    def batch_size(self) -> int:
        return self.stream.batch_size

    def problems(self) -> dict[int, str]:
        """What is wrong with each sick row, by its number. Such a row is silent until it is [`reset`]."""
        return self.stream.problems()

    @without_gradients
    def step(self, pcm: Tensor, active: Any = None) -> SessionFrame:
        """Hear the next samples of the user, and return as many of Moshi's.

        Args:
            pcm: `[B, n]` float in [−1, 1], at most 80 ms.
            active: `[B]` bool; a row that is not active keeps its whole state, its samples are not looked at, and it says nothing. All rows
                when None.

        Raises:
            ValueError: another shape or dtype, more than 80 ms, or samples of an active row that are not finite or beyond ±10.
        """
        pcm, rows = self._check(pcm, active)
        text, valid = [""] * self.batch_size, torch.zeros(self.batch_size, dtype=torch.bool)
        with self._all_or_nothing():
            hearing = [(sound, piece) for sound, piece, row in zip(self.sounds, pcm.split(1), rows.tolist()) if row]
            for sound, piece in hearing:
                sound.heard = torch.cat([sound.heard, sound.ears.push(piece)[0]])
            ready = torch.tensor([len(sound.heard) >= self.audio.frame_size for sound in self.sounds])
            if bool(ready.any()):
                valid = self._say(ready, self._hear(ready))
                text = [self._take_text(sound) if new else "" for sound, new in zip(self.sounds, valid.tolist())]
            # whole frames need no more silence before them than they lack; pieces of them once as much as is enough for all
            lead = 0 if pcm.shape[1] == self.largest_step else self.longest_delay
            silence = pcm.new_zeros(pcm.shape[1])
            said = torch.stack([sound.take(len(silence), lead) if row else silence for sound, row in zip(self.sounds, rows.tolist())])
        return SessionFrame(said, text, valid)

    def _hear(self, ready: Tensor) -> Tensor:
        """Codes `[B, K]` of the next frame of the rows that have one, `[B]` bool; -1 elsewhere."""
        size, silence = self.audio.frame_size, torch.zeros(self.audio.frame_size)
        frames = []
        for sound, row in zip(self.sounds, ready.tolist()):
            frames.append(sound.heard[:size] if row else silence)
            sound.heard = sound.heard[size:] if row else sound.heard
        return self.audio.encode(torch.stack(frames), ready).to(self.stream.device)

    def _say(self, rows: Tensor, codes: Tensor | None) -> Tensor:
        """One frame of the model in these rows `[B]` bool; returns which of them `[B]` bool have said something."""
        frame = self.stream.step(codes, rows, self._before_delays())
        valid = frame.valid.cpu() & (torch.stack([sound.prompted for sound in self.sounds]) == 0)
        heard = frame.audio_codes.masked_fill(~valid.to(frame.audio_codes.device)[:, None], UNGENERATED)
        waves, text = self.audio.decode(heard, rows).float().cpu(), frame.text.tolist()
        for sound, row in zip(self.sounds, rows.tolist()):
            sound.prompted = (sound.prompted - int(row)).clamp(min=0)
        for row in (valid if codes is None else rows).nonzero()[:, 0].tolist():
            sound = self.sounds[row]
            sound.said = torch.cat([sound.said, sound.mouth.push(waves[row : row + 1])[0]])
            if valid[row] and text[row] not in self.processor.text_padding_ids:
                sound.tokens = torch.cat([sound.tokens, torch.tensor([text[row]])])
        return valid

    def _take_text(self, sound: RowSound) -> str:
        """The text of a row's tokens; none while they only begin a character."""
        tokenizer, tokens = self.processor.tokenizer, sound.tokens.tolist()
        piece = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if not tokens or (piece.endswith("\ufffd") and len(tokens) < MOST_TOKENS):
            return ""
        sound.tokens = sound.tokens[:0]
        return " " + piece if str(tokenizer.convert_ids_to_tokens(tokens[0])).startswith(WORD_START) else piece

    def _before_sound(self) -> None:
        """The call that hears nothing of the user, the first one or the first after a prompt, in the rows that have not had it."""
        state, own = self.stream.state, 1 + self.stream.model.config.num_codebooks
        fresh = ((state.calls == 0) | (state.ahead[:, own:, 0] > UNGENERATED).any(dim=1)).cpu()
        if bool(fresh.any()):
            self._say(fresh, None)

    def _before_delays(self) -> Tensor:
        """`[B, 1 + K]` forced tokens: a codebook says the initial token until its delay has passed, as in `hear` and in training."""
        config, calls = self.stream.model.config, self.stream.state.calls[:, None]
        first = initial_tokens(config, calls.device)[: 1 + config.num_codebooks, 0]
        return torch.where(calls < calls.new_tensor(config.delays[: len(first)]), first, UNGENERATED)

    @without_gradients
    def reset(self, rows: Sequence[int] | Tensor | None = None, seeds: Any = None) -> None:
        """Start these rows (indices, or a bool tensor; all when None) as new conversations; the others go on undisturbed.

        Raises:
            ValueError: a row that does not exist, a mask of another length, or seeds as the stream's `reset` refuses them.
        """
        chosen = row_mask(range(self.batch_size) if rows is None else rows, self.batch_size, self.stream.device)
        with self._all_or_nothing():
            self.stream.reset(chosen, seeds)
            self.audio.reset(chosen)
            for row in chosen.nonzero()[:, 0].tolist():
                self.sounds[row] = self._silent()
            self._before_sound()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put everything back where the block raises. One frame at most may lie in it: a second one takes a slot that the first still
        needs.
        """
        audio, stream, sounds = self.audio.states, self.stream, [sound.draft() for sound in self.sounds]
        before = stream.state, stream.sampling, stream.past_key_values.state
        try:
            yield
        except BaseException:
            self.audio.states, self.sounds = audio, sounds
            stream.state, stream.sampling, stream.past_key_values.state = before
            raise

    def _check(self, pcm: Any, active: Any) -> tuple[Tensor, Tensor]:
        """The samples `[B, n]` float32 on the host, and the active rows `[B]` bool."""
        cpu = torch.device("cpu")
        rows = torch.ones(self.batch_size, dtype=torch.bool) if active is None else active_rows(active, self.batch_size, cpu)
        pcm = torch.as_tensor(pcm)
        if pcm.dim() != 2 or len(pcm) != self.batch_size or not 1 <= pcm.shape[1] <= self.largest_step:
            wanted = f"({self.batch_size}, 1 to {self.largest_step}), rows and samples of 80 ms at most at {self.sample_rate} Hz"
            raise MoshiTTTError(f"`pcm` has shape {tuple(pcm.shape)}; it must be {wanted}.")
        check_samples("`pcm`", pcm, rows)
        return pcm.detach().to(cpu, torch.float32), rows

    # A row, and a folder

    def row_state(self, row: int) -> dict[str, Tensor]:
        """One conversation as tensors by name; [`load_row`] takes it up in any row of any session of the same model and rate.

        Raises:
            ValueError: a row that does not exist, or one that is sick.
        """
        parts = dict(zip(PARTS, (self.stream.row_state(row), self.audio.row_state(row), self.sounds[row].tensors())))
        state = {f"{part}.{name}": tensor.clone() for part, tensors in parts.items() for name, tensor in tensors.items()}
        return state | {"sample_rate": torch.tensor(self.sample_rate)}

    @without_gradients
    def load_row(self, row: int, state: dict[str, Tensor]) -> None:
        """Let a row go on where [`row_state`] was taken. What is refused leaves the session as it was.

        Raises:
            ValueError: a row that does not exist, a state of another rate or model, or one that is not whole or that no session was in.
        """
        parts = {part: {name.removeprefix(f"{part}."): x for name, x in state.items() if name.startswith(f"{part}.")} for part in PARTS}
        check_names("row", state, ["sample_rate", *(f"{part}.{name}" for part, tensors in parts.items() for name in tensors)])
        if int(state["sample_rate"]) != self.sample_rate:
            raise MoshiTTTError(
                f"the row has `sample_rate={int(state['sample_rate'])}`, the session {self.sample_rate}; load it into one of its rate."
            )
        sound = self._silent()
        self._load_sound(sound, {name: tensor.to("cpu", copy=True) for name, tensor in parts["sound"].items()})
        with self._all_or_nothing():
            self.stream.load_row(row, parts["stream"])
            self.audio.load_row(row, parts["audio"])
            self.sounds[row] = sound

    def _load_sound(self, sound: RowSound, tensors: dict[str, Tensor]) -> None:
        """Let a silent row's sound go on where `tensors` were taken; ValueError unless that was in a session of this rate."""
        own = sound.tensors()
        check_names("row", tensors, own)
        longest = {"heard": self.audio.frame_size - 1, "said": self.longest_delay + 2 * self.largest_step, "tokens": MOST_TOKENS}
        sizes = {name: (min(tensors[name].numel(), most),) for name, most in longest.items()} | {"lead": (), "prompted": ()}
        check_entries("row", tensors, {name: (size, own[name].dtype) for name, size in sizes.items()})
        config, tokens = self.stream.model.config, tensors["tokens"]
        numbers = ((tokens >= 0) & (tokens < config.vocab_size)).all() and 0 <= tensors["prompted"] <= max(config.delays)
        if not bool(numbers and tensors["heard"].isfinite().all() and tensors["said"].isfinite().all()):
            raise MoshiTTTError("the sound or text of the saved row is what no session has; load what `row_state()` gave, unchanged.")
        sound.load(tensors)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the whole session into a folder, which appears whole or not at all; an earlier session there is replaced.

        Raises:
            ValueError: a row that is sick, or a folder that holds something else.
            OSError: the folder cannot be written.
        """
        check_folder(folder, ABOUT)
        seeds = self.stream.state.seeds.tolist() if self.stream.seeded else None
        write_session(folder, [self.row_state(row) for row in range(self.batch_size)], seeds, belongs_to(self.stream.model, self.processor))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any, processor: Any) -> MoshiTTTSession:
        """The session that [`save`] wrote, which goes on bit-equal: with as many rows, at its rate, with its seeds and settings.

        Raises:
            ValueError: the folder is not whole, of another format, or of another model or codec.
        """
        saved = read_session(folder, belongs_to(model, processor))
        session = cls(model, processor, len(saved.rows), saved.sample_rate, seeds=saved.seeds)
        for row, state in enumerate(saved.rows):
            session.load_row(row, state)
        return session


class SavedSession(NamedTuple):
    """What a folder of a session holds."""

    rows: list[dict[str, Tensor]]  # as `row_state` gave them
    sample_rate: int
    seeds: list[int] | None  # None where they were drawn


def write_session(
    folder: str | os.PathLike[str], rows: Sequence[dict[str, Tensor]], seeds: list[int] | None, owner: dict[str, str]
) -> None:
    """Write rows, as `row_state` gave them, as a session of `owner` (see [`belongs_to`]); no model is needed for it.

    Raises:
        OSError: the folder cannot be written.
    """
    tensors = {f"{row}.{name}": x.cpu().contiguous() for row, state in enumerate(rows) for name, x in state.items()}
    about = {"format": FORMAT, "batch_size": len(rows), "sample_rate": int(rows[0]["sample_rate"]), "seeds": seeds}
    with atomic_folder(folder) as place:
        with tensors_written(folder):
            save_file(tensors, place / TENSORS)
        (place / ABOUT).write_text(json.dumps(about | owner, indent=1) + "\n")
        write_manifest(place)


def read_session(folder: str | os.PathLike[str], owner: dict[str, str]) -> SavedSession:
    """What [`write_session`] wrote.

    Raises:
        ValueError: the folder is not whole, of another format, or of another owner than this one.
    """
    if not (Path(folder) / ABOUT).is_file():
        raise MoshiTTTError(f"{folder} holds no {ABOUT}; name a folder that a session was saved to.")
    if problems := check_manifest(folder):
        raise MoshiTTTError(f"the session in {folder} is not whole: {problems[0]}")
    about = read_json(Path(folder) / ABOUT)
    with of_shape(f"{folder}/{ABOUT}", "name a folder that a session was saved to."):
        if about["format"] not in (1, FORMAT):
            raise MoshiTTTError(f"`format={about['format']}` must be 1 or {FORMAT}")
        rows, rate, seeds = int(about["batch_size"]), int(about["sample_rate"]), about["seeds"]
    for what, digest in owner.items():
        if about.get(what) != digest:
            raise MoshiTTTError(f"the session in {folder} is of another {what} ({about.get(what)}, here {digest}); load it with its own.")
    tensors = load_file(Path(folder) / TENSORS)
    added = {"sound.prompted": torch.tensor(0)} if about["format"] == 1 else {}
    states = [
        added | {name.partition(".")[2]: x for name, x in tensors.items() if name.partition(".")[0] == str(row)} for row in range(rows)
    ]
    return SavedSession(states, rate, seeds)


def belongs_to(model: Any, processor: Any) -> dict[str, str]:
    """Digests of the model and the codec that a session needs to go on."""
    return {"model": _digest(model), "codec": _digest(processor.codec)}


def _digest(module: Any, values: int = 16) -> str:
    """A digest of a model's configuration and of some values of every weight, which tells it from any other training of its kind."""
    told = json.dumps(module.config.to_diff_dict(), default=str)
    config = json.loads(told, object_hook=lambda fields: {name: x for name, x in fields.items() if name not in NOT_THE_MODEL})
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in module.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        if not weight.is_meta:  # as offloaded weights are
            some = weight.detach().flatten()[:: max(weight.numel() // values, 1)][:values]
            digest.update(some.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
