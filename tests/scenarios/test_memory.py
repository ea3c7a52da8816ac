"""The scenarios of memory and of the host: each notices the fault that it is there for, and no other."""

import pytest
import torch

from cases import test_memory as family
from harness.backend import Unsupported
from harness.device import Device
from harness.diagnose import failure
from harness.diagnose.failure import Failed
from harness.diagnose.report import Report
from harness.problem.case import Case
from harness.problem.families import rows
from harness.run.case import run_case
from harness.scenarios import run_scenario
from harness.scenarios.memory import WIDEST_OFFSET
from harness.session.session import Session
from tests.support.emulated import Emulated

CPU = Device("cpu")


@pytest.fixture(autouse=True)
def unexplained(monkeypatch):
    """That an answer is wrong is enough here; to say why takes longer than to find out."""
    plain = lambda backend, plans, judgement, inputs, what, *rest: Failed(Report("wrong", details=[f"wrong {what}"]))  # noqa: E731
    monkeypatch.setattr(failure, "failure", plain)


def verdict(backend, text):
    return run_case(Case.parse(text), backend, CPU)


class Changed(Emulated):
    """A correct backend but for what `before` does to the arguments of a call, or `after` to its result."""

    promises = {"no_wait", "graph"}

    def __init__(self, before=lambda *arguments: arguments, after=lambda out, x, weights, ids: out):
        super().__init__("changed")
        self.before, self.after = before, after

    def run(self, layer, *arguments, out=None):
        result = super().run(layer, *self.before(*arguments))
        return self.after(result, *arguments)


PADDING = (
    "t17-h64-i32-e8-k2-bf16-random", "t17-h64-i32-e8-k2-bf16-e4m3.tensor.tensor-random",
    "t17-h64-i32-e8-k2-bf16-e4m3.tensor.tensor-exact", "t17-h64-i32-e8-k1-fp32-win-exact",
    "t17-h160-i32-e8-k2-bf16-e4m3.block.group-bias-random", "t17-h64-i32-e8-k2-bf16-ep2.0-ids64-padded-exact",
)  # fmt: skip


@pytest.mark.parametrize("text", PADDING)
def test_padding_rows_of_correct_backends(text):
    assert verdict(Emulated(), f"{text}-memory.padding_rows").status == "passed"


def all_or_nothing(out, x, weights, ids):
    return out + 0 * x.float().sum().to(out.dtype)  # as one NaN in an amax


def neighbour(out, x, weights, ids):
    return out + 0 * x.roll(1, 0)  # as a tile that multiplies idle rows by zero


def weighs_all(out, x, weights, ids):
    return out + 0 * weights.sum().to(out.dtype)


@pytest.mark.parametrize("leak", (all_or_nothing, neighbour, weighs_all))
def test_padding_that_reaches_other_rows_is_seen(leak):
    text = "t9-h32-i16-e4-k2-bf16-random"
    assert verdict(Changed(after=leak), text).status == "passed"
    assert verdict(Changed(after=leak), f"{text}-memory.padding_rows").status == "failed"


def test_rows_that_nobody_serves_are_not_asked_of_who_is_not_safe_from_nan():
    class Unsafe(Emulated):
        nan_safe = False

        def run(self, layer, x, weights, ids, out=None):
            if (ids < 0).all(1).any():
                raise AssertionError("a row that nobody serves")
            return super().run(layer, x, weights, ids, out)

    assert run_case(Case.parse("t15-h64-i32-e4-k2-bf16-exact-memory.padding_rows"), Unsafe(), CPU).status == "passed"
    found = run_case(Case.parse("t15-h64-i32-e4-k2-bf16-ep2.1-extreme"), Unsafe(), CPU)
    assert found.status == "unsupported" and found.reason.startswith("fill: ")


def test_a_per_tensor_scale_is_taken_from_all_rows():
    def served_only(x, weights, ids):
        return torch.where((ids >= 0).any(1, keepdim=True), x, 0), weights, ids

    text = "t17-h64-i32-e4-k2-bf16-e4m3.tensor.tensor-random"
    assert verdict(Changed(before=served_only), text).status == "passed"
    found = verdict(Changed(before=served_only), f"{text}-memory.padding_rows")
    assert found.status == "failed" and "large" in found.report


def test_copies_of_a_correct_backend():
    assert verdict(Emulated(), "t300-h64-i32-e4-k2-bf16-exact-memory.copies").status == "passed"
    assert verdict(Emulated(), "t70-h64-i32-e4-k2-bf16-random-memory.copies").status == "unsupported"


def test_a_copy_that_differs_is_told():
    def overflow(out, x, weights, ids):
        out[256:] = out[: len(out) - 256] if len(out) > 256 else 0
        out[257, 3] += 1
        return out

    found = verdict(
        Changed(after=lambda out, *a: overflow(out, *a) if len(out) > 256 else out),
        "t300-h64-i32-e4-k2-bf16-exact-memory.copies",
    )
    assert found.status == "failed" and "1 of 300 tokens" in found.reason and "token 257, column 3" in found.reason


def test_a_call_that_promises_not_to_wait():
    class Quiet(Changed):
        def run(self, layer, x, weights, ids, out=None):
            return (x * weights.sum(1, keepdim=True)).to(x.dtype)

    case = Case.parse("t9-h64-i64-e4-k2-bf16-random-memory.no_wait")
    waits = {
        "item": lambda x, w, i: x * float(w.sum()), "bool": lambda x, w, i: x if bool((i >= 0).all()) else x,
        "nonzero": lambda x, w, i: x[torch.nonzero(i[:, 0] >= 0).flatten()],
        "tolist": lambda x, w, i: (i.tolist(), x)[1], "mask": lambda x, w, i: x[i[:, 0] >= 0],
    }  # fmt: skip

    def played(backend):
        session = Session(case, backend, CPU)
        session.accept = lambda *a: None  # its answers are wrong: only what it waits for counts here
        run_scenario(session)

    played(Quiet())
    for name, wait in waits.items():
        noisy = Quiet()
        noisy.run = lambda layer, x, w, i, out=None, wait=wait: wait(x, w, i).to(x.dtype)
        with pytest.raises(Failed, match="waits for the device"):
            played(noisy)
            pytest.fail(name)


class Replayed:
    """What a captured graph does, for calls that hold no state: it runs them again on the same memory."""

    def __init__(self, calls):
        self.calls, self.outputs = calls, [call().clone() for call in calls]

    def microseconds(self):
        for out, call in zip(self.outputs, self.calls):
            out.copy_(call())
        return [1.0]


class Graphs(Device):
    """A CPU that passes for a device with graphs."""

    torch = torch.device("cpu")
    replay = Replayed

    def synchronize(self):
        pass

    def graph_of(self, before, calls):
        return self.replay(calls)


def replayed(backend, replay=Replayed):
    kind = type("Kind", (Graphs,), {"replay": staticmethod(replay)})
    session = Session(Case.parse("t9-h32-i16-e4-k2-bf16-exact-memory.graph"), backend, kind("cuda"))
    run_scenario(session)
    return session


def test_a_graph_answers_for_what_its_memory_holds():
    assert len(replayed(Changed()).judgements) == 8
    with pytest.raises(Unsupported, match="does not promise 'graph'"):
        replayed(Emulated())
    assert verdict(Changed(), "t9-h64-i64-e4-k2-bf16-exact-memory.graph").status == "unsupported"


class Frozen(Replayed):
    def microseconds(self):
        return [1.0]


def test_a_replay_of_the_values_at_capture_is_seen():
    with pytest.raises(Failed):
        replayed(Changed(), Frozen)
    with pytest.raises(Failed, match="cannot be captured"):
        replayed(Changed(), lambda calls: None)


def test_a_buffer_that_a_larger_batch_takes_away_is_seen():
    held = {}

    class Grows(Changed):
        def run(self, layer, x, weights, ids, out=None):
            if len(x) > held.setdefault("room", len(x)):
                held["room"], held["lost"] = len(x), True
            return super().run(layer, x, weights, ids)

    class Stale(Replayed):
        def microseconds(self):
            super().microseconds()
            if held.get("lost"):
                self.outputs[0].zero_()
            return [1.0]

    with pytest.raises(Failed) as found:
        replayed(Grows(), Stale)
    assert "after a larger batch" in str(found.value.report)


def test_the_rows_of_offsets32_ask_what_they_say():
    """Every operand that has a row per token, pair or expert is larger than the limit; tiles stay below it."""
    asked = [row.case.problem for row in rows(family, on_cpu=True) if row.case.scenario == "memory.offsets32"]
    assert len(asked) > 8
    for problem in asked:
        experts = problem.local_experts * problem.w13_rows * problem.hidden_size
        assert max(problem.tokens * problem.hidden_size, experts) > WIDEST_OFFSET
        strides = (problem.hidden_size, problem.intermediate_size)
        # A lane of a tile is a row of w (nk) or, transposed, a column: then w13's rows are its stride.
        strides += (problem.w13_rows,) if problem.layout == "kn" else ()
        assert 127 * max(strides) < WIDEST_OFFSET
    large = [p for p in asked if p.tokens > 256]
    assert all(p.tokens * p.top_k * p.intermediate_size > WIDEST_OFFSET for p in large)


def test_rows_of_copies_on_a_gpu_exceed_32_bits():
    asked = [row.case.problem for row in rows(family, on_cpu=False) if row.case.scenario == "memory.copies"]
    sizes = {name: 0 for name in ("x", "h", "slots")}
    for p in asked:
        pairs = p.tokens * p.top_k
        mine = {"x": p.tokens * p.hidden_size, "h": pairs * p.w13_rows, "slots": pairs * p.hidden_size}
        sizes = {name: max(size, mine[name]) for name, size in sizes.items()}
    assert all(size > 2**31 for size in sizes.values()), sizes


def test_a_batch_too_large_for_the_device_is_unsupported(monkeypatch):
    monkeypatch.setattr(Device, "memory_bytes", lambda self: 2**30)
    found = verdict(Emulated(), "t1048640-h2048-i64-e8-k1-bf16-exact-memory.copies")
    assert found.status == "unsupported" and found.reason.startswith("memory: needs about")
