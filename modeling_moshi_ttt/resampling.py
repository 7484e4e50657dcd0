"""The one change of sample rate, of whole sounds and of streams: pieces of any sizes give the samples of the whole.

Letters: B rows, n samples in, m samples out. `up` and `down` are the two rates without their common divisor: output j lies at the input's
position j · down / up. It is made of the `width` input samples on either side of that, by the filter of its phase, (j · down) mod up.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors_moshi_ttt import MoshiTTTError

ZERO_CROSSINGS = 32  # of the sinc on either side; with the window's 9.0 what lies beyond the band is 90 dB down
KAISER_BETA = 9.0
CUT = 0.97  # of the lower Nyquist frequency
LARGEST_FILTER = 2**22  # taps of all phases together, 32 MB; 44.1 kHz to 24 kHz takes 10,160
LONGEST_RUN = 512  # outputs, where there are more phases than that


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Band-limited change of rate of float audio [..., n] -> [..., ceil(n · to / from)], without delay; the same tensor at equal rates.

    Raises ValueError for rates that `Resampler` refuses.
    """
    if from_rate == to_rate:
        return audio
    rows = audio.reshape(math.prod(audio.shape[:-1]), audio.shape[-1])
    resampler = Resampler(from_rate, to_rate, len(rows))
    out = torch.cat([resampler.push(rows), resampler.flush()], -1)
    return out.reshape(*audio.shape[:-1], -1)


def source_window(from_rate: int, to_rate: int, start: int, stop: int) -> tuple[int, int, int]:
    """The input samples [begin, end) of which a window [start, stop) of the output is made, and how many outputs of theirs come before it.

    `resample(source[begin:end])[skip : skip + stop - start]` is `resample(source)[start:stop]`. `end` may lie past the source's end.
    """
    up, down, width = _ratio(from_rate, to_rate)
    block = max(start * down // up - width, 0) // down  # whole blocks of `down` samples in are `up` samples out: the phase starts at 0
    return block * down, -(-stop * down // up) + width, start - block * up


class Resampler:
    """A stream of B rows that changes its rate piece by piece. All it remembers is `tail` and `offset`.

    An output appears once `latency` input samples after its place have come: 1.4 ms at 48 kHz down to 24 kHz, 4.1 ms at 8 kHz up.

    Args:
        from_rate, to_rate: whole numbers of Hz.
        batch_size: rows B.

    Raises:
        ValueError: a rate is no whole number of Hz of at least 1, or the ratio of the two needs too large a filter.
    """

    def __init__(self, from_rate: int, to_rate: int, batch_size: int = 1) -> None:
        self.up, self.down, self.latency = _ratio(from_rate, to_rate)
        self.filters = _filters(self.up, self.down, self.latency)  # [up, 1 + 2 · latency]
        self.tail = torch.zeros(batch_size, self.latency)  # what coming outputs still need; silence comes before the first sample
        self.offset = torch.zeros((), dtype=torch.long)  # of the next output from `tail[:, latency]`, in 1 / up of an input sample

    def push(self, audio: Tensor) -> Tensor:
        """Float audio [B, n] -> [B, m], what is complete by now; over a stream with its `flush`, ceil(n · to / from) in all."""
        if audio.dim() != 2 or audio.shape[0] != self.tail.shape[0]:
            raise MoshiTTTError(f"audio has shape {tuple(audio.shape)}; it must be [B, n] with B = {self.tail.shape[0]}, the batch_size.")
        audio = torch.cat([self.tail.to(audio), audio], -1)
        offset = int(self.offset)
        ready = audio.shape[-1] - 2 * self.latency
        count = max(-((offset - ready * self.up) // self.down), 0)
        # few phases: whole turns of them as one convolution; many: a run of outputs at a time, for the matrix of all would be huge
        at_once = max(count, 1) if self.up <= LONGEST_RUN else LONGEST_RUN
        pieces = [self._outputs(audio, offset + i * self.down, min(at_once, count - i)) for i in range(0, count, at_once)]
        offset += count * self.down
        self.tail = audio[:, offset // self.up :].clone()
        self.offset = torch.tensor(offset % self.up)
        return torch.cat([audio[:, :0], *pieces], -1)

    def _outputs(self, audio: Tensor, offset: int, count: int) -> Tensor:
        """The `count` outputs from `offset` on, of audio [B, n] -> [B, count]; output i and output i + up share a row of the matrix."""
        places = torch.arange(min(self.up, count)) * self.down + offset
        first = offset // self.up
        columns = (places // self.up - first)[:, None] + torch.arange(self.filters.shape[1])  # [rows, taps]
        matrix = self.filters.new_zeros(len(places), int(columns[-1, -1]) + 1).scatter_(1, columns, self.filters[places % self.up])
        turns = -(-count // self.up)
        audio = audio[:, first : first + (turns - 1) * self.down + matrix.shape[1]]
        audio = F.pad(audio, (0, (turns - 1) * self.down + matrix.shape[1] - audio.shape[1]))  # the last turn may be cut short
        out = F.conv1d(audio[:, None], matrix[:, None].to(audio), stride=self.down)  # [B, rows, turns]
        return out.transpose(1, 2).flatten(1)[:, :count]

    def flush(self) -> Tensor:
        """[B, m]: the outputs that waited for more, as if silence followed. The next piece starts a new stream."""
        rest = self.push(self.tail.new_zeros(self.tail.shape[0], self.latency))
        self.tail, self.offset = self.tail.new_zeros(self.tail.shape[0], self.latency), torch.zeros_like(self.offset)
        return rest

    def state_dict(self) -> dict[str, Tensor]:
        """What another Resampler of the same rates and rows needs to go on: {"tail" [B, samples], "offset" []}."""
        return {"tail": self.tail, "offset": self.offset}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken. ValueError, and no change, for one that no resampler of these rates and rows was in."""
        tail, offset = state["tail"], state["offset"]
        right = tail.dim() == 2 and len(tail) == len(self.tail) and self.latency <= tail.shape[1] <= 2 * self.latency + 1
        if not right or not bool(tail.isfinite().all()) or offset.dim() or not 0 <= int(offset) < self.up:
            raise MoshiTTTError(
                f"`tail` {tuple(tail.shape)} and `offset` {offset.tolist()} must be finite, of {len(self.tail)} rows at these rates; "
                "load what `state_dict()` gave, unchanged."
            )
        self.tail, self.offset = tail, offset


def _ratio(from_rate: int, to_rate: int) -> tuple[int, int, int]:
    """(up, down, width): how many samples on either side of its place an output is made of; 0 at equal rates."""
    if from_rate < 1 or to_rate < 1 or from_rate != int(from_rate) or to_rate != int(to_rate):
        raise MoshiTTTError(f"rates are {from_rate} and {to_rate}; they must be whole numbers of Hz, at least 1.")
    common = math.gcd(int(from_rate), int(to_rate))
    up, down = int(to_rate) // common, int(from_rate) // common
    width = 0 if up == down else math.ceil(ZERO_CROSSINGS * down / (CUT * min(up, down)))
    if up * (1 + 2 * width) > LARGEST_FILTER:
        raise MoshiTTTError(
            f"from {from_rate} Hz to {to_rate} Hz a filter would have {up * (1 + 2 * width):,} taps; "
            "bring the sound to a usual rate first, such as 24000, 44100 or 48000 Hz."
        )
    return up, down, width


def _filters(up: int, down: int, width: int) -> Tensor:
    """A sinc under a Kaiser window for each phase, float64 [up, 1 + 2 · width]; at equal rates the identity."""
    if width == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    cut = CUT * min(up, down) / down  # of the input's Nyquist frequency
    phases = torch.arange(up, dtype=torch.float64)[:, None] / up
    times = (torch.arange(-width, width + 1, dtype=torch.float64) - phases) * cut  # [up, taps]
    beta = torch.tensor(KAISER_BETA, dtype=torch.float64)
    window = torch.special.i0(beta * (1 - (times / ZERO_CROSSINGS).clamp(-1, 1) ** 2).sqrt()) / torch.special.i0(beta)
    taps: Tensor = torch.sinc(times) * window * (times.abs() <= ZERO_CROSSINGS) * cut
    return taps
