"""Sounds decoded in a process of their own, with a limit on its memory and time: a hostile file can end that process, and is then named.

A worker stays for the next sound. It is asked by a line of JSON, and answers with one and, for arrays, their bytes behind it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from .. import errors_moshi_ttt as errors

MEMORY = 768 << 20  # bytes beyond what the worker takes when it starts
STARTING = 60.0  # seconds
SILENT = 4.0  # seconds in which a decoder must answer or read on in its file
LONGEST = 120.0  # seconds for one answer, however much is read: a container without a stated length is decoded to count it
ROOT = Path(__file__).parents[2]
END = object()  # after the last of several answers
_idle: list[Worker] = []
_owner = os.getpid()  # a forked process must not share a worker with its parent


class Worker:
    """A process that waits for sounds to decode."""

    def __init__(self) -> None:
        self.busy, self.path = False, ""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # a thread takes address space, which is limited
        )  # fmt: skip
        if not self._line(STARTING):
            self.stop()
            raise RuntimeError(f"the worker that decodes sounds did not start (it ended with {self.process.returncode})")

    def ask(self, function: str, path: str, arguments: tuple[Any, ...]) -> None:
        """Have a function of `data.audio` run."""
        self.path = path
        self.send(json.dumps([os.getcwd(), function, [path, *arguments]]))  # a relative path is of this process's folder

    def send(self, line: str) -> None:
        sent = self.process.stdin
        assert sent is not None
        sent.write(line.encode() + b"\n")
        sent.flush()

    def answer(self) -> Any:
        """What it returns, or the next of what it yields, END after the last.

        Raises:
            MoshiTTTError: its own errors; the worker died, or did not answer in time.
        """
        line = self._line(SILENT)
        if not line:
            self.stop()
            why = f"its decoder hangs: nothing for {SILENT:g} s" if line is None else f"its decoder ended with {self.process.returncode}"
            raise errors.MoshiTTTError(f"{self.path}: the sound cannot be read ({why}); leave the file out.")
        answer = json.loads(line)
        if "error" in answer:
            self.busy = False
            raise getattr(errors, answer["error"])(answer["message"])
        self.busy = bool(answer.get("more"))
        if "shape" in answer:
            data = self._received.read(int(np.prod(answer["shape"])) * 4)
            return np.frombuffer(bytearray(data), np.float32).reshape(answer["shape"])
        return answer.get("value", END)

    @property
    def _received(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def _line(self, silent: float) -> bytes | None:
        """What it says next; b"" where it has died, None where it hangs."""
        begin = heard = now = time.monotonic()
        sign = self._sign_of_life()
        while not select.select([self._received], [], [], silent / 8)[0]:
            now = time.monotonic()
            if sign != (sign := self._sign_of_life()):
                heard = now
            if now - heard > silent or now - begin > LONGEST:
                return None
        return self._received.readline()

    def _sign_of_life(self) -> object:
        """Something that changes while the worker reads on, or waits for a disk; always, where the system does not tell."""
        process = Path("/proc", str(self.process.pid))
        try:
            waits = (process / "stat").read_text().rpartition(")")[2].split()[0] == "D"
            return time.monotonic() if waits else (process / "io").read_text().split()[1]  # bytes read
        except OSError:
            return time.monotonic()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # a question that it has not taken
                    stream.close()


@contextmanager
def _asked(function: Callable[..., Any], path: str | os.PathLike[str], arguments: tuple[Any, ...]) -> Iterator[Worker]:
    """A worker that has begun; afterwards it waits for the next sound, unless it has not answered to the end."""
    global _idle, _owner
    if os.getpid() != _owner:
        _idle, _owner = [], os.getpid()
    worker = _idle.pop() if _idle else Worker()
    worker.busy = True
    try:
        worker.ask(function.__name__, str(path), arguments)
        yield worker
    except BrokenPipeError:
        raise errors.MoshiTTTError(f"{path}: the sound cannot be read (its decoder was gone); run the same command again.") from None
    finally:
        if worker.busy:
            worker.stop()
        else:
            _idle.append(worker)


def in_worker(function: Callable[..., Any], path: str | os.PathLike[str], *arguments: float | None) -> Any:
    """`function(path, *arguments)` of `data.audio`, which returns float32 samples or a number, run by a worker.

    Raises:
        MoshiTTTError: the function's own; the file killed its worker, by a limit or by a fault of a decoder.
    """
    with _asked(function, path, arguments) as worker:
        return worker.answer()


def pieces_in_worker(function: Callable[..., Any], path: str | os.PathLike[str], *arguments: float | None) -> Iterator[np.ndarray]:
    """As `in_worker`, of a function that yields pieces of samples: one after the other, each when it is asked for.

    Raises:
        MoshiTTTError: as `in_worker`.
    """
    with _asked(function, path, arguments) as worker:
        while (piece := worker.answer()) is not END:
            yield piece
            worker.send("go on")  # one answer at a time is on its way


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The worker's side."""
    audio = importlib.import_module(".audio", __package__)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 8 << 30
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(answers, "ready")
    for line in requests:
        folder, name, arguments = json.loads(line)
        os.chdir(folder)
        try:
            found = getattr(audio, name)(*arguments)
            for piece in found if isinstance(found, Iterator) else ():
                _send(answers, piece, more=True)
                requests.readline()  # "go on"
            _send(answers, END if isinstance(found, Iterator) else found)
            continue
        except errors.MoshiTTTError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except BaseException as error:  # a decoder's panic, or no memory left: of the file, whatever it is called
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            answer = {"error": "MoshiTTTError", "message": f"{arguments[0]}: the sound cannot be read ({reason}); leave the file out."}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _send(answers: BinaryIO, found: Any, more: bool = False) -> None:
    data = b""
    if isinstance(found, np.ndarray):
        answer, data = {"shape": list(found.shape), "more": more}, np.ascontiguousarray(found, np.float32).tobytes()
    else:
        answer = {} if found is END else {"value": found}
    answers.write(json.dumps(answer).encode() + b"\n" + data)
    answers.flush()


if __name__ == "__main__":
    _answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints is no answer
    _serve(sys.stdin.buffer, _answers)
