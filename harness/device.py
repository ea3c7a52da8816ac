"""Every difference between devices: presence, names, synchronisation, memory, events and graphs.

"cpu" is always present; Triton kernels run there in Triton's interpreter. "xpu" without an XPU can be emulated: its
contract (layouts, cached instance, W8A16 plan) then runs on CPU tensors in the interpreter, and is marked as emulated.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.base.errors import UserError
from reference.plan import Accumulator
from reference.scheme import Format

DEVICES = ("cpu", "cuda", "xpu")


class DeviceLost(RuntimeError):
    """The device no longer answers: no later result of this process would mean anything."""


@dataclass(frozen=True)
class Device:
    """A device to run on: its name in markers and results, and the torch device of its tensors."""

    name: str
    emulated: bool = False

    @property
    def torch(self) -> torch.device:
        """The torch device of its tensors."""
        return torch.device("cpu" if self.on_cpu else f"{self.name}:0")

    @property
    def on_cpu(self) -> bool:
        """Whether its tensors are on the CPU: the CPU itself, or an emulated XPU."""
        return self.emulated or self.name == "cpu"

    @property
    def interprets_triton(self) -> bool:
        """Whether Triton kernels run in Triton's interpreter there."""
        return self.on_cpu

    def __str__(self) -> str:
        return f"{self.name} (emulated)" if self.emulated else self.name

    def synchronize(self) -> None:
        """Wait for all queued work. DeviceLost if the device reports an error that no later call can recover from."""
        self._call("synchronize")

    def release(self) -> None:
        """Return torch's cached memory to the device, for other processes. DeviceLost as in `synchronize`."""
        self._call("empty_cache")

    def _call(self, function: str) -> None:
        if self.on_cpu:
            return
        try:
            getattr(_module(self.name), function)()
        except RuntimeError as error:
            raise DeviceLost(f"{self.name} does not answer any more: {str(error).splitlines()[0]}") from error

    def memory_bytes(self) -> int:
        """Free memory for tensors, in bytes."""
        if self.on_cpu:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return int(_module(self.name).mem_get_info()[0])

    def l2_bytes(self) -> int:
        """The size of the last cache before memory, in bytes; 0 if the driver does not report it."""
        properties = _module(self.name).get_device_properties(self.torch)
        return int(getattr(properties, "L2_cache_size", 0) or getattr(properties, "last_level_cache_size", 0))

    def event(self, **options: bool) -> Any:
        """A timing event."""
        return _module(self.name).Event(enable_timing=True, **options)

    @property
    def captures_graphs(self) -> bool:
        """Whether a graph of calls can be captured and timed: only CUDA has events inside graphs (`external`)."""
        return self.name == "cuda"

    def graph_of(self, before: Callable[[], None], calls: Sequence[Callable[[], Tensor]]) -> Replay | None:
        """Capture all calls, each after `before` and between two events, in one graph; None if that is impossible."""
        if not self.captures_graphs:
            return None
        graph, outputs, pairs = torch.cuda.CUDAGraph(), [], []
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    start, stop = self.event(external=True), self.event(external=True)
                    before()
                    start.record()
                    outputs.append(call())
                    stop.record()
                    pairs.append((start, stop))
        except RuntimeError as error:
            # A call that waits for the device, for example. An error of the device itself shows in synchronize().
            self.synchronize()
            if "captur" not in str(error):
                raise
            return None
        return Replay(self, graph, outputs, pairs, (before, *calls))

    def driver(self) -> dict[str, str]:
        """The driver's version, and the clocks at this moment (MHz), power (W) and temperature (degrees C); {} if
        nvidia-smi is missing or the device is not CUDA."""
        names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
        if self.torch.type != "cuda":
            return {}
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return {}  # the tool is missing: nothing depends on it
        return dict(zip(names, (word.strip() for word in output.strip().split(","))))

    def accumulator(self, operand: Format) -> Accumulator:
        """How this device's matrix units sum products of codes or values of a format.

        Hopper's fp8 tensor cores align products to the largest one and keep 13 bits below it in tiles of 64 rows and
        more (docs/fp8_accumulator.py measures it; also arXiv:2412.19437, section 3.3.2); smaller tiles use another
        instruction, which is exact. Kernels that promote every 128 products to float32 bound the loss.
        """
        fp8 = operand.storage.startswith("float8")
        if self.torch.type == "cuda" and fp8 and torch.cuda.get_device_capability()[0] == 9:
            return Accumulator(bits=13, depth=32, promote=128)
        return Accumulator()


@dataclass
class Replay:
    """A captured graph of timed calls and the outputs that a replay writes."""

    device: Device
    graph: Any
    outputs: list[Tensor]
    pairs: list[tuple[Any, Any]]
    reads: tuple[
        Any, ...
    ]  #: what the graph reads: it holds addresses alone, so these keep the memory from being reused

    def microseconds(self) -> list[float]:
        """Replay once; the time of each call in microseconds."""
        self.graph.replay()
        self.device.synchronize()
        return [start.elapsed_time(stop) * 1e3 for start, stop in self.pairs]


def _module(name: str) -> Any:
    return getattr(torch, name)


def present() -> tuple[str, ...]:
    """The names of the devices on this machine."""
    return tuple(n for n in DEVICES if n == "cpu" or (hasattr(torch, n) and _module(n).is_available()))


def why_absent(name: str) -> str:
    """One line that says what is missing for this device."""
    if name == "cuda" and torch.version.cuda is None:
        return f"no CUDA device: this torch ({torch.__version__}) is built without CUDA"
    if name == "xpu" and not torch.xpu._is_compiled():
        return f"no XPU: this torch ({torch.__version__}) is built without XPU"
    return f"no {name.upper()} device: torch.{name}.is_available() is False (driver missing, or no such device)"


def environment(device: Device) -> dict[str, str]:
    """What a result depends on besides the code; part of every record."""
    import triton

    facts = {
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "host": platform.machine(),
    }
    if not device.on_cpu:
        facts["device_name"] = _module(device.name).get_device_name()
    if device.torch.type == "cuda":
        facts["cuda"] = str(torch.version.cuda)
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return facts


def start(devices: set[str]) -> None:
    """Prepare the process for these devices, before any kernel is imported. RuntimeError if kernels are imported.

    Triton decides at a kernel's definition whether it compiles or interprets it. A process that uses a GPU compiles;
    one that uses none interprets, with the corrected arithmetic of harness/trace/interpreter.py.
    """
    if devices & set(present()) - {"cpu"}:
        return
    if "kernels.triton.gemm" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("kernels were imported before the device was chosen: call harness.device.start first")
    from harness.trace import interpreter

    interpreter.enable()


def ready(name: str) -> Device:
    """The device of this name, ready for kernels; an absent XPU is emulated. UserError if another one is absent."""
    is_present = name in present()
    if not is_present and name != "xpu":
        raise UserError(f"--device {name}: {why_absent(name)}")
    start({name})
    return Device(name, emulated=not is_present)


def interpreting() -> bool:
    """Whether this process runs Triton kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
