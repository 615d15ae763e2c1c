"""What a step cost beside its time: model FLOPs, their share of the peak, memory. For rank 0's rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from launch.metrics import NoTracker
from launch.tracking import Trackers

PAGE = os.sysconf("SC_PAGE_SIZE")


class Meter(Trackers):
    """Hands rows on with what it measured; reading its instruments takes some 50 us."""

    def __init__(self, work: Any, ranks: int, *members: NoTracker) -> None:
        """`work` is a moe.flops.Work."""
        super().__init__(*members)
        import torch

        from moe.flops import peak

        self.work, self.ranks = work, ranks
        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.peak = peak(torch.cuda.get_device_name()) if self.cuda else None

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        super().log(step, {**metrics, **self.measure(metrics)})

    def measure(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """model_tflops (a rank and second), mfu where the device's peak is known, and memory in GB."""
        with open("/proc/self/statm", "rb") as file:
            found = {"rss_gb": round(int(file.read().split()[1]) * PAGE / 1e9, 4)}
        seconds = float(metrics.get("step_seconds", 0.0))
        if seconds and "positions" in metrics:
            facts = {key: int(metrics[key]) for key in ("positions", "images", "samples")}
            rate = self.work.step(**facts, supervised=int(metrics["tokens"])) / seconds / self.ranks
            found["model_tflops"] = rate / 1e12
            if self.peak:
                found["mfu"] = rate / self.peak
        if self.cuda:
            found["gpu_memory_gb"] = self.cuda.memory_allocated() / 1e9
            found["gpu_memory_max_gb"] = self.cuda.max_memory_allocated() / 1e9
        return found
