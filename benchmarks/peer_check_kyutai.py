"""The peer's half of peer_check.py, run in .venv-peer: draws the weights in Kyutai's own modules and writes what Kyutai's package makes of
the inputs. Reads `cases.json` and `<case>.inputs.safetensors` in the folder named on the command line, writes `<case>.peer.safetensors`."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMGen, LMModel
from moshi.models.loaders import get_mimi
from peer_train_step import losses_of
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def drawn(model: torch.nn.Module) -> Tensors:
    """The model's weights under `weight.`; norms, which start at 1, are moved away from it, so that none can be mistaken for another."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith(".alpha"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return {f"weight.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}


def language_model(settings: dict[str, Any], inputs: Tensors, resets: dict[str, list[int]]) -> Tensors:
    """Logits, losses and gradients of a training step, and LMGen's greedy stream in which rows start anew."""
    model = LMModel(**settings).train()
    results = drawn(model)
    output = model(inputs["codes"])
    text_loss, audio_loss = losses_of(model, inputs["codes"])
    (text_loss + audio_loss).backward()
    results |= {"text_logits": output.text_logits[:, 0].detach(), "audio_logits": output.logits.detach(), "audio_mask": output.mask}
    results |= {"text_loss": text_loss.detach(), "audio_loss": audio_loss.detach()}
    results |= {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    generator = LMGen(model.eval(), use_sampling=False, support_out_of_sync=True)
    rows, _, steps = inputs["user"].shape
    said = []
    with generator.streaming(rows):
        for step in range(steps):
            for row in resets.get(str(step), []):  # one by one, so that some fall between the same two frames
                generator.reset_streaming(torch.arange(rows) == row)
            said.append(generator.step(inputs["user"][..., step : step + 1]))
    return results | {"stream": torch.cat(said, dim=-1)}


def codec(settings: dict[str, Any], inputs: Tensors) -> Tensors:
    """Codes of a sound and sound of codes, whole and frame by frame."""
    mimi = get_mimi(None, settings, num_codebooks=settings["quantizer"]["n_q"])
    sound, codes = inputs["sound"], inputs["codes"]
    drawn(mimi)
    with torch.no_grad():
        latent = mimi.encode_to_latent(sound, quantize=False)
        for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
            # Codebooks spread over what they quantize, so that many of their entries are used.
            residual = part.input_proj(latent).transpose(1, 2).flatten(0, 1)  # [B T, D]
            for layer in part.vq.layers:
                chosen = torch.randint(len(residual), (layer._codebook.codebook_size,))
                layer._codebook.embedding_sum.copy_(residual[chosen])
                residual = residual - residual[torch.randperm(len(residual))]
        results = {f"weight.{name}": tensor.clone() for name, tensor in mimi.state_dict().items()}
        results |= {"codes": mimi.encode(sound), "sound": mimi.decode(codes)}
        size = mimi.frame_size
        with mimi.streaming(sound.shape[0]):
            results["streamed_codes"] = torch.cat([mimi.encode(frame) for frame in sound.split(size, dim=-1)], dim=-1)
        with mimi.streaming(codes.shape[0]):
            results["streamed_sound"] = torch.cat([mimi.decode(frame) for frame in codes.split(1, dim=-1)], dim=-1)
    return results


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for case in json.loads((folder / "cases.json").read_text()):
        torch.manual_seed(case["seed"])
        inputs = load_file(folder / f"{case['name']}.inputs.safetensors")
        results = codec(case["mimi"], inputs) if "mimi" in case else language_model(case["lm"], inputs, case["resets"])
        save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"{case['name']}.peer.safetensors")


if __name__ == "__main__":
    main()
