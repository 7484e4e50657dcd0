"""MoshiTTTProcessor: recordings and words in, aligned frames out, and back to sound and text.

Letters: B rows, T frames of 80 ms, n samples, K codebooks.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, MimiConfig, MimiModel, ProcessorMixin

from .errors_moshi_ttt import MoshiTTTError, os_errors_as_ours
from .mimi_stream import MimiStream, check_codes
from .resampling import resample
from .stored_config_moshi_ttt import check_codec
from .tokens_moshi_ttt import IGNORED, MAIN_SPEAKER, TEXT_PADDING_IDS, WORD_START, ZERO, check_padding_ids, parse_word, text_stream
from .versions_moshi_ttt import check_transformers

# Streams of a batch: their number of dimensions in one recording, frames last, and what stands past its end.
STREAMS = {"input_ids": (1, ZERO), "moshi_audio_codes": (2, ZERO), "user_audio_codes": (2, ZERO)}
STREAMS |= {"text_labels": (1, IGNORED), "audio_labels": (2, IGNORED), "attention_mask": (1, 0)}
AUTO_MAP = {"AutoProcessor": "processing_moshi_ttt.MoshiTTTProcessor"}

check_transformers()  # a processor may load without the model's configuration


class MoshiTTTProcessor(ProcessorMixin):
    """Turns recordings and timed words into aligned frames for MoshiTTT, and frames back into sound and text.

    feature_extractor: Mimi's EncodecFeatureExtractor. tokenizer: a fast tokenizer whose pieces begin words with "\u2581". audio_tokenizer:
    a MimiModel, or the Hub name of one ("kyutai/mimi"). num_codebooks: how many of its codebooks the model speaks. text_padding_ids: the
    model's (`MoshiTTTConfig.text_padding_ids`), padding and end of padding; Moshi's when None.

    `save_pretrained` writes everything into one folder, the codec under `audio_tokenizer/`; `from_pretrained` (also AutoProcessor's)
    reads it back.
    """

    _auto_class = "AutoProcessor"  # saved processors carry the code
    CODEC_FOLDER = "audio_tokenizer"
    LONGEST_PIECE = 125  # frames encoded or decoded at once; memory does not grow with the recording
    SPOKEN_PACE = 3.0  # words a second of a text without times
    MARKED_SHARE = 0.1  # of a vocabulary's pieces that begin a word; with fewer, the language is one without spaces

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        audio_tokenizer: Any = None,
        num_codebooks: int = 8,
        text_padding_ids: Sequence[int] | None = None,
    ) -> None:
        if isinstance(audio_tokenizer, str):
            audio_tokenizer = MimiModel.from_pretrained(audio_tokenizer, use_safetensors=True)
        super().__init__(feature_extractor, tokenizer)  # type: ignore[no-untyped-call]
        self.num_codebooks = num_codebooks
        self.text_padding_ids = [*(TEXT_PADDING_IDS if text_padding_ids is None else text_padding_ids)]
        check_padding_ids(self.text_padding_ids)
        self._silence: list[list[int]] | None = None  # found out when first asked for
        self._marks: tuple[Any, int | None] | None = None  # so, too: the tokenizer, and the token of `_bare_start`
        self.audio_tokenizer = audio_tokenizer  # set here, for ProcessorMixin admits only the codecs that it lists
        if audio_tokenizer is not None:
            audio_tokenizer.eval()
            self._check_codec(audio_tokenizer)

    def _check_codec(self, codec: MimiModel) -> None:
        config = codec.config
        if config.sampling_rate != self.feature_extractor.sampling_rate:
            raise MoshiTTTError(
                f"audio_tokenizer works at {config.sampling_rate} Hz, feature_extractor at {self.feature_extractor.sampling_rate} Hz; "
                "take both from one checkpoint."
            )
        if not 1 <= self.num_codebooks <= config.num_quantizers:
            raise MoshiTTTError(f"num_codebooks is {self.num_codebooks}; the audio_tokenizer has 1 to {config.num_quantizers}.")

    @property
    def codec(self) -> MimiModel:
        """The audio tokenizer; ValueError when this processor was made without one."""
        if self.audio_tokenizer is None:
            raise MoshiTTTError('this processor has no audio_tokenizer; load one with from_pretrained(..., audio_tokenizer="kyutai/mimi").')
        codec: MimiModel = self.audio_tokenizer
        return codec

    @property
    def sampling_rate(self) -> int:
        return int(self.feature_extractor.sampling_rate)

    @property
    def frame_size(self) -> int:
        """Samples a frame: 1920."""
        return self.codec.config.frame_size

    @property
    def frame_rate(self) -> float:
        """Frames a second: 12.5."""
        return self.sampling_rate / self.frame_size

    # Sound and words to frames

    def __call__(
        self,
        audio: Any = None,
        sampling_rate: int | None = None,
        words: Sequence[Any] | None = None,
        *,
        chunk_start: float = 0.0,
        chunk_end: float | None = None,
        mono_is: str = "moshi",
        main_speaker: str = MAIN_SPEAKER,
        keep_and_shift: bool = False,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **others: Any,
    ) -> BatchFeature:
        """Aligned frames of one recording or a list of them; or, of `text`, what Moshi is to say (see [`spoken_text`]).

        audio: float [n] or [channels, n] in [−1, 1]; left channel Moshi, right channel the user. A mono recording is Moshi's or the user's
        by `mono_is` ("moshi" | "user"); the other stream is then absent (−1). words: (word, start, end, speaker) or moshi-finetune's
        [word, [start, end], speaker], in seconds from the recording's start; for a list of recordings one such list each. Words of
        `main_speaker` make the text stream; without words (None) it is absent; an empty list means that nobody speaks.
        chunk_start, chunk_end: the window, in seconds; without an end, to the recording's end. Frames past it are absent in every stream.
        return_tensors: "pt", as without it, or "np". others: what transformers' pipelines give beside these (images, videos, padding); None
        or True, or it is refused.

        Returns input_ids [B, T], moshi_audio_codes and user_audio_codes [B, K, T], text_labels [B, T] and audio_labels [B, K, T] (−100
        where absent, hence not trained), and, only when rows differ in length, attention_mask [B, T].

        Raises ValueError for audio that is empty, not finite, not float or of more than two channels, for words with end < start or times
        that are no numbers, and for text that the tokenizer cannot encode.
        """
        _refuse_arguments(return_tensors, others)
        if text is None and sampling_rate is None and _is_text(audio):
            audio, text = None, audio  # text comes first in transformers' processors
        if text is not None:
            if audio is not None:
                raise MoshiTTTError("`text` and `audio` exclude each other; give the words of a recording with their times as `words`.")
            return _as(self.spoken_text(text), return_tensors)
        if audio is None:
            raise MoshiTTTError("audio is missing; give samples as float [n] or [channels, n].")
        single = not isinstance(audio, (list, tuple))
        recordings = [audio] if single else list(audio)
        spoken = [words] if single else (list(words) if words is not None else [None] * len(recordings))
        if not recordings or len(recordings) != len(spoken):
            raise MoshiTTTError(
                f"audio holds {len(recordings)} recordings and words {len(spoken)} lists; give as many of each, at least one."
            )
        if mono_is not in ("moshi", "user"):
            raise MoshiTTTError(f"mono_is is {mono_is!r}; it says whose voice a mono recording is: 'moshi' or 'user'.")
        waves = [self._window(self._wave(one, sampling_rate), chunk_start, chunk_end) for one in recordings]
        lengths = [math.ceil(wave.shape[-1] / self.frame_size) for wave in waves]
        total = max(lengths) if chunk_end is None else math.ceil((chunk_end - chunk_start) * self.frame_rate - 1e-6)
        moshi, user = self._codes(waves, lengths, total, mono_is)
        window = (chunk_start, chunk_start + total / self.frame_rate if chunk_end is None else chunk_end)
        frames = torch.full((len(waves), total), ZERO)
        for row, (one, length) in enumerate(zip(spoken, lengths, strict=True)):
            if one is not None:
                stream = self.text_frames(one, length, *window, main_speaker=main_speaker, keep_and_shift=keep_and_shift)
                frames[row, :length] = torch.tensor(stream)
        return _as(self._features(frames, moshi, user, lengths, total), return_tensors)

    def spoken_text(self, text: str | Sequence[str]) -> BatchFeature:
        """Frames in which Moshi's text is given and its codes are to be generated, while the user is silent; what `generate` says aloud.

        Words come at `SPOKEN_PACE`, and shorter texts are followed by padding. Beside the frames [B, T] the batch holds `decode_audio`,
        with which `generate` gives sound as well. ValueError for a text without words, or one that the tokenizer cannot encode.
        """
        texts = [text] if isinstance(text, str) else list(text)
        spoken = [
            [(word, i / self.SPOKEN_PACE, (i + 1) / self.SPOKEN_PACE, MAIN_SPEAKER) for i, word in enumerate(one.split())] for one in texts
        ]
        if not all(spoken):
            raise MoshiTTTError(f"`text={text!r}` holds no words; give at least one in each.")
        total = max(math.ceil(len(words) / self.SPOKEN_PACE * self.frame_rate) for words in spoken)
        ids = torch.tensor([self.text_frames(words, total, keep_and_shift=True) for words in spoken])
        absent = torch.full((len(texts), self.num_codebooks, total), ZERO)
        silence = self._repeated(self.silence_codes()[-1], total).expand(len(texts), -1, -1)
        return BatchFeature({"input_ids": ids, "moshi_audio_codes": absent, "user_audio_codes": silence, "decode_audio": self.decode_audio})

    def prompt(
        self,
        voice: Any = None,
        sampling_rate: int | None = None,
        text: str | None = None,
        *,
        silence: float = 0.5,
        user_codes: Sequence[int] | None = None,
    ) -> BatchFeature:
        """Frames for `new_stream(prompt=...)` that give Moshi a voice and a persona before the talk, as PersonaPlex steps them
        (NVIDIA/personaplex, `LMGen.step_system_prompts`): the voice in Moshi's channel, silence, the text one token a frame over silence,
        silence.

        voice: float [n] in [-1, 1] at `sampling_rate`. text: the persona; PersonaPlex's are trained as "<system> ... <system>".
        silence: seconds, in whole frames, after each of the two. user_codes: [K] what the user's channel holds meanwhile, every frame; the
        codec's silence when None, a tone (`PERSONAPLEX_TONE`) for PersonaPlex.

        Returns input_ids [1, P], moshi_audio_codes and user_audio_codes [1, K, P]. Raises ValueError where neither is given, or as a call
        does.
        """
        if voice is None and not text:
            raise MoshiTTTError("`prompt` has nothing to begin with; give `voice`, `text`, or both.")
        quiet, pause = self.silence_codes()[-1], int(silence * self.frame_rate)
        padding, codes, ids = self.text_padding_ids[0], [], []
        if voice is not None:
            wave = self._wave(voice, sampling_rate)
            if len(wave) != 1:
                raise MoshiTTTError(f"`voice` has {len(wave)} channels; give the one that holds Moshi's voice.")
            codes += [self.encode_audio(wave), self._repeated(quiet, pause)]
            ids += [padding] * (codes[0].shape[-1] + pause)
        if text:
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            codes.append(self._repeated(quiet, len(tokens) + pause))
            ids += [*tokens, *[padding] * pause]
        user = self._repeated(quiet if user_codes is None else user_codes, len(ids))
        return BatchFeature({"input_ids": torch.tensor([ids]), "moshi_audio_codes": torch.cat(codes, -1), "user_audio_codes": user})

    def silence_codes(self) -> list[list[int]]:
        """The codec's codes of silence after its first frame, [frames][K], up to where they repeat: `MoshiTTTConfig.silence_codes`."""
        if self._silence is None:
            codes = self.encode_audio(torch.zeros(1, self.LONGEST_PIECE * self.frame_size))[0, :, 1:]  # [K, T]
            changes = (codes != codes[:, -1:]).any(dim=0).nonzero()
            self._silence = codes[:, : int(changes.max()) + 2 if len(changes) else 1].T.tolist()
        return self._silence

    def _repeated(self, codes: Sequence[int], frames: int) -> Tensor:
        """One frame's codes [K] over and over, long [1, K, frames]."""
        return torch.tensor(codes)[None, :, None].repeat(1, 1, frames)

    @staticmethod
    def _features(text: Tensor, moshi: Tensor, user: Tensor, lengths: list[int], total: int) -> BatchFeature:
        data = {"input_ids": text, "moshi_audio_codes": moshi, "user_audio_codes": user}
        data["text_labels"] = text.masked_fill(text == ZERO, IGNORED)
        data["audio_labels"] = moshi.masked_fill(moshi == ZERO, IGNORED)
        if min(lengths) < total:
            data["attention_mask"] = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
        return BatchFeature(data)

    def pad(
        self,
        encoded_inputs: Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """One batch of recordings of any lengths: what transformers' `DataCollatorWithPadding(processor)` calls.

        encoded_inputs: what this processor gave for each recording, tensors or lists. padding: to the longest, or to max_length frames when
        it is "max_length", rounded up to pad_to_multiple_of. Frames past a recording's end are absent, masked and not trained, and so is a
        stream that a recording lacks. With labels of one kind those of the other are there too, for `Trainer` looks for both.

        Raises ValueError for a stream that is unknown, or a recording that is longer than max_length.
        """
        rows = [{name: torch.as_tensor(value) for name, value in one.items()} for one in encoded_inputs]
        names = {name for row in rows for name in row}
        if unknown := sorted(names - STREAMS.keys()):
            raise MoshiTTTError(f"recordings hold {unknown[0]!r}, which is no stream; keep {', '.join(STREAMS)}.")
        lengths = [next(iter(row.values())).shape[-1] for row in rows]
        total = max_length if padding == "max_length" and max_length is not None else max(lengths)
        if max(lengths) > total:
            raise MoshiTTTError(f"a recording has {max(lengths)} frames and max_length is {total}; cut it, or allow as many.")
        total += -total % (pad_to_multiple_of or 1)
        if names & {"text_labels", "audio_labels"}:
            names |= {"text_labels", "audio_labels"}
        if min(lengths) < total:
            names.add("attention_mask")
        return BatchFeature({name: self._padded(name, rows, lengths, total) for name in STREAMS if name in names})

    def _padded(self, name: str, rows: list[dict[str, Tensor]], lengths: list[int], total: int) -> Tensor:
        """One stream of all recordings, long [B, total] or [B, K, total]."""
        dims, nothing = STREAMS[name]
        padded = []
        for row, length in zip(rows, lengths, strict=True):
            codebooks = (self.num_codebooks,) if dims == 2 else ()
            # a recording without a mask is there from its first frame to its last
            missing = torch.full((*codebooks, length), 1 if name == "attention_mask" else nothing)
            stream = row.get(name, missing)
            stream = stream if stream.dim() > dims else stream[None]  # with or without the rows' dimension
            padded.append(F.pad(stream, (0, total - length), value=nothing))
        return torch.cat(padded)

    def _wave(self, audio: Any, sampling_rate: int | None) -> Tensor:
        """Checked and resampled audio, float32 [1 or 2, n]."""
        if sampling_rate is None or sampling_rate != int(sampling_rate) or sampling_rate < 1:
            raise MoshiTTTError(f"sampling_rate is {sampling_rate}; say how many samples a second the audio has, as 24000 or 44100.")
        if not isinstance(audio, (np.ndarray, Tensor)):
            raise MoshiTTTError(f"audio is a {type(audio).__name__}; give a numpy array or a tensor, [n] or [channels, n].")
        wave = torch.as_tensor(audio)
        if not wave.is_floating_point():
            raise MoshiTTTError(f"audio is {wave.dtype}; it must be floating point in [-1, 1] (divide 16-bit samples by 32768).")
        wave = wave.detach().cpu().float()
        if wave.dim() == 1:
            wave = wave[None]
        if wave.dim() != 2:
            raise MoshiTTTError(f"audio has shape {tuple(wave.shape)}; it must be [n] or [channels, n].")
        if wave.numel() == 0:
            raise MoshiTTTError(f"audio is empty (shape {tuple(wave.shape)}); give at least one sample.")
        if wave.shape[0] > 2:
            raise MoshiTTTError(f"audio has {wave.shape[0]} channels (shape {tuple(wave.shape)}); it must have 1 or 2, as [channels, n].")
        if not torch.isfinite(wave).all():
            raise MoshiTTTError("audio holds NaN or infinite samples; repair the recording first.")
        return resample(wave, int(sampling_rate), self.sampling_rate)

    def _window(self, wave: Tensor, start: float, end: float | None) -> Tensor:
        length = wave.shape[-1] / self.sampling_rate
        if not 0 <= start < length:
            raise MoshiTTTError(f"chunk_start is {start} s; it must lie within the recording of {length:.3f} s.")
        if end is not None and not start < end < math.inf:
            raise MoshiTTTError(f"chunk_end is {end} s; it must be after chunk_start ({start} s).")
        last = None if end is None else round(end * self.sampling_rate)
        return wave[:, round(start * self.sampling_rate) : last]

    def _codes(self, waves: list[Tensor], lengths: list[int], total: int, mono_is: str) -> tuple[Tensor, Tensor]:
        """Codes of both sides, long [B, K, total] each, −1 where there is no sound."""
        sides = torch.full((2, len(waves), self.num_codebooks, total), ZERO)
        for row, (wave, length) in enumerate(zip(waves, lengths, strict=True)):
            codes = self.encode_audio(wave)  # [1 or 2, K, length]
            if len(codes) == 2:
                sides[:, row, :, :length] = codes
            else:
                sides[0 if mono_is == "moshi" else 1, row, :, :length] = codes[0]
        return sides[0], sides[1]

    def encode_audio(self, audio: Tensor) -> Tensor:
        """Sound at the codec's rate, float [B, n] -> codes, long [B, K, ceil(n / 1920)]; the last frame is filled up with silence."""
        features = self.feature_extractor(list(audio.float().cpu().numpy()), sampling_rate=self.sampling_rate, return_tensors="pt")
        wave = features["input_values"][:, 0]  # [B, n]
        wave = F.pad(wave, (0, -wave.shape[-1] % self.frame_size))
        stream = self.new_audio_stream(len(wave))
        pieces = [stream.encode_frames(piece) for piece in wave.split(self.LONGEST_PIECE * self.frame_size, dim=-1)]
        return torch.cat(pieces, -1).cpu()

    def text_frames(
        self,
        words: Sequence[Any],
        n_frames: int,
        start: float = 0.0,
        end: float = math.inf,
        *,
        main_speaker: str = MAIN_SPEAKER,
        keep_and_shift: bool = False,
    ) -> list[int]:
        """The text stream, n_frames ids, of the words that `main_speaker` begins at start ≤ t < end, in seconds; frame 0 is at `start`.

        Words are sorted by their start alone, so that those of one time keep their order; words that end as they begin are left out.
        Raises ValueError for a word that is malformed or that the tokenizer cannot encode.
        """
        parsed = [parse_word(index, word) for index, word in enumerate(words)]
        chosen = sorted((w for w in parsed if w[3] == main_speaker and w[1] < w[2] and start <= w[1] < end), key=lambda word: word[1])
        encoded = [(self.encode_word(text), begin - start) for text, begin, _, _ in chosen]
        return text_stream([word for word in encoded if word[0]], n_frames, self.frame_rate, keep_and_shift, self.text_padding_ids)

    def encode_word(self, word: str) -> list[int]:
        """Token ids of one word by itself, none for a blank one; ValueError naming a word that the tokenizer does not know how to write."""
        if not word.strip():
            return []
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise MoshiTTTError(f"words hold {word!r}, which has half of a character; write it whole.")
        ids: list[int] = self.tokenizer(word.strip(), add_special_tokens=False)["input_ids"]
        if self.tokenizer.unk_token_id in ids:
            raise MoshiTTTError(f"words hold {word!r}, which the tokenizer cannot encode; spell it with characters that it knows.")
        special = {*self.text_padding_ids, *self.tokenizer.all_special_ids}
        if special & set(ids):
            raise MoshiTTTError(f"words hold {word!r}, which reads as a special token; spell it otherwise.")
        # in a language without spaces the mark of a word's start is a token by itself, and would cost every word a frame
        return ids[1:] if len(ids) > 1 and ids[0] == self._bare_start else ids

    @property
    def _bare_start(self) -> int | None:
        """The token of the mark alone, of a tokenizer of which few pieces begin with it; None where they do, for a language with spaces."""
        if self._marks is None or self._marks[0] is not self.tokenizer:
            vocabulary = self.tokenizer.get_vocab()
            marked = sum(piece.startswith(WORD_START) and piece != WORD_START for piece in vocabulary)
            bare = vocabulary.get(WORD_START) if marked < self.MARKED_SHARE * len(vocabulary) else None
            self._marks = (self.tokenizer, bare)
        return self._marks[1]

    # Frames to sound and words

    def decode_audio(self, codes: Tensor) -> Tensor:
        """Codes, long [B, K, T] -> sound at 24 kHz, float [B, T · 1920]. ValueError for absent (−1), incomplete (−2) or unknown codes."""
        codes = torch.as_tensor(codes)
        check_codes(codes, self.codec.config.codebook_size, self.codec.config.num_quantizers)
        stream = self.new_audio_stream(len(codes))
        return torch.cat([stream.decode_frames(piece) for piece in codes.split(self.LONGEST_PIECE, dim=-1)], -1)

    def decode_text(self, ids: Any) -> str:
        """The text of one stream of frames [T], without padding."""
        return str(self.tokenizer.decode([token for _, token in self._said(ids)], skip_special_tokens=True)).strip()

    def post_process_multimodal_output(
        self, generated_outputs: Any, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs: Any
    ) -> Any:
        """What transformers' any-to-any pipeline shows of what `generate` gave: a text a row, or sound [B, n] for
        `generation_mode="audio"`.
        """
        if generation_mode == "audio":
            return self.decode_audio(generated_outputs.audio_codes).cpu().numpy()
        return [self.decode_text(row) for row in getattr(generated_outputs, "sequences", generated_outputs)]

    def words(self, ids: Any) -> list[tuple[str, float]]:
        """The words of one stream of frames [T], each with the time in seconds at which it starts."""
        found: list[tuple[list[int], int]] = []
        last = 0
        for t, token in self._said(ids):
            starts = str(self.tokenizer.convert_ids_to_tokens(token)).startswith(WORD_START)
            if not found or starts or (self._bare_start is not None and t > last + 1):
                found.append(([], t))
            last = t
            found[-1][0].append(token)
        spelled = [(self.tokenizer.decode(tokens, skip_special_tokens=True).strip(), t / self.frame_rate) for tokens, t in found]
        return [(word, start) for word, start in spelled if word]

    def _said(self, ids: Any) -> list[tuple[int, int]]:
        """(frame, token) of every frame that holds text."""
        row = torch.as_tensor(ids)
        if row.dim() != 1 or row.is_floating_point():
            raise MoshiTTTError(f"ids are {row.dtype} {tuple(row.shape)}; give one row of token ids, [frames].")
        said = [(t, token) for t, token in enumerate(row.tolist()) if token not in self.text_padding_ids and token >= 0]
        highest = max((token for _, token in said), default=0)
        if highest >= len(self.tokenizer):
            raise MoshiTTTError(f"ids hold {highest}; the tokenizer knows 0 to {len(self.tokenizer) - 1}.")
        return said

    def check_model(self, config: Any) -> None:
        """ValueError where a model has other ids of text padding: it would read words for silence, and silence for words."""
        if list(config.text_padding_ids) != self.text_padding_ids:
            raise MoshiTTTError(
                f"the model's `text_padding_ids={config.text_padding_ids}` differ from the processor's "
                f"`text_padding_ids={self.text_padding_ids}`; "
                "take both from one checkpoint, or set the right ones in config.json or processor_config.json."
            )

    def complete(self, config: Any) -> None:
        """Tell a model's configuration what its codec knows and it does not: the codes of silence, with which the user ends."""
        heard = config.num_user_codebooks
        if config.silence_codes is None and 1 <= heard <= self.num_codebooks:
            config.silence_codes = [frame[:heard] for frame in self.silence_codes()]

    def new_audio_stream(self, batch_size: int = 1) -> MimiStream:
        """Live encoding and decoding of batch_size streams, 80 ms at a time."""
        return MimiStream(self.codec, batch_size, self.num_codebooks)

    # On disk

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Everything into one folder; the codec's weights go to its sub-folder `audio_tokenizer`."""
        if self.audio_tokenizer is not None:
            self.audio_tokenizer.save_pretrained(f"{save_directory}/{self.CODEC_FOLDER}")
        files: list[str] = super().save_pretrained(save_directory)
        if push_to_hub:  # from a folder of its own: the base class would take the codec, saved just before, for one already uploaded
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def to_dict(self) -> dict[str, Any]:
        """As the base class has it, but the codec is not copied: it stands beside, in its own folder."""
        without = copy.copy(self)
        codec, _, _ = (without.__dict__.pop(name) for name in ("audio_tokenizer", "_silence", "_marks"))
        output = super(MoshiTTTProcessor, without).to_dict() | {"auto_map": dict(AUTO_MAP)}  # which saving would add, and loading takes out
        return output if codec is None else {**output, "audio_tokenizer_folder": self.CODEC_FOLDER}

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the base class has it, with the codec loaded from its sub-folder of the same repository and revision."""
        own = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only", "force_download") if key in kwargs}
        subfolder = kwargs.get("subfolder", "")
        processor_dict, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        folder = processor_dict.pop("audio_tokenizer_folder", None)
        if folder is not None and "audio_tokenizer" not in rest:
            folder = f"{subfolder}/{folder}" if subfolder else folder
            raw, _ = MimiConfig.get_config_dict(pretrained_model_name_or_path, subfolder=folder, **own)
            check_codec(raw, f"the codec of {pretrained_model_name_or_path}")
            with os_errors_as_ours():
                processor_dict["audio_tokenizer"] = MimiModel.from_pretrained(
                    pretrained_model_name_or_path, subfolder=folder, use_safetensors=True, **own
                )
        return processor_dict, rest


def _refuse_arguments(return_tensors: str | None, others: Mapping[str, Any]) -> None:
    wrong = {name: value for name, value in others.items() if value is not None and value is not True}
    if return_tensors not in (None, "pt", "np"):
        wrong["return_tensors"] = return_tensors
    for name, value in wrong.items():
        raise MoshiTTTError(f'`{name}={value!r}` means nothing to this processor; it takes sound, words and text, and gives "pt" or "np".')


def _is_text(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, (list, tuple)) and bool(given) and all(isinstance(one, str) for one in given))


def _as(batch: BatchFeature, return_tensors: str | None) -> BatchFeature:
    if return_tensors == "np":
        batch.data = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in batch.items()}
    return batch
