"""Put a run or a checkpoint on the Hub: python hub/push.py RUN_OR_FOLDER user/name [--tag v1]. The same as `moshi-ttt push`."""

import sys

from modeling_moshi_ttt.cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
