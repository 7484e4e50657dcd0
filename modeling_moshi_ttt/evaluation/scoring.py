"""Log-likelihood of code sequences under Moshi-TTT, batched with padding that changes nothing.

What counts is explicit: which streams go in (text and user absent, or given), and the weight of each codebook in the score. Per-codebook
sums are kept, so that every weighting, and both the sum and the mean per token, come from one pass.

Shapes: B rows, K codebooks of Moshi, U codebooks of the user, T frames (12.5 a second), V text vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.code_sequence import CodeSequence
from ..delay_pattern import delay, undelay
from ..errors_moshi_ttt import MoshiTTTError
from ..resampling import resample
from ..tokens_moshi_ttt import ZERO


@dataclass(frozen=True)
class ScoreWeights:
    """Weight of a token's log-likelihood by its stream. The default scores Moshi's audio alone, semantic to acoustic 100 : 1."""

    semantic: float = 100.0
    acoustic: float = 1.0
    text: float = 0.0

    def __post_init__(self) -> None:
        values = (self.semantic, self.acoustic, self.text)
        if not all(math.isfinite(value) and value >= 0 for value in values) or sum(values) == 0:
            raise MoshiTTTError(
                f"`semantic={values[0]}`, `acoustic={values[1]}` and `text={values[2]}` must be numbers of 0 or more, and not all 0."
            )


UNWEIGHTED = ScoreWeights(1.0, 1.0, 0.0)


@dataclass(frozen=True)
class StreamSums:
    """Sums of log-likelihoods in nats, and numbers of tokens, of one recording: [text, codebook 0, 1, …]."""

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    def score(self, weights: ScoreWeights = ScoreWeights(), mean: bool = True) -> float:
        """The weighted sum of log-likelihoods; with `mean` divided by the sum of the weights of the tokens scored."""
        factors = [weights.text, weights.semantic, *[weights.acoustic] * (len(self.sums) - 2)]
        total = math.fsum(w * s for w, s in zip(factors, self.sums))
        weight = math.fsum(w * n for w, n in zip(factors, self.tokens))
        score = total / (weight if mean else 1.0) if weight else math.nan
        if not math.isfinite(score):
            raise MoshiTTTError(
                f"`score={score}` must be finite: of `sums={self.sums}`, `tokens={self.tokens}` and `weights={factors}`. Give weights to streams "
                "that are there; sums that are not finite come from broken weights of the model."
            )
        return score


class TokenLogProbs(NamedTuple):
    """Log-likelihood of every token in frame time, and which of them were predicted: [B, 1 + K, T], row 0 text."""

    values: Tensor  # float32 (float64 for a float64 model); 0 where not predicted
    predicted: Tensor  # bool


@torch.no_grad()
def token_log_probs(model: Any, batch: Sequence[CodeSequence]) -> TokenLogProbs:
    """One forward pass over recordings of any lengths, padded on the right.

    A row's padding is masked, so that neither attention nor TTT memory sees it. The last `delay` frames of a delayed codebook are not
    predicted by Moshi, with padding as without.
    """
    check_sequences(model.config, batch)
    lengths = torch.tensor([sequence.moshi.shape[-1] for sequence in batch], device=model.device)  # [B]
    inputs = collate(model.config, batch, model.device)
    frames = int(lengths.max())
    if int(lengths.min()) < frames:
        inputs["attention_mask"] = (torch.arange(frames, device=model.device) < lengths[:, None]).long()
    output = model(**inputs, use_cache=False, return_dict=True)
    delays = [0, *model.config.audio_delays[: model.config.num_codebooks]]
    targets = torch.cat([inputs["input_ids"][:, None], inputs["moshi_audio_codes"]], dim=1)  # [B, 1 + K, T]
    delayed = delay(targets, delays, targets.new_full((*targets.shape[:2], max(max(delays), 1)), ZERO))
    logprobs = undelay(gather_log_probs(output.logits, output.audio_logits, delayed), delays, 0.0)
    # a step past the row's end is no step of the row: what it predicts does not count
    steps = torch.arange(frames, device=model.device) + torch.tensor(delays, device=model.device)[:, None]  # [1 + K, T]
    predicted = (steps < lengths[:, None, None]) & (targets >= 0)
    return TokenLogProbs(logprobs.masked_fill(~predicted, 0.0), predicted)


def gather_log_probs(logits: Tensor, audio_logits: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood of `targets` [B, 1 + K, T] (delayed; negative ones give 0) under text [B, T, V] and audio logits [B, P, T, card], P >= K."""
    known = targets.clamp(min=0)[..., None]  # [B, 1 + K, T, 1]
    audio = _log_softmax(audio_logits[:, : known.shape[1] - 1]).gather(-1, known[:, 1:])
    # the text's vocabulary is the largest by far, and in spoken benchmarks there is no text
    spoken = bool((targets[:, 0] >= 0).any())
    text = _log_softmax(logits).gather(-1, known[:, 0]) if spoken else audio.new_zeros(known[:, 0].shape)
    return torch.cat([text[:, None], audio], dim=1).squeeze(-1).masked_fill(targets < 0, 0.0)  # [B, 1 + K, T]


def _log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def collate(config: Any, batch: Sequence[CodeSequence], device: torch.device | str) -> dict[str, Tensor]:
    """Recordings of any lengths as the model's inputs, padded with absent tokens on the right."""
    frames = max(sequence.moshi.shape[-1] for sequence in batch)
    inputs = {
        "input_ids": torch.full((len(batch), frames), ZERO, dtype=torch.long),
        "moshi_audio_codes": torch.full((len(batch), config.num_codebooks, frames), ZERO, dtype=torch.long),
        "user_audio_codes": torch.full((len(batch), config.num_user_codebooks, frames), ZERO, dtype=torch.long),
    }
    for row, sequence in enumerate(batch):
        for name, stream in zip(inputs, (sequence.text, sequence.moshi, sequence.user)):
            if stream is not None:
                inputs[name][row, ..., : stream.shape[-1]] = stream.cpu()
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def check_sequences(config: Any, batch: Sequence[CodeSequence]) -> None:
    """Raise a MoshiTTTError that names the recording and what does not fit."""
    for number, sequence in enumerate(batch):
        frames = max(sequence.moshi.shape[-1], 1)
        shapes = {"moshi": (config.num_codebooks, frames), "user": (config.num_user_codebooks, frames), "text": (frames,)}
        for name, shape in shapes.items():
            stream = getattr(sequence, name)
            if stream is not None and tuple(stream.shape) != shape:
                raise MoshiTTTError(
                    f"sequence {number}: `{name}` of shape {tuple(stream.shape)} must be {shape}, with a frame of 80 ms or more."
                )


def batches_of_like_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of the recordings, shortest first, at most `batch_size` together.

    A batch that is half full ends where the length changes: without padding there is no mask, and without a mask attention and TTT are
        quicker.
    """
    if batch_size < 1:
        raise MoshiTTTError(f"`batch_size={batch_size}` must be 1 or more.")
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        last = batches[-1] if batches else []
        if not last or len(last) == batch_size or (2 * len(last) >= batch_size and lengths[i] != lengths[last[-1]]):
            batches.append([i])
        else:
            last.append(i)
    return batches


def score_sequences(
    model: Any, sequences: Sequence[CodeSequence], batch_size: int = 16, progress: Callable[[int], object] = lambda done: None
) -> list[StreamSums]:
    """Per-stream sums of every recording, in order; those of like length share a batch, so that little is padded."""
    results: dict[int, StreamSums] = {}
    model.eval()
    for rows in batches_of_like_length([sequence.moshi.shape[-1] for sequence in sequences], batch_size):
        logprobs = token_log_probs(model, [sequences[i] for i in rows])
        sums, tokens = logprobs.values.double().sum(-1).tolist(), logprobs.predicted.sum(-1).tolist()
        results |= {i: StreamSums(tuple(s), tuple(n)) for i, s, n in zip(rows, sums, tokens)}
        progress(len(rows))
    return [results[i] for i in range(len(sequences))]


class SpeechScorer:
    """Scores waveforms as slamkit's and SALMon's metrics call a model, so that they can call a Moshi-TTT.

    slamkit: `log_likelihood(wavs [B, N], lens [B], used_token_modality=..., mean_nll=...)` and `.device`; SALMon:
    `log_likelihood([[1, N], ...])` and `.to(device)`.

    Args:
        model: `MoshiTTTForConditionalGeneration`.
        encode: list of mono float32 arrays at 24 kHz -> list of codes [K, T], as the processor gives them.
        user: "absent" (the zero token), or "silence": what the codec makes of silence of the same length.
        text: "absent", or a text id that stands in every frame (such as `config.text_padding_ids[0]`); neither is scored.
        sample_rate: of the waveforms that come in; they are resampled to 24 kHz.
    """

    def __init__(
        self,
        model: Any,
        encode: Callable[[list[np.ndarray]], list[Tensor]],
        weights: ScoreWeights = ScoreWeights(),
        user: str = "absent",
        text: str | int = "absent",
        batch_size: int = 16,
        sample_rate: int = 24000,
    ) -> None:
        ids = range(model.config.vocab_size)
        choices = (("user", user, ("absent", "silence"), "'silence'"), ("text", text, ("absent", *ids), f"a text id below {len(ids)}"))
        for name, value, known, other in choices:
            if value not in known:
                raise MoshiTTTError(f"`{name}={value!r}` must be 'absent' or {other}.")
        self.model, self.encode, self.weights, self.user, self.text = model, encode, weights, user, text
        self.batch_size, self.sample_rate = batch_size, sample_rate

    @property
    def device(self) -> torch.device:
        return self.model.device

    def sequences(self, waves: Sequence[np.ndarray]) -> list[CodeSequence]:
        """Mono waves [N] at 24 kHz as code sequences; the wave is Moshi's own voice."""
        codes = self.encode(list(waves))
        silences: list[Tensor | None] = [None] * len(codes)
        if self.user == "silence":
            longest = self.encode([np.zeros(max(len(wave) for wave in waves), np.float32)])[0]
            # the codec is causal: silence of a shorter file is the beginning of a longer one's
            silences = [longest[: self.model.config.num_user_codebooks, : code.shape[-1]] for code in codes]
        texts = [None if self.text == "absent" else torch.full(code.shape[-1:], int(self.text)) for code in codes]
        return [CodeSequence(code, silence, text) for code, silence, text in zip(codes, silences, texts)]

    def score_waves(self, waves: Sequence[np.ndarray]) -> list[StreamSums]:
        """Per-stream sums of mono waves [N] at 24 kHz; given text is an input only, and not scored."""
        scored = score_sequences(self.model, self.sequences(waves), self.batch_size)
        return [StreamSums((0.0, *found.sums[1:]), (0, *found.tokens[1:])) for found in scored]

    def to(self, device: torch.device | str) -> SpeechScorer:
        """Move the model; returns itself."""
        self.model.to(device)
        return self

    def log_likelihood(
        self,
        wavs: Tensor | Sequence[Tensor],
        lens: Tensor | None = None,
        mean_nll: bool = True,
        used_token_modality: str | None = None,
    ) -> Tensor:
        """Log-likelihood [B] of speech; mean per token (weighted), or the sum.

        Args:
            wavs: zero-padded waves [B, N], or one wave [N] or [1, N] a recording.
            lens: [B] samples that count of each padded wave; all of them when None.
            used_token_modality: what slamkit's metrics name; None or "SPEECH", since nothing but speech is scored here.

        Raises:
            ValueError: shapes or lengths that do not fit, or another modality.
        """
        if used_token_modality not in (None, "SPEECH"):
            raise MoshiTTTError(f"`used_token_modality={used_token_modality!r}` must be 'SPEECH', which alone is scored; leave it out.")
        waves = [resample(wave.float().cpu(), self.sample_rate, 24000).numpy() for wave in _unpadded(wavs, lens)]
        scores = [found.score(self.weights, mean_nll) for found in self.score_waves(waves)]
        return torch.tensor(scores, device=self.device)


def _unpadded(wavs: Tensor | Sequence[Tensor], lens: Tensor | None) -> list[Tensor]:
    """One wave [N] a recording, of whichever form `SpeechScorer.log_likelihood` was given."""
    if not isinstance(wavs, Tensor):
        wrong = next((tuple(wave.shape) for wave in wavs if wave.dim() not in (1, 2) or (wave.dim() == 2 and len(wave) != 1)), None)
        if wrong is not None or lens is not None:
            raise MoshiTTTError(
                f"wavs holds a wave of shape {wrong}, lens is {lens}; a list holds waves [N] or [1, N] and comes without lens"
            )
        return [wave.reshape(-1) for wave in wavs]
    if wavs.dim() != 2:
        raise MoshiTTTError(f"`wavs` of shape {tuple(wavs.shape)} must be [B, N].")
    ends = [wavs.shape[1]] * len(wavs) if lens is None else [int(end) for end in lens]
    if len(ends) != len(wavs) or not all(0 < end <= wavs.shape[1] for end in ends):
        raise MoshiTTTError(f"`lens={ends}` must hold {len(wavs)} lengths from 1 to {wavs.shape[1]}.")
    return [wave[:end] for wave, end in zip(wavs, ends)]
