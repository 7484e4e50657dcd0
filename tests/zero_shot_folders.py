"""Small zero-shot sets in their official layouts, spoken by espeak-ng."""

import csv
import sys
from pathlib import Path

from modeling_moshi_ttt.data.audio import write_audio

sys.path.insert(0, str(Path(__file__).parent))
from speech import say

WORDS = [
    ("0", "brick", "blick", "0"),
    ("1", "house", "houle", "3"),
    ("2", "nan", "nam", "17"),
    ("3", "water", "wather", "64"),
    ("4", "null", "nulp", "900"),
]


def _write(path: Path, text: str, voice: str = "en") -> None:
    samples, rate = say(text, voice)
    write_audio(path, samples, rate)


def _gold(path: Path, columns: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def make_swuggy(folder: Path) -> Path:
    """Five words, uneven voices: word 0 has three, word 4 one, the others two; 'nan' and 'null' are words, non-words have none."""
    root = folder / "lexical" / "dev"
    root.mkdir(parents=True)
    rows = []
    for item, word, nonword, frequency in WORDS:
        for voice in {"0": ["en", "en-us", "en-gb"], "4": ["en"]}.get(item, ["en", "en-us"]):
            for text, correct in ((word, "1"), (nonword, "0")):
                name = f"{voice}{item}{'w' if correct == '1' else 'x'}"
                _write(root / f"{name}.wav", text, voice)
                rows.append([item, name, voice, frequency if correct == "1" else "", word if correct == "1" else "", "p", "4", correct])
    # the order of the rows means nothing: non-words first, backwards
    _gold(
        root / "gold.csv",
        ["id", "filename", "voice", "frequency", "word", "phones", "length", "correct"],
        sorted(rows, key=lambda r: (r[7], r[1]), reverse=True)[::-1],
    )
    return folder


SENTENCES = [
    ("agreement", "noun", "0", "the dogs bark", "the dogs barks"),
    ("agreement", "verb", "0", "she sings", "she sing"),
    ("binding", "reflexive", "0", "he saw himself", "he saw herself"),
]


def make_sblimp(folder: Path) -> Path:
    """Three pairs in two types, all with id 0: only the whole key tells them apart."""
    root = folder / "syntactic" / "dev"
    root.mkdir(parents=True)
    rows = []
    for number, (kind, subtype, item, good, bad) in enumerate(SENTENCES):
        for voice in ("en", "en-us"):
            for text, correct in ((good, "1"), (bad, "0")):
                name = f"{'b' if correct == '0' else 'g'}{number}{voice}"
                _write(root / f"{name}.wav", text, voice)
                rows.append([item, name, voice, kind, subtype, text, correct])
    _gold(root / "gold.csv", ["id", "filename", "voice", "type", "subtype", "transcription", "correct"], rows)
    return folder


def make_storycloze(folder: Path) -> Path:
    """Two stories; the numbers do not follow the pairs."""
    folder.mkdir(parents=True)
    for name, text in {
        "10_aa-1_correct": "Ann lost her key. She called a friend.",
        "3_aa-1_incorrect": "Ann lost her key. She ate the moon.",
        "2_bb-2_correct": "It rained. Tom took an umbrella.",
        "11_bb-2_incorrect": "It rained. Tom sold his feet.",
    }.items():
        _write(folder / f"{name}.wav", text)
    return folder


def make_salmon(folder: Path, parts: tuple[str, ...]) -> Path:
    """Two samples in each part, indices of one and two digits."""
    for part in parts:
        (folder / part).mkdir(parents=True)
        for index in (2, 10):
            _write(folder / part / f"sample_{index}_0.wav", "the same voice all the way", "en")
            _write(folder / part / f"sample_{index}_1.wav", "the same voice all the way", "en-us")
    return folder
