"""An accelerate configuration as the processes that it starts will see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..common.packaged import known, resolve
from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError


@dataclass(frozen=True)
class Launch:
    """How many processes, on how many machines, and how they share a model.

    kind: accelerate's distributed_type. fsdp, parallelism: fsdp_config and parallelism_config of its file.
    """

    processes: int = 1
    machines: int = 1
    kind: str = "NO"
    mixed_precision: str = "no"
    fsdp: dict[str, Any] = field(default_factory=dict)
    parallelism: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, world: int | None = None) -> Launch:
        """From a file or a packaged one's name; `world` replaces its number of processes."""
        path = launch_file(name)
        found = yaml.safe_load(path.read_text())
        processes, machines = found["num_processes"], found["num_machines"]
        mesh = dict(found.get("parallelism_config", {}))
        if world is not None:
            a_node = processes // machines
            processes, machines = world, max(1, world // a_node)
            if mesh:
                mesh["parallelism_config_dp_replicate_size"] = machines
        return cls(processes, machines, found["distributed_type"], found["mixed_precision"], found.get("fsdp_config", {}), mesh)

    def check(self) -> None:
        """ValueError where this many processes cannot share the work so."""
        if self.kind == "NO" and self.processes > 1:
            raise MoshiTTTError(
                f"`num_processes={self.processes}` needs a launch file for several: ddp (adapters) or fsdp2_8gpu (any mode), not one_gpu."
            )
        shard, copies = (int(self.parallelism.get(f"parallelism_config_dp_{name}_size", 1)) for name in ("shard", "replicate"))
        if self.parallelism and shard * copies != self.processes:
            raise MoshiTTTError(
                f"`num_processes={self.processes}` must be parallelism_config_dp_shard_size x parallelism_config_dp_replicate_size = "
                f"{shard} x {copies}; change one of them in the launch file."
            )

    @property
    def sharded(self) -> bool:
        return self.kind == "FSDP"

    def environment(self) -> dict[str, str]:
        """What `accelerate launch` would set for rank 0."""
        ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": self.processes} if self.sharded else {}
        fsdp = {"ACCELERATE_USE_FSDP": True} | {key.upper(): value for key, value in self.fsdp.items()} if self.sharded else {}
        if "FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP" in fsdp:
            fsdp["FSDP_TRANSFORMER_CLS_TO_WRAP"] = fsdp.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP")
        mesh = {"ACCELERATE_USE_PARALLELISM_CONFIG": True} if self.parallelism else {}
        mesh |= {key.upper(): value for key, value in self.parallelism.items()}
        return {name: str(value) for name, value in {"ACCELERATE_MIXED_PRECISION": self.mixed_precision, **ranks, **fsdp, **mesh}.items()}


def launch_file(name: str) -> Path:
    """The accelerate configuration of this path or packaged name; FileNotFoundError with what there is."""
    path = Path(resolve("accelerate", name))
    if not path.is_file():
        raise MoshiTTTOSError(
            f"--launch is {name}: there is no such file, and the package holds none of this name; {known('accelerate', name)}"
        )
    return path
