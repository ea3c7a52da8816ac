"""Scenarios of bad input: the call raises, names what is wrong and writes nothing; the next good call is right.

A fault is a function that changes one argument of an otherwise good call, and words of which the message must contain
one. For backends that promise "errors".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer, Unsupported
from harness.inputs.draw import Inputs
from harness.scenarios.registry import must_refuse, require_promise, scenario, start
from harness.session.session import Session
from harness.trace.tracing import poison_


@dataclass
class BadCall:
    """The arguments of a call, for a fault to change."""

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    out: Tensor
    layer: Layer


@dataclass(frozen=True)
class BadInput:
    """A change of one argument, whose docstring says which, and words of which the error message must contain one."""

    spoil: Callable[[BadCall], None]
    words: tuple[str, ...]

    def check(self, s: Session, inputs: Inputs, call: Callable[..., Any]) -> None:
        """The call with the bad argument must be refused, and the same call with good arguments be right."""
        layer = inputs.backend_layer
        kept = replace(layer)
        x = inputs.hidden_states
        bad = BadCall(x, inputs.topk_weights, inputs.topk_ids, poison_(torch.empty_like(x)), layer)
        self.spoil(bad)
        must_refuse(
            s,
            self.spoil.__doc__ or self.spoil.__name__,
            self.words,
            lambda: call(bad.hidden_states, bad.topk_weights, bad.topk_ids, out=bad.out),
            {"out": bad.out},
        )
        for field in fields(Layer):
            setattr(layer, field.name, getattr(kept, field.name))
        s.check(call, inputs, "the next good call")


FAULTS: dict[str, BadInput] = {}  #: by name; the scenario of each is error.<name>


def _fault(name: str, *words: str) -> Callable[[Callable[[BadCall], None]], Callable[[BadCall], None]]:
    def register(spoil: Callable[[BadCall], None]) -> Callable[[BadCall], None]:
        fault = FAULTS[name] = BadInput(spoil, words)

        @scenario(f"error.{name}")
        def refused(s: Session) -> None:
            require_promise(s, "errors")
            fault.check(s, *start(s))

        return spoil

    return register


@_fault("hidden_size", "Hidden size mismatch", "hidden_size")
def hidden_size(call: BadCall) -> None:
    """hidden_states narrower than the weights"""
    call.hidden_states = call.hidden_states[:, :-16].contiguous()
    call.out = poison_(torch.empty_like(call.hidden_states))


@_fault("transposed", "Hidden size mismatch", "hidden_size")
def transposed(call: BadCall) -> None:
    """weights in the other layout (vLLM PR 40109: "Hidden size mismatch 2048 != 384")"""
    call.layer.w13 = call.layer.w13.transpose(1, 2).contiguous()
    call.layer.w2 = call.layer.w2.transpose(1, 2).contiguous()


@_fault("hidden_dims", "hidden_states")
def hidden_dims(call: BadCall) -> None:
    """hidden_states of three dimensions"""
    call.hidden_states = call.hidden_states[None]


@_fault("hidden_dtype", "hidden_states", "dtype")
def hidden_dtype(call: BadCall) -> None:
    """hidden_states in float64"""
    call.hidden_states = call.hidden_states.double()


@_fault("hidden_columns", "hidden_states", "stride", "contiguous")
def hidden_columns(call: BadCall) -> None:
    """hidden_states with strided columns"""
    doubled = torch.stack([call.hidden_states, call.hidden_states], 2).flatten(1)
    call.hidden_states = doubled[:, ::2]


@_fault("weights_dtype", "topk_weights")
def weights_dtype(call: BadCall) -> None:
    """topk_weights in float16: some kernels read its bits as float32 (vLLM PR 16801)"""
    call.topk_weights = call.topk_weights.half()


@_fault("ids_dtype", "topk_ids")
def ids_dtype(call: BadCall) -> None:
    """topk_ids in floating point"""
    call.topk_ids = call.topk_ids.float()


@_fault("ids_shape", "topk_ids", "topk_weights", "top_k")
def ids_shape(call: BadCall) -> None:
    """one slot fewer in topk_ids than in topk_weights"""
    call.topk_ids = torch.cat([call.topk_ids, call.topk_ids[:, :1]], 1)


@_fault("ids_tokens", "topk_ids", "topk_weights", "tokens")
def ids_tokens(call: BadCall) -> None:
    """routing for fewer tokens than hidden_states has"""
    call.topk_ids, call.topk_weights = call.topk_ids[:-1], call.topk_weights[:-1]


@_fault("out_shape", "out")
def out_shape(call: BadCall) -> None:
    """out with a row too many"""
    x = call.hidden_states
    call.out = poison_(torch.empty(len(x) + 1, x.shape[1], dtype=x.dtype, device=x.device))


@_fault("out_dtype", "out")
def out_dtype(call: BadCall) -> None:
    """out of another dtype"""
    other = torch.float32 if call.hidden_states.dtype != torch.float32 else torch.float16
    call.out = poison_(torch.empty_like(call.hidden_states, dtype=other))


@_fault("w2_shape", "w2", "intermediate_size")
def w2_shape(call: BadCall) -> None:
    """w2 with another intermediate size than w13"""
    layer = call.layer
    dim = 2 if layer.problem.layout == "nk" else 1
    layer.w2 = layer.w2.narrow(dim, 0, layer.w2.shape[dim] - 16).contiguous()


@_fault("experts", "w2", "w13", "experts")
def experts(call: BadCall) -> None:
    """w2 with one expert fewer than w13"""
    call.layer.w2 = call.layer.w2[:-1]


@_fault("bias_shape", "w13_bias", "bias")
def bias_shape(call: BadCall) -> None:
    """a bias that is too short"""
    if call.layer.w13_bias is None:
        raise Unsupported("scenario: the layer has no bias")
    call.layer.w13_bias = call.layer.w13_bias[:, :-1].contiguous()


@_fault("scale_missing", "scale")
def scale_missing(call: BadCall) -> None:
    """fp8 weights without their scales"""
    if call.layer.w13_scale is None:
        raise Unsupported("scenario: the layer has no scales")
    call.layer.w13_scale = None


@_fault("scale_shape", "scale")
def scale_shape(call: BadCall) -> None:
    """scales that were not transposed with their weights, or have another granularity"""
    scale = call.layer.w2_scale
    if scale is None:
        raise Unsupported("scenario: the layer has no scales")
    call.layer.w2_scale = torch.cat([scale, scale[..., :1]], -1)


@_fault("weight_dtype", "w13", "dtype")
def weight_dtype(call: BadCall) -> None:
    """unquantized weights of another dtype than hidden_states"""
    if call.layer.w13_scale is not None:
        raise Unsupported("scenario: the layer is quantized")
    other = torch.float16 if call.hidden_states.dtype != torch.float16 else torch.bfloat16
    call.layer.w13, call.layer.w2 = call.layer.w13.to(other), call.layer.w2.to(other)


@_fault("expert_map_length", "expert_map")
def expert_map_length(call: BadCall) -> None:
    """an expert_map for fewer experts than the router knows"""
    if call.layer.expert_map is None:
        raise Unsupported("scenario: the layer has no expert_map")
    call.layer.expert_map = call.layer.expert_map[:-1].contiguous()


@_fault("layer_device", "device")
def layer_device(call: BadCall) -> None:
    """one tensor of the layer, the last that it has, on another device"""
    name, tensor = list(call.layer.tensors().items())[-1]
    setattr(call.layer, name, tensor.to("meta" if tensor.device.type == "cpu" else "cpu"))


@_fault("weight_on_input_top_k", "top_k")
def weight_on_input_top_k(call: BadCall) -> None:
    """router weight on input with more than one slot a token: it has no meaning"""
    problem = call.layer.problem
    known: dict[str, Any] = {f.name: getattr(problem, f.name) for f in fields(problem)}
    known |= {"router_weight_on_input": True, "gated": problem.gated}
    call.layer.problem = SimpleNamespace(**known)  # type: ignore[assignment]  # a Problem refuses this combination


@_fault("device", "device")
def device(call: BadCall) -> None:
    """topk_ids on another device"""
    call.topk_ids = call.topk_ids.to("meta" if call.topk_ids.device.type == "cpu" else "cpu")
