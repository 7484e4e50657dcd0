"""When a channel carries voice: what stands out from the channel's own noise floor, in the bands in which it does.

The floor and the voice are found together: what stands out from the floor is voice, and what is not near voice is floor. Where the two cannot be
told apart nothing is claimed. (Why not a public detector: CONTRIBUTING.md.)

Letters: F frames of 20 ms, B bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Segment = tuple[float, float]  # (start, end) in seconds

STEP = 0.02  # seconds, the grain of voice activity
GAP = 0.5  # shorter pauses do not end a turn; speakers pause for up to 0.45 s within one, so a bound in between would hang on the noise
SHORTEST = 0.1  # shorter sounds are no speech
BANDS = 16  # from 80 to 8,000 Hz, equally wide in mel
QUIETEST = -60.0  # dB full scale; what is quieter is no voice
RANGE = 35.0  # dB from the loud parts of a voice to what still belongs to it
CORE, EDGE = (3.5, 1.0), (1.25, 0.5)  # a voice's sure part and its ends: (standard deviations, dB at least) above the floor
CORE_FRAMES = 3  # at least, of a run that counts
GUARD = 5  # frames around voice that are no sure floor
CLEAR = (2.5, 0.5)  # likewise, by how much the middle of the voice must stand above the threshold of its sure part
ABOVE_NOISE = 10.0  # dB by which its loud parts must stand above the noise, or its quiet ends are lost
LOUD_FLOOR = -30.0  # dB full scale; a floor above it may hide a voice of usual level, about -20
MOST = 0.85  # share of voiced frames above which no floor is known


class IndistinctVoice(ValueError):
    """Floor and voice of a channel cannot be told apart; the message says why."""


def voice_activity(samples: np.ndarray, sample_rate: int) -> list[Segment]:
    """Segments in which `samples` [N] float carry voice; pauses under 0.5 s are bridged. An empty list where nobody speaks.

    Raises:
        ValueError: samples are not one channel.
        IndistinctVoice: the noise is too loud or too much like the voice, or never pauses.
    """
    if samples.ndim != 1:
        raise ValueError(f"voice_activity: samples must be one channel [N], their shape is {samples.shape}")
    step = round(STEP * sample_rate)
    samples = samples[: len(samples) // step * step].astype(np.float64)
    if len(samples) == 0:
        return []
    level = 10 * np.log10(np.mean(samples.reshape(-1, step) ** 2, axis=1) + 1e-12)  # [F], dB full scale
    least = max(np.percentile(level, 95) - RANGE, QUIETEST)
    if level.max() <= least:
        return []
    power = _band_power(samples, sample_rate, step)
    voiced = level > _two_groups(np.maximum(level, least - 3.0))  # what is quieter than a voice counts alike
    for _ in range(5):  # voice is what stands out from the floor, and floor what is not voice
        floor = _floor_frames(voiced, level)
        excess = np.maximum(10 * np.log10(power / power[floor].mean(0)), 0).mean(1)  # [F], dB; hum or fricatives fill some bands only
        mean, spread = excess[floor].mean(), excess[floor].std()
        core, edge = (mean + max(deviations * spread, least_db) for deviations, least_db in (CORE, EDGE))
        before, voiced = voiced, _around((excess > edge) & (level > least), (excess > core) & (level > least))
        if (voiced == before).all():
            break
    noise = 10 * np.log10(np.mean(10 ** (level[floor] / 10)))
    if voiced.any():
        above = np.median(excess[voiced]) - core
        faint = above < max(CLEAR[0] * spread, CLEAR[1]) or np.percentile(level[voiced], 95) - noise < ABOVE_NOISE
    else:
        faint = noise > LOUD_FLOOR
    _check_distinct(voiced.mean(), faint, noise)
    return [(start, end) for start, end in bridge([(a * STEP, b * STEP) for a, b in _runs(voiced)], GAP) if end - start >= SHORTEST]


def _check_distinct(share: float, faint: bool, noise: float) -> None:
    if share > MOST:
        raise IndistinctVoice(f"sound without a pause in {share:.0%} of the time leaves no floor to tell a voice from")
    if faint and share:
        raise IndistinctVoice(f"what stands out from a floor of {noise:.0f} dBFS does so by too little to be told from it")
    if faint:
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


def _two_groups(values: np.ndarray) -> float:
    """The bound that parts levels [F] in dB into two groups with the least variance in each (Otsu 1979)."""
    counts, edges = np.histogram(values, np.arange(values.min(), values.max() + 1, 0.5))
    centers = (edges[1:] + edges[:-1]) / 2
    share, moment = np.cumsum(counts) / len(values), np.cumsum(counts * centers) / len(values)
    between = (moment[-1] * share - moment) ** 2 / np.maximum(share * (1 - share), 1e-9)
    return float(centers[between >= 0.999 * between.max()].mean())  # the middle of an empty stretch


def _floor_frames(voiced: np.ndarray, level: np.ndarray) -> np.ndarray:
    near = np.convolve(voiced, np.ones(2 * GUARD + 1), "full")[GUARD : GUARD + len(voiced)] > 0
    if (~near).sum() >= 25:  # half a second
        return ~near
    return ~voiced if (~voiced).sum() >= 10 else level <= np.percentile(level, 5)


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
