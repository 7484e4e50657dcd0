"""The embedded tiny tokenizer: 512 byte pairs from the train dialogues' words and the word lists of synthetic_speech.py."""

import json
import string
from pathlib import Path

from synthetic_speech import words as listed_words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DIALOGUES = Path(__file__).parent / "data" / "dialogues"
VOCABULARY = 512
SPECIAL = {"end_of_padding": "<end_of_padding>", "bos": "<s>", "unk": "<unk>", "pad": "<padding>"}  # ids 0, 1, 2, 3 as in Moshi


def transcripts(part: str) -> list[list[str]]:
    """The words of every dialogue of examples/data/dialogues/{part}.jsonl."""
    lines = (DIALOGUES / f"{part}.jsonl").read_text().splitlines()
    files = [(DIALOGUES / json.loads(line)["path"]).with_suffix(".json") for line in lines]
    return [[word[0] for word in json.loads(file.read_text())["alignments"]] for file in files]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs over words that begin with "\u2581", as sentencepiece writes them; printable ASCII is in, all else is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    alphabet = list(string.ascii_letters + string.digits + string.punctuation + "\u2581")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    heard = [word for dialogue in transcripts("train") for word in dialogue]
    tokenizer.train_from_iterator(10 * heard + listed_words(), trainer)  # what was said weighs most: its words become single tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL["bos"],
        unk_token=SPECIAL["unk"],
        pad_token=SPECIAL["pad"],
        additional_special_tokens=[SPECIAL["end_of_padding"]],
        clean_up_tokenization_spaces=False,
    )
