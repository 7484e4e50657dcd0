"""PEFT's common patterns over the tiny model, for every tuner and setting that PEFT tries on decoder models."""

import dataclasses
import inspect

import pytest
import torch
from peft_suite.test_decoder_models import ALL_CONFIGS
from peft_suite.testing_common import PeftCommonTester
from tiny import tiny_model

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.training.modes import TEMPORAL

PATTERNS = sorted(name for name in dir(PeftCommonTester) if name.startswith("_test_"))


def _settings():
    """(name, configuration class, arguments) of PEFT's own choice, aimed at the temporal transformer where PEFT would look the model up."""
    for number, (config_class, kwargs) in enumerate(ALL_CONFIGS):
        if "target_modules" in {field.name for field in dataclasses.fields(config_class)}:
            kwargs = {**kwargs, "target_modules": TEMPORAL}
        yield pytest.param(config_class, kwargs, id=f"{config_class.__name__.removesuffix('Config')}-{number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_model(torch.float32).save_pretrained(path)
    return str(path)


class TestPatterns(PeftCommonTester):
    transformers_class = MoshiTTTForConditionalGeneration

    def prepare_inputs_for_testing(self):
        input_ids = torch.tensor([[1, 1, 1], [1, 2, 1]])
        return {"input_ids": input_ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}


def _test(pattern):
    extra = [name for name in inspect.signature(getattr(PeftCommonTester, pattern)).parameters][4:]

    @pytest.mark.parametrize(("config_cls", "config_kwargs"), _settings())
    def run(self, folder, config_cls, config_kwargs):
        getattr(self, pattern)(folder, config_cls, config_kwargs.copy())

    return run


for _pattern in PATTERNS:
    setattr(TestPatterns, _pattern.removeprefix("_"), _test(_pattern))
