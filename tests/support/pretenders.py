"""Backends that declare support for flags that they ignore, apply twice or crash on, based on a correct one."""

import os
from dataclasses import replace

from tests.support.emulated import Emulated


class Honest(Emulated):
    def supports(self, problem):
        return "bias: none here" if problem.bias else None

    def declares(self, problem):
        return None  # for every problem


class Pretender(Emulated):
    def prepare(self, problem, layer):
        def call(hidden_states, topk_weights, topk_ids, out=None):
            problem = layer.problem
            if problem.bias:
                raise RuntimeError("no kernel for biases")
            if problem.shared_experts:
                os._exit(3)
            if problem.router_weight_on_input:
                hidden_states = (hidden_states.float() * topk_weights[:, :1]).to(hidden_states.dtype)
            kept = replace(layer, problem=replace(problem, limit=None, router_weight_on_input=False))
            result = self.run(kept, hidden_states, topk_weights, topk_ids, out)
            return result.neg_() if problem.activation == "gelu" else result

        return call


class Nothing(Emulated):
    def supports(self, problem):
        return "dtype: none at all"
