"""Spectral losses and quality measures of the tiny codec."""

import numpy as np
import torch
from torch import Tensor, nn

SAMPLE_RATE = 24_000


def mel_matrix(n_fft: int, bands: int, low: float = 40.0, high: float = 11_500.0) -> Tensor:
    """Triangles on the mel scale, each of sum one: [bands, n_fft // 2 + 1]."""
    edges = 700 * (10 ** (torch.linspace(np.log10(1 + low / 700), np.log10(1 + high / 700), bands + 2, dtype=torch.float64)) - 1)
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / n_fft
    up = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    matrix = torch.minimum(up, down).clamp(min=0)
    return (matrix / matrix.sum(1, keepdim=True).clamp(min=1e-3)).float()


def third_octaves(n_fft: int) -> Tensor:
    """Fifteen bands of a third of an octave, the first around 150 Hz: [15, n_fft // 2 + 1]."""
    edges = 150 * 2 ** ((torch.arange(16) - 0.5) / 3)
    bins = torch.arange(n_fft // 2 + 1) * SAMPLE_RATE / n_fft
    return ((bins >= edges[:-1, None]) & (bins < edges[1:, None])).float()


class SpectralLoss(nn.Module):
    """Distance of two waveforms [B, n]: log-mel and square-root magnitudes in several resolutions, and band envelopes by correlation.

    No phase enters but through the small waveform term, for the codes carry far too few bits for it.
    """

    def __init__(self, resolutions: tuple[tuple[int, int], ...] = ((512, 48), (1024, 80), (2048, 96))) -> None:
        super().__init__()
        self.resolutions = resolutions
        self.register_buffer("bands", third_octaves(640))
        for n_fft, _ in (*resolutions, (640, 0)):
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft) * (2 / n_fft) ** 0.5)
        for n_fft, bands in resolutions:
            self.register_buffer(f"mel_{n_fft}", mel_matrix(n_fft, bands))

    def magnitude(self, wave: Tensor, n_fft: int) -> Tensor:
        """[B, n] -> [B, bins, frames], of one size whatever the resolution."""
        window = self.get_buffer(f"window_{n_fft}")
        spectrum = torch.stft(wave, n_fft, n_fft // 2, window=window, return_complex=True)
        return (spectrum.real**2 + spectrum.imag**2 + 1e-8).sqrt()

    def log_mel(self, magnitude: Tensor, n_fft: int) -> Tensor:
        return (self.get_buffer(f"mel_{n_fft}") @ magnitude + 3e-3).log()

    def envelopes(self, wave: Tensor) -> Tensor:
        """[B, n] -> [B, 15, frames of 13 ms], the loudness of each third of an octave."""
        return (self.get_buffer("bands") @ self.magnitude(wave, 640) ** 2).sqrt()

    def forward(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        mel, stft = output.new_zeros(()), output.new_zeros(())
        for n_fft, _ in self.resolutions:
            a = self.magnitude(output, n_fft)
            with torch.no_grad():
                b = self.magnitude(target, n_fft)
                mel_b = self.log_mel(b, n_fft)
            mel = mel + (self.log_mel(a, n_fft) - mel_b).abs().mean() / len(self.resolutions)
            stft = stft + (a.sqrt() - b.sqrt()).abs().mean() / len(self.resolutions)
        envelope = envelope_distance(self.envelopes(output), self.envelopes(target))
        return {"mel": mel, "stft": stft, "envelope": envelope, "wave": (output - target).abs().mean()}


def envelope_distance(output: Tensor, target: Tensor, frames: int = 28) -> Tensor:
    """1 − correlation of band envelopes [B, bands, frames] over windows of 0.37 s, loud windows counting more."""
    a, b = (x.unfold(-1, frames, frames // 4) for x in (output, target))  # [B, bands, windows, frames]
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    power_a, power_b = (a**2).sum(-1), (b**2).sum(-1)
    correlation = (a * b).sum(-1) / ((power_a + 1e-4) * (power_b + 1e-4)).sqrt()
    weight = power_b.detach() ** 0.25
    weight = torch.where(power_b > 1e-4, weight, torch.zeros_like(weight))
    return (weight * (1 - correlation)).sum() / weight.sum().clamp(min=1e-6)


def stoi(reference: Tensor, output: Tensor) -> float:
    """Short-time objective intelligibility of one clip [n]; 1 is perfect."""
    from pystoi import stoi as measure

    return float(measure(reference.double().numpy(), output.double().numpy(), SAMPLE_RATE, extended=False))


def mel_distance(reference: Tensor, output: Tensor) -> float:
    """Mean absolute difference of 80 log-mel bands (natural logarithm, 43 ms windows, floor 50 dB under loud speech)."""
    loss = SpectralLoss(((1024, 80),))
    return float(loss(output[None], reference[None])["mel"])
