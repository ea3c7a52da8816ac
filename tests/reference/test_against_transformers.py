"""The oracle and the NumPy layer against the expert and router modules of transformers 5, on small random weights."""

import pytest
import torch

from reference.moe import Experts, moe
from reference.routing import judge_routing, route
from tests.support.numpy_moe import numpy_moe

pytest.importorskip("transformers", minversion="5.0")

from transformers import DeepseekV3Config, GptOssConfig, Llama4TextConfig, MixtralConfig, Qwen3MoeConfig  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter  # noqa: E402
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter  # noqa: E402

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 24, 20, 12, 16, 3

# Both sides compute in float64, in different orders: two sums of n products differ by at most about n u times the
# magnitude of their terms, which is 1 to 10 here.
CLOSE = dict(rtol=1e-11, atol=1e-11)


def randomized(module, dtype, seed=0):
    """Draw every parameter and buffer of a module anew, since some are zero or uninitialized; return the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module.to(dtype).eval().requires_grad_(False)


def tokens(dtype, seed=1):
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_routing(seed=2):
    """Return random weights and distinct random ids for every token; expert 0 has no token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:TOP_K] + 1 for _ in range(TOKENS)])
    return torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float64), ids


def config_of(config, **more):
    common = dict(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS,
        num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    config = config(**(common | more))
    config._experts_implementation = "eager"
    return config


def check_experts(theirs, x, weights, ids, w13, w2, **options):
    """Compare theirs [T, K] with reference.moe and with the NumPy layer."""
    ours = moe(x, weights, ids, Experts(w13=w13, w2=w2, **options))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    by_numpy = numpy_moe(x.numpy(), w13.numpy(), w2.numpy(), weights.numpy(), ids.numpy(), **options)
    torch.testing.assert_close(torch.from_numpy(by_numpy), theirs, **CLOSE)


@pytest.mark.parametrize(
    "module, config",
    [(MixtralExperts, MixtralConfig), (Qwen3MoeExperts, Qwen3MoeConfig)],
    ids=["mixtral", "qwen3_moe"],
)
@pytest.mark.parametrize(
    "hidden_act, activation", [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")]
)
def test_experts(module, config, hidden_act, activation):
    experts = randomized(module(config_of(config, hidden_act=hidden_act)), torch.float64)
    x, (weights, ids) = tokens(torch.float64), random_routing()
    theirs = experts(x, ids, weights)
    check_experts(theirs, x, weights, ids, experts.gate_up_proj, experts.down_proj, activation=activation)


def test_gpt_oss_experts_interleaved_clamped_and_biased():
    experts = randomized(GptOssExperts(config_of(GptOssConfig)), torch.float64)
    x, (weights, ids) = tokens(torch.float64) * 4, random_routing()  # times 4: some values exceed the limit of 7
    w13 = experts.gate_up_proj.transpose(1, 2)
    assert ((x @ w13[1].T).abs() > 7).any()
    check_experts(
        experts(x, ids, weights), x, weights, ids, w13, experts.down_proj.transpose(1, 2), activation="swigluoai",
        w13_bias=experts.gate_up_proj_bias, w2_bias=experts.down_proj_bias,
    )  # fmt: skip


def test_deepseek_v3_layer_with_its_shared_expert():
    config = config_of(DeepseekV3Config, n_group=4, topk_group=2, n_shared_experts=1, n_routed_experts=EXPERTS)
    layer = randomized(DeepseekV3MoE(config), torch.float64)
    x = tokens(torch.float64)
    theirs = layer(x[None])[0]
    _, weights, ids = layer.gate(x[None])  # computed in float32, used unchanged
    w13, w2, mlp = layer.experts.gate_up_proj, layer.experts.down_proj, layer.shared_experts
    shared13 = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    by_numpy = numpy_moe(
        x.numpy(), w13.numpy(), w2.numpy(), weights.numpy(), ids.numpy(), shared=[(shared13, mlp.down_proj.weight)]
    )
    torch.testing.assert_close(torch.from_numpy(by_numpy), theirs, **CLOSE)
    experts = Experts(w13=torch.cat((w13, shared13[None])), w2=torch.cat((w2, mlp.down_proj.weight[None])), shared=1)
    torch.testing.assert_close(moe(x, weights.double(), ids, experts), theirs, **CLOSE)


def llama4():
    layer = randomized(Llama4TextMoe(config_of(Llama4TextConfig, num_experts_per_tok=1)), torch.float64)
    x = tokens(torch.float64)
    routing = route(layer.router(x)[1], 1, "sigmoid")
    w13, w2, mlp = (
        layer.experts.gate_up_proj.transpose(1, 2),
        layer.experts.down_proj.transpose(1, 2),
        layer.shared_expert,
    )
    shared13 = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    # The router rounds its sigmoid to float32. Without the same rounding here, it would be the only difference.
    weights = routing.topk_weights.float().double()
    return layer, x, weights, routing.topk_ids, w13, w2, shared13, mlp.down_proj.weight


def test_llama4_router_weight_on_input():
    layer, x, weights, ids, w13, w2, *_ = llama4()
    theirs = layer(x)[0] - layer.shared_expert(x)
    scores = layer.router(x)[0].gather(1, ids)
    torch.testing.assert_close(weights, scores, rtol=2.0**-22, atol=0)
    check_experts(theirs, x, scores, ids, w13, w2, router_weight_on_input=True)


def test_llama4_shared_expert_sees_the_unweighted_input():
    layer, x, _, ids, w13, w2, shared13, shared2 = llama4()
    theirs = layer(x)[0]
    scores = layer.router(x)[0].gather(1, ids)
    by_numpy = numpy_moe(
        x.numpy(), w13.numpy(), w2.numpy(), scores.numpy(), ids.numpy(), router_weight_on_input=True,
        shared=[(shared13, shared2)],
    )  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(by_numpy), theirs, **CLOSE)
    experts = Experts(
        w13=torch.cat((w13, shared13[None])), w2=torch.cat((w2, shared2[None])), shared=1, router_weight_on_input=True
    )
    torch.testing.assert_close(moe(x, scores, ids, experts), theirs, **CLOSE)


@pytest.mark.parametrize("option", ["invalid_ids", "expert_map", "biases", "relu2", "limit", "weight_on_input"])
def test_oracle_against_numpy_where_transformers_has_no_module(option):
    generator = torch.Generator().manual_seed(5)
    x, (weights, ids) = tokens(torch.float64), random_routing()
    rows = INTERMEDIATE if option == "relu2" else 2 * INTERMEDIATE
    local = 9 if option == "expert_map" else EXPERTS
    w13 = torch.randn(local, rows, HIDDEN, generator=generator, dtype=torch.float64)
    w2 = torch.randn(local, HIDDEN, INTERMEDIATE, generator=generator, dtype=torch.float64)
    options = dict(activation="silu")
    if option == "invalid_ids":
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
        ids[3] = -1
        ids[4, 0] = EXPERTS
    elif option == "expert_map":
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[torch.randperm(EXPERTS, generator=generator)[:local]] = torch.arange(local, dtype=torch.int32)
        options |= dict(expert_map=expert_map)
    elif option == "relu2":
        options |= dict(activation="relu2")
    elif option == "limit":
        options |= dict(limit=1.5)
    if option == "weight_on_input":
        weights, ids = weights[:, :1], ids[:, :1]
        options |= dict(router_weight_on_input=True)
    if option in ("biases", "weight_on_input", "expert_map"):
        options |= dict(
            w13_bias=torch.randn(local, rows, generator=generator, dtype=torch.float64),
            w2_bias=torch.randn(local, HIDDEN, generator=generator, dtype=torch.float64),
        )
    ours = moe(x, weights, ids, Experts(w13=w13, w2=w2, **options))
    by_numpy = numpy_moe(x.numpy(), w13.numpy(), w2.numpy(), weights.numpy(), ids.numpy(), **options)
    torch.testing.assert_close(ours, torch.from_numpy(by_numpy), **CLOSE)
    assert (ours[3] == 0).all() == (option == "invalid_ids")


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
def test_mixtral_router(dtype):
    router = randomized(MixtralTopKRouter(config_of(MixtralConfig)), dtype)
    logits, weights, ids = router(tokens(dtype))
    assert judge_routing(route(logits.double(), TOP_K, "topk_softmax"), weights, ids) == []


@DTYPES
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_qwen3_router(dtype, norm_topk_prob):
    router = randomized(Qwen3MoeTopKRouter(config_of(Qwen3MoeConfig, norm_topk_prob=norm_topk_prob)), dtype)
    logits, weights, ids = router(tokens(dtype))
    expected = route(logits.double(), TOP_K, "softmax_topk", renormalize=norm_topk_prob)
    assert weights.dtype == dtype
    assert judge_routing(expected, weights, ids) == []
    other = route(logits.double(), TOP_K, "softmax_topk", renormalize=not norm_topk_prob)
    assert judge_routing(other, weights, ids) != []


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_deepseek_v3_router(norm_topk_prob):
    config = config_of(
        DeepseekV3Config, n_group=4, topk_group=2, norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5,
        n_routed_experts=EXPERTS,
    )  # fmt: skip
    router = randomized(DeepseekV3TopkRouter(config), torch.float32)
    logits, weights, ids = router(tokens(torch.float32))
    arguments = dict(
        method="grouped", num_groups=4, topk_groups=2, renormalize=norm_topk_prob, routed_scaling_factor=2.5
    )
    bias = router.e_score_correction_bias.double()
    assert judge_routing(route(logits.double(), TOP_K, correction_bias=bias, **arguments), weights, ids) == []
    assert judge_routing(route(logits.double(), TOP_K, correction_bias=0 * bias, **arguments), weights, ids) != []


@DTYPES
def test_llama4_router(dtype):
    layer = randomized(Llama4TextMoe(config_of(Llama4TextConfig, num_experts_per_tok=1)), dtype)
    scores, logits = layer.router(tokens(dtype))
    weights, ids = scores.topk(1)
    assert judge_routing(route(logits.double(), 1, "sigmoid"), weights, ids) == []


@DTYPES
def test_gpt_oss_router(dtype):
    router = randomized(GptOssTopKRouter(config_of(GptOssConfig)), dtype)
    logits, weights, ids = router(tokens(dtype))
    assert judge_routing(route(logits.double(), TOP_K, "topk_softmax"), weights, ids) == []
