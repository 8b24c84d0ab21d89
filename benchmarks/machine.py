"""What the numbers were measured on: no name of a host, no path."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec
from cryptography.hazmat.backends.openssl import backend

__all__ = ["Machine", "this_machine"]


class Machine(msgspec.Struct, frozen=True):
    """Two runs on equal machines may be shown together."""

    cpu: str
    cores: int
    system: str
    python: str
    openssl: str


def this_machine() -> Machine:
    return Machine(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        openssl=backend.openssl_version_text(),
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
