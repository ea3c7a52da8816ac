"""Differences between two records of counts, as sentences: complete, and the most significant first."""

import copy

import pytest

from harness.perf.count.differences import differences
from harness.perf.count.structure import CallCounts
from harness.perf.metrics import STRUCTURE
from harness.trace.launches import Launch

POINTER = {"tensor": "bfloat16", "aligned": True, "small": True}
NUMBERS = dict(registers=64, spills=0, shared_bytes=8, tensor_core={"wgmma": 8}, load_bytes=16, loads={"16": 4},
               code_bytes=100)  # fmt: skip


def launch(name="_gemm", **changes):
    arguments = {"x": POINTER, "stride": 16, "BLOCK_N": 128} | changes
    return Launch(name, (4,), f"kernels:{name}", arguments, {"num_warps": 4}, ("BLOCK_N",)).spec()


OLD = CallCounts(
    metrics=dict.fromkeys(STRUCTURE, 2) | {"allocated_bytes": 4096},
    kernels=["_gemm[4]", "_combine[1]"],
    operators={"empty": 2},
    functions={"kernels.f": 1, "kernels.g": 2},
    allocations=["empty bf16 (4, 8)", "empty fp32 (1,)"],
    launches=[launch(), launch("_combine")],
    compiled={"_gemm BLOCK_N=128 (*bf16)": {"sm_80": NUMBERS, "sm_90": NUMBERS}},
).record()


def changed(**changes):
    return differences(OLD, {**copy.deepcopy(OLD), **changes})


def test_nothing_differs():
    assert changed() == []


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(kernels=["_align[2]", "_align[1]", "_gemm[4]", "_combine[1]"]),
         "_align is launched, and was not before (2 times)"),
        (dict(kernels=["_gemm[4]"]), "_combine is launched no longer"),
        (dict(kernels=["_gemm[4]", "_gemm[4]", "_combine[1]"]), "_gemm is launched 2 times, not 1"),
        (dict(kernels=["_gemm[8,2]", "_combine[1]"]), "_gemm: grid [4] -> [8,2]"),
        (dict(kernels=["_combine[1]", "_gemm[4]"]), "kernels are launched in another order: _combine[1], _gemm[4]"),
        (dict(launches=[launch(BLOCK_N=64, stride=1), launch("_combine")]), "_gemm: BLOCK_N 128 -> 64, stride 16 -> 1"),
        (dict(launches=[launch(x={**POINTER, "aligned": False}), launch("_combine")]), "_gemm: x *bf16 -> *bf16?"),
        (dict(launches=[launch(GROUP=1), launch("_combine")]), "_gemm: GROUP nothing -> 1"),
        (dict(waits={"nonzero": 1}), "1 more wait for the device: nonzero (+1)"),
        (dict(copies={"to the host: item": 2}), "2 more copies between host and device: to the host: item (+2)"),
        (dict(operators={"empty": 1}), "1 fewer operator is dispatched: empty (-1)"),
        (dict(operators={"clone": 1, "empty": 1}), "other operators are dispatched: clone (+1), empty (-1)"),
        (dict(functions={"kernels.f": 4, "kernels.g": 2}), "3 more Python functions are called: kernels.f (+3)"),
        (dict(metrics=OLD["metrics"] | {"programs": 3}), "program instances of all grids: 2 -> 3"),
    ],
)  # fmt: skip
def test_one_sentence_a_difference(changes, sentence):
    assert changed(**changes) == [sentence]


def test_allocations_come_with_their_bytes():
    metrics = OLD["metrics"] | {"allocated_bytes": 4096 + 128}
    assert changed(allocations=[*OLD["allocations"], "clone bf16 (4, 8)", "empty fp32 (1,)"], metrics=metrics) == [
        "2 more tensors are allocated (+128 bytes): empty fp32 (1,) (+1), clone bf16 (4, 8) (+1)"
    ]


def test_many_names_are_cut():
    (sentence,) = changed(operators=dict.fromkeys("abcdefgh", 1) | {"empty": 2})
    assert sentence.startswith("8 more operators are dispatched: a (+1)") and sentence.endswith("and 2 others")


def compiled(**targets):
    return changed(compiled={"_gemm BLOCK_N=128 (*bf16)": {"sm_80": NUMBERS, "sm_90": NUMBERS} | targets})


def test_machine_code():
    worse = {**NUMBERS, "spills": 8, "tensor_core": {"mma.sync": 8}}
    assert compiled(sm_80=worse, sm_90=worse) == [
        "compiled, _gemm BLOCK_N=128: spills 0 -> 8 (sm_80, sm_90); tensor_core wgmma:8 -> mma.sync:8 (sm_80, sm_90)"
    ]
    assert compiled(sm_90={"error": "no"}) == ["compiled, _gemm BLOCK_N=128: does not compile any more: no (sm_90)"]
    assert compiled(sm_90={**NUMBERS, "code_bytes": 90}) == [
        "compiled, 1 kernel has code of another size: -10 to -10 bytes"
    ]


def test_a_kernel_whose_configuration_changed_is_still_compared():
    new = {"_gemm BLOCK_N=64 (*bf16)": {"sm_90": {**NUMBERS, "registers": 32}}}
    assert changed(compiled=new) == ["compiled, _gemm BLOCK_N=64: registers 64 -> 32 (sm_90)"]


def test_a_key_that_one_record_lacks_is_not_compared():
    less = {key: OLD[key] for key in ("kernels", "metrics")}
    assert differences(less, {**OLD, "operators": {"clone": 9}}) == []


def test_the_most_significant_comes_first():
    worse = {**NUMBERS, "spills": 8}
    sentences = changed(
        functions={}, operators={}, waits={"item": 1}, kernels=["_align[1]", *OLD["kernels"]],
        compiled={"_gemm BLOCK_N=128 (*bf16)": {"sm_90": worse}}, launches=[launch(BLOCK_N=64), launch("_combine")],
    )  # fmt: skip
    starts = ["_align is launched", "_gemm: BLOCK_N", "1 more wait", "2 fewer operators", "3 fewer Python", "compiled"]
    assert [any(s.startswith(start) for start in starts[n : n + 1]) for n, s in enumerate(sentences)] == [True] * 6
