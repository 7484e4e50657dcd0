"""What users of transformers and PEFT take for granted: outputs, Trainer, base models, LoRA's usual settings."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hub_checkpoints import small_processor
from peft import LoraConfig, get_peft_model
from tiny import random_frames, rows_of, tiny_config, tiny_model, with_labels
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from modeling_moshi_ttt.depth_decoder import MoshiTTTDepthDecoder
from modeling_moshi_ttt.modeling_moshi_ttt import MoshiTTTForCausalLM, MoshiTTTForConditionalGeneration, MoshiTTTModel

TEMPORAL = r"decoder\..*\.self_attn\.(q|v)_proj\.linear"


@pytest.fixture
def model():
    return tiny_model(torch.float32)


@pytest.fixture
def collate():
    """Transformers' own collator around a processor, whose codec it does not need."""
    return DataCollatorWithPadding(small_processor())


def recordings(config, lengths, without=()):
    """One recording of each length as a processor gives it, without its dimension of rows."""
    rows = [with_labels(random_frames(config, 1, frames, seed=frames)) for frames in lengths]
    return [{name: tensor[0].tolist() for name, tensor in row.items() if name not in without} for row in rows]


def arguments(folder, **changes):
    fixed = {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "report_to": [], "use_cpu": True}
    return TrainingArguments(folder, **fixed | changes)


# Outputs


def test_attention_weights_are_given_whatever_the_implementation(model):
    frames = random_frames(model.config, 2, 11)
    plain = model(**frames, use_cache=False)
    asked = model(**frames, use_cache=False, output_attentions=True)
    assert model.config._attn_implementation == "sdpa"
    assert [tuple(weights.shape) for weights in asked.attentions] == [(2, 2, 11, 11)] * 2
    torch.testing.assert_close(asked.logits, plain.logits, atol=1e-4, rtol=1e-4)
    for weights in asked.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 11))
        assert not weights[..., 9, :2].any()  # out of the window of 8 frames
    model.config._output_attentions = True
    assert model(**frames, use_cache=False).attentions is not None


def test_attention_weights_stand_where_the_callers_frames_stood(model):
    """Padding on the left moves frames inside the model; queries and keys of the weights are moved back."""
    frames = random_frames(model.config, 1, 6)
    alone = model(**frames, use_cache=False, output_attentions=True).attentions
    padded = {name: torch.nn.functional.pad(tensor, (3, 0), value=-1) for name, tensor in frames.items()}
    mask = torch.tensor([[0] * 3 + [1] * 6])
    for whole, part in zip(model(**padded, attention_mask=mask, use_cache=False, output_attentions=True).attentions, alone, strict=True):
        torch.testing.assert_close(whole[..., 3:, 3:], part, atol=1e-5, rtol=1e-5)


def test_the_last_hidden_states_are_those_the_heads_see(model):
    output = model(**random_frames(model.config, 1, 5), output_hidden_states=True)
    assert len(output.hidden_states) == 1 + model.config.num_hidden_layers
    torch.testing.assert_close(output.hidden_states[-1], output.last_hidden_state, atol=0, rtol=0)


def test_unknown_arguments_are_refused_by_name(model):
    frames = random_frames(model.config, 1, 5)
    torch.testing.assert_close(model(**frames, labels=None, inputs_embeds=None).logits, model(**frames).logits)
    with pytest.raises(ValueError, match="`labels` is no argument .* give `text_labels` and `audio_labels`"):
        model(**frames, labels=frames["input_ids"])
    with pytest.raises(ValueError, match="`inputs_embeds` is no argument"):
        model(**frames, inputs_embeds=torch.zeros(1, 5, 32))


@pytest.mark.parametrize("part", [{"tie_word_embeddings": True}, {"depth_decoder_config": {"tie_word_embeddings": True}}])
def test_tied_embeddings_are_refused(part):
    with pytest.raises(ValueError, match="tie_word_embeddings=True` must be False"):
        tiny_config(**part)


# Base models


@pytest.mark.parametrize(
    ("cls", "place"),
    [(MoshiTTTModel, "decoder.model"), (MoshiTTTForCausalLM, "decoder"), (MoshiTTTDepthDecoder, "depth_decoder")],
)
def test_a_part_loads_from_a_checkpoint_of_the_whole_and_of_its_own(model, tmp_path, cls, place):
    model.save_pretrained(tmp_path / "whole")
    wanted = model.get_submodule(place).state_dict()
    part, info = cls.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    part.save_pretrained(tmp_path / "part")
    for found in (part, cls.from_pretrained(tmp_path / "part")):
        assert found.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())


def test_a_whole_takes_the_weights_of_its_base(model, tmp_path):
    model.decoder.save_pretrained(tmp_path)
    whole, info = MoshiTTTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(name.startswith("decoder.") for name in info["missing_keys"])
    assert torch.equal(whole.decoder.lm_head.weight, model.decoder.lm_head.weight)


# Trainer


def test_trainer_trains_and_evaluates_recordings_of_unequal_length(model, collate, tmp_path):
    data = Dataset.from_list(recordings(model.config, [5, 9, 7, 3]))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, eval_dataset=data, data_collator=collate)
    assert np.isfinite(trainer.train().training_loss)
    with torch.no_grad():
        wanted = [float(model(**collate([data[i], data[i + 1]]), use_cache=False).loss) for i in (0, 2)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(wanted), rel=1e-5)


@pytest.mark.parametrize("kept", ["one length", "apart"])
def test_metrics_without_gathering_logits(model, collate, tmp_path, kept):
    """With likeliest tokens in place of logits, batches all padded to one length or kept apart, and labels of audio alone."""
    lengths = [5, 9, 7, 3]
    data = Dataset.from_list(recordings(model.config, lengths, without=("text_labels",)))
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {}

    def collator(rows):
        return collate.tokenizer.pad(rows, padding="max_length", max_length=9) if kept == "one length" else collate(rows)

    trainer = Trainer(
        model, arguments(tmp_path, eval_do_concat_batches=kept == "one length"), eval_dataset=data, data_collator=collator,
        compute_metrics=metrics, preprocess_logits_for_metrics=lambda logits, labels: tuple(scores.argmax(-1) for scores in logits),
    )  # fmt: skip
    found = trainer.evaluate()
    assert np.isfinite(found["eval_loss"])
    [(predictions, labels)] = seen
    (text, audio), (text_labels, audio_labels) = (predictions, labels) if kept == "one length" else (predictions[0], labels[0])
    assert text.shape == text_labels.shape == (len(text), 9)
    assert audio.shape == audio_labels.shape == (len(text), 3, 9)
    assert (text_labels == -100).all()
    assert (audio_labels[0, :, 5:] == -100).all()


def test_label_smoothing_is_refused_by_trainer_by_name(model, tmp_path):
    with pytest.warns(UserWarning, match="Label smoothing is not compatible"):
        trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    assert trainer.label_smoother is None


def test_padding_a_batch_changes_no_recording(model, collate):
    rows = recordings(model.config, [4, 7])
    batch = collate(rows)
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 3, [1] * 7]
    for i, row in enumerate(rows):
        for name, stream in row.items():
            assert batch[name][i, ..., : len(row["input_ids"])].tolist() == stream
    assert (batch["audio_labels"][0, :, 4:] == -100).all()
    assert (batch["user_audio_codes"][0, :, 4:] == -1).all()
    again = collate([{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(2)])  # with the rows' dimension
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    longer = collate.tokenizer.pad(rows, pad_to_multiple_of=8)
    assert longer["input_ids"].shape == (2, 8)
    with pytest.raises(ValueError, match="a recording has 7 frames and max_length is 6"):
        collate.tokenizer.pad(rows, padding="max_length", max_length=6)
    with pytest.raises(ValueError, match="'labels', which is no stream"):
        collate([{"labels": [1]}])


# PEFT


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("target", ["all-linear", TEMPORAL], ids=["all-linear", "regular expression"])
def test_usual_task_types_of_lora_train_and_generate(model, task_type, target):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target, task_type=task_type))
    frames = with_labels(random_frames(model.config, 2, 9))
    adapted(**frames).loss.backward()
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if ".lora_B." in name)
    said = adapted.generate(user_audio_codes=rows_of(frames, [0])["user_audio_codes"])
    assert said.sequences.shape == (1, 9)


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], ["q_proj.linear"], ["fc1"]])
def test_lora_by_names_that_cannot_be_adapted_says_what_to_write(model, target):
    with pytest.raises(ValueError, match="target_modules") as error:
        get_peft_model(model, LoraConfig(r=2, target_modules=target))
    assert TEMPORAL in str(error.value)  # which the test above shows to work
