"""kernels/upstream/vllm_cpu.py: without vLLM it says so and imports nothing; with a CPU build of it, kernels answer."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from harness.base.processes import ROOT
from harness.problem.case import Case
from kernels.upstream import vllm_cpu
from kernels.upstream.vllm_cpu import FusedExpertsCpu, FusedMoE

WHY_NOT = FusedMoE().available()
WHY_NOT_SGL = FusedExpertsCpu().available()
installed = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
installed_sgl = pytest.mark.skipif(WHY_NOT_SGL is not None, reason=str(WHY_NOT_SGL))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def problem(descriptor):
    return Case.parse(descriptor).problem


def make_layer(p):
    rng, dtype = torch.Generator().manual_seed(0), DTYPES[p.dtype]

    def normal(*shape):
        return (torch.randn(*shape, generator=rng) / 8).to(dtype)

    e, i, k = p.local_experts, p.intermediate_size, p.hidden_size
    layer = SimpleNamespace(
        problem=p, w13=normal(e, 2 * i, k), w2=normal(e, k, i), w13_scale=None, w2_scale=None, expert_map=None,
        w13_bias=normal(e, 2 * i) if p.bias else None, w2_bias=normal(e, k) if p.bias else None,
    )  # fmt: skip
    x = torch.randn(p.tokens, k, generator=rng).to(dtype)
    ids = torch.rand(p.tokens, p.num_experts, generator=rng).argsort(1)[:, : p.top_k]
    return layer, x, torch.rand(p.tokens, p.top_k, generator=rng) + 0.5, ids


def silu_layer(layer, x, weights, ids):
    """In float32, whatever is stored."""
    w13, w2 = layer.w13.float(), layer.w2.float()
    h = torch.einsum("tk,enk->ten", x.float(), w13)
    if layer.w13_bias is not None:
        h = h + layer.w13_bias.float()
    gate, up = h.chunk(2, -1)
    y = torch.einsum("tei,eki->tek", F.silu(gate) * up, w2)
    if layer.w2_bias is not None:
        y = y + layer.w2_bias.float()
    return (y[torch.arange(len(x))[:, None], ids.long()] * weights[..., None]).sum(1)


def assert_near(got, want, dtype):
    relative = float((got.float() - want).norm() / want.norm())
    assert relative < {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}[dtype]


def test_supports_and_available_import_and_load_nothing():
    script = """
        import sys, torch
        from harness.problem.case import Case
        from kernels.upstream.vllm_cpu import FusedExpertsCpu, FusedMoE
        for backend in (FusedMoE(), FusedExpertsCpu()):
            backend.available()
            backend.supports(Case.parse("t4-h64-i64-e4-k2-bf16-random").problem)
        assert "vllm" not in sys.modules
        assert not hasattr(torch.ops._C, "cpu_fused_moe")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=ROOT)


def with_packages(monkeypatch, found, distribution=None):
    vllm_cpu._found.cache_clear()
    monkeypatch.setattr(vllm_cpu, "installed", lambda *names: found)
    if distribution:
        monkeypatch.setattr(vllm_cpu.importlib.metadata, "distribution", lambda name: distribution)


@pytest.fixture(autouse=True)
def forget():
    yield
    vllm_cpu._found.cache_clear()


def test_a_missing_package_is_named(monkeypatch):
    with_packages(monkeypatch, None)
    assert FusedMoE().available() == "the package vllm-cpu or vllm is not installed"


def test_a_build_for_gpus_is_refused(monkeypatch):
    files = [Path("vllm/_C_stable_libtorch.abi3.so")]
    with_packages(monkeypatch, ("vllm", "0.33.0"), SimpleNamespace(files=files, requires=[]))
    assert "vllm 0.33.0 is not a build for the CPU" in FusedMoE().available()


def test_a_build_for_another_torch_is_refused_before_it_is_loaded(monkeypatch):
    files = [Path(f"vllm/{vllm_cpu._library()}")]
    requires = ["regex", 'torch==1.13.0+cpu; platform_machine == "x86_64"', "torchaudio"]
    with_packages(monkeypatch, ("vllm-cpu", "0.32.0"), SimpleNamespace(files=files, requires=requires))
    assert FusedMoE().available() == f"vllm-cpu 0.32.0 is built for torch 1.13.0+cpu, not {torch.__version__}"


@pytest.mark.parametrize(
    "backend, descriptor, keyword",
    [
        (FusedMoE(), "t4-h64-i64-e4-k2-bf16-e4m3.block.none-random", "quant"),
        (FusedMoE(), "t4-h64-i64-e4-k2-bf16-relu2-random", "activation"),
        (FusedMoE(), "t4-h64-i64-e4-k2-bf16-limit2-random", "activation"),
        (FusedMoE(), "t4-h48-i64-e4-k2-bf16-random", "shape"),
        (FusedMoE(), "t4-h64-i48-e4-k2-bf16-swigluoai-random", "shape"),
        (FusedMoE(), "t4-h64-i64-e4-k2-bf16-padded-random", "shape"),
        (FusedMoE(), "t4-h64-i64-e4-k2-bf16-invalid-random", "invalid_ids"),
        (FusedMoE(), "t4-h64-i64-e4-k2-bf16-shared1-random", "shared_experts"),
        (FusedExpertsCpu(), "t4-h64-i64-e4-k2-fp16-random", "dtype"),
        (FusedExpertsCpu(), "t4-h64-i64-e4-k2-bf16-e4m3.tensor.none-random", "quant"),
        (FusedExpertsCpu(), "t4-h64-i64-e4-k1-bf16-win-random", "router_weight_on_input"),
        (FusedExpertsCpu(), "t4-h64-i64-e4-k2-bf16-bias-random", "bias"),
        (FusedExpertsCpu(), "t4-h64-i48-e4-k2-bf16-random", "shape"),
    ],
)
def test_refuses_what_the_operator_has_not(backend, descriptor, keyword):
    assert backend.supports(problem(descriptor)).startswith(f"{keyword}: ")


def test_takes_what_vllm_pads():
    assert FusedMoE().supports(problem("t4-h64-i48-e4-k2-bf16-random")) is None
    assert FusedMoE().supports(problem("t4-h64-i64-e4-k2-bf16-swigluoai-limit7-random")) is None


@installed
@pytest.mark.parametrize("shape", ["h64-i64", "h32-i48", "h96-i33"])
@pytest.mark.parametrize("options", ["fp32", "fp16", "bf16-bias", "fp32-bias-kn"])
def test_cpu_fused_moe(shape, options):
    p = problem(f"t7-{shape}-e4-k2-{options}-random")
    layer, x, weights, ids = make_layer(replace(p, layout="nk"))
    want = silu_layer(layer, x, weights, ids)
    if p.layout == "kn":
        layer.w13, layer.w2 = layer.w13.transpose(1, 2).contiguous(), layer.w2.transpose(1, 2).contiguous()
    call = FusedMoE().prepare(p, layer)
    out = torch.full_like(x, torch.nan)
    assert call(x, weights, ids.int(), out=out) is out
    assert_near(out, want, p.dtype)
    assert torch.equal(call(x, weights, ids.long()), out)


@installed
def test_a_weight_on_the_input_is_applied_once_and_left_alone():
    p = problem("t7-h64-i64-e4-k1-fp32-win-random")
    layer, x, weights, ids = make_layer(p)
    given = weights.clone()
    got = FusedMoE().prepare(p, layer)(x, weights, ids)
    assert_near(got, silu_layer(layer, x * weights, torch.ones_like(weights), ids), "fp32")
    assert torch.equal(weights, given)  # the operator writes ones where it is told not to weight


@installed
@pytest.mark.parametrize("tokens", [0, 1])
def test_any_number_of_tokens(tokens):
    layer, x, weights, ids = make_layer(problem("t1-h64-i64-e4-k2-bf16-random"))
    for backend in (FusedMoE(), FusedExpertsCpu()):
        if backend.available() is None:
            call = backend.prepare(layer.problem, layer)
            assert call(x[:tokens], weights[:tokens], ids[:tokens]).shape == (tokens, 64)


@pytest.mark.parametrize("backend", [FusedMoE(), FusedExpertsCpu()])
def test_an_expert_map_is_refused_although_vllm_accepts_it(backend):
    """vLLM's classes accept it, never read it, and hand global ids to operators that index local experts with them."""
    assert backend.supports(problem("t4-h64-i64-e8-k2-bf16-ep2.1-random")).startswith("expert_map: ")


@installed_sgl
def test_fused_experts_cpu():
    layer, x, weights, ids = make_layer(problem("t7-h64-i96-e4-k2-bf16-random"))
    got = FusedExpertsCpu().prepare(layer.problem, layer)(x, weights, ids)
    assert_near(got, silu_layer(layer, x, weights, ids), "bf16")


@installed_sgl
def test_fused_experts_cpu_with_fp8_weights():
    p = problem("t7-h256-i128-e4-k2-bf16-e4m3.block.none-random")
    layer, x, weights, ids = make_layer(replace(p, quant=None))
    layer.problem = p
    scales = [torch.rand(4, 2, 2) + 0.5, torch.rand(4, 2, 1) + 0.5]
    layer.w13_scale, layer.w2_scale = scales
    # Away from zero and from subnormals, which the operator decodes as if they were normal: 0 becomes 2**-7.
    layer.w13, layer.w2 = ((w + 0.05 * w.sign() + 0.02).to(torch.float8_e4m3fn) for w in (layer.w13, layer.w2))
    assert min(float(w.float().abs().min()) for w in (layer.w13, layer.w2)) >= 2**-6
    got = FusedExpertsCpu().prepare(p, layer)(x, weights, ids)
    wide = [s.repeat_interleave(128, 1).repeat_interleave(128, 2) for s in scales]
    layer.w13, layer.w2 = layer.w13.float() * wide[0], layer.w2.float() * wide[1]
    assert_near(got, silu_layer(layer, x, weights, ids), "bf16")


@installed
def test_operators_of_something_else_keep_the_library_out():
    script = """
        import torch
        from kernels.upstream import vllm_cpu
        other = torch.library.Library("_C", "FRAGMENT")
        other.define("silu_and_mul(Tensor! out, Tensor input) -> ()")
        try:
            vllm_cpu._operators()
        except RuntimeError as error:
            assert "_C::silu_and_mul" in str(error), error
        else:
            raise SystemExit("loaded")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=ROOT)
