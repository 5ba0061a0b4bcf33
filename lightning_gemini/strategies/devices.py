"""Where ranks run: DeepSpeed on the CPU as well as on GPUs, and as many ranks as the launcher says."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist

from lightning_gemini.callbacks.peer_memory import AGENT_VARIABLE
from lightning_gemini.callbacks.ranks import RankIdentity


def is_launched() -> bool:
    """Whether ``lightning-gemini run`` started this process."""
    return AGENT_VARIABLE in os.environ


def devices_of_machine(devices: list[torch.device] | None) -> list[torch.device] | None:
    """The devices to use of those that the Trainer chose.

    DeepSpeedStrategy wants numbered devices, so CPU "devices" get numbers. Under ``lightning-gemini run`` the command
    line says how many ranks there are, whatever the script says.
    """
    if not devices:
        return devices
    count = int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else len(devices)
    if all(device.type == "cpu" for device in devices):
        return [torch.device("cpu", index) for index in range(count)]
    return devices[:count]


def machines_of_job(num_nodes: int) -> int:
    """The number of machines: the launcher's, or what the Trainer was told."""
    if is_launched():
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return num_nodes


def identity_of(global_rank: int, local_rank: int, world_size: int, num_processes: int) -> RankIdentity:
    """This process's place in the job."""
    nproc = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    return RankIdentity(global_rank, local_rank, global_rank // nproc, nproc, world_size // nproc)


def use_cpu_in_deepspeed() -> None:
    """DeepSpeed picks its accelerator once a process; the Trainer's choice counts."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Else DeepSpeed asks `numactl` for the number of sockets, in a process of its own, several times a step.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())
    # Serves inference only, and would be compiled at the first start: half a minute, and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def silence_deprecated_collectives() -> None:
    """DeepSpeed calls collectives by names that torch 2.13 deprecates: one warning a call, hundreds a second."""
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)


def leave_process_group() -> None:
    """Left to the interpreter's end, gloo sometimes aborts the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
