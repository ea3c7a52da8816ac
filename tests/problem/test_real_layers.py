"""The dimensions of real layers are those of transformers' configuration classes."""

import pytest

from cases.test_real_layers import LAYERS
from harness.problem.case import Case

transformers = pytest.importorskip("transformers")

#: model: (configuration class, attribute of the intermediate size, of the expert count)
CONFIGS = {
    "Mixtral-8x7B": ("MixtralConfig", "intermediate_size", "num_local_experts"),
    "Qwen3-30B-A3B": ("Qwen3MoeConfig", "moe_intermediate_size", "num_experts"),
    "DeepSeek-V3": ("DeepseekV3Config", "moe_intermediate_size", "n_routed_experts"),
    "Llama-4-Scout": ("Llama4TextConfig", "intermediate_size", "num_local_experts"),
    "OLMoE": ("OlmoeConfig", "intermediate_size", "num_experts"),
}


@pytest.mark.parametrize("model", CONFIGS)
def test_dimensions(model):
    name, intermediate, experts = CONFIGS[model]
    config = getattr(transformers, name)()
    problem = Case.parse(f"t1-{LAYERS[model][0]}").problem
    found = (problem.hidden_size, problem.intermediate_size, problem.num_experts, problem.top_k)
    wanted = (config.hidden_size, getattr(config, intermediate), getattr(config, experts), config.num_experts_per_tok)
    assert found == wanted


def test_gpt_oss_but_for_its_expert_count():
    config = transformers.GptOssConfig()
    problem = Case.parse(f"t1-{LAYERS['GPT-OSS-20B'][0]}").problem
    assert (problem.hidden_size, problem.intermediate_size) == (config.hidden_size, config.intermediate_size)
    assert (problem.top_k, problem.activation, problem.bias) == (config.num_experts_per_tok, "swigluoai", True)
