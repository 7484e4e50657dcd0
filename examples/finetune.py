"""Fine-tune Moshi-TTT by a recipe: accelerate launch examples/finetune.py configuration/train/demo.yaml [key=value …].

The same command goes on from the newest checkpoint where a run was stopped. It is `moshi-ttt train` as a script, for accelerate's launcher.
"""

import sys

from modeling_moshi_ttt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
