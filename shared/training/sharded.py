"""Fully sharded training: the frozen and the trained tensors of a model divided among processes (Zhao et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from shared.errors import RequestError


class Sharded(DDPStrategy):
    """Processes as in DDP, but each holds its part of every parameter, by torch's ``fully_shard``.

    A block of the backbone is whole only while it runs, all else while a step runs. (Lightning's own strategies for it
    refuse a CPU, or wrap modules and swap parameters where hosts read them.) Checkpoints hold whole tensors, so they
    are those of one process.
    """

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.precision_plugin.convert_module(self._task)
            self._shard()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self) -> None:
        """Blocks first, then what is left; each is moved to the device as it is divided."""
        task = self._task
        if scalars := [name for name, p in task.named_parameters() if not p.ndim]:
            raise RequestError(f"trainer.strategy 'fsdp' cannot divide the scalar parameter {scalars[0]}: use 'ddp'")
        mesh = torch.distributed.device_mesh.init_device_mesh(self.root_device.type, (self.world_size,))
        blocks = dict.fromkeys(site.module for site in task.model.sites() if site.role == "block")
        with task.model.disabled():  # torch reads parameters by name: it shall find the frozen ones
            parts: list[Any] = [
                fully_shard(module, mesh=mesh, reshard_after_forward=True) for module in (*blocks, task)
            ]
            for part in parts:  # the first time, torch looks at all parameters again
                part.unshard()
                part.reshard()
            task.to(self.root_device)  # what is no parameter, such as metrics
        self.model = task

    @property
    def _task(self) -> Any:
        return self.lightning_module

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._whole("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._whole("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._whole("test_step", *args, **kwargs)

    def _whole(self, step: str, *args: Any, **kwargs: Any) -> Any:
        """A step as the forward of the task, which makes its parameters whole; buffers are process 0's, as in DDP."""
        model = self._task.model
        for tensor in model.trained_state().values():
            if not isinstance(tensor, DTensor):
                torch.distributed.broadcast(tensor, 0)
        try:
            return self._forward_redirection(self._task, self._task, step, *args, **kwargs)
        finally:
            model.state.folds.clear()  # a gathered tensor changes without telling

    def teardown(self) -> None:
        """As Lightning's, but the model stays where its parts are."""
        for plugin in (self.cluster_environment, self.precision_plugin, self.accelerator):
            assert plugin is not None
            plugin.teardown()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return tree_map(whole, super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                number: {name: like(value, parameters[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": moments})


def whole(value: Any) -> Any:
    """A divided tensor put together, in all processes at once; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Any, other: Any) -> Any:
    """A whole tensor divided as ``other`` of the same shape is; anything else as it is."""
    if not (isinstance(value, Tensor) and isinstance(other, DTensor)) or value.shape != other.shape:
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
