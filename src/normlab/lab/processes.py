"""The processes and the device of a run: one process, or several that train one model together.

Started by ``torchrun`` (or ``accelerate launch``), each process takes its share of every global
batch, gradients are averaged, and only the first process writes records. This is the one file
that knows of accelerate.
"""

from __future__ import annotations

import os
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from normlab.norms.batch_norm import synchronize
from normlab.surgery.swap import BATCH_NORMS, modules_of

Precision = Literal["fp32", "bf16"]

_LETTING_GO = 0.2
"""Seconds in which threads of a group finish what they do, far more than they need."""


class Processes:
    """This process's place among those of the run, with its device and precision.

    Args:
        device: ``"auto"`` takes an accelerator if there is one, else the CPU; ``"cpu"``,
            ``"cuda"`` or ``"mps"`` insist.
        precision: ``"bf16"`` runs forward passes under autocast.

    Raises:
        ValueError: The device asked for is not there.
    """

    def __init__(self, device: str = "auto", precision: Precision = "fp32") -> None:
        present = {
            "cpu": True,
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
        }
        if device not in ("auto", *present) or not present.get(device, True):
            there = ", ".join(name for name, is_present in present.items() if is_present)
            raise ValueError(
                f"compare(device={device!r}): expected auto or one of {there}, got {device!r}; "
                "use --device auto"
            )
        on_cpu = device == "cpu" or not (present["cuda"] or present["mps"])
        if "WORLD_SIZE" not in os.environ:
            # accelerate keeps the first choice of a process for all later ones.
            AcceleratorState._reset_state(reset_partial_state=True)
        mixed = "bf16" if precision == "bf16" else "no"
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed)
        self.precision = precision

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        return self._accelerator.device

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self._accelerator.process_index

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self._accelerator.num_processes

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self._accelerator.is_main_process

    def distribute(self, model: nn.Module) -> nn.Module:
        """Return what is to be called in training: the model itself, or a wrapper around it.

        Batch statistics become those of the joint batch.
        """
        if self.size == 1:
            return model
        if modules_of(model, BATCH_NORMS):
            synchronize(model)
        with warnings.catch_warnings():
            # Its successor does not exist in the oldest torch that is supported.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            # Not accelerate's `prepare_model`: that one puts new buffers in the place of those that
            # a method's hooks hold. Statistics are equal on all ranks, so none need broadcasting.
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        # accelerate's context takes longer to enter than a small layer to run.
        return nullcontext() if self.precision == "fp32" else self._accelerator.autocast()

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value on every process."""
        if self.size == 1:
            return value
        return broadcast_object_list([value])[0]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def close(self) -> None:
        """Leave the group of processes."""
        if self.size > 1:
            self._accelerator.end_training()
            # DistributedDataParallel keeps the group's threads alive, and one that lets go of its
            # last tensors while Python shuts down aborts the process. No call waits for them.
            time.sleep(_LETTING_GO)


def device_name(device: torch.device) -> str:
    """Return the hardware's own name for a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
        return names[0]
    except (OSError, IndexError):
        return os.uname().machine
