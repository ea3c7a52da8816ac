"""Numbers of a compiled kernel: registers, spills, tensor-core instructions, width of loads, size of the code.

Instructions are counted in the code, not as they are executed: PTX for NVIDIA, GCN assembly for AMD.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

#: Instructions of the matrix units in PTX and GCN assembly.
_MATRIX = re.compile(r"\b(wgmma)\.mma_async|\b(mma\.sync)\b|\b(tcgen05)\.mma\b|\bv_s?(mfma|wmma)(?:c|_)")
_PTX_LOAD = re.compile(r"\bld\.global(?:\.(?!v\d|[busf]\d)[\w:]+)*(?:\.v(\d))?\.[busf](\d+)")
_PTX_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared(?:::\w+)?\.global[^\[\n]*\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)")
_PTX_BULK = re.compile(r"\bcp\.async\.bulk\.(?:tensor\.)?\S*shared\S*global")
_GCN_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?(\w+)")
_GCN_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16}
BULK = 16  #: width in bytes that a bulk load (TMA) counts as, the most of one load of a thread


def numbers(asm: Mapping[str, Any], shared: int) -> dict[str, Any]:
    """The numbers of a kernel. asm: that of Triton, with "ptx" and "cubin", or "amdgcn". shared: bytes.

    registers: of a thread. spills: bytes of a thread's stack, which holds spilled registers (NVIDIA), or of the spilled
    registers (AMD). shared_bytes: of a block. tensor_core: {kind: instructions}. loads: {bytes of a thread, or "tma":
    instructions} from global memory. load_bytes: the widest of the loads, 0 without any. code_bytes: machine code.
    """
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        resources = _of_amdgcn(text)
        loads = Counter(str(_gcn_bytes(m[1])) for m in _GCN_LOAD.finditer(text))
    else:
        text = asm["ptx"]
        resources = _of_cubin(asm["cubin"])
        loads = Counter(str(int(m[1] or 1) * int(m[2]) // 8) for m in _PTX_LOAD.finditer(text))
        loads += Counter(str(int(m[1], 0)) for m in _PTX_ASYNC.finditer(text))
        loads += Counter("tma" for _ in _PTX_BULK.finditer(text))
    widths = [BULK if width == "tma" else int(width) for width in loads]
    matrix = Counter(next(filter(None, m.groups())) for m in _MATRIX.finditer(text))
    return resources | {
        "shared_bytes": shared,
        "tensor_core": dict(sorted(matrix.items())),
        "load_bytes": max(widths, default=0),
        "loads": dict(sorted(loads.items(), key=lambda item: (item[0] == "tma", len(item[0]), item[0]))),
    }


def _gcn_bytes(word: str) -> int:
    word = word.removesuffix("_d16_hi").removesuffix("_d16")
    if word in _GCN_BYTES:
        return _GCN_BYTES[word]
    return 1 if "byte" in word or word.endswith("8") else 2


def _of_amdgcn(text: str) -> dict[str, int]:
    def value(key: str) -> int:
        match = re.search(rf"{key}\D+(\d+)", text)
        if match is None:
            raise ValueError(f"the assembly does not say {key}")
        return int(match[1])

    return {
        "registers": value(r"\.vgpr_count:"),
        "spills": 4 * value(r"\.vgpr_spill_count:"),
        "code_bytes": value("; codeLenInByte"),
    }


def _of_cubin(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    if match is None:
        raise ValueError(f"cuobjdump -res-usage says neither REG nor STACK: {shown[:200]!r}")
    return {"registers": int(match[1]), "spills": int(match[2]), "code_bytes": _text_bytes(cubin)}


def _text_bytes(elf: bytes) -> int:
    """The size of the code sections in bytes (64-bit ELF, System V gABI chapter 4)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + n * entry) for n in range(count)]
    names = headers[names_at][4]
    return sum(size for name, _, _, _, _, size in headers if elf.startswith(b".text", names + name))
