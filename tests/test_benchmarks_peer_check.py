"""Our half of the check beside Kyutai's package: it agrees with itself, and one wrong number is seen and decides the exit code."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peer_check

from modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from modeling_moshi_ttt.conversion.tables import config_from_kyutai, hf_to_kyutai

CASE = "delays-to-5"


def ourselves_as_peer(folder, spoil):
    """Write what the peer's process would: random weights in Kyutai's layout and results, here our own half's after `spoil`."""
    (case,) = peer_check.cases([CASE])
    model = MoshiTTTForConditionalGeneration(config_from_kyutai(case["lm"]))
    weights = hf_to_kyutai(model.state_dict(), model.config)
    results = peer_check.language_model(case, load_file(folder / f"{CASE}.inputs.safetensors"), weights)
    results["audio_mask"] = results["audio_logits"].isfinite().all(dim=-1)
    spoil(results)
    tensors = results | {f"weight.{name}": tensor for name, tensor in weights.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{CASE}.peer.safetensors")


def one_token(results):
    results["stream"][1, 2, -1] += 1


def one_gradient(results):
    results["grad.depformer.layers.1.gating.3.linear_out.weight"] *= 1.0001


@pytest.mark.parametrize(
    ("spoil", "missed"),
    [
        (lambda results: None, []),
        (one_token, ["greedy stream, four resets"]),
        (lambda results: results["audio_loss"].add_(1e-5), ["audio loss"]),
        (one_gradient, ["gradients of 71 tensors, worst depformer.layers.1.gating.3.linear_out.weight"]),
    ],
)
def test_what_differs_is_named_and_fails(monkeypatch, capsys, tmp_path, spoil, missed):
    monkeypatch.setattr(peer_check, "run_peer", lambda folder: ourselves_as_peer(folder, spoil))
    monkeypatch.setattr(sys, "argv", ["peer_check.py", "--case", CASE, "--table", str(tmp_path / "PEER.md")])
    assert peer_check.main() == (1 if missed else 0)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {CASE}")]
    assert len(lines) == 7
    assert [line[1] for line in lines if "**missed**" in line[-1]] == missed
    assert f"{7 - len(missed)} of 7 numbers agree" in (tmp_path / "PEER.md").read_text()


def test_the_cases_are_those_the_golden_numbers_lack(kyutai_golden):
    """Eight configurations, at least one with delays up to 5 and one whose window is shorter than the sequence, none of them the golden
    one.
    """
    found = [case["lm"] for case in peer_check.cases([]) if "lm" in case]
    assert len(found) == 8
    assert {(8, 4), (4, 4), (16, 8), (32, 16), (5, 2)} <= {(lm["n_q"], lm["dep_q"]) for lm in found}
    assert max(max(lm["delays"]) for lm in found) == 5
    assert min(lm["context"] for lm in found) < peer_check.FRAMES
    assert kyutai_golden[1]["lm_kwargs"] not in found


def test_the_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peer_check.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        peer_check.main()
    assert ended.value.code == 0
    assert "Kyutai's own package" in capsys.readouterr().out


def test_without_the_peer_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(peer_check, "PEER", tmp_path / "python")
    with pytest.raises(SystemExit, match="run `make peer`"):
        peer_check.run_peer(tmp_path)
