"""One training step, ours beside Kyutai's package moshi 0.2.13 at equal weights, and ours with TTT: time and peak memory, one CPU thread.

Medium configuration: 131M parameters (width 512, 8 layers; depth decoder 256 wide, 6 layers; 16 codebooks), 128 frames, batch 2, activation
checkpointing on; forward, moshi-finetune's loss, backward. Our weights are converted for the peer, so both sides must print one loss.

    python benchmarks/train_step.py --out train_step.json       # `benchmarks/install_peer.sh` installs the peer into .venv-peer
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from measure import peak_bytes, seconds
from medium import medium
from safetensors.torch import save_file

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.conversion.tables import hf_to_kyutai

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-peer" / "bin" / "python"
FRAMES, ROWS = 128, 2


def in_training(ttt_layers: list[int]) -> MoshiTTTForConditionalGeneration:
    """The medium model in training, with TTT-MLP in these layers."""
    model = medium(ttt_layers).train()
    model.activation_checkpointing_enable()
    return model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 32000, (ROWS, FRAMES), generator=generator)
    codes = torch.randint(0, 2048, (ROWS, 16, FRAMES), generator=generator)
    return {
        "input_ids": text,
        "moshi_audio_codes": codes[:, :8],
        "user_audio_codes": codes[:, 8:],
        "text_labels": text,
        "audio_labels": codes[:, :8],
    }


class Step:
    """A whole step as a call without arguments; keeps the loss."""

    def __init__(self, model: MoshiTTTForConditionalGeneration):
        self.model, self.inputs, self.loss = model, batch(), float("nan")

    def __call__(self) -> None:
        loss = self.model(**self.inputs).loss
        loss.backward()
        self.loss = float(loss.detach())
        self.model.zero_grad(set_to_none=True)


def peer_row(model: MoshiTTTForConditionalGeneration, repeats: int) -> dict[str, float]:
    """The same step in the peer's own environment, on our weights and frames."""
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: tensor.contiguous().clone() for name, tensor in hf_to_kyutai(model.state_dict(), model.config).items()}
        save_file(weights, f"{folder}/weights.safetensors")
        inputs = batch()
        codes = torch.cat([inputs["input_ids"][:, None], inputs["moshi_audio_codes"], inputs["user_audio_codes"]], dim=1)
        save_file({"codes": codes}, f"{folder}/codes.safetensors")
        command = [str(PEER), str(HERE / "peer_train_step.py"), folder, str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, env={"NO_TORCH_COMPILE": "1", "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"the peer did not run in {PEER}: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="timed repetitions, of which the median counts")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = {"ours, no TTT": Step(in_training([])), "ours, TTT-MLP in 3 of 8 layers": Step(in_training([3, 4, 5]))}
    times = seconds(*steps.values(), repeats=options.repeats)
    rows = {
        name: {"seconds": taken, "gigabytes": peak_bytes(step) / 1e9, "loss": step.loss}
        for (name, step), taken in zip(steps.items(), times)
    }
    if PEER.exists():
        rows["Kyutai's moshi 0.2.13"] = peer_row(steps["ours, no TTT"].model, options.repeats)
    else:
        print(f"{PEER} is not installed: the peer was not measured (benchmarks/install_peer.sh installs it)")
    print(f"{'':32}{'s a step':>10}{'GB over the model':>20}{'loss':>10}")
    for name, row in rows.items():
        print(f"{name:32}{row['seconds']:10.2f}{row['gigabytes']:20.3f}{row['loss']:10.4f}")
    ours, with_ttt, peer = (list(rows.values()) + [None])[:3]
    ratios = {"TTT / without": with_ttt["seconds"] / ours["seconds"]}
    if peer is not None:
        ratios |= {f"ours / peer, {key}": ours[key] / peer[key] for key in ("seconds", "gigabytes")}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()
