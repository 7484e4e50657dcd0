"""Answer a recording, or every one of a folder, as a live conversation: the model hears the user frame by frame and speaks at the same
time.

A mono recording is the user; of a stereo recording the right channel is. The answer is as long as the recording and stands at its true
time.
Each line of a transcript is a word: {"file", "word", "start", "end", "speaker"}, times in seconds.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.files import atomic_write, check_folder, make_folder
from ..common.progress import progress_bar
from ..data.audio import audio_pieces, read_audio, write_audio
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import MAIN_SPEAKER
from .loading import ADAPTER, MODEL, load_model
from .session import ABOUT, MoshiTTTSession

RATE = 24000  # at which recordings are read to be checked
SOUNDS = (".wav", ".flac", ".mp3", ".ogg")
SAMPLING = {"temperature": float, "text_temperature": float, "top_k": int, "text_top_k": int}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", metavar="IN", type=Path, help="a sound file, or a folder of them")
    parser.add_argument("target", metavar="OUT", type=Path, help="the answer, a .wav; of a folder, a folder")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--adapter", help=ADAPTER)
    parser.add_argument("--transcript", type=Path, metavar="FILE.jsonl", help="write Moshi's words with their times")
    parser.add_argument("--stereo", action="store_true", help="write both voices, Moshi left and the user right")
    parser.add_argument("--seed", type=int, help="of every recording, whose answer then is the same each time, also beside others")
    for name, kind in SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"`{name}` as in the model's new_stream")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    parser.add_argument("--prompt", metavar="TEXT", help="what Moshi is before the conversation begins, in words: its persona")
    parser.add_argument("--prompt-voice", type=Path, metavar="FILE", help="a sound file of the voice that Moshi is to have, one channel")
    parser.add_argument("--batch-size", type=int, default=8, help="how many recordings of a folder are answered at once (default 8)")
    parser.add_argument("--save-session", type=Path, metavar="FOLDER", help="keep the conversation after the recording, to go on from")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with a conversation that was kept")


def run(args: argparse.Namespace) -> int:
    """Answer and write everything; what was asked for wrongly is refused before the first answer."""
    jobs = _jobs(args)
    model, processor = load_model(args.model, args.adapter)
    prompt = _prompt(args, processor)
    seconds, lines, begin = 0.0, [], time.perf_counter()
    with progress_bar(
        total=sum(math.ceil(_checked_seconds(source) * processor.frame_rate) for source, _ in jobs), desc="answering", unit="frames"
    ) as bar:
        for batch in (jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)):
            users = [torch.from_numpy(read_audio(source, processor.sampling_rate)[-1]) for source, _ in batch]
            session = _session(args, model, processor, len(batch), prompt)
            for (source, target), user, (said, text) in zip(batch, users, answer(session, users, bar.update)):
                sound = np.stack([said.numpy(), user.numpy()]) if args.stereo else said.numpy()
                write_audio(target, sound, processor.sampling_rate)
                lines += [{"file": source.name, **word} for word in timed_words(text, processor.frame_rate)]
                seconds += len(user) / processor.sampling_rate
    if args.transcript:
        atomic_write(args.transcript, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if args.save_session:
        session.save(args.save_session)
    took = time.perf_counter() - begin
    print(f"answered {seconds:.1f} s in {took:.1f} s: real-time factor {took / seconds:.2f} (below 1 keeps up with speech)")
    return 0


def answer(
    session: MoshiTTTSession, users: Sequence[Tensor], progress: Callable[[int], Any] = lambda frames: None
) -> Iterable[tuple[Tensor, list[str]]]:
    """Moshi's sound `[n]` and the text of each frame, for every row's user `[n]` at the session's rate, the codec's; the last frame is
    filled up.
    """
    size, late = session.largest_step, max(max(session.stream.model.config.delays) - 1, 0)
    frames = [math.ceil(len(user) / size) for user in users]
    heard = torch.stack([F.pad(user, (0, (max(frames) + late) * size - len(user))) for user in users])
    said = []
    for t, piece in enumerate(heard.split(size, 1)):
        said.append(session.step(piece, [t < count + late for count in frames]))
        progress(sum(t < count for count in frames))
    sound = torch.cat([frame.pcm for frame in said[late:]], 1)
    for row, (user, count) in enumerate(zip(users, frames)):
        yield sound[row, : len(user)], [frame.text[row] for frame in said[late : late + count]]


def timed_words(text: Sequence[str], frame_rate: float) -> list[dict[str, Any]]:
    """The words of text pieces, one a frame: each from its first frame to the end of its last."""
    words: list[dict[str, Any]] = []
    for t, piece in enumerate(text):
        if not piece.strip():
            continue
        if piece.startswith(" ") or not words:
            words.append({"word": "", "start": round(t / frame_rate, 3)})
        words[-1] |= {"word": words[-1]["word"] + piece.strip(), "end": round((t + 1) / frame_rate, 3), "speaker": MAIN_SPEAKER}
    return words


def _jobs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(recording, answer) of each; ValueError or OSError for arguments that do not fit each other or what is there."""
    folder = args.source.is_dir()
    if folder and (args.save_session or args.resume):
        raise MoshiTTTError(
            f"IN is the folder {args.source}, but --save-session and --resume are for one conversation; name one recording."
        )
    sampling = [name for name in ("seed", *SAMPLING, "prompt", "prompt_voice") if getattr(args, name) is not None] + [
        "greedy"
    ] * args.greedy
    if args.resume and sampling:
        raise MoshiTTTError(
            f"--{sampling[0].replace('_', '-')} cannot be given with --resume: a conversation goes on as it began, with its own settings."
        )
    if args.batch_size < 1:
        raise MoshiTTTError(f"--batch-size is {args.batch_size}; it must be 1 or more.")
    if args.save_session:
        check_folder(args.save_session, ABOUT)
    if not folder:
        jobs = [(args.source, args.target)]
    else:
        sources = sorted(path for path in args.source.iterdir() if path.suffix.lower() in SOUNDS)
        jobs = [(source, args.target / f"{source.stem}.wav") for source in sources]
        if not jobs:
            raise MoshiTTTError(f"IN is the folder {args.source}, which holds no sound file ({', '.join(SOUNDS)}).")
    targets = [target for _, target in jobs]
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise MoshiTTTError(f"two recordings of {args.source} would have the answer {twice[0]}; rename one of them.")
    for source, target in jobs:
        if target.suffix.lower() != ".wav" or target.is_dir() or target.resolve() == source.resolve():
            raise MoshiTTTError(f"OUT is {target}; the answer to {source} must be another file, a .wav.")
        _checked_seconds(source)
    if folder:
        make_folder(args.target, "OUT")
    return jobs


@cache  # once before the model is loaded, and again for the progress bar
def _checked_seconds(path: Path) -> float:
    """Its length; ValueError or OSError unless the whole recording can be read and says who the user is."""
    samples = 0
    for piece in audio_pieces(path, RATE, 60.0):
        if len(piece) > 2:
            raise MoshiTTTError(f"{path}: has {len(piece)} channels; a recording is mono, the user, or stereo with the user right.")
        samples += piece.shape[1]
    return samples / RATE


def _prompt(args: argparse.Namespace, processor: Any) -> Any:
    """The frames that --prompt and --prompt-voice ask for; None without them."""
    if args.prompt is None and args.prompt_voice is None:
        return None
    voice = None if args.prompt_voice is None else read_audio(args.prompt_voice, processor.sampling_rate)
    if voice is not None and len(voice) != 1:
        raise MoshiTTTError(f"--prompt-voice {args.prompt_voice} has {len(voice)} channels; give the one that holds Moshi's voice.")
    return processor.prompt(voice, processor.sampling_rate, args.prompt)


def _session(args: argparse.Namespace, model: Any, processor: Any, rows: int, prompt: Any) -> MoshiTTTSession:
    if args.resume:
        session = MoshiTTTSession.load(args.resume, model, processor)
        if session.batch_size != 1 or session.sample_rate != processor.sampling_rate:
            found = f"{session.batch_size} rows at {session.sample_rate} Hz"
            raise MoshiTTTError(f"--resume is {args.resume}, with {found}; it must have one row at {processor.sampling_rate} Hz.")
        return session
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None} | {"do_sample": not args.greedy}
    seeds = None if args.seed is None else [args.seed] * rows
    return MoshiTTTSession(model, processor, rows, processor.sampling_rate, seeds=seeds, prompt=prompt, **sampling)
