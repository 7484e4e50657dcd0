"""Progress of long work on stderr: a bar that moves in a terminal, and in a log a line a minute and one at the end."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0


class _Lines:
    """A file for tqdm that starts a line where tqdm goes back to a line's start. The first, which says 0%, is left out."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.first = True

    def write(self, text: str) -> None:
        line = text.strip()
        if line and not self.first:
            self.file.write(line + "\n")
        self.first = False

    def flush(self) -> None:
        self.file.flush()


def progress_bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm over `items`, with its options."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES, "maxinterval": SECONDS_BETWEEN_LINES, "ascii": True}
    return tqdm(items, **options)


def quiet_libraries() -> None:
    """Where stderr is a log: no bars of transformers and the Hub's client, which cannot tell."""
    if sys.stderr.isatty():
        return
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
