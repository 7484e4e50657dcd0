"""transformers' common tests of models, configurations and processors over the tiny model."""

import contextlib
import unittest
from pathlib import Path

import torch
from tiny import random_frames, tiny_config, with_labels
from transformers_suite.test_configuration_common import ConfigTester
from transformers_suite.test_modeling_common import ModelTesterMixin
from transformers_suite.test_processing_common import ProcessorTesterMixin

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration, MoshiTTTProcessor

TINY_PROCESSOR = Path(__file__).parents[2] / "configuration" / "model" / "tiny"
CONFIG_TESTS = sorted(name for name in dir(ConfigTester) if name.startswith(("create_and_test_", "check_")))


class TinyModel:
    """What the common tests ask of a model: its sizes, a configuration and inputs."""

    batch_size, seq_length, is_training = 2, 7, True

    def __init__(self, parent):
        self.parent = parent
        config = self.get_config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads

    def get_config(self):
        return tiny_config()

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        frames = random_frames(config, self.batch_size, self.seq_length)
        return config, {**frames, "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long)}


class TestModel(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MoshiTTTForConditionalGeneration,)
    all_generative_model_classes = ()  # `generate` steps a stream of frames and is not transformers' own
    additional_model_inputs = ["moshi_audio_codes", "user_audio_codes"]
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = TinyModel(self)

    def subTest(self, *args, **kwargs):
        return contextlib.nullcontext()  # what fails in a part of a test fails the test, as the list of what does not apply counts it

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return with_labels(inputs) if return_labels else inputs


class TestConfig(unittest.TestCase):
    model_tester = TinyModel(None)


def _config_test(name):
    def run(self):
        fields = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "ttt_layers": [1]}
        getattr(ConfigTester(self, config_class=MoshiTTTConfig, **fields), name)()

    return run


for _name in CONFIG_TESTS:
    setattr(TestConfig, f"test_{_name}", _config_test(_name))


class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MoshiTTTProcessor

    @classmethod
    def _setup_feature_extractor(cls):
        return cls._tiny().feature_extractor

    @classmethod
    def _setup_tokenizer(cls):
        return cls._tiny().tokenizer

    @staticmethod
    def prepare_processor_dict():
        return {"num_codebooks": 4}

    @staticmethod
    def _tiny():
        return MoshiTTTProcessor.from_pretrained(TINY_PROCESSOR)
