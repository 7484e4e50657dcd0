"""What is pushed loads elsewhere, without this package, and gives the same numbers: 0.0 difference."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_checkpoints import save_adapter, save_checkpoint
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny import random_frames

from modeling_moshi_ttt import MoshiTTTConfig
from modeling_moshi_ttt.hub.stage import model_files

# A Python in which this package cannot be imported.
ELSEWHERE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_moshi_ttt" or name.startswith("modeling_moshi_ttt."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
frames = load_file("frames.safetensors")
results = {}
@torch.no_grad()
def keep(name, model):
    out = model.eval()(**frames)
    results[name + ".logits"], results[name + ".audio_logits"] = out.logits.contiguous(), out.audio_logits.contiguous()
"""
HERE = ELSEWHERE.replace("sys.meta_path.insert(0, Absent())", "import modeling_moshi_ttt")
DONE = '\nsave_file(results, "results.safetensors")\nprint("triton" in sys.modules, "modeling_moshi_ttt" in sys.modules)\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Hub, its environment, a folder, the outputs wanted, and what was printed.

    There are user/whole (3 shards, tagged v1), user/half (bf16; v1 was user/whole), user/adapter, user/pinned (its base was user/half at
    v1), user/merged and user/direct.
    """
    folder = tmp_path_factory.mktemp("place")
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(str(folder / "home")), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        frames = random_frames(MoshiTTTConfig(**FIELDS), rows=2, frames=12)
        save_file(frames, folder / "frames.safetensors")
        wanted = {}

        @torch.no_grad()
        def expect(name, model):
            out = model(**frames)
            wanted[name] = {"logits": out.logits, "audio_logits": out.audio_logits}

        expect("whole", save_checkpoint(folder / "whole"))
        expect("half", save_checkpoint(folder / "half", torch.bfloat16))
        adapted = save_adapter(folder / "adapter", str(folder / "whole"))
        expect("adapter", adapted)
        expect("merged", adapted.merge_and_unload())
        commands = [
            ["push", "whole", "user/whole", "--tag", "v1", "--max-shard-size", "80KB"],
            ["push", "whole", "user/half", "--private", "--tag", "v1"],
            ["push", "adapter", "user/pinned", "--base", "user/half"],
            ["push", "half", "user/half"],
            ["push", "adapter", "user/adapter", "--base", "user/whole"],
            ["push", "adapter", "user/merged", "--merged"],
        ]
        code = f"from modeling_moshi_ttt.cli import main\nfor command in {commands!r}:\n    assert main(command) == 0, command\n"
        code += "from modeling_moshi_ttt import MoshiTTTForConditionalGeneration, MoshiTTTProcessor\n"
        code += "MoshiTTTForConditionalGeneration.from_pretrained('whole').push_to_hub('user/direct')\n"
        code += "MoshiTTTProcessor.from_pretrained('whole').push_to_hub('user/direct')\n"
        done = python(code, folder, environment)
        hub.add("user/half", {"audio_tokenizer/model.safetensors": b"another"})
        for name, data in hub.repos["user/whole"].files().items():
            (folder / "local" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "local" / name).write_bytes(data)
        yield hub, environment, folder, wanted, done.stdout + done.stderr


FIELDS = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48, "num_codebooks": 3}
FIELDS |= {"audio_vocab_size": 20}


def python(code, folder, environment):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def difference(results, wanted, name, source):
    return max(float((results[f"{name}.{key}"].float() - wanted[source][key].float()).abs().max()) for key in ("logits", "audio_logits"))


def test_everything_loads_without_the_package_and_gives_the_same_numbers(place):
    hub, environment, folder, wanted, _ = place
    code = (
        ELSEWHERE
        + """
from transformers import AutoConfig, AutoModel, AutoModelForTextToWaveform, AutoProcessor
from peft import AutoPeftModel, PeftModel
far = {"trust_remote_code": True}
keep("whole", AutoModel.from_pretrained("user/whole", **far))
keep("tag", AutoModelForTextToWaveform.from_pretrained("user/whole", revision="v1", **far))
keep("half", AutoModel.from_pretrained("user/half", dtype=torch.bfloat16, **far))
keep("before", AutoModel.from_pretrained("user/half", revision="v1", **far))
assert AutoProcessor.from_pretrained("user/half", revision="v1", **far).num_codebooks == 3  # the newest codec is broken
keep("local", AutoModel.from_pretrained("local", **far))
assert AutoProcessor.from_pretrained("local", **far).num_codebooks == 3
keep("device_map", AutoModel.from_pretrained("user/whole", device_map="cpu", **far))
keep("merged", AutoModel.from_pretrained("user/merged", **far))
keep("adapter", AutoPeftModel.from_pretrained("user/adapter", **far))
keep("pinned", AutoPeftModel.from_pretrained("user/pinned", **far))
keep("by_hand", PeftModel.from_pretrained(AutoModel.from_pretrained("user/whole", **far), "user/adapter"))
keep("direct", AutoModelForTextToWaveform.from_pretrained("user/direct", **far))
assert AutoProcessor.from_pretrained("user/direct", **far).num_codebooks == 3
config = AutoConfig.from_pretrained("user/whole", **far)
assert config.model_type == "moshi_ttt" and config.ttt_layers == [0, 1], config
processor = AutoProcessor.from_pretrained("user/whole", **far)
batch = processor(torch.zeros(2, 4000), sampling_rate=24000, words=[("abc", 0.0, 0.1, "SPEAKER_MAIN")])
assert batch["moshi_audio_codes"].shape == (1, 3, 3), batch
"""
        + DONE
    )
    said = python(code, folder, environment).stdout
    assert said.splitlines()[-1].endswith("False")  # the package was not there
    results = load_file(folder / "results.safetensors")
    same = {name: name for name in wanted} | dict.fromkeys(("tag", "before", "local", "device_map", "direct"), "whole")
    same |= dict.fromkeys(("by_hand", "pinned"), "adapter")
    assert {name: difference(results, wanted, name, source) for name, source in same.items()} == dict.fromkeys(same, 0.0)


@pytest.mark.parametrize("package", [True, False])
def test_torch_and_transformers_are_enough_on_a_cpu(place, package):
    """Without Triton and all that the extras install: load, stream, train a step."""
    _, environment, folder, wanted, _ = place
    absent = ["triton", "accelerate", "peft", "datasets", "scipy", "soundfile", "sphn", "matplotlib", "rich", "jinja2", "tensorboard"]
    code = f"import sys\nfor name in {absent}: sys.modules[name] = None\n" + (HERE if package else ELSEWHERE)
    code += f"far = {{}} if {package} else {{'trust_remote_code': True}}"
    code += """
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained("user/whole", **far), AutoProcessor.from_pretrained("user/whole", **far)
keep("whole", model)
ears, stream = processor.new_audio_stream(), model.new_stream()
for _ in range(3):
    frame = stream.step(ears.encode(torch.zeros(1, 1920)))
assert frame.valid.all()
model(**frames, text_labels=frames["input_ids"], audio_labels=frames["moshi_audio_codes"]).loss.backward()
"""
    python(code + DONE, folder, environment)
    assert difference(load_file(folder / "results.safetensors"), wanted, "whole", "whole") == 0.0


def test_shipped_python_is_exactly_the_flat_files(place):
    hub, *_ = place
    flat = {path.name: path.read_bytes() for path in model_files()}
    assert "modeling_moshi_ttt.py" in flat
    for name, repo in hub.repos.items():
        shipped = {name: data for name, data in repo.files().items() if name.endswith(".py")}
        assert shipped == flat if name != "user/direct" else shipped.items() <= flat.items()  # save_pretrained takes what is needed


def test_whole_repository_holds_what_was_promised(place):
    hub, *_ = place
    files = hub.repos["user/whole"].files("v1")
    assert sorted(name for name in files if name.startswith("model-")) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {
        "README.md",
        "manifest.json",
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "probe/probe.safetensors",
    } < files.keys()
    assert "generation_config.json" in files
    assert "audio_tokenizer/model.safetensors" in files
    assert set(json.loads(files["manifest.json"])["files"]) == files.keys() - {"manifest.json", ".gitattributes"}
    assert hub.repos["user/half"].private
    assert not hub.repos["user/whole"].private
    for name, base in (("user/adapter", "user/whole"), ("user/pinned", "user/half")):
        adapter = json.loads(hub.repos[name].files()["adapter_config.json"])
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (base, hub.repos[base].tags["v1"])
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for repo in hub.repos.values() for name in repo.files())


def test_no_token_is_printed_or_stored(place):
    hub, _, folder, _, said = place
    assert hub.token not in said
    stored = [path for path in folder.rglob("*") if path.is_file() and hub.token.encode() in path.read_bytes()]
    assert stored == []
    assert not any(hub.token.encode() in data for repo in hub.repos.values() for data in repo.files().values())


def test_with_the_package_one_line_loads_and_no_code_is_fetched(place):
    hub, environment, folder, wanted, _ = place
    code = (
        HERE
        + """
from transformers import AutoModel, AutoProcessor, AutoModelForTextToWaveform
model = AutoModel.from_pretrained("user/whole")
assert type(model).__module__ == "modeling_moshi_ttt.modeling_moshi_ttt", type(model)
keep("whole", model)
keep("adapter", AutoModel.from_pretrained("user/adapter"))
assert AutoProcessor.from_pretrained("user/whole").num_codebooks == 3
from modeling_moshi_ttt.hub.pull import pull
print(pull("user/merged", "pulled").describe())
keep("folder", AutoModelForTextToWaveform.from_pretrained("pulled"))
"""
        + DONE
    )
    python(code, folder, environment)
    results = load_file(folder / "results.safetensors")
    assert difference(results, wanted, "whole", "whole") == 0.0
    assert difference(results, wanted, "adapter", "adapter") == 0.0
    assert difference(results, wanted, "folder", "merged") == 0.0
