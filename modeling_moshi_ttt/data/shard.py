"""Which of n equal shares of a work a process does: `--shard i/n`, a SLURM array's task, or a launcher's rank."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import NamedTuple

from ..errors_moshi_ttt import MoshiTTTError


class Shard(NamedTuple):
    """Share `number` (from 0) of `total` equal ones."""

    number: int
    total: int


WHOLE = Shard(0, 1)


def add_shard(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --shard to a command."""
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help=f"share I (from 0) of N of {what}; without it a SLURM array's task or a launcher's RANK of WORLD_SIZE, where one is set",
    )


def read_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """The share that `--shard` or the environment names; the whole where none does. ValueError names what is no share."""
    said = "--shard"
    if text is None and "SLURM_ARRAY_TASK_ID" in environment:
        said, first = "SLURM_ARRAY_TASK_ID", environment.get("SLURM_ARRAY_TASK_MIN", "0")
        text = f"{environment['SLURM_ARRAY_TASK_ID']}/{environment.get('SLURM_ARRAY_TASK_COUNT', '')}"
        if first != "0":
            raise MoshiTTTError(f"the SLURM array begins at {first}; shares are numbered from 0: sbatch --array=0-N.")
    elif text is None and "RANK" in environment:
        said, text = "RANK/WORLD_SIZE", f"{environment['RANK']}/{environment.get('WORLD_SIZE', '')}"
    if text is None:
        return WHOLE
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and int(number) < int(total)):
        raise MoshiTTTError(f"`{said}={text}` must be I/N with 0 <= I < N, as in 0/8.")
    return Shard(int(number), int(total))
