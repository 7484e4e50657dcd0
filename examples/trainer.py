"""The plain case with transformers' own Trainer: python examples/trainer.py [--steps 20] [--output runs/trainer]

Each dialogue is one example; the processor makes frames and labels, the model computes its loss. Memory carried over windows, losses
divided over unequal ranks, and exact resume with lanes are what `moshi-ttt train` is for.
"""

import argparse
import sys

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration, MoshiTTTProcessor
from modeling_moshi_ttt.cli import without_trace
from modeling_moshi_ttt.common.hub import check_place
from modeling_moshi_ttt.data.audio import read_audio
from modeling_moshi_ttt.data.recordings import read_manifest


def load_examples(manifest: str, processor: MoshiTTTProcessor) -> list[dict[str, torch.Tensor]]:
    """One dict of frames a recording."""
    examples = []
    for recording in read_manifest(manifest):
        samples = torch.from_numpy(read_audio(recording.path, processor.sampling_rate))
        frames = processor(samples, sampling_rate=processor.sampling_rate, words=recording.words)
        examples.append(dict(frames))
    return examples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configuration/model/tiny.json")
    parser.add_argument("--processor", default="configuration/model/tiny")
    parser.add_argument("--manifest", default="examples/data/dialogues/train.jsonl")
    parser.add_argument("--output", default="runs/trainer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    options = parser.parse_args()

    check_place(options.processor, "--processor")
    torch.manual_seed(0)
    processor = MoshiTTTProcessor.from_pretrained(options.processor)
    model = MoshiTTTForConditionalGeneration(MoshiTTTConfig.from_json_file(options.config))
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=3e-3,
        warmup_steps=max(options.steps // 10, 1),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    collator = DataCollatorWithPadding(processor)  # recordings of unequal lengths; what is not there is masked and not trained
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=load_examples(options.manifest, processor))
    trainer.train()
    trainer.save_model(options.output)
    processor.save_pretrained(options.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the model is in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(without_trace(main))
