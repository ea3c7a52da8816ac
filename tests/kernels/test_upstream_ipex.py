"""kernels/upstream/ipex.py: without IPEX or with another torch it says so and imports nothing; with it, it computes."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from harness.base.processes import ROOT
from harness.problem.case import Case
from kernels.upstream import ipex
from kernels.upstream.ipex import FusedExperts, GatedMLP

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BACKENDS = [FusedExperts(), GatedMLP()]
WHY_NOT = FusedExperts().available()
installed = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def problem(descriptor):
    return Case.parse(descriptor).problem


def named(backend):
    return backend.name


@pytest.fixture(scope="module")
def layer():
    rng = torch.Generator().manual_seed(0)
    tokens, hidden, inter, experts, top_k = 9, 64, 96, 5, 2
    return SimpleNamespace(
        x=torch.randn(tokens, hidden, generator=rng), w13=torch.randn(experts, 2 * inter, hidden, generator=rng) / 8,
        w2=torch.randn(experts, hidden, inter, generator=rng) / 8,
        weights=torch.rand(tokens, top_k, generator=rng) + 0.5,
        ids=torch.rand(tokens, experts, generator=rng).argsort(1)[:, :top_k],
    )  # fmt: skip


def silu_layer(x, w13, w2, weights, ids):
    gate, up = torch.einsum("tk,enk->ten", x.float(), w13.float()).chunk(2, -1)
    y = torch.einsum("tei,eki->tek", F.silu(gate) * up, w2.float())
    return (y[torch.arange(len(x))[:, None], ids] * weights[..., None]).sum(1)


def test_supports_and_available_import_nothing():
    script = """
        import sys
        from harness.problem.case import Case
        from kernels.upstream.ipex import FusedExperts, GatedMLP
        for backend in (FusedExperts(), GatedMLP()):
            backend.available()
            backend.supports(Case.parse("t4-h64-i64-e4-k2-bf16-random").problem)
        assert "intel_extension_for_pytorch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=ROOT)


@pytest.mark.parametrize("backend", BACKENDS, ids=named)
def test_a_missing_package_is_named(backend, monkeypatch):
    monkeypatch.setattr(ipex, "installed", lambda *names: None)
    assert backend.available() == "the package intel-extension-for-pytorch is not installed"


@pytest.mark.parametrize("backend", BACKENDS, ids=named)
def test_another_torch_is_reported_without_the_import_that_would_fail(backend, monkeypatch):
    monkeypatch.setattr(ipex, "installed", lambda *names: (names[0], "1.13.100"))
    assert backend.available() == f"intel-extension-for-pytorch 1.13.100 needs torch 1.13, not {torch.__version__}"


@pytest.mark.parametrize(
    "backend, descriptor, keyword",
    [
        (FusedExperts(), "t4-h64-i64-e4-k2-fp16-random", "dtype"),
        (FusedExperts(), "t4-h48-i64-e4-k2-bf16-random", "shape"),
        (FusedExperts(), "t4-h64-i288-e4-k2-bf16-random", "shape"),
        (FusedExperts(), "t4-h64-i64-e4-k2-bf16-padded-random", "shape"),
        (FusedExperts(), "t4-h64-i64-e4-k2-bf16-e4m3.block.none-random", "quant"),
        (GatedMLP(), "t4-h64-i64-e4-k2-bf16-gelu-random", "activation"),
        (GatedMLP(), "t4-h64-i64-e4-k2-bf16-limit7-random", "activation"),
        (GatedMLP(), "t4-h64-i64-e4-k2-bf16-bias-random", "bias"),
        (GatedMLP(), "t4-h64-i64-e4-k1-bf16-win-random", "router_weight_on_input"),
        (GatedMLP(), "t4-h64-i64-e4-k2-bf16-ep2.1-random", "expert_map"),
        (GatedMLP(), "t4-h64-i64-e4-k2-bf16-invalid-random", "invalid_ids"),
        (GatedMLP(), "t4-h64-i64-e4-k2-bf16-shared1-random", "shared_experts"),
    ],
)
def test_refuses_what_ipex_has_not(backend, descriptor, keyword):
    assert backend.supports(problem(descriptor)).startswith(f"{keyword}: ")


def test_a_narrow_layer_needs_no_wide_blocks():
    assert FusedExperts().supports(problem("t4-h64-i224-e4-k2-bf16-random")) is None


@installed
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize(
    "backend, dtype, tolerance",
    [
        (FusedExperts(), "bf16", 6e-3),
        (GatedMLP(), "bf16", 1e-2),
        (GatedMLP(), "fp16", 2e-3),
        (GatedMLP(), "fp32", 1e-5),
    ],
)
def test_computes_with_the_given_weights_and_ids(backend, dtype, tolerance, layout, layer):
    p = problem("-".join(["t9-h64-i96-e5-k2", dtype, *(["kn"] if layout == "kn" else []), "random"]))
    x, w13, w2 = (t.to(DTYPES[dtype]) for t in (layer.x, layer.w13, layer.w2))
    want = silu_layer(x, w13, w2, layer.weights, layer.ids)
    stored = [w.transpose(1, 2).contiguous() if layout == "kn" else w for w in (w13, w2)]
    kept = [w.clone() for w in stored]
    call = backend.prepare(p, SimpleNamespace(problem=p, w13=stored[0], w2=stored[1]))
    out = torch.full_like(x, torch.nan)
    assert call(x, layer.weights, layer.ids, out=out) is out
    assert float((out.float() - want).norm() / want.norm()) < tolerance
    assert torch.equal(call(x, layer.weights, layer.ids.int()), out)
    assert all(torch.equal(*pair) for pair in zip(stored, kept))  # the module packs in place what it is given


@installed
def test_the_oracle_is_the_same_with_ipex_in_its_process(tmp_path):
    """IPEX also brings its own aten::sum, which rounds otherwise: the last bit of a variance, and of no output."""
    script = """
        import sys
        import torch
        if "with" in sys.argv:
            from kernels.upstream.ipex import import_ipex
            import_ipex()
        from harness.oracle.deviation import expect
        from harness.inputs.draw import draw
        from harness.problem.case import Case
        from reference.plan import RoundingPlan
        answers = []
        for descriptor in (
            "t9-h64-i96-e5-k2-bf16-random", "t9-h64-i96-e5-k2-fp32-gelu-bias-random",
            "t9-h64-i96-e5-k2-fp16-swigluoai-random",
            "t9-h128-i96-e4-k2-bf16-e4m3.block.group-random", "t9-h64-i96-e4-k1-bf16-gelu_tanh-win-extreme",
        ):
            expected = expect(draw(Case.parse(descriptor)), RoundingPlan())
            answers.append({n: v for n, v in vars(expected).items() if isinstance(v, torch.Tensor)})
        torch.save(answers, sys.argv[1])
    """

    def answers(*arguments):
        path = str(tmp_path / "answers.pt")
        subprocess.run([sys.executable, "-c", textwrap.dedent(script), path, *arguments], check=True, cwd=ROOT)
        return torch.load(path)

    for mine, theirs in zip(answers(), answers("with")):
        torch.testing.assert_close(theirs["out"], mine["out"], rtol=0, atol=0, equal_nan=True)
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-14, atol=0, equal_nan=True, msg=name)
