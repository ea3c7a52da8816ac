"""Compilation ahead of time for GPUs that are not here: what is read off a kernel, and that none loses the others."""

import sys

import pytest
import torch
import triton.language as tl

from harness.base.processes import ROOT
from harness.perf.count import machine_code
from harness.perf.count.compiled import (
    CompilerLost,
    compile_launches,
    configuration,
    gpu,
    read_configuration,
    settings,
    totals,
)
from harness.perf.metrics import COMPILED, TARGETS
from harness.trace.launches import Launch, described, specialised

ALIGNED = {"tensor": "bfloat16", "aligned": True, "small": True}
F32 = {**ALIGNED, "tensor": "float32"}


def spec(kernel, constants=(), options=None, **arguments):
    name = f"tests.support.tiny_kernels:{kernel}" if ":" not in kernel else kernel
    return Launch(kernel, (1,), name, arguments, options or {}, tuple(constants)).spec()


def dot(m, n, k, dtype="bfloat16", **options):
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    operand = {**ALIGNED, "tensor": dtype}
    return spec("dot_kernel", tile, options, a_ptr=operand, b_ptr=operand, c_ptr=F32, K=16, **tile)


def copy(x=F32, n=16, block=1024):
    return spec("copy_kernel", ("BLOCK",), {"num_warps": 4}, x_ptr=x, y_ptr=x, n=n, BLOCK=block)


SMALL, LARGE, STARVED = dot(16, 64, 64, num_warps=4), dot(64, 64, 64, num_warps=4), dot(64, 128, 64, maxnreg=32)
HUGE, E4M3 = dot(128, 128, 256, num_warps=8, num_stages=3), dot(64, 64, 64, "float8_e4m3fn", num_warps=4)
COPY, MISALIGNED, ODD = copy(), copy({**F32, "aligned": False}), copy(n=7)
REFUSED, DEADLY = spec("refused_kernel", x_ptr=F32), spec("deadly_kernel", x_ptr=F32)
ABSENT, LOCAL = spec("no.such.module:kernel"), spec("tests.support.tiny_kernels:f.<locals>.kernel")
OPAQUE = spec("copy_kernel", ("BLOCK",), x_ptr={"opaque": "Lock"}, y_ptr=F32, n=16, BLOCK=16)
ALL = [SMALL, LARGE, STARVED, HUGE, E4M3, COPY, MISALIGNED, ODD, REFUSED, DEADLY, ABSENT, LOCAL, OPAQUE]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """All of them, compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        found = compile_launches([*ALL, COPY], TARGETS)
    assert list(found) == [configuration(one) for one in ALL]
    return lambda one, target: found[configuration(one)][target]


def test_tile_sizes_choose_the_instruction(compiled):
    assert set(compiled(LARGE, "sm_90")["tensor_core"]) == {"wgmma"}
    assert set(compiled(SMALL, "sm_90")["tensor_core"]) == {"mma.sync"}
    assert set(compiled(LARGE, "sm_80")["tensor_core"]) == {"mma.sync"}
    assert set(compiled(LARGE, "sm_100")["tensor_core"]) == {"tcgen05"}
    assert set(compiled(LARGE, "gfx942")["tensor_core"]) == {"mfma"}
    assert compiled(COPY, "sm_90")["tensor_core"] == {}


@pytest.mark.parametrize("target", TARGETS)
def test_larger_tiles_take_more(compiled, target):
    small, large = compiled(SMALL, target), compiled(LARGE, target)
    assert 0 < small["shared_bytes"] < large["shared_bytes"]
    assert 0 < small["code_bytes"] != large["code_bytes"] > 0 and 16 <= large["registers"] <= 512
    assert small["spills"] == large["spills"] == 0


def test_starved_of_registers_a_kernel_spills(compiled):
    assert compiled(STARVED, "sm_80")["registers"] <= 32 and compiled(STARVED, "sm_80")["spills"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_loads_are_as_wide_as_what_is_known_of_the_memory(compiled, target):
    assert compiled(COPY, target)["load_bytes"] == 16
    assert compiled(MISALIGNED, target)["load_bytes"] == compiled(ODD, target)["load_bytes"] == 4
    loads = compiled(MISALIGNED, target)["loads"]
    assert set(loads) == {"4"} and loads["4"] > compiled(COPY, target)["loads"]["16"]


def test_a_kernel_that_does_not_compile_is_a_result(compiled):
    assert compiled(REFUSED, "sm_90")["error"].endswith("refused on purpose")
    assert "fp8e4nv not supported" in compiled(E4M3, "sm_80")["error"]
    assert compiled(E4M3, "sm_90")["tensor_core"]["wgmma"] > 0
    for target, kib in (("sm_80", 163), ("sm_90", 227), ("gfx942", 64)):
        error = compiled(HUGE, target)["error"]
        assert error.startswith("shared memory: ") and f"{target} has {kib * 1024}" in error
    assert compiled(DEADLY, "sm_80") == {"error": "the compiler ended its process (exit code 7)"}
    assert "no.such.module" in str(compiled(ABSENT, "sm_80")) or "No module named 'no'" in str(
        compiled(ABSENT, "sm_80")
    )
    assert "cannot be imported" in compiled(LOCAL, "sm_80")["error"]
    assert compiled(OPAQUE, "sm_80")["error"] == "argument x_ptr: a Lock cannot be rebuilt in another process"


def test_kernels_may_come_from_another_directory(tmp_path):
    source = ROOT / "tests" / "support" / "tiny_kernels.py"
    text = source.read_text().replace("BLOCK + tl.arange(0, BLOCK)", "BLOCK + tl.arange(0, BLOCK) + 1")
    (tmp_path / "elsewhere.py").write_text(text)
    one = {**COPY, "kernel": "elsewhere:copy_kernel"}
    found = compile_launches([one], ["sm_90"], [str(tmp_path), *sys.path])[configuration(one)]["sm_90"]
    assert found["load_bytes"] == 4  # one element further on, nothing is aligned any more
    assert "error" in compile_launches([one], ["sm_90"])[configuration(one)]["sm_90"]


def test_a_child_without_an_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CompilerLost, match="exit code 1"):
        compile_launches([COPY], ["sm_90"])


def test_totals_are_the_worst_of_the_targets():
    numbers = dict(registers=10, spills=4, shared_bytes=8, tensor_core={"mma.sync": 3}, load_bytes=16, code_bytes=100)
    worse = {**numbers, "registers": 20, "tensor_core": {}, "load_bytes": 4}
    found = totals({"a": {"sm_80": numbers, "sm_90": numbers}, "b": {"sm_80": numbers, "sm_90": worse}})
    assert found == dict(registers=20, spills=8, shared_bytes=8, tensor_core=3, load_bytes=4, code_bytes=200)
    assert set(found) == set(COMPILED)
    assert totals({"a": {"sm_80": numbers, "sm_90": {"error": "no"}}})["code_bytes"] == 100
    assert totals({"a": {"sm_80": {"error": "no"}}}) == totals({}) == {}


def test_a_number_counts_for_its_kind_alone():
    kinds = {1: 1, 0: 16, 48: 16, -32: 16, 7: 7, 3: 7, -1: 7, 2**31: 2**32 + 16, 2**40 + 1: 2**32 + 7}
    assert {value: specialised(value) for value in kinds} == kinds
    assert specialised(1, True) == specialised(16, True) == 7 and specialised(2**40, True) == 2**32 + 7
    assert (specialised(2.5), specialised(True), specialised(None)) == (0.5, True, None)


def test_arguments_are_described_without_their_tensors():
    t = torch.zeros(64, dtype=torch.bfloat16)
    assert described(t) == ALIGNED and described(t[1:])["aligned"] is False
    assert described(tl.float32) == {"dtype": "fp32"} and described(torch.float16) == {"torch": "float16"}
    assert described((1, tl.constexpr("a"))) == {"tuple": [1, "a"]}
    assert described(object()) == {"opaque": "object"}


def test_the_configuration_is_one_readable_line():
    one = spec("k", ("FAST", "D"), {"num_stages": 2, "num_warps": 8}, x={**F32, "aligned": False}, FAST=True,
               D={"dtype": "fp16"}, n=16, m=1, s=2**32 + 7, f=0.5, none=None, pair={"tuple": [1, ALIGNED]})  # fmt: skip
    text = "k FAST=True D=fp16 num_warps=8 num_stages=2 (*fp32? 16 1 i64 fp32 none <1,*bf16>)"
    assert configuration(one) == text
    names = ["x", "n", "m", "s", "f", "none", "pair"]
    assert settings(read_configuration(text, names)) == settings(one)
    assert settings(read_configuration(text, []))["argument 2"] == "1"
    bare = Launch("k", (1,), "m:k", {"x": F32}).spec()
    assert configuration(bare) == "k (*fp32)" and settings(read_configuration("k (*fp32)", ["x"])) == settings(bare)


def test_targets_by_name():
    assert gpu("sm_90a") == gpu("sm_90") == ("cuda", 90, 32)
    assert (gpu("gfx942"), gpu("gfx1200")) == (("hip", "gfx942", 64), ("hip", "gfx1200", 32))
    with pytest.raises(ValueError, match="target 'h100'; valid: sm_<number> or gfx<number>"):
        gpu("h100")


PTX = """
@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
ld.global.L1::evict_last.L2::cache_hint.v2.b64 { %rd3, %rd4 }, [ %rd2 + 0 ], %rd9;
ld.global.b16 { %rs1 }, [ %rd3 + 0 ];  ld.param.b64 %rd1, [k_param_0];  ld.shared.v4.b32 {%r1}, [%r2];
cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
@%p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1};  tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 };  tcgen05.commit.cta_group::1 [%r1];
"""
GCN = """
global_load_dwordx4 v[2:5], v1, s[2:3]
buffer_load_ushort v1, v2, s[8:11], 0 offen
buffer_load_dword v3, s[4:7], 0 offen lds
global_load_short_d16_hi v1, v[2:3], off
global_load_ubyte v1, v[2:3], off
s_load_dwordx4 s[0:3], s[4:5], 0x0
v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
; codeLenInByte = 1234
    .vgpr_count:     96
    .vgpr_spill_count: 2
"""


def test_instructions_are_read_off_ptx(monkeypatch):
    monkeypatch.setattr(machine_code, "_of_cubin", lambda cubin: {})
    found = machine_code.numbers({"ptx": PTX, "cubin": b""}, 7)
    assert found["loads"] == {"2": 1, "4": 1, "16": 3, "tma": 1} and found["load_bytes"] == 16
    assert found["tensor_core"] == {"mma.sync": 1, "tcgen05": 1, "wgmma": 1} and found["shared_bytes"] == 7


def test_instructions_are_read_off_gcn():
    found = machine_code.numbers({"amdgcn": GCN}, 0)
    assert found["loads"] == {"1": 1, "2": 2, "4": 1, "16": 1}
    assert (found["registers"], found["spills"], found["code_bytes"]) == (96, 8, 1234)
    assert found["tensor_core"] == {"mfma": 1}
    with pytest.raises(ValueError, match="does not say"):
        machine_code.numbers({"amdgcn": ""}, 0)
