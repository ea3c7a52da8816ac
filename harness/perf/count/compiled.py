"""Every launch compiled ahead of time, for GPUs that need not be here, and the numbers of its machine code.

A process that interprets kernels cannot compile them, so a child process does, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from harness.perf.metrics import COMPILED, METRICS, TARGETS

#: torch's names of dtypes as they are shown.
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "int32": "i32", "int64": "i64",
         "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "int16": "i16", "int8": "i8", "uint8": "u8"}  # fmt: skip
_SHOWN_FIRST = ("num_warps", "num_stages")
Compiled = dict[str, dict[str, dict[str, Any]]]


class CompilerLost(RuntimeError):
    """The child process ended without an answer; the message holds what it said last."""


def compile_launches(
    launches: Iterable[dict[str, Any]], targets: Iterable[str] = TARGETS, path: list[str] | None = None
) -> Compiled:
    """{kernel and configuration: {target: numbers}} for launches as trace/launches.py describes them.

    numbers: perf/count/machine_code.py, or {"error": one line} where the kernel does not compile for the target.
    path: where the child finds modules (sys.path), ours if None. Uses all cores that this process may use.
    """
    distinct = {configuration(spec): spec for spec in launches}
    if not distinct:
        return {}
    asked: dict[str, Any] = {
        "launches": list(distinct.values()),
        "targets": list(targets),
        "jobs": len(os.sched_getaffinity(0)),
    }
    # Without line numbers the code is the same, and a fifth of the time is saved.
    environment = {**os.environ, "TRITON_DISABLE_LINE_INFO": "1"}
    environment.pop("TRITON_INTERPRET", None)
    # The whole path at once: what a package's own directory or the working directory would put first shall not count.
    program = (
        f"import sys; sys.path[:] = {path or sys.path!r}; from harness.perf.count.compile_worker import main; main()"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(asked), capture_output=True, text=True, env=environment
    )  # fmt: skip
    if child.returncode:
        raise CompilerLost(f"compiling ended with exit code {child.returncode}: {child.stderr.strip()[-2000:]}")
    answers = {(index, target): numbers for index, target, numbers in json.loads(child.stdout)}
    return {text: {t: answers[n, t] for t in asked["targets"]} for n, text in enumerate(distinct)}


def gpu(target: str) -> tuple[str, int | str, int]:
    """(Triton's backend, architecture, threads in a warp) of "sm_90" or "gfx942"; ValueError for any other word."""
    if match := re.fullmatch(r"sm_(\d+)a?", target):
        return "cuda", int(match[1]), 32
    if re.fullmatch(r"gfx[0-9a-f]+", target):
        return "hip", target, 64 if target.startswith("gfx9") else 32
    raise ValueError(f"target {target!r}; valid: sm_<number> or gfx<number>")


def configuration(spec: Mapping[str, Any]) -> str:
    """What a launch was specialised for, in one line: the kernel, its constants and options, and its signature.

    In the signature `*bf16` is a pointer to 16-byte aligned memory, `*bf16?` one that is not, `*bf16+` one into 2 GiB
    or more; `16` is a multiple of 16, `1` is one, `i32` and `i64` are any other integer.
    """
    found = settings(spec)
    signature = [k for k in spec["arguments"] if k not in spec["constants"]]
    words = [kernel_name(spec), *(f"{k}={v}" for k, v in found.items() if k not in signature)]
    return f"{' '.join(words)} ({' '.join(found[k] for k in signature)})"


def kernel_name(spec: Mapping[str, Any]) -> str:
    """The kernel's own name, without its module."""
    return spec["kernel"].rpartition(":")[2] or "?"


def settings(spec: Mapping[str, Any]) -> dict[str, str]:
    """What a launch was specialised for, as words: its constants, its options, then the kinds of its arguments."""
    constants, arguments, options = set(spec["constants"]), spec["arguments"], spec["options"]
    first = {k: options[k] for k in _SHOWN_FIRST if k in options}
    return {
        **{k: shown(v) for k, v in arguments.items() if k in constants},
        **{k: shown(v) for k, v in {**first, **options}.items()},
        **{k: _type(v) for k, v in arguments.items() if k not in constants},
    }


def read_configuration(text: str, names: list[str]) -> dict[str, Any]:
    """A launch as `settings` takes it, from the line that `configuration` made of it. names: of the signature's
    arguments, if they are known; they are numbered if these are not as many."""
    head, _, signature = text.partition(" (")
    kernel, *words = head.split(" ")
    kinds = signature.removesuffix(")").split()
    if len(names) != len(kinds):
        names = [f"argument {n}" for n in range(len(kinds))]
    arguments = {**dict(word.split("=", 1) for word in words), **dict(zip(names, kinds))}
    return {"kernel": f":{kernel}", "arguments": arguments, "options": {}, "constants": list(arguments)}


def shown(value: Any) -> str:
    """A value as trace/launches.py describes it, in a word."""
    if isinstance(value, dict):
        if "tensor" in value:
            return _type(value)
        return "/".join(shown(v) for v in value.values())
    if isinstance(value, list):
        return ",".join(map(shown, value))
    return re.sub(r"[\s()]", "_", str(value))


def _type(value: Any) -> str:
    if isinstance(value, dict):
        if "tensor" in value:
            dtype = SHORT.get(value["tensor"], value["tensor"])
            return f"*{dtype}{'' if value['aligned'] else '?'}{'' if value['small'] else '+'}"
        if "tuple" in value:
            return f"<{','.join(map(_type, value['tuple']))}>"
        return shown(value)
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        return "1"
    wide = "" if abs(value) < 2**31 else "i64/"
    return f"{wide}16" if value % 16 == 0 else "i64" if wide else "i32"


def totals(compiled: Compiled) -> dict[str, int]:
    """The metrics of metrics.COMPILED over all kernels, each the worst of the targets.

    A target that some kernel does not compile for has no numbers; without any left, there are no metrics.

    registers, shared_bytes: of the kernel with the most. spills, tensor_core, code_bytes: of all kernels together.
    load_bytes: the narrowest of the kernels' widest loads.
    """
    if not compiled:
        return {}
    targets = set.intersection(*(set(found) for found in compiled.values()))
    of_targets = []
    for target in sorted(targets):
        kernels = [found[target] for found in compiled.values()]
        if any("error" in numbers for numbers in kernels):
            continue
        of_targets.append({
            "registers": max(k["registers"] for k in kernels),
            "spills": sum(k["spills"] for k in kernels),
            "shared_bytes": max(k["shared_bytes"] for k in kernels),
            "tensor_core": sum(sum(k["tensor_core"].values()) for k in kernels),
            "load_bytes": min((k["load_bytes"] for k in kernels if k["load_bytes"]), default=0),
            "code_bytes": sum(k["code_bytes"] for k in kernels),
        })  # fmt: skip
    if not of_targets:
        return {}
    return {
        name: (max if METRICS[name].higher_is_worse else min)(found[name] for found in of_targets) for name in COMPILED
    }
