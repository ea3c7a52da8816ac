"""kernels/cached.py when threads race: the first build is one, and a call sees one version of the weights."""

import threading
from types import SimpleNamespace

import pytest
import torch

from kernels.cached import CachedFusedMoE
from tests.support.small_layer import (
    Launch,
    answer,
    apply,
    make_call,
    make_layer,
    make_problem,
    new_parameters,
    rebind_data,
    tensors,
)


def test_sixteen_threads_race_the_first_apply():
    class SlowProblem(SimpleNamespace):
        def __getattribute__(self, name):
            if name == "num_experts":
                threading.Event().wait(0.001)  # hands the interpreter to the other threads in the middle of a build
            return super().__getattribute__(name)

    layer = make_layer(problem=SlowProblem(**vars(make_problem())))
    instance, start = CachedFusedMoE(layer, Launch()), threading.Barrier(16)
    calls, got = [make_call(tokens) for tokens in range(1, 17)], [None] * 16

    def work(i):
        start.wait()
        got[i] = apply(instance, calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert instance.builds == 1
    layer.problem = make_problem()
    assert all(torch.equal(g, answer(layer, c)) for g, c in zip(got, calls))


@pytest.mark.parametrize("change", [rebind_data, new_parameters])
def test_a_swap_in_the_middle_of_a_call_does_not_reach_it(change):
    layer, launch, call = make_layer(), Launch(), make_call()
    instance, before = CachedFusedMoE(layer, launch), answer(layer, call)
    # Both tensors change between the two products.
    launch.between = lambda: (change(layer), setattr(layer.w2, "data", tensors(9)[1]))
    assert torch.equal(apply(instance, call), before)
    launch.between = lambda: None
    assert torch.equal(apply(instance, call), answer(layer, call))


def test_calls_during_swaps_see_one_version_or_the_other():
    versions = [make_layer(seed) for seed in (1, 2)]
    call = make_call(2)
    right = [answer(v, call) for v in versions]
    layer = make_layer(1)
    instance, stop = CachedFusedMoE(layer, Launch()), threading.Event()

    def swap():
        n = 0
        while not stop.is_set():
            n += 1
            with instance.swap():
                layer.w13 = versions[n % 2].w13
                stop.wait(0.0005)  # the writer is stopped half way
                layer.w2 = versions[n % 2].w2
            stop.wait(0.0005)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = [apply(instance, call) for _ in range(150)]
    finally:
        stop.set()
        thread.join()
    which = [tuple(torch.equal(out, r) for r in right) for out in seen]
    assert set(which) == {(True, False), (False, True)}, "a call mixed both, or one of them never ran"


def test_a_layer_that_changes_while_it_is_read_is_read_again():
    class Swapping(SimpleNamespace):
        armed = False

        def __getattribute__(self, name):
            if name == "w2" and type(self).armed:  # w13 has been read, w2 has not: another thread replaces both
                type(self).armed = False
                self.w13, self.w2 = tensors(9)
            return super().__getattribute__(name)

    layer, call = Swapping(**vars(make_layer())), make_call()
    instance = CachedFusedMoE(layer, Launch())
    apply(instance, call)
    Swapping.armed = True
    assert torch.equal(apply(instance, call), answer(layer, call))
