"""Does it remember what it was told, and what it was told last? What `make demo` runs, with the packaged checkpoint `remembering`.

python examples/remember.py [key=value …] passes settings on to `moshi-ttt evaluate spoken_recall`, as in model=runs/spoken_recall/final.
"""

import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling_moshi_ttt.cli import without_trace
from modeling_moshi_ttt.common.files import read_json
from modeling_moshi_ttt.common.settings import load_settings
from modeling_moshi_ttt.data.audio import write_audio
from modeling_moshi_ttt.data.espeak import Espeak
from modeling_moshi_ttt.data.facts import HELD_OUT_VOICES, ScriptSettings
from modeling_moshi_ttt.data.spoken_dialogues import Script, Spoken, speak
from modeling_moshi_ttt.evaluation.runner import run_evaluation
from modeling_moshi_ttt.evaluation.settings import EvaluateSettings
from modeling_moshi_ttt.evaluation.spoken_listening import answer_to, reach, under
from modeling_moshi_ttt.evaluation.subject import Subject
from modeling_moshi_ttt.tokens_moshi_ttt import FRAME_RATE, USER_SPEAKER

DEFAULTS = [
    *("output=runs/remember", "model=remembering", "spoken_recall.voices=held_out", "spoken_recall.dialogues=16"),
    "spoken_recall.conditions=[TTT, frozen at W0, gate 0]",
]
WAYS = {"with TTT": "TTT", "without": "gate 0"}


def table(part: dict[str, Any]) -> None:
    """Print the share of right answers of every condition."""
    columns = sorted({(cell["corrected"], cell["from"]) for run in part["runs"].values() for cell in run["cells"]})
    print("\n" + " " * 16 + "".join(f"{'corrected' if corrected else 'told once'}, {low} s on".rjust(24) for corrected, low in columns))
    for label, run in part["runs"].items():
        shares = {(cell["corrected"], cell["from"]): f"{cell['accuracy']:.0%} of {cell['questions']}" for cell in run["cells"]}
        print(label.ljust(16) + "".join(shares.get(column, "–").rjust(24) for column in columns))


def verdict(part: dict[str, Any], seconds: float) -> None:
    """Say in words what the table shows."""
    known = [f"chance: {part['chance']:.0%}"] if "chance" in part else []
    for corrected, what in ((False, "what it was told"), (True, "what it was told last")):
        shares = {}
        for label, run in part["runs"].items():
            there = [cell for cell in run["cells"] if cell["corrected"] == corrected and cell["from"] >= seconds]
            asked = sum(cell["questions"] for cell in there)
            shares[label] = sum(cell["accuracy"] * cell["questions"] for cell in there) / asked if asked else float("nan")
        others = "; ".join([f"{label}: {share:.0%}" for label, share in shares.items() if label != "TTT"] + known)
        print(f"Longer ago than attention reaches ({seconds:.1f} s), it knows {what} in {shares['TTT']:.0%} of the questions ({others}).")


def dialogues(seed: int, count: int) -> Iterator[tuple[str, Spoken]]:
    """(voice, dialogue): the first of a seed in which a name is told, asked, corrected and asked again, whatever is answered; between telling and
    asking lie 8 s of talk or more."""
    settings = ScriptSettings(kinds=["name"], facts=[1, 1], lead=[100, 100], distance=[150, 150], echo=0.0, corrections=1.0)
    rng, espeak = random.Random(seed), Espeak()
    while count:
        voice = rng.choice(HELD_OUT_VOICES)
        spoken = speak(Script(settings, rng, held_out=True), espeak, voice)
        if len(spoken.questions) == 2:  # half of the scripts ask before the correction, too
            yield voice, spoken
            count -= 1


def converse(model: Any, processor: Any, output: Path, seed: int) -> None:
    """Three dialogues in free conversation, with TTT and without; of the first its transcript, and its sound with Moshi on the left."""
    right = dict.fromkeys(WAYS, 0)
    print(f"\nThe first three dialogues of seed {seed}, in voices that it never heard:")
    for number, (voice, spoken) in enumerate(dialogues(seed, 3)):
        user = processor.encode_audio(torch.from_numpy(spoken.samples[1:]))  # [1, K, T]
        heard = {}
        for way, condition in WAYS.items():
            with under(model, condition):
                heard[way] = model.hear(user, do_sample=False)
        print(f"{number + 1}. {voice}")
        for question in spoken.questions:
            value, corrected = " ".join(question.fact.value), " corrected to" if question.before else "       is told"
            answers = []
            for way, (text, _) in heard.items():
                said = answer_to(text[0], math.ceil(question.asked * FRAME_RATE), question, processor)
                right[way] += said == question.fact.value
                answers.append(f"{way} {' '.join(said) or 'nothing'} ({'right' if said == question.fact.value else 'wrong'})")
            print(f"   the name{corrected} {value}, asked {question.asked - question.told:.0f} s later it says {', '.join(answers)}")
        if number == 0:
            write_dialogue(output / "dialogue", spoken, *heard["with TTT"], processor)
    print("right: " + ", ".join(f"{way} {count} of 6" for way, count in right.items()))


def write_dialogue(stem: Path, spoken: Spoken, text: Tensor, codes: Tensor, processor: Any) -> None:
    """Print who said what, and write it and its sound."""
    voice = processor.decode_audio(codes)[0, : spoken.samples.shape[1]].numpy()
    write_audio(stem.with_suffix(".wav"), np.stack([voice, spoken.samples[1]]), processor.sampling_rate)
    lines = [(start, "user ", phrase) for phrase, (start, _), who in spoken.words if who == USER_SPEAKER]
    lines += [(start, "Moshi", word) for word, start in processor.words(text[0])]
    transcript = "\n".join(f"   {start:6.1f} s  {who}  {said}" for start, who, said in sorted(lines))
    stem.with_suffix(".txt").write_text(transcript + "\n", encoding="utf-8")
    print(f"{transcript}\n   its sound: {stem.with_suffix('.wav')} (Moshi left, the user right)")


def main() -> int:
    begin = time.perf_counter()
    settings = load_settings(EvaluateSettings, "spoken_recall", [*DEFAULTS, *sys.argv[1:]], kind="evaluate")
    report = run_evaluation(settings)
    part = read_json(settings.output / "results.json")["tasks"]["spoken_recall"]
    model, processor = Subject(settings).load()
    table(part)
    verdict(part, reach(model.config) / processor.frame_rate)
    converse(model, processor, settings.output, settings.seed)
    print(f"picture: {settings.output / 'pictures' / 'spoken_recall.png'}; report: {report}")
    print(f"the demonstration took {(time.perf_counter() - begin) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(without_trace(main))
