"""What several commands need: the error with exit code 2, a device that is ready, a child process's environment."""

from __future__ import annotations

import os
from pathlib import Path

from harness import device as devices
from harness.device import Device

ROOT = Path(__file__).resolve().parent.parent.parent


class Wrong(Exception):
    """The command cannot be carried out as given; the message is the one line that says why. Exit code 2."""


def the_device(name: str) -> Device:
    """The device of this name, ready for kernels; an absent XPU is emulated."""
    here = name in devices.present()
    if not here and name != "xpu":
        raise Wrong(f"--device {name}: {devices.why_absent(name)}")
    devices.start({name})
    return Device(name, emulated=not here)


def environment() -> dict[str, str]:
    """The environment of a process that finds this harness, wherever it is started."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
