"""The arguments of a layer, checked once and brought into one form: layout "nk", whatever the caller's layout."""

import dataclasses

import torch

from kernels.triton.activation import is_gated, require_limit
from kernels.triton.checks import (
    HIDDEN_DTYPES,
    ID_DTYPES,
    overlap,
    require_dense_rows,
    require_device,
    require_dtype,
    require_expert_map,
    require_one_of,
    require_shape,
)
from kernels.triton.gemm import SCALE_BLOCK

LAYOUTS = ("nk", "kn")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Fp8Scheme:
    """How fp8 weights and activations are scaled.

    weight: "tensor" (scale [E]), "channel" ([E, N]) or "block" ([E, ceil(N/128), ceil(K/128)]).
    activation: None (activations stay as they are), "tensor" (static scale if one is given), "token" or "group" (1x128).
    """

    weight: str
    activation: str | None = None

    def __post_init__(self):
        require_one_of("fp8.weight", self.weight, ("tensor", "channel", "block"))
        require_one_of("fp8.activation", self.activation, (None, "tensor", "token", "group"))


@dataclasses.dataclass(frozen=True)
class Expert:
    """One of the two linear maps: w [E, N, K] by strides, its scales as if it lay so in memory, and its bias [E, N].

    activation_scale is the static scale of the rows it multiplies, float32 [1].
    """

    w: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    activation_scale: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A checked layer. num_experts counts global experts, w13.w.shape[0] local ones."""

    w13: Expert
    w2: Expert
    activation: str
    limit: float | None
    alpha: float
    fp8: Fp8Scheme | None
    expert_map: torch.Tensor | None
    num_experts: int
    weight_on_input: bool

    @property
    def num_local_experts(self) -> int:
        return self.w13.w.shape[0]


def make_layer(
    hidden_states, w13, w2, *, activation, limit, alpha, fp8, w13_scale, w2_scale, a13_scale, a2_scale, w13_bias, w2_bias,
    expert_map, num_experts, weight_on_input, layout,
) -> Layer:  # fmt: skip
    """Check the layer's arguments against hidden_states [T, K] (see `fused_moe`); TypeError or ValueError."""
    require_one_of("layout", layout, LAYOUTS)
    halves = 2 if is_gated(activation) else 1
    require_limit(activation, limit)
    weight_dtypes = FP8_DTYPES if fp8 else (hidden_states.dtype,)
    for name, w in (("w13", w13), ("w2", w2)):
        require_dtype(name, w, *weight_dtypes)
        require_device(name, w, hidden_states.device)
        if w.ndim != 3:
            raise ValueError(f"{name}: shape {tuple(w.shape)}; valid: three dimensions, experts first")
    named = "w13 [E, N, K], w2 [E, K, I]" if layout == "nk" else "w13 [E, K, N], w2 [E, I, K]"
    given = f"hidden_states {tuple(hidden_states.shape)}, w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)}"
    if layout == "kn":
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    e, n, k = w13.shape
    if k != hidden_states.shape[1] or w2.shape[1] != k:
        raise ValueError(f"Hidden size mismatch: {given}; layout {layout!r} means {named}, K of all three equal")
    if min(w13.shape) < 1 or w2.shape[0] != e or w2.shape[2] * halves != n:
        raise ValueError(f"Expert shape mismatch: {given}; valid for {activation!r}: {named}, N = {halves} * I, E equal")
    if num_experts is None:
        num_experts = e if expert_map is None else expert_map.numel()
    require_expert_map(expert_map, num_experts, hidden_states.device)
    if expert_map is None and num_experts != e:
        raise ValueError(f"num_experts={num_experts}; valid without expert_map: {e}, the experts of w13")
    return Layer(
        _expert("13", w13, w13_scale, w13_bias, a13_scale, fp8, layout, hidden_states),
        _expert("2", w2, w2_scale, w2_bias, a2_scale, fp8, layout, hidden_states),
        activation, limit, alpha, fp8, expert_map, num_experts, weight_on_input,
    )  # fmt: skip


def _expert(name, w, scale, bias, activation_scale, fp8, layout, hidden_states) -> Expert:
    e, n, k = w.shape
    tensors = {f"w{name}_scale": scale, f"w{name}_bias": bias, f"a{name}_scale": activation_scale}
    for field, tensor in tensors.items():
        if tensor is not None:
            floats = HIDDEN_DTYPES if field.endswith("bias") else (torch.float32,)
            require_dtype(field, tensor, *floats)
            require_device(field, tensor, hidden_states.device)
    if bias is not None:
        require_shape(f"w{name}_bias", bias, (e, n), "[E, N]")
    if (scale is None) != (fp8 is None):
        raise ValueError(f"w{name}_scale: {'missing' if scale is None else 'given'} with fp8={fp8}; valid: both or neither")
    if fp8:
        blocks_n, blocks_k = -(-n // SCALE_BLOCK), -(-k // SCALE_BLOCK)
        shape, meaning = {
            "tensor": ((e,), "[E]"),
            "channel": ((e, n), "[E, N]"),
            "block": ((e, blocks_n, blocks_k), "[E, ceil(N/128), ceil(K/128)]"),
        }[fp8.weight]
        if fp8.weight == "block" and layout == "kn":
            shape, meaning = (e, blocks_k, blocks_n), "[E, ceil(K/128), ceil(N/128)]"
        require_shape(f"w{name}_scale", scale, shape, meaning)
        if fp8.weight == "block" and layout == "kn":
            scale = scale.transpose(1, 2)
    if activation_scale is not None:
        if fp8 is None or fp8.activation != "tensor":
            raise ValueError(f"a{name}_scale: given with fp8={fp8}; valid only with fp8.activation='tensor'")
        require_shape(f"a{name}_scale", activation_scale, (1,), "[1]")
    return Expert(w, scale, bias, activation_scale)


def require_tokens(hidden_states, topk_weights, topk_ids, weight_on_input, out) -> None:
    """Check what changes from call to call; TypeError or ValueError (see `fused_moe`)."""
    require_dtype("hidden_states", hidden_states, *HIDDEN_DTYPES)
    if hidden_states.ndim != 2:
        raise ValueError(f"hidden_states: shape {tuple(hidden_states.shape)}; valid: [T, K]")
    require_dense_rows("hidden_states", hidden_states)
    require_dtype("topk_ids", topk_ids, *ID_DTYPES)
    require_dtype("topk_weights", topk_weights, torch.float32)
    if topk_ids.ndim != 2 or topk_ids.shape[0] != hidden_states.shape[0] or topk_ids.shape[1] < 1:
        raise ValueError(f"topk_ids: shape {tuple(topk_ids.shape)}; valid: [T={hidden_states.shape[0]}, k >= 1]")
    require_shape("topk_weights", topk_weights, tuple(topk_ids.shape), "[T, k], as topk_ids")
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        require_device(name, tensor, hidden_states.device)
    if weight_on_input and topk_ids.shape[1] != 1:
        raise ValueError(f"apply_router_weight_on_input=True with top_k={topk_ids.shape[1]}; valid: top_k=1")
    if out is not None:
        require_dtype("out", out, hidden_states.dtype)
        require_shape("out", out, tuple(hidden_states.shape), "[T, K]")
        require_device("out", out, hidden_states.device)
        require_dense_rows("out", out)
        if overlap(out, hidden_states):
            raise ValueError(f"out: address {out.data_ptr():#x} shares memory with hidden_states; valid: separate memory")
