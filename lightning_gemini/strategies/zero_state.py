"""What a ZeRO rank must keep to go on exactly, in DeepSpeed's own terms.

A rank's shard holds the very dictionaries that DeepSpeed would write to this rank's checkpoint files, so that the
persistent tier is an ordinary DeepSpeed checkpoint and restoring goes through DeepSpeed's own ``load_state_dict``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_gemini.dataplane import shard
from lightning_gemini.errors import ConfigurationError, LayoutMismatchError
from lightning_gemini.strategies.module_state import ModuleState

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_FIXED = "zero_stage", "param_slice_mappings"  # of the optimizer's state: pickled when they change
_PACKED = " packed"  # beside names, none of which has a space


def require_supported(config: dict[str, Any]) -> None:
    """Refuse what cannot be checkpointed from memory, before DeepSpeed looks at it.

    Args:
        config: DeepSpeed's configuration.

    Raises:
        ConfigurationError: ZeRO is off, state lives on NVMe, or elastic checkpoints are on.
    """
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or not int(zero.get("stage") or 0):
        raise ConfigurationError("strategy 'gemini' needs ZeRO stage 1, 2 or 3; use GeminiStrategy(stage=...)")
    if "nvme" in (_device(zero.get("offload_optimizer")), _device(zero.get("offload_param"))):
        raise ConfigurationError(
            "optimizer or parameter offload to NVMe cannot be checkpointed from memory; offload to 'cpu' instead"
        )
    if zero.get("elastic_checkpoint"):
        raise ConfigurationError(
            "zero_optimization.elastic_checkpoint must be off: it needs every rank's state on every rank"
        )


def _device(offload: Any) -> str:
    device = offload.get("device") if isinstance(offload, dict) else None
    return str(getattr(device, "value", device))


class _OptimizerNumbers(NamedTuple):
    """What of an optimizer's state may change while the rest of it stays.

    Attributes:
        groups: Its parameter groups: a user's hook may set a learning rate at any time.
        overflow: Whether the last step was skipped; known again before the next is taken.
        loss_scaler: Pickled; changes along with it.
    """

    groups: list[dict[str, Any]]
    overflow: bool
    loss_scaler: bytes


class ZeroState:
    """Captures and restores one rank's ZeRO state.

    Args:
        engine: The initialised engine.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self.partitioned = bool(engine.zero_optimization_partition_weights())
        self._constant = shard.pack(self._constant_state())
        self._module = ModuleState(engine.module)
        self._packed_of: Mapping[str, torch.Tensor] | None = None
        self._packed = b""
        self._frozen: dict[str, torch.nn.Parameter] = {}
        self._frozen_of: tuple[Any, list[bool]] | None = None
        self._fixed: dict[str, tuple[Any, dict[str, Any], bytes]] = {}

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that mutates the state; its step hooks fire once a real step."""
        optimizer: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return optimizer

    @property
    def master_bytes(self) -> int:
        """Bytes of this rank's fp32 master weights."""
        optimizer = self._engine.optimizer
        name = "fp32_partitioned_groups_flat" if self.partitioned else "single_partition_of_fp32_groups"
        return sum(group.numel() * group.element_size() for group in getattr(optimizer, name))

    @property
    def step(self) -> int:
        """Optimizer steps completed, skipped ones included: the version."""
        return int(self._engine.global_steps)

    @property
    def at_boundary(self) -> bool:
        """Whether no gradients are half accumulated."""
        return int(self._engine.micro_steps) % int(self._engine.gradient_accumulation_steps()) == 0

    def capture(self) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
        """References to everything that this rank would write to disk.

        Returns:
            What reads the state that only an optimizer step changes, before the next one and on any thread; it raises
            StateChangedError if the model has changed since the capture before, and the next capture holds all again.
            And state that a forward pass may change, as it is now.
        """
        engine = self._engine
        parameters, others = self._module.read()
        volatile = {
            "buffers": others,
            "counters": {name: getattr(engine, name) for name in _COUNTERS},
            "module_order": self._module.order,
        }
        return partial(self._read_stable, parameters, self._optimizer_numbers()), volatile

    def _read_stable(self, parameters: Mapping[str, torch.Tensor], numbers: _OptimizerNumbers) -> dict[str, Any]:
        self._module.verify()
        return {
            "optimizer": self._optimizer_state(numbers),
            "parameters": self._written(parameters),
            "frozen": self._frozen_fragments() if self.partitioned else None,
            "constant": self._constant,
        }

    def _optimizer_numbers(self) -> _OptimizerNumbers:
        """What of the optimizer's state may change before it takes its next step, as it is now."""
        optimizer = self._engine.optimizer
        scaler = self._fixed_part("loss_scaler", optimizer.loss_scaler)
        return _OptimizerNumbers([*map(dict.copy, self.base_optimizer.param_groups)], optimizer.overflow, scaler)

    def _optimizer_state(self, numbers: _OptimizerNumbers) -> dict[str, Any]:
        state: dict[str, Any] = self._engine.optimizer.state_dict()
        base = next(part for part in state.values() if isinstance(part, dict) and "param_groups" in part)
        for group, then in zip(base["param_groups"], numbers.groups, strict=True):
            group.update((name, value) for name, value in then.items() if name != "params")
        state["overflow"] = numbers.overflow
        packed = {name: self._fixed_part(name, state[name]) for name in _FIXED if name in state}
        packed["loss_scaler"] = numbers.loss_scaler
        state[_PACKED] = packed
        return {name: value for name, value in state.items() if name not in packed}

    def _fixed_part(self, name: str, part: Any) -> bytes:
        values = _values(part)
        known = self._fixed.get(name)
        if known is None or known[0] is not part or known[1] != values:
            known = self._fixed[name] = part, values, shard.pack(part)
        return known[2]

    def _written(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
        if self.partitioned:  # the weights are in the optimizer's partitions; DeepSpeed keeps empty placeholders
            if parameters is not self._packed_of:
                self._packed_of = parameters
                self._packed = shard.pack({name: value.dtype for name, value in parameters.items()})
            return {_PACKED: self._packed}
        return dict(parameters) if dist.get_rank() == 0 else None

    def _frozen_fragments(self) -> dict[str, torch.Tensor]:
        """This rank's parts of the parameters that the optimizer does not have, as the engine would save them."""
        known = self._module.parameters
        trained = [parameter.requires_grad for parameter in known.values()]
        if self._frozen_of is None or self._frozen_of[0] is not known or self._frozen_of[1] != trained:
            self._frozen = self._engine._get_zero_frozen_param_attributes(lambda parameter: parameter)
            self._frozen_of = known, trained
        return {name: _fragment(parameter) for name, parameter in self._frozen.items()}

    @staticmethod
    def files(stable: dict[str, Any], volatile: dict[str, Any], client_state: dict[str, Any]) -> dict[str, Any]:
        """A restored or captured shard as the files of a DeepSpeed checkpoint directory: name to content."""
        constant = shard.unpack(stable["constant"])
        optimizer = _complete(stable["optimizer"])
        files = {constant["optimizer_file"]: {"optimizer_state_dict": optimizer, **constant["versions"]}}
        if stable["parameters"] is not None:
            module = {**_tensors(stable["parameters"]), **volatile["buffers"]}
            ordered = {name: module[name] for name in volatile["module_order"]}
            frozen = stable["frozen"]
            if frozen is None and (names := constant["model_states"]["frozen_param_shapes"]) is not None:
                frozen = {name: module[name] for name in names}
            files[constant["model_file"]] = {
                **constant["model_states"],
                "module": ordered,
                "frozen_param_fragments": frozen,
                **volatile["counters"],
                **client_state,
            }
        return files

    def check(self, stable: dict[str, Any]) -> None:
        """Compare a stored shard with this process's model.

        Raises:
            LayoutMismatchError: They differ; the message names the first difference.
        """
        stored, here = shard.unpack(stable["constant"])["fingerprint"], self._fingerprint()
        for name, expected in stored.items():
            if here[name] != expected:
                raise LayoutMismatchError(
                    f"the stored state does not fit this run: {name} was {_first_difference(expected, here[name])}; "
                    "go back to that model, or discard the stored state "
                    "('lightning-gemini stop --agents' for memory, another persist_dir for the persistent tier)"
                )

    def restore(self, stable: dict[str, Any], volatile: dict[str, Any]) -> None:
        """Load a rank's shard into the engine. Collective: every rank calls it with the same version."""
        engine = self._engine
        prologue = getattr(engine.optimizer, "checkpoint_event_prologue", None)
        if prologue is not None:
            prologue()
        parameters = _tensors(stable["parameters"] or {})
        if not self.partitioned:
            parameters = self._broadcast_parameters(parameters)
        engine.load_module_state_dict(
            {"module": {**parameters, **volatile["buffers"]}, "frozen_param_fragments": stable["frozen"]}, strict=True
        )
        for name, value in volatile["counters"].items():
            setattr(engine, name, value)
        rank = dist.get_rank(group=engine.optimizer.dp_process_group)
        states: list[Any] = [None] * dist.get_world_size(group=engine.optimizer.dp_process_group)
        states[rank] = _complete(stable["optimizer"])
        engine.optimizer.load_state_dict(
            state_dict_list=states,
            load_optimizer_states=True,
            load_from_fp32_weights=engine.zero_load_from_fp32_weights(),
        )
        epilogue = getattr(engine.optimizer, "checkpoint_event_epilogue", None)
        if epilogue is not None:
            epilogue()

    def _broadcast_parameters(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Stages 1 and 2 keep the full weights in rank 0's shard alone; hand them to everybody."""
        device = self._engine.device
        received: dict[str, torch.Tensor] = {}
        for name, live in self._module.read()[0].items():
            value = parameters[name].to(device) if dist.get_rank() == 0 else torch.empty_like(live)
            dist.broadcast(value, src=0)
            received[name] = value
        return received

    def _constant_state(self) -> dict[str, Any]:
        """What never changes during a run: the rest of DeepSpeed's files, and a fingerprint of the model."""
        engine = self._engine
        common = engine._common_checkpoint_state({}, True, False)
        for name in ("module", "optimizer", "lr_scheduler", *_COUNTERS):
            common.pop(name, None)
        if self.partitioned or engine.zero_optimization_partition_gradients():
            common["frozen_param_shapes"] = engine._get_zero_frozen_param_attributes(engine._get_param_shape_func)
        # Lightning has taken the scheduler away from the engine, and restores it itself.
        common.update(optimizer=None, lr_scheduler=None)
        return {
            "model_states": common,
            "versions": {"ds_config": common["ds_config"], "ds_version": common["ds_version"]},
            "optimizer_file": os.path.basename(engine._get_zero_ckpt_name("", "")),
            "model_file": os.path.basename(engine._get_ckpt_name("", "")),
            "fingerprint": self._fingerprint(),
        }

    def _fingerprint(self) -> dict[str, Any]:
        engine = self._engine
        shapes = engine._get_zero_param_shapes()
        return {
            "world size": dist.get_world_size(),
            "ZeRO stage": int(engine.zero_optimization_stage()),
            "precision": str(next(engine.module.parameters()).dtype),
            "optimizer": type(self.base_optimizer).__name__,
            "parameters": [f"{name} {tuple(shape)}" for group in shapes for name, shape in group.items()],
            "buffers": sorted(engine._get_buffer_names()),
        }


def _fragment(parameter: Any) -> torch.Tensor:
    fragment: torch.Tensor = parameter.ds_tensor.detach() if hasattr(parameter, "ds_id") else parameter.detach()
    return fragment


def _tensors(parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters as DeepSpeed's files have them: empty where the shard says only what type they are of."""
    if _PACKED not in parameters:
        return parameters
    return {name: torch.empty(0, dtype=dtype) for name, dtype in shard.unpack(parameters[_PACKED]).items()}


def _values(part: Any) -> dict[str, Any]:
    """What may change in a part of the optimizer's state that stays the same object: the loss scaler's numbers."""
    return dict(vars(part)) if hasattr(part, "cur_scale") else {}


def _complete(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state as DeepSpeed's ``state_dict()`` had it."""
    if _PACKED not in optimizer:
        return optimizer
    state = {**optimizer, **{name: shard.unpack(part) for name, part in optimizer[_PACKED].items()}}
    del state[_PACKED]
    return state


def _first_difference(expected: Any, found: Any) -> str:
    if isinstance(expected, list) and isinstance(found, list):
        for index, (old, new) in enumerate(zip(expected, found, strict=False)):
            if old != new:
                return f"'{old}' at place {index} and is '{new}' now"
        return f"{len(expected)} entries and is {len(found)} now"
    return f"{expected!r} and is {found!r} now"
