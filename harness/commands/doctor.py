"""`moe-harness doctor`: devices, versions, and which backend can run where."""

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
from harness.base.processes import environment
from harness.device import DEVICES, ready

PACKAGES = ("torch", "triton", "numpy", "ml_dtypes", "pytest", "pytest-xdist", "pytest-benchmark", "transformers")


def register(add: Callable[..., Any]) -> None:
    sub = add(doctor, "doctor", "What is here: devices, versions, and which backend can run where.")
    sub.add_argument("--device", choices=DEVICES, help="only this device")


def doctor(args: argparse.Namespace) -> int:
    if args.device:
        return _doctor_of(args.device)
    print(f"python        {platform.python_version()} ({sys.executable})")
    for package in PACKAGES:
        print(f"{package:13} {_version(package)}")
    for name in DEVICES:
        print()
        sys.stdout.flush()
        if name in devices.present():
            subprocess.run([sys.executable, "-m", "harness", "doctor", "--device", name], env=environment())
        else:
            print(f"{name}: {devices.why_absent(name)}")
            if name == "xpu":
                print("  its contract can be emulated on the CPU: pytest cases -m xpu")
    return 0


def _doctor_of(name: str) -> int:
    device = ready(name)
    found = devices.environment(device)
    detail = ", ".join(f"{k} {v}" for k, v in found.items() if k in ("device_name", "cuda", "capability"))
    print(f"{device}: {detail or platform.machine()}, {device.memory_bytes() / 2**30:.1f} GiB free")
    for backend in backends.installed():
        print(f"  {backend.name:24} {backends.unavailable(backend, device) or 'usable'}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
