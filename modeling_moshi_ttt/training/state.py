"""Trainable weights and optimizer moments as plain named tensors, out of and into any wrapper: one process, DDP or FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors_moshi_ttt import MoshiTTTError

Tensors = dict[str, torch.Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, without what DDP puts before it."""
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def weights_and_moments(model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool, keep: bool = True) -> tuple[Tensors, Tensors]:
    """Copies on the CPU of all trainable weights, and of the optimizer's entries for them as "name|entry".

    Every rank must call it; with `sharded` each gets its own part of sharded tensors, else the whole. A rank that does not `keep` them
    helps to gather and returns nothing.
    """
    weights: Tensors = {}
    moments: Tensors = {}
    for name, parameter in trainable(model).items():
        _out(weights, name, parameter.detach(), sharded, keep)
        for entry, value in optimizer.state.get(parameter, {}).items():
            _out(moments, f"{name}|{entry}", value if isinstance(value, torch.Tensor) else torch.tensor(value), sharded, keep)
    return weights, moments


@torch.no_grad()
def load_weights_and_moments(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Tensors, moments: Tensors, sharded: bool) -> None:
    """The way back.

    Raises:
        ValueError: names or shapes differ, so the checkpoint is of another model or mode.
    """
    parameters = trainable(model)
    if set(parameters) != set(weights):
        odd = sorted(set(parameters) ^ set(weights))[:3]
        raise MoshiTTTError(
            f"The checkpoint's trainable weights are not this model's (for example {', '.join(odd)}); use the run's own settings."
        )
    for name, parameter in parameters.items():
        _into(parameter, weights[name], name, sharded)
        entries = {key.split("|")[1]: value for key, value in moments.items() if key.split("|")[0] == name}
        if entries:
            optimizer.state[parameter] = {entry: _entry(parameter, value, name, sharded) for entry, value in entries.items()}


def full_state(model: nn.Module, keep: bool = True) -> Tensors:
    """The whole state dict on the CPU, gathered from all ranks; every rank must call it, and gets nothing when it does not `keep` it."""
    state: Tensors = {}
    for name, tensor in model.state_dict().items():
        _out(state, name.removeprefix("module."), tensor.detach(), False, keep)
    return state


def _out(gathered: Tensors, name: str, tensor: torch.Tensor, sharded: bool, keep: bool) -> None:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local() if sharded else tensor.full_tensor()
    if keep:
        gathered[name] = tensor.detach().to("cpu", copy=True)


def _into(target: torch.Tensor, value: torch.Tensor, name: str, sharded: bool) -> None:
    target.copy_(_like(target, value, name, sharded))


def _entry(parameter: torch.Tensor, value: torch.Tensor, name: str, sharded: bool) -> Any:
    """An optimizer's entry placed as its parameter is; scalars such as the step stay as they are, and rows and columns have their own
    shape.
    """
    if value.dim() == 0 and parameter.dim() != 0:
        return value
    return _like(parameter, value, name, sharded) if isinstance(parameter, DTensor) else value.to(parameter.device)


def _like(target: torch.Tensor, value: torch.Tensor, name: str, sharded: bool) -> Any:
    """`value` placed as `target` is."""
    if not isinstance(target, DTensor):
        if value.shape != target.shape:
            raise MoshiTTTError(f"{name} has the shape {tuple(value.shape)} in the checkpoint and {tuple(target.shape)} in the model.")
        return value.to(target.device)
    if sharded:
        return DTensor.from_local(
            value.to(target.device), target.device_mesh, target.placements, shape=target.shape, stride=target.stride()
        )
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
