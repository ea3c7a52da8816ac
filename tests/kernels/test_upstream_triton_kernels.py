"""The adapter to Triton's own MoE kernels: which package it takes for them, what it refuses, what it hands over.

matmul_ogs needs a GPU, so a torch product takes its place here: gather, bias, activation, gammas, scatter, sum, by the
indices that the adapter made. The routing is the package's own where it is installed, run by Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from harness.backend import Layer
from harness.problem.case import Case
from kernels.grouped import activate
from kernels.upstream import triton_kernels as adapter
from kernels.upstream.triton_kernels import TritonKernels, TritonKernelsInvariant, TritonKernelsSorted

unavailable = TritonKernels().available()
needs_package = pytest.mark.skipif(unavailable is not None, reason=str(unavailable))


def problem(descriptor: str):
    return Case.parse(descriptor).problem


@pytest.fixture
def search_path(tmp_path, monkeypatch):
    """A folder that is all that can be imported from, beside what is built in."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in list(sys.modules):
        if name.partition(".")[0] in ("triton_kernels", "vllm"):
            monkeypatch.delitem(sys.modules, name)
    return tmp_path


def put(folder, *files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", *files):
        (folder / name).write_text("raise ImportError('nobody imports this to look')\n")


def test_a_missing_package_is_reported(search_path):
    assert TritonKernels().available() == "triton_kernels is not installed, nor a vllm that has a copy"


def test_the_package_of_that_name_on_pypi_is_refused(search_path):
    put(search_path / "triton_kernels")
    assert "has no matmul_ogs.py" in str(TritonKernels().available())
    with pytest.raises(ImportError, match="another version or package"):
        adapter.import_package.__wrapped__()


def test_another_package_of_that_name_does_not_hide_the_copy_in_vllm(search_path):
    copy = search_path / "vllm" / "third_party" / "triton_kernels"
    put(search_path / "vllm")
    put(search_path / "triton_kernels")
    put(copy, *adapter.NEEDED)
    assert adapter.find() == (copy, "")


@pytest.mark.parametrize("backend", [TritonKernels(), TritonKernelsSorted(), TritonKernelsInvariant()])
@pytest.mark.parametrize(
    "descriptor, keyword",
    [
        ("t4-h16-i8-e4-k2-bf16", None),
        ("t4-h16-i8-e4-k2-fp32-swigluoai-limit3-bias-kn-ep2.1-ids64", None),
        ("t4-h16-i8-e4-k1-fp16-win", None),
        ("t4-h16-i8-e4-k1-fp16-win-bias", "router_weight_on_input"),
        ("t4-h16-i8-e4-k2-bf16-e4m3.tensor.static", None),
        ("t4-h16-i8-e4-k2-bf16-e4m3.tensor.static-kn", "layout"),
        ("t4-h16-i8-e4-k2-bf16-e4m3.block.group", "quant"),
        ("t4-h16-i8-e4-k2-bf16-shared1", "shared_experts"),
        ("t4-h16-i8-e4-k2-bf16-beyond", "invalid_ids"),
    ],
)
def test_supports(backend, descriptor, keyword):
    refusal = backend.supports(problem(descriptor), device="cuda")
    assert (refusal and refusal.partition(":")[0]) == keyword


def test_only_its_own_routing_wants_a_power_of_two():
    p = problem("t4-h16-i8-e8-k6-bf16")
    assert str(TritonKernels().supports(p)).startswith("shape: top_k=6")
    assert TritonKernelsSorted().supports(p) is None


def product(calls):
    """matmul_ogs by its documentation, for data of TritonKernelsSorted; rows that nobody asked for are NaN."""

    def matmul_ogs(
        x, w, bias, data, gather_indx=None, scatter_indx=None, precision_config=None, gammas=None, y=None,
        fused_activation=None,
    ):  # fmt: skip
        calls.append(SimpleNamespace(w=w, gammas=gammas, fused=fused_activation, precision=precision_config, y=y))
        experts = torch.repeat_interleave(torch.arange(len(data.expt_hist)), data.expt_hist.long())
        rows = torch.arange(len(experts))
        if gather_indx is not None:
            rows = gather_indx.src_indx[rows].long() // data.n_expts_act
        flex = precision_config.flex_ctx
        h = torch.einsum("pk,pkn->pn", x[rows].float(), w[experts].float())
        for known in (flex.lhs, flex.rhs):
            if known is not None:
                h = h * (known.scale[experts, None] if len(known.scale) > 1 else known.scale)
        h = h if bias is None else h + bias[experts]
        h = h if fused_activation is None else activate(h, "swigluoai", fused_activation.args[1])
        h = h if gammas is None else h * gammas[: len(h), None]
        pairs = len(data.gate_scal)
        if scatter_indx is None:
            return torch.full((pairs, h.shape[1]), torch.nan).index_copy(0, torch.arange(len(h)), h).to(
                precision_config.out_dtype
            )  # fmt: skip
        source = scatter_indx.src_indx.long()
        slots = h.new_zeros(pairs, h.shape[1])
        slots[source >= 0] = h[source[source >= 0]]
        result = slots.view(-1, data.n_expts_act, h.shape[1]).sum(1).to(precision_config.out_dtype)
        return result if y is None else y.squeeze(0).copy_(result)

    return matmul_ogs


@pytest.fixture
def calls(monkeypatch):
    """The package replaced; a list of what its matmul_ogs was called with."""

    def plain(*names):
        def make(*args, **kwargs):
            return SimpleNamespace(**(dict.fromkeys(names) | dict(zip(names, args)) | kwargs))

        return make

    made: list[SimpleNamespace] = []
    package = SimpleNamespace(
        matmul=SimpleNamespace(
            matmul_ogs=product(made), FnSpecs=plain("name", "fn", "arg_names"),
            FusedActivation=plain("specs", "args", "reduction_n"), FlexCtx=plain("lhs", "rhs"),
            PrecisionConfig=plain("flex_ctx", "out_dtype"),
        ),
        routing=SimpleNamespace(
            compute_expt_data=lambda hist, experts, pairs: None,
            RoutingData=plain("gate_scal", "expt_hist", "n_expts_tot", "n_expts_act", "expt_data"),
            GatherIndx=plain("src_indx", "dst_indx"), ScatterIndx=plain("src_indx", "dst_indx"),
        ),
        swiglu=SimpleNamespace(swiglu_fn=None), numerics=SimpleNamespace(InFlexData=plain("dtype", "scale")),
    )  # fmt: skip
    monkeypatch.setattr(adapter, "import_package", lambda: package)
    return made


def answers(descriptor: str, seed: int = 0):
    """(the adapter's answer, the layer by loops in float32, the layer) for a small problem in float32 or fp8."""
    p, rng = problem(descriptor), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) / 2

    e, k, i = p.local_experts, p.hidden_size, p.intermediate_size
    w13, w2 = normal(e, p.w13_rows, k), normal(e, k, i)
    bias = (normal(e, p.w13_rows), normal(e, k)) if p.bias else (None, None)
    table = None
    if p.ep is not None:
        table = torch.full((p.num_experts,), -1, dtype=torch.int32)
        table[p.ep.rank * e :][:e] = torch.arange(e, dtype=torch.int32)
    handed = (w13.transpose(1, 2), w2.transpose(1, 2)) if p.layout == "kn" else (w13, w2)
    layer = Layer(p, *handed, w13_bias=bias[0], w2_bias=bias[1], expert_map=table)
    x, weights = normal(p.tokens, k), torch.rand(p.tokens, p.top_k, generator=rng)
    ids = torch.rand(p.tokens, p.num_experts, generator=rng).argsort(1)[:, : p.top_k].int()
    if p.routing == "invalid":
        ids[::2, -1] = -1
    if p.routing == "duplicate":
        ids[:] = ids[:, :1]
    want = torch.zeros(p.tokens, k)
    for t, s in torch.cartesian_prod(torch.arange(p.tokens), torch.arange(p.top_k)).tolist():
        expert, weight = int(ids[t, s]), weights[t, s]
        expert = expert if expert < 0 or table is None else int(table[expert])
        if expert < 0:
            continue
        h = w13[expert] @ (x[t] * weight if p.router_weight_on_input else x[t])
        h = h if bias[0] is None else h + bias[0][expert]
        y = w2[expert] @ activate(h, p.activation, p.limit)
        y = y if bias[1] is None else y + bias[1][expert]
        want[t] += y if p.router_weight_on_input else weight * y
    out = torch.full_like(x, torch.nan)
    got = TritonKernelsSorted().prepare(p, layer)(x, weights, ids, out=out)
    assert got.data_ptr() == out.data_ptr()
    return got, want


@pytest.mark.parametrize(
    "descriptor",
    [
        "t7-h12-i6-e5-k3-fp32", "t7-h12-i6-e4-k2-fp32-swigluoai-bias-limit1", "t7-h12-i6-e4-k2-fp32-relu2-kn-bias",
        "t7-h12-i6-e4-k2-fp32-ep2.1-invalid", "t7-h12-i6-e4-k1-fp32-win-swigluoai", "t7-h12-i6-e4-k2-fp32-duplicate",
    ],
)  # fmt: skip
def test_it_passes_the_layer_on(calls, descriptor):
    got, want = answers(descriptor)
    torch.testing.assert_close(got, want)
    assert [bool(c.fused) for c in calls] == ["swigluoai" in descriptor and "win" not in descriptor, False]
    assert [c.gammas is not None for c in calls] == ["win" in descriptor, "win" not in descriptor]


def test_fp8_operands_and_their_scales(calls):
    p = problem("t4-h8-i4-e2-k1-bf16-relu2-e4m3.tensor.static")
    ones = torch.ones(2, 4, 8), torch.ones(2, 8, 4)
    w13, w2 = (w.to(torch.float8_e4m3fn) for w in ones)
    scales = [torch.tensor(s) for s in ([2.0, 4.0], [1.0, 0.5], [0.5], [8.0])]
    layer = Layer(p, w13, w2, **dict(zip(("w13_scale", "w2_scale", "a13_scale", "a2_scale"), scales)))
    ids = torch.tensor([[0], [1], [0], [1]], dtype=torch.int32)
    got = TritonKernelsSorted().prepare(p, layer)(torch.ones(4, 8).bfloat16(), torch.ones(4, 1), ids)
    assert [c.w.dtype for c in calls] == [torch.float8_e4m3fn] * 2
    assert all(c.w.stride(1) == 1 for c in calls)
    # h = 8 * scale, squared; four of them, times w2's scale
    assert got[:2, 0].tolist() == [4 * 16.0**2, 0.5 * 4 * 32.0**2]


@needs_package
def test_it_is_imported_without_vllm_and_routes_as_the_sort_does():
    """In Triton's interpreter, in a process of its own: what else the adapter makes by a sort, field by field."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", _ROUTES], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"] * 3 + ["[1,", "2,", "2,", "0]"], done.stdout


#: Last: ids that repeat within a token count once in the package's histogram, which is a fault of it (or of who asks).
_ROUTES = """
import sys, torch
from kernels.upstream import triton_kernels as adapter
package = adapter.import_package()
assert "vllm" not in sys.modules and package.matmul.__name__ == "triton_kernels.matmul_ogs"
rng = torch.Generator().manual_seed(0)
own, ours = adapter.TritonKernels(), adapter.TritonKernelsSorted()
for tokens, k, experts, invalid in ((16, 2, 8, 0.0), (37, 4, 70, 0.3), (4, 1, 3, 1.1)):
    ids = torch.rand(tokens, experts, generator=rng).argsort(1)[:, :k].int()
    ids[torch.rand(tokens, k, generator=rng) < invalid] = -1
    weights = torch.rand(tokens, k, generator=rng)
    (a, *one), (b, *two) = (x._route(package, ids, weights, experts) for x in (own, ours))
    pairs = [(a.expt_hist, b.expt_hist), (a.expt_data.token_offs_raw, b.expt_data.token_offs_raw)]
    pairs += [(x.gate_scal[: int((ids >= 0).sum())] for x in (a, b))]
    pairs += [(getattr(p, f), getattr(q, f)) for p, q in zip(one, two) for f in ("src_indx", "dst_indx")]
    for block in (16, 32, 64, 128):
        pairs += [(a.expt_data.block_pid_map[block], b.expt_data.block_pid_map[block])]
    assert all(torch.equal(p, q) for p, q in pairs)
    print("same")
ids = torch.tensor([[1, 1], [0, 2], [1, 2]], dtype=torch.int32)
print(own._route(package, ids, torch.rand(3, 2, generator=rng), 4)[0].expt_hist.tolist())
"""
