"""The depth decoder against transformers' own on equal weights, its decoding against its training pass, and its memory."""

import pytest
import torch
from transformers import MoshiDepthConfig
from transformers.models.moshi.modeling_moshi import MoshiDepthDecoder

from modeling_moshi_ttt.depth_decoder import MoshiTTTDepthDecoder, embed_or_zero


def config(**changes) -> MoshiDepthConfig:
    fields = {"hidden_size": 16, "input_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "vocab_size": 30}
    return MoshiDepthConfig(**(fields | {"audio_vocab_size": 20, "num_codebooks": 5} | changes))


@pytest.fixture
def decoder():
    return random_decoder(config())


def random_decoder(config):
    decoder = MoshiTTTDepthDecoder(config).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return decoder


def frames(count: int = 7):
    return torch.randn(count, 12).double(), torch.randint(0, 30, (count,)), torch.randint(0, 20, (count, 5))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_it_is_transformers_depth_decoder(activation):
    chosen = config(hidden_act=activation)
    decoder = random_decoder(chosen)
    peer = MoshiDepthDecoder._from_config(chosen, attn_implementation="sdpa").double()
    peer.load_state_dict(decoder.state_dict())
    hidden, text, codes = frames()
    ours, theirs = (
        decoder(hidden, text, codes),
        peer(input_ids=torch.cat([text[:, None], codes[:, :-1]], 1), last_hidden_state=hidden[:, None], use_cache=False),
    )
    assert (ours.transpose(0, 1) - theirs.logits).abs().max() <= 1e-12
    ours.pow(2).sum().backward()
    theirs.logits.pow(2).sum().backward()
    gradients = dict(peer.named_parameters())
    for name, parameter in decoder.named_parameters():
        # Moshi's norms compute in float32 on both sides; the order of sums differs.
        assert (parameter.grad - gradients[name].grad).norm() <= 1e-6 * gradients[name].grad.norm(), name


@pytest.mark.parametrize("forced_codebooks", [0, 2, 5])
def test_decoding_is_the_training_pass(decoder, forced_codebooks):
    hidden, text, codes = frames()
    forced = codes.masked_fill(torch.arange(5) >= forced_codebooks, -2)
    chosen = decoder.decode(hidden, text, forced, lambda logits, codebook: logits.argmax(-1))
    assert torch.equal(chosen[:, :forced_codebooks], codes[:, :forced_codebooks])
    likeliest = decoder(hidden, text, chosen).argmax(-1).T
    assert torch.equal(chosen[:, forced_codebooks:], likeliest[:, forced_codebooks:])


def test_it_is_causal_over_codebooks(decoder):
    hidden, text, codes = frames()
    before = decoder(hidden, text, codes)
    for k in range(5):
        changed = codes.clone()
        changed[:, k] = (changed[:, k] + 1) % 20
        after = decoder(hidden, text, changed)
        assert torch.equal(before[: k + 1], after[: k + 1])
        assert k == 4 or not torch.allclose(before[k + 1 :], after[k + 1 :])


def test_the_zero_token_embeds_to_zero(decoder):
    table = decoder.text_embed_tokens
    embedded = embed_or_zero(table, torch.tensor([[4, -1]]))
    assert torch.equal(embedded[0, 0], table.weight[4])
    assert (embedded[0, 1] == 0).all()
    embedded.sum().backward()
    assert (table.weight.grad[0] == 0).all()


def test_weights_are_used_in_place():
    """256 frames of the medium configuration, forward and backward, hold far less than 1.5 GB: no copy of the weights per frame."""
    medium = config(
        hidden_size=256, input_size=512, num_hidden_layers=6, num_attention_heads=8, ffn_dim=1408, audio_vocab_size=2048, num_codebooks=8
    )
    decoder, saved = MoshiTTTDepthDecoder(medium), {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = decoder(torch.randn(256, 512), torch.randint(0, 30, (256,)), torch.randint(0, 2048, (256, 8)))
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in decoder.parameters()}
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    gradients = sum(weights.values())
    logits.sum().backward()
    assert activations + gradients + logits.nbytes <= 1.5e9
