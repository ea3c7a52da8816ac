"""Backends: the layer that they get, the registry that finds them, and the checks of what they declare.

A backend is any object (or a class without constructor arguments) with attributes of `Backend` (harness/protocol.py);
three are required. Its author imports nothing from here. docs/your-kernel.md has the table of the attributes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from harness import device as devices
from harness.base.errors import UserError
from harness.base.interrupts import Interrupts
from harness.base.raised import describe_error, describe_value, type_name
from harness.base.suggest import did_you_mean
from harness.base.trial import how_it_ends
from harness.device import Device, DeviceLost
from harness.problem.case import Problem
from harness.protocol import FOLLOWS, PROMISES, UNSUPPORTED, AnswerRule, Backend, protocol_table, rules

__all__ = [
    "BUILTIN", "ENTRY_POINTS", "FOLLOWS", "PROMISES", "UNSUPPORTED", "Backend", "BackendError", "Layer", "Unsupported",
    "as_backend", "forget", "installed", "load", "protocol_table", "select", "takes_out", "unavailable", "unsupported",
]  # fmt: skip

#: {name: where it is} of those of kernels/; no other backend may have one of these names.
BUILTIN = {
    "triton": "kernels.triton.backend:TritonMoE",
    "triton-aligned": "kernels.triton.backend:TritonAlignedMoE",
    "triton-chunked": "kernels.triton.backend:TritonChunkedMoE",
    "triton-permute": "kernels.triton.backend:TritonPermuteMoE",
    "triton-cached": "kernels.cached:TritonCachedMoE",
    "torch-grouped-mm": "kernels.grouped:GroupedMM",
    "transformers-eager": "kernels.upstream.transformers:Eager",
    "transformers-batched-mm": "kernels.upstream.transformers:BatchedMM",
    "transformers-grouped-mm": "kernels.upstream.transformers:GroupedMM",
    "vllm-cpu": "kernels.upstream.vllm_cpu:FusedMoE",
    "vllm-cpu-sgl": "kernels.upstream.vllm_cpu:FusedExpertsCpu",
    "ipex": "kernels.upstream.ipex:FusedExperts",
    "ipex-gated-mlp": "kernels.upstream.ipex:GatedMLP",
    "vllm-xpu": "kernels.upstream.vllm_xpu:VllmXpu",
    "vllm-xpu-experts": "kernels.upstream.vllm_xpu_experts:VllmXpuExperts",
    "vllm-triton": "kernels.upstream.vllm_triton:VllmTriton",
    "vllm-triton-modular": "kernels.upstream.vllm_triton:VllmTritonModular",
    "vllm-triton-interpreted": "kernels.upstream.vllm_interpreted:VllmTritonInterpreted",
    "vllm-permute": "kernels.upstream.vllm_permute:VllmPermute",
    "triton-kernels": "kernels.upstream.triton_kernels:TritonKernels",
    "triton-kernels-sorted": "kernels.upstream.triton_kernels:TritonKernelsSorted",
    "triton-kernels-invariant": "kernels.upstream.triton_kernels:TritonKernelsInvariant",
    "sglang-triton": "kernels.upstream.sglang_triton:SglangTriton",
    "sglang-xpu": "kernels.upstream.sglang_xpu:SglangXpu",
}
ENTRY_POINTS = "moe_harness.backends"
_MISSING = object()


class BackendError(UserError):
    """A backend that cannot be found or breaks the protocol. The message says how to mend it."""


class Unsupported(Exception):
    """The case does not apply; the message is "<keyword>: reason" with a keyword of UNSUPPORTED."""


@dataclass
class Layer:
    """The tensors that a serving engine's MoE module holds. Scenarios assign to its fields between calls.

    layout "nk": w13 [E, 2I, K] (gate rows, then up rows; interleaved for swigluoai; relu2: [E, I, K]), w2 [E, K, I];
    layout "kn": w13 [E, K, 2I] and w2 [E, I, K], with block scales transposed likewise. E counts local experts.
    Scales are float32: weights [E], [E, N] or [E, ceil(N/128), ceil(K/128)]; static activation scales [1].
    Biases [E, 2I] and [E, K] have the dtype of hidden_states. expert_map int32 [num_experts] -> local expert or -1.
    """

    problem: Problem
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    a13_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that hold tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def as_backend(candidate: Any, source: str = "") -> Backend:
    """The candidate as a `Backend`; itself if it is one. BackendError, which begins with `source`, if it breaks the
    protocol."""
    if isinstance(candidate, Backend):
        return candidate
    source = source or f"backend {type_name(candidate)}"
    values: dict[str, Any] = {}
    with _foreign(f"{source}: reading its attributes"):
        for name, rule in rules():
            value = getattr(candidate, name, None)
            if value is None and rule.required:
                raise BackendError(f"{source}: {_lacks(candidate, name)} ({rule.valid}); see docs/your-kernel.md")
            if value is None:
                continue
            if not rule.accepts(value):
                hint = _misspelt_word(value, rule.words)
                raise BackendError(f"{source}: {name}={describe_value(value)}; valid: {rule.valid}{hint}")
            values[name] = frozenset(value) if rule.is_set else value
        if hint := _misspelt_attribute(candidate, set(values)):
            raise BackendError(f"{source}: {hint}")
        for name, rule in rules():
            if rule.answer and name in values:
                values[name] = _checked(f"{values['name']}.{name}()", values[name], rule.answer)
    return Backend(candidate, **values)


def _lacks(candidate: Any, name: str) -> str:
    missing = inspect.getattr_static(candidate, name, _MISSING) is _MISSING
    close = did_you_mean(name, (other for other in dir(candidate) if other[:1] != "_"), cutoff=0.8) if missing else ""
    return f"it has no attribute {name!r}{close}" if missing else f"{name}=None"


def _misspelt_word(value: Any, words: Iterable[str]) -> str:
    """A suggestion for the first wrong word of a set, or ""."""
    given = value if isinstance(value, Collection) and not isinstance(value, str) else [value]
    wrong = (word for word in given if isinstance(word, str) and word not in words)
    return next((hint for word in wrong if (hint := did_you_mean(word, words))), "")


def _misspelt_attribute(candidate: Any, present: set[str]) -> str:
    """A line about the first attribute that is nearly one which the candidate lacks, and of its kind; or ""."""
    for word in dir(candidate):
        if word.startswith("_") or word in present:
            continue
        value = inspect.getattr_static(candidate, word)  # runs no property
        close = [n for n, r in rules() if n not in present and r.resembles(value) and not hasattr(type(candidate), n)]
        if hint := did_you_mean(word, close, cutoff=0.86):
            return f"it has an attribute {word!r}, which is not of the protocol{hint} (own helpers begin with _)"
    return ""


def _checked(method: str, function: Callable[..., Any], rule: AnswerRule) -> Callable[..., Any]:
    """The function; BackendError if it returns something that the rule does not accept.

    What a function that only declares something raises is a BackendError too, unless it is the user's Ctrl-C.
    """

    @wraps(function, updated=())
    def call(*args: Any, **options: Any) -> Any:
        with _foreign(method) if rule.declares else nullcontext():
            answer = function(*args, **options)
        try:
            accepted, why = rule.accepts(answer), ""
        except Exception as error:  # of a hostile answer, or the name of a wrong field
            accepted, why = False, f" ({describe_error(error)})"
        if not accepted:
            raise BackendError(f"{method} answered {describe_value(answer)}; valid: {rule.valid}{why}")
        return answer

    return call


@contextmanager
def _foreign(what: str) -> Iterator[None]:
    """Make a BackendError of what a backend's code raises, also of SystemExit; the user's Ctrl-C passes."""
    with Interrupts() as interrupts:
        try:
            yield
        except (BackendError, DeviceLost):
            raise
        except BaseException as error:
            if interrupts.came:
                raise
            raise BackendError(f"{what} raised {describe_error(error)}") from error


# -- the registry -----------------------------------------------------------------------------------------------------
def load(spec: str) -> Backend:
    """The backend that "package.module:object" names, or that is registered under a plain name.

    BackendError if there is none, its module cannot be imported, or the object breaks the protocol.
    """
    if ":" not in spec:
        known = {b.name: b for b in installed()}
        if spec not in known:
            raise BackendError(
                f"--backend {spec}: no such backend{did_you_mean(spec, known)}; known: {', '.join(known)}, or "
                "package.module:object"
            )
        return known[spec]
    _try(spec)
    return _import(spec)


def _try(spec: str) -> None:
    """Load a backend in a copy of this process first. BackendError if that ends the copy, or never returns.

    Not where there is a GPU: its driver does not survive the fork, and a module may use it when it is imported.
    """
    if spec in _tried or devices.present() != ("cpu",):
        return

    def load_and_ask() -> None:
        backend = _import(spec)
        if backend.available:
            backend.available()

    if ending := how_it_ends(load_and_ask, LOADING):
        raise BackendError(f"--backend {spec}: loading it {ending}")
    _tried.add(spec)


def _import(spec: str) -> Backend:
    source = f"--backend {spec}"
    loaded = _imported(source, *spec.partition(":")[::2])
    if inspect.isclass(loaded):
        with _foreign(f"{source}: creating it without arguments"):
            loaded = loaded()
    backend = as_backend(loaded, source)
    own = f"{type(loaded).__module__}:{type(loaded).__qualname__}"
    if BUILTIN.get(backend.name, spec) not in (spec, own):
        raise BackendError(
            f"{source}: name={backend.name!r} is that of {BUILTIN[backend.name]}; valid: a name that no built-in "
            "backend has"
        )
    return backend


def _imported(source: str, module: str, attribute: str) -> Any:
    """The attribute of the module. BackendError if the import or the look-up raises anything."""
    try:
        with Interrupts() as interrupts:
            found = importlib.import_module(module)
    except BaseException as error:  # another package's module may raise anything: the message names it
        if interrupts.came or isinstance(error, DeviceLost):
            raise
        hint = "; run from where it can be imported" if getattr(error, "name", "") == module else ""
        raise BackendError(f"{source}: cannot import {module}: {describe_error(error)}{hint}") from error
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        hint = did_you_mean(attribute, (name for name in dir(found) if not name.startswith("_")))
        raise BackendError(f"{source}: module {module} has no {attribute!r}{hint}") from error


_installed: list[Backend] = []
_tried: set[str] = set()  #: specs whose backends a copy of this process has loaded
LOADING = 300.0  #: seconds for the import of a backend's module


def installed() -> list[Backend]:
    """The built-in backends and those that installed packages declare under the entry point group; loaded once."""
    if not _installed:
        declared = [e.value for e in importlib.metadata.entry_points(group=ENTRY_POINTS)]
        _installed.extend(_import(spec) for spec in (*BUILTIN.values(), *declared))
    return list(_installed)


def forget() -> None:
    """Load the installed backends again when they are next needed: their modules have changed."""
    _installed.clear()


def select(specs: Iterable[str]) -> list[Backend]:
    """The backends that --backend names, or all installed ones."""
    chosen = {spec: load(spec) for spec in specs}
    first: dict[str, str] = {}
    for spec, backend in chosen.items():
        if first.setdefault(backend.name, spec) != spec and backend is not chosen[first[backend.name]]:
            raise BackendError(f"--backend {spec}: name={backend.name!r} is that of {first[backend.name]} too")
    return list(chosen.values()) or installed()


# -- what a backend declares ------------------------------------------------------------------------------------------
def unavailable(backend: Any, device: Device) -> str | None:
    """None, or the one reason why this backend cannot run on this device here: "<keyword>: text". BackendError if
    available() raises or answers something else."""
    backend = as_backend(backend)
    if device.name not in backend.devices:
        return f"device: {backend.name} declares {', '.join(sorted(backend.devices))}"
    if backend.interpreted and device.interprets_triton:
        if not devices.interpreting():
            return "device: Triton is compiled in this process; its interpreter needs one without a GPU (-m cpu)"
        from harness.trace import interpreter  # only now: it imports ml_dtypes

        if reason := interpreter.usable():
            return f"package: {reason}"
    reason = backend.available() if backend.available else None
    return f"package: {reason}" if reason else None


def unsupported(backend: Any, problem: Problem, device: Device) -> str | None:
    """None, or the backend's declared reason. BackendError if supports() raises or answers something else."""
    backend = as_backend(backend)
    if backend.supports is None:
        return None
    if _takes(backend.supports, "device"):
        return backend.supports(problem, device=device.name)
    return backend.supports(problem)


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable without a readable signature
        return False


def takes_out(call: Callable[..., Any]) -> bool:
    """Whether a prepared call takes `out`, the memory for its output."""
    parameters = inspect.signature(call).parameters.values()
    return any(p.name == "out" or p.kind is p.VAR_KEYWORD for p in parameters)
