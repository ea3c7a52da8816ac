"""vLLM's Triton MoE and its permutation: what the adapters say without vLLM, what they make of its answers, and, where
vLLM is installed, its own kernels on the CPU in Triton's interpreter."""

import importlib.metadata
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from harness import device
from harness.base.processes import ROOT
from harness.problem.case import Case
from harness.run.case import run_case
from harness.scenarios.alignment import aligned
from kernels.upstream import vllm_interpreted as interpreted
from kernels.upstream import vllm_permute
from kernels.upstream.vllm_interpreted import VllmTritonInterpreted
from kernels.upstream.vllm_permute import VllmPermute
from kernels.upstream.vllm_triton import VllmTriton, VllmTritonModular
from reference.plan import parse_plan

BACKENDS = (VllmTriton, VllmTritonModular, VllmTritonInterpreted, VllmPermute)
WHY_NOT = VllmTritonInterpreted().available() or ("there is a GPU" if torch.cuda.is_available() else None)
installed = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
CPU = device.Device("cpu")
PLAIN = "t16-h256-i128-e8-k2-bf16-exact"


def problem(descriptor):
    return Case.parse(descriptor).problem


# -- without vLLM -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_package_is_one_line(monkeypatch, backend):
    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nowhere)
    assert backend().available() == "the package vllm is not installed"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.1")
    assert backend().available() == "vllm 0.32.1; 0.33 or newer is needed"


def test_nothing_of_vllm_is_imported_before_it_is_used():
    script = """
        import sys
        from kernels.upstream import vllm_interpreted, vllm_permute, vllm_triton
        for backend in (vllm_triton.VllmTriton, vllm_interpreted.VllmTritonInterpreted, vllm_permute.VllmPermute):
            backend().available()
        assert not {"vllm", "triton", "harness"} & set(sys.modules), sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "descriptor, keyword",
    [
        ("t9-h256-i128-e8-k2-bf16-kn-exact", "layout"),
        ("t9-h256-i128-e8-k2-bf16-padded-exact", "shape"),
        ("t9-h256-i64-e8-k2-bf16-e4m3.block.group-exact", "shape"),
        ("t9-h256-i128-e8-k2-bf16-e5m2.tensor.tensor-exact", "quant"),
        ("t9-h256-i128-e8-k2-bf16-e4m3.tensor.none-exact", "quant"),
        ("t9-h256-i128-e8-k2-bf16-limit2-random", "activation"),
        ("t9-h256-i128-e8-k2-bf16-beyond-exact", "invalid_ids"),
        (PLAIN, None),
        ("t9-h256-i128-e8-k2-bf16-e4m3.channel.token-bias-ep2.1-exact", None),
        ("t9-h256-i128-e8-k2-bf16-swigluoai-limit7-random", None),
        ("t9-h256-i128-e8-k2-bf16-invalid-exact", None),
    ],
)
def test_the_functional_interface_refuses(descriptor, keyword):
    for backend in (VllmTriton(), VllmTritonInterpreted()):
        reason = backend.supports(problem(descriptor))
        assert (reason and reason.partition(":")[0]) == keyword


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("descriptor", [PLAIN, "t9-h256-i128-e8-k1-fp32-win-random"])
def test_every_plan_is_one_that_the_oracle_follows(backend, descriptor):
    assert all(parse_plan(plan) for plan in backend().plans(problem(descriptor)))


# -- the stand-ins for compiled operators -----------------------------------------------------------------------------
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_stand_in_for_alignment_keeps_the_contract(block_size, mapped):
    ids = torch.tensor([[3, 0], [3, -1], [1, 7], [0, 3], [2, 2]])
    table = torch.tensor([-1, 0, -1, 1], dtype=torch.int32) if mapped else None
    places, experts = aligned(ids, block_size, 4, table, False, 4)
    sorted_ids, expert_ids = torch.full((100,), -7, dtype=torch.int32), torch.full((100,), -7, dtype=torch.int32)
    used = torch.zeros(1, dtype=torch.int32)
    interpreted.moe_align_block_size(ids, 4, block_size, sorted_ids, expert_ids, used, table)
    assert used.tolist() == [len(places)]
    assert sorted_ids.tolist() == places + [ids.numel()] * (100 - len(places))
    assert expert_ids.tolist() == experts + [-1] * (100 - len(experts))


def test_the_stand_in_for_quantization_has_three_kinds_of_scales():
    x = torch.tensor([[1.0, -448.0], [2.0, 0.5]]).bfloat16()
    codes, scale = interpreted.scaled_fp8_quant(x)
    assert scale.tolist() == [1.0] and codes.float().tolist() == x.float().tolist()
    codes, scale = interpreted.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    assert scale.tolist() == [[1.0], [pytest.approx(2 / 448)]] and codes.float()[1, 0] == 448
    codes, scale = interpreted.scaled_fp8_quant(x, torch.tensor([0.5]))
    assert scale.tolist() == [0.5] and codes.float().tolist() == [[2.0, -448.0], [4.0, 1.0]]


def test_the_stand_ins_round_activations_and_sums_once():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(4, 8, dtype=torch.bfloat16)
    interpreted.apply_moe_activation(SimpleNamespace(value="silu"), out, x)
    gate, up = x.float().chunk(2, 1)
    assert torch.equal(out, (torch.nn.functional.silu(gate) * up).bfloat16())
    ungated = torch.empty(4, 16, dtype=torch.bfloat16)
    interpreted.apply_moe_activation(SimpleNamespace(value="relu2_no_mul"), ungated, x)
    assert torch.equal(ungated, x.float().relu().square().bfloat16())
    total = torch.empty(2, 8, dtype=torch.bfloat16)
    interpreted.moe_sum(x.view(2, 4, 8), total)
    assert torch.equal(total, x.view(2, 4, 8).float().sum(1).bfloat16())


# -- the permutation, over operators written after vLLM's CUDA --------------------------------------------------------
class FakeTables:
    """MoEPermuteScratch: tables for `rows` pairs, all but one of them poisoned."""

    def __init__(self, num_experts, num_local_experts, device):
        self.num_experts, self.num_local_experts, self.device = num_experts, num_local_experts, device
        self.expert_first_token_offset = torch.full((num_local_experts + 1,), -77)

    def reserve(self, rows):
        self.token_expert_indices = torch.arange(rows, dtype=torch.int32)
        self.permuted_idx = torch.full((rows,), -77, dtype=torch.int32)
        self.inv_permuted_idx = torch.full((rows,), -77, dtype=torch.int32)


def fake_permute(x, scale, ids, num_experts, num_local_experts, expert_map, rows, tables):
    assert scale is None
    tables = tables or FakeTables(num_experts, num_experts if num_local_experts < 0 else num_local_experts, x.device)
    if not hasattr(tables, "permuted_idx"):
        tables.reserve(ids.numel())
    local = ids.flatten().long() if expert_map is None else expert_map.long()[ids.flatten().long()]
    local = torch.where(local < 0, ids.flatten() + num_experts, local)
    order = local.argsort(stable=True)
    offsets = tables.expert_first_token_offset
    offsets.copy_(torch.searchsorted(local[order], torch.arange(len(offsets))))
    inverse, pairs = tables.inv_permuted_idx[: ids.numel()], tables.permuted_idx[: ids.numel()]
    inverse[order] = torch.arange(len(order), dtype=torch.int32)
    pairs.fill_(ids.numel())[: offsets[-1]] = order[: offsets[-1]].int()
    rows = torch.full((len(order), x.shape[1]), torch.nan, dtype=x.dtype) if rows is None else rows
    rows[: offsets[-1]] = x[order[: offsets[-1]] // ids.shape[1]]
    return rows, None, offsets, inverse, pairs


def fake_unpermute(out, rows, weights, inverse, offsets):
    for t, mine in enumerate(inverse.view(weights.shape).tolist()):
        served = [(float(w), rows[row].float()) for w, row in zip(weights[t], mine) if row < offsets[-1]]
        out[t] = sum((w * row for w, row in served), torch.zeros(out.shape[1]))


@pytest.fixture
def permutation(monkeypatch):
    fakes = SimpleNamespace(moe_permute=fake_permute, moe_unpermute=fake_unpermute, MoEPermuteScratch=FakeTables)
    monkeypatch.setattr(vllm_permute, "_module", lambda: fakes)
    monkeypatch.setattr(VllmPermute, "devices", {"cpu"})
    monkeypatch.setattr(VllmPermute, "available", lambda self: None)
    return VllmPermute()


@pytest.mark.parametrize(
    "descriptor",
    [
        "t9-h64-i32-e4-k2-bf16-exact",
        "t9-h64-i32-e4-k2-bf16-bias-random",
        "t9-h64-i32-e4-k1-fp32-win-bias-random",
        "t9-h64-i32-e4-k2-fp16-swigluoai-ep2.1-random",
        "t9-h64-i32-e4-k2-bf16-relu2-ep2.0-exact",
        "t0-h64-i32-e4-k2-bf16-exact",
        *(f"t9-h64-i32-e4-k2-bf16-ep2.1-exact-scratch.{s}" for s in ("reuse", "pointers", "sizes", "ids")),
        "t9-h64-i32-e4-k2-bf16-exact-scratch.interleaved",
        "t9-h64-i32-e4-k2-bf16-exact-scratch.hidden_size",
    ],
)
def test_the_layer_around_the_permutation(permutation, descriptor):
    verdict = run_case(Case.parse(descriptor), permutation, CPU)
    assert verdict.status in ("passed", "mistrusted"), verdict.report


def test_a_wrong_permutation_fails(permutation, monkeypatch):
    def shifted(*arguments):
        rows, scale, offsets, inverse, pairs = fake_permute(*arguments)
        return rows.roll(1, 0), scale, offsets, inverse, pairs

    fakes = SimpleNamespace(moe_permute=shifted, moe_unpermute=fake_unpermute, MoEPermuteScratch=FakeTables)
    monkeypatch.setattr(vllm_permute, "_module", lambda: fakes)
    for scenario in ("once", "scratch.pointers"):
        case = replace(Case.parse("t9-h64-i32-e4-k2-bf16-exact"), scenario=scenario)
        assert run_case(case, permutation, CPU).status == "failed"


@pytest.mark.parametrize(
    "descriptor, keyword",
    [
        ("t9-h12-i32-e4-k2-bf16-exact", "shape"),
        ("t9-h64-i32-e4-k2-bf16-kn-exact", "layout"),
        ("t9-h256-i128-e4-k2-bf16-e4m3.channel.token-exact", "quant"),
        ("t9-h64-i32-e4-k2-bf16-beyond-exact", "invalid_ids"),
    ],
)
def test_what_the_permutation_refuses(descriptor, keyword):
    assert VllmPermute().supports(problem(descriptor)).partition(":")[0] == keyword


# -- with vLLM --------------------------------------------------------------------------------------------------------
@installed
def test_its_kernels_answer_in_the_interpreter():
    """In a process of its own, since vLLM decides once whether there is Triton. What is red here is vLLM's fault: it
    will be green, and this test red, once that is mended."""
    script = """
        import os
        from harness import device
        from harness.trace import interpreter
        interpreter.enable()
        from harness.problem.case import Case
        from harness.run.case import run_case
        from kernels.upstream.vllm_interpreted import VllmTritonInterpreted
        environment = dict(os.environ)

        def status(descriptor):
            verdict = run_case(Case.parse(descriptor), VllmTritonInterpreted(), device.Device("cpu"))
            assert verdict.status != "crashed", verdict.report
            return verdict.status, verdict.cause or verdict.reason

        for case in ("t5-h64-i32-e4-k2-bf16-bias-exact", "t5-h64-i32-e4-k2-bf16-e4m3.channel.token-ep2.1-random",
                     "t1-h64-i32-e16-k2-fp16-invalid-exact"):
            assert status(case)[0] == "passed", status(case)
        assert dict(os.environ) == environment
        wrong = {"invalid": "slots without a local expert added", "bias-win": "w13_bias weighted"}
        for what, cause in wrong.items():
            found, why = status(f"t9-h64-i32-e8-k{1 + (what == 'invalid')}-bf16-{what}-exact")
            assert found == "failed" and cause in why, (what, why)
        assert status("t24-h64-i32-e8-k2-bf16-e4m3.tensor.tensor-ep4.1-exact-memory.stale")[0] == "failed"
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@installed
def test_vllm_without_triton_is_refused():
    script = """
        from harness.trace import interpreter
        interpreter.enable()
        from kernels.upstream import vllm_interpreted, vllm_python
        vllm_python.import_vllm()
        try:
            vllm_interpreted.import_interpreted()
        except RuntimeError as error:
            assert "took Triton for absent" in str(error)
        else:
            raise AssertionError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=True)
