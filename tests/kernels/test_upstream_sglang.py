"""kernels/upstream/sglang_triton.py, sglang_xpu.py: without SGLang they say so; with it, its kernels are interpreted.

sgl-kernel-xpu cannot be had here: what its adapter hands over is seen by a fake that records its arguments, computes
the layer in float32, and proves nothing about the real one.
"""

import importlib.metadata
import subprocess
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from harness.base.processes import ROOT
from harness.problem.case import Case
from harness.trace import interpreter
from kernels.grouped import activate
from kernels.upstream import package, sglang_triton, sglang_xpu
from kernels.upstream.sglang_triton import SglangTriton
from kernels.upstream.sglang_xpu import SglangXpu

WHY_NOT = SglangTriton().available()
installed = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def problem(descriptor):
    return Case.parse(descriptor).problem


def made(descriptor, seed=0):
    """(problem, layer, hidden_states, topk_weights, topk_ids, expected) of a small layer without expert parallelism."""
    p = problem(descriptor)
    rng = torch.Generator().manual_seed(seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[p.dtype]

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    e, k, i, t = p.num_experts, p.hidden_size, p.intermediate_size, p.tokens
    layer = SimpleNamespace(
        problem=p, w13=(normal(e, p.w13_rows, k) / k**0.5).to(dtype), w2=(normal(e, k, i) / i**0.5).to(dtype),
        w13_bias=normal(e, p.w13_rows).to(dtype) if p.bias else None,
        w2_bias=normal(e, k).to(dtype) if p.bias else None,
        w13_scale=None, w2_scale=None, a13_scale=None, a2_scale=None, expert_map=None,
    )  # fmt: skip
    x, weights = normal(t, k).to(dtype), torch.rand(t, p.top_k, generator=rng) + 0.5
    ids = torch.rand(t, e, generator=rng).argsort(1)[:, : p.top_k].int()
    return p, layer, x, weights, ids, expected(p, layer, x, weights, ids)


def expected(p, layer, x, weights, ids):
    zero = torch.zeros(())
    h = torch.einsum("tk,enk->ten", x.float(), layer.w13.float())
    h = h + (zero if layer.w13_bias is None else layer.w13_bias.float())
    y = torch.einsum("tei,eki->tek", activate(h, p.activation, p.limit), layer.w2.float())
    y = y + (zero if layer.w2_bias is None else layer.w2_bias.float())
    slots = y[torch.arange(len(x))[:, None], ids.long().clamp(min=0)]
    return (slots * weights.masked_fill(ids < 0, 0.0)[..., None]).sum(1)


def error(got, want):
    return float((got.float() - want).norm() / want.norm())


# -- sglang-triton ----------------------------------------------------------------------------------------------------


def test_supports_and_available_import_nothing():
    script = """
        import sys
        from harness.problem.case import Case
        from kernels.upstream.sglang_triton import SglangTriton
        from kernels.upstream.sglang_xpu import SglangXpu
        SglangTriton().available()
        SglangTriton().supports(Case.parse("t4-h64-i64-e4-k2-bf16-random").problem)
        assert not {"sglang", "sgl_kernel", "triton"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=ROOT)


def _without(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(package.importlib.metadata, "version", version)


def test_a_missing_sglang_is_named(monkeypatch):
    _without(monkeypatch)
    assert SglangTriton().available() == "the package sglang is not installed"


def test_an_old_sglang_is_named(monkeypatch):
    monkeypatch.setattr(package.importlib.metadata, "version", lambda name: "0.4.9")
    assert SglangTriton().available() == "sglang 0.4.9; 0.5.23 or newer is needed"


def test_on_a_gpu_its_operators_are_missed(monkeypatch):
    monkeypatch.setattr(package.importlib.metadata, "version", lambda name: "0.5.23")
    monkeypatch.setattr(sglang_triton, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert SglangTriton().available().startswith("the package sgl_kernel is not installed")


@pytest.mark.parametrize(
    "descriptor, device, keyword",
    [
        ("t4-h64-i64-e4-k2-bf16-kn-random", "cuda", "layout"),
        ("t4-h64-i64-e4-k2-bf16-padded-random", "cuda", "shape"),
        ("t4-h64-i64-e4-k2-bf16-shared1-random", "cuda", "shared_experts"),
        ("t4-h64-i64-e4-k2-bf16-beyond-random", "cuda", "invalid_ids"),
        ("t4-h64-i64-e4-k2-bf16-limit7-random", "cuda", "activation"),
        ("t4-h64-i64-e4-k2-bf16-gelu-limit7-random", "cuda", "activation"),
        ("t4-h64-i64-e4-k2-bf16-gelu-random", "xpu", "activation"),
        ("t4-h128-i128-e4-k2-bf16-e4m3.tensor.none-random", "cuda", "quant"),
        ("t4-h128-i128-e4-k2-bf16-e4m3.tensor.token-random", "cuda", "quant"),
        ("t4-h128-i128-e4-k2-bf16-e5m2.tensor.static-random", "cuda", "quant"),
        ("t4-h128-i128-e4-k2-bf16-e4m3.tensor.static-random", "cpu", "quant"),
        ("t4-h128-i64-e4-k2-bf16-e4m3.block.group-random", "cuda", "shape"),
        ("t4-h64-i36-e4-k2-bf16-random", "cuda", "shape"),
        ("t4-h64-i64-e4-k2-bf16-swigluoai-random", "cpu", "activation"),
    ],
)
def test_refuses_what_sglang_has_not(descriptor, device, keyword):
    assert SglangTriton().supports(problem(descriptor), device=device).startswith(f"{keyword}: ")


@pytest.mark.parametrize(
    "descriptor",
    [
        "t4-h64-i64-e4-k2-fp32-random",
        "t4-h64-i64-e4-k2-bf16-swigluoai-limit2-bias-random",
        "t4-h64-i64-e4-k1-bf16-relu2-win-random",
        "t4-h64-i64-e4-k2-fp16-ep2.1s-invalid-random",
        "t4-h64-i64-e4-k2-bf16-e4m3.channel.token-random",
        "t4-h128-i256-e4-k2-bf16-e4m3.block.group-random",
    ],
)
def test_supports_what_fused_experts_supports(descriptor):
    assert SglangTriton().supports(problem(descriptor), device="cuda") is None


@installed
@pytest.mark.parametrize(
    "descriptor",
    ["t9-h64-i32-e5-k2-bf16-random", "t3-h40-i24-e5-k3-fp16-bias-gelu-random", "t5-h64-i32-e4-k2-bf16-relu2-random"],
)
def test_computes_the_layer(descriptor):
    interpreter.enable()
    p, layer, x, weights, ids, want = made(descriptor)
    ids[0] = -1
    want = expected(p, layer, x, weights, ids)
    kept = x.clone()
    out = torch.full_like(x, torch.nan)
    call = SglangTriton().prepare(p, layer)
    assert call(x, weights, ids, out=out) is out
    assert error(out, want) < 1e-2
    assert torch.equal(x, kept)  # its configuration computes in place by default
    assert torch.equal(call(x, weights, ids.long()), out)


@installed
@pytest.mark.parametrize("tokens", [40, 300])
def test_both_alignments_are_one(tokens):
    interpreter.enable()
    from sglang.srt.layers.moe.moe_runner.triton_utils import moe_align_block_size

    sglang_triton.import_sglang()
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 5, (tokens, 2), generator=rng, dtype=torch.int32)
    pairs, block = ids.numel(), 16
    places, experts, count = moe_align_block_size(ids, block, 5)
    assert (pairs > sglang_triton.MOST_ALIGNED) == (tokens == 300)
    used = int(count)
    assert used % block == 0
    seen = []
    for place, expert in zip(places[:used].view(-1, block).tolist(), experts.tolist()):
        mine = [pair for pair in place if pair < pairs]
        assert place == mine + [pairs] * (block - len(mine)) and set(ids.flatten()[mine].tolist()) == {expert}
        seen += mine
    assert sorted(seen) == list(range(pairs))


@installed
def test_experts_of_other_ranks_add_nothing():
    interpreter.enable()
    p, layer, x, weights, ids, _ = made("t9-h64-i32-e6-k2-bf16-random")
    rank = [4, 1, 3]
    want = expected(p, layer, x, weights, torch.where(torch.isin(ids, torch.tensor(rank)), ids, -1))
    layer.w13, layer.w2 = layer.w13[rank].contiguous(), layer.w2[rank].contiguous()
    layer.expert_map = torch.full((6,), -1, dtype=torch.int32)
    layer.expert_map[rank] = torch.arange(3, dtype=torch.int32)
    assert error(SglangTriton().prepare(p, layer)(x, weights, ids), want) < 1e-2


# -- sglang-xpu, over a fake ------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """A module sgl_kernel whose fused_experts records its keyword arguments and computes in float32."""
    module = ModuleType("sgl_kernel")

    def fused_experts(
        hidden_states, w1, w2, topk_weights, topk_ids, b1=None, b2=None, inplace=False, activation="silu",
        gemm1_alpha=None, gemm1_limit=None, swiglu_limit=None,
    ):  # fmt: skip
        module.seen = SimpleNamespace(**locals())
        name = {"gelu": "gelu_tanh"}.get(activation, activation)
        p = SimpleNamespace(activation=name if gemm1_alpha is None else "swigluoai", limit=gemm1_limit)
        layer = SimpleNamespace(w13=w1, w2=w2, w13_bias=b1, w2_bias=b2)
        return expected(p, layer, hidden_states, topk_weights, topk_ids).to(hidden_states.dtype)

    module.fused_experts = fused_experts
    monkeypatch.setattr(sglang_xpu, "import_sgl_kernel", lambda: module)
    monkeypatch.setattr(sglang_xpu, "find_spec", lambda name: object())
    return module


def test_a_missing_sgl_kernel_is_named(monkeypatch):
    monkeypatch.setattr(sglang_xpu, "find_spec", lambda name: None)
    assert SglangXpu().available().startswith("the package sgl_kernel is not installed")


def test_an_import_error_is_reported(monkeypatch, fake):
    def broken():
        raise OSError("libsycl.so.8: cannot open shared object file\nand more")

    monkeypatch.setattr(sglang_xpu, "import_sgl_kernel", broken)
    assert SglangXpu().available() == (
        "sgl_kernel cannot be imported: OSError: libsycl.so.8: cannot open shared object file"
    )


def test_the_cuda_package_of_that_name_is_recognised(fake):
    del fake.fused_experts
    assert "CUDA" in SglangXpu().available()


def test_an_xpu_is_needed(monkeypatch, fake):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert SglangXpu().available() == "fused_experts of sgl-kernel-xpu needs an Xe2 GPU"
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert SglangXpu().available() is None


@pytest.mark.parametrize(
    "descriptor",
    [
        "t9-h64-i32-e5-k2-bf16-random",
        "t9-h64-i32-e5-k2-fp16-gelu_tanh-bias-random",
        "t9-h64-i32-e5-k2-bf16-swigluoai-limit2-bias-random",
        "t9-h64-i32-e5-k2-bf16-relu2-random",
    ],
)
def test_passes_the_layer_on(descriptor, fake):
    p, layer, x, weights, ids, want = made(descriptor)
    assert SglangXpu().supports(p) is None
    out = torch.full_like(x, torch.nan)
    assert SglangXpu().prepare(p, layer)(x, weights, ids, out=out) is out
    assert error(out, want) < 1e-2
    assert fake.seen.inplace is False
    assert (fake.seen.gemm1_alpha, fake.seen.gemm1_limit) == (
        (1.702, 2.0) if p.activation == "swigluoai" else (None, None)
    )


def test_a_weight_on_the_input_is_not_applied_twice(fake):
    p, layer, x, weights, ids, _ = made("t9-h64-i32-e5-k1-bf16-win-random")
    got = SglangXpu().prepare(p, layer)(x, weights, ids)
    assert torch.equal(fake.seen.topk_weights, torch.ones_like(weights))
    scaled = x * weights.to(x.dtype)
    assert torch.equal(fake.seen.hidden_states, scaled)
    assert error(got, expected(p, layer, scaled, torch.ones_like(weights), ids)) < 1e-2


def test_ids_become_local(fake):
    p, layer, x, weights, ids, _ = made("t9-h64-i32-e5-k2-bf16-random")
    ids[0, 0] = -1
    layer.expert_map = torch.tensor([-1, 0, 1, -1, 2], dtype=torch.int32)
    layer.w13, layer.w2 = layer.w13[:3], layer.w2[:3]
    SglangXpu().prepare(p, layer)(x, weights, ids)
    local = {-1: -1, 0: -1, 1: 0, 2: 1, 3: -1, 4: 2}
    assert fake.seen.topk_ids.tolist() == [[local[i] for i in row] for row in ids.tolist()]


def test_a_parameter_that_this_version_lacks_is_refused(fake):
    def older(hidden_states, w1, w2, topk_weights, topk_ids, activation="silu"):
        return F.relu(hidden_states)

    fake.fused_experts = older
    backend = SglangXpu()
    assert backend.supports(problem("t9-h64-i32-e5-k2-bf16-bias-random")).startswith("bias: ")
    assert backend.supports(problem("t9-h64-i32-e5-k2-bf16-swigluoai-random")).startswith("activation: ")
    p, layer, x, weights, ids, _ = made("t9-h64-i32-e5-k2-bf16-random")
    assert backend.supports(p) is None
    assert torch.equal(backend.prepare(p, layer)(x, weights, ids), F.relu(x))


@pytest.mark.parametrize(
    "descriptor, keyword",
    [
        ("t4-h64-i64-e4-k2-bf16-kn-random", "layout"),
        ("t4-h64-i64-e4-k2-fp32-random", "dtype"),
        ("t4-h64-i64-e4-k2-bf16-gelu-random", "activation"),
        ("t4-h64-i64-e4-k2-bf16-limit10-random", "activation"),
        ("t4-h64-i64-e4-k2-bf16-shared1-random", "shared_experts"),
        ("t4-h64-i64-e4-k2-bf16-beyond-random", "invalid_ids"),
        ("t4-h128-i128-e4-k2-bf16-e4m3.tensor.none-random", "quant"),
    ],
)
def test_refuses_what_sgl_kernel_has_not(descriptor, keyword, fake):
    assert SglangXpu().supports(problem(descriptor)).startswith(f"{keyword}: ")
