"""Safetensors read and written one tensor at a time, so that a checkpoint of any size passes through a small memory."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from .files import atomic_write, inside, parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DEFAULT_SHARD_SIZE = "5GB"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# The header of a shard is written last, into room kept for it: names, shapes and places of some 1,500 tensors.
HEADER_ROOM = 1 << 18
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "500MB", "64KB" or a plain number."""
    if isinstance(text, int):
        return text
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        size = int(float(number) * units[unit]) if unit in units else int(text)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise MoshiTTTError(f"the size {text!r} is not understood; write it as 5GB, 500MB or a number of bytes")
    return size


def largest(tensor: Tensor) -> float:
    """The largest absolute value of floats; NaN or infinite where one is. `isfinite` would make copies, of hundreds of MB at 7B."""
    if tensor.numel() == 0:
        return 0.0
    low, high = (tensor if tensor.itemsize > 1 else tensor.bfloat16()).aminmax()  # torch has none for float8
    return float(torch.maximum(-low, high))


class TensorFiles:
    """The tensors of a checkpoint, read one by one: a folder with an index or a single file, or one .safetensors file.

    Raises ValueError or FileNotFoundError, naming the file, for a folder without weights, an index that names files which are missing or
    lie outside the folder, and a file that is cut off or no safetensors file.
    """

    def __init__(self, source: str | os.PathLike[str]):
        self.source = Path(source)
        self.file_of = self._locate()
        self.names = list(self.file_of)

    def _locate(self) -> dict[str, Path]:
        if self.source.is_file():
            return dict.fromkeys(self._keys(self.source), self.source)
        if (self.source / INDEX).is_file():
            return self._indexed(self.source / INDEX)
        if (self.source / SINGLE).is_file():
            return dict.fromkeys(self._keys(self.source / SINGLE), self.source / SINGLE)
        raise MoshiTTTFileNotFoundError(f"{self.source} holds no {SINGLE} and no {INDEX}{self._pickle_hint()}")

    def _pickle_hint(self) -> str:
        pickles = sorted(p.name for p in self.source.glob("*") if p.suffix in PICKLES) if self.source.is_dir() else []
        return f"; {pickles[0]} is a pickle, which is never read: save it as safetensors first" if pickles else ""

    def _indexed(self, index: Path) -> dict[str, Path]:
        try:
            table = {str(name): str(file) for name, file in parse_json(index.read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MoshiTTTError(f"{index} cannot be read ({error})") from None
        files = {file: inside(self.source, file) for file in set(table.values())}
        for path in files.values():
            present = set(self._keys(path))
            promised = {name for name, file in table.items() if files[file] == path}
            if present != promised:
                raise MoshiTTTError(f"{path.name} and {index.name} disagree on {sorted(present ^ promised)[0]}")
        return {name: files[file] for name, file in table.items()}

    @staticmethod
    def _keys(path: Path) -> list[str]:
        if not path.is_file():
            raise MoshiTTTFileNotFoundError(f"{path} is missing")
        try:
            with safe_open(path, "pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise MoshiTTTError(f"{path} is no whole safetensors file ({error})") from None

    def fetch(self, name: str) -> Tensor:
        """One tensor, mapped from disk. Its pages are given back when it is dropped, since nothing else holds the file open."""
        with safe_open(self.file_of[name], "pt") as file:
            return file.get_tensor(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, from the headers alone."""
        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self.file_of.values())):
            with safe_open(path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, it is no dict
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.fetch(name)) for name in self.names)


class _Shard:
    """One .safetensors file that grows; all its tensors have one dtype, so that each lies where its alignment asks."""

    def __init__(self, path: Path):
        self.path, self.size, self.header_size = path, 0, 64
        self.header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.file: IO[bytes] = open(path, "wb")  # noqa: SIM115, closed by close()
        self.file.write(b"\0" * (8 + HEADER_ROOM))

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        size = data.numel() * data.element_size()
        self.header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.size, self.size + size]}
        if size:
            self.file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self.size += size
        self.header_size += self._entry_size(name, tensor)

    @staticmethod
    def _entry_size(name: str, tensor: Tensor) -> int:
        """More than a tensor's entry in the header takes."""
        return len(json.dumps(name)) + 100 + 21 * tensor.dim()

    def has_room(self, name: str, tensor: Tensor, limit: int) -> bool:
        if not self.size:
            return True
        fits = self.size + tensor.numel() * tensor.element_size() <= limit
        return fits and self.header_size + self._entry_size(name, tensor) <= HEADER_ROOM

    def close(self) -> None:
        text = json.dumps(self.header, separators=(",", ":")).encode()
        self.file.seek(0)
        self.file.write(HEADER_ROOM.to_bytes(8, "little") + text.ljust(HEADER_ROOM))
        self.file.close()


class ShardWriter:
    """Writes tensors into `folder` as they come, a new shard whenever one is full, and the index at the end.

        with ShardWriter(folder, "5GB") as writer:
            writer.add(name, tensor)

    The files get transformers' names. Only the tensor at hand is in memory. Raises ValueError for a name given twice or a dtype that
    safetensors has no word for.
    """

    def __init__(self, folder: str | os.PathLike[str], max_shard_size: int | str = DEFAULT_SHARD_SIZE):
        self.folder, self.limit = Path(folder), parse_size(max_shard_size)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.open: dict[torch.dtype, _Shard] = {}
        self.shards: list[_Shard] = []
        self.names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.names:
            raise MoshiTTTError(f"{name} was written already")
        if tensor.dtype not in DTYPES:
            raise MoshiTTTError(f"{name} has dtype {tensor.dtype}, which cannot be written; convert it to one of {sorted(DTYPES.values())}")
        self.names.add(name)
        shard = self.open.get(tensor.dtype)
        if shard is None or not shard.has_room(name, tensor, self.limit):
            if shard is not None:
                shard.close()
            shard = self.open[tensor.dtype] = _Shard(self.folder / f"shard-{len(self.shards)}.part")
            self.shards.append(shard)
        shard.add(name, tensor)

    def add_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.add(name, tensor)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for shard in self.open.values():
            if error is None:
                shard.close()
            else:
                shard.file.close()
        if error is not None:
            for shard in self.shards:
                shard.path.unlink(missing_ok=True)
            return
        self._name_shards()

    def _name_shards(self) -> None:
        if len(self.shards) == 1:
            self.shards[0].path.rename(self.folder / SINGLE)
            return
        table: dict[str, str] = {}
        for number, shard in enumerate(self.shards, 1):
            name = f"model-{number:05}-of-{len(self.shards):05}.safetensors"
            shard.path.rename(self.folder / name)
            table |= dict.fromkeys((key for key in shard.header if key != "__metadata__"), name)
        total = sum(shard.size for shard in self.shards)
        atomic_write(self.folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=1))
