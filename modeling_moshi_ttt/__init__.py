"""Moshi with Test-Time-Training layers for Hugging Face transformers.

Importing this package registers the model with transformers' Auto classes: `AutoConfig`, `AutoModel`, `AutoModelForTextToWaveform`,
`AutoModelForMultimodalLM` and `AutoProcessor` then find `moshi_ttt` checkpoints. The classes themselves are imported when they are used.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from .configuration_moshi_ttt import MoshiTTTConfig  # first: it says so where this transformers is too old for what follows
from .former_names import install as _install_former_names
from .version import __version__

# isort: split
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING, MODEL_MAPPING

if TYPE_CHECKING:
    from .cache_moshi_ttt import MoshiTTTCache
    from .common.packaged import packaged
    from .errors_moshi_ttt import MoshiTTTError
    from .live.session import MoshiTTTSession, SessionFrame
    from .modeling_moshi_ttt import MoshiTTTForConditionalGeneration, MoshiTTTModel, MoshiTTTPreTrainedModel
    from .outputs_moshi_ttt import MoshiTTTOutput
    from .processing_moshi_ttt import MoshiTTTProcessor
    from .quantization_moshi_ttt import MoshiTTTInt8Config
    from .stream_moshi_ttt import MoshiTTTFrame, MoshiTTTStream
    from .ttt_layer import TTTMLP, TTTLinear
    from .ttt_ops import ttt_linear, ttt_mlp
    from .ttt_state import TTTState

_HOMES = {
    "cache_moshi_ttt": ("MoshiTTTCache",),
    "common.packaged": ("packaged",),
    "errors_moshi_ttt": ("MoshiTTTError",),
    "live.session": ("MoshiTTTSession", "SessionFrame"),
    "modeling_moshi_ttt": ("MoshiTTTForConditionalGeneration", "MoshiTTTModel", "MoshiTTTOutput", "MoshiTTTPreTrainedModel"),
    "processing_moshi_ttt": ("MoshiTTTProcessor",),
    "quantization_moshi_ttt": ("MoshiTTTInt8Config",),
    "stream_moshi_ttt": ("MoshiTTTFrame", "MoshiTTTStream"),
    "ttt_layer": ("TTTMLP", "TTTLinear"),
    "ttt_ops": ("ttt_linear", "ttt_mlp"),
    "ttt_state": ("TTTState",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Deferred(type):
    """A class of this package by name: whatever is asked of it is asked of the real class, which is imported then."""

    def __getattr__(cls, attribute: str) -> Any:
        return getattr(__getattr__(cls.__name__), attribute)


_PROCESSOR_MODULE = "transformers.models.auto.processing_auto"


class _ProcessorRegistration(importlib.abc.MetaPathFinder):
    """Registers the processor when transformers' own processor mapping is imported, which takes seconds and may never happen."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _PROCESSOR_MODULE:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register_processor(module)

        spec.loader.exec_module = execute_and_register
        return spec


def _register_processor(module: Any) -> None:
    module.PROCESSOR_MAPPING.register(MoshiTTTConfig, _Deferred("MoshiTTTProcessor", (), {}))


_install_former_names()
AutoConfig.register(MoshiTTTConfig.model_type, MoshiTTTConfig)
_model: Any = _Deferred("MoshiTTTForConditionalGeneration", (), {})
for _mapping in (MODEL_MAPPING, MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
    _mapping.register(MoshiTTTConfig, _model)
if _PROCESSOR_MODULE in sys.modules:
    _register_processor(sys.modules[_PROCESSOR_MODULE])
else:
    sys.meta_path.insert(0, _ProcessorRegistration())

__all__ = [
    "TTTMLP",
    "MoshiTTTCache",
    "MoshiTTTConfig",
    "MoshiTTTError",
    "MoshiTTTForConditionalGeneration",
    "MoshiTTTFrame",
    "MoshiTTTInt8Config",
    "MoshiTTTModel",
    "MoshiTTTOutput",
    "MoshiTTTPreTrainedModel",
    "MoshiTTTProcessor",
    "MoshiTTTSession",
    "MoshiTTTStream",
    "SessionFrame",
    "TTTLinear",
    "TTTState",
    "__version__",
    "packaged",
    "ttt_linear",
    "ttt_mlp",
]
