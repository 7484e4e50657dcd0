"""An hour of one conversation through the server, which is killed half way: another server goes on with it, and nothing is heard of that.

The tiny model, one caller, 16-bit samples over Kyutai's protocol. The server runs without its clock, each frame sent when the last one is
answered, so that the hour takes minutes. At its half the caller has the conversation saved, the server's process is killed (SIGKILL), and a
second server resumes it from a copy of the folder. Everything said is compared, to the bit, with `MoshiTTTSession` hearing the same without
a server. Latency is the time from a frame sent to its answer; memory is the servers' own.

    python benchmarks/live_hour.py --out benchmarks/live_hour.json      # about twenty minutes of one core
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import uvicorn
from one_hour import HOUR, tiny_model, user_frame
from websockets.sync.client import connect

from modeling_moshi_ttt import MoshiTTTSession
from modeling_moshi_ttt.live import engine as engine_home
from modeling_moshi_ttt.live import protocol
from modeling_moshi_ttt.live import server as server_home
from modeling_moshi_ttt.live.conversations import ConversationStore
from modeling_moshi_ttt.live.serve import listening, server_config

QUERY = "format=pcm&seed=7&audio_temperature=0.8&text_temperature=0.7"
SETTINGS = {"seeds": [7], "temperature": 0.8, "text_temperature": 0.7, "do_sample": True}
SOUND = protocol.PcmSound()
EVERY = 250  # frames between two looks at the server's memory


def serve(folder: Path) -> None:
    """Serve the tiny model without a clock, one row; print the port."""
    engine_home.PERIOD = 0.001
    server_home.AHEAD = server_home.MESSAGES = 10**9  # nobody can send faster than time passes where none does
    torch.set_num_threads(1)
    model, processor = tiny_model()
    engine = engine_home.Engine(model, processor, 1, ConversationStore(folder, 1e6, model, processor), patience=10**9)
    app = server_home.create_app(engine, server_home.ServerSettings())
    with listening("127.0.0.1", 0) as place:
        print(place.getsockname()[1], flush=True)
        uvicorn.Server(server_config(app)).run(sockets=[place])


@contextmanager
def server(folder: Path) -> Any:
    """(port, process) of a server in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process
    finally:
        process.kill()
        process.wait()


def samples(t: int) -> bytes:
    """What the user says in frame t, as it is sent."""
    return SOUND.encode(user_frame(t)[0].numpy())


class Line:
    """A caller's end of the line."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.words, self.conversation = "", ""
        while not self.conversation:
            self._take(self.socket.recv(120))

    def _take(self, message: Any) -> bytes | None:
        if message[0] == protocol.AUDIO:
            return bytes(message[1:])
        if message[0] == protocol.TEXT:
            self.words += message[1:].decode()
        elif message[0] == protocol.METADATA:
            about = json.loads(message[1:])
            self.conversation = about["conversation"]
            self.saved = about["type"] == "saved"
        elif message[0] == protocol.ERROR:
            raise RuntimeError(message[1:].decode())
        return None

    def say(self, sound: bytes) -> bytes:
        """Send a frame; what is answered."""
        self.socket.send(protocol.message(protocol.AUDIO, sound))
        while (answer := self._take(self.socket.recv(120))) is None:
            pass
        return answer

    def save(self) -> None:
        self.saved = False
        self.socket.send(protocol.message(protocol.CONTROL, bytes([protocol.SAVE])))
        while not self.saved:
            self._take(self.socket.recv(120))


def talk(line: Line, process: Any, start: int, stop: int) -> dict[str, Any]:
    """Say frames `start` to `stop`: what was answered, how long each took in seconds, the server's memory in bytes every EVERY frames."""
    answers, took, memory = [], [], []
    for t in range(start, stop):
        sound, begin = samples(t), time.perf_counter()
        answers.append(line.say(sound))
        took.append(time.perf_counter() - begin)
        if t % EVERY == 0:
            memory.append(psutil.Process(process.pid).memory_info().rss)
    return {"answers": answers, "took": took, "memory": memory, "words": line.words}


def through_servers(frames: int) -> list[dict[str, Any]]:
    """Both halves of a conversation; the first server is killed between them."""
    half = frames // 2
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        with server(first) as (port, process), connect(f"ws://127.0.0.1:{port}/api/chat?{QUERY}") as socket:
            line = Line(socket)
            halves = [talk(line, process, 0, half)]
            line.save()
            line.say(samples(0))  # what comes after the saving is lost with the server
            process.kill()
        shutil.copytree(first, second)
        resume = f"format=pcm&resume={line.conversation}"
        with server(second) as (port, process), connect(f"ws://127.0.0.1:{port}/api/chat?{resume}") as socket:
            halves.append(talk(Line(socket), process, half, frames))
    return halves


def alone(frames: int) -> tuple[list[bytes], str]:
    """What a session says that hears the same: each frame as it would be sent, and its words."""
    session, said, words = MoshiTTTSession(*tiny_model(), **SETTINGS), [], []
    for t in range(frames):
        frame = session.step(torch.from_numpy(SOUND.decode(samples(t)))[None])
        said.append(SOUND.encode(frame.pcm[0].numpy()))
        words.append(frame.text[0])
    return said, "".join(words)


def measure(frames: int) -> dict[str, Any]:
    """Raises RuntimeError where the servers said anything else than the session alone."""
    halves = through_servers(frames)
    expected, words = alone(frames)
    answers = [answer for half in halves for answer in half["answers"]]
    if answers != expected or "".join(half["words"] for half in halves) != words:
        different = [t for t, (heard, own) in enumerate(zip(answers, expected)) if heard != own]
        raise RuntimeError(f"{len(different)} of {frames} frames differ from the session's, the first is {different[:1]}")
    part = min(frames // 4, 3750)  # five minutes
    result = {"frames": frames, "killed_after": frames // 2, "frames_equal": frames, "words_equal": True}
    for name, half in zip(("first", "second"), halves):
        after, settled = half["took"][len(half["took"]) // 4 :], half["memory"][len(half["memory"]) // 4 :]
        result[name] = {
            "latency_ms_at_first": 1e3 * statistics.median(after[:part]),
            "latency_ms_at_last": 1e3 * statistics.median(after[-part:]),
            "latency_ms_p99": 1e3 * float(np.quantile(after, 0.99)),
            "memory_mb": [round(statistics.median(settled[:3]) / 1e6, 1), round(statistics.median(settled[-3:]) / 1e6, 1)],
        }
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=HOUR, help="of 80 ms (default: an hour)")
    parser.add_argument("--out", type=Path, help="where to write what was measured, as JSON")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve)
        return 0
    torch.set_num_threads(1)
    result = measure(args.frames) | {"date": str(date.today()), "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
