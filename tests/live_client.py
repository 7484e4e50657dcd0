"""A server of the engine for tests, and a caller that speaks Kyutai's protocol."""

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import sphn
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from modeling_moshi_ttt.live import engine as engine_home
from modeling_moshi_ttt.live.conversations import ConversationStore
from modeling_moshi_ttt.live.engine import Engine
from modeling_moshi_ttt.live.serve import server_config
from modeling_moshi_ttt.live.server import ServerSettings, create_app

FRAME, RATE = 1920, 24000


@contextlib.contextmanager
def running(app, *tls):
    """The port of an application that is served in a thread, over TLS with a certificate and its key."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        server = uvicorn.Server(server_config(app, *tls))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield place.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving(model, processor, folder, rows=2, patience=10**6, clips=(), name="tiny", **settings):
    """(engine, port) of a server."""
    engine = Engine(model, processor, rows, ConversationStore(folder, 3600, model, processor), patience, name)
    with running(create_app(engine, ServerSettings(**settings), clips)) as port:
        yield engine, port


def without_a_clock(patch):
    """Ticks as soon as there is sound, no frame dropped, nobody shed: what is compared depends on no load of the machine."""
    patch.setattr(engine_home, "PERIOD", 0.002)
    patch.setattr(engine_home, "BACKLOG", 10**6)
    patch.setattr(engine_home, "OVERRUNS", 10**9)


@dataclass
class Heard:
    """What a caller got."""

    kinds: list[int] = field(default_factory=list)
    sound: list[np.ndarray] = field(default_factory=list)
    text: str = ""
    metadata: list[dict] = field(default_factory=list)
    error: str = ""
    code: int = 0

    @property
    def conversation(self) -> str:
        return self.metadata[0]["conversation"]

    def take(self, message: bytes, decode) -> None:
        kind, payload = message[0], message[1:]
        self.kinds.append(kind)
        if kind == 1:
            self.sound.append(decode(payload))
        elif kind == 2:
            self.text += payload.decode()
        elif kind == 4:
            self.metadata.append(json.loads(payload))
        elif kind == 5:
            self.error = payload.decode()


def call(port, frames=(), query="", messages=(), expect=None, headers=None) -> Heard:
    """Call, send each frame [n] as Ogg Opus and each message as it is, wait for `expect` frames of sound, and hang up.

    With `format=pcm` in the query sound is 16-bit samples.
    """
    heard = Heard()
    bare = "format=pcm" in query
    writer, reader = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)

    def decode(data):
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768 if bare else reader.append_bytes(data)

    with connect(f"ws://127.0.0.1:{port}/api/chat?{query}", additional_headers=headers) as line:
        try:
            heard.take(line.recv(30), decode)
            for pcm in frames:
                line.send(b"\x01" + (np.rint(pcm * 32767).astype("<i2").tobytes() if bare else writer.append_pcm(pcm)))
            for message in messages:
                line.send(message)
            while expect is None or sum(map(len, heard.sound)) < expect * FRAME:
                heard.take(line.recv(60), decode)
        except ConnectionClosed as closed:
            heard.code = closed.rcvd.code if closed.rcvd else 1006
    return heard


def noise(frames: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [(0.1 * generator.standard_normal(FRAME)).astype(np.float32) for _ in range(frames)]
