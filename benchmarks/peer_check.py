"""The model and the codec beside Kyutai's own package moshi 0.2.13, on configurations that the golden numbers of the tests lack.

For every case the peer, in its own environment (.venv-peer, made by benchmarks/install_peer.sh), draws random weights in Kyutai's modules
and computes; this half converts the weights, computes the same, and compares: logits, losses, every gradient, a greedy stream in which
rows start anew, and Mimi both ways. Prints both sides; the exit code is 1 where a number lies outside its bound. Twenty seconds, one
thread.

    python benchmarks/peer_check.py --table benchmarks/PEER.md
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MimiModel

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.conversion.mimi import mimi_config, stream_mimi_to_here, stream_mimi_to_kyutai
from modeling_moshi_ttt.conversion.tables import config_from_kyutai, hf_to_kyutai, kyutai_to_hf
from modeling_moshi_ttt.delay_pattern import undelay
from modeling_moshi_ttt.mimi_stream import MimiStream

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-peer" / "bin" / "python"
ROWS, FRAMES, STEPS = 3, 40, 60
# In the stream two rows start anew between the same two frames, later one of them alone, in the middle of its delay, once more.
RESETS = {13: [1], 30: [0, 2], 32: [2]}
BOUNDS = {"logits": 1e-5, "loss": 1e-6, "gradient": 1e-5, "sound": 1e-5}

Tensors = dict[str, Tensor]

LM = {
    "dim": 64, "text_card": 70, "existing_text_padding_id": 3, "n_q": 8, "dep_q": 4, "card": 32, "num_heads": 4, "num_layers": 2,
    "hidden_scale": 4.125, "causal": True, "layer_scale": None, "context": 64, "max_period": 10000, "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope", "depformer_dim": 32, "depformer_dim_feedforward": 132, "depformer_num_heads": 4,
    "depformer_num_layers": 2, "depformer_layer_scale": None, "depformer_multi_linear": True, "depformer_context": 4,
    "depformer_max_period": 10000, "depformer_gating": "silu", "depformer_pos_emb": "none", "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1],
}  # fmt: skip
WHOLE_7B = {"n_q": 16, "dep_q": 8, "depformer_context": 8, "delays": [0] + 2 * [0, 1, 1, 1, 1, 1, 1, 1]}
# What each case changes in LM.
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "4-own-4-user": {},
    "4-own-no-user": {"n_q": 4, "delays": [0, 0, 1, 1, 1]},
    "8-own-8-user": WHOLE_7B,
    "16-own-16-user": {"n_q": 32, "dep_q": 16, "depformer_context": 16, "delays": [0] + 2 * ([0] + 15 * [1])},
    "2-own-3-user": {"n_q": 5, "dep_q": 2, "delays": [0, 2, 0, 5, 1, 3]},
    "delays-to-5": {"context": 6, "delays": [0, 0, 2, 3, 5, 1, 4, 0, 2]},
    "window-4": {**WHOLE_7B, "context": 4, "num_layers": 3, "num_heads": 2, "max_period": 100,
                 "delays": [0] + 2 * [1, 3, 3, 3, 3, 3, 3, 3]},
    "other-sizes": {
        "norm": "rms_norm", "hidden_scale": 4, "depformer_dim_feedforward": 128, "depformer_num_layers": 1, "context": 16,
        "existing_text_padding_id": 7, "existing_text_end_padding_id": 5, "delays": [0, 0, 2, 2, 2, 0, 2, 2, 2],
    },
}  # fmt: skip
MIMI = {
    "sample_rate": 24000, "channels": 1, "frame_rate": 12.5,
    "seanet": {
        "channels": 1, "dimension": 32, "causal": True, "n_filters": 4, "n_residual_layers": 1, "activation": "ELU", "compress": 2,
        "dilation_base": 2, "kernel_size": 7, "residual_kernel_size": 3, "last_kernel_size": 3, "norm": "none", "pad_mode": "constant",
        "ratios": [8, 6, 5, 4], "true_skip": True,
    },
    "quantizer": {"dimension": 16, "n_q": 8, "bins": 64, "input_dimension": 32, "output_dimension": 32},
    "transformer": {
        "d_model": 32, "num_heads": 4, "num_layers": 2, "causal": True, "layer_scale": 0.3, "context": 250, "conv_layout": True,
        "max_period": 10000, "gating": "none", "norm": "layer_norm", "positional_embedding": "rope", "dim_feedforward": 64,
        "input_dimension": 32, "output_dimensions": [32],
    },
}  # fmt: skip
# Steps that the codec's transformers see, 25 a second: the whole sound of 40 frames, or a quarter of it.
CODECS = {"mimi": 250, "mimi-window-20": 20}


@dataclass(frozen=True)
class Row:
    """One compared number: what it is, both sides, their distance and its bound, as `equal of all` where they must be equal."""

    case: str
    what: str
    ours: str
    peer: str
    distance: str
    right: bool | None  # None where it is shown only


def near(case: str, what: str, ours: Tensor, peer: Tensor, bound: float) -> Row:
    """Two losses by their difference; two larger tensors by the largest difference over the peer's largest number."""
    distance = float((ours - peer).abs().max() / (1.0 if peer.dim() == 0 else peer.abs().max()))
    shown = (f"{float(x):.7f}" if x.dim() == 0 else f"largest {float(x.abs().max()):.4f}" for x in (ours, peer))
    return Row(case, what, *shown, f"{distance:.1e} (bound {bound:.0e})", distance <= bound)


def equal(case: str, what: str, ours: Tensor, peer: Tensor) -> Row:
    """Two tensors of tokens, which must be equal everywhere."""
    same = int((ours == peer).sum()) if ours.shape == peer.shape else 0
    shown = (f"{len(x.unique())} ids in {x.numel()}" for x in (ours, peer))
    return Row(case, what, *shown, f"{same} of {peer.numel()} equal", same == peer.numel() > 0)


def converted(case: str, back: Tensors, weights: Tensors) -> Row:
    """Weights that were converted and back, which must be the same to the bit."""
    same = sum(name in back and torch.equal(back[name], tensor) for name, tensor in weights.items())
    right = same == len(weights) == len(back)
    return Row(case, "weights, converted and back", f"{len(back)} tensors", f"{len(weights)} tensors", f"{same} equal", right)


def gradients(case: str, ours: Tensors, peer: Tensors) -> Row:
    """The parameter whose gradient is farthest from the peer's, by the norm of the difference over the norm."""
    far = {name: float((ours[name].view_as(grad) - grad).norm() / grad.norm().clamp(min=1e-30)) for name, grad in peer.items()}
    worst = max(far, key=far.__getitem__)
    shown = (f"norm {float(x[worst].norm()):.4f}" for x in (ours, peer))
    what = f"gradients of {len(far)} tensors, worst {worst}"
    return Row(case, what, *shown, f"{far[worst]:.1e} (bound {BOUNDS['gradient']:.0e})", far[worst] <= BOUNDS["gradient"])


def part(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose name begins with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def cases(names: list[str]) -> list[dict[str, Any]]:
    """What is to be run, as the peer reads it."""
    found: list[dict[str, Any]] = [
        {"name": name, "seed": seed, "lm": LM | changes, "resets": RESETS} for seed, (name, changes) in enumerate(LANGUAGE_MODELS.items())
    ]
    for name, context in CODECS.items():
        found.append({"name": name, "seed": 100, "mimi": MIMI | {"transformer": MIMI["transformer"] | {"context": context}}})  # type: ignore[operator]
    return [case for case in found if not names or case["name"] in names]


def inputs(case: dict[str, Any]) -> Tensors:
    """Random frames of every stream, one in ten absent (-1), the last row without text and ending early; the user's codes of a stream; or a
    sound and codes."""
    generator = torch.Generator().manual_seed(case["seed"])
    if "mimi" in case:
        quantizer = case["mimi"]["quantizer"]
        pitch, loudness, noise = (torch.rand(ROWS, 1, FRAMES, generator=generator).repeat_interleave(1920, dim=-1) for _ in range(3))
        tone = torch.sin((pitch**2).cumsum(dim=-1))  # up to 3.8 kHz, another every 80 ms
        sound = loudness * tone + 0.3 * noise * torch.randn(tone.shape, generator=generator)
        return {"sound": sound, "codes": torch.randint(0, quantizer["bins"], (ROWS, quantizer["n_q"], FRAMES), generator=generator)}
    settings = case["lm"]
    card = torch.tensor([settings["text_card"]] + settings["n_q"] * [settings["card"]])[:, None]
    codes = (torch.rand(ROWS, 1 + settings["n_q"], FRAMES, generator=generator) * card).long()
    codes.masked_fill_(torch.rand(codes.shape, generator=generator) < 0.1, -1)
    codes[-1, 0], codes[-1, :, -5:] = -1, -1
    codes[0, 0, ::3] = settings["existing_text_padding_id"]  # which weighs half in the loss
    user = torch.randint(0, settings["card"], (ROWS, settings["n_q"] - settings["dep_q"], STEPS), generator=generator)
    return {"codes": codes, "user": user}


def here(weights: Tensors, config: MoshiTTTConfig) -> MoshiTTTForConditionalGeneration:
    """Our model with the peer's weights."""
    model = MoshiTTTForConditionalGeneration(config)
    model.load_state_dict(kyutai_to_hf(weights, config))
    return model


def language_model(case: dict[str, Any], given: Tensors, weights: Tensors) -> Tensors:
    """What the peer's half computes, by this package, under the peer's names."""
    config = config_from_kyutai(case["lm"])
    model, own = here(weights, config).train(), 1 + config.num_codebooks
    text, moshi, user = given["codes"][:, 0], given["codes"][:, 1:own], given["codes"][:, own:]
    output = model(text, moshi, user, text_labels=text, audio_labels=moshi)
    output.loss.backward()
    kyutai = hf_to_kyutai({name: parameter.grad for name, parameter in model.named_parameters()}, config)
    stream = model.eval().new_stream(batch_size=ROWS, do_sample=False)
    said = []
    for step in range(STEPS):
        for row in case["resets"].get(step, []):
            stream.reset([row])
        frame = stream.step(given["user"][..., step])
        said.append(torch.cat([frame.text[:, None], frame.audio_codes], dim=1))
    return {
        "text_logits": output.logits.detach(),
        "audio_logits": undelay(output.audio_logits.detach(), config.delays[1:own], fill=float("nan")),
        "text_loss": output.text_loss.detach(),
        "audio_loss": output.audio_loss.detach(),
        "stream": torch.stack(said, dim=-1),
        **{f"grad.{name}": grad for name, grad in kyutai.items()},
    }


def compare_language_models(case: dict[str, Any], weights: Tensors, ours: Tensors, peer: Tensors) -> list[Row]:
    config, name = config_from_kyutai(case["lm"]), case["name"]
    mask = peer["audio_mask"]
    return [
        converted(name, hf_to_kyutai(kyutai_to_hf(weights, config), config), weights),
        near(name, "text logits", ours["text_logits"], peer["text_logits"], BOUNDS["logits"]),
        near(name, "audio logits", ours["audio_logits"][mask], peer["audio_logits"][mask], BOUNDS["logits"]),
        *(near(name, what.replace("_", " "), ours[what], peer[what], BOUNDS["loss"]) for what in ("text_loss", "audio_loss")),
        gradients(name, part(ours, "grad"), part(peer, "grad")),
        equal(name, "greedy stream, four resets", ours["stream"], peer["stream"]),
    ]


def codec(case: dict[str, Any], given: Tensors, weights: Tensors) -> Tensors:
    """Mimi both ways: whole with transformers' MimiModel, frame by frame with MimiStream."""
    config = mimi_config(case["mimi"])
    state = dict(stream_mimi_to_here(weights, weights.__getitem__, config))
    model = MimiModel.from_pretrained(None, config=config, state_dict=state)
    stream, sound = MimiStream(model, ROWS), given["sound"]
    with torch.no_grad():
        return {
            "codes": model.encode(sound, num_quantizers=config.num_quantizers).audio_codes,
            "sound": model.decode(given["codes"]).audio_values,
            "streamed_codes": torch.stack([stream.encode(frame) for frame in sound[:, 0].split(stream.frame_size, dim=-1)], dim=-1),
            "streamed_sound": torch.cat([stream.decode(frame) for frame in given["codes"].unbind(-1)], dim=-1)[:, None],
            **{f"weight.{name}": tensor for name, tensor in stream_mimi_to_kyutai(state, state.__getitem__, config)},
        }


def compare_codecs(case: dict[str, Any], weights: Tensors, ours: Tensors, peer: Tensors) -> list[Row]:
    """Against the peer's results of a whole file. Its own stream is another function once a sound is longer than the window; how far it
    is from its whole is shown and not judged."""
    name, its_codes, its_sound = case["name"], peer["streamed_codes"], peer["streamed_sound"]
    strayed = float((its_sound - peer["sound"]).abs().max() / peer["sound"].abs().max())
    same = f"{int((its_codes == peer['codes']).sum())} of {its_codes.numel()} codes equal, sound {strayed:.1e}"
    return [
        converted(name, part(ours, "weight"), weights),
        equal(name, "codes of a whole sound", ours["codes"], peer["codes"]),
        equal(name, "codes, our stream beside its whole", ours["streamed_codes"], peer["codes"]),
        near(name, "sound of whole codes", ours["sound"], peer["sound"], BOUNDS["sound"]),
        near(name, "sound, our stream beside its whole", ours["streamed_sound"], peer["sound"], BOUNDS["sound"]),
        Row(name, "its own stream beside its whole (not judged)", "", "", same, None),
    ]


def run_peer(folder: Path) -> None:
    """The peer's half over the cases in this folder."""
    if not PEER.exists():
        raise SystemExit(f"{PEER} does not exist: run `make peer` (benchmarks/install_peer.sh) first")
    environment = {"NO_TORCH_COMPILE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([PEER, HERE / "peer_check_kyutai.py", folder], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"the peer did not run in {PEER}:\n{done.stderr[-2000:]}")


def check(chosen: list[dict[str, Any]], folder: Path) -> list[Row]:
    """Both halves over these cases, exchanging files in this folder."""
    for case in chosen:
        save_file({name: tensor.contiguous() for name, tensor in inputs(case).items()}, folder / f"{case['name']}.inputs.safetensors")
    (folder / "cases.json").write_text(json.dumps(chosen))
    run_peer(folder)
    rows = []
    for case in chosen:
        given, peer = (load_file(folder / f"{case['name']}.{side}.safetensors") for side in ("inputs", "peer"))
        compute, compare = (codec, compare_codecs) if "mimi" in case else (language_model, compare_language_models)
        weights = part(peer, "weight")
        rows += compare(case, weights, compute(case, given, weights), peer)
    return rows


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| case | what | ours | Kyutai's | distance |", "|---|---|---|---|---|"]
    lines += [f"| {r.case} | {r.what} | {r.ours} | {r.peer} | {r.distance}{', **missed**' if r.right is False else ''} |" for r in rows]
    return "\n".join(lines)


def page(rows: list[Row], said: str) -> str:
    """The table with what it was made of, as PEER.md holds it."""
    described = [
        f"- `{name}`: {lm['n_q']} codebooks, the first {lm['dep_q']} of them Moshi's, delays {lm['delays'][1:]}, context {lm['context']}"
        for name, lm in ((name, LM | changes) for name, changes in LANGUAGE_MODELS.items())
    ]
    described += [
        f"- `{name}`: Mimi with 8 codebooks, its transformers' window {context} steps of 40 ms" for name, context in CODECS.items()
    ]
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, moshi 0.2.13"
    lines = "\n".join(described)
    return f"""# Beside Kyutai's package

Made by `make peer-check` on {datetime.date.today()} with {versions}, float32 on a CPU: {said}.

Logits and sounds: largest difference over the largest number. Losses: difference. Gradients: norm of the difference over the norm, of the
parameter where it is largest. Streams and codes: tokens that are equal. {ROWS} rows; training steps of {FRAMES} frames, a tenth of tokens
absent; streams of {STEPS} frames, in which rows start anew before frames {", ".join(map(str, RESETS))}, two of them before the same one.

LMGen hears nothing in its first call, and neither does `new_stream`. Kyutai's Mimi, streamed, gives other codes and sound than for the
whole file once that is longer than its window; `MimiStream` gives the whole file's, so the whole file's are what it is held to.

{lines}

{table(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*LANGUAGE_MODELS, *CODECS]
    parser.add_argument("--case", action="append", default=[], choices=known, help="run this one only; may be given more than once")
    parser.add_argument("--table", type=Path, help="write the table here, as a page in Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        rows = check(cases(options.case), Path(folder))
    judged = [row.right for row in rows if row.right is not None]
    said = f"{sum(judged)} of {len(judged)} numbers agree"
    print(table(rows), said, sep="\n\n")
    if options.table:
        options.table.write_text(page(rows, said))
    return 0 if all(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
