"""PEFT's tests of decoder models, as they stand, over the tiny model: every tuner and setting that PEFT tries there."""

import dataclasses
import functools
import inspect
import re

import not_applying
import pytest
import torch
from peft_suite import test_decoder_models as theirs  # as a module, for pytest would collect the class itself
from peft_suite.testing_common import PeftCommonTester
from tiny import tiny_config

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.training.modes import TEMPORAL

# What PEFT's tests go over, and what this file chooses instead.
CHOICE = {"model_id": theirs.PEFT_DECODER_MODELS_TO_TEST, "config_cls,config_kwargs": theirs.ALL_CONFIGS}


@functools.cache
def _names(pattern):
    """Modules of the temporal transformer, by names that the depth decoder's, which hold one weight for each codebook, do not end in."""
    return [
        name.removeprefix("decoder.")
        for name, _ in MoshiTTTForConditionalGeneration(tiny_config()).named_modules()
        if re.fullmatch(pattern, name)
    ]


def _settings():
    """Configuration classes and their arguments, aimed at the temporal transformer where PEFT would look the architecture up."""
    excluded = not_applying.read("tuners")
    for number, (config_class, kwargs) in enumerate(theirs.ALL_CONFIGS):
        name, fields = config_class.__name__, {field.name for field in dataclasses.fields(config_class)}
        if "target_modules" in fields:
            kwargs = {**kwargs, "target_modules": _names(TEMPORAL)}
        if "feedforward_modules" in fields:
            kwargs = {**kwargs, "feedforward_modules": _names(r"decoder\.model\.layers\.\d+\.mlp\.fc[12]")}
        if name not in excluded:
            yield pytest.param(config_class, kwargs, id=f"{name.removesuffix('Config')}-{number}")


@pytest.fixture(scope="module")
def model_id(tmp_path_factory):
    """The tiny model in a folder, where PEFT's tests have the name of a repository."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    MoshiTTTForConditionalGeneration(tiny_config()).save_pretrained(path)
    return str(path)


class TestDecoder(PeftCommonTester):
    transformers_class = MoshiTTTForConditionalGeneration

    def prepare_inputs_for_testing(self):
        input_ids = torch.tensor([[1, 1, 1], [1, 2, 1]])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _over_the_tiny_model(test):
    """The same test with this file's `model_id` and settings, and its other parameters as they are."""

    @functools.wraps(test)
    def run(self, **arguments):
        test(self, **arguments)

    run.__signature__ = inspect.signature(test)
    run.pytestmark = [mark for mark in test.pytestmark if mark.args[0] not in CHOICE]
    return pytest.mark.parametrize(("config_cls", "config_kwargs"), list(_settings()))(run)


for _name, _test in vars(theirs.TestDecoderModels).items():
    if sum(CHOICE.get(mark.args[0]) is mark.args[1] for mark in getattr(_test, "pytestmark", []) if mark.name == "parametrize") == 2:
        setattr(TestDecoder, _name, _over_the_tiny_model(_test))
