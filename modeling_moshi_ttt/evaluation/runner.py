"""Runs the sections of an evaluation one after the other, keeps what is done, and writes results.json, pictures and the report."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..adapters.bases import check_loadable, checked_config, is_adapter, load_merged
from ..adapters.models import load_model
from ..common.files import atomic_write, read_json, sha256
from ..common.hub import local_folder
from ..data import long_recordings as books
from ..data.audio import READING
from ..data.recordings import Recording
from ..errors_moshi_ttt import MoshiTTTError
from ..processing_moshi_ttt import MoshiTTTProcessor
from . import conversations, inner_loss, inputs, long_context, recall, spoken_recall, zero_shot
from .contents import codes_fingerprint
from .evaluate import EvaluateSettings, RecordingsSettings
from .kept import kept_shape, read_kept
from .report import write_report
from .scoring import CodeSequence, ScoreWeights, SpeechScorer


class Subject:
    """The model under evaluation, loaded at first use, and its fingerprint. ValueError where its settings cannot be."""

    def __init__(self, settings: EvaluateSettings) -> None:
        self.settings = settings
        self.folder = local_folder(settings.model) if settings.model else None
        self.adapter = local_folder(settings.adapter) if settings.adapter else None
        self.device = _device(settings.device)
        if self.folder is not None and is_adapter(self.folder):  # transformers would load another model in silence, the adapter's base
            raise MoshiTTTError(
                f"{self.folder} is an adapter, no whole model; give model=BASE adapter={self.folder}, or merge the two first."
            )
        self.ttt = self._ttt() if self.folder is not None else {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the weights and configurations of model and adapter, and the TTT settings in effect."""
        digest = hashlib.sha256(self.settings.dtype.encode())
        if self.adapter is not None:
            digest.update(json.dumps(self.ttt, sort_keys=True).encode())
        for folder in (self.folder, self.adapter):
            files = [] if folder is None else sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
            for path in files:
                digest.update(f"{path.relative_to(folder)} {sha256(path)}\n".encode())  # type: ignore[arg-type]
        return digest.hexdigest()

    def load(self) -> tuple[Any, Any]:
        """(model, processor); ValueError where they do not belong together."""
        self._processor.check_model(self.model.config)
        return self.model, self._processor

    @cached_property
    def model(self) -> Any:
        """The model on its device, the adapter merged into it."""
        dtype = getattr(torch, self.settings.dtype)
        if self.adapter is None:
            model: Any = load_model(str(self.folder), dtype)
        else:
            model = load_merged(self.adapter, str(self.folder), dtype)
        return model.to(self.device).eval()

    @cached_property
    def _processor(self) -> Any:
        """From the model's folder, or the adapter's where only that has a processor, as on a plain base."""
        both = [folder for folder in (self.folder, self.adapter) if folder is not None and (folder / "processor_config.json").is_file()]
        return MoshiTTTProcessor.from_pretrained(str(both[0] if both else self.folder))

    def _ttt(self) -> dict[str, Any]:
        """The TTT settings in effect: an adapter may bring TTT layers that its base lacks. ValueError where the two do not fit."""
        if self.adapter is not None:
            config = json.loads(checked_config(self.adapter, str(self.folder)).to_json_string(use_diff=False))
        else:
            config = read_json(self.folder / "config.json")  # type: ignore[operator]
            check_loadable(config, str(self.folder))
        return {key: value for key, value in config.items() if key.startswith("ttt_")}

    def about(self) -> dict[str, Any]:
        if self.folder is None:
            return {"name": "no model", "fingerprint": "", "ttt": {}}
        name = f"{self.settings.model}" + (f" with {self.settings.adapter}" if self.settings.adapter else "")
        return {"name": name, "fingerprint": self.fingerprint, "ttt": self.ttt}


def _device(name: str) -> str:
    """The device by its name, after a first number on it; ValueError where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        raise MoshiTTTError(
            f"device is {name!r}, which cannot be used here ({str(error).splitlines()[0]}); give auto, cpu or cuda."
        ) from None
    return name


def check(settings: EvaluateSettings) -> Subject:
    """The model, after all has been looked at that needs no weights: a mistake in the last section must not come out after hours."""
    subject = Subject(settings)
    for name, section in settings.sections.items():
        _check_inputs(name, section)
    if settings.dialogue is not None and settings.dialogue.before:
        _before(settings, settings.dialogue)
    if settings.spoken_recall is not None:
        _beside(settings, settings.spoken_recall)
    settings.output.mkdir(parents=True, exist_ok=True)
    return subject


def run_evaluation(settings: EvaluateSettings, show_progress: bool = True) -> Path:
    """Run every section of the settings that results.json does not hold yet, and write the report; returns the report's path."""
    subject, sections = check(settings), settings.sections
    results = _open_results(settings.output, subject)
    torch.manual_seed(settings.seed)
    keys = {name: _key(name, section, settings) for name, section in sections.items()}
    pending = {name: (sections[name], key) for name, key in keys.items() if results["tasks"].get(name, {}).get("settings") != key}
    for name, (section, key) in pending.items():
        begin = time.perf_counter()
        part = RUNNERS[name](subject, section, settings, show_progress)
        results["tasks"][name] = part | {"settings": key, "seconds": round(time.perf_counter() - begin, 1)}
        results["written"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        atomic_write(settings.output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return write_report(results, settings.output)


def _key(name: str, section: Any, settings: EvaluateSettings) -> dict[str, Any]:
    """What a section's numbers depend on: its settings, and the data and weights that lie under the names in them by now."""
    # recall has a seed of its own, which counts
    key: dict[str, Any] = json.loads(json.dumps({"seed": settings.seed} | asdict(section), default=str))
    if getattr(section, "before", None):
        key["before_fingerprint"] = _before(settings, section).fingerprint
    if getattr(section, "beside", None):
        key["beside_fingerprints"] = {name: one.fingerprint for name, one in _beside(settings, section).items()}
    if data := inputs.fingerprint(name, section):
        key["inputs"] = data
    return key


def _check_inputs(name: str, section: Any) -> None:
    """Read a section's folders and manifests once."""
    if name == "zero_shot":
        for task in section.tasks:
            zero_shot.read_task(task.task, task.folder, task.split, task.parts)
    elif name == "dialogue":
        inputs.dialogues(section)
    elif name in ("long_context", "inner_loss"):
        inputs.long_recordings(section)
    elif name == "recall":
        recall.resume(section)
    elif name == "spoken_recall" and section.manifest is not None:
        spoken_recall.recordings(section)
    if name == "long_context":
        long_context.check_conditions(section.conditions)


def _open_results(output: Path, subject: Subject) -> dict[str, Any]:
    path = output / "results.json"
    about = subject.about()
    if not path.is_file():
        return {"model": about, "written": "", "tasks": {}}
    results = read_kept(path)
    with kept_shape(path):
        name, fingerprint = str(results["model"]["name"]), str(results["model"]["fingerprint"])
        for part in results["tasks"].values():
            part.get("settings")
    if not fingerprint:
        results["model"] = about  # so far the folder holds what needs no model
    elif about["fingerprint"] and fingerprint != about["fingerprint"]:
        raise MoshiTTTError(
            f"{path}: holds results of another model ({name}, {fingerprint[:12]}; "
            f"this one is {about['name']}, {about['fingerprint'][:12]}); choose another output folder"
        )
    return results


# ---------------------------------------------------------------- one function a section


def _zero_shot(subject: Subject, section: Any, settings: EvaluateSettings, show_progress: bool) -> dict[str, Any]:
    model, processor = subject.load()
    weights = ScoreWeights(section.semantic_weight, section.acoustic_weight)
    text: str | int = model.config.text_padding_ids[0] if section.text == "padding" else "absent"
    scorer = SpeechScorer(model, lambda waves: encode_waves(processor, waves), weights, section.user, text, settings.batch_size)
    header = {"fingerprint": subject.fingerprint, "user": section.user, "text": section.text, "reading": READING}
    tasks = {}
    for task in section.tasks:
        pairs = zero_shot.read_task(task.task, task.folder, task.split, task.parts)
        cache = settings.output / "scores" / f"{task.task}-{task.split}.json"
        sums = zero_shot.score_files(scorer, pairs, cache, header, settings.batch_size, _bar(task.task, show_progress))
        tasks[task.task] = zero_shot.result(pairs, sums, weights, section.reduction, settings.seed)
        if section.submission:
            zero_shot.submission(settings.output / "submission", task.task, task.split, sums, weights, section.reduction)
    return zero_shot.section(tasks, section)


def encode_waves(processor: Any, waves: list[np.ndarray]) -> list[torch.Tensor]:
    """Codes [K, T] of mono waves [N] at the codec's rate, in one batch: the codec is causal, so silence after a wave changes nothing."""
    longest = max(len(wave) for wave in waves)
    batch = torch.from_numpy(np.stack([np.pad(wave, (0, longest - len(wave))) for wave in waves]))
    codes = processor.encode_audio(batch)
    return [row[:, : -(-len(wave) // processor.frame_size)] for row, wave in zip(codes, waves)]


def _recordings(processor: Any, section: RecordingsSettings, show_progress: bool) -> dict[str, CodeSequence]:
    sources = tqdm(inputs.long_recordings(section).items(), desc="encoding", disable=not show_progress)
    return {name: _encode(processor, source, section.max_frames) for name, source in sources}


def _encode(processor: Any, source: list[Path] | Recording, max_frames: int | None) -> CodeSequence:
    if isinstance(source, Recording):
        return books.encode_recording(processor, source, max_frames)
    return books.encode_book(processor, source, max_frames)


def _long_context(subject: Subject, section: Any, settings: EvaluateSettings, show_progress: bool) -> dict[str, Any]:
    model, processor = subject.load()
    found = _recordings(processor, section, show_progress)
    window = model.config.sliding_window
    long_context.check_books(found, window, section.conditions)
    total = sum(book.moshi.shape[-1] for book in found.values()) * len(section.conditions)
    contents = {name: codes_fingerprint(book) for name, book in found.items()}
    with tqdm(total=total, desc="long context", unit="frames", disable=not show_progress) as bar:

        def losses(name: str, book: CodeSequence, condition: str) -> np.ndarray:
            # of the codes, not of the name: another set of data may use the same names
            key = f"{subject.fingerprint} {contents[name]} {condition} {settings.seed}"
            path = settings.output / "losses" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
            if path.is_file():
                bar.update(book.moshi.shape[-1])
                with kept_shape(path):
                    return np.load(path, allow_pickle=False)
            found = long_context.stream_losses(model, book, condition, section.chunk, settings.seed, bar.update)
            buffer = io.BytesIO()
            np.save(buffer, found, allow_pickle=False)
            atomic_write(path, buffer.getvalue())
            return found

        return long_context.measure(losses, found, window, section.conditions, settings.seed)


def _inner_loss(subject: Subject, section: Any, settings: EvaluateSettings, show_progress: bool) -> dict[str, Any]:
    model, processor = subject.load()
    return inner_loss.measure(model, _recordings(processor, section, show_progress), section.smooth)


def _dialogue(subject: Subject, section: Any, settings: EvaluateSettings, show_progress: bool) -> dict[str, Any]:
    model, processor = subject.load()
    recordings = inputs.dialogues(section)
    sampling = {"temperature": section.temperature, "text_temperature": section.text_temperature}
    progress = _bar("dialogue", show_progress)
    before = _before(settings, section).model if section.before else None
    return conversations.measure(model, processor, recordings, section.max_seconds, settings.seed, sampling, progress, before)


def _before(settings: EvaluateSettings, section: Any) -> Subject:
    """The model before fine-tuning."""
    try:
        return Subject(replace(settings, model=section.before, adapter=None))
    except ValueError as error:
        raise MoshiTTTError(f"dialogue.before: {error}") from None


def _spoken_recall(subject: Subject, section: Any, settings: EvaluateSettings, show_progress: bool) -> dict[str, Any]:
    model, processor = subject.load()
    heard = spoken_recall.inputs(section, processor, settings.seed, _bar("encoding", show_progress))
    models = {"": (model, section.conditions if model.config.ttt_layers else section.conditions[:1])}
    models |= {name: (one.model, [long_context.TTT]) for name, one in _beside(settings, section).items()}
    bar = _bar("spoken recall", show_progress)
    return spoken_recall.measure(models, processor, heard, section.modes, settings.batch_size, settings.seed, bar)


def _beside(settings: EvaluateSettings, section: Any) -> dict[str, Subject]:
    """The models that stand beside the one under evaluation."""
    found = {}
    for name, model in section.beside.items():
        try:
            found[name] = Subject(replace(settings, model=model, adapter=None))
        except ValueError as error:
            raise MoshiTTTError(f"spoken_recall.beside, {name}: {error}") from None
    return found


def _recall(subject: Subject, section: Any, settings: EvaluateSettings, show_progress: bool) -> dict[str, Any]:
    return recall.run_recall(section, show_progress)


def _bar(name: str, show: bool) -> Callable[[Any], Any]:
    return lambda items: tqdm(items, desc=name, disable=not show)


RUNNERS: dict[str, Callable[[Subject, Any, EvaluateSettings, bool], dict[str, Any]]] = {
    "zero_shot": _zero_shot,
    "long_context": _long_context,
    "inner_loss": _inner_loss,
    "dialogue": _dialogue,
    "spoken_recall": _spoken_recall,
    "recall": _recall,
}
