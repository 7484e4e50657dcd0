"""Checkpoints that are whole or not there, for any number of processes: torch.distributed.checkpoint's safetensors under a manifest.

Every rank writes what it holds, in the background, and digests it on the way; rank 0 gathers the digests, and renames the folder when all of
it is on disk. So a checkpoint is one of these folders:

    checkpoint-00000100/
    ├── manifest.json                             size and digest of every other file
    ├── state.json                                {"format", "progress", "random", "world", "run", "data", "version"}
    ├── shard-00001-model-00001-of-00002.safetensors …  weights as "name", the optimizer's entries as "name|entry"; headers hold offsets
    └── rank-0.safetensors …                      what belongs to one process: its generators, and what its lanes remember
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..common.files import check_manifest, parse_json, sha256, tensors_written, write_manifest
from ..common.run_folder import FORMAT, check_format
from ..errors_moshi_ttt import MoshiTTTError

# one process needs no other, and is told so at every save and load
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
logger = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]
PREFIX, STATE = "checkpoint-", "state.json"
MOMENT = "|"  # between the name of a weight and that of its optimizer's entry
OWN = ("random.", "memory.", "model.", "optimizer.")  # what the names of a rank's own tensors begin with
FILE_BYTES = 1 << 30  # safetensors builds a file in memory before it is written


@dataclass
class Snapshot:
    """What a run needs to go on: `shared` tensors, in place, of all ranks together; `own` tensors of this rank; and plain `state`."""

    state: dict[str, Any]
    shared: Tensors = field(default_factory=dict)
    own: Tensors = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of one run; as a context it waits at its end for the one that is being written.

    Args:
        folder: holds one folder a checkpoint, named by its step.
        keep: how many of the newest stay; the best stays besides.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        self.folder, self.keep = Path(folder), keep
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # of its own, for it is used beside training's, and on CPUs
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._writing: Any = None

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.wait()

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps of all checkpoints there are, oldest first, whole or not."""
        names = [p.name.removeprefix(PREFIX) for p in self.folder.glob(f"{PREFIX}*") if p.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, snapshot: Snapshot, best: int | None = None) -> Path:
        """Begin to write a checkpoint, every rank its part; it appears under its name only when all of it is on disk.

        When this returns, what `snapshot` holds may change again.

        Raises:
            OSError: this one cannot be begun, or the one before could not be written; the checkpoints there before are untouched.
        """
        self.wait()
        temporary = self.folder / f".{PREFIX}{step:08d}.tmp"
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            temporary.mkdir()

        def written(digests: dict[str, Any]) -> None:
            write_manifest(temporary, digests)
            self._publish(temporary, self.path(step))
            self._rotate(best)

        writer = _Writer(temporary, snapshot, self.world, written)
        with _reasons():
            self._writing = dcp.async_save(snapshot.shared, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        return self.path(step)

    def wait(self) -> None:
        """Return when no checkpoint is being written any more.

        Raises:
            OSError: the one that was could not be.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            with _reasons():
                writing.result()
        except BaseException:
            if self.rank == 0:
                self._clean()
            raise

    def newest(self) -> Path | None:
        """The newest whole checkpoint, None without any; a torn or altered one is passed over with a warning that says what is wrong.

        Every rank must call it, and reads its share of the files.

        Raises:
            ValueError: there are checkpoints, but none of them is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            problems = self.problems(self.path(step))
            if not problems:
                return self.path(step)
            logger.warning("%s is torn or altered (%s); going back to the one before it.", self.path(step), " ".join(problems))
        if steps:
            raise MoshiTTTError(
                f"None of the {len(steps)} checkpoints in {self.folder} is whole; restore one from a copy, or start with a new run_dir."
            )
        return None

    def problems(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint, the same on every rank; nothing where it is whole."""
        found = check_manifest(path, self.rank, self.world)
        if self.group is None:
            return found
        of_all: list[Any] = [None] * self.world
        dist.all_gather_object(of_all, found, group=self.group)
        return sorted({problem for problems in of_all for problem in problems})

    def read(self, path: Path) -> Snapshot:
        """What is this rank's own of a whole checkpoint, nothing where fewer ranks wrote it; `shared` stays on disk, for `restore`."""
        own = path / f"rank-{self.rank}.safetensors"
        return Snapshot(read_state(path), {}, load_file(own) if own.exists() else {})

    def _publish(self, temporary: Path, path: Path) -> None:
        if path.exists():  # one that was torn, and has now been reached again
            shutil.rmtree(path)
        os.replace(temporary, path)
        handle = os.open(self.folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    def _rotate(self, best: int | None) -> None:
        for step in self.steps()[: -self.keep]:
            if step == best:
                continue
            # aside first, so that a kill in between leaves no half checkpoint under a checkpoint's name
            aside = self.folder / f".{PREFIX}{step:08d}.old.tmp"
            try:
                os.replace(self.path(step), aside)
                shutil.rmtree(aside)
            except OSError as error:
                logger.warning("The old checkpoint %s cannot be deleted (%s); the run goes on without its room.", self.path(step), error)

    def _clean(self) -> None:
        for left in self.folder.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(left, onerror=lambda _, path, info: logger.warning("%s cannot be deleted (%s).", path, info[1]))


def read_state(path: Path) -> dict[str, Any]:
    """The plain part of a checkpoint; ValueError where a later version wrote it."""
    state: dict[str, Any] = parse_json((path / STATE).read_bytes())
    check_format(state, path / STATE)
    return state


# ---- weights and moments, in place


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, without what DDP puts before it."""
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def live_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """All trainable weights, and the optimizer's entries for them as "name|entry": themselves, no copies; this rank's shards under FSDP2."""
    tensors: Tensors = {}
    for name, parameter in trainable(model).items():
        tensors[name] = parameter.detach()
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}{MOMENT}{entry}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return tensors


@torch.no_grad()
def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, group: Any = None) -> None:
    """Read a checkpoint's weights, and where there is an optimizer its entries, in place; however many ranks wrote it and there are now.

    Raises:
        ValueError: names or shapes differ, so the checkpoint is of another model or mode; or version 0.2.0 wrote it in parts, and for
            another number of processes.
    """
    parameters = trainable(model)
    state = read_state(path)
    if "format" not in state and not (path / "model.safetensors").exists():
        _restore_parts(path, parameters, optimizer, state)
        return
    reader = dcp.HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    _check_weights({key: entry.size for key, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}, parameters)
    tensors: Tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    for key, entry in saved.items():
        name, moment, _ = key.partition(MOMENT)
        if optimizer is not None and moment and isinstance(entry, TensorStorageMetadata):
            tensors[key] = _room(parameters[name], entry)
    with _reasons():
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    if optimizer is not None:
        _set_entries(optimizer, parameters, tensors)


def _check_weights(saved: dict[str, torch.Size], parameters: dict[str, nn.Parameter]) -> None:
    known = {key for key in saved if MOMENT not in key and not key.startswith(OWN)}
    if known != set(parameters):
        odd = sorted(known ^ set(parameters))[:3]
        raise MoshiTTTError(
            f"The checkpoint's trainable weights are not this model's (for example {', '.join(odd)}); use the run's own settings."
        )
    for name, parameter in parameters.items():
        if saved[name] != parameter.shape:
            raise MoshiTTTError(f"{name} has the shape {tuple(saved[name])} in the checkpoint and {tuple(parameter.shape)} in the model.")


def _room(parameter: torch.Tensor, entry: TensorStorageMetadata) -> torch.Tensor:
    """Where an optimizer's entry is read to: placed as its parameter is; rows and columns have their own shape, and steps stay on the CPU."""
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(entry.size, dtype=dtype, device=parameter.device if entry.size else "cpu")


def _set_entries(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: Tensors) -> None:
    for key, tensor in tensors.items():
        name, moment, entry = key.partition(MOMENT)
        if moment:
            optimizer.state[parameters[name]][entry] = tensor


def _restore_parts(path: Path, parameters: dict[str, nn.Parameter], optimizer: Any, state: dict[str, Any]) -> None:
    """A sharded checkpoint of version 0.1.0 or 0.2.0: one rank's part a file, without a word of where in the whole it belongs."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if state["world"] != world:
        raise MoshiTTTError(
            f"{path} was written in parts by {state['world']} processes of version 0.2.0 or earlier, and there are {world}; go on with "
            f"{state['world']} until the next checkpoint, which any number can read."
        )
    tensors: Tensors = {}
    for key, value in load_file(path / f"rank-{rank}.safetensors").items():
        kind, _, name = key.partition(".")
        parameter = parameters.get(name.partition(MOMENT)[0])
        if kind not in ("model", "optimizer") or parameter is None:
            continue
        tensors[name] = _as_shard(parameter, value) if value.dim() > 0 else value
    _check_weights({name: tensor.shape for name, tensor in tensors.items()}, parameters)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    if optimizer is not None:
        _set_entries(optimizer, parameters, tensors)


def _as_shard(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """A rank's part as what its parameter is: a shard of the whole, or the whole."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    return DTensor.from_local(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def full_state(model: nn.Module) -> Tensors:
    """The whole state dict, copied to the CPU of rank 0; every rank must call it, and the others get nothing."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {name: tensor for name, tensor in get_model_state_dict(model, options=options).items() if isinstance(tensor, torch.Tensor)}


# ---- files


class _Writer(dcp.HuggingFaceStorageWriter):
    """torch's safetensors, and beside them the rank's own tensors and rank 0's state; `written` gets the digests of all ranks on rank 0."""

    def __init__(self, path: Path, snapshot: Snapshot, world: int, written: Callable[[dict[str, Any]], None]):
        super().__init__(str(path), fqn_to_index_mapping=_files(snapshot.shared, world), save_distributed=True)
        self.fs: _DigestedFiles = _DigestedFiles()
        self.state = json.dumps({"format": FORMAT, **snapshot.state}, indent=1)
        self.own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in snapshot.own.items()}
        self.written = written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        own = Path(self.path) / f"rank-{self.rank}.safetensors"
        with tensors_written(Path(self.path)):
            results = super().write_data(plan, planner).value()
            save_file(self.own, own)  # by itself, for a lane's memory is large and need not lie in one piece before it is written
            with own.open("rb") as file:
                os.fsync(file.fileno())
            self.fs.digests[own.name] = {"size": own.stat().st_size, "sha256": sha256(own)}
            if self.rank == 0:
                with self.fs.create_stream(Path(self.path) / STATE, "wb") as file:
                    file.write(self.state.encode())
                    file.flush()
                    os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, WriteResult(MetadataIndex(f"digests of rank {self.rank}"), 0, self.fs.digests)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks have written."""
        self.written({name: entry for of_rank in results for name, entry in of_rank[-1].storage_data.items()})


def _files(tensors: Tensors, world: int) -> dict[str, int]:
    """Which of a rank's files, numbered from 1, each tensor goes into, so that none grows much beyond FILE_BYTES."""
    places, held = {}, 0
    for name, tensor in tensors.items():
        places[name] = held // FILE_BYTES + 1
        held += tensor.numel() * tensor.element_size() // world
    return places


class _DigestedFiles(FileSystem):
    """Files that are digested as they are written."""

    def __init__(self) -> None:
        self.digests: dict[str, Any] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        file = _DigestedFile(path, mode)
        with io.BufferedWriter(file) as stream:
            yield stream
        self.digests[Path(path).name] = {"size": file.size, "sha256": file.digest.hexdigest()}


class _DigestedFile(io.FileIO):
    def __init__(self, path: str | os.PathLike[str], mode: str):
        super().__init__(path, mode)
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        count = super().write(data) or 0
        self.digest.update(memoryview(data)[:count])
        self.size += count
        return count


@contextmanager
def _reasons() -> Iterator[None]:
    """Around torch.distributed.checkpoint, which wraps what any rank raised: its reason, in our words."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


# ---- random numbers


def random_state() -> tuple[Tensors, dict[str, Any]]:
    """State of every random number generator in use: torch's as tensors, Python's and numpy's as plain values."""
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    version, internal, gauss = random.getstate()
    keys = np.random.get_state(legacy=False)
    numpy_state = {"key": keys["state"]["key"].tolist(), "pos": int(keys["state"]["pos"])}  # type: ignore[index,call-overload]
    numpy_state |= {"has_gauss": int(keys["has_gauss"]), "gauss": float(keys["gauss"])}  # type: ignore[call-overload]
    return tensors, {"python": [version, list(internal), gauss], "numpy": numpy_state}


def set_random_state(tensors: Tensors, state: dict[str, Any]) -> None:
    """The way back from `random_state`."""
    torch.set_rng_state(tensors["random.torch"].cpu())
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    saved = state["numpy"]
    key = np.array(saved["key"], dtype=np.uint32)
    np.random.set_state(("MT19937", key, saved["pos"], saved["has_gauss"], saved["gauss"]))
