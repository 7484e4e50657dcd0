"""Sounds in MP4 (M4A), Matroska and WebM, and AAC without a container, which libsndfile does not open: through PyAV, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors_moshi_ttt import MoshiTTTError

SUFFIXES = (".m4a", ".mp4", ".mka", ".webm", ".aac")
ADTS_DELAY = 1024  # samples: ffmpeg's encoder and the least that AAC can have; without a container the file does not state it


class ContainerFile:
    """The first sound of a container, with soundfile's names for what it is. The encoder's delay is taken out as the container states it;
    AAC without one (ADTS) states neither that nor a length, and ends with what fills up its last packet.

    Raises:
        ValueError: PyAV is missing, or the file is none that it reads.
    """

    format = "CONTAINER"

    def __init__(self, path: Path):
        try:
            import av
        except ModuleNotFoundError:
            raise MoshiTTTError(f"{path}: {path.suffix} is read by PyAV; install it with: pip install 'moshi-ttt[m4a]'") from None
        self.path = path
        self._frames: int | None = None
        try:
            with av.open(str(path)) as container:
                if not container.streams.audio:
                    raise MoshiTTTError(f"{path}: the file holds no sound.")
                stream = container.streams.audio[0]
                self.samplerate, self.channels = stream.rate, stream.channels
                self._delay = ADTS_DELAY if container.format.name == "aac" else 0
                if stream.duration is not None and stream.time_base is not None and not self._delay:
                    self._frames = round(stream.duration * stream.time_base * self.samplerate)
        except av.FFmpegError as error:
            raise MoshiTTTError(f"{path}: the sound file cannot be read ({error.strerror}).") from None

    def __enter__(self) -> ContainerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing stays open between two readings: after a seek ffmpeg forgets to take out the encoder's delay."""

    @property
    def frames(self) -> int:
        """Samples a channel; where the container does not state them they are counted."""
        if self._frames is None:
            self._frames = sum(block.shape[1] for block in self._decoded())
        return self._frames

    def blocks(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Samples [begin, end) as float32 [channels, n]; fewer where the file breaks off. What comes before is decoded and let go."""
        at = 0
        for block in self._decoded():
            yield block[:, max(begin - at, 0) : max(end - at, 0)]
            at += block.shape[1]
            if at >= end:
                return

    def _decoded(self) -> Iterator[np.ndarray]:
        import av

        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.audio[0]
                to_float = av.AudioResampler(format="fltp", layout=stream.layout, rate=self.samplerate)
                skip = self._delay
                for frame in container.decode(stream):
                    for one in to_float.resample(frame):
                        yield one.to_ndarray()[:, skip:]
                        skip = max(skip - one.samples, 0)
        except av.FFmpegError as error:
            raise MoshiTTTError(f"{self.path}: the sound breaks off ({error.strerror}); copy the file again.") from None
