"""The whole layer on each path and the backends over it, against a loop in torch: on CPU tensors, interpreted."""

from tests.support.interpreted import E4M3, E5M2, local_ids, poisoned, random_map, reference_activation  # isort: skip  # noqa: F401

import ast
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels.triton import backend
from kernels.triton.fused_moe import Fp8Scheme, fused_moe, permuted_moe, takes_low_latency_path
from kernels.triton.quant import quantize_fp8


def fp8_weights(w, granularity, dtype):
    """(codes, scale, dequantized float64) of w [E, N, K]."""
    e, n, k = w.shape
    pad = torch.nn.functional.pad(w.abs(), (0, -k % 128, 0, -n % 128))
    amax = {
        "tensor": lambda: w.abs().amax((1, 2)),
        "channel": lambda: w.abs().amax(2),
        "block": lambda: pad.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).amax((2, 4)),
    }[granularity]()
    scale = (amax / (448 if dtype == E4M3 else 57344)).float()
    full = {
        "tensor": lambda: scale[:, None, None].expand(e, n, k),
        "channel": lambda: scale[:, :, None].expand(e, n, k),
        "block": lambda: scale.repeat_interleave(128, 1)[:, :n].repeat_interleave(128, 2)[:, :, :k],
    }[granularity]()
    codes = (w / full).to(dtype)
    return codes, scale, codes.double() * full.double()


def dequantized(x, scheme, static=None):
    """x [M, K] float64 -> what the kernel multiplies."""
    if scheme is None or scheme.activation is None:
        return x
    codes, scale = quantize_fp8(x.float(), scheme.activation, static)
    per = scale.repeat_interleave(128, 1)[:, : x.shape[1]] if scheme.activation == "group" else scale.view(-1, 1)
    return codes.double() * per.double()


def make(tokens=12, hidden=160, size=72, experts=6, top_k=2, dtype=torch.bfloat16, scheme=None, weight_dtype=E4M3,
         activation="silu", limit=None, bias=False, layout="nk", mapped=False, invalid=False, static=False,
         on_input=False, id_dtype=torch.int32, seed=0):  # fmt: skip
    """(arguments, keywords, expected float64 output) of one layer call."""
    g = torch.Generator().manual_seed(seed)
    table, local = None, experts
    if mapped:
        table = random_map(experts, g)
        local = int(table.max()) + 1
    rows = size if activation == "relu2" else 2 * size
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    w13 = torch.randn(local, rows, hidden, generator=g) / math.sqrt(hidden)
    w2 = torch.randn(local, hidden, size, generator=g) / math.sqrt(size)
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)]).to(id_dtype)
    if invalid:
        ids[torch.rand(ids.shape, generator=g) < 0.4] = -1
        ids[0] = -1
    weights = torch.rand(tokens, top_k, generator=g) + 0.1
    kw = dict(activation=activation, limit=limit, layout=layout, expert_map=table, fp8=scheme,
              num_experts=experts, apply_router_weight_on_input=on_input)  # fmt: skip
    if scheme:
        w13, kw["w13_scale"], exact13 = fp8_weights(w13, scheme.weight, weight_dtype)
        w2, kw["w2_scale"], exact2 = fp8_weights(w2, scheme.weight, weight_dtype)
        if static:
            kw["a13_scale"], kw["a2_scale"] = torch.tensor([0.01]), torch.tensor([0.02])
    else:
        w13, w2 = w13.to(dtype), w2.to(dtype)
        exact13, exact2 = w13.double(), w2.double()
    if bias:
        kw["w13_bias"] = torch.randn(local, rows, generator=g).to(dtype)
        kw["w2_bias"] = torch.randn(local, hidden, generator=g).to(dtype)

    source = x.double() * weights.double() if on_input else x.double()
    operand = dequantized(source, scheme, kw.get("a13_scale"))
    expert_of = torch.tensor(local_ids(ids, experts, table)).view(tokens, top_k)
    h = torch.zeros(tokens, top_k, rows, dtype=torch.float64)
    for t, j in torch.nonzero(expert_of >= 0).tolist():
        e = expert_of[t, j]
        h[t, j] = exact13[e] @ operand[t] + (kw["w13_bias"][e].double() if bias else 0)
    a = reference_activation(h.to(dtype).double(), activation, limit)
    a = dequantized(a.to(dtype).double().view(tokens * top_k, -1), scheme, kw.get("a2_scale")).view(tokens, top_k, -1)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t, j in torch.nonzero(expert_of >= 0).tolist():
        e = expert_of[t, j]
        y = exact2[e] @ a[t, j] + (kw["w2_bias"][e].double() if bias else 0)
        expected[t] += y * (1 if on_input else weights[t, j].double())
    if layout == "kn":
        w13, w2 = (w.transpose(1, 2).contiguous() for w in (w13, w2))
        if scheme and scheme.weight == "block":
            kw["w13_scale"], kw["w2_scale"] = (kw[n].transpose(1, 2).contiguous() for n in ("w13_scale", "w2_scale"))
    return (x, w13, w2, weights, ids), kw, expected


def check(result, expected, dtype):
    # One ulp of storage in a handful of roundings; quantized activations may also flip a code.
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}[dtype]
    assert result.dtype == dtype and torch.isfinite(result).all()
    error = (result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < tolerance, f"relative error {error:.2e}"


RUNS = {
    "aligned": lambda a, kw: fused_moe(*a, path="aligned", **kw),
    "low_latency": lambda a, kw: fused_moe(*a, path="low_latency", **kw),
    "permuted": lambda a, kw: permuted_moe(*a, **kw),
}
SCHEMES = [
    Fp8Scheme(w, a)
    for w, a in (
        ("tensor", None),
        ("channel", None),
        ("block", None),
        ("tensor", "tensor"),
        ("channel", "token"),
        ("block", "group"),
        ("tensor", "group"),
        ("block", "token"),
    )  # fmt: skip
]
OPTIONS = {
    "plain": {},
    "fp16": dict(dtype=torch.float16),
    "fp32": dict(dtype=torch.float32),
    "kn": dict(layout="kn"),
    "bias": dict(bias=True),
    "invalid": dict(invalid=True, bias=True),
    "gelu": dict(activation="gelu"),
    "gelu_tanh limit": dict(activation="gelu_tanh", limit=0.5),
    "swigluoai kn": dict(activation="swigluoai", bias=True, layout="kn", id_dtype=torch.int64),
    "relu2": dict(activation="relu2"),
    "on input": dict(top_k=1, on_input=True, bias=True),
    "on input fp8": dict(top_k=1, on_input=True, scheme=Fp8Scheme("tensor", "tensor")),
    "static": dict(scheme=Fp8Scheme("tensor", "tensor"), static=True, bias=True),
    "e5m2": dict(scheme=Fp8Scheme("channel", "token"), weight_dtype=E5M2),
    "block kn invalid": dict(scheme=Fp8Scheme("block", "group"), layout="kn", invalid=True),
    "tensor invalid": dict(scheme=Fp8Scheme("tensor", "tensor"), invalid=True),
    "fp16 W8A16 e5m2": dict(dtype=torch.float16, scheme=Fp8Scheme("block", None), weight_dtype=E5M2),
} | {f"fp8 {s.weight}-{s.activation}": dict(scheme=s) for s in SCHEMES}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("option", OPTIONS)
def test_layer(option, run):
    small = dict(tokens=3, experts=4) if run == "low_latency" else {}
    arguments, keywords, expected = make(**(OPTIONS[option] | small))
    before = [t.clone() for t in arguments]
    result = RUNS[run](arguments, keywords)
    check(result, expected, arguments[0].dtype)
    for tensor, copy in zip(arguments, before):
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))


@pytest.mark.parametrize("run", ("aligned", "permuted"))
@pytest.mark.parametrize("scheme", (None, Fp8Scheme("tensor", "tensor"), Fp8Scheme("block", "group")), ids=str)
def test_expert_map(scheme, run):
    arguments, keywords, expected = make(mapped=True, scheme=scheme, experts=9, invalid=True)
    check(RUNS[run](arguments, keywords), expected, torch.bfloat16)


def test_gate_up_boundary_inside_a_block():
    arguments, keywords, expected = make(hidden=300, size=200, experts=2, scheme=Fp8Scheme("block", "group"))
    check(fused_moe(*arguments, **keywords), expected, torch.bfloat16)


@pytest.mark.parametrize("run", RUNS)
def test_strided_tensors_and_out(run):
    (x, w13, w2, weights, ids), keywords, expected = make(tokens=4, experts=4)
    wide = torch.full((4, 256), math.nan, dtype=x.dtype)
    wide[:, :160] = x
    gap = torch.full((4, *w13.shape[1:], 2), math.nan, dtype=x.dtype)
    gap[..., 0] = w13
    out = torch.empty(4, 200, dtype=x.dtype)[:, :160]
    tables = weights.T.contiguous().T, ids.T.contiguous().T
    result = RUNS[run]((wide[:, :160], gap[..., 0], w2, *tables), keywords | {"out": out})
    assert result is out
    check(out, expected, x.dtype)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("scheme", (None, Fp8Scheme("tensor", "tensor"), Fp8Scheme("block", "group")), ids=str)
def test_nan_stays_in_its_row(scheme, run):
    (x, *rest), keywords, _ = make(tokens=4, experts=4, scheme=scheme)
    clean = RUNS[run]((x, *rest), keywords)
    x[2, 17] = math.nan
    result = RUNS[run]((x, *rest), keywords)
    assert result[2].isnan().all() and torch.isfinite(result[[0, 1, 3]]).all()
    if scheme is None or scheme.activation == "group":
        assert torch.equal(result[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("run", RUNS)
def test_no_valid_id_and_no_token(run):
    (x, w13, w2, weights, ids), keywords, _ = make(tokens=3, experts=4, scheme=Fp8Scheme("tensor", "tensor"))
    result = RUNS[run]((x, w13, w2, weights, torch.full_like(ids, -1)), keywords)
    assert (result == 0).all()
    empty = RUNS[run]((x[:0], w13, w2, weights[:0], ids[:0]), keywords)
    assert empty.shape == (0, 160)


def test_repeatable_and_duplicate_ids():
    (x, w13, w2, weights, ids), keywords, _ = make()
    ids[:, 1] = ids[:, 0]
    twice = fused_moe(x, w13, w2, weights, ids, **keywords)
    assert torch.equal(twice, fused_moe(x, w13, w2, weights, ids, **keywords))
    once = fused_moe(x, w13, w2, weights.sum(1, keepdim=True), ids[:, :1], **keywords)
    torch.testing.assert_close(twice.float(), once.float(), rtol=3e-2, atol=3e-2)


def test_low_latency_condition():
    assert takes_low_latency_path(2, 2, 16, None)
    assert not takes_low_latency_path(3, 2, 16, None)
    assert not takes_low_latency_path(1, 1, 16, torch.zeros(16))


def test_low_latency_launches_no_alignment(monkeypatch):
    arguments, keywords, expected = make(tokens=1, experts=8)
    monkeypatch.setattr("kernels.triton.fused_moe.moe_align_block_size", lambda *a, **k: pytest.fail("aligned"))
    check(fused_moe(*arguments, **keywords), expected, torch.bfloat16)


def broken_calls():
    """message -> (exception, what to change in a good call)."""
    return {
        "Hidden size mismatch": (ValueError, lambda a, kw: a.__setitem__(0, a[0][:, :128].contiguous())),
        "layout='nn'": (ValueError, lambda a, kw: kw.update(layout="nn")),
        "Expert shape mismatch": (ValueError, lambda a, kw: a.__setitem__(2, a[2][..., 1:])),
        "activation='mish'": (ValueError, lambda a, kw: kw.update(activation="mish")),
        "limit=-1": (ValueError, lambda a, kw: kw.update(limit=-1.0)),
        "topk_ids: dtype torch.int16": (TypeError, lambda a, kw: a.__setitem__(4, a[4].short())),
        "topk_weights: dtype torch.bfloat16": (TypeError, lambda a, kw: a.__setitem__(3, a[3].bfloat16())),
        "topk_weights: shape": (ValueError, lambda a, kw: a.__setitem__(3, a[3][:, :1])),
        "w13: dtype torch.float32": (TypeError, lambda a, kw: a.__setitem__(1, a[1].float())),
        "hidden_states: stride": (ValueError, lambda a, kw: a.__setitem__(0, a[0].T.contiguous().T)),
        "top_k=2; valid: top_k=1": (ValueError, lambda a, kw: kw.update(apply_router_weight_on_input=True)),
        "num_experts=9": (ValueError, lambda a, kw: kw.update(num_experts=9)),
        "out: shape": (ValueError, lambda a, kw: kw.update(out=a[0][:1].clone())),
        "out: dtype": (TypeError, lambda a, kw: kw.update(out=a[0].float())),
        "shares memory": (ValueError, lambda a, kw: kw.update(out=a[0])),
        "w2_bias: shape": (ValueError, lambda a, kw: kw.update(w2_bias=torch.zeros(6, 3))),
        "w13_scale: given with scale granularity None": (ValueError, lambda a, kw: kw.update(w13_scale=torch.ones(6))),
        "expert_map: shape": (ValueError, lambda a, kw: kw.update(expert_map=torch.zeros(4, dtype=torch.int32))),
    }


@pytest.mark.parametrize("call", (fused_moe, permuted_moe))
@pytest.mark.parametrize("message", broken_calls())
def test_errors_name_the_field(message, call):
    arguments, keywords, _ = make(tokens=2)
    arguments = list(arguments)
    kind, spoil = broken_calls()[message]
    spoil(arguments, keywords)
    with pytest.raises(kind, match=message):
        call(*arguments, **keywords)


# --- the backends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("TritonMoE", "TritonAlignedMoE", "TritonPermuteMoE"))
def test_backend_follows_the_layer(name):
    moe = getattr(backend, name)()
    (x, w13, w2, weights, ids), _, expected = make()
    problem = SimpleNamespace(
        tokens=12, hidden_size=160, intermediate_size=72, num_experts=6, top_k=2, dtype="bf16", quant=None,
        activation="silu", limit=None, bias=False, router_weight_on_input=False, layout="nk", ep=None, shared_experts=0,
    )  # fmt: skip
    names = ("w13_scale", "w2_scale", "w13_bias", "w2_bias", "a13_scale", "a2_scale", "expert_map")
    layer = SimpleNamespace(problem=problem, w13=w13, w2=torch.zeros_like(w2), **dict.fromkeys(names))
    call = moe.prepare(problem, layer)
    assert (call(x, weights, ids) == 0).all()
    layer.w2 = w2
    check(call(x, weights, ids), expected, torch.bfloat16)
    refusal = moe.supports(problem)
    assert refusal.startswith("scenario: ") if name == "TritonAlignedMoE" else refusal is None
    required, forbidden = moe.expected_launches(problem)
    assert {"moe_gemm", "align"} <= required and not required & forbidden
    problem.shared_experts = 1
    assert moe.supports(problem).startswith("shared_experts:")


def test_the_aligned_backend_runs_where_the_other_path_is_taken():
    def refusal(**changes):
        fields = dict(
            tokens=2, num_experts=16, top_k=2, dtype="bf16", quant=None, activation="silu", limit=None, ep=None,
            router_weight_on_input=False, shared_experts=0,
        )  # fmt: skip
        return backend.TritonAlignedMoE().supports(SimpleNamespace(**(fields | changes)))

    assert refusal() is None
    for changes in ({"tokens": 3}, {"tokens": 0}, {"ep": object()}):
        assert refusal(**changes) == "scenario: the aligned path is what `triton` takes here already"
    assert refusal(dtype="fp64").startswith("dtype: ")


def test_permuted_moe_refuses_what_no_layer_has():
    arguments, keywords, _ = make(tokens=2)
    with pytest.raises(TypeError, match="actvation"):
        permuted_moe(*arguments, **keywords, actvation="silu")


def test_kernels_import_nothing_of_the_harness():
    for source in Path(backend.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {m.split(".")[0] for m in modules} & {"harness", "reference", "cases", "tests"}, source
