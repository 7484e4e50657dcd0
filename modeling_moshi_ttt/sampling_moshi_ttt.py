"""How tokens are chosen from logits: temperature, top-k, and noise that belongs to a row alone.

The noise of a token is a hash of its row's seed, of the frame and of the stream (counter-based, as in Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3", with the mixing function of SplitMix64, Steele et al. 2014). What a row says then depends on nothing but its
own past and its seed: not on its neighbors, nor on the order in which rows are computed, nor on the device.

Shapes: B rows, V entries of a vocabulary or codebook, k of them that may be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors_moshi_ttt import MoshiTTTError

MAX_SEED = 2**63 - 1
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # SplitMix64's constants as int64

GUIDANCE = {"cfg_coef", "cfg_scale", "guidance_scale"}  # what Kyutai's package and transformers call it

Number = float | int | bool | Sequence[float] | Tensor


class Sampling(NamedTuple):
    """Settings of B rows.

    `top_k` 0 leaves all entries in; a row with `do_sample` False takes the likeliest entry, whatever its temperatures are.
    """

    do_sample: Tensor  # [B] bool
    temperature: Tensor  # [B] float32, of the audio codes
    text_temperature: Tensor  # [B] float32
    top_k: Tensor  # [B] int64
    text_top_k: Tensor  # [B] int64
    max_top_k: int  # what the host knows of the rows: the largest limit, 0 where one row has none
    max_text_top_k: int
    some_sample: bool

    def noise(self, seeds: Tensor, frame: Tensor, vocab_size: int, num_codebooks: int, card: int) -> tuple[Tensor, Tensor] | None:
        """The noise of a frame: of the text `[B, k]`, and of each codebook `[B, K, k]`; None where no row samples.

        Args:
            seeds, frame: `[B]` int64.
            vocab_size, num_codebooks, card: how many entries there are to choose from, of the text and of each of so many codebooks.
        """
        if not self.some_sample:
            return None
        streams = torch.arange(1 + num_codebooks, device=seeds.device)
        keys = _mix(_mix(seeds + _STEP)[:, None] + frame[:, None] * 64 + streams)  # [B, 1 + K]
        text, audio = min(self.max_text_top_k or vocab_size, vocab_size), min(self.max_top_k or card, card)
        return gumbel(keys[:, 0], text), gumbel(keys[:, 1:], audio)

    def text(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Text tokens `[B]` from logits `[B, V]` and their noise `[B, k]`."""
        return self._choose(logits, self.text_temperature, self.text_top_k, noise)

    def audio(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Codes `[B]` of one codebook, likewise."""
        return self._choose(logits, self.temperature, self.top_k, noise)

    def _choose(self, logits: Tensor, temperature: Tensor, top_k: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return logits.argmax(dim=-1)
        count = noise.shape[-1]
        scores, ids = logits.float().topk(count, dim=-1)  # [B, k], the likeliest first
        # The largest of score + Gumbel noise is a draw from the softmax of the scores.
        noisy = torch.addcdiv(noise, scores, temperature[:, None])
        last = torch.where(top_k == 0, count, top_k)[:, None]
        noisy = noisy.masked_fill(torch.arange(count, device=ids.device) >= last, float("-inf"))
        chosen = noisy.argmax(dim=-1) * self.do_sample
        return ids.gather(1, chosen[:, None])[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        """Every setting by name, `[B]` each."""
        return {name: getattr(self, name) for name in SETTINGS}

    @classmethod
    def of(cls, settings: Mapping[str, Tensor]) -> Sampling:
        """From what [`tensors`] gives."""
        return cls(
            **settings,
            max_top_k=_largest(settings["top_k"]),
            max_text_top_k=_largest(settings["text_top_k"]),
            some_sample=bool(settings["do_sample"].any()),
        )


SETTINGS = {
    "do_sample": torch.bool,
    "temperature": torch.float32,
    "text_temperature": torch.float32,
    "top_k": torch.int64,
    "text_top_k": torch.int64,
}


def make_sampling(batch_size: int, device: torch.device, **settings: Any) -> Sampling:
    """Settings as a caller gives them: one number, or one for each row. None of a `top_k` is 0, of a temperature 1.

    Raises:
        ValueError: classifier-free guidance is asked for, as many values as rows are not given, or, of a row that samples, a temperature
            that is not above 0 or a `top_k` below 0.
        TypeError: a name that is no setting.
    """
    if guidance := sorted(GUIDANCE & set(settings)):
        name = guidance[0]
        raise MoshiTTTError(
            f"`{name}={settings[name]}` asks for classifier-free guidance, which no Moshi-TTT model is trained for; leave it out."
        )
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise TypeError(f"`{unknown[0]}` is no setting of sampling; they are {', '.join(SETTINGS)}.")
    rows = {name: _per_row(name, value, batch_size) for name, value in settings.items()}
    samples = rows["do_sample"]
    for name in ("temperature", "text_temperature"):
        # below this a float32 score is infinite; where nothing is drawn a temperature means nothing
        bad = samples & ~((rows[name] > 1e-6) & (rows[name] < torch.inf))
        if bool(bad.any()):
            raise MoshiTTTError(f"`{name}={settings[name]}` must be greater than 0; for the likeliest token set `do_sample=False`.")
        rows[name] = torch.where(samples, rows[name], 1.0)
    for name in ("top_k", "text_top_k"):
        if bool((samples & (rows[name] < 0)).any()):
            raise MoshiTTTError(f"`{name}={settings[name]}` must be 0 (no limit) or more.")
        rows[name] = torch.where(samples, rows[name], 1)
    return Sampling.of({name: row.to(device) for name, row in rows.items()})


def make_seeds(seeds: Any, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """`[B]` int64 from one whole number a row; drawn from `generator` (torch's own where that is None) where `seeds` is None.

    Raises:
        ValueError: another number of seeds, or one below 0 or above 2**63 - 1.
    """
    if seeds is None:
        source = torch.device("cpu") if generator is None else generator.device
        return torch.randint(MAX_SEED, (batch_size,), generator=generator, device=source).to(device)
    numbers = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds) if isinstance(seeds, Sequence) else [seeds]
    if len(numbers) != batch_size or not all(type(n) is int and 0 <= n <= MAX_SEED for n in numbers):
        raise MoshiTTTError(f"`seeds={seeds}` must be {batch_size} whole numbers from 0 to {MAX_SEED}, one a row.")
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def gumbel(keys: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise `[..., count]` float32 under `keys` `[...]`, for the likeliest entry, the next one and so on."""
    bits = _mix(keys[..., None] + _multiples(count, keys.device))
    uniform = ((bits >> 40 & 0xFFFFFF).float() + 0.5) / 2**24  # 24 bits, the mantissa of a float32
    return -(-uniform.log()).log()


def _multiples(count: int, device: torch.device) -> Tensor:
    """`[count]` int64, the first multiples of _STEP, which wrap; 16 bits of it at a time.

    Compiled for a CPU, one product with the entries' numbers would be taken for the index of a loop, which must not overflow: the loop then
    ran past its end.
    """
    entries = torch.arange(1, count + 1, device=device)
    parts = [entries * (_STEP >> shift & 0xFFFF) << shift for shift in (0, 16, 32, 48)]
    return parts[0] + parts[1] + parts[2] + parts[3]


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, whose products wrap."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


def _largest(top_k: Tensor) -> int:
    return 0 if bool((top_k == 0).any()) else int(top_k.max())


def _per_row(name: str, value: Any, batch_size: int) -> Tensor:
    dtype = SETTINGS[name]
    if value is None:
        value = 1.0 if name.endswith("temperature") else 0
    try:
        row = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise MoshiTTTError(f"`{name}={value!r}` must be a number, or one a row.") from None
    whole = dtype.is_floating_point or row.dtype in (torch.bool, torch.int64, torch.int32)
    if row.dim() > 1 or (row.dim() == 1 and len(row) != batch_size) or not whole:
        kind = "number" if dtype.is_floating_point else "whole number"
        raise MoshiTTTError(f"`{name}={value}` must be a {kind}, or {batch_size} of them, one a row.")
    return row.to("cpu", dtype).expand(batch_size).clone()
