"""The interpreter as a sanitizer: it reports wrong memory accesses, and no correct ones."""

import tests.support.interpreted  # isort: skip  # noqa: F401

import pytest
import torch
import triton
import triton.language as tl

from harness.device import Device
from harness.inputs.draw import CPU
from harness.problem.case import Case
from harness.run.case import run_case
from harness.scenarios.memory import WIDEST_OFFSET
from harness.trace import fence, sanitizer
from harness.trace.tracing import Tracing
from tests.support.emulated import Emulated


@triton.jit
def _copy_rows(
    x_ptr, out_ptr, rows, K, stride_x, stride_out, FIRST: tl.constexpr, LAST: tl.constexpr, LOAD: tl.constexpr,
    STORE: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[r] = x[r], a block of rows a program. FIRST and LAST move the rows that are loaded; LOAD and STORE switch
    their masks off; OFFSET says how wide offsets are computed."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_K)
    mask = (row < rows + LAST)[:, None] & (col < K)[None, :]
    if OFFSET == "narrow":
        x_ptrs = x_ptr + (row * stride_x)[:, None] + col[None, :]
    elif OFFSET == "too late":
        x_ptrs = x_ptr + (row[:, None] * stride_x + col[None, :]).to(tl.int64)
    elif OFFSET == "narrowed":
        x_ptrs = x_ptr + (row.to(tl.int64) * stride_x).to(tl.int32)[:, None] + col[None, :]
    else:
        x_ptrs = x_ptr + (row.to(tl.int64) * stride_x)[:, None] + col[None, :]
    x_ptrs += FIRST * stride_x
    if LOAD:
        x = tl.load(x_ptrs, mask=mask, other=0.0)
    else:
        x = tl.load(x_ptrs)
    out_ptrs = out_ptr + (row.to(tl.int64) * stride_out)[:, None] + col[None, :]
    if STORE:
        tl.store(out_ptrs, x, mask=(row < rows)[:, None] & (col < K)[None, :])
    else:
        tl.store(out_ptrs, x)


CORRECT = dict(FIRST=0, LAST=0, LOAD=True, STORE=True, OFFSET="wide")


def copied(x, out, **changes):
    rows, k = x.shape
    _copy_rows[(triton.cdiv(rows, 16),)](
        x, out, rows, k, x.stride(0), out.stride(0), **{**CORRECT, **changes}, BLOCK_M=16,
        BLOCK_K=triton.next_power_of_2(k),
    )  # fmt: skip
    return out


def faults_of(rows=20, k=24, limit=None, **changes):
    x, out = (fence.empty(rows, k, dtype=torch.float32, device=CPU) for _ in range(2))
    x.normal_()
    tracing = Tracing()
    for name, tensor in (("x", x), ("out", out)):
        tracing.trace.watch(tensor, name)
    with sanitizer.guarding(tracing.trace, limit) as faults, tracing:
        copied(x, out, **changes)
    assert not tracing.trace.overrun()  # what would leave a tensor is not carried out
    return faults, torch.equal(x, out)


def test_a_correct_kernel_is_not_accused():
    assert faults_of(limit=WIDEST_OFFSET) == ([], True)


@pytest.mark.parametrize(
    "changes, does, tensor",
    [
        (dict(LOAD=False), "reads", "x"),
        (dict(STORE=False), "writes", "out"),
        (dict(LAST=1), "reads 24 elements", "x, the first 1 elements behind it"),
        (dict(FIRST=-1), "reads 24 elements", "x, the first 24 elements before it"),
        (dict(FIRST=10_000), "reads", "x"),  # beyond the fence, too
    ],
)
def test_an_access_outside_a_tensor_is_a_fault(changes, does, tensor):
    faults, _ = faults_of(**changes)
    assert len(faults) == 1
    assert faults[0].kernel == "_copy_rows" and faults[0].place.startswith("test_sanitizer.py:")
    assert "tl.load" in faults[0].place or "tl.store" in faults[0].place
    assert faults[0].text.startswith(does) and f"outside of {tensor}" in faults[0].text


@pytest.mark.parametrize("offset", ("narrow", "too late", "narrowed"))
def test_a_narrow_offset_is_a_fault_of_the_line_that_made_it(offset):
    rows = WIDEST_OFFSET // 128 + 1
    faults, right = faults_of(rows, 128, WIDEST_OFFSET, OFFSET=offset)
    assert right and len(faults) == 1
    assert "at an int32 offset of" in faults[0].text and "65536 times" in faults[0].text
    line = {"narrow": "row * stride_x", "too late": "row[:, None] *", "narrowed": ".to(tl.int32)"}[offset]
    assert line in faults[0].text


def test_offsets_below_the_limit_or_masked_off_are_no_faults():
    rows = WIDEST_OFFSET // 128
    assert faults_of(rows, 128, WIDEST_OFFSET, OFFSET="narrow") == ([], True)
    assert faults_of(rows - 4, 128, WIDEST_OFFSET, OFFSET="narrow") == ([], True)  # four rows of the last tile are idle


@triton.jit
def _through(ids_ptr, x_ptr, out_ptr, n, stride, ROUTE: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = x[ids[i] * stride], by way of what becomes of an offset on its way to a load."""
    i = tl.arange(0, BLOCK)
    inside = i < n
    offset = tl.load(ids_ptr + i, mask=inside, other=0) * stride
    if ROUTE == "where":
        pointer = tl.where(inside, x_ptr + offset, x_ptr)
    elif ROUTE == "reshaped":
        pointer = tl.reshape(x_ptr + tl.reshape(offset, [2, BLOCK // 2]), [BLOCK])
    elif ROUTE == "halves":
        pointer = x_ptr + (offset // 2) * 2
    elif ROUTE == "remainder":  # another number: what is left is no offset any more
        pointer = x_ptr + offset % stride
    else:
        pointer = x_ptr + offset
    tl.store(out_ptr + i, tl.load(pointer, mask=inside, other=0.0), mask=inside)


KEPT, LOST = ("", "where", "reshaped", "halves"), ("remainder",)


@pytest.mark.parametrize("route, followed", [(r, True) for r in KEPT] + [(r, False) for r in LOST])
def test_offsets_are_followed_through_operators(route, followed):
    x, out = torch.randn(6 * 8192), torch.empty(6)
    tracing = Tracing()
    with sanitizer.guarding(tracing.trace, WIDEST_OFFSET) as faults, tracing:
        _through[(1,)](torch.arange(6, dtype=torch.int32), x, out, 6, 8192, ROUTE=route, BLOCK=8)
    assert bool(faults) == followed
    if followed:
        assert torch.equal(out, x[::8192]) and "int32 offset of 40960 elements" in str(faults[0])


@triton.jit
def _undefined(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n))


@pytest.mark.parametrize(
    "dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
)
def test_lanes_that_are_not_loaded_are_nan(dtype):
    out = torch.empty(8, dtype=dtype)
    _undefined[(1,)](torch.ones(8).to(dtype), out, 5, BLOCK=8)
    assert (out[:5].float() == 1).all() and out[5:].float().isnan().all()


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_lanes_that_are_not_loaded_are_large(dtype):
    out = torch.empty(8, dtype=dtype)
    _undefined[(1,)](torch.ones(8, dtype=dtype), out, 5, BLOCK=8)
    assert (out[:5] == 1).all() and (out[5:] > torch.iinfo(dtype).max * 0.99).all()


class Copies(Emulated):
    """A correct backend that copies hidden_states with the kernel above, first."""

    interpreted = True

    def __init__(self, **changes):
        super().__init__("copies")
        self.changes = changes

    def run(self, layer, hidden_states, *rest, **keywords):
        x = copied(hidden_states, torch.empty_like(hidden_states), **self.changes)
        return super().run(layer, x, *rest, **keywords)


def verdict(backend, text):
    return run_case(Case.parse(text), backend, Device("cpu"))


@pytest.mark.parametrize("text", ("t20-h72-i64-e4-k2-bf16-random", "t264-h128-i64-e4-k2-bf16-exact-memory.offsets32"))
def test_a_case_passes_with_a_correct_kernel(text):
    assert verdict(Copies(), text).status == "passed"


@pytest.mark.parametrize(
    "changes, text, reason",
    [
        (dict(LAST=1), "t20-h72-i64-e4-k2-bf16-random", "reads 72 elements outside of hidden_states"),
        (dict(STORE=False), "t20-h72-i64-e4-k2-bf16-random", "outside of a workspace of its own: empty_like"),
        (dict(OFFSET="narrow"), "t264-h128-i64-e4-k2-bf16-exact-memory.offsets32", "at an int32 offset of"),
    ],
)
def test_a_case_fails_with_the_place_of_the_fault(changes, text, reason):
    found = verdict(Copies(**changes), text)
    assert found.status == "failed" and reason in found.reason and "_copy_rows, test_sanitizer.py:" in found.reason


def test_only_their_own_scenario_checks_narrow_offsets():
    assert verdict(Copies(OFFSET="narrow"), "t264-h128-i64-e4-k2-bf16-exact").status == "passed"
    assert verdict(Emulated(), "t9-h64-i64-e4-k2-bf16-exact-memory.offsets32").status == "unsupported"
