"""Everything one chooses for a training run, as strict settings filled from YAML (configuration/train/*.yaml)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from ..common.settings import Count, CountOrZero, Flag, NotNegative, Number, Positive, Seed, Share, load_settings, settings_group, to_dict
from ..data.facts import ScriptSettings
from ..data.settings import DataSettings
from ..errors_moshi_ttt import MoshiTTTError

Mode = Literal["frozen", "lora", "ttt", "lora+ttt", "full"]
BETA1 = 0.9
MADE = "made"  # as data.train: dialogues drawn as they are needed


@settings_group
class ModelSettings:
    """The model that is trained."""

    path: str
    """A folder or Hub name with weights (Moshi's own or ours), a run's folder, whose final is taken, or a config.json
    to start from fresh weights; "tiny" is a packaged one."""
    processor: str | None = None
    """Where the processor is, or "tiny" for the packaged one; None looks beside the weights."""
    ttt: dict[str, Any] = field(default_factory=dict)
    """Fields of MoshiTTTConfig to set, such as {ttt_layers: "23-31", ttt_mixer: mlp}."""
    text_padding_weight: NotNegative | None = None
    """Weight of padding in the text loss, where words weigh 1; None keeps what the model's configuration says (Moshi's: 0.5)."""
    semantic_loss_weight: NotNegative | None = None
    """Weight of the first codebook in the audio loss, where the others weigh 1; None keeps what the model's configuration says (Moshi's:
    100)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that rest; those that are trained are float32. bfloat16 makes the arithmetic bfloat16 as well, and float32 leaves it
    to the launcher's mixed_precision."""
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """Precision of float32 products (torch.set_float32_matmul_precision). "high" lets a GPU's tensor cores do them in TF32, several times faster;
    None takes it where the arithmetic is bfloat16, whose own rounding is coarser, and "highest" where it is float32."""
    activation_checkpointing: Flag = True
    """Compute each layer again in backward instead of keeping what is inside it: less memory, more time."""

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of MoshiTTTConfig that the recipe sets."""
        weights = {name: getattr(self, name) for name in ("text_padding_weight", "semantic_loss_weight")}
        return self.ttt | {name: weight for name, weight in weights.items() if weight is not None}


@settings_group
class LoraSettings:
    """LoRA over the temporal transformer."""

    rank: Count = 128
    """Rank of the two matrices beside each weight."""
    scaling: Positive = 2.0
    """Factor of their product, alpha / rank."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of what goes into them that is set to 0 in training."""
    depth_decoder: Flag = False
    """Adapt the depth decoder too."""
    embeddings: Flag = False
    """Adapt the embeddings too."""


@settings_group
class OptimSettings:
    """How weights are moved."""

    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"
    """"adamw" keeps two moments a weight (betas). "adafactor" (Shazeer and Stern 2018) keeps a row and a column of each matrix, next to
    nothing, and no betas; its rates are relative to a weight's own size (at least 1e-3), so take 1e-2 where AdamW takes 1e-4. "muon" (Jordan et al.
    2024) keeps one moment and makes the step of every linear layer's matrix orthogonal, of AdamW's size; all else is AdamW's. From fresh
    weights it needs fewer steps. Only adamw with FSDP."""
    steps: Count = 2000
    """Optimizer steps of the whole run."""
    lr: Positive = 2e-6
    """Peak learning rate of all but TTT weights and gates."""
    ttt_lr: NotNegative | None = None
    """Peak learning rate of TTT weights; null: `lr`."""
    gate_lr: NotNegative | None = None
    """Peak learning rate of gates; null: `lr`."""
    betas: Annotated[list[Annotated[Number, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = field(
        default_factory=lambda: [BETA1, 0.95]
    )
    """Decay of AdamW's two moments."""
    weight_decay: NotNegative = 0.1
    """Weight decay of AdamW, not on norms, biases, gates and inner learning-rate parameters."""
    clip: Positive = 1.0
    """Largest norm of all gradients together."""
    ttt_write_cost: NotNegative = 0.0
    """What an open gate costs: this times the mean of the TTT layers' gates over frames, heads and layers is added to what is minimized, in
    a curriculum times its level."""
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    """"onecycle" is moshi-finetune's, torch's OneCycleLR with its defaults: rates rise from 1/25 and fall to 1/250000, and AdamW's beta1
    falls from 0.95 to 0.85 meanwhile and rises back, in place of the first of `betas`. "cosine" and "constant" keep beta1."""
    warmup: Share = 0.05
    """Share of the steps in which rates rise."""
    max_bad_steps: Count = 5
    """Steps in a row that are not finite, before the run stops."""


@settings_group
class CheckpointSettings:
    """What a run goes on from."""

    every: CountOrZero = 100
    """Steps between checkpoints (0: only the end)."""
    keep: Count = 3
    """How many stay beside the best."""
    sharded: Flag = False
    """Deprecated, goes in 0.4: every checkpoint holds what each rank wrote of it, for any number of ranks."""
    final_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights in `final`; bfloat16 halves it."""

    def __post_init__(self) -> None:
        if self.sharded:
            warnings.warn(
                "checkpoint.sharded has no meaning any more, for every rank writes its part; it goes in 0.4", FutureWarning, stacklevel=2
            )


@settings_group
class CurriculumSettings:
    """Made dialogues grow from the shortest to the longest while their answers are right."""

    threshold: Share = 0.8
    """Smoothed accuracy of the answers above which they grow."""
    steps: Count = 100
    """Steps of training above it, from the shortest to the longest."""


@settings_group
class RunConfig:
    """One training run; `run_dir` holds its checkpoints, logs, curve and the final model."""

    run_dir: str
    """A new folder, or that of a run to go on with."""
    model: ModelSettings
    """The model."""
    data: DataSettings
    """The recordings."""
    mode: Mode = "lora+ttt"
    """What is trained: nothing, LoRA, the TTT layers with their gates, both, or every parameter."""
    lora: LoraSettings | None = None
    """LoRA, for the modes that have it."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """The optimizer."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """Checkpoints."""
    dialogues: ScriptSettings | None = None
    """What is drawn where data.train is "made"."""
    curriculum: CurriculumSettings | None = None
    """How they grow; None draws the longest from the first step on."""
    evaluate_every: CountOrZero = 0
    """Steps between evaluations on data.evaluation; 0: none."""
    evaluate_start: Flag = False
    """Evaluate before the first step too."""
    trackers: list[str] = field(default_factory=list)
    """Any of tensorboard, wandb and trackio; wandb and trackio must be installed besides (WANDB_MODE=offline needs no account)."""
    seed: Seed = 0
    """Seed of fresh weights, the order of the data, noise and dropout."""

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
        raise MoshiTTTError(f"`lora=null` must be given with `mode={run.mode}`; add `lora: {{rank: 128, scaling: 2.0}}`.")
    if "lora" not in run.mode and run.lora is not None:
        raise MoshiTTTError(f"`lora` must not be given with `mode={run.mode}`; remove it, or choose the mode 'lora' or 'lora+ttt'.")
    if run.optim.schedule == "onecycle" and run.optim.betas[0] != BETA1:
        raise MoshiTTTError(
            f"`optim.betas={run.optim.betas}` must begin with {BETA1} under `optim.schedule=onecycle`, where beta1 goes from 0.95 to 0.85 and "
            "back; leave it so, or choose the schedule cosine or constant."
        )
    if run.data.tbptt_windows > 1 and run.data.carry == "none":
        raise MoshiTTTError(
            f"`data.tbptt_windows={run.data.tbptt_windows}` must be 1 with `data.carry=none`; choose carry 'state', 'state+next' or 'state+attention'."
        )
    _check_made(run)
    if run.evaluate_every and run.data.evaluation is None:
        raise MoshiTTTError(
            f"`evaluate_every={run.evaluate_every}` must be 0 without recordings for it; name a manifest in data.evaluation, or set it to 0."
        )


def _check_made(run: RunConfig) -> None:
    made = run.data.train == MADE
    if made != (run.dialogues is not None):
        must, cure = ("be given", "add `dialogues: {}`") if made else ("not be given", f"set data.train: {MADE}, or remove it")
        raise MoshiTTTError(f"`dialogues` must {must} with `data.train={run.data.train}`; {cure}.")
    if made and (run.data.carry != "none" or run.data.workers):
        raise MoshiTTTError(
            f"`data.carry={run.data.carry}` must be none and `data.workers={run.data.workers}` 0 with `data.train={MADE}`; leave them out."
        )
    if run.curriculum is not None and not made:
        raise MoshiTTTError(f"`curriculum` must not be given with `data.train={run.data.train}`: only made dialogues grow; remove it.")
