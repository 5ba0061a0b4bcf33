"""``python captured_state.py STAGE``: a shard holds what DeepSpeed's own ``state_dict()`` has, whatever changes."""

from __future__ import annotations

import os
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from lightning_gemini.dataplane import shard
from lightning_gemini.errors import StateChangedError
from lightning_gemini.strategies import devices
from lightning_gemini.strategies.zero_state import ZeroState
from tests.dataplane.encoding import encode
from tests.strategies.jobs import free_port


def content(value: Any) -> Any:
    """Comparable: tensors as dtype, shape and numbers, instances of classes as their attributes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().reshape(-1).tolist()
    if isinstance(value, dict):
        return {name: content(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [content(part) for part in value]
    return (type(value).__name__, dict(vars(value))) if hasattr(value, "cur_scale") else repr(value)


planner = shard.Planner()


def check(zero: ZeroState, engine: Any, what: str, *, given_up: bool = False) -> None:
    """Two drafts in a row, as the second finds what the first has left; of one that is given up only the second."""
    for first in (True, False):
        try:
            layout = planner.draft(*zero.capture()).finish()
        except StateChangedError:
            assert given_up, what
            assert first, what
        else:
            assert not (first and given_up), what
            compare(zero, engine, what, layout)


def compare(zero: ZeroState, engine: Any, what: str, layout: shard.Layout) -> None:
    stable, volatile = shard.read(memoryview(encode(layout)))
    files = zero.files(stable, volatile, {})
    found = next(file["optimizer_state_dict"] for file in files.values() if "optimizer_state_dict" in file)
    assert content(found) == content(engine.optimizer.state_dict()), what
    module = next(file for file in files.values() if "module" in file)
    assert list(module["module"]) == list(engine.module.state_dict()), what
    if zero.partitioned:
        expected = engine._get_zero_frozen_param_attributes(engine._get_param_fragment_func)
        assert content(module["frozen_param_fragments"]) == content(dict(expected)), what
    else:
        assert content(module["module"]) == content(dict(engine.module.state_dict())), what
    print("same:", what, flush=True)


def check_numbers(zero: ZeroState, engine: Any) -> None:
    """Numbers of the optimizer that change before the rest of its state is read are those of the capture."""
    optimizer = engine.optimizer
    group = optimizer.optimizer.param_groups[1]
    expected = content(optimizer.state_dict())
    draft, overflow, lr = planner.draft(*zero.capture()), optimizer.overflow, group["lr"]
    optimizer.overflow, group["lr"], optimizer.loss_scaler.cur_scale = not overflow, 0.7, 2.0
    stable, volatile = shard.read(memoryview(encode(draft.finish())))
    files = zero.files(stable, volatile, {})
    found = next(file["optimizer_state_dict"] for file in files.values() if "optimizer_state_dict" in file)
    assert content(optimizer.state_dict()) != expected
    assert content(found) == expected
    optimizer.overflow, group["lr"] = overflow, lr
    print("same: numbers that changed before the rest was read", flush=True)


def main(stage: int) -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    devices.use_cpu_in_deepspeed()
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    groups = [{"params": [model[0].weight]}, {"params": [*model[1].parameters(), *model[2].parameters()], "lr": 0.2}]
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.1), config=config)
    zero = ZeroState(engine)
    check(zero, engine, "before the first step")
    for step in range(3):
        engine.backward(engine(torch.rand(2, 4)).sum())
        engine.step()
        check(zero, engine, f"after step {step}: moments appear")
    engine.optimizer.optimizer.param_groups[1]["lr"] = 0.05
    engine.optimizer.optimizer.param_groups[0]["mine"] = [1, 2]
    check(zero, engine, "other settings of a group")
    engine.optimizer.loss_scaler.cur_scale = 4.0
    check(zero, engine, "another loss scale")
    check_numbers(zero, engine)
    model[0].bias.requires_grad_(True)
    check(zero, engine, "a parameter that is frozen no more")
    model[2].weight.requires_grad_(False)
    check(zero, engine, "one that is frozen now")
    model[1].running_mean = model[1].running_mean + 1
    check(zero, engine, "another tensor as a buffer")
    model.register_buffer("late", torch.ones(3))
    check(zero, engine, "another buffer", given_up=True)
    state = engine.optimizer.optimizer.state
    parameter = next(iter(state))
    state[parameter]["exp_avg"] = state[parameter]["exp_avg"].clone() * 2
    check(zero, engine, "other moments")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
