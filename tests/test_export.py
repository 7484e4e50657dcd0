"""A frame and a forward as graphs: exported, and compiled in one piece without a branch on numbers."""

import shutil

import pytest
import torch
from tiny import random_frames, tiny_model
from torch.export import Dim, export

from modeling_moshi_ttt.sampling_moshi_ttt import gumbel
from modeling_moshi_ttt.stream_moshi_ttt import frame

ROWS, HEARD = 2, 11


class Forward(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, text, moshi, user):
        output = self.model(text, moshi, user, use_cache=False)
        return output.logits, output.audio_logits


class Step(torch.nn.Module):
    """A frame of a stream, with everything that it remembers as tensors in and out."""

    def __init__(self, stream):
        super().__init__()
        self.model, self.sampling, self.cache = stream.model, stream.sampling, [stream.past_key_values.draft()]

    def forward(self, inputs, forced, active, seeds, calls, memory):
        (cache,), tensors = self.cache, iter(memory)
        cache.state = cache.state.map(lambda _: next(tensors))
        said, sick = frame(self.model, inputs, forced, active, cache, self.sampling, seeds, calls)
        return said, sick, flat(cache)


def flat(cache) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    cache.state.map(lambda tensor: (found.append(tensor), tensor)[1])
    return found


@torch.no_grad()
def test_a_forward_exports_with_any_length():
    """From one frame beyond a mini-batch on, also beyond the window."""
    model = tiny_model()
    longer = Dim.AUTO
    lengths = ({1: longer}, {2: longer}, {2: longer})
    exported = export(Forward(model), tuple(random_frames(model.config, ROWS, HEARD).values()), dynamic_shapes=lengths).module()
    for length in (5, HEARD, 40, 130):
        frames = tuple(random_frames(model.config, ROWS, length, seed=length).values())
        for ours, expected in zip(exported(*frames), Forward(model)(*frames)):
            assert torch.allclose(ours, expected, atol=1e-10)


def talking(model):
    """A stream whose rows stand at different frames, and what its next call takes."""
    stream = model.new_stream(ROWS, seeds=[1, 2])
    stream.past_key_values.fill(model)
    user = random_frames(model.config, ROWS, 20)["user_audio_codes"]
    for t in range(19):
        stream.step(user[..., t], [True, t % 3 > 0])
    forced = torch.full((ROWS, 1 + model.config.num_codebooks), -2)
    memory = [tensor.clone() for tensor in flat(stream.past_key_values)]
    return stream, (stream._inputs(user[..., 19]), forced, torch.tensor([True, False]), stream.state.seeds, stream.state.calls, memory)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["linear", "mlp"])
def test_a_step_exports(mixer):
    stream, inputs = talking(tiny_model(ttt_mixer=mixer))
    step = Step(stream)

    def again():
        return [[tensor.clone() for tensor in x] if isinstance(x, list) else x for x in inputs]

    said, sick, after = export(step, tuple(again())).module()(*again())
    expected = step(*again())
    assert torch.equal(said, expected[0])
    assert not sick.any()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, expected[2], strict=True))


@torch.no_grad()
def test_a_compiled_step_is_one_graph():
    """Any branch on numbers, and any read by the host, would break it: `fullgraph=True` raises there."""
    stream, inputs = talking(tiny_model())
    step = Step(stream)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    expected = step(*inputs[:-1], [tensor.clone() for tensor in inputs[-1]])
    said, sick, after = compiled(*inputs)
    assert torch.equal(said, expected[0])
    assert not sick.any()
    assert all(torch.allclose(ours.double(), theirs.double()) for ours, theirs in zip(after, expected[2], strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler writes C++ and needs a compiler for it")
def test_compiled_noise_is_the_noise():
    """In machine code too: as the index of a loop, the counter of the noise overflowed and wrote past its memory."""
    keys = torch.randint(-(2**62), 2**62, (2, 3), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(gumbel)
    for count in (25, 250):
        torch.testing.assert_close(compiled(keys, count), gumbel(keys, count), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_streams_say_what_streams_say_and_compile_nothing_later():
    model = tiny_model()
    user = random_frames(model.config, 3, 40)["user_audio_codes"]
    rows = [[True, t % 3 > 0, t % 5 > 0] for t in range(40)]
    plain = model.new_stream(3, seeds=[1, 2, 3])
    expected = [plain.step(user[..., t], rows[t]) for t in range(40)]
    model.compile_stream(3, backend="eager")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    stream = model.new_stream(3, seeds=[1, 2, 3])
    for t in range(40):
        found = stream.step(user[..., t], rows[t])
        assert torch.equal(found.text, expected[t].text)
        assert torch.equal(found.audio_codes, expected[t].audio_codes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
