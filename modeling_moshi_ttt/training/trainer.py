"""The training loop: losses divided by the weight of the whole step, finite steps only, checkpoints from which a run goes on to the bit."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from ..common.files import tensors_written
from ..common.progress import progress_bar
from ..common.run_folder import CHECKPOINTS, METRICS, RUN_CONFIG, read_settings, write_settings
from ..data.prepared import PreparedSet
from ..data.settings import DataSettings
from ..data.spoken_dialogues import Phrasebook
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE
from ..version import __version__
from . import modes
from .checkpoint import CheckpointFolder, Snapshot, live_tensors, random_state, restore, set_random_state
from .curriculum import Curriculum
from .dialogues import DialoguePlan, DialogueReader
from .lanes import Plan
from .memory import LaneMemory
from .noise import add_noise
from .objective import objective, open_gates, ratio
from .report import MetricsFile, peak_memory, shown
from .run_config import ModelSettings, RunConfig
from .schedule import longer, set_rates
from .signals import RunStopped, StopRequest
from .windows import Batch, Loader, Step, WindowReader, evaluation_plan, make_plan, worker_errors

logger = logging.getLogger(__name__)
# Settings that may change when a run goes on: they do not touch a number of it.
FREE_SETTINGS = (
    *("run_dir", "trackers", "checkpoint.every", "checkpoint.keep", "checkpoint.sharded"),
    *("data.workers", "data.cache", "data.batch_size", "data.accumulation"),
)


@dataclass
class Progress:
    """Where a run stands; everything in it is plain and goes into the checkpoint."""

    step: int = 0
    bad_in_a_row: int = 0
    bad_steps: int = 0
    best_step: int | None = None
    best_loss: float = float("inf")
    place: dict[str, Any] = field(default_factory=dict)
    curriculum: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Trains one model on one plan of windows.

    Args:
        run: all settings.
        model: in its mode (see modes.apply), not yet prepared by accelerate.
        train, held_out: prepared recordings; held_out may be None, and train the phrases that dialogues are made of.
        accelerator: as make_accelerator gives it.
    """

    def __init__(self, run: RunConfig, model: Any, train: PreparedSet | Phrasebook, held_out: PreparedSet | None, accelerator: Accelerator):
        self.run, self.accelerator, self.held_out = run, accelerator, held_out
        self.run_dir = Path(run.run_dir)
        self.bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.bare.config
        self.window = max(round(run.data.window_seconds * FRAME_RATE), 1)
        sharded = accelerator.distributed_type == DistributedType.FSDP
        # accelerate takes a model and an optimizer together, and finds the sharded parameters by their old ones' addresses; those on the
        # meta device have none, so the optimizer that counts is made of what has come out
        self.model, _ = accelerator.prepare(model, modes.make_optimizer(model.named_parameters(), run.optim, sharded))
        self.optimizer = modes.make_optimizer(self.model.named_parameters(), run.optim, sharded)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.memory = LaneMemory(self.bare, run.data.carry, run.data.accumulation, run.data.batch_size, run.data.next_share)
        self.rows = run.data.batch_size * run.data.accumulation * accelerator.num_processes
        self.curriculum = None if run.curriculum is None else Curriculum(run.curriculum)
        self._read(train)
        self.folder = CheckpointFolder(self.run_dir / CHECKPOINTS, run.checkpoint.keep)
        self.progress = Progress()
        self.request, self.stop_signal = StopRequest(), 0
        self.planned_steps = run.optim.steps
        self.tokens_per_frame = 1 + self.config.num_codebooks

    def _read(self, train: PreparedSet | Phrasebook) -> None:
        """Set up the plan of the windows, or of the dialogues, and what makes batches of them."""
        run, delays = self.run, self.config.audio_delays
        self.reader: WindowReader | DialogueReader
        self.plan: Plan
        if isinstance(train, Phrasebook):
            assert run.dialogues is not None
            self.reader = DialogueReader(train, run.dialogues, run.seed, delays[: self.config.num_predicted_codebooks])
            self.plan = DialoguePlan(self.rows, self.curriculum)
            self.data_mark = train.mark
        else:
            self.reader = WindowReader(train.recordings, delays, self.config.num_codebooks, self.config.user_depth_slices)
            self.plan = make_plan(train, run.data, self.rows, self.window, run.seed)
            self.data_mark = train.mark

    # ---- the loop

    def fit(self, request: StopRequest | None = None) -> Progress:
        """Train to the last step, from the newest checkpoint if there is one; after `request`, on any rank, to the end of its step.

        Raises:
            RunStopped: it was requested, and the checkpoint is saved.
            ValueError: the run folder belongs to another configuration, or cannot be resumed with this number of processes.
            FloatingPointError: too many steps in a row were not finite; the batch is saved in the run folder.
            OSError: the disk is full, or a data worker died; the same command goes on.
        """
        self.request = request or self.request
        resumed = self._resume()
        told = self.progress.step if resumed else -1
        metrics = MetricsFile(self.run_dir / METRICS, told) if self.accelerator.is_main_process else None
        if self.progress.step == 0 and self.run.evaluate_start:
            self._tell(metrics, {"step": 0, **self.evaluate()})
        data = self.run.data
        rank = self.accelerator.process_index
        steps = iter(Loader(self.plan, self.reader, data.batch_size, data.accumulation, data.tbptt_windows, rank, data.workers))
        bar = progress_bar(
            total=self.run.optim.steps, initial=self.progress.step, desc="training", disable=not self.accelerator.is_main_process
        )
        with worker_errors(), bar, self.folder:
            while self.progress.step < self.run.optim.steps and not self.stop_signal:
                begin = time.perf_counter()
                step = next(steps)
                record = self._step(step, time.perf_counter() - begin, begin)
                self._tell(metrics, record)
                loss, text, speed = (
                    shown(record[name], spec) for name, spec in (("loss", ".3f"), ("text_loss", ".3f"), ("tokens_per_second", ".0f"))
                )
                bar.set_postfix_str(f"loss {loss} text {text}, {speed} tokens/s")
                bar.update()
                self._after_step(metrics)
        if self.stop_signal and self.progress.step < self.run.optim.steps:
            raise RunStopped(self.stop_signal, self.progress.step, self.run.optim.steps, str(self.folder.path(self.progress.step)))
        return self.progress

    def _after_step(self, metrics: MetricsFile | None) -> None:
        run, now = self.run, self.progress.step
        last = now == run.optim.steps
        if run.evaluate_every and (now % run.evaluate_every == 0 or last):
            scores = self.evaluate()
            self._tell(metrics, {"step": now, **scores})
            loss = scores["eval_loss"]
            if loss is not None and loss < self.progress.best_loss:
                self.progress.best_loss, self.progress.best_step = loss, now
        keep_best = self.progress.best_step == now
        if last or keep_best or self.stop_signal or (run.checkpoint.every and now % run.checkpoint.every == 0):
            self.save()

    def _step(self, step: Step, waited: float, begin: float) -> dict[str, Any]:
        """One optimizer step over all micro-batches; returns its record."""
        self.model.train()
        device = self.accelerator.device
        micro_batches = [[batch.to(device) for batch in micro] for micro in step.micro_batches]
        factor = set_rates(self.optimizer.param_groups, self.rates, self.progress.step, self.run.optim)
        weights = [self.memory.loss_weights(micro, batches) for micro, batches in enumerate(micro_batches)]
        whole = self.accelerator.reduce(torch.stack(weights).sum(dim=(0, 1)), "sum")  # [2]
        price = self._write_price(micro_batches)
        # text loss, audio loss, answers right, answers, open gates, frames, ranks that were asked to stop
        totals = torch.zeros(7, dtype=torch.float64, device=device)
        for micro, batches in enumerate(micro_batches):
            with self._sync(last=micro == len(micro_batches) - 1):
                totals[:5] += self._micro_batch(micro, batches, whole, price)
            totals[5] += sum(batch.frames for batch in batches)
        totals[6] = self.request.signal is not None
        totals = self.accelerator.reduce(totals, "sum")
        norm = self._clip()
        finite = bool(torch.isfinite(totals).all() and torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.place = step.state
        *losses, right, answers, gates, frames, asked = totals.tolist()
        if asked:
            self.stop_signal = self.request.signal or signal.SIGTERM
        if self.curriculum is not None:
            self.curriculum.update(right / max(answers, 1))
            self.progress.curriculum = self.curriculum.state_dict()
        self._count(finite, micro_batches)
        text, audio = (loss if weight > 0 else None for loss, weight in zip(losses, whole.tolist()))
        took = time.perf_counter() - begin
        return {
            "step": self.progress.step,
            "loss": objective(text, audio, self.run.data.text_weight),
            "text_loss": text,
            "audio_loss": audio,
            "gradient_norm": float(norm),
            "lr": self.run.optim.lr * factor,
            "skipped": not finite,
            "tokens_per_second": frames * self.tokens_per_frame / took if frames > 0 else None,
            "data_wait": waited / took,
            "peak_memory_gb": peak_memory(self.accelerator.device),
            **({} if answers == 0 else {"answer_accuracy": right / answers}),
            **({} if not self.run.optim.ttt_write_cost else {"write_gate": ratio(gates, frames)}),
            **({} if self.curriculum is None else {"level": self.curriculum.level}),
        }

    def _write_price(self, micro_batches: list[list[Batch]]) -> float:
        """What the open gate of one frame adds to what is minimized: `optim.ttt_write_cost` over the frames of the whole step."""
        cost = self.run.optim.ttt_write_cost
        if not cost:
            return 0.0
        frames = sum(batch.frames for batches in micro_batches for batch in batches)
        whole = self.accelerator.reduce(torch.tensor(float(frames), device=self.accelerator.device), "sum")
        return cost * (1.0 if self.curriculum is None else self.curriculum.level) / max(float(whole), 1.0)

    def _micro_batch(self, micro: int, batches: list[Batch], whole: torch.Tensor, price: float = 0.0) -> torch.Tensor:
        """Forward through windows that follow one another, then one backward; returns (text loss, audio loss, answers right, answers, open
        gates) [5]."""
        data, total, parts = self.run.data, None, torch.zeros(5, dtype=torch.float64, device=whole.device)
        costly = bool(self.run.optim.ttt_write_cost)
        for turn, batch in enumerate(batches):
            seeds = self._seeds(micro, turn)
            cache = self.memory.enter(micro, batch.reset, seeds)
            noisy = add_noise(batch, data, self.config.audio_vocab_size, seeds, self.config.text_padding_ids[0])
            how = {"past_key_values": cache, "use_cache": cache is not None, "output_write_gates": costly, "return_dict": True}
            output = self.model(**noisy.inputs(), num_items_in_batch=whole, **how)
            loss: Any = objective(output.text_loss, output.audio_loss, data.text_weight)
            if output.write_gates:
                gates = open_gates(output.write_gates, batch.attention_mask)
                parts[4] += gates.detach()
                loss = loss + price * gates
            total = loss if total is None else total + loss
            parts[:2] += torch.stack([output.text_loss.detach(), output.audio_loss.detach()]).to(parts)
            if batch.asked is not None:
                parts[2:4] += torch.stack(answer_hits(output.logits, batch.text_labels, batch.asked)).to(parts)
        del output  # its logits: backward needs the room
        # DDP and FSDP divide by the number of processes, but the losses are divided by the whole step's weight already
        self.accelerator.backward(total * self.accelerator.num_processes)
        self.memory.leave(micro)
        return parts

    def _seeds(self, micro: int, turn: int) -> list[tuple[int, ...]]:
        """For each row, what its noise depends on: the run, the step, the row's place in the whole step, and the turn."""
        first = (self.accelerator.process_index * self.run.data.accumulation + micro) * self.run.data.batch_size
        return [(self.run.seed, self.progress.step, first + row, turn) for row in range(self.run.data.batch_size)]

    def _sync(self, last: bool) -> Any:
        """Gradients travel between ranks in the last micro-batch only; under FSDP2 in each, for until then they would be held whole."""
        sharded = hasattr(self.model, "set_requires_gradient_sync")
        return contextlib.nullcontext() if last or sharded else self.accelerator.no_sync(self.model)

    def _clip(self) -> torch.Tensor:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, self.run.optim.clip)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _count(self, finite: bool, micro_batches: list[list[Batch]]) -> None:
        """Count steps that were skipped; after too many in a row save the batch and stop."""
        if finite:
            self.progress.bad_in_a_row = 0
            return
        self.progress.bad_steps += 1
        self.progress.bad_in_a_row += 1
        self.memory.forget()  # what is remembered may not be finite either
        logger.warning("Step %d was not finite and is skipped (%d in a row).", self.progress.step, self.progress.bad_in_a_row)
        if self.progress.bad_in_a_row < self.run.optim.max_bad_steps:
            return
        path = self.run_dir / f"bad_batch-rank{self.accelerator.process_index}.safetensors"
        tensors = {
            f"{m}.{t}.{name}": value.cpu().contiguous()
            for m, batches in enumerate(micro_batches)
            for t, batch in enumerate(batches)
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with tensors_written(path):
            save_file(tensors, path)
        names = sorted({name for batches in micro_batches for batch in batches for name in batch.names})
        raise FloatingPointError(
            f"{self.progress.bad_in_a_row} steps in a row were not finite (optim.max_bad_steps); the batch of {', '.join(names)} is in "
            f"{path}. Lower optim.lr or look at these recordings."
        )

    def _tell(self, metrics: MetricsFile | None, record: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(record)
        if self.run.trackers:
            numbers = {name: float(value) for name, value in record.items() if name != "step" and value is not None}
            self.accelerator.log(numbers, step=record["step"])

    # ---- validation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float | None]:
        """Losses and text accuracy over all held-out recordings, each divided once by the weight of them all; None where that is 0."""
        if self.held_out is None:
            raise MoshiTTTError("There is nothing to evaluate on: set data.evaluation to a manifest.")
        self.model.eval()
        data, device = self.run.data, self.accelerator.device
        rows = data.batch_size * self.accelerator.num_processes
        plan = evaluation_plan(self.held_out, data, rows, self.window)
        config = self.config
        reader = WindowReader(self.held_out.recordings, config.audio_delays, config.num_codebooks, config.user_depth_slices)
        memory = LaneMemory(self.bare, data.carry, 1, data.batch_size)
        totals = torch.zeros(6, dtype=torch.float64, device=device)
        for step in Loader(plan, reader, data.batch_size, 1, 1, self.accelerator.process_index):
            batch = step.micro_batches[0][0].to(device)
            weights = memory.loss_weights(0, [batch])[0]
            cache = memory.enter(0, batch.reset)
            output = self.model(**batch.inputs(), past_key_values=cache, use_cache=cache is not None, return_dict=True)
            memory.leave(0)
            losses = torch.stack([output.text_loss, output.audio_loss])
            right, words = word_hits(output.logits, batch.text_labels, self.config.text_padding_ids)
            totals += torch.cat([(losses * weights).double(), weights.double(), torch.stack([right, words]).double()])
        text, audio, text_weight, audio_weight, right, words = self.accelerator.reduce(totals, "sum").clamp(min=0).tolist()
        text_loss, audio_loss = ratio(text, text_weight), ratio(audio, audio_weight)
        return {
            "eval_loss": objective(text_loss, audio_loss, data.text_weight),
            "eval_text_loss": text_loss,
            "eval_audio_loss": audio_loss,
            "eval_text_accuracy": ratio(right, words),
        }

    # ---- checkpoints

    def save(self) -> Path:
        """Begin to write a checkpoint of everything that the run needs to go on; training may go on meanwhile."""
        randoms, plain = random_state()
        own = {**randoms, **{f"memory.{name}": tensor for name, tensor in self.memory.state_dict().items()}}
        state = {"progress": vars(self.progress), "random": plain, "world": self.accelerator.num_processes, "run": self.run.to_dict()}
        state |= {"data": self.data_mark, "version": __version__}
        snapshot = Snapshot(state, live_tensors(self.model, self.optimizer), own)
        return self.folder.save(self.progress.step, snapshot, self.progress.best_step)

    def _resume(self) -> bool:
        """Go on from the newest whole checkpoint, if there is one; check that the folder belongs to this configuration."""
        self._check_folder()
        path = self.folder.newest()
        if path is None:
            return False
        snapshot = self.folder.read(path)
        self._check_world(snapshot.state)
        self._check_data(path, snapshot.state)
        restore(path, self.model, self.optimizer, self.folder.group)
        if snapshot.own:
            self.memory.load_state_dict(_below(snapshot.own, "memory."))
            set_random_state(snapshot.own, snapshot.state["random"])
        self.progress = Progress(**snapshot.state["progress"])
        if "version" not in snapshot.state:
            self._take_over(path)
        self.plan.load_state_dict(self.progress.place)
        if self.curriculum is not None:
            self.curriculum.load_state_dict(self.progress.curriculum)
        logger.info("Going on from %s.", path)
        if self.planned_steps < self.run.optim.steps:
            logger.warning("%s", longer(self.progress.step, self.planned_steps, self.run.optim))
        return True

    def _take_over(self, path: Path) -> None:
        """Go on from a checkpoint of version 0.1.0, whose settings meant something else in three places."""
        logger.warning(
            "%s was written by version 0.1.0. From here on the schedule onecycle moves AdamW's beta1 as well, noise spares what the depth "
            "decoder is given within a frame, and the loss that is logged and chooses the best checkpoint counts data.text_weight.",
            path,
        )
        if self.run.data.text_weight != 1:  # the best by another number
            self.progress.best_step, self.progress.best_loss = None, float("inf")

    def _check_world(self, state: dict[str, Any]) -> None:
        saved, now = state["world"], self.accelerator.num_processes
        if saved == now:
            return
        reasons = {
            "the ranks' carried memories cannot be dealt out anew (data.carry)": self.run.data.carry != "none",
            "LoRA's dropout draws from each rank's own generator (lora.dropout)": self.run.lora is not None and self.run.lora.dropout > 0,
        }
        for reason, holds in reasons.items():
            if holds:
                raise MoshiTTTError(f"The checkpoint was written by {saved} processes and there are {now}: {reason}. Resume with {saved}.")

    def _check_data(self, path: Path, state: dict[str, Any]) -> None:
        """A place in the data is a few numbers of recordings, which mean others once one was added, removed or exchanged."""
        before = state.get("data", self.data_mark)  # older checkpoints do not say
        if before != self.data_mark:
            raise MoshiTTTError(
                f"{path} was trained on other recordings: data.train={self.run.data.train} gave {before} and now gives {self.data_mark}. "
                "Give the same recordings in the same order, or start with a new run_dir."
            )

    def _check_folder(self) -> None:
        """The folder's run_config.json must say what this run says, but for what touches no number."""
        now = _fixed(self.run.to_dict()) | {"rows of a step": self.rows}
        if self.run.data.carry != "none" or (self.run.lora is not None and self.run.lora.dropout > 0):
            # memories and dropout belong to micro-batches, so these cannot be exchanged for one another
            now |= {"data.batch_size": self.run.data.batch_size, "data.accumulation": self.run.data.accumulation}
        if (self.run_dir / RUN_CONFIG).exists():
            before = read_settings(self.run_dir)["fixed"]
            before = {key: value for key, value in before.items() if key in now or key not in FREE_SETTINGS}
            # settings that came with a later version were at their defaults
            unset = _fixed(RunConfig("", ModelSettings(""), DataSettings(""), mode="full").to_dict())
            before = {key: value for key, value in unset.items() if key in now} | before
            self.planned_steps = before["optim.steps"]
            if self.planned_steps < now["optim.steps"]:
                before |= {"optim.steps": now["optim.steps"]}  # a run may become longer
            keys = [key for key in sorted(set(before) | set(now)) if before.get(key) != now.get(key)]
            if keys:
                changes = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)
                raise MoshiTTTError(f"{self.run_dir} belongs to another configuration: {changes}. Use its settings, or another run_dir.")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_settings(self.run_dir, self.run.to_dict(), now)
        self.accelerator.wait_for_everyone()


def word_hits(logits: torch.Tensor, labels: torch.Tensor, padding_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """How many text labels [B, T] that are words the logits [B, T, V] put first, and how many there are."""
    words = (labels >= 0) & ~torch.isin(labels, torch.tensor(padding_ids, device=labels.device))
    return ((logits.argmax(dim=-1) == labels) & words).sum(), words.sum()


def answer_hits(logits: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the words that `asked` [B, T] marks the logits [B, T, V] spell right from their first token to their last, and how many
    there are. (Most tokens of a word that takes several follow from the first: counting tokens calls half of the guesses right.)
    """
    begins = asked & ~torch.nn.functional.pad(asked, (1, 0))[:, :-1]
    word = begins.flatten().cumsum(0) - 1  # [B T], which one a frame belongs to
    wrong = (logits.argmax(dim=-1) != labels) & asked
    missed = torch.bincount(word[wrong.flatten()], minlength=int(begins.sum()))
    return (missed == 0).sum(), begins.sum()


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fixed(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, without those that touch no number."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        if name in FREE_SETTINGS:
            continue
        if isinstance(value, dict):
            flat |= _fixed(value, f"{name}.")
        else:
            flat[name] = value
    return flat
