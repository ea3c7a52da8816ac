"""kernels/cached.py: one build, and never a stale, mixed or lingering weight, whatever happens to the layer."""

import gc
import os
import subprocess
import sys
import textwrap
import timeit
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from harness.base.processes import ROOT
from kernels.cached import CachedFusedMoE, TritonCachedMoE
from kernels.layer import Fp8Scheme
from tests.support.small_layer import (
    E,
    I,
    K,
    Launch,
    answer,
    apply,
    make_call,
    make_layer,
    make_problem,
    new_parameters,
    rebind_data,
    tensors,
)


def test_one_build_serves_all_calls_of_an_unchanged_layer():
    layer, launch = make_layer(), Launch()
    instance = CachedFusedMoE(layer, launch)
    assert instance.builds == 0, "built lazily"
    for tokens in (6, 1, 17, 6, 0):
        call = make_call(tokens)
        assert torch.equal(apply(instance, call), answer(layer, call))
    layer.problem = make_problem(tokens=17)  # an equal configuration: the batch is none of its business
    apply(instance, make_call())
    assert instance.builds == 1 and len(launch.seen) == 5, "0 tokens launch nothing"


def bigger(layer):
    layer.w13, layer.w2 = tensors(9, experts=E + 3)
    layer.problem = make_problem(num_experts=E + 3)


def half_precision(layer):
    layer.w13, layer.w2 = layer.w13.half().mul_(2), layer.w2.half()
    layer.problem = make_problem(dtype="fp16")


def expert_parallel(layer):
    layer.w13, layer.w2 = layer.w13[:2] * 2, layer.w2[:2]
    layer.expert_map, layer.problem = (
        torch.tensor([1, -1, 0, -1]).int(),
        make_problem(ep=SimpleNamespace(size=2, rank=0)),
    )


def new_activation(layer):
    layer.problem.activation = "gelu"  # in place: the problem is the same object


def biases(layer):
    layer.w13_bias, layer.w2_bias, layer.problem.bias = torch.ones(E, 2 * I), torch.zeros(E, K), True


def restride(layer):
    layer.w2.data = layer.w2.transpose(1, 2).contiguous().transpose(1, 2) * 2


@pytest.mark.parametrize(
    "change", [rebind_data, new_parameters, bigger, half_precision, expert_parallel, new_activation, biases, restride]
)
def test_every_replaced_part_is_followed(change):
    layer, launch = make_layer(), Launch()
    instance, call = CachedFusedMoE(layer, launch), make_call()
    before = apply(instance, call)
    change(layer)
    if layer.problem.dtype == "fp16":
        call = (call[0].half(), *call[1:])
    after = apply(instance, call)
    assert torch.equal(after, answer(layer, call)) and not torch.equal(after.float(), before.float())
    assert instance.builds == 2
    apply(instance, call)
    assert instance.builds == 2


def test_a_new_top_k_is_followed_and_a_wrong_one_refused():
    layer = make_layer()
    instance = CachedFusedMoE(layer, Launch())
    apply(instance, make_call())
    with pytest.raises(ValueError, match=r"topk_ids: shape \(6, 3\); valid: \(6, 2\)"):
        apply(instance, make_call(top_k=3))
    layer.problem = make_problem(top_k=3)
    call = make_call(top_k=3)
    assert torch.equal(apply(instance, call), answer(layer, call)) and instance.builds == 2


def write_copy(layer):
    layer.w13.copy_(tensors(9)[0])


def write_data(layer):
    layer.w13.data.copy_(tensors(9)[0])


def write_inference(layer):
    with torch.inference_mode():
        layer.w2.mul_(3)


def write_expert(layer):
    layer.w2[1:].zero_()


@pytest.mark.parametrize("write", [write_copy, write_data, write_inference, write_expert])
def test_writes_in_place_are_seen_without_a_build(write):
    layer = make_layer()
    instance, call = CachedFusedMoE(layer, Launch()), make_call()
    before = apply(instance, call)
    write(layer)
    after = apply(instance, call)
    assert torch.equal(after, answer(layer, call)) and not torch.equal(after, before)
    assert instance.builds == 1


def test_inference_tensors_serve():
    with torch.inference_mode():
        layer = make_layer()
        call = make_call()
        instance = CachedFusedMoE(layer, Launch())
        first = apply(instance, call)
        layer.w13.mul_(2)
        assert not torch.equal(apply(instance, call), first)
    assert torch.equal(apply(instance, call), answer(layer, call)) and instance.builds == 1


def test_a_tensor_freed_and_allocated_again_at_the_same_address_is_another():
    # One buffer plays the allocator: the old tensor is gone, the new one has its address, shape and stride.
    memory = torch.empty(E * K * 2 * I, dtype=torch.bfloat16)
    layer = make_layer()
    layer.w13 = memory.view(E, K, 2 * I).copy_(tensors(1)[0])
    instance, call = CachedFusedMoE(layer, Launch()), make_call()
    apply(instance, call)
    address = layer.w13.data_ptr()
    del layer.w13
    gc.collect()
    layer.w13 = memory.view(E, K, 2 * I).copy_(tensors(2)[0])
    assert layer.w13.data_ptr() == address
    assert torch.equal(apply(instance, call), answer(layer, call)) and instance.builds == 2


def test_offloaded_weights_are_named_and_restored_ones_used():
    layer = make_layer()
    instance, call = CachedFusedMoE(layer, Launch()), make_call()
    before, kept = apply(instance, call), layer.w13
    layer.w13, layer.w2 = layer.w13.to("meta"), layer.w2.to("meta")
    with pytest.raises(ValueError, match="hidden_states: device cpu; valid: meta"):
        apply(instance, call)
    layer.w2 = tensors()[1]
    with pytest.raises(ValueError, match="w2: device cpu; valid: meta"):
        apply(instance, call)
    layer.w13 = kept.clone()
    assert torch.equal(apply(instance, call), before)


def test_swapped_weights_are_released_at_once():
    layer = make_layer()
    layer.w13, layer.w2 = torch.nn.Parameter(layer.w13), torch.nn.Parameter(layer.w2)
    instance, call = CachedFusedMoE(layer, Launch()), make_call()
    apply(instance, call)
    tensor, storage = weakref.ref(layer.w13), StorageWeakRef(layer.w2.untyped_storage())
    layer.w13 = torch.nn.Parameter(tensors(9)[0])
    layer.w2.data = tensors(9)[1]
    gc.collect()
    assert tensor() is None and storage.expired(), "the instance keeps replaced weights alive"
    assert torch.equal(apply(instance, call), answer(layer, call))


def fp8_layer(**quant):
    layer = make_layer()
    scheme = SimpleNamespace(**{"weight_format": "e4m3", "weight": "tensor", "activation": "token", **quant})
    layer.problem = make_problem(quant=scheme)
    layer.w13, layer.w2 = layer.w13.to(torch.float8_e4m3fn), layer.w2.to(torch.float8_e4m3fn)
    layer.w13_scale, layer.w2_scale = torch.rand(E) + 0.5, torch.rand(E) + 0.5
    return layer


def test_activations_are_never_quantized():
    layer, launch = fp8_layer(), Launch()
    layer.a13_scale = layer.a2_scale = torch.ones(1)
    instance, call = CachedFusedMoE(layer, launch), make_call()
    first = apply(instance, call)
    assert launch.seen[-1]["fp8"] == Fp8Scheme("tensor", None)
    assert launch.seen[-1]["a13_scale"] is None and launch.seen[-1]["a2_scale"] is None
    layer.problem.quant.activation = "group"
    assert torch.equal(apply(instance, call), first) and instance.builds == 1
    layer.w13_scale = layer.w13_scale * 2
    assert not torch.equal(apply(instance, call), first) and instance.builds == 2


def test_the_launch_gets_the_resolved_configuration():
    layer, launch = make_layer(), Launch()
    apply(CachedFusedMoE(layer, launch), make_call())
    want = dict(
        activation="silu", limit=None, alpha=1.702, fp8=None, num_experts=E, layout="kn",
        apply_router_weight_on_input=False, w2_scale=None, w2_bias=None, a13_scale=None, a2_scale=None,
    )  # fmt: skip
    assert launch.seen == [want]
    layer.problem.activation = "swigluoai"
    with pytest.raises(KeyError):  # the stand-in has no swigluoai
        apply(CachedFusedMoE(layer, launch), make_call())
    assert launch.seen[-1]["limit"] == 7.0


@pytest.mark.parametrize(
    "mistake, message",
    [
        (
            lambda layer: setattr(layer, "w13", layer.w13.transpose(1, 2).contiguous()),
            "Hidden size mismatch: .*layout 'kn'",
        ),
        (
            lambda layer: setattr(layer.problem, "hidden_size", 64),
            r"Hidden size mismatch: hidden_states \[T, 64\], w13 \(4, 48, 32\)",
        ),
        (lambda layer: setattr(layer.problem, "layout", "nk"), "layout 'nk'"),
        (lambda layer: setattr(layer.problem, "intermediate_size", 32), "w2: intermediate size 16; valid: 32"),
        (lambda layer: setattr(layer.problem, "num_experts", 5), "num_experts=5; valid without expert_map: 4"),
        (lambda layer: setattr(layer.problem, "bias", True), "w13_bias: missing with problem.bias=True"),
        (lambda layer: setattr(layer, "w2", layer.w2.half()), "w2: dtype torch.float16; valid: torch.bfloat16"),
        (lambda layer: setattr(layer, "w2_scale", torch.ones(E)), "w2_scale: given with scale granularity None"),
        (lambda layer: setattr(layer.problem, "dtype", "fp64"), "problem.dtype='fp64'"),
    ],
)
def test_layers_that_do_not_fit_are_refused_and_mended_ones_served(mistake, message):
    layer, call = make_layer(), make_call()
    instance, before = CachedFusedMoE(layer, Launch()), answer(make_layer(), call)
    apply(instance, call)
    mistake(layer)
    for _ in range(2):  # not only the first time
        with pytest.raises((ValueError, TypeError), match=message):
            apply(instance, call)
    vars(layer).update(vars(make_layer()))
    assert torch.equal(apply(instance, call), before)


def test_arguments_that_do_not_fit_are_refused():
    instance, (x, weights, ids) = CachedFusedMoE(make_layer(), Launch()), make_call()
    out = torch.empty_like(x)
    for bad, message in (
        ((out.float(), x.float(), weights, ids), "hidden_states: dtype torch.float32"),
        (
            (x[:, :16].clone(), x[:, :16], weights, ids),
            r"Hidden size mismatch: hidden_states \(6, 16\); valid: \[T, 48\]",
        ),
        ((x[:5], x, weights, ids), r"output: shape \(5, 48\)"),
        ((out, x, weights, ids[:5]), r"topk_ids: shape \(5, 2\)"),
        ((x, x, weights, ids), "output: address .* shares memory"),
        ((out, x, weights, ids.to("meta")), "topk_ids: device meta"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            instance.apply(*bad)


def test_the_backend_is_the_cached_instance(monkeypatch):
    backend, layer, call = TritonCachedMoE(), make_layer(), make_call()
    assert backend.available() is None and backend.supports(layer.problem) is None
    assert backend.supports(make_problem(layout="nk")).startswith("layout: ")
    assert backend.supports(make_problem(shared_experts=1)).startswith("shared_experts: ")
    prepared = backend.prepare(layer.problem, layer)
    prepared.instance._launch = Launch()
    out = prepared(*call)
    assert torch.equal(out, answer(layer, call)) and prepared.instance.builds == 1
    buffer = torch.empty_like(out)
    assert prepared(*call, out=buffer) is buffer and torch.equal(buffer, out)


def test_with_the_triton_kernels_themselves():
    """fp8 blocks in layout kn through Triton's interpreter, in a process of its own: it must start with it."""
    script = textwrap.dedent(
        """
        from harness.trace import interpreter
        interpreter.enable()
        import torch
        from harness.inputs.draw import draw
        from harness.problem.case import Case
        from kernels.cached import TritonCachedMoE
        backend = TritonCachedMoE()
        fp8 = "t5-h128-i128-e4-k2-bf16-e4m3.block.group-kn-bias-exact"
        for text in fp8, "t3-h64-i64-e4-k1-bf16-ep2.1-kn-win-exact":
            case = Case.parse(text)
            inputs, problem = draw(case), case.problem
            call = backend.prepare(problem, inputs.backend_layer)
            got = call(inputs.hidden_states, inputs.topk_weights, inputs.topk_ids)

            # The exact fill: every way to compute it gives these bits.
            layer, ids = inputs.layer, inputs.topk_ids.long()
            ids = ids if layer.expert_map is None else layer.expert_map.long()[ids]
            def expert(name, e):
                w, scale = getattr(layer, name)[e].double(), getattr(layer, name + "_scale")
                return w if scale is None else w * scale[e].repeat_interleave(128, 0).repeat_interleave(128, 1).double()
            want = torch.zeros(got.shape, dtype=torch.double)
            for t in range(problem.tokens):
                for w, e in zip(inputs.topk_weights[t].double(), ids[t]):
                    if e >= 0:
                        x = inputs.hidden_states[t].double() * (w if problem.router_weight_on_input else 1)
                        bias = (0, 0) if not problem.bias else (layer.w13_bias[e].double(), layer.w2_bias[e].double())
                        gate, up = (expert("w13", e) @ x + bias[0]).chunk(2)
                        y = expert("w2", e) @ (torch.nn.functional.silu(gate) * up) + bias[1]
                        want[t] += y * (1 if problem.router_weight_on_input else w)
            assert got.abs().max() > 0 and torch.equal(got, want.bfloat16()), (got, want)
            w2 = inputs.backend_layer.w2
            inputs.backend_layer.w2 = torch.zeros_like(w2.view(torch.uint8)).view(w2.dtype)
            zeroed = call(inputs.hidden_states, inputs.topk_weights, inputs.topk_ids)
            assert call.instance.builds == 2 and not torch.equal(zeroed, got)
            assert "quantize" in backend.expected_launches(problem)[1]
        print("fine")
        """
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-2000:]


def test_the_check_is_cheap(record_property):
    """Not a gate on a shared machine but for orders of magnitude; it prints what the module's docstring says."""
    full = fp8_layer()
    full.w13_bias, full.w2_bias, full.problem.bias = torch.ones(E, 2 * I), torch.zeros(E, K), True
    full.expert_map = torch.arange(E).int()
    for name, layer in (("bf16, 2 tensors", make_layer()), ("fp8 with biases and expert_map, 7 tensors", full)):
        instance, call = CachedFusedMoE(layer, lambda *a, **k: None), make_call()
        out = torch.empty_like(call[0])
        check = min(timeit.repeat(instance.current, number=200, repeat=20)) / 200 * 1e6
        whole = min(timeit.repeat(partial(instance.apply, out, *call), number=200, repeat=20)) / 200 * 1e6
        record_property(name, f"check {check:.1f} us, apply without its kernels {whole:.1f} us")
        print(f"{name}: check {check:.1f} us, apply without its kernels {whole:.1f} us")
        assert instance.builds == 1 and check < 1000
