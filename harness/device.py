"""Everything that differs between devices: which are here, how they are named, synchronised and asked for health.

"cpu" is always here; Triton kernels run there through Triton's interpreter. "xpu" without an XPU can be emulated: its
contract (layouts, cached instance, W8A16 plan) is then run on CPU tensors by the interpreter, and marked as emulated.
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

DEVICES = ("cpu", "cuda", "xpu")


class DeviceLost(RuntimeError):
    """The device no longer answers: nothing that runs in this process from now on would mean anything."""


@dataclass(frozen=True)
class Device:
    """A place to run: its name in markers and results, and the torch device that its tensors live on."""

    name: str
    emulated: bool = False

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu" if self.on_cpu else f"{self.name}:0")

    @property
    def on_cpu(self) -> bool:
        """Whether its tensors live on the CPU: the CPU itself, or an emulated XPU."""
        return self.emulated or self.name == "cpu"

    @property
    def interprets_triton(self) -> bool:
        return self.on_cpu

    def __str__(self) -> str:
        return f"{self.name} (emulated)" if self.emulated else self.name

    def synchronize(self) -> None:
        """Wait for everything queued; DeviceLost if the device reports an error that no later call can recover from."""
        self._asked("synchronize")

    def release(self) -> None:
        """Give memory that torch keeps for itself back to the device, where other processes need it; or DeviceLost."""
        self._asked("empty_cache")

    def _asked(self, function: str) -> None:
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
        """The size of the last cache before memory, in bytes; 0 if the driver does not say."""
        found = _module(self.name).get_device_properties(self.torch)
        return int(getattr(found, "L2_cache_size", 0) or getattr(found, "last_level_cache_size", 0))

    def event(self, **options: bool) -> Any:
        """An event that can tell the time."""
        return _module(self.name).Event(enable_timing=True, **options)

    def graph_of(self, before: Callable[[], None], calls: Sequence[Callable[[], Tensor]]) -> Replay | None:
        """Each call in turn, after `before`, as one graph with events around the call; None if it cannot be captured.

        Only CUDA has events that are recorded inside a graph so far (`external`).
        """
        if self.name != "cuda":
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
            # A call that waits for the device, say. Whether the device itself is well shows at once.
            self.synchronize()
            if "captur" not in str(error):
                raise
            return None
        return Replay(self, graph, outputs, pairs, (before, *calls))

    def driver(self) -> dict[str, str]:
        """The driver's version and the clocks at this moment (MHz, W, degrees C), as far as its tool tells."""
        names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
        if self.torch.type != "cuda":
            return {}
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return {}  # no such tool: nothing depends on it
        return dict(zip(names, (word.strip() for word in told.strip().split(","))))

    def accumulator(self, operand: str) -> Accumulator:
        """How this device's matrix units add up products of `operand` ("e4m3", "bf16", ...).

        Hopper's fp8 tensor cores align products to the largest one and keep 13 bits below it in tiles of 64 rows and
        more (docs/fp8_accumulator.py measures it; also arXiv:2412.19437, section 3.3.2); smaller tiles take another
        instruction, which is exact. Kernels that promote every 128 products to float32 bound that loss.
        """
        if self.torch.type == "cuda" and operand == "e4m3" and torch.cuda.get_device_capability()[0] == 9:
            return Accumulator(bits=13, depth=32, promote=128)
        return Accumulator()


@dataclass
class Replay:
    """A captured graph of timed calls, and the outputs that every replay writes."""

    device: Device
    graph: Any
    outputs: list[Tensor]
    pairs: list[tuple[Any, Any]]
    reads: tuple  #: whatever was captured: a graph holds addresses, and its memory must not go to somebody else

    def microseconds(self) -> list[float]:
        """One replay: the time of each call."""
        self.graph.replay()
        self.device.synchronize()
        return [start.elapsed_time(stop) * 1e3 for start, stop in self.pairs]


def _module(name: str):
    return getattr(torch, name)


def present() -> tuple[str, ...]:
    """Names of the devices on this machine."""
    return tuple(n for n in DEVICES if n == "cpu" or (hasattr(torch, n) and _module(n).is_available()))


def why_absent(name: str) -> str:
    """One line: what is missing for this device."""
    if name == "cuda" and torch.version.cuda is None:
        return f"no CUDA device: this torch ({torch.__version__}) is built without CUDA"
    if name == "xpu" and not torch.xpu._is_compiled():
        return f"no XPU: this torch ({torch.__version__}) is built without XPU"
    return f"no {name.upper()} device: torch.{name}.is_available() is False (driver missing, or no such device)"


def environment(device: Device) -> dict[str, str]:
    """What a result depends on besides the code: written into every record."""
    import triton

    found = {
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "host": platform.machine(),
    }
    if not device.on_cpu:
        found["device_name"] = _module(device.name).get_device_name()
    if device.torch.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def start(devices: set[str]) -> None:
    """Get the process ready for these devices, before any kernel is imported.

    Triton decides when a kernel is defined whether it is compiled or interpreted. A process that is to use a GPU
    compiles; one that is to use none interprets, with the interpreter's arithmetic mended.
    """
    if devices & set(present()) - {"cpu"}:
        return
    if "kernels.triton.gemm" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("kernels were imported before the device was chosen: call harness.device.start first")
    from harness.trace import interpreter

    interpreter.enable()


def ready(name: str) -> Device:
    """The device of this name, ready for kernels; an absent XPU is emulated."""
    here = name in present()
    if not here and name != "xpu":
        raise UserError(f"--device {name}: {why_absent(name)}")
    start({name})
    return Device(name, emulated=not here)


def interpreting() -> bool:
    """Whether this process runs Triton kernels through the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
