"""Argument checks: every message names the field, the value it has and what is valid."""

import torch

LAYOUTS = ("nk", "kn")
SCALE_BLOCK = 128  #: fp8 blocks are 128 x 128 (weights) and 1 x 128 (activations)
ID_DTYPES = (torch.int32, torch.int64)
HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require_dtype(name: str, tensor: torch.Tensor, *valid: torch.dtype) -> None:
    """TypeError unless `tensor` is a tensor of one of the `valid` dtypes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; valid: a tensor")
    if tensor.dtype not in valid:
        raise TypeError(f"{name}: dtype {tensor.dtype}; valid: {', '.join(map(str, valid))}")


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """ValueError unless `tensor` has this shape; `meaning` spells it in names, "[E, 2I]"."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; valid: {tuple(shape)} = {meaning}")


def require_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """ValueError unless `tensor` lives on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name}: device {tensor.device}; valid: {device}, as the other tensors")


def require_dense_rows(name: str, tensor: torch.Tensor) -> None:
    """ValueError unless the last dimension of a matrix is dense; rows may be padded."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: stride {tuple(tensor.stride())}; valid: last stride 1 (row stride is free)")


def require_one_of(name: str, value: object, valid: tuple) -> None:
    """ValueError unless `value` is among `valid`."""
    if value not in valid:
        raise ValueError(f"{name}={value!r}; valid: {', '.join(map(repr, valid))}")


def require_expert_map(expert_map: torch.Tensor | None, num_experts: int, device: torch.device) -> None:
    """TypeError or ValueError unless expert_map is None or an int [num_experts] table on `device`."""
    if expert_map is None:
        return
    require_dtype("expert_map", expert_map, *ID_DTYPES)
    require_device("expert_map", expert_map, device)
    require_shape("expert_map", expert_map, (num_experts,), "[num_experts]")
    if not expert_map.is_contiguous():
        raise ValueError(f"expert_map: stride {expert_map.stride()}; valid: contiguous")


def require_weight_scale(
    name: str, scale: torch.Tensor | None, granularity: str | None, shape: tuple[int, int, int], layout: str
) -> None:
    """ValueError unless `scale` fits weights of this shape, (E, N, K) whatever the layout: none for granularity None,
    or "tensor" [E], "channel" [E, N], "block" [E, ceil(N/128), ceil(K/128)], the last two swapped in layout "kn"."""
    if (scale is None) != (granularity is None):
        state = "missing" if scale is None else "given"
        raise ValueError(f"{name}: {state} with scale granularity {granularity!r}; valid: both or neither")
    if scale is None or granularity is None:
        return
    e, n, k = shape
    blocks_n, blocks_k = -(-n // SCALE_BLOCK), -(-k // SCALE_BLOCK)
    blocks, meaning = (e, blocks_n, blocks_k), "[E, ceil(N/128), ceil(K/128)]"
    if layout == "kn":
        blocks, meaning = (e, blocks_k, blocks_n), "[E, ceil(K/128), ceil(N/128)]"
    valid = {"tensor": ((e,), "[E]"), "channel": ((e, n), "[E, N]"), "block": (blocks, meaning)}
    want, meaning = valid[granularity]
    require_shape(name, scale, want, f"{meaning} for granularity {granularity!r} in layout {layout!r}")


def resolve_device(device: torch.device | str) -> torch.device:
    """The device as tensors report it: "cuda" is a name for some cuda:<n>, and compares unequal to it."""
    return torch.empty(0, device=device).device


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the address ranges of two tensors of the same device meet."""
    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    (first_a, end_a), (first_b, end_b) = _address_range(a), _address_range(b)
    return first_a < end_b and first_b < end_a


def _address_range(tensor: torch.Tensor) -> tuple[int, int]:
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()
