"""What a recipe takes, without a card: the trainer's own step over fake tensors, sharded by FSDP2 as accelerate applies it.

Shapes, dtypes, and the order of operations are those of a real step; nothing is computed. What no operation shows (the CUDA context, the
allocator's waste, how near a kernel comes to the roofline) is not in it; `cards` says what is added for the first two.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from .. import frames_moshi_ttt, ttt_kernels, ttt_ops
from ..configuration_moshi_ttt import MoshiTTTConfig
from ..modeling_moshi_ttt import MoshiTTTForConditionalGeneration
from . import setup
from . import trainer as trainer_module
from .cards import CARDS, Card, seconds
from .checkpoint import FILE_BYTES
from .launch import Launch
from .ledger import KINDS, Cost, Ledger
from .run_config import RunConfig
from .trainer import Trainer
from .windows import Batch, Step

MOSHI_7B = ("kmhf/hf-moshiko", "kmhf/hf-moshika")  # of the shapes that are the configuration's defaults: nothing needs to be fetched
MICRO_BATCHES = 2  # from the second on, gradients are there


# D x F products of one mini-batch in each kernel; the others are smaller by F / b.
PRODUCTS = {"mlp_forward": 8, "mlp_backward": 20, "linear_forward": 3, "linear_backward": 8}


@dataclass(frozen=True)
class Simulation:
    """What one rank of a run needs; bytes, and seconds of a step.

    peak: of all tensors on the card, and `by_kind` what they are then (of `ledger.KINDS`). host_start, host_save: of a node's memory, to
    load the model and to write a checkpoint. checkpoint: on disk, over all ranks. staged: copied from a card while training stands.
    flops, moved, sent: of a step on one card, its memory and its links. step_seconds: by the roofline, of each card on which TTT runs
    alike. tokens: of a step over all ranks.
    """

    peak: int
    by_kind: dict[str, int]
    host_start: int
    host_save: int
    checkpoint: int
    staged: int
    flops: int
    moved: int
    sent: int
    tokens: int
    kernels: bool
    step_seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def simulate(run: RunConfig, launch: Launch | None = None, card: Card = CARDS["H100"], config: MoshiTTTConfig | None = None) -> Simulation:
    """One step of this run on one of its ranks, as after others.

    Args:
        launch: how many processes and how they share the model; one without.
        card: decides whether the TTT kernels run, or the scan in torch.
        config: of the model, in place of the one at run.model.path.

    Raises:
        ValueError: settings that `moshi-ttt train` would refuse, or processes that cannot share the work so.
    """
    launch = launch or Launch()
    launch.check()
    run = replace(run, trackers=[], data=replace(run.data, own_noise=0.0, user_noise=0.0, text_noise=0.0, user_code_noise=0.0))
    config = config or model_config(run)
    model = _adapted(config, run)
    ledger = Ledger()
    with ExitStack() as stack:
        stack.enter_context(_environment(launch))
        accelerator = setup.make_accelerator(run)
        for context in (FakeTensorMode(), ledger, _stand_ins(ledger, config, card)):
            stack.enter_context(context)
        _materialize(model)
        trainer = _Trainer(run, model, None, None, accelerator)  # type: ignore[arg-type]
        trainer.follow(ledger)
        count = run.data.accumulation if trainer.memory.caches else min(run.data.accumulation, MICRO_BATCHES)
        gc.collect()  # the weights before they were sharded
        trainer.make_moments()
        trainer.follow(ledger)
        ledger.forget_peak()
        step = Step([[trainer.batch() for _ in range(run.data.tbptt_windows)] for _ in range(count)], {})
        trainer._step(step, 0.0, 0.0)
        trainer.follow(ledger)
        return _result(trainer, ledger, count, launch, config, card)


def model_config(run: RunConfig) -> MoshiTTTConfig:
    """The configuration of the run's model; of Kyutai's 7B without asking the Hub."""
    if run.model.path in MOSHI_7B:
        return MoshiTTTConfig(**run.model.config_changes)
    return setup.model_config(run.model)


def kernels_take(config: MoshiTTTConfig, card: Card) -> bool:
    """Whether the TTT layers run in Triton on this card."""
    dim, b = config.ttt_head_dim, config.ttt_mini_batch_size
    fits = dim in ttt_kernels.HEAD_DIMS and b <= ttt_kernels.MAX_MINI_BATCH and ttt_kernels._too_large(b, dim, card.shared) is None
    return fits and config.ttt_implementation in ("auto", "triton")


def _adapted(config: MoshiTTTConfig, run: RunConfig) -> nn.Module:
    """The model in the run's mode, without memory."""
    with torch.device("meta"):
        model = MoshiTTTForConditionalGeneration(config).to(getattr(torch, run.model.dtype))
        if run.model.activation_checkpointing:
            model.activation_checkpointing_enable()
        adapted: nn.Module = setup.adapt(model, run)
    return adapted


def _materialize(model: nn.Module) -> None:
    """Fake tensors in place of those on the meta device, which autocast and attention would pass by."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
                if old is not None:
                    table[name] = made[id(old)]  # type: ignore[assignment]


class _Trainer(Trainer):
    """A trainer of batches that say nothing but their shapes."""

    def _read(self, train: Any) -> None:
        self.micro_costs: Counter[Cost] = Counter()
        for cache in self.memory.caches:
            cache.fill(self.bare)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.ledger.mark([p.grad], "gradients"))

    def make_moments(self) -> None:
        """As after the first step."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def batch(self) -> Batch:
        """A micro-batch of one window."""
        rows, frames, codebooks = self.run.data.batch_size, self.window, self.config.num_codebooks
        text, codes = torch.zeros(rows, frames, dtype=torch.long), torch.zeros(rows, codebooks, frames, dtype=torch.long)
        labels = codes.repeat(1, self.config.num_predicted_codebooks // codebooks, 1)
        return Batch(text, codes, codes, text, labels, torch.ones_like(text), torch.zeros(rows, dtype=torch.bool), [])

    def follow(self, ledger: Ledger) -> None:
        """Tell the ledger what is what."""
        self.ledger = ledger
        ledger.mark(self.model.parameters(), "weights")
        ledger.mark(self.model.buffers(), "buffers")
        ledger.mark((x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)), "moments")
        self._mark_states()

    def _mark_states(self) -> None:
        for cache in self.memory.caches:
            cache.state.map(lambda x: self._marked(x, "states"))

    def _marked(self, x: Tensor, kind: str) -> Tensor:
        self.ledger.mark([x], kind)
        return x

    def _micro_batch(self, *arguments: Any) -> Tensor:
        before, backward = self.ledger.costs.copy(), self.accelerator.backward

        def with_states(*loss: Any) -> None:
            self._mark_states()  # forward has put new ones in place
            backward(*loss)

        with mock.patch.object(self.accelerator, "backward", with_states):
            result = super()._micro_batch(*arguments)
        self.micro_costs = self.ledger.costs - before
        self.follow(self.ledger)
        return result


# --- in place of what needs numbers, a card or other processes -------------------------------------------------------------------------


@contextmanager
def _environment(launch: Launch) -> Iterator[None]:
    """As in rank 0 of the launched processes, whose collectives move nothing."""
    states = (AcceleratorState, PartialState, GradientState)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, launch.environment()))
        for state in states:
            stack.callback(state._shared_state.update, dict(state._shared_state))
            stack.callback(state._reset_state)
            state._reset_state()
        if launch.sharded:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", rank=0, world_size=launch.processes, store=FakeStore())
            stack.callback(dist.destroy_process_group)
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            backend = lambda *_, **__: ("fake", DistributedType.MULTI_GPU)  # noqa: E731  # accelerate shards on GPUs alone
            stack.enter_context(mock.patch.object(PartialState, "_prepare_backend", backend))
            mesh = init_device_mesh("cpu", (launch.processes,))  # as fully_shard's own, which fake tensors cannot make
            stack.enter_context(mock.patch.object(_fully_shard, "_init_default_mesh", return_value=mesh))
        else:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        yield


@contextmanager
def _stand_ins(ledger: Ledger, config: MoshiTTTConfig, card: Card) -> Iterator[None]:
    """Kernels are counted instead of launched, and no token is looked at."""
    with ExitStack() as stack:
        for place, name, other in (
            (frames_moshi_ttt, "_check_range", lambda *_: None),
            (ttt_kernels, "_launch", partial(_counted, ledger)),
            (ttt_kernels, "_multiprocessors", lambda _: card.multiprocessors),
            (ttt_ops, "_choose_way", lambda *_: "triton" if kernels_take(config, card) else "scan"),
            (trainer_module, "CheckpointFolder", mock.Mock()),
            (nn.Module, "to", lambda self, *_, **__: self),  # it is where it should be, and a fake parameter cannot be exchanged
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", _uncounted(ledger)),
            (FakeTensor, "data_ptr", lambda self: self.untyped_storage()._cdata),  # by which accelerate tells weights apart
        ):
            stack.enter_context(mock.patch.object(place, name, other))
        yield


def _uncounted(ledger: Ledger) -> Callable[..., Any]:
    """How DTensor finds the shape of a whole result: with fake tensors of its own, which no card holds."""
    real = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate(*arguments: Any) -> Any:
        ledger.paused = True
        try:
            return real(*arguments)
        finally:
            ledger.paused = False

    return propagate


def _counted(
    ledger: Ledger, name: str, q: Tensor, programs: int, arguments: list[Tensor], ranges: list[int], eps: float, **how: Any
) -> None:
    """What `ttt_kernels._launch` would have a card do."""
    b, _, dim = q.shape[2:]
    mixer, half = name.split("_")
    width = 4 * dim if mixer == "mlp" else dim
    padded, mini_batches = ttt_kernels._padded(b), ranges[2]
    times = 3 if ttt_kernels._precision(q) == "tf32x3" else 1
    flops = 2 * padded * dim * width * PRODUCTS[name] * times * programs * mini_batches
    tokens = programs * mini_batches * b * dim * q.element_size() * (4 if half == "forward" else 10)
    weights = programs * (2 * dim * width if mixer == "mlp" else dim * width) * 4
    fast = 4 if mixer == "mlp" else 2
    if half == "forward":
        states = -(-mini_batches // ranges[7]) if how["SAVE"] else 1
        if how["QUERY"] and how["SAVE"]:
            ledger.mark(arguments[-fast:], "states")
    else:
        states = mini_batches
    ledger.spend(Cost(flops, tokens + (1 + states) * weights, "float32", programs))


# --- results ----------------------------------------------------------------------------------------------------------------------------


def _result(trainer: _Trainer, ledger: Ledger, simulated: int, launch: Launch, config: MoshiTTTConfig, card: Card) -> Simulation:
    run, parameters = trainer.run, list(trainer.model.parameters())
    by_kind, peak = Counter(ledger.at_peak), ledger.peak
    trained = [p for p in parameters if p.requires_grad]
    if launch.kind == "MULTI_GPU":  # DDP keeps gradients in buckets, beside the weights' own unless these are views of them
        views = getattr(trainer.accelerator.ddp_handler, "gradient_as_bucket_view", False)
        buckets = 0 if views else sum(p.nbytes for p in trained)
        by_kind["buffers"] += buckets
        peak += buckets
    moments = [x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    carried = ledger.held["states"]
    whole = sum(x.numel() * x.element_size() for x in (*trained, *moments))  # over all ranks: a DTensor's numel is the whole's
    local = _local_bytes((*trained, *moments)) + carried
    more = run.data.accumulation - simulated
    costs = ledger.costs + Counter({cost: count * more for cost, count in trainer.micro_costs.items()})
    a_node = launch.processes // launch.machines
    held = sum(p.numel() * p.element_size() for p in parameters)
    readers = 1 if launch.fsdp.get("fsdp_cpu_ram_efficient_loading") else a_node  # the others of a node are sent their shards
    kernels = kernels_take(config, card) and bool(config.ttt_layers)
    alike = [c for c in CARDS.values() if not config.ttt_layers or kernels_take(config, c) == kernels_take(config, card)]
    tf32 = torch.get_float32_matmul_precision() != "highest"
    frames = trainer.window * run.data.batch_size * run.data.tbptt_windows * run.data.accumulation * launch.processes
    sent = sum(ledger.sent.values()) * run.data.accumulation // simulated
    return Simulation(
        peak=peak,
        by_kind={kind: by_kind[kind] for kind in KINDS},
        host_start=held * readers,
        host_save=(local + min(local, FILE_BYTES)) * a_node,  # every process's copy, and the file that it builds
        checkpoint=whole + carried * launch.processes,
        staged=local,
        flops=sum(cost.flops * count for cost, count in costs.items()),
        moved=sum(cost.bytes * count for cost, count in costs.items()),
        sent=sent,
        tokens=frames * trainer.tokens_per_frame,
        kernels=kernels,
        step_seconds={c.name: max(seconds(costs, c, tf32), sent / c.link) for c in alike},
    )


def _local_bytes(tensors: Any) -> int:
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)
