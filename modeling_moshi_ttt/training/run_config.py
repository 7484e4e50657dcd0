"""Everything one chooses for a training run, as strict dataclasses filled from YAML (configuration/train/*.yaml)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..common.settings import ABOVE_ZERO, SEEDS, check_numbers, load_settings, to_dict
from ..data.facts import ScriptSettings
from ..data.settings import DataSettings, check_columns
from ..errors_moshi_ttt import MoshiTTTError

Mode = Literal["frozen", "lora", "ttt", "lora+ttt", "full"]
BETA1 = 0.9
MADE = "made"  # as data.train: dialogues drawn as they are needed


@dataclass
class ModelSettings:
    """The model that is trained.

    path: a folder or Hub name with weights (Moshi's own or ours), or a config.json to start from fresh weights; "tiny" is a packaged one.
    processor: where the processor is, or "tiny" for the packaged one; None looks beside the weights.
    ttt: fields of MoshiTTTConfig to set, such as {ttt_layers: "23-31", ttt_mixer: mlp}.
    text_padding_weight, semantic_loss_weight: of padding in the text loss and of the first codebook in the audio loss, words and the other
        codebooks weighing 1; None keeps what the model's configuration says (Moshi's: 0.5 and 100).
    dtype: of the weights that rest; those that are trained are float32. bfloat16 makes the arithmetic bfloat16 as well, and float32 leaves
        it to the launcher's mixed_precision.
    matmul_precision: of float32 products (torch.set_float32_matmul_precision). "high" lets a GPU's tensor cores do them in TF32, several
        times faster; None takes it where the arithmetic is bfloat16, whose own rounding is coarser, and "highest" where it is float32.
    activation_checkpointing: compute each layer again in backward instead of keeping what is inside it: less memory, more time.
    """

    path: str
    processor: str | None = None
    ttt: dict[str, Any] = field(default_factory=dict)
    text_padding_weight: float | None = None
    semantic_loss_weight: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    activation_checkpointing: bool = True

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of MoshiTTTConfig that the recipe sets."""
        weights = {name: getattr(self, name) for name in ("text_padding_weight", "semantic_loss_weight")}
        return self.ttt | {name: weight for name, weight in weights.items() if weight is not None}


@dataclass
class LoraSettings:
    """LoRA over the temporal transformer.

    rank: of the two matrices beside each weight.
    scaling: of their product, alpha / rank.
    dropout: share of what goes into them that is set to 0 in training.
    depth_decoder, embeddings: adapt these too.
    """

    rank: int = 128
    scaling: float = 2.0
    dropout: float = 0.0
    depth_decoder: bool = False
    embeddings: bool = False


@dataclass
class OptimSettings:
    """How weights are moved.

    steps: of the optimizer.
    lr, ttt_lr, gate_lr: peak learning rates, of all else, of TTT weights and of gates; the last two are lr where they are null.
    betas: of AdamW.
    weight_decay: of AdamW, not on norms, biases, gates and inner learning-rate parameters.
    optimizer: "adamw" keeps two moments a weight (betas). "adafactor" (Shazeer and Stern 2018) keeps a row and a column of each matrix,
        next to nothing, and no betas; its rates are relative to a weight's own size (at least 1e-3), so take 1e-2 where AdamW takes 1e-4.
        Not with FSDP.
    schedule: "onecycle" is moshi-finetune's, torch's OneCycleLR with its defaults: rates rise from 1/25 and fall to 1/250000, and AdamW's
        beta1 falls from 0.95 to 0.85 meanwhile and rises back, in place of the first of `betas`. "cosine" and "constant" keep beta1.
    clip: largest norm of all gradients together.
    warmup: share of the steps in which rates rise.
    max_bad_steps: steps in a row that are not finite, before the run stops.
    """

    optimizer: Literal["adamw", "adafactor"] = "adamw"
    steps: int = 2000
    lr: float = 2e-6
    ttt_lr: float | None = None
    gate_lr: float | None = None
    betas: list[float] = field(default_factory=lambda: [BETA1, 0.95])
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    warmup: float = 0.05
    max_bad_steps: int = 5


@dataclass
class CheckpointSettings:
    """What a run goes on from.

    every: steps between checkpoints (0: only the end).
    keep: how many stay beside the best.
    sharded: deprecated, goes in 0.4: every checkpoint holds what each rank wrote of it, for any number of ranks.
    final_dtype: of the weights in `final`; bfloat16 halves it.
    """

    every: int = 100
    keep: int = 3
    sharded: bool = False
    final_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class CurriculumSettings:
    """Made dialogues grow from the shortest to the longest while their answers are right.

    threshold: smoothed accuracy of the answers above which they grow.
    steps: of training above it, from the shortest to the longest.
    """

    threshold: float = 0.8
    steps: int = 100


@dataclass
class RunConfig:
    """One training run; `run_dir` holds its checkpoints, logs, curve and the final model.

    run_dir: a new folder, or that of a run to go on with.
    mode: what is trained: nothing, LoRA, the TTT layers with their gates, both, or every parameter.
    model, data, lora, optim, checkpoint: groups of their own.
    dialogues: what is drawn where data.train is "made".
    curriculum: how they grow; None draws the longest from the first step on.
    evaluate_every: steps between evaluations on data.evaluation; 0: none.
    evaluate_start: evaluate before the first step too.
    seed: of fresh weights, the order of the data, noise and dropout.
    trackers: any of tensorboard, wandb and trackio; wandb and trackio must be installed besides (WANDB_MODE=offline needs no account).
    """

    run_dir: str
    model: ModelSettings
    data: DataSettings
    mode: Mode = "lora+ttt"
    lora: LoraSettings | None = None
    optim: OptimSettings = field(default_factory=OptimSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    dialogues: ScriptSettings | None = None
    curriculum: CurriculumSettings | None = None
    evaluate_every: int = 0
    evaluate_start: bool = False
    trackers: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, as they go to run_config.json."""
        return to_dict(self)


def load_run_config(path: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, by path or bare name, and its overrides; ValueError names what is wrong."""
    return load_settings(RunConfig, path, overrides, kind="train")


def _check(run: RunConfig) -> None:
    if "lora" in run.mode and run.lora is None:
        raise MoshiTTTError(f"mode is {run.mode!r} but there are no lora settings; add `lora: {{rank: 128, scaling: 2.0}}`.")
    if "lora" not in run.mode and run.lora is not None:
        raise MoshiTTTError(f"mode is {run.mode!r} but lora settings are given; remove them, or choose the mode 'lora' or 'lora+ttt'.")
    share = (0, 1)
    check_numbers(run, evaluate_every=0, seed=SEEDS)
    check_numbers(run.model, "model.", text_padding_weight=0, semantic_loss_weight=0)
    check_numbers(run.data, "data.", window_seconds=0.08, batch_size=1, accumulation=1, tbptt_windows=1, text_weight=0, workers=0)
    check_numbers(run.data, "data.", own_noise=share, user_noise=share, text_noise=share, user_code_noise=share)
    check_numbers(run.optim, "optim.", steps=1, lr=ABOVE_ZERO, ttt_lr=0, gate_lr=0, weight_decay=0, clip=1e-12)
    check_numbers(run.optim, "optim.", warmup=share, max_bad_steps=1)
    check_numbers(run.checkpoint, "checkpoint.", every=0, keep=1)
    if run.checkpoint.sharded:
        warnings.warn(
            "checkpoint.sharded has no meaning any more, for every rank writes its part; it goes in 0.4", FutureWarning, stacklevel=2
        )
    if run.lora is not None:
        check_numbers(run.lora, "lora.", rank=1, dropout=(0, 1 - 1e-9), scaling=ABOVE_ZERO)
    if len(run.optim.betas) != 2 or not all(0 <= beta < 1 for beta in run.optim.betas):
        raise MoshiTTTError(f"optim.betas is {run.optim.betas!r}, it must be two numbers in [0, 1).")
    if run.optim.schedule == "onecycle" and run.optim.betas[0] != BETA1:
        raise MoshiTTTError(
            f"optim.betas is {run.optim.betas!r}, but under optim.schedule 'onecycle' beta1 goes from 0.95 to 0.85 and back; "
            f"leave it at {BETA1}, or choose the schedule cosine or constant."
        )
    check_columns(run.data.columns)
    if run.data.tbptt_windows > 1 and run.data.carry == "none":
        raise MoshiTTTError("data.tbptt_windows is > 1 but data.carry is 'none'; choose carry 'state' or 'state+attention'.")
    _check_made(run)
    if run.evaluate_every and run.data.evaluation is None:
        raise MoshiTTTError("evaluate_every is set but data.evaluation is missing; name a manifest there or set evaluate_every: 0.")


def _check_made(run: RunConfig) -> None:
    made = run.data.train == MADE
    if made != (run.dialogues is not None):
        cure = "give `dialogues: {}`" if made else f"set data.train: {MADE}, or remove them"
        raise MoshiTTTError(f"data.train is {run.data.train!r} and there are {'no' if made else 'some'} dialogues settings; {cure}.")
    if made and (run.data.carry != "none" or run.data.workers):
        raise MoshiTTTError(
            f"data.train is {MADE!r}, with which data.carry={run.data.carry!r} must be none and data.workers={run.data.workers} 0."
        )
    if run.curriculum is not None:
        if not made:
            raise MoshiTTTError(f"a curriculum is given, but only made dialogues can grow; set data.train: {MADE}, or remove it.")
        check_numbers(run.curriculum, "curriculum.", threshold=(0, 1), steps=1)
