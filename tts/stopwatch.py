"""Laps of wall time in milliseconds, with the device synchronised at both ends."""

import time

import torch


class Stopwatch:
    """Each `lap` returns the time since the previous one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._last = self._now()

    def lap(self) -> float:
        now = self._now()
        passed, self._last = now - self._last, now
        return passed * 1000

    def total(self) -> float:
        """Since the start, without a new lap."""
        return (self._last - self._began) * 1000

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
