"""Mutated inputs of ten kinds for every reader of strangers' files; `make fuzz`, and the findings of before in the suite.

    python tests/fuzz.py [--inputs 50] [--kinds sounds words]

An input may be read or refused by a MoshiTTTError. Any other exception, more than 5 s of computing, more than 1 GB, or a file outside its folder is a
finding: it is written to tests/fuzz_corpus, and the exit code is 1.
"""

import argparse
import io
import json
import random
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from tiny import tiny_model

from modeling_moshi_ttt import MoshiTTTConfig
from modeling_moshi_ttt.adapters.bases import ADAPTER_CONFIG
from modeling_moshi_ttt.adapters.checks import expected_weights, read_adapter_config
from modeling_moshi_ttt.adapters.models import dtype_problems, header_problems
from modeling_moshi_ttt.common.files import check_manifest, write_manifest
from modeling_moshi_ttt.common.safetensor_files import TensorFiles
from modeling_moshi_ttt.common.settings import load_settings
from modeling_moshi_ttt.data.archives import read_archive
from modeling_moshi_ttt.data.audio import read_audio, write_audio
from modeling_moshi_ttt.data.recordings import read_manifest
from modeling_moshi_ttt.data.sound_worker import in_worker
from modeling_moshi_ttt.errors_moshi_ttt import MoshiTTTError
from modeling_moshi_ttt.training.run_config import RunConfig

CORPUS = Path(__file__).parent / "fuzz_corpus"
SECONDS, MEMORY = 5.0, 1 << 30
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    10**9,
    10**400,
    1e308,
    float("nan"),
    "",
    "../../x",
    "/etc/passwd",
    "a\u2028b",
    "\ud800"[:0],
    "x" * 5000,
]
HOSTILE += [[], {}, [0] * 5000, [[]], {"a": {"b": []}}, "evil/kernel", -(2**63), 0.1]


@cache
def model() -> Any:
    return tiny_model()


@cache
def stream_state() -> bytes:
    stream = model().new_stream(do_sample=False)
    for _ in range(3):
        stream.step()
    return save(stream.state_dict())


def _sound(folder: Path) -> bytes:
    write_audio(folder / "seed.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (2, 2400)), 24000)
    return (folder / "seed.wav").read_bytes()


WORDS = {"alignments": [["hello", [0.1, 0.4], "SPEAKER_MAIN"], ["there", [0.5, 0.9], "SPEAKER_USER"]]}
ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj.linear"], "base_model_name_or_path": "user/base"}


def _tar(folder: Path) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name, data in (("a.wav", _sound(folder)), ("a.json", json.dumps(WORDS).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return held.getvalue()


def _weights(_: Path) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in model().state_dict().items()})


def _put(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def _read_words(data: bytes, folder: Path) -> None:
    _put(folder, "a.wav", _sound(folder))
    _put(folder, "a.json", data)
    read_manifest(_put(folder, "data.jsonl", b'{"path": "a.wav", "duration": 0.1}\n'), problems=[])


def _read_jsonl(data: bytes, folder: Path) -> None:
    _put(folder, "a.wav", _sound(folder))
    read_manifest(_put(folder, "data.jsonl", data), problems=[])


def _read_weights(data: bytes, folder: Path) -> None:
    files = TensorFiles(_put(folder, "model.safetensors", data))
    header_problems(model().config, files.shapes())
    dtype_problems(files)


def _read_manifest(data: bytes, folder: Path) -> None:
    _put(folder, "manifest.json", data)
    check_manifest(folder)


def _read_stream(data: bytes, _: Path) -> None:
    try:
        tensors = load(data)
    except SafetensorError:
        return  # who reads a state's file refuses it
    model().new_stream(do_sample=False).load_state_dict(tensors)


def _manifest(folder: Path) -> bytes:
    _put(folder, "a.txt", b"a")
    return write_manifest(folder).read_bytes()


def _read_adapter(data: bytes, folder: Path) -> None:
    _put(folder, ADAPTER_CONFIG, data)
    read_adapter_config(folder)
    expected_weights(folder, model().config)


# kind: (a right input, its reader)
KINDS: dict[str, tuple[Callable[[Path], bytes], Callable[[bytes, Path], Any]]] = {
    "configurations": (
        lambda _: model().config.to_json_string(use_diff=False).encode(),
        lambda data, folder: MoshiTTTConfig.from_pretrained(_put(folder, "config.json", data).parent),
    ),
    "manifests": (_manifest, _read_manifest),
    "words": (lambda _: json.dumps(WORDS).encode(), _read_words),
    "recordings": (lambda _: b'{"path": "a.wav", "duration": 0.1}\n', _read_jsonl),
    "archives": (_tar, lambda data, folder: read_archive(_put(folder, "a.tar", data), folder / "out", {}, "repair", [])),
    "sounds": (_sound, lambda data, folder: in_worker(read_audio, _put(folder, "a.wav", data))),
    "weights": (_weights, _read_weights),
    "streams": (lambda _: stream_state(), _read_stream),
    "adapters": (lambda _: json.dumps(ADAPTER).encode(), _read_adapter),
    "settings": (
        lambda _: (
            b"run_dir: x\nmode: lora\nmodel: {path: tiny}\ndata: {train: dialogues/train}\nlora: {rank: 4}\noptim: {steps: 3, lr: 1e-4}\n"
        ),
        lambda data, folder: load_settings(RunConfig, _put(folder, "r.yaml", data)),
    ),
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of: a value of the JSON replaced by a hostile one, bytes changed, cut out, repeated, or put in."""
    if data[:1] == b"{" and rng.random() < 0.7:
        try:
            content = json.loads(data)
            for _ in range(rng.randint(1, 3)):
                _replace(content, rng)
            return json.dumps(content).encode()
        except ValueError:
            pass  # it is JSON no longer, and is changed as bytes
    held = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        head = rng.random() < 0.6  # where headers are
        start = rng.randrange(min(len(held), 400) if head else len(held)) if held else 0
        end = min(len(held), start + rng.choice((1, 2, 4, 8, 64)))
        how = rng.randrange(5)
        if how == 0:
            held[start:end] = rng.randbytes(end - start)
        elif how == 1:
            held[start:end] = rng.choice((b"\xff", b"\0", b"\x7f")) * (end - start)
        elif how == 2:
            del held[start:end]
        elif how == 3:
            held[start:start] = held[start:end] * rng.choice((1, 50))
        else:
            del held[start + 1 :]
    return bytes(held)


def _replace(content: Any, rng: random.Random) -> None:
    """Put something hostile somewhere."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content))) if isinstance(content, list) else []
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(content[key], (dict, list)) and content[key] and rng.random() < 0.7:
        _replace(content[key], rng)
    elif isinstance(content, dict) and rng.random() < 0.15:
        content[str(rng.choice(HOSTILE))[:50]] = content.pop(key)
    else:
        content[key] = rng.choice(HOSTILE)


def finding(kind: str, data: bytes) -> str | None:
    """What is wrong with how an input is taken; None where all is well."""
    _, read = KINDS[kind]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "in" / "here"
        folder.mkdir(parents=True)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            read(data, folder)
        except MoshiTTTError:
            pass  # refused
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]
        if (seconds := time.process_time() - start) > SECONDS:
            return f"{seconds:.1f} s"
        if (grown := 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)) > MEMORY:
            return f"{grown >> 20} MB"
        outside = [path for path in Path(root).rglob("*") if path.is_file() and not path.is_relative_to(folder)]
        return f"wrote {outside[0].name} outside" if outside else None


def attack(kind: str, number: int) -> bytes:
    """The input of this number, always the same."""
    with tempfile.TemporaryDirectory() as folder:
        right, _ = KINDS[kind]
        return mutate(right(Path(folder)), random.Random(f"{kind} {number}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=50, help="inputs a kind (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    failed = 0
    for kind in args.kinds:
        worst = 0.0
        for number in range(args.first, args.first + args.inputs):
            data, start = attack(kind, number), time.perf_counter()
            if problem := finding(kind, data):
                failed += 1
                (CORPUS / f"{kind}-{number}").write_bytes(data)
                print(f"{kind} {number}: {problem}")
            worst = max(worst, time.perf_counter() - start)
        print(f"{kind}: {args.inputs} inputs, the slowest {worst:.2f} s", flush=True)
    print(f"{failed} findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
