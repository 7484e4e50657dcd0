"""Scores against Kyutai's own logits, padding that changes nothing, streams that are what they say."""

import math

import numpy as np
import pytest
import torch

from modeling_moshi_ttt import MoshiTTTConfig, MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.conversion.tables import config_from_kyutai, kyutai_to_hf
from modeling_moshi_ttt.evaluation.scoring import (
    UNWEIGHTED,
    CodeSequence,
    ScoreWeights,
    SpeechScorer,
    StreamSums,
    batches_of_like_length,
    score_sequences,
    token_log_probs,
)

K = 3


@pytest.fixture(scope="module")
def kyutai_model(request):
    tensors, about = request.getfixturevalue("kyutai_golden")
    config = config_from_kyutai(about["lm_kwargs"], ttt_layers=[])
    model = MoshiTTTForConditionalGeneration(config)
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    model.load_state_dict(kyutai_to_hf(state, config))
    return model.eval()


def make_model(**ttt):
    torch.manual_seed(1)
    depth = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "ffn_dim": 32}
    options = {"ttt_layers": "all", "ttt_mixer": "linear", "ttt_mini_batch_size": 4, "ttt_gate_init": 0.5} | ttt
    config = MoshiTTTConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, ffn_dim=64, sliding_window=8,
        audio_vocab_size=24, num_codebooks=K, depth_decoder_config=depth, **options,
    )  # fmt: skip
    model = MoshiTTTForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("wo.weight"):  # zero in a fresh layer, and then the memory would not be tested
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_sequence(frames, seed, text=True):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    return CodeSequence(draw(24, K, frames), draw(24, K, frames), draw(48, frames) if text else None)


def test_scores_are_the_sum_by_hand_over_kyutais_logits(kyutai_golden, kyutai_model):
    golden, _ = kyutai_golden
    codes = golden["codes"]  # [2, 7, 40]
    sequences = [CodeSequence(row[1:4], row[4:], row[0]) for row in codes]
    for row, found in enumerate(score_sequences(kyutai_model, sequences, batch_size=2)):
        text = golden["codes.text_logits"][row, 0].double().log_softmax(-1)  # [40, 64]
        by_hand = [sum(text[t, codes[row, 0, t]].item() for t in range(40))]
        counts = [40]
        audio = golden["codes.logits"][row].double().log_softmax(-1)  # [3, 40, 32]
        mask = golden["codes.mask"][row].bool()
        for k in range(3):
            by_hand.append(sum(audio[k, t, codes[row, 1 + k, t]].item() for t in range(40) if mask[k, t]))
            counts.append(int(mask[k].sum()))
        assert found.tokens == tuple(counts)
        per_token = [abs(a - b) / n for a, b, n in zip(found.sums, by_hand, counts)]
        assert max(per_token) < 1e-5
        weighted = (100 * by_hand[1] + by_hand[2] + by_hand[3]) / (100 * counts[1] + counts[2] + counts[3])
        assert found.score() == pytest.approx(weighted, abs=1e-5)
        assert found.score(mean=False) == pytest.approx(100 * by_hand[1] + by_hand[2] + by_hand[3], rel=1e-5)


def test_targets_shifted_by_one_frame_do_not_pass_for_right(kyutai_golden, kyutai_model):
    """The mistake of two frames: a score of shifted targets is far from the score of the right ones."""
    golden, _ = kyutai_golden
    codes = golden["codes"]
    audio = golden["codes.logits"][0].double().log_softmax(-1)
    found = token_log_probs(kyutai_model, [CodeSequence(codes[0, 1:4], codes[0, 4:], codes[0, 0])])
    right = torch.stack([audio[k, torch.arange(39), codes[0, 1 + k, :39]] for k in range(3)])
    shifted = torch.stack([audio[k, torch.arange(1, 40), codes[0, 1 + k, :39]] for k in range(3)])
    shifted = torch.where(golden["codes.mask"][0, :, 1:].bool(), shifted, 0.0)
    assert (found.values[0, 1:, :39] - right).abs().mean() < 1e-5  # log-likelihoods of -5 to -17 in float32
    assert (found.values[0, 1:, :39] - shifted).abs().mean() > 0.5


@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_padding_and_batches_change_nothing(mixer):
    model = make_model(ttt_mixer=mixer).double()
    sequences = [make_sequence(frames, frames) for frames in (1, 2, 5, 9, 17, 30)]
    alone = [score_sequences(model, [sequence])[0] for sequence in sequences]
    for batch_size in (2, 4, 16):
        together = score_sequences(model, sequences[::-1], batch_size=batch_size)[::-1]
        for one, other in zip(alone, together):
            assert one.tokens == other.tokens
            assert np.allclose(one.sums, other.sums, atol=1e-9)


def test_a_checkpoint_that_asks_for_tuples_is_scored_alike():
    model, sequences = make_model(), [make_sequence(9, 0)]
    expected = score_sequences(model, sequences)[0]
    model.config.return_dict = False
    assert score_sequences(model, sequences)[0] == expected


def test_batches_are_of_one_length_where_half_a_batch_is():
    lengths = [7] * 5 + [3] * 9 + [4] + [5] * 2 + [20]
    batches = batches_of_like_length(lengths, 4)
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    assert [[lengths[i] for i in batch] for batch in batches] == [[3] * 4, [3] * 4, [3, 4], [5] * 2, [7] * 4, [7, 20]]
    assert [len(batch) for batch in batches_of_like_length([1, 2, 3], 1)] == [1, 1, 1]
    with pytest.raises(ValueError, match="batch_size=0"):
        batches_of_like_length([1], 0)


def test_delayed_codebooks_lose_their_last_frame_and_nothing_else():
    model = make_model()
    found = token_log_probs(model, [make_sequence(5, 1), make_sequence(9, 2)])
    assert found.predicted.sum(-1).tolist() == [[5, 5, 4, 4], [9, 9, 8, 8]]
    assert (found.values[~found.predicted] == 0).all()
    assert (found.values[found.predicted] < 0).all()


def test_an_absent_stream_is_not_scored_and_is_not_silence():
    model = make_model()
    full = make_sequence(12, 5)
    without = score_sequences(model, [CodeSequence(full.moshi)])[0]
    assert (without.sums[0], without.tokens[0]) == (0.0, 0)
    absent = CodeSequence(full.moshi, torch.full_like(full.user, -1), torch.full_like(full.text, -1))
    assert score_sequences(model, [absent])[0] == without
    silent = score_sequences(model, [CodeSequence(full.moshi, torch.zeros_like(full.user))])[0]
    assert abs(silent.sums[1] - without.sums[1]) > 1e-3


def test_the_users_codes_and_the_text_reach_the_score():
    model = make_model()
    full = make_sequence(12, 5)
    base = score_sequences(model, [full])[0]
    other = score_sequences(model, [full._replace(user=full.user.flip(-1))])[0]
    assert base.sums[1] != other.sums[1]
    assert score_sequences(model, [full._replace(text=full.text.flip(0))])[0].sums[1] != base.sums[1]


def test_weights_by_hand():
    sums = StreamSums((-4.0, -10.0, -30.0, -50.0), (2, 5, 4, 4))
    assert sums.score(mean=False) == -1080.0
    assert sums.score() == -1080.0 / 508
    assert sums.score(UNWEIGHTED) == -90.0 / 13
    assert sums.score(ScoreWeights(1, 1, 1)) == -94.0 / 15
    assert sums.score(ScoreWeights(0, 0, 2)) == -2.0
    with pytest.raises(ValueError, match="not all 0"):
        ScoreWeights(0, 0, 0)
    with pytest.raises(ValueError, match="weights="):
        StreamSums((0.0, -1.0), (0, 1)).score(ScoreWeights(0, 0, 1))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_broken_numbers_are_an_error_not_a_score(bad):
    with pytest.raises(ValueError, match="score="):
        StreamSums((0.0, bad), (0, 3)).score()


def test_a_failing_model_stops_the_run():
    model = make_model()
    with torch.no_grad():
        model.decoder.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="score="):
        [found.score() for found in score_sequences(model, [make_sequence(4, 1)])]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (CodeSequence(torch.zeros(2, 4, dtype=torch.long)), r"`moshi` of shape \(2, 4\)"),
        (CodeSequence(torch.zeros(3, 0, dtype=torch.long)), r"`moshi` of shape \(3, 0\)"),
        (CodeSequence(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)), "`user` of shape"),
        (CodeSequence(torch.zeros(3, 4, dtype=torch.long), None, torch.zeros(5, dtype=torch.long)), "`text` of shape"),
    ],
)
def test_sequences_that_do_not_fit_are_named(sequence, message):
    with pytest.raises(ValueError, match=message):
        score_sequences(make_model(), [make_sequence(4, 1), sequence])


def encode(waves):
    """A stand-in for the codec: codes from the loudness of each frame, causal like Mimi."""
    codes = []
    for wave in waves:
        frames = -(-len(wave) // 1920)
        padded = np.pad(wave, (0, frames * 1920 - len(wave))).reshape(frames, 1920)
        level = torch.tensor((np.abs(padded).mean(1) * 1000).astype(np.int64) % 24)
        codes.append(torch.stack([(level + k) % 24 for k in range(K)]))
    return codes


def test_slamkits_contract():
    generator = np.random.default_rng(0)
    wavs = torch.tensor(generator.normal(0, 0.1, (3, 24000)), dtype=torch.float32)
    lens = torch.tensor([24000, 5000, 9600])
    for row, end in enumerate(lens):
        wavs[row, end:] = 0
    scorer = SpeechScorer(make_model(), encode)
    mean, total = scorer.log_likelihood(wavs, lens), scorer.log_likelihood(wavs, lens, mean_nll=False)
    assert mean.shape == total.shape == (3,)
    frames = torch.tensor([13, 3, 5])
    assert torch.allclose(total, mean * (100 * frames + 2 * (frames - 1)), rtol=1e-5)
    single = torch.cat([scorer.log_likelihood(wavs[i : i + 1, : lens[i]]) for i in range(3)])
    assert torch.allclose(mean, single, atol=1e-5)
    assert scorer.device == torch.device("cpu")
    named = scorer.log_likelihood(wavs, lens, used_token_modality="SPEECH", mean_nll=False)  # as its metrics call it
    assert torch.equal(named, total)
    with pytest.raises(ValueError, match="used_token_modality='TEXT'"):
        scorer.log_likelihood(wavs, lens, used_token_modality="TEXT")
    with pytest.raises(ValueError, match="`lens="):
        scorer.log_likelihood(wavs, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"must be \[B, N\]"):
        scorer.log_likelihood(wavs[0])


def test_salmons_contract():
    """Its metric moves the model once and gives a list of recordings [1, N], of any lengths."""
    wavs = [torch.randn(1, n) * 0.1 for n in (24000, 5000, 9600)]
    scorer = SpeechScorer(make_model(), encode)
    assert scorer.to("cpu") is scorer
    found = scorer.log_likelihood(wavs)
    assert torch.equal(found, scorer.log_likelihood([wave[0] for wave in wavs]))
    assert torch.allclose(found, torch.cat([scorer.log_likelihood(wave) for wave in wavs]), atol=1e-5)
    with pytest.raises(ValueError, match=r"a wave of shape \(2, 100\)"):
        scorer.log_likelihood([torch.zeros(2, 100)])


def test_what_stands_beside_the_voice_is_chosen_in_words():
    model, wave = make_model(), [np.random.default_rng(0).normal(0, 0.1, 9600).astype(np.float32)]
    scores = {
        (user, text): SpeechScorer(model, encode, user=user, text=text).score_waves(wave)[0].score()
        for user in ("absent", "silence")
        for text in ("absent", 3)
    }
    assert len(set(scores.values())) == 4
    assert SpeechScorer(model, encode, text=3).score_waves(wave)[0].tokens[0] == 0
    with pytest.raises(ValueError, match="user='none'"):
        SpeechScorer(model, encode, user="none")
    with pytest.raises(ValueError, match="text=48"):
        SpeechScorer(model, encode, text=48)


def test_other_rates_are_resampled():
    wave = np.sin(np.arange(16000) * 2 * np.pi * 200 / 16000).astype(np.float32) * 0.1
    same = np.sin(np.arange(24000) * 2 * np.pi * 200 / 24000).astype(np.float32) * 0.1
    model = make_model()
    heard = []

    def listen(waves):
        heard.extend(waves)
        return encode(waves)

    SpeechScorer(model, listen, sample_rate=16000).log_likelihood(torch.from_numpy(wave)[None])
    assert heard[0].shape == same.shape
    assert np.abs(heard[0] - same)[200:-200].max() < 1e-4
