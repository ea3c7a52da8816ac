"""Globals of torch, numpy and Triton: they change numbers, or the code that computes them."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

from harness.run.globals.rule import Global, changed_keys


# -- random numbers ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Drawn:
    """The state of a generator. Its memory shows in a microsecond whether it has changed; `state` restores it."""

    memory: bytes
    state: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Drawn) and self.memory == other.memory


class _Generator:
    """Reads a generator's memory, and its whole state only if that has changed since."""

    def __init__(self, memory: Callable[[], bytes], state: Callable[[], Any]) -> None:
        self._memory, self._state = memory, state
        self._last = _Drawn(b"", None)

    def __call__(self) -> _Drawn:
        memory = self._memory()
        if memory != self._last.memory:
            self._last = _Drawn(memory, self._state())
        return self._last


_MT19937 = 625 * 4  #: bytes of a Mersenne Twister: 624 words and the position
_PYTHON: Any = random.getstate.__self__  # type: ignore[attr-defined]
_NUMPY: Any = np.random.mtrand._rand


def _python_memory() -> bytes:
    return ctypes.string_at(id(_PYTHON) + object.__basicsize__, _MT19937)


def _numpy_memory() -> bytes:
    generator = _NUMPY._bit_generator
    if type(generator) is not np.random.MT19937:
        return repr(generator.state).encode()
    return ctypes.string_at(generator.ctypes.state_address, _MT19937)


def _torch_memory() -> bytes:
    state = torch.default_generator.get_state()
    return ctypes.string_at(state.data_ptr(), state.numel())


def _cuda_rng() -> Any:
    if not torch.cuda.is_initialized():
        return None
    return [(generator.initial_seed(), generator.get_offset()) for generator in torch.cuda.default_generators]


def _set_cuda_rng(states: list[tuple[int, int]]) -> None:
    for generator, (seed, offset) in zip(torch.cuda.default_generators, states):
        generator.manual_seed(seed)
        generator.set_offset(offset)


def _another_state(before: Any, after: Any) -> str:
    return "another state"


def _same_if_known(before: Any, after: Any) -> bool:
    return before is None or before == after


# -- torch ------------------------------------------------------------------------------------------------------------
_C: Any = torch._C
_PRECISIONS = [
    (backend, operator)
    for backend, operator in (
        ("generic", "all"),
        ("cuda", "matmul"),
        ("mkldnn", "matmul"),
    )
    if hasattr(_C, "_get_fp32_precision_getter")  # from torch 2.9 on
]
_AUTOCAST = tuple(name for name in ("cpu", "cuda", "xpu") if name == "cpu" or getattr(torch, name).is_available())


def _float32_precision() -> Any:
    """(of matrix products, TF32 of cuBLAS and of cuDNN, {backend.operator: precision}); None for a contradiction."""
    new = [_C._get_fp32_precision_getter(*each) for each in _PRECISIONS]
    try:
        return _C._get_float32_matmul_precision(), _C._get_cublas_allow_tf32(), _C._get_cudnn_allow_tf32(), new
    except RuntimeError:  # torch refuses to read the old settings after some of the new ones
        return None, None, None, new


def _set_float32_precision(values: Any) -> None:
    matmul, cublas, cudnn, new = values
    if matmul is not None:  # each also sets some of those after it
        _C._set_cublas_allow_tf32(cublas)
        _C._set_float32_matmul_precision(matmul)
        _C._set_cudnn_allow_tf32(cudnn)
    for each, value in zip(_PRECISIONS, new):
        _C._set_fp32_precision_setter(*each, value)


def _default_device() -> Any:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)  # type: ignore[attr-defined]
    return None if context is None else context.device


def _set_modes(stack: Callable[[], list[Any]], modes: list[Any]) -> None:
    while stack():
        (_C._pop_torch_function_stack if stack is function_modes else _C._pop_torch_dispatch_stack)()
    for mode in modes:
        (_C._push_on_torch_function_stack if stack is function_modes else _C._push_on_torch_dispatch_stack)(mode)


def _autocast() -> Any:
    return [(_C.is_autocast_enabled(d), _C.get_autocast_dtype(d)) for d in _AUTOCAST], _C.is_autocast_cache_enabled()


def _set_autocast(values: Any) -> None:
    for device, (enabled, dtype) in zip(_AUTOCAST, values[0]):
        _C.set_autocast_enabled(device, enabled)
        _C.set_autocast_dtype(device, dtype)
    _C.set_autocast_cache_enabled(values[1])


_KEPT: list[Any] = []  #: contexts that restored the inference mode: it changes back when one of them is freed


def _set_inference_mode(mode: bool) -> None:
    _KEPT.append(torch.inference_mode(mode))
    _KEPT[-1].__enter__()


def _cudnn() -> tuple[bool, bool, bool]:
    return _C._get_cudnn_enabled(), _C._get_cudnn_benchmark(), _C._get_cudnn_deterministic()


def _set_cudnn(values: tuple[bool, bool, bool]) -> None:
    _C._set_cudnn_enabled(values[0])
    _C._set_cudnn_benchmark(values[1])
    _C._set_cudnn_deterministic(values[2])


_SMALLEST = sys.float_info.min


def _set_print_options(options: dict[str, Any]) -> None:
    vars(torch._tensor_str.PRINT_OPTS).update(options)


@cache
def _knob_groups() -> dict[str, dict[str, Any]]:
    """{name: the values that were set} of each group of triton.knobs: the attributes of its instance."""
    from triton import knobs

    return {name: vars(group) for name, group in vars(knobs).items() if isinstance(group, knobs.base_knobs)}


def _knobs() -> dict[str, dict[str, Any]]:
    if "triton.knobs" not in sys.modules:
        return {}
    groups = _knob_groups()
    return {name: values.copy() for name, values in groups.items() if values} if any(groups.values()) else {}


def _set_knobs(before: dict[str, dict[str, Any]]) -> None:
    for name, values in _knob_groups().items():
        values.clear()
        values.update(before.get(name, {}))


def _refuse(value: Any) -> None:
    raise RuntimeError("torch allows no second torch.set_num_interop_threads()")


#: Modes come first, for they change what torch's own functions do; the inference mode also sets the grad mode.
ARITHMETIC = (
    Global("torch.set_default_device()", _default_device, torch.set_default_device),
    Global("the stack of TorchFunctionModes", function_modes, lambda modes: _set_modes(function_modes, modes)),
    Global("the stack of TorchDispatchModes", dispatch_modes, lambda modes: _set_modes(dispatch_modes, modes)),
    Global("torch.get_default_dtype()", torch.get_default_dtype, torch.set_default_dtype),
    Global("torch.is_inference_mode_enabled()", torch.is_inference_mode_enabled, _set_inference_mode),
    Global("torch.is_grad_enabled()", torch.is_grad_enabled, _C._set_grad_enabled),
    Global("torch.autocast", _autocast, _set_autocast),
    Global("torch.is_anomaly_enabled()", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    Global(
        "torch.get_rng_state()", _Generator(_torch_memory, torch.get_rng_state),
        lambda drawn: torch.set_rng_state(drawn.state), _another_state, by_import=True,
    ),
    Global(
        "numpy.random.get_state()", _Generator(_numpy_memory, np.random.get_state),
        lambda drawn: np.random.set_state(drawn.state), _another_state, by_import=True,
    ),
    Global(
        "random.getstate()", _Generator(_python_memory, random.getstate), lambda drawn: random.setstate(drawn.state),
        _another_state, by_import=True,
    ),
    Global("torch.cuda.get_rng_state()", _cuda_rng, _set_cuda_rng, _another_state, _same_if_known),
    Global(
        "torch.get_deterministic_debug_mode()", torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    Global("torch.backends.cudnn (enabled, benchmark, deterministic)", _cudnn, _set_cudnn),
    Global("torch's float32 precision (matmul, cuBLAS, cuDNN, by backend)", _float32_precision, _set_float32_precision),
    Global("torch.get_num_threads()", torch.get_num_threads, torch.set_num_threads, by_import=True),
    Global("torch.get_num_interop_threads()", torch.get_num_interop_threads, _refuse, by_import=True),
    Global("torch.set_flush_denormal()", lambda: _SMALLEST / 2 == 0.0, torch.set_flush_denormal, by_import=True),
    Global(
        "torch.set_printoptions()", lambda: dict(vars(torch._tensor_str.PRINT_OPTS)), _set_print_options, changed_keys
    ),
    Global("triton.knobs", _knobs, _set_knobs, changed_keys, by_import=True),
)  # fmt: skip
