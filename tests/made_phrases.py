"""A phrasebook without a codec: random codes for every phrase, for the tests of what is made of them."""

import random

import torch
from tree import ROOT

from modeling_moshi_ttt import MoshiTTTProcessor
from modeling_moshi_ttt.data import facts
from modeling_moshi_ttt.data.spoken_dialogues import MOSHI_VOICE, SILENCE, Phrasebook


def tiny_processor():
    return MoshiTTTProcessor.from_pretrained(ROOT / "configuration" / "model" / "tiny")


def make_phrasebook(processor, voices=2, mark="phrases"):
    """Codes [8, 3 to 6] of every phrase by every voice, twice."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)

    def clip():
        return torch.randint(128, (8, rng.randint(3, 6)), generator=generator)

    clips = {voice: {phrase: [clip(), clip()] for phrase in facts.phrases()} for voice in facts.VOICES[:voices]}
    clips[MOSHI_VOICE] = {word: [clip()] for word in ["", *facts.answers()]}
    return Phrasebook(clips, torch.randint(128, (4, 8, SILENCE), generator=generator), mark, processor)
