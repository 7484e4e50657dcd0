"""An hour of talk, sound in and sound out: frames take as long at its end, memory does not grow, and it goes on when saved.

The tiny model and codec, one row. The conversation is saved at one frame and goes on; another process takes up what was saved. Both say
the same, to the bit. The time of a frame is measured at the end, in turns with a conversation that has just begun, and compared by medians,
so that what else the machine does falls on both. Memory is the process's own, every thousand frames.

    python benchmarks/one_hour.py --out benchmarks/one_hour.json      # about twenty minutes of one core
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration, MoshiTTTProcessor, MoshiTTTSession, packaged

FRAME = 1920
HOUR, SAVED_AT = 45_000, 20_000  # frames
EVERY = 1000


def tiny_model() -> tuple[Any, Any]:
    """Model and processor."""
    torch.manual_seed(0)
    model = MoshiTTTForConditionalGeneration(MoshiTTTConfig.from_pretrained(packaged("model", "tiny"))).eval()
    return model, MoshiTTTProcessor.from_pretrained(packaged("processor", "tiny"))


def tiny_session(folder: Path | None = None) -> MoshiTTTSession:
    """A new conversation, or the one in a folder."""
    model, processor = tiny_model()
    return MoshiTTTSession(model, processor, seeds=[7]) if folder is None else MoshiTTTSession.load(folder, model, processor)


def user_frame(t: int) -> torch.Tensor:
    """What the user says in frame t: noise, loud and quiet in turn."""
    loudness = 0.2 if t // 25 % 2 else 0.002
    return loudness * torch.randn(1, FRAME, generator=torch.Generator().manual_seed(t))


def talk(session: MoshiTTTSession, start: int, stop: int, digest: Any) -> list[int]:
    """Frames `start` to `stop`; what is said goes into the digest. Returns the process's memory in bytes, every thousand frames."""
    memory = []
    for t in range(start, stop):
        frame = session.step(user_frame(t))
        digest.update(frame.pcm.numpy().tobytes())
        digest.update(frame.text[0].encode())
        if t % EVERY == 0:
            memory.append(psutil.Process().memory_info().rss)
    return memory


def resumed_digest(folder: Path, start: int, stop: int) -> str:
    """What another process says that takes up the saved conversation."""
    command = [sys.executable, __file__, "--resume", folder, "--from", str(start), "--frames", str(stop)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


def frame_times(old: MoshiTTTSession, start: int, count: int) -> dict[str, float]:
    """Median milliseconds of processor time of a frame late in the conversation and of one early in another, taken in turns."""
    young, times = tiny_session(), {"late": [], "early": []}
    talk(young, 0, min(count, start), hashlib.sha256())
    for t in range(start, start + count):
        for name, session in (("early", young), ("late", old)):
            begin = time.process_time()
            session.step(user_frame(t))
            times[name].append(1e3 * (time.process_time() - begin))
    ratio = statistics.median(late / early for late, early in zip(times["late"], times["early"], strict=True))
    return {name: statistics.median(taken) for name, taken in times.items()} | {"ratio": ratio}


def measure(session: MoshiTTTSession, frames: int, saved_at: int) -> dict[str, Any]:
    """The whole of a conversation."""
    memory = talk(session, 0, saved_at, hashlib.sha256())
    with tempfile.TemporaryDirectory() as place:
        session.save(Path(place) / "session")
        digest = hashlib.sha256()
        memory += talk(session, saved_at, frames, digest)
        equal = resumed_digest(Path(place) / "session", saved_at, frames) == digest.hexdigest()
    settled = memory[2:] or memory[-1:]
    return {
        "frames": frames,
        "saved_at": saved_at,
        "resumed_equal": equal,
        "memory_mb": [round(held / 1e6, 1) for held in memory],
        "memory_growth": settled[-1] / settled[0] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=HOUR)
    parser.add_argument("--saved-at", type=int, default=SAVED_AT)
    parser.add_argument("--resume", type=Path, help="go on with the conversation in this folder and print a digest of what is said")
    parser.add_argument("--from", type=int, dest="start", help="the frame at which that was saved")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.resume:
        digest = hashlib.sha256()
        talk(tiny_session(options.resume), options.start, options.frames, digest)
        print(digest.hexdigest())
        return
    session = tiny_session()
    found = measure(session, options.frames, options.saved_at)
    found["ms"] = frame_times(session, options.frames, EVERY)
    print(f"saved at frame {found['saved_at']}, resumed in another process: {'equal' if found['resumed_equal'] else 'DIFFERENT'}")
    print(f"a frame takes {found['ms']['late']:.2f} ms late, {found['ms']['early']:.2f} ms early: {found['ms']['ratio']:.3f}x")
    print(f"memory from frame {2 * EVERY} to {found['frames']}: {found['memory_growth']:+.2%} (MB: {found['memory_mb']})")
    if options.out:
        machine = {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
        options.out.write_text(json.dumps(found | machine, indent=1) + "\n")


if __name__ == "__main__":
    main()
