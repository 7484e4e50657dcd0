"""When a channel carries voice: what stands out from the channel's own noise floor, in the bands in which it does.

Public detectors were tried first. On dialogues with known turns silero-vad 6.2 and webrtcvad 2.0 take babble for voice, which it is, and
put ends of turns more than 80 ms off in 5 to 30% and 40 to 60% of the replies; a floor of the channel's own does neither.

Letters: F frames of 20 ms, B bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors_moshi_ttt import MoshiTTTError

Segment = tuple[float, float]  # (start, end) in seconds

STEP = 0.02  # seconds, the grain of voice activity
GAP = 0.3  # shorter pauses do not end a turn
SHORTEST = 0.1  # shorter sounds are no speech
BANDS = 16  # equally wide in mel
MEL_RANGE = (121.9, 2840.0)  # 80 and 8,000 Hz
QUIETEST = -60.0  # dB full scale; what is quieter is no voice
RANGE = 35.0  # dB from the loud parts of a voice to what still belongs to it
CORE, EDGE = (3.0, 1.0), (2.0, 0.5)  # a voice's sure part and its ends: (standard deviations, dB at least) above the floor
CORE_FRAMES = 4
GUARD = 5  # frames around voice that are no sure floor
CLEAR = 4.5  # dB by which the middle of the voice must stand above the threshold of its sure part
LOUD_FLOOR = -30.0  # dB full scale; a floor above it may hide a voice of usual level, about -20
MOST = 0.85  # share of voiced frames above which no floor is known


class IndistinctVoice(ValueError):
    """Floor and voice of a channel cannot be told apart; the message says why."""


def voice_activity(samples: np.ndarray, sample_rate: int) -> list[Segment]:
    """Segments in which `samples` [N] float carry voice; pauses under 0.3 s are bridged. An empty list where nobody speaks.

    Raises:
        ValueError: samples are not one channel.
        IndistinctVoice: the noise is too loud or too much like the voice, or never pauses.
    """
    if samples.ndim != 1:
        raise MoshiTTTError(f"voice_activity: samples must be one channel [N], their shape is {samples.shape}")
    step = round(STEP * sample_rate)
    samples = samples[: len(samples) // step * step].astype(np.float64)
    if len(samples) == 0:
        return []
    level = 10 * np.log10(np.mean(samples.reshape(-1, step) ** 2, axis=1) + 1e-12)  # [F], dB full scale
    least = max(np.percentile(level, 95) - RANGE, QUIETEST)
    if level.max() <= least:
        return []
    power = _band_power(samples, sample_rate, step)
    voiced = level > _two_groups(np.maximum(level, least - CORE[0]))
    for _ in range(5):  # voice is what stands out from the floor, and floor what is not voice
        floor = _floor_frames(voiced, level, power.mean(1))
        excess = np.maximum(10 * np.log10(power / power[floor].mean(0)), 0).mean(1)  # [F], dB; hum or fricatives fill some bands only
        mean, spread = excess[floor].mean(), excess[floor].std()
        core, edge = (mean + max(deviations * spread, least_db) for deviations, least_db in (CORE, EDGE))
        loud = _without_floor(level, power, floor) > least  # so that a voice's ends are where they are without the noise
        before, voiced = voiced, _around((excess > edge) & loud, (excess > core) & loud)
        if (voiced == before).all():
            break
    noise = 10 * np.log10(np.mean(10 ** (level[floor] / 10)))
    _check_distinct(voiced, float(np.median(excess[voiced]) - core) if voiced.any() else np.inf, noise)
    return [(start, end) for start, end in bridge([(a * STEP, b * STEP) for a, b in _runs(voiced)], GAP) if end - start >= SHORTEST]


def _check_distinct(voiced: np.ndarray, margin: float, noise: float) -> None:
    if voiced.mean() > MOST:
        raise IndistinctVoice(f"sound without a pause in {voiced.mean():.0%} of the time leaves no floor to tell a voice from")
    if margin < CLEAR:
        raise IndistinctVoice(f"what stands out from a floor of {noise:.0f} dBFS does so by too little to be told from it")
    if not voiced.any() and noise > LOUD_FLOOR:
        raise IndistinctVoice(f"a floor of {noise:.0f} dBFS may hide a voice")


def _band_power(samples: np.ndarray, sample_rate: int, step: int) -> np.ndarray:
    """Mean power [F, B] in bands, of windows of two frames around each; -80 dB are added, for digital silence."""
    window = np.hanning(2 * step)
    padded = np.pad(samples, (step // 2, 2 * step - step // 2))
    spectra = np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, 2 * step)[: len(samples) : step] * window)) ** 2
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(2 * step, 1 / sample_rate) / 700)
    low, high = 2595 * np.log10(1 + np.array([80.0, min(8000.0, sample_rate / 2)]) / 700)
    band = np.floor((mel - low) / (high - low) * BANDS)
    weights = np.array([(band == b) / max((band == b).sum(), 1) for b in range(BANDS)])  # [B, bins]
    return spectra @ weights.T / (window**2).sum() + 1e-8


def _without_floor(level: np.ndarray, power: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """The levels [F] less the floor's power: in each band, whose windows reach into the next frames, and in the frame as a whole."""
    widths = np.diff(700 * (10 ** (np.linspace(*MEL_RANGE, BANDS + 1) / 2595) - 1))
    in_bands = np.maximum(power - power[floor].mean(0), 0) @ widths / (power @ widths)
    frame = 10 ** (level / 10)
    whole = np.maximum(1 - frame[floor].mean() / frame, 0)
    return level + 10 * np.log10(np.minimum(in_bands, whole) + 1e-9)


def _two_groups(values: np.ndarray) -> float:
    """The bound that parts values into two groups with the least variance in each (Otsu 1979)."""
    counts, edges = np.histogram(values, 64)
    centers = (edges[1:] + edges[:-1]) / 2
    share, moment = np.cumsum(counts) / len(values), np.cumsum(counts * centers) / len(values)
    between = (moment[-1] * share - moment) ** 2 / np.maximum(share * (1 - share), 1e-9)
    return float(centers[between >= 0.999 * between.max()].mean())  # the middle of an empty stretch


def _floor_frames(voiced: np.ndarray, level: np.ndarray, power: np.ndarray) -> np.ndarray:
    """The frames [F] of the noise alone: far from voice, and no click among them."""
    near = np.convolve(voiced, np.ones(2 * GUARD + 1), "full")[GUARD : GUARD + len(voiced)] > 0
    floor = ~near if (~near).sum() >= 25 else ~voiced if (~voiced).sum() >= 10 else level <= np.percentile(level, 5)
    return floor & (power <= np.percentile(power[floor], 95))


def _around(edge: np.ndarray, core: np.ndarray) -> np.ndarray:
    """The runs of `edge` that hold enough of `core`."""
    kept = np.zeros(len(edge), bool)
    for start, end in _runs(edge):
        kept[start:end] = core[start:end].sum() >= CORE_FRAMES
    return kept


def _runs(active: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], active.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def bridge(segments: Sequence[Segment], gap: float) -> list[Segment]:
    """Segments with the pauses shorter than `gap` seconds closed."""
    joined: list[Segment] = []
    for start, end in segments:
        if joined and start - joined[-1][1] < gap:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
