"""kernels/grouped.py and kernels/upstream/transformers.py: right results, the roundings they declare, and no others."""

import gc
import importlib.util
import math
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from harness.base.processes import ROOT
from kernels.grouped import GroupedMM, grouped_mm_refusal
from kernels.upstream import transformers as upstream

IO = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRANSFORMERS = [upstream.Eager(), upstream.BatchedMM(), upstream.GroupedMM()]
if importlib.util.find_spec("transformers") is None:
    TRANSFORMERS = []
ALL = [GroupedMM(), *TRANSFORMERS]


def named(backend):
    return backend.name


def make_problem(**changes):
    fields = dict(
        tokens=24, hidden_size=32, intermediate_size=48, num_experts=6, top_k=2, dtype="fp32", quant=None,
        activation="silu", limit=None, bias=False, router_weight_on_input=False, layout="nk", ep=None,
        invalid_ids=False, shared_experts=0,
    )  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def make_layer(problem, experts=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden, inner = problem.hidden_size, problem.intermediate_size
    outer = inner if problem.activation == "relu2" else 2 * inner
    experts = (experts or problem.num_experts) + problem.shared_experts

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng) * scale).to(IO[problem.dtype])

    w13 = normal(experts, outer, hidden, scale=1.5 / math.sqrt(hidden))
    w2 = normal(experts, hidden, inner, scale=1 / math.sqrt(inner))
    if problem.layout == "kn":
        w13, w2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    return SimpleNamespace(
        problem=problem, w13=w13, w2=w2, w13_scale=None, w2_scale=None, a13_scale=None, a2_scale=None, expert_map=None,
        w13_bias=normal(experts, outer) if problem.bias else None,
        w2_bias=normal(experts, hidden) if problem.bias else None,
    )  # fmt: skip


def make_call(problem, seed=1):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(problem.tokens, problem.num_experts, generator=rng)
    ids = scores.argsort(1)[:, : problem.top_k].int()
    x = torch.randn(problem.tokens, problem.hidden_size, generator=rng).to(IO[problem.dtype])
    return x, torch.rand(problem.tokens, problem.top_k, generator=rng) + 0.25, ids


def naive(layer, x, weights, ids, plan=None):
    """Pair by pair in float64; with a plan its roundings are repeated, and the result is stored in io."""
    problem, plan = layer.problem, plan or {}
    io = IO[problem.dtype]

    def store(value, where):
        return value.to(io).double() if where == "io" else value

    w13, w2 = layer.w13.double(), layer.w2.double()
    if problem.layout == "kn":
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        pairs = [(int(e), w.double()) for e, w in zip(ids[t], weights[t]) if 0 <= e < problem.num_experts]
        if layer.expert_map is not None:
            pairs = [(int(layer.expert_map[e]), w) for e, w in pairs if layer.expert_map[e] >= 0]
        pairs += [(len(w13) - 1 - s, torch.tensor(1.0).double()) for s in range(problem.shared_experts)]
        if plan.get("combine") == "io":  # experts are met in ascending order
            pairs.sort(key=lambda pair: pair[0])
        for e, w in pairs:
            row = x[t].double()
            if problem.router_weight_on_input:
                row, w = store(row * w, plan.get("weighted_input")), torch.ones_like(w)
            h = w13[e] @ row
            h = store(h if layer.w13_bias is None else h + layer.w13_bias[e].double(), plan.get("gate_up"))
            a = store(activation(h, problem, lambda g: store(g, "io") if plan.get("act_chain") else g), plan.get("act"))
            y = w2[e] @ a
            y = store(y if layer.w2_bias is None else y + layer.w2_bias[e].double(), plan.get("slot")) * w
            y = store(y, "io" if plan.get("weight") == "rounded" else None)
            out[t] = store(out[t] + y, plan.get("combine"))
    return store(out, "io") if plan else out


def activation(h, problem, chain):
    if problem.activation == "relu2":
        return h.relu() ** 2
    if problem.activation == "swigluoai":
        limit = problem.limit or 7.0
        gate, up = h[0::2].clamp(max=limit), h[1::2].clamp(-limit, limit)
        return chain(gate * torch.sigmoid(1.702 * gate)) * (up + 1)
    gate, up = h.chunk(2)
    if problem.limit is not None:
        gate, up = gate.clamp(max=problem.limit), up.clamp(-problem.limit, problem.limit)
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}[problem.activation]
    return chain(act(gate)) * up


def run(backend, layer, call, **more):
    assert backend.supports(layer.problem, device="cpu") is None
    return backend.prepare(layer.problem, layer)(*call, **more)


PROBLEMS = [
    {},
    {"activation": "gelu"},  # erf, not tanh
    {"activation": "gelu_tanh"},
    {"activation": "relu2"},
    {"activation": "swigluoai"},  # interleaved, limit 7 by default
    {"activation": "swigluoai", "bias": True, "limit": 0.5},
    {"limit": 0.5, "activation": "gelu"},
    {"layout": "kn"},
    {"layout": "kn", "activation": "swigluoai", "bias": True},
    {"layout": "kn", "activation": "relu2"},
    {"top_k": 6},  # every expert
    {"tokens": 1, "num_experts": 64},  # nearly all experts empty
    {"bias": True},
    {"top_k": 1, "router_weight_on_input": True},
    {"top_k": 1, "router_weight_on_input": True, "bias": True, "limit": 1.0},
    {"shared_experts": 2},
]


@pytest.mark.parametrize("changes", PROBLEMS, ids=str)
@pytest.mark.parametrize("backend", ALL, ids=named)
def test_float32_agrees_with_the_naive_layer(backend, changes):
    problem = make_problem(**changes)
    reason = backend.supports(problem, device="cpu")
    if reason is not None:
        assert backend is not ALL[0], "torch-grouped-mm does all of these"
        pytest.skip(reason)
    layer, call = make_layer(problem), make_call(problem)
    torch.testing.assert_close(run(backend, layer, call).double(), naive(layer, *call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "changes", [{}, {"activation": "gelu_tanh", "limit": 1.0}, {"activation": "relu2", "layout": "kn"}], ids=str
)
@pytest.mark.parametrize("backend", ALL, ids=named)
def test_declared_roundings_are_those_performed(backend, changes, dtype):
    """Repeating the declared roundings in float64 gives the backend's bits; without any one of them it does not."""
    problem = make_problem(dtype=dtype, top_k=3, **changes)
    if reason := backend.supports(problem, device="cpu"):
        assert backend in TRANSFORMERS and " has none" in reason, "only families that this transformers lacks"
        pytest.skip(reason)
    layer, call = make_layer(problem), make_call(problem)
    got, (plan,) = run(backend, layer, call).double(), backend.plans(problem)

    def equal(declared):
        return float((naive(layer, *call, plan=declared) == got).double().mean())

    # Not all: float32 sums near a tie round the other way.
    assert equal(plan) > 0.97
    finest = dict(gate_up="fp32", act_chain=False, act="fp32", slot="fp32", weight="after_store", combine="fp32")
    for name, fine in finest.items():
        if plan[name] != fine:
            assert equal({**plan, name: fine}) < equal(plan) - 0.04, name


@pytest.fixture
def poisoned_grouped_mm(monkeypatch):
    """grouped_mm as it may be: rows past offs[-1] hold anything."""
    product = F.grouped_mm

    def poisoned(a, b, *, offs):
        result = product(a, b, offs=offs)
        result[int(offs[-1]) :] = math.nan
        return result

    monkeypatch.setattr(F, "grouped_mm", poisoned)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has the private function only")
@pytest.mark.usefixtures("poisoned_grouped_mm")
@pytest.mark.parametrize("activation", ["silu", "relu2", "swigluoai"])
@pytest.mark.parametrize("backend", ALL, ids=named)
def test_unserved_ids_contribute_nothing(backend, activation):
    problem = make_problem(activation=activation, invalid_ids=True, ep=SimpleNamespace(size=2, rank=0), top_k=3)
    if reason := backend.supports(problem, device="cpu"):
        assert backend in TRANSFORMERS and reason.partition(":")[0] in ("invalid_ids", "activation")
        pytest.skip(reason)
    layer = make_layer(problem, experts=3)
    layer.expert_map = torch.tensor([2, -1, 0, -1, -1, 1], dtype=torch.int32)
    x, weights, ids = make_call(problem)
    ids[0], ids[1], ids[2, 1:] = -1, torch.tensor([1, 3, 4]), -1
    weights[0] = math.nan  # nobody reads the weight of an invalid slot
    got = run(backend, layer, (x, weights, ids))
    assert (got[:2] == 0).all()
    torch.testing.assert_close(got.double(), naive(layer, x, weights, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL, ids=named)
def test_edges_of_the_call(backend):
    problem = make_problem()
    layer, (x, weights, ids) = make_layer(problem), make_call(problem)
    call = backend.prepare(problem, layer)
    whole = call(x, weights, ids)
    assert call(x[:0], weights[:0], ids[:0]).shape == (0, 32)
    assert torch.equal(call(x, weights, ids.long()), whole)
    padded = torch.full((24, 40), math.nan)
    padded[:, :32] = x
    torch.testing.assert_close(call(padded[:, :32], weights, ids), whole)
    out = torch.full_like(x, math.nan)
    assert call(x, weights, ids, out=out) is out and torch.equal(out, whole)
    kept = x.clone(), weights.clone(), ids.clone()
    call(x, weights, ids)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, weights, ids))), "inputs are not written to"


@pytest.mark.parametrize("backend", ALL, ids=named)
def test_the_layer_is_read_at_every_call_and_not_kept(backend):
    problem = make_problem()
    layer, call_with = make_layer(problem), make_call(problem)
    call = backend.prepare(problem, layer)
    call(*call_with)
    old, storage = weakref.ref(layer.w13), StorageWeakRef(layer.w2.untyped_storage())
    other = make_layer(problem, seed=5)
    layer.w13, layer.w2 = other.w13, other.w2
    gc.collect()
    assert old() is None and storage.expired(), "the replaced weights are still held"
    for change in ("rebound", "in place", "activation", "experts"):
        if change == "in place":
            layer.w13.mul_(0.5)
        if change == "activation":
            layer.problem = make_problem(activation="gelu")
        if change == "experts":
            layer.problem = make_problem(num_experts=3)
            layer.w13, layer.w2 = layer.w13[:3], layer.w2[:3]
            call_with = make_call(layer.problem)
        torch.testing.assert_close(
            call(*call_with).double(), naive(layer, *call_with), rtol=1e-5, atol=1e-5, msg=change
        )


@pytest.mark.parametrize("backend", ALL, ids=named)
def test_threads_share_a_prepared_call(backend):
    problem = make_problem(tokens=8)
    layer = make_layer(problem)
    call, calls = backend.prepare(problem, layer), [make_call(problem, seed) for seed in range(8)]
    want, got = [naive(layer, *c) for c in calls], [None] * 8
    threads = [threading.Thread(target=lambda i=i: got.__setitem__(i, call(*calls[i]))) for i in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    for g, w in zip(got, want):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "backend, changes, keyword",
    [
        (GroupedMM(), {"quant": "e4m3.block.group"}, "quant"),
        (GroupedMM(), {"hidden_size": 36, "dtype": "bf16"}, "shape"),
        (GroupedMM(), {"dtype": "fp64"}, "dtype"),
        (upstream.Eager(), {"quant": "e4m3.block.group"}, "quant"),
        (upstream.Eager(), {"bias": True}, "bias"),
        (upstream.BatchedMM(), {"top_k": 1, "router_weight_on_input": True}, "router_weight_on_input"),
        (upstream.BatchedMM(), {"shared_experts": 1}, "shared_experts"),
        (upstream.BatchedMM(), {"activation": "swigluoai", "dtype": "bf16"}, "activation"),
        (upstream.GroupedMM(), {"hidden_size": 36, "dtype": "bf16"}, "shape"),
        (upstream.BatchedMM(), {"tokens": 2**20, "hidden_size": 4096}, "memory"),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_an_unsupported_case_has_a_reason_with_a_keyword(backend, changes, keyword):
    assert backend.supports(make_problem(**changes)).startswith(f"{keyword}: ")


@pytest.mark.skipif(not TRANSFORMERS, reason="transformers is not installed")
def test_faults_of_a_transformers_version_are_found_by_a_probe(monkeypatch):
    def failure(backend, limit, sentinel=False):
        return upstream._failure.__wrapped__(backend.implementation, "swigluoai", limit, sentinel)

    for backend in (upstream.Eager, upstream.BatchedMM, upstream.GroupedMM):
        assert failure(backend, None) is None and failure(backend, 128.0) is None and failure(backend, 0.5) is None
    with monkeypatch.context() as patch:
        patch.setattr(upstream, "ALPHA", 1.0)
        assert failure(upstream.Eager, 7.0) == "computes 8 of 8 tokens wrong"
    with monkeypatch.context() as patch:  # ids out of range reach the module: on a GPU a device-side assert
        patch.setattr(upstream, "local_experts", lambda ids, *rest: ids.masked_fill(ids < 0, 99))
        assert "Error: " in failure(upstream.Eager, 7.0, sentinel=True)


@pytest.mark.skipif(not TRANSFORMERS, reason="transformers is not installed")
def test_probed_failures_are_declared(monkeypatch):
    ep = SimpleNamespace(size=2, rank=0)
    moe = upstream.Eager()
    monkeypatch.setattr(upstream, "_failure", lambda *kind: "asserts" if kind[-1] else None)
    assert moe.supports(make_problem()) is None
    assert moe.supports(make_problem(ep=ep)).startswith("expert_map: transformers 5.")
    assert moe.supports(make_problem(invalid_ids=True)).endswith("fails on an id without expert: asserts")
    monkeypatch.setattr(upstream, "_failure", lambda *kind: "computes nonsense")
    assert moe.supports(make_problem(activation="swigluoai", limit=3.0)).startswith(
        "activation: swigluoai, limit=3.0 in"
    )


def test_bad_arguments_are_named_before_out_is_written():
    problem = make_problem(shared_experts=1, bias=True)
    layer, (x, weights, ids) = make_layer(problem), make_call(problem)
    call, out = GroupedMM().prepare(problem, layer), torch.full_like(x, 7.0)
    for bad, message in (
        ((x[:, :16], weights, ids), "out: shape"),
        ((x, weights.half(), ids), "topk_weights: dtype"),
        ((x, weights, ids.float()), "topk_ids: dtype"),
        ((x, weights, ids.to("meta")), "topk_ids: device meta"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call(*bad, out=out)
    layer.w2_bias = layer.w2_bias[:, 1:]
    with pytest.raises(ValueError, match="w2_bias: shape"):
        call(x, weights, ids, out=out)
    layer.w2_bias, problem.num_experts = None, 5
    with pytest.raises(ValueError, match="num_experts=5; valid without expert_map: 6"):
        call(x, weights, ids, out=out)
    assert (out == 7).all()


def test_a_dtype_that_grouped_mm_refuses_is_reported_with_its_reason():
    assert grouped_mm_refusal("cpu", torch.bfloat16) is None
    assert "grouped_mm on cpu: " in grouped_mm_refusal("cpu", torch.float64)


def test_available_names_the_missing_or_old_package(monkeypatch):
    assert GroupedMM().available() is None
    for version, reason in (("4.57.1", "transformers 4.57.1"), ("5.0.0.dev0", None)):
        monkeypatch.setattr(upstream.importlib.metadata, "version", lambda package, version=version: version)
        found = upstream.Eager().available()
        assert found is None if reason is None else found.startswith(reason)

    def missing(package):
        raise upstream.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(upstream.importlib.metadata, "version", missing)
    assert upstream.Eager().available() == "the package transformers is not installed"


@pytest.mark.skipif(not TRANSFORMERS, reason="transformers is not installed")
def test_the_package_called_kernels_changes_nothing(tmp_path):
    """With PyPI's `kernels` installed transformers would import from this project's folder of that name, and fail."""
    minimum = upstream.import_transformers("utils.import_utils").KERNELS_MIN_VERSION
    info = tmp_path / f"kernels-{minimum}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {minimum}\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise AssertionError('the PyPI package was imported')\n")
    script = textwrap.dedent(
        f"""
        import sys
        sys.path[:0], sys.path[len(sys.path):] = [{str(ROOT)!r}], [{str(tmp_path)!r}]
        import importlib.metadata
        assert importlib.metadata.version("kernels") == {minimum!r}
        from tests.kernels import test_portable_backends as t
        problem = t.make_problem(tokens=3)
        layer, call = t.make_layer(problem), t.make_call(problem)
        for backend in t.TRANSFORMERS:
            assert t.torch.allclose(t.run(backend, layer, call).double(), t.naive(layer, *call), atol=1e-5)
        import kernels, transformers
        assert kernels.__path__[0] == {str(ROOT / "kernels")!r}, kernels.__path__
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        from transformers.utils import is_kernels_available
        assert not is_kernels_available()
        assert MixtralExperts.__module__ == "transformers.models.mixtral.modeling_mixtral"
        print("fine")
        """
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = dict(capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    done = subprocess.run([sys.executable, "-c", script], **options)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-2000:]
