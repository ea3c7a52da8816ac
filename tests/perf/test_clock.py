"""perf/timing/clock.py, roofline.py and benchmark.py: what is timed, the floor of a time, and what is refused.

No test depends on a duration.
"""

import json

import pytest
import torch

from harness import backend
from harness import device as devices
from harness.device import Device
from harness.perf.timing.clock import Clock, NotTimed, Stopwatch, rotations
from harness.perf.timing.compile_time import compiling
from harness.perf.timing.roofline import Ceilings, Work, ceilings, mean, operand, work
from harness.problem.case import Case
from harness.results.reader import read_results
from harness.session.session import Session

pytest_plugins = ["pytester"]
CPU = Device("cpu")


def case(text):
    return Case.parse(text)


class Counting:
    """A backend that notes the arguments of its calls."""

    name, devices = "counting", {"cpu"}

    def __init__(self):
        self.calls = []

    def prepare(self, problem, layer):
        def call(hidden_states, topk_weights, topk_ids):
            self.calls.append((hidden_states, topk_ids))
            return hidden_states.clone()

        return call


# -- what is timed ----------------------------------------------------------------------------------------------------
def test_samples_are_microseconds_a_call_and_inputs_take_turns():
    mine = Counting()
    stopwatch = Stopwatch(case("t5-h64-i64-e8-k2-bf16-random"), mine, CPU)
    samples = stopwatch.sample("device_us", 3)
    assert len(samples) == 3 and all(s > 0 for s in samples)
    first, last = mine.calls[0], mine.calls[-1]
    assert len({ids.data_ptr() for _, ids in mine.calls}) == len(stopwatch.sets) == 4
    assert sorted(map(tuple, first[0].tolist())) == sorted(map(tuple, last[0].tolist()))  # the same rows


def test_a_rotation_shifts_experts_that_are_alike_and_leaves_others():
    def turned(text):
        return rotations(Session(case(text), Counting(), CPU).draw())

    first, second, *_ = turned("t5-h64-i64-e8-k2-bf16-random")
    assert torch.equal((first.topk_ids + 2) % 8, second.topk_ids)
    assert torch.equal(first.hidden_states.roll(1, 0), second.hidden_states)
    for text in ("t5-h64-i64-e8-k2-bf16-invalid-random", "t5-h64-i64-e8-k2-bf16-ep2.1-random"):
        first, second, *_ = turned(text)
        assert torch.equal(first.topk_ids, second.topk_ids)
    _, padded, *_ = turned("t5-h64-i64-e8-k2-bf16-padded-random")
    assert padded.hidden_states.stride() == (128, 1)


def test_a_case_that_cannot_be_timed_gives_the_reason():
    refused = {
        "t5-h64-i64-e8-k2-bf16-exact-repeat.bits": "scenario: repeat.bits is several calls",
        "t0-h64-i64-e8-k2-bf16-exact": "shape: no tokens",
    }
    for text, why in refused.items():
        with pytest.raises(NotTimed, match=why):
            Stopwatch(case(text), Counting(), CPU)
    interpreted = Counting()
    interpreted.interpreted = True
    with pytest.raises(NotTimed, match="device: counting is interpreted on cpu"):
        Stopwatch(case("t5-h64-i64-e8-k2-bf16-random"), interpreted, CPU)
    clock = Clock([lambda: torch.zeros(1)], CPU)
    with pytest.raises(NotTimed, match="device_us says it all"):
        clock.sample("host_us", 1)
    with pytest.raises(ValueError, match="metric=launches: one of device_us, host_us"):
        clock.sample("launches", 1)


@pytest.mark.cuda
@pytest.mark.skipif("cuda" not in devices.present(), reason="no CUDA device here")
def test_on_a_gpu_a_graph_is_replayed_and_its_memory_stays_its_own():
    class Waits(Counting):
        """Cannot be captured: it asks the device for a number."""

        def prepare(self, problem, layer):
            return lambda hidden_states, topk_weights, topk_ids: hidden_states * float(topk_weights.sum().item() > 0)

    gpu = Device("cuda")
    timed = case("t5-h64-i64-e8-k2-bf16-random")
    captured, spaced = (Stopwatch(timed, backend, gpu) for backend in (Counting(), Waits()))
    assert (captured.method, spaced.method) == ("graph", "events")
    torch.cuda.empty_cache()  # memory that a graph still reads must not be freed here, nor allocated below
    taken = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(200)]
    for metric in ("device_us", "host_us"):
        assert all(s > 0 for one in (captured, spaced) for s in one.sample(metric, 2))
    assert len(taken) == 200


# -- what it is compared with -----------------------------------------------------------------------------------------
def test_work_counts_the_experts_that_are_met_and_the_pairs_that_are_served():
    problem = case("t3-h64-i32-e8-k2-bf16-random").problem
    ids = torch.tensor([[0, 1], [1, 0], [1, -1]], dtype=torch.int32)
    an_expert = 3 * 64 * 32
    assert work(problem, ids) == Work(
        bytes=2 * an_expert * 2 + 2 * 3 * 64 * 2 + 6 * (4 + 4),  # two experts in bf16, rows in and out, weights and ids
        flops=2 * 5 * an_expert,
    )
    elsewhere = torch.tensor([0, -1, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    assert work(problem, ids, elsewhere).flops == 2 * 2 * an_expert


def test_work_counts_scales_biases_and_shared_experts():
    ids = torch.tensor([[0]], dtype=torch.int64)

    def of(text, io=2):
        return work(case(text).problem, ids).bytes - 2 * 256 * io - (4 + 8)

    assert of("t1-h256-i128-e4-k1-bf16-e4m3.block.group-random") == 3 * 256 * 128 + 4 * (2 * 2 + 2 * 1)
    assert of("t1-h256-i128-e4-k1-bf16-e4m3.channel.token-random") == 3 * 256 * 128 + 4 * (256 + 256)
    assert of("t1-h256-i128-e4-k1-fp32-bias-random", io=4) == 4 * (3 * 256 * 128 + 256 + 256)
    assert of("t1-h256-i128-e4-k1-bf16-relu2-random") == 2 * 2 * 256 * 128
    assert of("t1-h256-i128-e4-k1-bf16-shared1-random") == 2 * (2 * 3 * 256 * 128)


def test_the_floor_is_the_larger_of_bytes_and_flops():
    roof = Ceilings(copy_bytes_per_s=1e12, flops_per_s={"bf16": 1e14, "fp8": 2e14})
    wide, fp8 = (case(f"t1-h64-i64-e4-k1-bf16{q}-random").problem for q in ("", "-e4m3.block.group"))
    weight_only = case("t1-h64-i64-e4-k1-bf16-e4m3.block.none-random").problem
    assert [operand(p) for p in (wide, fp8, weight_only)] == ["bf16", "fp8", "bf16"]
    assert roof.floor_us(wide, Work(10**6, 10**6)) == 1.0
    assert (roof.floor_us(wide, Work(0, 10**9)), roof.floor_us(fp8, Work(0, 10**9))) == (10.0, 5.0)
    assert mean([Work(2, 4), Work(4, 8)]) == Work(3, 6)


def test_ceilings_are_measured():
    found = ceilings(CPU, "bf16")
    assert found.copy_bytes_per_s > 1e8 and found.flops_per_s["bf16"] > 1e8 and set(found.flops_per_s) == {"bf16"}


def test_compile_time_comes_from_triton_and_cached_kernels_add_none():
    from types import SimpleNamespace

    import triton

    heard = []
    knobs = triton.knobs.compilation
    before = knobs.listener
    knobs.listener = lambda **words: heard.append(words["cache_hit"])
    try:
        with compiling() as compiled:
            for hit in (False, True, False):
                triton.knobs.compilation.listener(
                    src=None, metadata={}, metadata_group={}, times=SimpleNamespace(total=250_000), cache_hit=hit
                )
        assert (compiled.seconds, compiled.kernels, compiled.cached) == (0.5, 2, 1) and heard == [False, True, False]
        assert knobs.listener is not None and len(heard) == 3
    finally:
        knobs.listener = before


# -- pytest -m perf ---------------------------------------------------------------------------------------------------
CONFTEST = """
import harness.run.case
import pytest
from harness.results.verdict import Verdict
pytest_plugins = ["harness.plugin"]

@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    def run(case, backend, device, family="", spec=""):
        return Verdict(str(case), backend.name, str(device), "failed" if case.problem.tokens == 2 else "passed", family)
    monkeypatch.setattr("harness.perf.timing.benchmark.run_case", run)
"""
PERF = """
import pytest
from harness.perf.timing.benchmark import device_clock
FAMILY = "perf"
ROWS = {"t1-h64-i64-e4-k2-bf16-random": "", "t2-h64-i64-e4-k2-bf16-random": "wrong",
        "t3-h64-i64-e4-k2-bf16-exact-repeat.bits": "several calls"}
@pytest.mark.benchmark(timer=device_clock)
def test_perf(check, benchmark):
    check(benchmark)
"""


@pytest.fixture
def run(pytester, monkeypatch):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_perf=PERF)
    pytester.makeini("[pytest]\naddopts = --strict-markers")
    monkeypatch.setattr(backend, "_installed", [])
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):  # this run's own workers are not that run's
        monkeypatch.delenv(name, raising=False)
    return lambda *options: pytester.runpytest("--backend=tests.perf.test_clock:Clone", *options)


class Clone(Counting):
    name = "clone"


def test_a_time_is_reported_for_what_is_right_and_only_there(run, tmp_path):
    found, file = tmp_path / "b.json", tmp_path / "r.jsonl"
    result = run("-m", "cpu and perf", f"--benchmark-json={found}", f"--results={file}")
    result.assert_outcomes(passed=1, failed=1, skipped=1)
    (only,) = json.loads(found.read_text())["benchmarks"]
    right, wrong, not_timed = read_results(file).records
    assert wrong["perf"] == not_timed["perf"] == {}
    assert (not_timed["status"], not_timed["reason"]) == (
        "unsupported",
        "scenario: repeat.bits is several calls; one is timed",
    )
    perf = right["perf"]
    # What pytest-benchmark calls its statistics are those of the device's clock, in seconds.
    assert only["stats"]["median"] * 1e6 == pytest.approx(perf["device_us"], rel=1e-3)
    assert only["stats"]["rounds"] == len(perf["samples_us"]) == 20
    assert only["group"] == only["extra_info"]["case"] == right["case"] and only["extra_info"]["backend"] == "clone"
    assert perf["flops_per_s"] == pytest.approx(perf["flops"] / perf["device_us"] * 1e6)
    assert json.loads(found.read_text())["machine_info"]["cpu"]["torch"] == torch.__version__


def test_nothing_is_timed_unless_perf_is_named(run):
    for options in ([], ["-m", "cpu"], ["-m", "cpu and not perf"]):
        result = run(*options)
        result.assert_outcomes()
        assert "deselected" in result.stdout.str()


def test_timing_is_refused_in_parallel(run):
    result = run("-m", "perf", "-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*-m 'perf' with -n: processes on one device would time each other"])
