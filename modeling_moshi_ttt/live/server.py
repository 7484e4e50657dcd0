"""The engine behind an ASGI application: Kyutai's protocol at `/api/chat`, the page, health, readiness and metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..data.audio import read_audio
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE
from ..version import __version__
from . import protocol
from .capacity import quantile, row_bytes
from .clips import Clip
from .engine import Beginning, Caller, Ended, Engine, EngineFull, MemoryLine, Said

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
OUTBOX = 25  # frames that wait for a slow reader; the oldest sound is dropped beyond
VOICE_SECONDS = 10  # of a voice prompt
MESSAGES = 100  # a second, over ten seconds, that a caller may send
AHEAD = 10.0  # seconds of sound that a caller may send faster than it passes
POLICY, UNSUPPORTED, GOING_AWAY, FULL = 1008, 1003, 1001, 1013  # close codes (RFC 6455)
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; media-src 'self' blob:; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address may hold a token
}


@dataclass(frozen=True)
class ServerSettings:
    """What a server offers and allows.

    sampling: defaults of `new_stream`'s settings.
    token: what a caller has to know; anyone may call where it is None.
    origins: pages of other servers that may call, as `https://example.org`; the server's own always may.
    voices: a folder of sound files that `voice_prompt` names.
    idle: seconds of silence on the line after which a call is over.
    send: seconds that a message may take to leave.
    minutes: of a call; no limit where it is 0.
    log_words: whether logs hold what Moshi says.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    token: str | None = None
    origins: tuple[str, ...] = ()
    voices: Path | None = None
    idle: float = 30.0
    send: float = 20.0
    minutes: float = 0.0
    log_words: bool = False


class Hangup(Exception):
    """A call has to end, for this reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class LiveCall:
    """One caller's line: what comes in goes to the engine's row, what the row says goes out."""

    def __init__(self, engine: Engine, settings: ServerSettings, socket: WebSocket, call: protocol.Call) -> None:
        self.engine, self.settings, self.socket, self.call = engine, settings, socket, call
        self.codec: protocol.SoundCodec = protocol.PcmSound() if call.pcm else protocol.OpusSound(engine.processor.sampling_rate)
        self.beginning = Beginning(call.sampling, text=call.text_prompt)
        self.dropped = 0
        self._outbox: deque[Said | Ended] = deque()
        self._filled, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self._since, self._sound, self._messages = time.monotonic(), 0.0, 0

    async def run(self) -> None:
        """From the row's beginning to the end of the call."""
        if self.call.voice_prompt:
            voice = await asyncio.to_thread(read_voice, self.settings.voices, self.call.voice_prompt, self.engine.processor.sampling_rate)
            self.beginning = Beginning(self.call.sampling, voice, self.call.text_prompt)
        caller = await asyncio.to_thread(self.engine.join, self._tell, self.beginning, self.call.resume, self.call.stats)
        tasks = []
        try:
            await self._send(protocol.message(protocol.HANDSHAKE))
            await self._send(protocol.metadata(type="begin", conversation=caller.name, **about(self.engine, self.settings)))
            tasks = [asyncio.create_task(self._listen(caller)), asyncio.create_task(self._speak())]
            done, _ = await asyncio.wait(tasks, timeout=self.settings.minutes * 60 or None, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise Hangup(POLICY, f"the {self.settings.minutes:g} minutes of a call are over; it is kept, and can be gone on with")
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.engine.counts.dropped += self.dropped
            await asyncio.shield(asyncio.to_thread(self.engine.leave, caller))

    # In, from the caller

    async def _listen(self, caller: Caller) -> None:
        while True:
            try:
                received = await asyncio.wait_for(self.socket.receive(), self.settings.idle)
            except TimeoutError:
                raise Hangup(GOING_AWAY, f"nothing was heard for {self.settings.idle:g} seconds; the conversation is kept") from None
            if received["type"] == "websocket.disconnect":
                return
            data = received.get("bytes")
            if not data:
                raise Hangup(UNSUPPORTED, "a message is text or empty; send binary ones, their kind in the first byte.")
            self._check_pace()
            if data[0] == protocol.AUDIO:
                self._hear(caller, data[1:])
            elif data[0] == protocol.PING:
                await self._send(protocol.message(protocol.PING))
            elif data[0] == protocol.CONTROL:
                await self._control(caller, data[1:])
            elif data[0] not in (protocol.HANDSHAKE, protocol.TEXT, protocol.METADATA):  # which say nothing to a server
                raise Hangup(UNSUPPORTED, f"a message is of kind {data[0]}, which a server does not know; send 1 (sound), 3 or 6.")

    def _check_pace(self) -> None:
        self._messages += 1
        if self._messages > MESSAGES * (10 + time.monotonic() - self._since):
            raise Hangup(POLICY, f"more than {MESSAGES} messages come in a second; send sound as it is heard.")

    def _hear(self, caller: Caller, data: bytes) -> None:
        pcm = self.codec.decode(data)
        self._sound += len(pcm) / self.engine.processor.sampling_rate
        if self._sound > AHEAD + time.monotonic() - self._since:
            raise Hangup(POLICY, "the sound comes faster than it passes; send it as it is heard.")
        caller.hear(pcm)

    async def _control(self, caller: Caller, action: bytes) -> None:
        if action[:1] in (bytes([protocol.START]), bytes([protocol.PAUSE])):
            caller.paused = action[0] == protocol.PAUSE
        elif action[:1] == bytes([protocol.RESTART]):
            await asyncio.to_thread(self.engine.restart, caller, self.beginning)
        elif action[:1] == bytes([protocol.SAVE]):
            await asyncio.to_thread(self.engine.save, caller)
            await self._send(protocol.metadata(type="saved", conversation=caller.name, minutes=self.engine.store.keep / 60))
        elif action[:1] != bytes([protocol.END_TURN]):  # Moshi has no turns
            raise Hangup(UNSUPPORTED, f"a control is {action[:1].hex() or 'empty'}; it may be 0 to 3, or {protocol.SAVE} to keep.")

    # Out, to the caller

    def _tell(self, event: Said | Ended) -> None:
        """In the engine's thread."""
        self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Said | Ended) -> None:
        self._outbox.append(event)
        if len(self._outbox) > OUTBOX and isinstance(second := self._outbox[1], Said):
            first = self._outbox.popleft()
            self._outbox[0] = second._replace(text=getattr(first, "text", "") + second.text)  # no word is lost with its sound
            self.dropped += 1
        self._filled.set()

    async def _speak(self) -> None:
        while True:
            while not self._outbox:
                self._filled.clear()
                await self._filled.wait()
            event = self._outbox.popleft()
            if isinstance(event, Ended):
                raise Hangup(FULL, event.reason)
            if event.text:
                await self._send(protocol.message(protocol.TEXT, event.text))
                if self.settings.log_words:
                    logger.info("said", extra={"words": event.text})
            if data := self.codec.encode(event.pcm):
                await self._send(protocol.message(protocol.AUDIO, data))
            if event.memory is not None:
                await self._send(self._stats(event.latency, event.memory))

    def _stats(self, latency: float, memory: Sequence[MemoryLine]) -> bytes:
        factor = quantile(self.engine.ticks, 0.5) * FRAME_RATE
        return protocol.metadata(type="stats", latency=latency, real_time_factor=factor, layers=[line._asdict() for line in memory])

    async def _send(self, data: bytes) -> None:
        try:
            await asyncio.wait_for(self.socket.send_bytes(data), self.settings.send)
        except TimeoutError:
            raise Hangup(GOING_AWAY, "the line takes nothing any more; the conversation is kept") from None


def read_voice(folder: Path | None, name: str, sample_rate: int) -> np.ndarray:
    """The samples [n] of a voice that the server offers.

    Raises:
        ValueError: there is none of this name.
    """
    there = voices(folder)
    if name not in there:
        raise MoshiTTTError(f"`voice_prompt={name[:80]}` is no voice of this server; it has {', '.join(there) or 'none'}.")
    return read_audio(there[name], sample_rate)[0, : VOICE_SECONDS * sample_rate]


def voices(folder: Path | None) -> dict[str, Path]:
    """Sound files by name."""
    return (
        {} if folder is None else {path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".wav", ".flac", ".ogg", ".mp3")}
    )


def about(engine: Engine, settings: ServerSettings) -> dict[str, Any]:
    """What a page has to know."""
    config = engine.model.config
    return {
        "model": engine.name,
        "sample_rate": engine.processor.sampling_rate,
        "window_seconds": config.sliding_window / FRAME_RATE,
        "reach_seconds": (config.num_hidden_layers * (config.sliding_window - 1) + 1) / FRAME_RATE,
        "ttt_layers": list(config.ttt_layers),
        "keep_minutes": engine.store.keep / 60,
        "rows": engine.max_rows,
        "voices": list(voices(settings.voices)),
    }


def metrics(engine: Engine) -> str:
    """Prometheus' text form."""
    counts, callers = asdict(engine.counts), engine.callers()
    for name in ("late", "silent", "dropped"):
        counts[name] += sum(getattr(caller, name) for caller in callers)
    lines = []

    def add(name: str, kind: str, text: str, values: dict[str, float]) -> None:
        full = f"moshi_ttt_{name}"
        lines.extend([f"# HELP {full} {text}", f"# TYPE {full} {kind}", *(f"{full}{labels} {value:g}" for labels, value in values.items())])

    add("rows", "gauge", "Callers now.", {"": len(callers)})
    add("rows_max", "gauge", "Callers at most.", {"": engine.max_rows})
    add("row_bytes", "gauge", "Memory of one row.", {"": row_bytes(engine.session)})
    ticks = list(engine.ticks)
    add("tick_seconds", "gauge", "Time of a tick over the last minute.", {f'{{quantile="{q}"}}': quantile(ticks, q) for q in (0.5, 0.99)})
    add("real_time_factor", "gauge", "Median tick over 80 ms; below 1 keeps up.", {"": quantile(ticks, 0.5) * FRAME_RATE})
    words = {
        "callers": "Calls taken",
        "refused": "Calls refused",
        "shed": "Calls ended for the others' sake",
        "overruns": "Ticks over 80 ms",
    }
    words |= {"late": "Ticks that a row waited for a late frame", "silent": "Frames of silence heard instead", "dropped": "Frames dropped"}
    for name, text in words.items():
        add(f"{name}_total", "counter", f"{text} since the start.", {"": counts[name]})
    return "\n".join(lines) + "\n"


def create_app(engine: Engine, settings: ServerSettings, clips: Sequence[Clip] = ()) -> Starlette:
    """The ASGI application; it starts the engine, and at its end keeps every conversation.

    Args:
        clips: sounds that the page offers to play in place of a microphone.
    """
    sounds = {clip.name: clip for clip in clips}

    async def chat(socket: WebSocket) -> None:
        if not allowed_origin(socket, settings.origins):
            await socket.close(POLICY)  # before it is accepted: HTTP 403
            return
        await socket.accept()
        await answer(socket, engine, settings)

    async def info(request: Request) -> Response:
        offered = [{"name": clip.name, "label": clip.label, "words": clip.words} for clip in clips]
        return JSONResponse(about(engine, settings) | {"version": __version__, "token": settings.token is not None, "clips": offered})

    async def clip(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in sounds:
            return PlainTextResponse("there is no such clip\n", 404)
        return Response(sounds[name].wav, media_type="audio/wav", headers={"Cache-Control": "max-age=3600"})

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers=SECURITY)

    async def health(request: Request) -> Response:
        return _state(engine.alive, "ticking", "the engine's thread has stopped")

    async def readiness(request: Request) -> Response:
        return _state(engine.ready, "ready", "not ready, or stopping")

    async def measured(request: Request) -> Response:
        return PlainTextResponse(metrics(engine), media_type="text/plain; version=0.0.4")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        sweeper = asyncio.create_task(_sweep(engine))
        yield
        sweeper.cancel()
        await asyncio.to_thread(engine.close)

    routes = [
        Route("/", page),
        Route("/api/info", info),
        Route("/api/clips/{name}.wav", clip),
        Route("/healthz", health),
        Route("/readyz", readiness),
        Route("/metrics", measured),
        WebSocketRoute("/api/chat", chat),
        Mount("/static", StaticFiles(directory=PAGE)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def answer(socket: WebSocket, engine: Engine, settings: ServerSettings) -> None:
    """Take a call that was accepted, and end it in words where something is wrong."""
    query = dict(socket.query_params)
    if bearer := socket.headers.get("authorization", ""):
        query["token"] = bearer.removeprefix("Bearer ")
    try:
        call = protocol.read_query(query, settings.token, settings.sampling)
        await LiveCall(engine, settings, socket, call).run()
    except WebSocketDisconnect:
        return
    except EngineFull as error:
        await _end(socket, FULL, str(error))
    except MoshiTTTError as error:
        await _end(socket, POLICY, str(error))
    except Hangup as hangup:
        await _end(socket, hangup.code, hangup.reason)
    else:
        await _end(socket, 1000, "")


async def _end(socket: WebSocket, code: int, words: str) -> None:
    """Say why, and close; a caller that has gone already does not hear it."""
    logger.info("ended", extra={"code": code, "reason": words})
    with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):  # RuntimeError: Starlette's, of a socket that is closed
        async with asyncio.timeout(1):
            if words:
                await socket.send_bytes(protocol.message(protocol.ERROR, words))
            await socket.close(code)


def allowed_origin(socket: WebSocket, origins: Sequence[str]) -> bool:
    """Whether the page that calls is the server's own or a named one; programs that are no browsers name none."""
    origin = socket.headers.get("origin")
    return origin is None or origin in origins or urlsplit(origin).netloc == socket.headers.get("host")


async def _sweep(engine: Engine) -> None:
    while True:
        await asyncio.to_thread(engine.store.remove_old)
        await asyncio.sleep(60)


def _state(good: bool, yes: str, no: str) -> Response:
    return PlainTextResponse(f"{yes if good else no}\n", 200 if good else 503)
