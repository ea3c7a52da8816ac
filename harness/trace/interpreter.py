"""Triton's CPU interpreter, corrected: right bf16 and fp8 arithmetic, and fewer Python calls per operation.

TRITON_INTERPRET=1 makes @triton.jit kernels run on CPU tensors, operation by operation in numpy. bf16 and fp8 are not
numpy types: Triton keeps their bits in unsigned integers, converts float32 to bf16 by truncation, rounds fp8 wrongly at
ties, in subnormals and beyond the largest value, and multiplies the *bits* of bf16 matrices in tl.dot. `enable`
replaces the few methods that do so:

    conversions      exact to float32, then rounded once to nearest even (ml_dtypes); fp8 saturates, see `encode`
    tl.dot           products summed in float64, the sum rounded to float32: the same bits in every row of a block
    bf16 operators   computed in float32, rounded to bf16, as on a GPU
    masked loads     masked lanes without `other` are NaN or a large number: on a GPU they are undefined
    launches         one at a time: the interpreter keeps the position in the grid in a global variable

Kernels do not know this module. trace/__init__.py lists all patches of Triton.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

_STORED_AS_BITS = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8e5": np.dtype(ml_dtypes.float8_e5m2),
}
_LARGEST = {"fp8e4nv": 448.0, "fp8e5": 57344.0}
_enabled = False
#: triton.language, once `enable` has imported it: a global of `_probe`, as of every kernel.
tl: Any = None


def enable() -> None:
    """Make this process interpret Triton kernels, corrected. May be called repeatedly.

    Sets TRITON_INTERPRET=1. RuntimeError if Triton was imported without it: its standard library then consists of
    compiled functions, which interpreted kernels cannot call.
    """
    global _enabled, tl
    if _enabled:
        return
    loaded = sys.modules.get("triton.language")
    if loaded is not None and type(loaded.sum).__name__ != "InterpretedFunction":
        raise RuntimeError(
            "Triton is already imported for compilation: call harness.trace.interpreter.enable() before that"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language
    from triton.runtime import interpreter

    tl = triton.language
    _patch_arithmetic(interpreter)
    _patch_loads(interpreter)
    _patch_speed(interpreter)
    _one_launch_at_a_time(interpreter.GridExecutor)
    _enabled = True


@functools.cache
def usable() -> str | None:
    """None, or one line: why Triton kernels cannot be interpreted here (triton 3.6 breaks with numpy 2.4, for one)."""
    try:
        enable()
        import triton

        out = torch.zeros(4, dtype=torch.int32)
        triton.jit(_probe)[(1,)](out, 3, BLOCK=4)
        if out.tolist() != [3, 4, 5, 6]:
            return f"Triton's interpreter (triton {triton.__version__}) adds wrongly: {out.tolist()}"
    except Exception as error:
        versions = f"triton {_version('triton')}, numpy {np.__version__}"
        return f"Triton's interpreter fails here ({versions}): {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _probe(out: Any, n: Any, BLOCK: tl.constexpr) -> None:  # type: ignore[name-defined]  # tl is bound at run time
    # A loop with a runtime bound: newer numpy versions broke it.
    total = tl.arange(0, BLOCK)
    for _ in range(0, n):
        total += 1
    tl.store(out + tl.arange(0, BLOCK), total)


def decode(data: np.ndarray, dtype: Any) -> np.ndarray:
    """The numbers in an interpreter array of Triton dtype: bf16 and fp8 bits become float32, exactly."""
    stored = _STORED_AS_BITS.get(dtype.name)
    return data if stored is None else np.ascontiguousarray(data).view(stored).astype(np.float32)


def encode(numbers: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers -> the interpreter's array for Triton dtype, rounded to nearest even.

    fp8 saturates like cvt.rn.satfinite on Hopper: beyond 448 (e4m3) or 57344 (e5m2), infinities included, to that
    value; NaN stays NaN.
    """
    from triton.runtime.interpreter import _get_np_dtype

    stored = _STORED_AS_BITS.get(dtype.name)
    if stored is None:
        return numbers.astype(_get_np_dtype(dtype))
    # float64, which no kernel here uses, would round twice; every narrower type widens exactly.
    numbers = numbers.astype(np.float32)
    if dtype.name in _LARGEST:
        numbers = np.clip(numbers, -_LARGEST[dtype.name], _LARGEST[dtype.name])  # clip keeps NaN
    return numbers.astype(stored).view(_get_np_dtype(dtype))


def _patch_arithmetic(interpreter: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert_as_shipped = interpreter._convert_float
    towards_zero = interpreter._ir.ROUNDING_MODE.RTZ
    known = {*_STORED_AS_BITS, "fp16", "fp32", "fp64"}

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        src_type, dst_type = src.dtype.scalar, dst_type.scalar
        with np.errstate(all="ignore"):  # overflow to infinity is a result, not an error
            return handle(encode(decode(src.data, src_type), dst_type), dst_type)

    def convert_float(data: np.ndarray, src_type: Any, dst_type: Any, rounding_mode: Any) -> np.ndarray:
        # Returns bits, which callers view as the type that they need.
        if rounding_mode == towards_zero or not {src_type.name, dst_type.name} <= known:
            return convert_as_shipped(data, src_type, dst_type, rounding_mode)
        with np.errstate(all="ignore"):
            converted = encode(decode(data, src_type), dst_type)
        return converted.view(f"uint{dst_type.primitive_bitwidth}")

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if not a.dtype.scalar.is_floating():
            return dot_as_shipped(self, a, b, d, input_precision, max_num_imprecise_acc)
        wide = np.float64 if d.data.dtype == np.float64 else np.float32
        # In float64, then rounded once: a BLAS may sum the rows of a block in different orders (OpenBLAS on Zen 3
        # does), and a row would have other bits at another place in its block.
        a_data, b_data = (decode(t.data, t.dtype.scalar).astype(np.float64, copy=False) for t in (a, b))
        with np.errstate(all="ignore"):
            total = np.matmul(a_data, b_data).astype(wide, copy=False) + decode(d.data, d.dtype.scalar)
        return handle(encode(total, d.dtype.scalar), d.dtype.scalar)

    dot_as_shipped = builder.create_dot
    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    interpreter._convert_float = convert_float
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(builder, name, _through_float32(getattr(builder, name), handle))


def _through_float32(operator: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    """An InterpreterBuilder operator (self, *operands, numpy function) that computes on numbers, not on bf16 bits."""

    def wrapped(self: Any, *args: Any) -> Any:
        *operands, function = args
        dtype = operands[-1].dtype.scalar
        if dtype.name not in _STORED_AS_BITS or function is np.where:  # selecting bits selects numbers
            with np.errstate(all="ignore"):
                return operator(self, *args)
        with np.errstate(all="ignore"):
            result = function(*(decode(x.data, x.dtype.scalar) for x in operands))
        return handle(result, tl.int1) if result.dtype == bool else handle(encode(result, dtype), dtype)

    return wrapped


#: {element size: the bits of an undefined element}: NaN in every floating format of that size, a large integer.
_UNDEFINED: dict[int, np.generic] = {
    1: np.uint8(0x7F), 2: np.uint16(0x7FFD), 4: np.uint32(0x7FFDA5A5), 8: np.uint64(0x7FFDA5A57FFDA5A5)
}  # fmt: skip


def undefined(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The content of lanes that are not loaded: NaN, or a large number, in an interpreter array of this numpy type."""
    return np.ones(shape, bool) if dtype.kind == "b" else np.full(shape, _UNDEFINED[dtype.itemsize]).view(dtype)


def _patch_loads(interpreter: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load_as_shipped = builder.create_masked_load

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        # Shipped: zeros. No GPU guarantees them.
        if other is None and not mask.data.all():
            element = ptrs.get_element_ty()
            other = handle(undefined(ptrs.data.shape, interpreter._get_np_dtype(element)), element)
        return load_as_shipped(self, ptrs, mask, other, *rest)

    builder.create_masked_load = create_masked_load


def _patch_speed(interpreter: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def create_erf(self: Any, arg: Any) -> Any:
        # Shipped: one Python call per element.
        exact = torch.erf(torch.from_numpy(np.array(arg.data, dtype=np.float64))).numpy()
        return handle(exact.astype(arg.data.dtype), arg.dtype.scalar)

    builder.create_erf = create_erf
    # Shipped: integer additions and products are repeated in int64 for an assertion that only debug mode evaluates.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    # Shipped: each look-up builds a dictionary of all types.
    numpy_type_as_shipped = interpreter._get_np_dtype
    numpy_types: dict[str, np.dtype] = {}

    def get_np_dtype(dtype: Any) -> np.dtype:
        scalar = dtype.scalar
        if scalar.is_ptr():
            return np.dtype(np.uint64)
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_type_as_shipped(scalar)
        return numpy_types[scalar.name]

    interpreter._get_np_dtype = get_np_dtype
    _keep_types()
    # Shipped: triton.language is patched again, attribute by attribute, at every launch and for every call of one
    # @triton.jit function by another. A process with TRITON_INTERPRET=1 compiles nothing, so one patch is enough.
    patch_language = interpreter._patch_lang
    patched: set[int] = set()

    class KeepPatched:
        def restore(self) -> None:
            pass

    def patch_once(fn: Any) -> KeepPatched:
        namespaces = {id(m) for m in fn.__globals__.values() if m is tl or m is tl.core}
        if not namespaces <= patched:
            patch_language(fn)
            patched.update(namespaces)
        return KeepPatched()

    interpreter._patch_lang = patch_once


#: Types of blocks to keep. Every launch makes new pointer types.
_MOST_TYPES = 10_000


def _keep_types() -> None:
    """Compute the attributes of a block's type, and of its tensors, once for each type instead of at every operation.

    Compare shapes as a whole.
    """
    from triton.language import core, semantic

    broadcast_as_shipped = semantic.TritonSemantic.broadcast_impl_value
    build_type, build_tensor = core.block_type.__init__, core.tensor.__init__
    made: dict[tuple, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        # The entry keeps the element type alive, so no other object can have its id.
        key = (id(element_ty), *[s.value if isinstance(s, core.constexpr) else s for s in shape])
        if key not in made:
            build_type(self, element_ty, shape)
            if len(made) == _MOST_TYPES:
                made.clear()
            made[key] = self.__dict__ | {"of_tensors": {}}
        self.__dict__.update(made[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        of_tensors = type.__dict__.setdefault("of_tensors", {})
        if not of_tensors:
            build_tensor(self, handle, type)
            of_tensors.update(self.__dict__)
            del of_tensors["handle"]
        self.__dict__.update(of_tensors)
        self.handle = handle

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        # Shipped: equal shapes are compared number by number, too.
        left, right = (t.type.shape.values if t.type.is_block() else None for t in (lhs, rhs))
        return (lhs, rhs) if left == right else broadcast_as_shipped(self, lhs, rhs)

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    semantic.TritonSemantic.broadcast_impl_value = broadcast


def _one_launch_at_a_time(executor: Any) -> None:
    launch, lock = executor.__call__, threading.RLock()

    @functools.wraps(launch)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return launch(self, *args, **kwargs)

    executor.__call__ = locked


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
