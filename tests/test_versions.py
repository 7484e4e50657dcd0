"""One range of transformers, said by setup.cfg and by the code that travels; outside it, a message instead of a crash; inside, no old
names.
"""

import re
import subprocess
import sys
import warnings

import pytest
from tiny import tiny_config
from version_matrix import CORE, ROOT, lower_bounds, requirements

from modeling_moshi_ttt.hub.stage import model_files
from modeling_moshi_ttt.versions_moshi_ttt import TRANSFORMERS, check_transformers, release


def test_one_range_everywhere():
    lowest, limit = TRANSFORMERS
    assert requirements()["transformers"] == f">={lowest},<{limit}"
    pinned = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert release(lowest) <= release(pinned["transformers"]) < release(limit)
    assert {name: pinned[name] for name, bound in lower_bounds().items() if name in pinned and release(pinned[name]) < release(bound)} == {}
    python = re.search(r"python_requires = >=3\.(\d+)", (ROOT / "setup.cfg").read_text())[1]
    for name, words in (("ruff.toml", "py3{}"), ("README.md", "Python ≥ 3.{}"), ("Makefile", "Python >= 3.{}")):
        assert words.format(python) in (ROOT / name).read_text(), name


def test_the_quick_core_is_there():
    assert [name for name in CORE if not (ROOT / "tests" / name.split("::")[0]).is_file()] == []


@pytest.mark.parametrize("version", ["4.57.1", "5.22.9", "5.22.0.dev0"])
def test_an_older_transformers_is_refused(version):
    with pytest.raises(
        ImportError, match=rf"transformers >= 5\.23, < 5\.25; {re.escape(version)} is installed.*pip install 'transformers>=5.23,<5.25'"
    ):
        check_transformers(version)


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.0"])
def test_a_newer_transformers_is_named_once(version):
    check_transformers.cache_clear()
    with pytest.warns(UserWarning, match=f"{re.escape(version)} is installed.*pip install"):
        check_transformers(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers(version)
        for inside in ("5.23.0", "5.24.7"):
            check_transformers(inside)


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("place", ["package", "checkpoint"])
def test_what_is_installed_is_judged_on_import(place, tmp_path):
    """By the package, and by the code of a checkpoint where there is no package, before anything fails of another transformers."""
    load = "import modeling_moshi_ttt"
    if place == "checkpoint":
        tiny_config().save_pretrained(tmp_path)
        for path in model_files():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        load = "sys.modules['modeling_moshi_ttt'] = None\n"
        load += f"transformers.AutoConfig.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)"
    for version, code in (("5.22.1", 1), ("5.99.0", 0)):
        done = python(f"import sys, transformers\ntransformers.__version__ = {version!r}\n{load}")
        assert done.returncode == code, done.stderr
        assert done.stderr.count(f"{version} is installed") == 1
        assert "pip install 'transformers>=5.23,<5.25'" in done.stderr
    assert "ImportError" not in done.stderr


NO_OLD_NAMES = """
import sys, tempfile
sys.path.insert(0, "tests")
from tiny import random_frames, tiny_model, with_labels
from transformers import AutoModel, Trainer, TrainingArguments
model = tiny_model().float().train()
frames = with_labels(random_frames(model.config, rows=2, frames=9))
model.activation_checkpointing_enable()
model(**frames).loss.backward()
model.eval()
out = model(**frames, use_cache=True)
assert out.cache is out.past_key_values is not None
assert model(**frames, cache=model.new_cache(2)).to_tuple()[0] == out.loss
model.generate(user_audio_codes=frames["user_audio_codes"])
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    AutoModel.from_pretrained(folder)
    arguments = TrainingArguments(folder, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{name: value[row] for name, value in frames.items()} for row in range(2)]
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.evaluate()
"""


def test_no_name_in_use_is_deprecated():
    """Neither as a warning nor in transformers' log, which says each thing once a process."""
    done = python(NO_OLD_NAMES, "-W", "error::FutureWarning")
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
