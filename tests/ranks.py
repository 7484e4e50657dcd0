"""Several processes on one machine: forked, so that nothing is imported twice, and joined by gloo."""

import os
import socket
import sys
import traceback
from collections.abc import Callable

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "MoshiTTTDecoderLayer,DepthDecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def run_ranks(world: int, kind: str, work: Callable[[int], None]) -> None:
    """Run `work(rank)` in `world` processes under "ddp" or "fsdp"; a failure in one of them fails the caller."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(rank, world, port, kind, work) for rank in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * world, codes


def _fork(rank: int, world: int, port: int, kind: str, work: Callable[[int], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        if kind == "fsdp":
            # accelerate shards on a CPU only when it takes the processes for GPU processes
            os.environ.update(FSDP | {"ACCELERATE_TORCH_DEVICE": "cpu"})
            PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        else:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        work(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
