"""PEFT's common patterns over the tiny model, for every tuner and setting that PEFT tries on decoder models."""

import dataclasses
import functools
import re

import not_applying
import pytest
import torch
from peft_suite.test_decoder_models import ALL_CONFIGS
from peft_suite.testing_common import PeftCommonTester
from tiny import tiny_model

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.training.modes import TEMPORAL

# Two patterns are helpers of others, and some take arguments of their own.
HELPERS = {"_test_weighted_combination_of_adapters_lora", "_test_weighted_combination_of_adapters_ia3"}
PATTERNS = sorted(name for name in dir(PeftCommonTester) if name.startswith("_test_") and name not in HELPERS)
EXTRA = {
    "_test_add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
    "_test_generate_pos_args": {"raises_err": False},
    "_test_passing_input_embeds_works": {"test_name": ""},
    "_test_training_gradient_checkpointing": {"use_reentrant": False},
}


@functools.cache
def _names(pattern):
    """Modules of the temporal transformer by their whole names: the depth decoder's, named alike, hold one weight for each codebook."""
    return [name for name, _ in tiny_model(torch.float32).named_modules() if re.fullmatch(pattern, name)]


def _settings():
    """(name, configuration class, arguments) of PEFT's own choice, aimed at the temporal transformer where PEFT would look the model up."""
    excluded = not_applying.tuners()
    for number, (config_class, kwargs) in enumerate(ALL_CONFIGS):
        name, fields = config_class.__name__, {field.name for field in dataclasses.fields(config_class)}
        if "target_modules" in fields:
            kwargs = {**kwargs, "target_modules": _names(TEMPORAL)}
        if "feedforward_modules" in fields:
            kwargs = {**kwargs, "feedforward_modules": _names(r"decoder\.model\.layers\.\d+\.mlp\.fc[12]")}
        if name not in excluded:
            yield pytest.param(config_class, kwargs, id=f"{name.removesuffix('Config')}-{number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_model(torch.float32).save_pretrained(path)
    return str(path)


class TestPatterns(PeftCommonTester):
    transformers_class = MoshiTTTForConditionalGeneration

    def prepare_inputs_for_testing(self):
        input_ids = torch.tensor([[1, 1, 1], [1, 2, 1]])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _test(pattern):
    @pytest.mark.parametrize(("config_cls", "config_kwargs"), _settings())
    def run(self, folder, config_cls, config_kwargs):
        getattr(self, pattern)(model_id=folder, config_cls=config_cls, config_kwargs=config_kwargs.copy(), **EXTRA.get(pattern, {}))

    return run


for _pattern in PATTERNS:
    setattr(TestPatterns, _pattern.removeprefix("_"), _test(_pattern))
