"""Trains the embedded tiny codec: Mimi's architecture, a hundredth of its size, on synthesised speech, on a CPU, in about an hour.

    python examples/train_tiny_codec.py --minutes 60 --out configuration/model/tiny

No download and no GAN: several mel and STFT resolutions, straight-through codes, codebooks by k-means after a first stretch without
them, then by moving averages, and at last the decoder alone on codes that no longer change. A stopped run goes on from --work.
"""

import argparse
import datetime
import json
import math
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from codec_losses import SAMPLE_RATE, SpectralLoss, mel_distance, stoi
from synthetic_speech import HELD_OUT, VOICES, Espeak, speech
from tiny_tokenizer import train_tokenizer
from torch import Tensor
from transformers import EncodecFeatureExtractor, MimiConfig, MimiModel

from modeling_moshi_ttt import MoshiTTTError
from modeling_moshi_ttt.cli import without_trace
from modeling_moshi_ttt.common.files import atomic_write, make_folder
from modeling_moshi_ttt.data.audio import read_audio
from modeling_moshi_ttt.processing_moshi_ttt import MoshiTTTProcessor

RUN_FILE = "run.safetensors"
DIALOGUES = Path(__file__).parent / "data" / "dialogues"
WEIGHTS = {"mel": 1.0, "stft": 2.0, "envelope": 2.0, "wave": 0.5, "commit": 0.25}


@dataclass
class Plan:
    """What the run does when; the three bounds are shares of the whole."""

    minutes: float = 60.0
    steps: int = 1_000_000
    batch: int = 5
    seconds: float = 1.28  # 16 frames, what the transformers see of the past
    speech_seconds: float = 2400.0
    peak_lr: float = 1e-3
    quantised_from: float = 0.12
    encoder_until: float = 0.55
    batches_to_fit: int = 100
    seed: int = 0


def codec_config() -> MimiConfig:
    """24 kHz, 12.5 Hz, 8 codebooks of 128 entries; causal throughout."""
    return MimiConfig(
        num_filters=16, upsampling_ratios=[4, 4, 5, 12], num_residual_layers=0, hidden_size=128, num_hidden_layers=2, intermediate_size=384,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, sliding_window=32, layer_scale_initial_scale=0.3, upsample_groups=128,
        num_quantizers=8, codebook_size=128, codebook_dim=32, vector_quantization_hidden_dimension=32, kernel_size=7, last_kernel_size=3,
    )  # fmt: skip


class Codebooks:
    """Trains the codebooks that a MimiModel only reads: straight-through pass, moving averages, k-means, gentle restarts."""

    def __init__(self, codec: MimiModel, generator: torch.Generator, decay: float = 0.994) -> None:
        quantizer = codec.quantizer
        self.groups = [quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer]
        self.generator, self.decay = generator, decay

    def through(self, latents: Tensor, learn: bool, dropout: float) -> tuple[Tensor, Tensor]:
        """[B, E, T] -> (straight-through latents [B, E, T], commitment loss); `dropout`: share of rows that lose their last codebooks."""
        total, commit = torch.zeros_like(latents), latents.new_zeros(())
        B = latents.shape[0]
        kept = torch.randint(0, len(self.groups[1].layers), (B,), generator=self.generator)
        kept[torch.rand(B, generator=self.generator) >= dropout] = len(self.groups[1].layers)
        for group in self.groups:
            z = group.input_proj(latents).transpose(1, 2)  # [B, T, D]
            residual, quantised = z, torch.zeros_like(z)
            for i, layer in enumerate(group.layers):
                flat = residual.detach().reshape(-1, z.shape[-1])
                found = layer.codebook.quantize(flat)
                chosen = layer.codebook.embed[found].view_as(z)
                if learn:
                    self.average(layer.codebook, flat, found)
                use = torch.ones(B, 1, 1) if group is self.groups[0] else (kept > i).float()[:, None, None]
                commit = commit + (use * (residual - chosen) ** 2).mean() / 8
                quantised = quantised + use * chosen
                residual = residual - chosen
            total = total + group.output_proj((z + (quantised - z).detach()).transpose(1, 2))
        return total, commit

    def average(self, codebook, vectors: Tensor, found: Tensor) -> None:
        """Moves every entry towards the mean of the vectors it took; an entry hardly used any more starts again at one of them."""
        size = codebook.codebook_size
        count = torch.bincount(found, minlength=size).float()
        sums = torch.zeros_like(codebook.embed_sum).index_add_(0, found, vectors)
        codebook.cluster_usage.mul_(self.decay).add_(count, alpha=1 - self.decay)
        codebook.embed_sum.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        fair = codebook.cluster_usage.mean()
        dead = (codebook.cluster_usage < 0.05 * fair).nonzero()[:2, 0]  # two at a time: the others must be able to settle
        if len(dead):
            pick = torch.randint(0, len(vectors), (len(dead),), generator=self.generator)
            codebook.cluster_usage[dead] = 0.5 * fair
            codebook.embed_sum[dead] = vectors[pick] * 0.5 * fair
        codebook._embed = None

    @torch.no_grad()
    def fit(self, latents: Tensor, rounds: int = 25) -> None:
        """k-means of every codebook in turn on latents [N, E]."""
        for group in self.groups:
            residual = group.input_proj(latents.T[None])[0].T  # [N, D]
            for layer in group.layers:
                book, size = layer.codebook, layer.codebook.codebook_size
                centres = residual[torch.randperm(len(residual), generator=self.generator)[:size]]
                for _ in range(rounds):
                    found = torch.cdist(residual, centres).argmin(1)
                    count = torch.bincount(found, minlength=size).float()
                    sums = torch.zeros_like(centres).index_add_(0, found, residual)
                    fresh = residual[torch.randint(0, len(residual), (size,), generator=self.generator)]
                    centres = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], fresh)
                usage = count.clamp(min=0.2) / len(residual) * 200
                book.cluster_usage.copy_(usage)
                book.embed_sum.copy_(centres * usage[:, None])
                book._embed = None
                residual = residual - book.embed[book.quantize(residual)]


class Corpus:
    """Crops of speech: the train dialogues and synthesised voices, held-out voices and the eval dialogues apart."""

    def __init__(self, plan: Plan) -> None:
        espeak = Espeak()
        self.plan, self.rng = plan, np.random.default_rng(plan.seed)
        self.voices = speech(espeak, VOICES, plan.speech_seconds, random.Random(plan.seed))
        self.dialogues = np.concatenate(dialogue_channels("train"))
        held_out = speech(espeak, HELD_OUT, min(60.0, plan.speech_seconds), random.Random(plan.seed + 1))
        self.held_out = [torch.from_numpy(held_out[i : i + 92_160]) for i in range(0, len(held_out) - 92_159, 92_160)]  # 3.84 s each
        self.held_out_dialogues = [torch.from_numpy(channel) for channel in dialogue_channels("eval")]

    def batch(self) -> Tensor:
        """[B, 1, n]; one crop in six is from the dialogues, levels vary by 12 dB."""
        n = int(self.plan.seconds * SAMPLE_RATE)
        crops = []
        for _ in range(self.plan.batch):
            source = self.dialogues if self.rng.random() < 1 / 6 else self.voices
            start = int(self.rng.integers(0, len(source) - n))
            crops.append(source[start : start + n] * 10 ** self.rng.uniform(-0.4, 0.2))
        return torch.from_numpy(np.stack(crops).astype(np.float32))[:, None]


def dialogue_channels(part: str) -> list[np.ndarray]:
    """Both channels of every dialogue of examples/data/dialogues/{part}.jsonl, cut to whole frames."""
    channels: list[np.ndarray] = []
    for line in (DIALOGUES / f"{part}.jsonl").read_text().splitlines():
        samples = read_audio(DIALOGUES / json.loads(line)["path"], SAMPLE_RATE)
        channels += [channel[: len(channel) // 1920 * 1920] for channel in samples]
    return channels


@torch.no_grad()
def measure(codec: MimiModel, clips: list[Tensor]) -> dict:
    """STOI, mel distance and the share of each codebook in use over clips [n]."""
    scores, distances, codes = [], [], []
    for clip in clips:
        found = codec.encode(clip[None, None]).audio_codes  # [1, K, T]
        output = codec.decode(found).audio_values[0, 0, : len(clip)]
        scores.append(stoi(clip, output))
        distances.append(mel_distance(clip, output))
        codes.append(found[0])
    used = [len(row.unique()) / codec.config.codebook_size for row in torch.cat(codes, 1)]
    return {"stoi": float(np.mean(scores)), "mel_distance": float(np.mean(distances)), "codebook_usage": used, "clips": len(clips)}


class Run:
    """The training run and everything a restart needs."""

    def __init__(self, plan: Plan, work: Path) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.work = plan, work
        self.codec = MimiModel(codec_config())
        self.codebooks = Codebooks(self.codec, torch.Generator().manual_seed(plan.seed))
        self.loss = SpectralLoss()
        self.optimizer = torch.optim.AdamW(self.codec.parameters(), lr=plan.peak_lr, betas=(0.8, 0.99), weight_decay=0.01)
        self.step, self.spent, self.stage = 0, 0.0, 0  # stage 0: no codes, 1: codes learn, 2: codes and encoder stand
        if (work / RUN_FILE).exists():
            self.resume()

    def progress(self) -> float:
        return min(1.0, max(self.step / self.plan.steps, self.spent / (60 * self.plan.minutes)))

    def rate(self) -> float:
        return self.plan.peak_lr * min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * self.progress())))

    def advance(self, corpus: Corpus) -> None:
        """Changes the stage when its time has come; codes begin with a k-means fit."""
        bounds = (self.plan.quantised_from, self.plan.encoder_until)
        if self.stage < 2 and self.progress() >= bounds[self.stage]:
            self.stage += 1
            if self.stage == 1:
                with torch.no_grad():
                    latents = [self.codec.encoder(corpus.batch()).latents for _ in range(self.plan.batches_to_fit)]
                self.codebooks.fit(torch.cat([x.transpose(1, 2).flatten(0, 1) for x in latents]))
            print(f"stage {self.stage} from step {self.step}", flush=True)

    def train_step(self, wave: Tensor) -> dict[str, float]:
        frozen = self.stage == 2
        with torch.set_grad_enabled(not frozen):
            latents = self.codec.encoder(wave).latents
        commit = latents.new_zeros(())
        if self.stage:
            latents, commit = self.codebooks.through(latents, learn=not frozen, dropout=0.0 if frozen else 0.1)
        output = self.codec.decoder(latents).audio_values
        parts = {**self.loss(output[:, 0], wave[:, 0]), "commit": commit}
        loss = sum(WEIGHTS[name] * value for name, value in parts.items())
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        self.step += 1
        return {name: float(value.detach()) for name, value in parts.items()}

    def save(self) -> None:
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"codec.{name}": tensor.clone() for name, tensor in self.codec.state_dict().items()}
        tensors |= {f"optimizer.{i}.{name}": tensor.clone() for i, kept in moments.items() for name, tensor in kept.items()}
        progress = {"step": self.step, "spent": self.spent, "stage": self.stage}
        atomic_write(self.work / RUN_FILE, safetensors.torch.save(tensors, {"progress": json.dumps(progress)}))

    def resume(self) -> None:
        codec: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        with safetensors.safe_open(self.work / RUN_FILE, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            for key in file.keys():  # noqa: SIM118 - it is no dict
                part, name = key.split(".", 1)
                if part == "codec":
                    codec[name] = file.get_tensor(key)
                else:
                    index, moment = name.split(".")
                    moments.setdefault(int(index), {})[moment] = file.get_tensor(key)
        self.codec.load_state_dict(codec)
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.spent, self.stage = progress["step"], progress["spent"], progress["stage"]
        for group in self.codebooks.groups:
            for layer in group.layers:
                layer.codebook._embed = None


def train(run: Run, corpus: Corpus) -> None:
    """Trains to the end of the plan, printing every 50 steps, measuring and saving every few minutes."""
    last_saved = last = time.monotonic()
    sums: dict[str, float] = {}
    while run.progress() < 1:
        run.advance(corpus)
        for name, value in run.train_step(corpus.batch()).items():
            sums[name] = sums.get(name, 0.0) + value / 50
        now = time.monotonic()
        run.spent, last = run.spent + now - last, now
        if run.step % 50 == 0:
            print(f"{run.step:6d} {run.spent / 60:5.1f} min  " + "  ".join(f"{k} {v:.4f}" for k, v in sums.items()), flush=True)
            sums = {}
        if now - last_saved > 240:
            run.save()
            found = measure(run.codec, corpus.held_out[:5]) if run.stage else {}
            print(json.dumps({k: np.round(v, 3).tolist() for k, v in found.items()}), flush=True)
            last_saved = time.monotonic()


def finish(run: Run, corpus: Corpus, out: Path) -> None:
    """Writes the processor (codec, tokenizer, feature extractor) and the measured quality into `out`, file by file."""
    quality = {
        "date": datetime.date.today().isoformat(),
        "command": f"python examples/train_tiny_codec.py --minutes {run.plan.minutes:g} --steps {run.plan.steps}",
        "plan": asdict(run.plan),
        "loss_weights": WEIGHTS,
        "steps": run.step,
        "minutes": round(run.spent / 60, 1),
        "parameters": sum(parameter.numel() for parameter in run.codec.parameters()),
        "held_out_voices": {"voices": list(HELD_OUT), **measure(run.codec, corpus.held_out)},
        "held_out_dialogues": measure(run.codec, corpus.held_out_dialogues),
    }
    processor = MoshiTTTProcessor(EncodecFeatureExtractor(), train_tokenizer(), run.codec)
    processor._auto_class = None  # the folder stays within this repository: it needs no copy of the code
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        processor.save_pretrained(folder)
        (Path(folder) / "codec_quality.json").write_text(json.dumps(quality, indent=2) + "\n")
        for file in (path for path in Path(folder).rglob("*") if path.is_file()):  # one by one, for `out` may hold more, as a README
            target = out / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            file.chmod(0o644)
            file.replace(target)
    print(json.dumps({name: quality[name] for name in ("held_out_voices", "held_out_dialogues")}, indent=2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_codec/processor"), help="folder for the processor")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_codec"), help="folder for what a restart needs")
    parser.add_argument("--minutes", type=float, default=Plan.minutes, help="the schedule's length by the clock")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="the schedule's length in steps, if that is shorter")
    parser.add_argument("--speech-seconds", type=float, default=Plan.speech_seconds, help="how much speech to synthesise")
    args = parser.parse_args()
    if min(args.minutes, args.steps) <= 0:
        raise MoshiTTTError(f"--minutes is {args.minutes:g} and --steps {args.steps}; both must be above 0")
    make_folder(args.work, "--work")
    torch.set_num_threads(1)
    plan = Plan(minutes=args.minutes, steps=args.steps, speech_seconds=args.speech_seconds)
    run, corpus = Run(plan, args.work), Corpus(plan)
    train(run, corpus)
    run.save()
    finish(run, corpus, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(without_trace(main))
