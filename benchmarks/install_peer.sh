#!/bin/bash
# Install Kyutai's package moshi 0.2.13 into .venv-peer, an environment of its own: it wants older libraries than transformers 5 does.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
[ -x .venv-peer/bin/python ] || "$PYTHON" -m venv .venv-peer
.venv-peer/bin/python -m pip install --quiet --upgrade pip
.venv-peer/bin/python -m pip install --quiet "torch==2.13.0"
.venv-peer/bin/python -m pip install --quiet "numpy<2.3" "safetensors<0.8" "huggingface-hub<1" einops sentencepiece "sphn<0.3" "aiohttp<3.12" sounddevice tqdm
.venv-peer/bin/python -m pip install --quiet --no-deps "moshi==0.2.13"
.venv-peer/bin/python -c "import os; os.environ['NO_TORCH_COMPILE'] = '1'; import moshi; print('moshi', moshi.__version__, 'in .venv-peer')"
