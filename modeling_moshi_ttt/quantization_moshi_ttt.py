"""Weight-only int8 for talking: weights of the temporal and the depth transformer as int8 with a scale a row, products by torch's packed
kernel.

TTT layers, norms, embeddings and heads stay as they are: what learns while it listens must not be rounded. Training is not supported.

Shapes: N tokens, K codebooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .depth_decoder import DepthLinear
from .stored_config_moshi_ttt import QUANT_METHOD

LEFT_OUT = ("ttt", "lm_head", "lm_heads")  # parts of a module's name


class Int8Linear(nn.Module):
    """`x W^T` of a linear map without bias: `weight` int8 `[out, in]`, `scale` `[out]` in the dtype that the model computes in."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: Any = None):
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, dtype=dtype, device=device))

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """With the weights of `linear`, each row rounded to 127 steps of its largest."""
        module = cls(linear.out_features, linear.in_features, linear.weight.dtype, linear.weight.device)
        module.weight, module.scale = quantized(linear.weight)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        return int8_product(x, self.weight, self.scale)


class Int8DepthLinear(nn.Module):
    """One map per codebook, as [`DepthLinear`]: `weight` int8 `[K, out, in]`, `scale` `[K, out]`."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: Any = None):
        super().__init__()
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(shape[:2], dtype=dtype, device=device))

    @classmethod
    def of(cls, linear: DepthLinear) -> Int8DepthLinear:
        """With the weights of `linear`."""
        shape: Any = tuple(linear.weight.shape)
        module = cls(shape, linear.weight.dtype, linear.weight.device)
        module.weight, module.scale = quantized(linear.weight)
        return module

    def forward(self, x: torch.Tensor, codebook: int | None = None) -> torch.Tensor:
        """`[K, N, in]` -> `[K, N, out]` with all K maps, or `[N, in]` -> `[N, out]` with the map of one codebook."""
        if codebook is not None:
            return int8_product(x, self.weight[codebook], self.scale[codebook])
        return torch.stack([int8_product(one, weight, scale) for one, weight, scale in zip(x, self.weight, self.scale)])


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[..., out, in]` -> int8 of the same shape and the scale of each row, `[..., out]`."""
    scale = weight.detach().abs().amax(dim=-1).float().clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight.detach().float() / scale[..., None]).round().to(torch.int8), scale.to(weight.dtype)


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[..., in]`, int8 `[out, in]`, `[out]` -> `[..., out]`; packed where torch has the kernel, that is on a CPU."""
    if x.device.type == "cpu" and x.dtype != torch.float64:
        product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, scale.to(x.dtype))
        return product.view(*x.shape[:-1], -1)
    return nn.functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)


def swap(model: nn.Module, keep_values: bool) -> None:
    """Put int8 modules in place of the linear maps, with their weights or with none yet."""
    for name, module in list(model.named_modules()):
        if any(part in name.split(".") for part in LEFT_OUT):
            continue
        new: nn.Module | None = None
        if isinstance(module, DepthLinear):
            shape: Any = tuple(module.weight.shape)
            new = Int8DepthLinear.of(module) if keep_values else Int8DepthLinear(shape, module.weight.dtype, module.weight.device)
        elif type(module) is nn.Linear and module.bias is None:
            size = (module.out_features, module.in_features)
            new = Int8Linear.of(module) if keep_values else Int8Linear(*size, module.weight.dtype, module.weight.device)
        if new is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)


class MoshiTTTInt8Config(QuantizationConfigMixin):
    """`from_pretrained(..., quantization_config=MoshiTTTInt8Config())` loads a model for talking in int8, which is saved as such."""

    def __init__(self, **kwargs: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]


class MoshiTTTInt8Quantizer(HfQuantizer):
    """What transformers asks of a way to quantize."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            swap(model, keep_values=False)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            swap(model, keep_values=True)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # the installed package and a checkpoint's own code may both be there
    register_quantization_config(QUANT_METHOD)(MoshiTTTInt8Config)
    register_quantizer(QUANT_METHOD)(MoshiTTTInt8Quantizer)
