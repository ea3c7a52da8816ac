"""Compile launches ahead of time, for GPUs that need not be present, and count their machine code.

A process that interprets kernels cannot compile them. A child process without TRITON_INTERPRET does.
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

#: Short names of torch dtypes.
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "int32": "i32", "int64": "i64",
         "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "int16": "i16", "int8": "i8", "uint8": "u8"}  # fmt: skip
_SHOWN_FIRST = ("num_warps", "num_stages")
Compiled = dict[str, dict[str, dict[str, Any]]]


class CompilerLost(RuntimeError):
    """The child process ended without an answer. The message holds its last output."""


def compile_launches(
    launches: Iterable[dict[str, Any]], targets: Iterable[str] = TARGETS, path: list[str] | None = None
) -> Compiled:
    """{kernel and configuration: {target: numbers}} for launches, each as of Launch.spec() (trace/launches.py).

    numbers: as of perf/count/machine_code.py, or {"error": one line} if the kernel does not compile for the target.
    path: sys.path of the child, that of this process if None. Uses all cores that this process may use. Raises
    CompilerLost.
    """
    distinct = {configuration(spec): spec for spec in launches}
    if not distinct:
        return {}
    request: dict[str, Any] = {
        "launches": list(distinct.values()),
        "targets": list(targets),
        "jobs": len(os.sched_getaffinity(0)),
    }
    # Line numbers do not change the code. Without them, compiling takes a fifth less time.
    environment = {**os.environ, "TRITON_DISABLE_LINE_INFO": "1"}
    environment.pop("TRITON_INTERPRET", None)
    # The program sets the whole path: the working directory must not come first.
    program = (
        f"import sys; sys.path[:] = {path or sys.path!r}; from harness.perf.count.compile_worker import main; main()"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(request), capture_output=True, text=True, env=environment
    )  # fmt: skip
    if child.returncode:
        raise CompilerLost(f"compiling ended with exit code {child.returncode}: {child.stderr.strip()[-2000:]}")
    answers = {(index, target): numbers for index, target, numbers in json.loads(child.stdout)}
    return {text: {t: answers[n, t] for t in request["targets"]} for n, text in enumerate(distinct)}


def gpu(target: str) -> tuple[str, int | str, int]:
    """(Triton's backend, architecture, threads in a warp) of a target such as "sm_90" or "gfx942"; else ValueError."""
    if match := re.fullmatch(r"sm_([0-9]{2,3})a?", target):
        return "cuda", int(match[1]), 32
    if re.fullmatch(r"gfx[0-9a-f]{3,8}", target):
        return "hip", target, 64 if target.startswith("gfx9") else 32
    raise ValueError(f"target {target!r}; valid: sm_<number> or gfx<number>")


def configuration(spec: Mapping[str, Any]) -> str:
    """What a launch is specialised for, in one line: the kernel, its constants and options, and its signature.

    In the signature `*bf16` is a pointer to 16-byte aligned memory, `*bf16?` a pointer that is not aligned, and
    `*bf16+` a pointer into 2 GiB or more. `16` is a multiple of 16, `1` is one, `i32` and `i64` are other integers.
    """
    values = settings(spec)
    signature = [k for k in spec["arguments"] if k not in spec["constants"]]
    words = [kernel_name(spec), *(f"{k}={v}" for k, v in values.items() if k not in signature)]
    return f"{' '.join(words)} ({' '.join(values[k] for k in signature)})"


def kernel_name(spec: Mapping[str, Any]) -> str:
    """The name of the kernel, without its module."""
    return spec["kernel"].rpartition(":")[2] or "?"


def settings(spec: Mapping[str, Any]) -> dict[str, str]:
    """What a launch is specialised for, as words: its constants, its options, then the kinds of its arguments."""
    constants, arguments, options = set(spec["constants"]), spec["arguments"], spec["options"]
    first = {k: options[k] for k in _SHOWN_FIRST if k in options}
    return {
        **{k: shown(v) for k, v in arguments.items() if k in constants},
        **{k: shown(v) for k, v in {**first, **options}.items()},
        **{k: _type(v) for k, v in arguments.items() if k not in constants},
    }


def read_configuration(text: str, names: list[str]) -> dict[str, Any]:
    """A launch for `settings`, from a line of `configuration`.

    names: of the arguments in the signature. If their number is another, the arguments are numbered.
    """
    head, _, signature = text.partition(" (")
    kernel, *words = head.split(" ")
    kinds = signature.removesuffix(")").split()
    if len(names) != len(kinds):
        names = [f"argument {n}" for n in range(len(kinds))]
    arguments = {**dict(word.split("=", 1) for word in words), **dict(zip(names, kinds))}
    return {"kernel": f":{kernel}", "arguments": arguments, "options": {}, "constants": list(arguments)}


def shown(value: Any) -> str:
    """A value as described by trace/launches.py, in one word."""
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
    """The metrics of metrics.COMPILED over all kernels, each the worst of all targets for which all kernels compile.

    registers, shared_bytes: of the kernel with the most. spills, tensor_core, code_bytes: of all kernels together.
    load_bytes: the narrowest of the kernels' widest loads. {} if there is no such target.
    """
    if not compiled:
        return {}
    targets = set.intersection(*map(set, compiled.values()))
    by_target = []
    for target in sorted(targets):
        kernels = [numbers[target] for numbers in compiled.values()]
        if any("error" in numbers for numbers in kernels):
            continue
        by_target.append({
            "registers": max(k["registers"] for k in kernels),
            "spills": sum(k["spills"] for k in kernels),
            "shared_bytes": max(k["shared_bytes"] for k in kernels),
            "tensor_core": sum(sum(k["tensor_core"].values()) for k in kernels),
            "load_bytes": min((k["load_bytes"] for k in kernels if k["load_bytes"]), default=0),
            "code_bytes": sum(k["code_bytes"] for k in kernels),
        })  # fmt: skip
    if not by_target:
        return {}
    return {
        name: (max if METRICS[name].higher_is_worse else min)(total[name] for total in by_target) for name in COMPILED
    }
