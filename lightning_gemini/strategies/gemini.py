"""The strategy: DeepSpeed's ZeRO under Lightning, on GPU or CPU, with its state kept in the cluster's memory."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_gemini.callbacks import data_position
from lightning_gemini.callbacks.gemini_checkpoint import GeminiCheckpoint
from lightning_gemini.callbacks.job_state import JobState
from lightning_gemini.callbacks.lightning_state import StateOnDemand
from lightning_gemini.config import CheckpointConfig
from lightning_gemini.strategies import devices

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.strategies.registry import _StrategyRegistry

_DEFAULTS = CheckpointConfig()


class GeminiStrategy(DeepSpeedStrategy):
    """Checkpoints into memory every iteration, and resumes from it by itself.

    Args:
        *args: Arguments of :class:`~lightning.pytorch.strategies.DeepSpeedStrategy`; ``stage`` is 3 by default.
        replicas: Copies of every rank's state, its own included; by default 2, or 1 on a single machine.
        placement: Who holds whose copies: ``"mixed"``, ``"group"``, ``"ring"``, ``"compact"`` or ``"rack"``.
        domains: Failure domain of every machine for ``"rack"``; default: their ``LIGHTNING_GEMINI_DOMAIN``.
        checkpoint_every: Optimizer steps between two versions; 0 turns checkpoints and restoring off.
        commit_wait_s: Longest wait of a step for its predecessor's replicas before a version is skipped.
        persist_dir: Directory of the persistent tier, shared by all machines; by default inside the run directory, or
            under ``Trainer(default_root_dir=...)``.
        persist_every_s: Seconds between two persistent checkpoints; 0 turns that tier off.
        transport: How copies travel; ``"tcp"`` from agent to agent, ``"p2p"`` over torch.distributed.
        schedule: When they travel: ``"interleaved"`` in the network's idle spans, ``"unpipelined"``, ``"naive"``,
            ``"eager"``, ``"blocking"``, or ``"none"`` for no checkpoints.
        profile_iterations: Iterations that a profile of the idle spans takes.
        overhead_budget: Part by which checkpoints may lengthen an iteration before they are taken less often.
        buffer_bytes: Most bytes in flight; by default what suits the link.
        sub_buffers: Chunks that these are cut into.
        safety: Part of an idle span that is used.
        idle_timeout_s: Without ``lightning-gemini run``: seconds after which an unused agent frees the memory.
        **kwargs: See ``*args``.

    Raises:
        ConfigurationError: A setting is impossible; always before training starts.
    """

    def __init__(
        self,
        *args: Any,
        replicas: int | None = None,
        placement: str = _DEFAULTS.placement,
        domains: Sequence[str] | None = None,
        checkpoint_every: int = _DEFAULTS.checkpoint_every,
        commit_wait_s: float = _DEFAULTS.commit_wait_s,
        persist_dir: str | os.PathLike[str] | None = None,
        persist_every_s: float = _DEFAULTS.persist_every_s,
        transport: str = _DEFAULTS.transport,
        schedule: str = _DEFAULTS.schedule,
        profile_iterations: int = _DEFAULTS.profile_iterations,
        overhead_budget: float = _DEFAULTS.overhead_budget,
        buffer_bytes: int | None = _DEFAULTS.buffer_bytes,
        sub_buffers: int = _DEFAULTS.sub_buffers,
        safety: float = _DEFAULTS.safety,
        idle_timeout_s: float = _DEFAULTS.idle_timeout_s,
        **kwargs: Any,
    ) -> None:
        if len(args) < 3:  # DeepSpeedStrategy's third positional argument
            kwargs.setdefault("stage", 3)
        super().__init__(*args, **kwargs)
        self.checkpoint_config = CheckpointConfig(
            replicas=replicas,
            placement=placement,
            domains=None if domains is None else tuple(domains),
            checkpoint_every=checkpoint_every,
            commit_wait_s=commit_wait_s,
            persist_dir=Path(persist_dir) if persist_dir is not None else None,
            persist_every_s=persist_every_s,
            transport=transport,
            schedule=schedule,
            profile_iterations=profile_iterations,
            overhead_budget=overhead_budget,
            buffer_bytes=buffer_bytes,
            sub_buffers=sub_buffers,
            safety=safety,
            idle_timeout_s=idle_timeout_s,
        )
        self.job_state: JobState | None = None
        self._snapshotting = False

    # -- DeepSpeed on the CPU --------------------------------------------------------------------------------------

    @property
    def _on_cuda(self) -> bool:
        return isinstance(self.accelerator, CUDAAccelerator)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices of this machine."""
        return super().parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, chosen: list[torch.device] | None) -> None:
        DeepSpeedStrategy.parallel_devices.fset(self, devices.devices_of_machine(chosen))  # type: ignore[attr-defined]

    @property
    def num_nodes(self) -> int:
        """The number of machines."""
        return super().num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        DeepSpeedStrategy.num_nodes.fset(self, devices.machines_of_job(num_nodes))  # type: ignore[attr-defined]

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        return super().root_device if self._on_cuda else torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        """Accept the CPU too, and add the callback if the user did not."""
        assert self.lightning_module is not None
        callbacks: list[Any] = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, GeminiCheckpoint) for callback in callbacks):
            callbacks.append(GeminiCheckpoint())
        if self._on_cuda:
            super().setup_environment()
        else:
            devices.use_cpu_in_deepspeed()
            super(DeepSpeedStrategy, self).setup_environment()  # skips only the check for CUDA

    def setup_distributed(self) -> None:
        """Join the other ranks, and leave them in order at exit."""
        devices.silence_deprecated_collectives()
        super().setup_distributed()
        atexit.register(devices.leave_process_group)

    # -- memory ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        """Initialise the engine, then look for this job's state in memory and in the persistent tier."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING or not self.checkpoint_config.enabled:
            return
        identity = devices.identity_of(self.global_rank, self.local_rank, self.world_size, self.num_processes)
        self.job_state = JobState(self.checkpoint_config, self.deepspeed_engine, identity, trainer.default_root_dir)
        checkpoint = self.job_state.find()
        if checkpoint is not None:
            # Lightning restores from it as from any checkpoint, unless the user's `ckpt_path` replaces it.
            trainer._checkpoint_connector._loaded_checkpoint = checkpoint

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load the user's ``ckpt_path``; it wins over memory, except when this run itself is being carried on."""
        carried_on = self.job_state.yield_to(checkpoint_path) if self.job_state else None
        return carried_on or data_position.put_back_positions(super().load_checkpoint(checkpoint_path, *args, **kwargs))

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint of the user's so that DeepSpeedStrategy without this package reads it too."""
        if self.job_state is not None:
            self.job_state.wait_until_read()
        super().save_checkpoint(data_position.set_aside_positions(checkpoint), *args, **kwargs)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the engine's state from the found shard when it is that checkpoint that Lightning restores."""
        if self.job_state and self.job_state.is_found(checkpoint):
            return self.job_state.restore()
        return super().load_model_state_dict(checkpoint, strict=strict)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state; a snapshot takes it from the engine, and has it only for hooks that look into it."""
        return (
            StateOnDemand(super().lightning_module_state_dict)
            if self._snapshotting
            else super().lightning_module_state_dict()
        )

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state; a snapshot takes it from the engine instead."""
        if self._snapshotting:
            return {}
        if self.job_state is not None:
            self.job_state.wait_until_read()
        return super().optimizer_state(optimizer)

    def process_dataloader(self, dataloader: object) -> object:
        """Make training loaders go on exactly where they were."""
        dataloader = super().process_dataloader(dataloader)
        assert self.lightning_module is not None
        if not (trainer := self.lightning_module.trainer).training:
            return dataloader
        if warning := data_position.exactness_warning(dataloader):
            rank_zero_warn(warning)
        return data_position.make_resumable(
            dataloader, lambda: data_position.batches_in_flight(trainer), lambda: data_position.epoch_state(trainer)
        )

    def teardown(self) -> None:
        """Let go of the agent."""
        if self.job_state is not None:
            self.job_state.close()
        self.job_state = None
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Make ``gemini`` and its stages known to the Trainer."""
        stages: dict[str, dict[str, Any]] = {
            "gemini": {"stage": 3},
            **{f"gemini_stage_{stage}": {"stage": stage} for stage in (1, 2, 3)},
            "gemini_stage_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
        }
        for name, arguments in stages.items():
            description = f"DeepSpeed ZeRO-{arguments['stage']} with in-memory checkpoints"
            strategy_registry.register(name, cls, description=description, **arguments)
