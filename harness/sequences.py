"""Stateful model checking: random sequences of calls, swaps, conversions and errors, shrunk to the shortest that fails.

A sequence is a tuple of steps, dataclasses whose every field is picked from a list. Steps change the prepared layers of
a `World` and what is known of them; the oracle is the model, and every good call is judged. Each sequence ends with one
call of every layer that it touched. What a backend declares not to do, or not to follow, is never picked; a step that
means nothing where it stands does nothing, and is gone from the shrunk sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness import errors, fence, swaps
from harness.backend import BackendError, Layer
from harness.device import DeviceLost
from harness.inputs import in_layout
from harness.problem import ROUTINGS, Case, DescriptorError, Problem
from harness.scenario import SCENARIOS, Failed, Unsupported, scenario
from harness.scratch import buffers
from harness.simplest import missing, pick, simplest
from harness.trace import poison_, raw

if TYPE_CHECKING:
    from harness.check import Session
    from harness.inputs import Inputs

EXAMPLES, STEPS, SHRINKS = 5, 20, 150  #: sequences a case, steps a sequence at most, sequences to shrink one with
#: Whole swaps by the kind of change that a backend must follow for them (harness/swaps.py).
SWAPS = {
    "copy_": "in_place", "data_copy_": "in_place", "inference_mode": "in_place", "data": "rebinding",
    "parameter": "rebinding", "same_address": "rebinding", "offload": "rebinding",
}  # fmt: skip
SAME_SHAPES = ("silu", "gelu", "gelu_tanh")  #: activations for which one layer's weights will do
BY = {"copy_": "in_place", "assignment": "rebinding"}


class Crashed(Exception):
    """A sequence that ended in an exception, which is the cause; the message lists the steps."""


@dataclass
class Held:
    """A prepared layer, and what is known of it."""

    config: dict[str, Any]  #: changes of the case: its own seed, layout, dtype, ...
    base: Layer  #: the layer as drawn, in layout "nk"
    handed: Layer  #: what the backend has
    problem: Problem
    call: Callable[..., Tensor]
    room: int | None = None  #: the most tokens that its scratch object takes
    changed: frozenset[str] = frozenset()  #: the tensors that are not as drawn (PARTS)

    @property
    def truth(self) -> Layer:
        """The layer as it is now, in layout "nk"."""
        parts = {name: PARTS[name](getattr(self.base, name), self.problem) for name in self.changed}
        return replace(self.base, problem=self.problem, **parts)

    @property
    def variant(self) -> str:
        """What tells the layer from one that is drawn for the case of a call: it was drawn for another, and changed."""
        drawn_for = Case(self.base.problem.weights_key(), seed=self.config["seed"])
        return "+".join((str(drawn_for), *sorted(self.changed)))


def _times(factor: float) -> Callable[[Tensor, Problem], Tensor]:
    return lambda tensor, problem: (tensor.float() * factor).to(tensor.dtype)


def _moved(expert_map: Tensor, problem: Problem) -> Tensor:
    """The experts of this rank change places."""
    return torch.where(expert_map >= 0, (expert_map + 1) % problem.local_experts, -1).to(expert_map.dtype)


#: What becomes of one tensor alone. Signs, zeros and powers of two: what was exact stays so.
PARTS: dict[str, Callable[[Tensor, Problem], Tensor]] = {
    "w2": _times(-1), "w2_bias": _times(-1), "w13_bias": _times(0), "w13_scale": _times(2), "w2_scale": _times(2),
    "a13_scale": _times(2), "a2_scale": _times(2), "expert_map": _moved,
}  # fmt: skip


def _stays_exact(part: str, problem: Problem) -> bool:
    """Whether an exact fill is still exact when this part changes: a scale multiplies gates, which must stay saturated
    and unclamped, and sums, whose other addends it does not multiply."""
    if part == "w13_scale":
        static = problem.quant is not None and problem.quant.activation == "tensor_static"
        alone = problem.limit is None and problem.activation != "swigluoai" and not problem.router_weight_on_input
        return alone and not problem.bias and not static
    return part != "w2_scale" or not problem.bias


@dataclass
class World:
    """The layers of one process while a sequence goes on. The second one is prepared where a step first asks for it."""

    s: Session
    layers: dict[int, Held] = field(default_factory=dict)
    scratches: dict[tuple, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    allowed: dict[Problem, bool] = field(default_factory=dict)

    def held(self, layer: int) -> Held:
        if layer not in self.layers:
            config = {"seed": self.s.case.seed + 10 * layer}
            drawn = self.s.draw(**config)
            problem = drawn.case.problem
            call = self.s.prepare(problem, drawn.handed)
            self.layers[layer] = Held(config, drawn.layer, drawn.handed, problem, call)
        return self.layers[layer]

    def allows(self, problem: Problem) -> bool:
        if problem not in self.allowed:
            self.allowed[problem] = self.s.why_not(problem) is None
        return self.allowed[problem]

    def batch(self, held: Held, **changes: Any) -> Inputs | None:
        """A batch for a layer as it is now; None if the backend excludes it."""
        if held.room is not None:
            changes["tokens"] = min(changes.get("tokens", self.s.case.problem.tokens), held.room)
        drawn = self.s.draw(**{**held.config, **changes})
        if not self.allows(drawn.case.problem):
            return None
        truth = replace(held.truth, problem=drawn.case.problem)
        return replace(drawn, layer=truth, handed=held.handed, variant=held.variant)

    def scratch(self, problem: Problem, room: int) -> Any:
        """One for all layers whom it fits, as an engine keeps it."""
        fits = (room, problem.top_k, problem.num_experts, problem.local_experts, problem.hidden_size, problem.dtype)
        if fits not in self.scratches:
            self.scratches[fits] = self.s.backend.make_scratch(replace(problem, tokens=room), self.s.device.torch)
        return self.scratches[fits]

    def prepare(self, held: Held) -> None:
        options = {} if held.room is None else {"scratch": self.scratch(held.problem, held.room)}
        held.call = self.s.prepare(held.problem, held.handed, **options)

    def play(self, steps: tuple[Any, ...]) -> None:
        """Failed, or whatever the backend raises, at the first step that goes wrong; `done` ends with it."""
        for step in steps:
            self.take(step)
        problem = self.s.case.problem
        for layer in sorted(self.layers) or [0]:
            self.take(Call(layer, problem.tokens, problem.routing, problem.ids, problem.padded, True, False))

    def take(self, step: Any) -> None:
        self.done.append(str(step))
        step.take(self)


# -- the steps --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Call:
    layer: int
    tokens: int
    routing: str
    ids: int
    padded: bool
    out: bool
    twice: bool

    def __str__(self) -> str:
        more = [", padded rows" if self.padded else "", "" if self.out else ", without out"]
        told = f"layer {self.layer}: call with {self.tokens} tokens, {self.routing} routing, int{self.ids} ids"
        return f"{told}{''.join(more)}{', twice' if self.twice else ''}"

    def take(self, world: World) -> None:
        held, s = world.held(self.layer), world.s
        given = world.batch(held, tokens=self.tokens, routing=self.routing, ids=self.ids, padded=self.padded)
        if given is None:
            return
        call = held.call if self.out else lambda *arguments: held.call(*arguments)
        first = s.check(call, given).clone()
        if self.twice:
            again = s.check(call, given, "again")
            same = torch.equal(raw(first), raw(again)) or getattr(s.backend, "deterministic", True) is not True
            s.require(same, "the same call again gave other bits")


@dataclass(frozen=True)
class Swap:
    layer: int
    swap: str
    seed: int

    def __str__(self) -> str:
        return f"layer {self.layer}: all weights become those of seed {self.seed}, by {self.swap}"

    def take(self, world: World) -> None:
        held = world.held(self.layer)
        held.config["seed"] = self.seed
        other = world.s.draw(**held.config)
        getattr(swaps, self.swap)(held.handed, other.handed)
        held.base, held.changed = other.layer, frozenset()


@dataclass(frozen=True)
class Part:
    layer: int
    part: str
    by: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.part} alone changes, or back, by {self.by}"

    def take(self, world: World) -> None:
        held = world.held(self.layer)
        if world.s.case.fill == "exact" and not _stays_exact(self.part, held.problem):
            return
        held.changed ^= {self.part}
        new = getattr(in_layout(held.truth, held.problem.layout), self.part)
        if self.by == "copy_":
            getattr(held.handed, self.part).copy_(new)
        else:
            setattr(held.handed, self.part, fence.keep(new))


@dataclass(frozen=True)
class Configure:
    """The layer gets another configuration, and weights for it, under the same prepared call."""

    layer: int
    setting: tuple[str, Any]

    def __str__(self) -> str:
        return f"layer {self.layer}: reconfigured, {self.setting[0]}={self.setting[1]}, or back"

    def take(self, world: World) -> None:
        held, (name, value) = world.held(self.layer), self.setting
        asked = {**held.config, name: value}
        if held.config.get(name) == value:
            del asked[name]
        if not world.allows(world.s.case.change(**asked).problem):
            return
        other = world.s.draw(**asked)
        for each in fields(Layer):
            setattr(held.handed, each.name, getattr(other.handed, each.name))
        held.config, held.base, held.problem, held.changed = asked, other.layer, other.case.problem, frozenset()
        if held.room is not None:
            world.prepare(held)  # a scratch object is for one configuration


@dataclass(frozen=True)
class Activate:
    """The activation alone changes: the weights stay, and nothing else tells."""

    layer: int
    activation: str

    def __str__(self) -> str:
        return f"layer {self.layer}: the activation becomes {self.activation}, the weights stay"

    def take(self, world: World) -> None:
        held = world.held(self.layer)
        problem = replace(held.problem, activation=self.activation)
        if held.problem.activation in SAME_SHAPES and world.allows(problem):
            held.config["activation"] = self.activation
            held.problem = held.handed.problem = problem


@dataclass(frozen=True)
class Prepare:
    layer: int
    layout: str
    room: int | None

    def __str__(self) -> str:
        layout = "" if self.layout == "same" else ", converted to the other layout"
        scratch = "" if self.room is None else f", with the scratch object for {self.room} tokens"
        return f"layer {self.layer}: prepared again{layout}{scratch}"

    def take(self, world: World) -> None:
        held = world.held(self.layer)
        if self.layout == "other":
            layout = "kn" if held.problem.layout == "nk" else "nk"
            problem = replace(held.problem, layout=layout)
            if not world.allows(problem):
                return
            held.config["layout"], held.problem = layout, problem
            converted = in_layout(held.truth, layout)
            held.handed = Layer(problem, **{name: fence.keep(t) for name, t in converted.tensors().items()})
        held.room = self.room
        world.prepare(held)


@dataclass(frozen=True)
class NaN:
    layer: int

    def __str__(self) -> str:
        return f"layer {self.layer}: call with hidden_states full of NaN"

    def take(self, world: World) -> None:
        held = world.held(self.layer)
        if (given := world.batch(held)) is not None:
            world.s.call(held.call, replace(given, hidden_states=torch.full_like(given.hidden_states, float("nan"))))


@dataclass(frozen=True)
class Fault:
    layer: int
    fault: str

    def __str__(self) -> str:
        return f"layer {self.layer}: a call that must be refused, {self.fault}, and a good one"

    def take(self, world: World) -> None:
        held = world.held(self.layer)
        if (given := world.batch(held)) is not None:
            SCENARIOS[f"error.{self.fault}"](_Midway(world.s, given, held.call))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Poison:
    scratch: int

    def __str__(self) -> str:
        return f"the scratch objects for {self.scratch} tokens are overwritten with NaN"

    def take(self, world: World) -> None:
        for (room, *_), scratch in world.scratches.items():
            for tensor in buffers(scratch).values() if room == self.scratch else ():
                poison_(tensor)


class _Midway:
    """The session of a scenario that is played in the middle of a sequence: it draws and prepares what is there."""

    def __init__(self, s: Session, given: Inputs, call: Callable[..., Tensor]) -> None:
        self._s, self._given, self._call = s, given, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._s, name)

    def draw(self) -> Inputs:
        return self._given

    def prepare(self, problem: Problem, layer: Layer) -> Callable[..., Tensor]:
        return self._call


# -- what is picked from ----------------------------------------------------------------------------------------------
#: As often as they stand here; a failing sequence shrinks towards the first.
KINDS = (Call, Call, Call, Swap, Swap, Part, Configure, Activate, Prepare, NaN, Fault, Poison)


def options(s: Session) -> dict[str, list[Any]]:
    """What the fields of a step may be for this backend and case."""
    case, problem = s.case, s.case.problem
    given = s.draw()
    follows = getattr(s.backend, "follows", {"in_place", "rebinding", "config"})

    def possible(**changes: Any) -> bool:
        try:
            return s.why_not(replace(problem, **changes)) is None
        except DescriptorError:  # no such Problem
            return False

    tokens = dict.fromkeys((problem.tokens, 1, 2, 3, 0, problem.tokens + 1, 17, 2 * problem.tokens + 1))
    settings = {
        "dtype": "fp16" if problem.dtype == "bf16" else "bf16", "num_experts": 2 * problem.num_experts,
        "top_k": problem.top_k + 1, "activation": "gelu" if problem.activation == "relu2" else "relu2",
        "layout": "kn" if problem.layout == "nk" else "nk",
    }  # fmt: skip
    scratch = [17, problem.tokens, 40] if hasattr(s.backend, "make_scratch") else []
    return {
        "layer": [0, 0, 1],
        "tokens": [n for n in tokens if possible(tokens=n)],
        "routing": [r for r in dict.fromkeys((problem.routing, *ROUTINGS)) if possible(routing=r)],
        "ids": [problem.ids, 32 if problem.ids == 64 else 64],
        "padded": [problem.padded, not problem.padded],
        "out": [True, False],
        "twice": [False, False, True],
        "swap": [name for name, kind in SWAPS.items() if kind in follows],
        "seed": [case.seed + n for n in (1, 2, 0)],
        "part": [name for name in PARTS if getattr(given.handed, name) is not None],
        "by": [name for name, kind in BY.items() if kind in follows],
        "setting": [(k, v) for k, v in settings.items() if "config" in follows and possible(**{k: v})],
        "activation": [a for a in SAME_SHAPES if "config" in follows and possible(activation=a)],
        "layout": ["same", "other"] if possible(layout=settings["layout"]) else ["same"],
        "room": [None, *scratch],
        "scratch": scratch,
        "fault": list(_faults(given)) if "errors" in getattr(s.backend, "promises", ()) else [],
    }


def _faults(given: Inputs) -> Iterator[str]:
    """The faults that are any for these inputs."""
    problem = given.case.problem
    harmless = {"ids_tokens"} if problem.tokens == 0 else set()
    harmless |= {"weight_on_input_top_k"} if problem.top_k == 1 else set()
    for name in (name.removeprefix("error.") for name in SCENARIOS if name.startswith("error.")):
        x = given.hidden_states
        bad = errors.Call(x, given.topk_weights, given.topk_ids, torch.empty_like(x), replace(given.handed))
        try:
            getattr(errors, name)(bad)
        except Unsupported:
            continue
        if name not in harmless:
            yield name


def steps(s: Session) -> Any:
    """The strategy of sequences for this backend and case."""
    from hypothesis import strategies

    picked = options(s)
    kinds = [kind for kind in KINDS if all(picked[f.name] for f in fields(kind))]
    each = {kind: strategies.builds(kind, **{f.name: pick(picked[f.name]) for f in fields(kind)}) for kind in kinds}
    half = strategies.lists(pick(kinds).flatmap(each.__getitem__), max_size=STEPS // 2)
    # In halves: Hypothesis draws lists of five on average, and deletes from two as well as from one.
    return strategies.tuples(half, half).map(lambda halves: (*halves[0], *halves[1]))


@scenario("sequence.calls")
def calls(s: Session) -> None:
    """Random sequences of everything that may happen to a layer; the seed is the case's."""
    if reason := missing():
        raise Unsupported(f"package: {reason}")

    quick = _unexplained(s)

    def ask(sequence: tuple[Any, ...]) -> Failed | Crashed | None:
        return _failure(World(quick), sequence)

    found = simplest(steps(s), ask, seed=s.case.seed, examples=EXAMPLES, shrinks=SHRINKS)
    if found is not None:
        raise _failure(World(s), found[0]) or _once_only(found[1])


def _failure(world: World, sequence: tuple[Any, ...]) -> Failed | Crashed | None:
    try:
        world.play(sequence)
    except Failed as failure:
        summary = f"{_after(world.done)}: {failure.summary}"
        report = "\n".join([summary, "", _listed(world.done), "", failure.report])
        return Failed(summary, report, failure.error_map)
    except (Unsupported, DeviceLost, BackendError):
        raise
    except Exception as error:  # whatever a kernel raises: it is the verdict of the shortest sequence
        crash = Crashed(f"{_after(world.done)}: {type(error).__name__}: {error}\n{_listed(world.done)}")
        crash.__cause__ = error
        return crash
    return None


def _once_only(failure: Exception) -> Failed:
    told = f"a sequence that failed, and was right when it was played again: {str(failure).splitlines()[0]}"
    return Failed(told, f"{told}\n{getattr(failure, 'report', failure)}")


def _unexplained(s: Session) -> Session:
    """The same session, in which a failure is not explained: while a sequence is shrunk nobody reads it."""
    quick = copy.copy(s)

    def accept(out: Tensor, given: Inputs, what: str = "", call: Any = None) -> None:
        if not s.judged(out, given).passed:
            raise Failed("wrong", "wrong")
        s.accept(out, given, what, call)

    quick.accept = accept  # type: ignore[method-assign]
    return quick


def _after(done: list[str]) -> str:
    return "after 1 step" if len(done) == 1 else f"after {len(done)} steps"


def _listed(done: list[str]) -> str:
    lines = [f"  {n:2}  {step}" for n, step in enumerate(done, 1)]
    return "\n".join(["  the sequence; its last step failed", *lines])
