"""Load a trained model and talk to it: python examples/talk.py runs/demo/final examples/data/dialogues/train.jsonl

It reads the model with AutoModel.from_pretrained, says how much of the training dialogues it knows when it is led, lets it answer freely,
then listens to the user's channel of one dialogue, 80 ms at a time, prints what it answers and writes the sound of it.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

import modeling_moshi_ttt  # noqa: F401 - tells the Auto classes of the model
from modeling_moshi_ttt import MoshiTTTError
from modeling_moshi_ttt.cli import without_trace
from modeling_moshi_ttt.common.hub import check_place
from modeling_moshi_ttt.data.audio import read_audio, write_audio
from modeling_moshi_ttt.data.recordings import MAIN_SPEAKER, Recording, read_manifest
from modeling_moshi_ttt.tokens_moshi_ttt import ZERO


def frames_of(processor, recording: Recording):
    """The recording as aligned frames, ready for the model."""
    samples = torch.from_numpy(read_audio(recording.path, processor.sampling_rate))
    return processor(samples, sampling_rate=processor.sampling_rate, words=recording.words)


@torch.no_grad()
def led_accuracy(model, inputs: list) -> float:
    """Share of the words' tokens that the model puts first when it is given the true past."""
    right = words = 0
    for frames in inputs:
        logits = model(**frames, use_cache=False).logits
        labels = frames["text_labels"]
        real = (labels >= 0) & ~torch.isin(labels, torch.tensor(model.config.text_padding_ids))
        right += int(((logits.argmax(-1) == labels) & real).sum())
        words += int(real.sum())
    return right / words


def answer_freely(model, inputs: list) -> list[torch.Tensor]:
    """Text streams [T] of all dialogues at once, the model hearing the user's codes and itself."""
    lengths = [frames["input_ids"].shape[1] for frames in inputs]
    user = torch.full((len(inputs), model.config.num_user_codebooks, max(lengths)), ZERO)
    for row, frames in enumerate(inputs):
        user[row, :, : lengths[row]] = frames["user_audio_codes"][0]
    text, _ = model.hear(user, do_sample=False)
    return [text[row, :length] for row, length in enumerate(lengths)]


def share_in_order(expected: list[str], found: list[str]) -> float:
    """Longest common subsequence of words, as a share of the expected ones."""
    table = np.zeros((len(expected) + 1, len(found) + 1), dtype=int)
    for i, one in enumerate(expected):
        for j, other in enumerate(found):
            table[i + 1, j + 1] = table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1] / max(len(expected), 1)


def reply_words(recording: Recording) -> list[str]:
    return [text.lower() for text, _, speaker in recording.words or () if speaker == MAIN_SPEAKER]


def said_words(processor, ids: torch.Tensor) -> list[str]:
    return [word.lower() for word, _ in processor.words(ids)]


@torch.no_grad()
def converse(model, processor, recording: Recording) -> tuple[torch.Tensor, np.ndarray, float]:
    """Listen to the user's channel frame by frame; returns the text stream [T], the reply's samples, and seconds of work per second."""
    user = torch.from_numpy(read_audio(recording.path, processor.sampling_rate))[1:2]  # [1, n]
    user = torch.nn.functional.pad(user, (0, -user.shape[1] % processor.frame_size))
    ears, mouth = processor.new_audio_stream(), processor.new_audio_stream()
    stream = model.new_stream(do_sample=False)
    pieces, delay = user.split(processor.frame_size, dim=1), max(model.config.delays)
    # The first call comes before any sound; those after the last sound bring the frames that the delays still hold back.
    heard = [None, *pieces, *[None] * delay][: len(pieces) + delay]
    text, sound = [], []
    begin = time.perf_counter()
    for piece in heard:
        frame = stream.step(None if piece is None else ears.encode_frames(piece)[:, :, 0])
        if bool(frame.valid):
            text.append(int(frame.text))
            sound.append(mouth.decode_frames(frame.audio_codes[:, :, None]))
            tell(processor, text)
    took = time.perf_counter() - begin
    print(*[word for word, _ in processor.words(torch.tensor(text))[-1:]])  # the last word, which no other has followed
    return torch.tensor(text), torch.cat(sound, 1)[0].numpy(), took / (user.shape[1] / processor.sampling_rate)


def tell(processor, text: list[int]) -> None:
    """Print a word when it is whole, that is, when the next one or a pause begins."""
    before, now = (processor.words(torch.tensor(said, dtype=torch.long)) for said in (text[:-1], text))
    if len(now) > len(before) and before:
        print(before[-1][0], end=" ", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a trained model with its processor")
    parser.add_argument("manifest", help="a .jsonl of the dialogues that it was trained on")
    parser.add_argument("--dialogue", type=int, default=0, help="which of them to listen to")
    parser.add_argument("--reply", type=Path, default=Path("reply.wav"), help="where the sound of the reply goes")
    parser.add_argument("--led", type=float, default=0.0, help="least share of words' tokens that it must know when led")
    parser.add_argument("--free", type=float, default=0.0, help="least share of the reply's words that must come out freely, in order")
    arguments = parser.parse_args()

    recordings = read_manifest(arguments.manifest)
    if not 0 <= arguments.dialogue < len(recordings):
        raise MoshiTTTError(f"--dialogue is {arguments.dialogue}; {arguments.manifest} holds 0 to {len(recordings) - 1}")
    check_place(arguments.model, "the model")
    model = AutoModel.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    processor.check_model(model.config)
    inputs = [frames_of(processor, recording) for recording in recordings]
    led = led_accuracy(model, inputs)
    print(f"led by the true past, {led:.1%} of the words' tokens come first")
    free = []
    for recording, ids in zip(recordings, answer_freely(model, inputs)):
        free.append(share_in_order(reply_words(recording), said_words(processor, ids)))
        print(f"  freely, {free[-1]:6.1%} of the reply's words in order: {recording.path.stem}: {processor.decode_text(ids)}")

    recording = recordings[arguments.dialogue]
    heard = " ".join(text for text, _, speaker in recording.words or () if speaker != MAIN_SPEAKER)
    print(f"\nlistening to {recording.path.name}: {heard}\nanswering: ", end="")
    text, sound, factor = converse(model, processor, recording)
    live = share_in_order(reply_words(recording), said_words(processor, text))
    write_audio(arguments.reply, sound, processor.sampling_rate)
    print(f"{live:.1%} of the reply's words came out, in order; its sound is in {arguments.reply}")
    print(f"real-time factor {factor:.2f} (below 1 keeps up with speech), {factor * 80:.0f} ms of work for every 80 ms")
    if led < arguments.led or min(live, sum(free) / len(free)) < arguments.free:
        print(f"error: it should know {arguments.led:.0%} when led and say {arguments.free:.0%} freely", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(without_trace(main))
