"""Talk to a model in a terminal: microphone and loudspeaker of this machine, both levels and Moshi's words on the screen.

Ctrl-C ends the talk; with --save it can be gone on with. With --wav a recording is heard in place of the microphone, and nothing is played.
It is a machine that speaks. Wear headphones, or it hears itself.
"""

import argparse
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..common.files import check_folder
from ..data.audio import read_audio, write_audio
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError
from .loading import ADAPTER, MODEL, load_model
from .session import ABOUT, MoshiTTTSession

BARS, QUIETEST = 24, 60.0  # of a meter, and decibels below full scale where it begins
WAITING = 6  # frames of the microphone that may wait


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--adapter", help=ADAPTER)
    parser.add_argument(
        "--wav", type=Path, metavar="FILE", help="hear this recording in place of the microphone; of stereo the right channel"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.wav", help="write both voices, Moshi left and the user right")
    parser.add_argument("--seed", type=int, help="of what Moshi says")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the conversation after its end")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with a conversation that was kept")


def run(args: argparse.Namespace) -> int:
    """Talk until Ctrl-C, or to the recording's end."""
    if args.resume and args.seed is not None:
        raise MoshiTTTError("--seed cannot be given with --resume: a conversation goes on with its own settings.")
    if args.save:
        check_folder(args.save, ABOUT)
    model, processor = load_model(args.model, args.adapter, "MODEL")
    session = begin(args, model, processor)
    heard, said = [], []
    rate, size = processor.sampling_rate, session.largest_step
    source = recording(args.wav, rate, size) if args.wav else microphone(rate, size)
    screen = Screen()
    with source as (frames, play), Live(screen.drawn(), refresh_per_second=12) as live:
        try:
            for pcm in frames:
                start = time.perf_counter()
                frame = session.step(torch.from_numpy(pcm)[None])
                answer = frame.pcm[0].numpy()
                play(answer)
                heard.append(pcm)
                said.append(answer)
                screen.show(pcm, answer, frame.text[0], time.perf_counter() - start, size / rate)
                live.update(screen.drawn())
        except KeyboardInterrupt:
            pass  # the way to end it
    if args.out and said:
        write_audio(args.out, np.stack([np.concatenate(said), np.concatenate(heard)]), rate)
    if args.save:
        session.save(args.save)
    print(f"talked {len(said) * size / rate:.1f} s; Moshi said: {screen.words.strip() or 'nothing'}")
    return 0


def begin(args: argparse.Namespace, model: Any, processor: Any) -> MoshiTTTSession:
    """A new conversation, or one that was kept."""
    if args.resume is None:
        return MoshiTTTSession(model, processor, 1, processor.sampling_rate, seeds=None if args.seed is None else [args.seed])
    session = MoshiTTTSession.load(args.resume, model, processor)
    if session.batch_size != 1 or session.sample_rate != processor.sampling_rate:
        found = f"{session.batch_size} rows at {session.sample_rate} Hz"
        raise MoshiTTTError(f"--resume is {args.resume}, with {found}; it must have one row at {processor.sampling_rate} Hz.")
    return session


@contextmanager
def recording(path: Path, rate: int, size: int) -> Iterator[tuple[Iterator[np.ndarray], Any]]:
    """Frames of a file, and a loudspeaker that is none."""
    samples = read_audio(path, rate)[-1]
    samples = np.pad(samples, (0, -len(samples) % size))
    yield (samples[start : start + size] for start in range(0, len(samples), size)), lambda pcm: None


@contextmanager
def microphone(rate: int, size: int) -> Iterator[tuple[Iterator[np.ndarray], Any]]:
    """Frames of the microphone as they come, and what plays on the loudspeaker.

    Raises:
        OSError: there is no microphone or loudspeaker, or no PortAudio.
    """
    try:
        import sounddevice
    except OSError as error:  # of its library
        raise MoshiTTTOSError(f"sound cannot be had ({error}); install PortAudio (libportaudio2), or give --wav FILE.") from None
    heard: queue.Queue[np.ndarray] = queue.Queue()

    def hear(data: np.ndarray, count: int, moment: Any, status: Any) -> None:
        heard.put(data[:, 0].copy())
        if heard.qsize() > WAITING:
            heard.get()  # the oldest

    def frames() -> Iterator[np.ndarray]:
        while True:
            yield heard.get()

    try:
        streams = (
            sounddevice.InputStream(rate, blocksize=size, channels=1, dtype="float32", callback=hear),
            sounddevice.OutputStream(rate, blocksize=size, channels=1, dtype="float32"),
        )
    except sounddevice.PortAudioError as error:
        raise MoshiTTTOSError(f"no microphone or loudspeaker can be opened ({error}); plug one in, or give --wav FILE.") from None
    with streams[0], streams[1]:
        yield frames(), lambda pcm: streams[1].write(pcm[:, None])


class Screen:
    """Two levels, the words so far, and how fast it goes."""

    def __init__(self) -> None:
        self.words, self.factor, self._levels = "", 0.0, (0.0, 0.0)

    def show(self, heard: np.ndarray, said: np.ndarray, text: str, took: float, lasts: float) -> None:
        self.words += text
        self.factor = took / lasts
        self._levels = level(heard), level(said)

    def drawn(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for name, share in zip(("you", "Moshi"), self._levels):
            bars = round(share * BARS)
            table.add_row(Text(name, "bold"), Text("█" * bars + "·" * (BARS - bars), "green" if share < 0.9 else "red"))
        table.add_row(Text("says", "bold"), Text(self.words.strip()[-400:]))
        table.add_row(Text("speed", "bold"), Text(f"real-time factor {self.factor:.2f} (below 1 keeps up); Ctrl-C ends", "dim"))
        return table


def level(pcm: np.ndarray) -> float:
    """Loudness from 0 to 1, over 60 decibels."""
    power = float(np.mean(np.square(pcm)))
    return 0.0 if power == 0 else min(max(1 + 10 * np.log10(power) / QUIETEST, 0.0), 1.0)
