"""Backends whose functions are wrong, or end their process."""

import os
import time

import torch

from microvllm.fused.backend import Backend

CPU = torch.device("cpu")


class DeadlyBackend(Backend):
    """Plain functions as if they were kernels; one of them ends the process, one never returns."""

    def __init__(self, device, dtype, deterministic=False):
        super().__init__(device, dtype)
        self.add_norm = super().add_norm
        self.relu2 = self.exit
        self.attend = super().attend

    def exit(self, x):
        print("a library speaks")
        os._exit(7)


class EndlessBackend(DeadlyBackend):
    """Its relu2 never returns."""

    def exit(self, x):
        time.sleep(1000)


class NoBackend(Backend):
    """There is no second process for it."""

    def __init__(self, device, dtype, deterministic=False):
        super().__init__(device, dtype)
        raise RuntimeError("all devices are busy")
