"""The child process that compiles kernels for GPUs that are not present. Its only caller is perf/count/compiled.py.

Triton compiles for any target that it knows; a driver only supplies the name. Triton's own code specialises a launch,
from stand-ins for the tensors with the same dtype, alignment and size.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from harness.perf.count import machine_code
from harness.perf.count.compiled import gpu

#: Shared memory that a block may have, in KiB (CUDA C programming guide, table of compute capabilities; AMD's ISA).
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
TENSOR_MEMORY = 512  #: columns of an SM's tensor memory (sm_100)


class StandIn:
    """A stand-in for a tensor, with the properties that Triton reads: dtype, address and size of the storage."""

    def __init__(self, dtype: Any, aligned: bool, small: bool) -> None:
        self.dtype, self._aligned, self._small = dtype, aligned, small

    def data_ptr(self) -> int:
        return 16 if self._aligned else 8

    def ptr_range(self) -> int:
        return 0 if self._small else 2**31


class Driver:
    """The part of a Triton driver that a compilation needs."""

    target: Any = None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: Any) -> int:
        return 0


class CannotCompile(Exception):
    """A kernel has no machine code for a target. The message is the reason in one line."""


def main() -> None:
    """Read {"launches": [spec, ...], "targets": [name, ...], "jobs": n}, and write [[launch, target, numbers], ...].

    JSON, from stdin and to stdout. A launch in the output is an index. Output of the kernels' modules and of Triton
    goes to stderr.
    """
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    tasks = [(n, spec, target) for n, spec in enumerate(request["launches"]) for target in request["targets"]]
    results = [[tasks[n][0], tasks[n][2], numbers] for n, numbers in _run_all(tasks, request["jobs"])]
    json.dump(results, answer)
    answer.close()


def _run_all(tasks: list[tuple[int, dict[str, Any], str]], jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, numbers) of every task, from `jobs` processes. If the compiler ends a process, only its task is lost."""
    import_all({spec["kernel"] for _, spec, _ in tasks})
    waiting = list(reversed(range(len(tasks))))
    idle: list[tuple[Any, Any]] = []
    busy: dict[Any, tuple[int, Any]] = {}
    while waiting or busy:
        while waiting and len(busy) < jobs:
            ours, process = idle.pop() if idle else _start_process()
            busy[ours] = (waiting.pop(), process)
            ours.send(tasks[busy[ours][0]][1:])
        ready: list[Any] = wait(list(busy))
        for ours in ready:
            index, process = busy.pop(ours)
            try:
                yield index, ours.recv()
                idle.append((ours, process))
            except EOFError:
                process.join()
                yield index, {"error": f"the compiler ended its process (exit code {process.exitcode})"}
    for ours, process in idle:
        ours.send(None)
        process.join()


def _start_process() -> tuple[Any, Any]:
    """(our end of a pipe, process). The process is a fork of this one, with every kernel imported."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _serve(connection: Connection) -> None:
    while (task := connection.recv()) is not None:
        try:
            connection.send(compile_one(*task))
        except Exception as error:  # any error of a compiler is the result of this kernel alone
            connection.send({"error": one_line(error)})


def import_all(kernels: set[str]) -> None:
    """Import the kernels' modules before the forks. A task whose module fails imports it again, and reports it."""
    for kernel in sorted(kernels):
        try:
            importlib.import_module(kernel.partition(":")[0])
        except Exception as error:
            print(f"{kernel}: {one_line(error)}", file=sys.stderr)


def compile_one(spec: dict[str, Any], target: str) -> dict[str, Any]:
    """The numbers of a launch, as of perf/count/machine_code.py. Raises CannotCompile, and any error of Triton."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver = Driver()
    driver.target = GPUTarget(*gpu(target))
    triton.runtime.driver.set_active(driver)
    arguments = {name: _argument(name, value) for name, value in spec["arguments"].items()}
    options = {name: _argument(name, value) for name, value in spec["options"].items()}
    compiled = _kernel(spec["kernel"]).run(grid=(1,), warmup=True, **arguments, **options)
    shared = compiled.metadata.shared
    capacity = SHARED_KIB.get(target, 0) * 1024
    if capacity and shared > capacity:
        raise CannotCompile(f"shared memory: {shared} bytes, {target} has {capacity}")
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY:
        raise CannotCompile(f"tensor memory: {columns} columns, {target} has {TENSOR_MEMORY}")
    return machine_code.numbers(compiled.asm, shared)


def _kernel(name: str) -> Any:
    from triton.runtime.jit import JITFunction

    module, _, path = name.partition(":")
    if not module or "<locals>" in path or module == "__main__":
        raise CannotCompile(f"{name or 'a kernel compiled by hand'}: cannot be imported")
    kernel: Any = importlib.import_module(module)
    for part in path.split("."):
        kernel = getattr(kernel, part)
    while not isinstance(kernel, JITFunction):
        if not hasattr(kernel, "fn"):
            raise CannotCompile(f"{name} is no @triton.jit function")
        kernel = kernel.fn  # @triton.autotune and @triton.heuristics wrap it
    return kernel


def _argument(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    import torch
    import triton.language as tl

    if "tensor" in value:
        return StandIn(getattr(torch, value["tensor"]), value["aligned"], value["small"])
    if "tuple" in value:
        return tuple(_argument(name, v) for v in value["tuple"])
    if "torch" in value:
        return getattr(torch, value["torch"])
    if "dtype" in value:
        return tl.dtype(value["dtype"])
    if "function" in value:
        return _kernel(value["function"])
    if "descriptor" in value:
        from triton.tools.tensor_descriptor import TensorDescriptor

        parts = {key: _argument(name, part) for key, part in value["descriptor"].items() if part is not None}
        return TensorDescriptor(**{key: list(v) if isinstance(v, tuple) else v for key, v in parts.items()})
    raise CannotCompile(f"argument {name}: a {value.get('opaque')} cannot be rebuilt in another process")


def one_line(error: BaseException) -> str:
    """The most specific line of an error: that of its cause, and in a report of a compiler the line with "error"."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # Errors of Triton begin with a position and an excerpt, errors of ptxas with its command.
    specific = [line for line in lines if re.search(r"\berror\b", line, re.I)] or (
        lines[-1:] if lines[0].startswith("at ") else lines[:1]
    )
    text = re.sub(r"\S*/tmp\S*", "", specific[0])[:300].strip()
    if raised := re.fullmatch(r"(\w+)\(([\"'])(.*)\2\)", text):  # an error that a line of the kernel raised
        return f"{raised[1]}: {raised[3]}"
    return text if isinstance(error, CannotCompile) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
