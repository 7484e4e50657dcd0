"""Convert a checkpoint: python hub/convert.py kyutai/moshiko-pytorch-bf16 moshiko --ttt layers=23-31. The same as `moshi-ttt convert`."""

import sys

from modeling_moshi_ttt.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
