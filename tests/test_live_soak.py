"""Servers in processes of their own, for long: what callers leave behind, and what a killed server leaves to another."""

import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import sphn
from live_client import FRAME, RATE
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

CLI = "from modeling_moshi_ttt.cli import main; raise SystemExit(main())"
WARM_UP, CALLS = 400, 1000


def come_and_go(port: int, calls: int, rng: random.Random) -> None:
    """Calls that say a little, drop without a word, send what is no sound, too much at once, or text."""
    for number in range(calls):
        with suppress(ConnectionClosed, EOFError), connect(f"ws://127.0.0.1:{port}/api/chat", close_timeout=1) as line:
            line.recv(30)
            match number % 5:
                case 0:
                    line.send(b"\x01" + sphn.OpusStreamWriter(RATE).append_pcm(np.zeros(FRAME, np.float32)))
                case 1:
                    line.socket.close()
                case 2:
                    line.send(b"\x01" + rng.randbytes(400))
                case 3:
                    line.send(b"\x01" + bytes(1 << 17))
                case 4:
                    line.send("text")


def settled(server: psutil.Process) -> tuple[int, int]:
    """Memory in bytes and threads, once its rows are free."""
    time.sleep(3)
    return server.memory_info().rss, server.num_threads()


@pytest.mark.slow
def test_a_thousand_callers_come_and_go_and_leave_neither_memory_nor_threads():
    """After a warm-up, in which allocators and pools take what they keep."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLI, "serve", "--demo", "--rows", "4", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = int(re.search(r":(\d+) \(", process.stdout.readline()).group(1))
        server, rng = psutil.Process(process.pid), random.Random(0)
        come_and_go(port, WARM_UP, rng)
        memory, threads = settled(server)
        come_and_go(port, CALLS, rng)
        after, threads_after = settled(server)
        assert process.poll() is None
        assert threads_after <= threads + 6  # asyncio has as many more for what waits, no more
        assert after <= 1.02 * memory
    finally:
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM  # which uvicorn passes on once all is kept


@pytest.mark.slow
def test_a_conversation_goes_on_where_its_server_was_killed():
    """What benchmarks/live_hour.py shows over an hour."""
    from live_hour import measure

    assert measure(300)["frames_equal"] == 300
