"""The arguments of a layer, checked once and converted to one form: layout "nk", whatever the caller's layout.

Every kernel here takes these arguments, and they are checked nowhere else. Imports torch alone.
"""

import dataclasses

import torch

from kernels.checks import (
    HIDDEN_DTYPES,
    ID_DTYPES,
    LAYOUTS,
    overlap,
    require_dense_rows,
    require_device,
    require_dtype,
    require_expert_map,
    require_one_of,
    require_shape,
    require_weight_scale,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "relu2")
ALPHA, SWIGLUOAI_LIMIT = 1.702, 7.0  #: swigluoai's defaults


@dataclasses.dataclass(frozen=True)
class Fp8Scheme:
    """How fp8 weights and activations are scaled.

    weight: "tensor" (scale [E]), "channel" ([E, N]) or "block" ([E, ceil(N/128), ceil(K/128)]).
    activation: None (activations stay as they are), "tensor" (static scale, if any), "token" or "group" (1x128).
    """

    weight: str
    activation: str | None = None

    def __post_init__(self):
        require_one_of("fp8.weight", self.weight, ("tensor", "channel", "block"))
        require_one_of("fp8.activation", self.activation, (None, "tensor", "token", "group"))


@dataclasses.dataclass(frozen=True)
class Expert:
    """One of the two linear maps: w [E, N, K] by strides, its scales in the same order, and its bias [E, N].

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


def is_gated(activation: str) -> bool:
    """Whether h holds gate and up (2I columns). ValueError for an unknown activation."""
    require_one_of("activation", activation, ACTIVATIONS)
    return activation != "relu2"


def require_limit(activation: str, limit: float | None) -> None:
    """ValueError unless limit is None, or positive for an activation that has a gate to clamp."""
    if limit is not None and not limit > 0:
        raise ValueError(f"limit={limit}; valid: None, or positive")
    if limit is not None and not is_gated(activation):
        raise ValueError(f"limit={limit}; valid with activation {activation!r}, which has no gate: None")


def effective_limit(activation: str, limit: float | None) -> float | None:
    """The limit to apply: the caller's, or 7 for swigluoai; None clamps nothing."""
    return SWIGLUOAI_LIMIT if limit is None and activation == "swigluoai" else limit


def make_layer(
    hidden_states, w13, w2, *, activation="silu", limit=None, alpha=ALPHA, fp8=None, w13_scale=None, w2_scale=None,
    a13_scale=None, a2_scale=None, w13_bias=None, w2_bias=None, expert_map=None, num_experts=None, shared_experts=0,
    apply_router_weight_on_input=False, layout="nk",
) -> Layer:  # fmt: skip
    """Check the layer's arguments against hidden_states [T, K] (see `fused_moe`); TypeError or ValueError.

    shared_experts: the number of experts at the end of w13 and w2 without an id: every token goes to them.
    """
    require_one_of("layout", layout, LAYOUTS)
    halves = 2 if is_gated(activation) else 1
    require_limit(activation, limit)
    weight_dtypes = tuple(FP8.values()) if fp8 else (hidden_states.dtype,)
    for name, w in (("w13", w13), ("w2", w2)):
        require_dtype(name, w, *weight_dtypes)
        require_device(name, w, hidden_states.device)
        if w.ndim != 3:
            raise ValueError(f"{name}: shape {tuple(w.shape)}; valid: three dimensions, experts first")
    named = "w13 [E, N, K], w2 [E, K, I]" if layout == "nk" else "w13 [E, K, N], w2 [E, I, K]"
    given = f"hidden_states [T, {hidden_states.shape[1]}], w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)}"
    if layout == "kn":
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    e, n, k = w13.shape
    if k != hidden_states.shape[1] or w2.shape[1] != k:
        raise ValueError(f"Hidden size mismatch: {given}; layout {layout!r} means {named}, K of all three equal")
    if min(w13.shape) < 1 or w2.shape[0] != e or w2.shape[2] * halves != n:
        raise ValueError(
            f"Expert shape mismatch: {given}; valid for {activation!r}: {named}, N = {halves} * I, E equal"
        )
    if num_experts is None:
        num_experts = e - shared_experts if expert_map is None else expert_map.numel()
    require_expert_map(expert_map, num_experts, hidden_states.device)
    if expert_map is None and num_experts != e - shared_experts:
        raise ValueError(
            f"num_experts={num_experts}; valid without expert_map: {e - shared_experts}, the experts of w13"
        )
    return Layer(
        _expert("13", w13, w13_scale, w13_bias, a13_scale, fp8, layout, hidden_states),
        _expert("2", w2, w2_scale, w2_bias, a2_scale, fp8, layout, hidden_states),
        activation, limit, alpha, fp8, expert_map, num_experts, apply_router_weight_on_input,
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
    require_weight_scale(f"w{name}_scale", scale, fp8.weight if fp8 else None, (e, n, k), layout)
    if fp8 and fp8.weight == "block" and layout == "kn":
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
        require_out("out", out, hidden_states)


def require_out(name, out, hidden_states) -> None:
    """TypeError or ValueError unless the result for hidden_states can be written to `out`."""
    require_dtype(name, out, hidden_states.dtype)
    require_shape(name, out, tuple(hidden_states.shape), "[T, K]")
    require_device(name, out, hidden_states.device)
    require_dense_rows(name, out)
    if overlap(out, hidden_states):
        raise ValueError(
            f"{name}: address {out.data_ptr():#x} shares memory with hidden_states; valid: separate memory"
        )
