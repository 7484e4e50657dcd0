"""Many conversations with one model in real time: one thread owns the model and lets every caller's row hear and say 80 ms at each tick.

A caller is a row of one batch. Rows come, pause and go at any tick, and what a row says depends on nothing but its own past and its seed
(continuous batching; Yu et al. 2022, "Orca", scheduling per iteration).
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors_moshi_ttt import MoshiTTTError
from ..mimi_stream import MAX_SAMPLE
from ..tokens_moshi_ttt import FRAME_RATE
from .capacity import full_session
from .conversations import ConversationStore
from .session import MoshiTTTSession

logger = logging.getLogger(__name__)

PERIOD = 1 / FRAME_RATE  # seconds between two ticks
BACKLOG = 6  # frames that a caller may be ahead; the oldest are dropped beyond
JITTER = 2  # frames that may wait in a row before it takes two at a tick
OVERRUNS = 12  # ticks in a row that last longer than their period, after which a row is shed
REST = 10.0  # seconds after that in which nobody is let in
RECENT = 750  # ticks whose times are kept: a minute
MEMORY_EVERY = 5  # ticks between two looks at what TTT layers learn


class EngineFull(MoshiTTTError):
    """Every row is taken, or ticks have just been too slow: try again later."""


class MemoryLine(NamedTuple):
    """What a TTT layer of a row learns: see `TTTOpenLosses`. A loss is None where a mini-batch has just ended."""

    layer: int
    initial: float | None
    current: float | None
    drift: float


class Said(NamedTuple):
    """What a caller is told after a tick."""

    pcm: np.ndarray  # [1920] float32
    text: str
    latency: float  # seconds since the user's last sound of these 80 ms came in
    memory: list[MemoryLine] | None  # at some ticks, to callers that want it


class Ended(NamedTuple):
    """The last that a caller is told where the engine ends its conversation."""

    reason: str


@dataclass(frozen=True)
class Beginning:
    """What a new conversation begins from: settings of `new_stream` with one seed, and a prompt as `MoshiTTTProcessor.prompt` takes it."""

    sampling: dict[str, Any] = field(default_factory=dict)
    voice: np.ndarray | None = None  # [n] at the codec's rate
    text: str | None = None


class Caller:
    """One conversation. [`hear`] and `paused` are for any thread, the rest is the engine's."""

    def __init__(self, name: str, listener: Callable[[Said | Ended], None], wants_memory: bool, frame_size: int) -> None:
        self.name, self.listener, self.wants_memory = name, listener, wants_memory
        self.paused = False
        self.dropped = self.late = self.silent = self.frames = 0
        self.row = -1
        self._waiting: deque[tuple[float, np.ndarray]] = deque()
        self._piece, self._missing, self._silence = np.zeros(0, np.float32), 0, np.zeros(frame_size, np.float32)

    def hear(self, pcm: np.ndarray) -> None:
        """Take the user's next samples `[n]` float32 at the codec's rate, any number of them; what is too much drops the oldest.

        Raises:
            ValueError: samples that are not finite, or beyond ±10.
        """
        if not bool((np.abs(pcm) <= MAX_SAMPLE).all()):  # False for NaN, too
            raise MoshiTTTError(f"the sound holds samples that are not finite or beyond ±{MAX_SAMPLE:g}; send samples in [-1, 1].")
        if self.paused:
            return
        size = len(self._silence)
        whole = np.concatenate([self._piece, pcm])
        end = len(whole) // size * size
        self._piece = whole[end:]
        for start in range(0, end, size):
            self._waiting.append((time.monotonic(), whole[start : start + size]))
        while len(self._waiting) > BACKLOG:
            self._waiting.popleft()
            self.dropped += 1

    @property
    def tag(self) -> str:
        """What logs call it: too little of the name to go on with the conversation."""
        return self.name[:6]

    @property
    def ahead(self) -> int:
        """Frames that wait."""
        return len(self._waiting)

    def next_frame(self, patience: int) -> tuple[float, np.ndarray] | None:
        """When the frame that is due came in, and the frame: silence after more than `patience` ticks without one; None where the row
        waits.
        """
        if self.paused:
            return None
        if self._waiting:
            self._missing = 0
            self.frames += 1
            return self._waiting.popleft()
        if self.frames == 0:
            return None
        self._missing += 1
        if self._missing <= patience:
            self.late += 1
            return None
        self.silent += 1
        return time.monotonic(), self._silence


@dataclass
class Counts:
    """What the engine has counted since its start."""

    callers: int = 0
    refused: int = 0
    shed: int = 0
    overruns: int = 0
    late: int = 0
    silent: int = 0
    dropped: int = 0

    def add(self, caller: Caller) -> None:
        self.late += caller.late
        self.silent += caller.silent
        self.dropped += caller.dropped


class Engine:
    """The model's thread and the rows of its callers.

    Args:
        model, processor: as `MoshiTTTSession` takes them.
        max_rows: callers at once; each has its row, and all the memory of its window, from the start.
        store: where conversations are kept when their callers leave.
        patience: ticks that a row waits for a late frame before it hears silence.
        name: of the model, as callers are told.
    """

    def __init__(self, model: Any, processor: Any, max_rows: int, store: ConversationStore, patience: int = 3, name: str = "") -> None:
        self.name, self.model, self.processor = name, model, processor
        self.max_rows, self.store, self.patience = max_rows, store, patience
        self.counts, self.ticks, self.ready = Counts(), deque[float](maxlen=RECENT), False
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._callers: dict[str, Caller] = {}
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._slow, self._rest_until, self._ticked = 0, 0.0, time.monotonic()
        self.session = full_session(model, processor, max_rows)
        self._thread = threading.Thread(target=self._run, name="moshi-ttt engine", daemon=True)

    # For any thread

    def start(self) -> None:
        self._thread.start()
        self.ready = True

    @property
    def alive(self) -> bool:
        """Whether the thread ticks."""
        return self._thread.is_alive() and time.monotonic() - self._ticked < 50 * PERIOD

    def callers(self) -> list[Caller]:
        with self._lock:
            return list(self._callers.values())

    def join(
        self,
        listener: Callable[[Said | Ended], None],
        beginning: Beginning | None = None,
        resume: str | None = None,
        wants_memory: bool = False,
    ) -> Caller:
        """Take a row for a new conversation, or for one that is kept. It begins with the caller's first sound.

        Args:
            listener: told what Moshi says, in the engine's thread; it must not wait.
            resume: the name of a kept conversation.

        Raises:
            EngineFull: no row is free.
            ValueError: settings or a prompt that the model refuses, or no such conversation.
        """
        caller = Caller(resume or self.store.new_name(), listener, wants_memory, self.processor.frame_size)
        for other in self.callers():
            if other.name == caller.name:  # on a line that is dead, perhaps
                self._ask(lambda other=other: self._end(other, "the conversation goes on elsewhere"))
        self._admit(caller)
        try:
            state = None if resume is None else self.store.read(resume)
            self._ask(lambda: self._seat(caller, beginning or Beginning(), state))
        except BaseException:
            with self._lock:
                del self._callers[caller.name]
            raise
        logger.info("joined", extra={"caller": caller.tag, "resumed": resume is not None, "rows": len(self.callers())})
        return caller

    def _admit(self, caller: Caller) -> None:
        with self._lock:
            full, resting = len(self._callers) >= self.max_rows, time.monotonic() < self._rest_until
            if full or resting or self._stopping.is_set() or caller.name in self._callers:
                self.counts.refused += 1
                why = f"all {self.max_rows} places are taken" if full else "the server is stopping or too busy"
                raise EngineFull(f"{why}; try again in a minute.")
            self._callers[caller.name] = caller
            self.counts.callers += 1

    def restart(self, caller: Caller, beginning: Beginning) -> None:
        """Let a caller begin anew, in its row."""
        self._ask(lambda: self._seat(caller, beginning, None))

    def save(self, caller: Caller) -> None:
        """Keep a conversation as it is now; it goes on."""
        if self._ask(lambda: self._hold(caller)):
            self.store.write(caller.name)

    def leave(self, caller: Caller) -> bool:
        """Free the caller's row and keep its conversation; False where there was nothing to keep."""
        if self._thread.is_alive():
            self._ask(lambda: self._unseat(caller))
        kept = self.store.write(caller.name)
        counts = {name: getattr(caller, name) for name in ("frames", "late", "silent", "dropped")}
        logger.info("left", extra={"caller": caller.tag, "kept": kept, **counts})
        return kept

    def close(self, reason: str = "the server is stopping") -> None:
        """End and keep all conversations, and stop the thread."""
        self.ready, self._rest_until = False, math.inf
        for caller in self.callers():
            self._ask(lambda caller=caller: self._end(caller, reason))
            self.leave(caller)
        self._stopping.set()
        self._thread.join()

    def _ask(self, command: Callable[[], Any]) -> Any:
        """What a command gives when the engine's thread has run it between two ticks."""
        answer: Future[Any] = Future()
        self._commands.put((command, answer))
        if self._stopping.is_set():  # the thread may have looked for the last time
            self._cancel_commands()
        return answer.result()

    # In the engine's thread

    def _run(self) -> None:
        due = time.monotonic()
        try:
            while not self._stopping.is_set():
                due = max(due + PERIOD, time.monotonic() - PERIOD)
                self._run_commands(due)
                self._ticked = begin = time.monotonic()
                if self._tick(begin):
                    self._account(time.monotonic() - begin)
        finally:  # also where a fault ends the thread, whose trace `threading` prints
            self.ready = False
            self._stopping.set()
            for caller in self.callers():
                caller.listener(Ended("the server has failed; begin anew in a minute"))
            with self._lock:
                self._callers.clear()
            self._cancel_commands()

    def _run_commands(self, until: float) -> None:
        while (wait := until - time.monotonic()) > 0:
            try:
                command, answer = self._commands.get(timeout=wait)
            except queue.Empty:
                return
            try:
                answer.set_result(command())
            except Exception as error:  # its own caller's, who waits for it
                answer.set_exception(error)

    def _cancel_commands(self) -> None:
        while not self._commands.empty():
            self._commands.get()[1].set_exception(MoshiTTTError("the server is stopping; try again in a minute."))

    def _seat(self, caller: Caller, beginning: Beginning, state: dict[str, torch.Tensor] | None) -> None:
        """Put a conversation into a free row, or anew into the caller's own."""
        taken = {other.row for other in self.callers()}
        row = caller.row if caller.row >= 0 else next(row for row in range(self.max_rows) if row not in taken)
        self.session.load_row(row, begun(self.model, self.processor, beginning) if state is None else state)
        caller.row = row

    def _hold(self, caller: Caller) -> bool:
        """Have the conversation kept as it is; False where nothing was heard, or its numbers are not finite."""
        if caller.row < 0 or caller.frames == 0 or caller.row in self.session.problems():
            return False
        self.store.hold(caller.name, self.session.row_state(caller.row))
        return True

    def _unseat(self, caller: Caller) -> None:
        if caller.row >= 0:
            self.counts.add(caller)
            self._hold(caller)
            caller.row = -1
        with self._lock:
            if self._callers.get(caller.name) is caller:
                del self._callers[caller.name]

    def _end(self, caller: Caller, reason: str) -> None:
        self._unseat(caller)
        caller.listener(Ended(reason))

    def _tick(self, begin: float) -> bool:
        """One frame of every row that has one, and a second one of those that are behind, where there is time; whether anyone was heard."""
        seated = [caller for caller in self.callers() if caller.row >= 0]
        heard = self._step(seated, self.patience)
        behind = [caller for caller in seated if caller.ahead > JITTER]
        if behind and time.monotonic() - begin < PERIOD / 2:
            self._step(behind, self.patience)
        return heard

    def _step(self, callers: list[Caller], patience: int) -> bool:
        due = {caller.row: (caller, frame) for caller in callers if (frame := caller.next_frame(patience)) is not None}
        if not due:
            return False
        pcm, active = torch.zeros(self.max_rows, self.processor.frame_size), torch.zeros(self.max_rows, dtype=torch.bool)
        for row, (_, (_, samples)) in due.items():
            pcm[row], active[row] = torch.from_numpy(samples), True
        said = self.session.step(pcm, active)
        sick, lines = self.session.problems(), self._memory([caller for caller, _ in due.values()])
        for row, (caller, (arrived, _)) in due.items():
            if row in sick:
                self._end(caller, "the model's numbers are no longer finite in this conversation; begin a new one")
                continue
            caller.listener(Said(said.pcm[row].numpy(), said.text[row], time.monotonic() - arrived, lines.get(row)))
        return True

    def _memory(self, callers: list[Caller]) -> dict[int, list[MemoryLine]]:
        rows = [caller.row for caller in callers if caller.wants_memory and caller.frames % MEMORY_EVERY == 0]
        return memory_lines(self.session, rows) if rows else {}

    def _account(self, took: float) -> None:
        """Keep the tick's time; where ticks overrun, the newest caller has to go, so that the others are heard."""
        self.ticks.append(took)
        self._slow = self._slow + 1 if took > PERIOD else 0
        self.counts.overruns += took > PERIOD
        callers = self.callers()
        if self._slow < OVERRUNS or len(callers) < 2:
            return
        self._slow, self._rest_until = 0, time.monotonic() + REST
        self.counts.shed += 1
        logger.warning("shed", extra={"caller": callers[-1].tag, "rows": len(callers), "tick": round(took, 4)})
        self._end(callers[-1], "the server is too busy and had to end the newest conversation; it is kept, go on in a minute")


def begun(model: Any, processor: Any, beginning: Beginning) -> dict[str, torch.Tensor]:
    """The state of a row that begins.

    Raises:
        ValueError: as `new_stream` and `MoshiTTTProcessor.prompt`.
    """
    prompt = None
    if beginning.voice is not None or beginning.text:
        voice = None if beginning.voice is None else torch.from_numpy(beginning.voice)
        prompt = processor.prompt(voice, None if voice is None else processor.sampling_rate, text=beginning.text)
    return MoshiTTTSession(model, processor, 1, processor.sampling_rate, prompt=prompt, **beginning.sampling).row_state(0)


def memory_lines(session: MoshiTTTSession, rows: list[int]) -> dict[int, list[MemoryLine]]:
    """What every TTT layer learns in these rows."""
    layers, lines = session.stream.model.decoder.model.layers, {row: list[MemoryLine]() for row in rows}
    for number, (layer, state) in enumerate(zip(layers, session.stream.past_key_values.state.ttt_states)):
        if state is None:
            continue
        losses = layer.ttt.open_losses(state.select(rows))
        for row, *numbers in zip(rows, *(x.tolist() for x in losses)):
            initial, current, drift = (None if x != x else x for x in numbers)
            lines[row].append(MemoryLine(number, initial, current, drift))
    return lines
