"""Fetch a checkpoint from the Hub and check it: python hub/pull.py user/name DEST [--revision v1]. The same as `moshi-ttt pull`."""

import sys

from modeling_moshi_ttt.cli import main

if __name__ == "__main__":
    sys.exit(main(["pull", *sys.argv[1:]]))
