"""Small checkpoints to push and pull: a model with its processor, and an adapter for it."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EncodecFeatureExtractor, MimiConfig, MimiModel, PreTrainedTokenizerFast

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration, MoshiTTTProcessor

# Code for a process of its own. Not ru_maxrss: that begins with what the process that started it held, and then hides all that is less.
PEAK = """
import re
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
has_peak = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")


def small_model(**changes) -> MoshiTTTForConditionalGeneration:
    """float32, every weight drawn, so that each one matters to the output."""
    return tiny_model(torch.float32, **changes)


def small_processor() -> MoshiTTTProcessor:
    """Mimi's architecture with a few thousand weights and random codebooks, and a tokenizer of single letters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_filters": 2, "codebook_size": 16, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8}
    layers = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 16,
        "upsample_groups": 16,
    }
    codec = MimiModel(MimiConfig(num_quantizers=3, **sizes, **layers)).eval()
    for name, buffer in codec.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    letters = {"<unk>": 1, "<s>": 2, "<pad>": 3, "</s>": 0} | {letter: 4 + i for i, letter in enumerate("\u2581abcdefghijklmnoprstuvwy")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split("", "isolated")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return MoshiTTTProcessor(EncodecFeatureExtractor(sampling_rate=24000), fast, codec, num_codebooks=3)


def save_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> MoshiTTTForConditionalGeneration:
    """A whole checkpoint with its processor in `folder`; returns the model."""
    model = small_model().to(dtype)
    model.save_pretrained(folder)
    small_processor().save_pretrained(folder)
    return model


def save_adapter(folder: Path, base: str, mode: str = "lora+ttt"):
    """An adapter whose LoRA and TTT weights all differ from the base's; returns the PEFT model."""
    from modeling_moshi_ttt.training import modes
    from modeling_moshi_ttt.training.run_config import LoraSettings

    model = MoshiTTTForConditionalGeneration.from_pretrained(base)
    adapted = modes.apply(model, mode, modes.lora_config(LoraSettings(rank=4, depth_decoder=True), model) if "lora" in mode else None)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted.eval()
