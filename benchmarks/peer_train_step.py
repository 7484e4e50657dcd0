"""The peer's side of train_step.py, run in .venv-peer: Kyutai's LMModel and moshi-finetune's loss. Prints its row as JSON."""

import json
import sys

import torch
import torch.nn.functional as F
from measure import peak_bytes, seconds
from moshi.models.lm import LMModel
from safetensors.torch import load_file

FIRST_CODEBOOK_WEIGHT, PADDING_WEIGHT = 100.0, 0.5


def make_model() -> LMModel:
    model = LMModel(
        delays=[0] + 2 * [0, 1, 1, 1, 1, 1, 1, 1], n_q=16, dep_q=8, card=2048, text_card=32000, dim=512, num_heads=8, num_layers=8,
        hidden_scale=4.125, causal=True, context=256, max_period=10000, gating="silu", norm="rms_norm_f32", positional_embedding="rope",
        depformer_dim=256, depformer_dim_feedforward=1056, depformer_num_heads=8, depformer_num_layers=6, depformer_multi_linear=True,
        depformer_context=8, depformer_gating="silu", depformer_pos_emb="none", depformer_weights_per_step=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    return model.train()


def weighted_loss(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of w * CE over sum of w, in float32, where `mask` holds."""
    weights = weights * mask
    target = torch.where(mask, target, torch.zeros_like(target))
    losses = F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none")
    return (losses.nan_to_num(0.0) * weights.flatten()).sum() / weights.sum()


def losses_of(model: LMModel, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """moshi-finetune's text and audio loss of `codes` [B, 1 + n_q, T]."""
    output = model(codes)
    text, audio = codes[:, :1], codes[:, 1 : 1 + model.dep_q]
    padding = torch.isin(text, torch.tensor((model.text_padding_token_id, model.end_of_text_padding_id)))
    text_weights = torch.where(padding, PADDING_WEIGHT, 1.0)
    audio_weights = torch.ones(1, model.dep_q, 1)
    audio_weights[:, 0] = FIRST_CODEBOOK_WEIGHT
    text_loss = weighted_loss(output.text_logits, text, output.text_mask, text_weights)
    return text_loss, weighted_loss(output.logits, audio, output.mask, audio_weights.expand_as(audio))


def main() -> None:
    folder, repeats = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    model = make_model()
    model.load_state_dict(load_file(f"{folder}/weights.safetensors"))
    codes = load_file(f"{folder}/codes.safetensors")["codes"]
    losses = []

    def step() -> None:
        loss = sum(losses_of(model, codes))
        loss.backward()
        losses.append(float(loss.detach()))
        model.zero_grad(set_to_none=True)

    (taken,) = seconds(step, repeats=repeats)
    print(json.dumps({"seconds": taken, "gigabytes": peak_bytes(step) / 1e9, "loss": losses[-1]}))


if __name__ == "__main__":
    main()
