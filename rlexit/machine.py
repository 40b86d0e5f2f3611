"""The machine that a run is made on: what it is called, and the settings that keep it fast."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEEP_BYTES = 1 << 30


def describe(place: str = "cpu") -> str:
    """One line: system, processor, cores; and the accelerator, if `place` is torch's name of one."""
    words = f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores"
    if not place.startswith("cuda"):
        return words
    import torch

    return f"{words}, {torch.cuda.get_device_name(place)}"


def cores() -> int:
    """Cores that this process may use; a container may own fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device(name: str) -> str:
    """A device that torch can use here, by the name that was asked for.

    Raises:
        ValueError: it is none, or is not here; one line says what is.
    """
    import torch

    if name == "cpu":
        return name
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or number == "" == name.removeprefix("cuda")):
        raise ValueError(f"`--device` must be cpu, cuda or cuda:N, got {name!r}.")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= seen:
        advice = "Use --device cpu, or install a torch built for CUDA." if not seen else "Take one of these."
        raise ValueError(
            f"`--device` must be here, got {name}: torch {torch.__version__} sees {seen} of CUDA. {advice}"
        )
    return name


def settle(threads: int | None = None) -> None:
    """Prepares this process for tensor work on a CPU.

    Args:
        threads: of torch; all cores by default.
    """
    import torch

    torch.set_num_threads(threads or cores())
    # Weights that have decayed to denormals cost a factor of four.
    torch.set_flush_denormal(True)
    # glibc gives large buffers back to the system at every step and faults them in again at the next one.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEEP_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text(errors="replace").splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or "unknown processor"])[0]
