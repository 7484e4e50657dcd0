"""What one process of the two-node test runs under accelerate's launcher: a short run of a few thousand weights, sharded on CPUs."""

import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from training_runs import make_model, make_recordings, make_run, make_trainer

from modeling_moshi_ttt.training.checkpoint import full_state

STEPS = 6


def train(folder: Path, accelerator: Accelerator) -> None:
    """Train to the end, or go on; rank 0 writes the gathered weights."""
    run = make_run(folder / "run", data={"batch_size": 1}, optim={"steps": STEPS}, checkpoint={"every": 1})
    model = make_model()
    recordings = make_recordings(folder / f"codes{accelerator.process_index}", [21, 13, 30, 9, 17, 26], model.config)
    trainer = make_trainer(run, recordings, model, accelerator=accelerator)
    trainer.fit()
    state = full_state(trainer.model)
    if accelerator.is_main_process:
        save_file(state, folder / "weights.safetensors")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    # accelerate shards on a CPU only when it takes the processes for GPU processes
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    train(Path(sys.argv[1]), Accelerator())
