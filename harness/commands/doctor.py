"""`moe-harness doctor`: devices, versions, and the devices of each backend."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from harness import backend as backends
from harness import device as devices
from harness.base import processes
from harness.base.table import aligned
from harness.device import DEVICES, ready

PACKAGES = ("torch", "triton", "numpy", "ml_dtypes", "pytest", "pytest-xdist", "pytest-benchmark", "transformers")


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    sub = add(doctor, "doctor", "Devices and versions of this machine, and the devices of each backend.")
    sub.add_argument("--device", choices=DEVICES, help="only this device")


def doctor(args: argparse.Namespace) -> int:
    """Print the versions, and then each device and its backends: a process for each device."""
    if args.device:
        return _print_device(args.device)
    versions = [("python", f"{platform.python_version()} ({sys.executable})")]
    versions += [(package, _version(package)) for package in PACKAGES]
    print("\n".join(aligned(versions)))
    for name in DEVICES:
        print()
        sys.stdout.flush()
        if name in devices.present():
            subprocess.run([sys.executable, "-m", "harness", "doctor", "--device", name], env=processes.environment())
        else:
            print(f"{name}: {devices.why_absent(name)}")
            if name == "xpu":
                print("  its contract can be emulated on the CPU: pytest cases -m xpu")
    return 0


def _print_device(name: str) -> int:
    device = ready(name)
    environment = devices.environment(device)
    detail = ", ".join(f"{k} {v}" for k, v in environment.items() if k in ("device_name", "cuda", "capability"))
    print(f"{device}: {detail or platform.machine()}, {device.memory_bytes() / 2**30:.1f} GiB free")
    states = [(b.name, backends.unavailable(b, device) or "usable") for b in backends.installed()]
    print("\n".join(aligned(states, indent=2)))
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
