"""Fine-tune Moshi-TTT by a recipe: accelerate launch examples/finetune.py configuration/train/demo.yaml [key=value …].

The same command goes on from the newest checkpoint where a run was stopped. `moshi-ttt train` is this script without a launcher.
"""

import argparse
import os
import sys

from modeling_moshi_ttt.training import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train.configure(parser)
    try:
        return train.run(parser.parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("MOSHI_TTT_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
