"""Moshi with Test-Time-Training layers for Hugging Face transformers.

Importing this package registers the model with transformers' Auto classes: `AutoConfig`, `AutoModel`, `AutoModelForTextToWaveform`,
`AutoModelForMultimodalLM` and `AutoProcessor` then find `moshi_ttt` checkpoints.
"""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoModelForTextToWaveform

from .cache_moshi_ttt import MoshiTTTCache
from .configuration_moshi_ttt import MoshiTTTConfig
from .generation_moshi_ttt import MoshiTTTFrame, MoshiTTTStream
from .modeling_moshi_ttt import MoshiTTTForConditionalGeneration, MoshiTTTModel, MoshiTTTOutput, MoshiTTTPreTrainedModel
from .ttt_layer import TTTMLP, TTTLinear
from .ttt_ops import ttt_linear, ttt_mlp
from .ttt_state import TTTState
from .version import __version__

AutoConfig.register("moshi_ttt", MoshiTTTConfig)
for auto_class in (AutoModel, AutoModelForTextToWaveform, AutoModelForMultimodalLM):
    auto_class.register(MoshiTTTConfig, MoshiTTTForConditionalGeneration)

__all__ = [
    "TTTMLP",
    "MoshiTTTCache",
    "MoshiTTTConfig",
    "MoshiTTTForConditionalGeneration",
    "MoshiTTTFrame",
    "MoshiTTTModel",
    "MoshiTTTOutput",
    "MoshiTTTPreTrainedModel",
    "MoshiTTTStream",
    "TTTLinear",
    "TTTState",
    "__version__",
    "ttt_linear",
    "ttt_mlp",
]
