"""Relations: each sees a fault that shows in nothing else, and correct variants keep all of them."""

from dataclasses import replace

import pytest
import torch

from harness.backend import BackendError
from harness.device import Device
from harness.inputs.draw import draw
from harness.inputs.reshape import reshaped, with_experts
from harness.problem.case import Case
from harness.run.case import run_case
from harness.scenarios.metamorphic import tokens_of
from harness.scenarios.registry import SCENARIOS
from harness.scenarios.relations import shuffled
from reference.quant import dequantize_weight
from tests.support.emulated import CONTROLS, Emulated

CPU = Device("cpu")
PLAIN = "t6-h64-i32-e4-k2-bf16"
EXACT = f"{PLAIN}-exact"


class Wrong(Emulated):
    """A correct layer behind spoil(compute, layer, x, weights, ids, seen); `seen` is kept from call to call."""

    def __init__(self, spoil):
        super().__init__("wrong")
        self.spoil, self.seen = spoil, {}

    def run(self, layer, hidden_states, topk_weights, topk_ids, out=None):
        result = self.spoil(super().run, layer, hidden_states, topk_weights, topk_ids, self.seen)
        return result if out is None else out.copy_(result)


FAULTS = {}


def fault(relation, problem=EXACT):
    def register(spoil):
        FAULTS[relation] = (problem, spoil)
        return spoil

    return register


@fault("token_order")
def remembered_by_checksum(compute, layer, x, w, ids, seen):
    return seen.setdefault(float(x.double().sum()), compute(layer, x, w, ids))


@fault("batch_parts")
def one_token_is_special(compute, layer, x, w, ids, seen):
    return compute(layer, x, w, ids) * (2 if len(x) == 1 else 1)


@fault("repeated_tokens")
def equal_rows_served_once(compute, layer, x, w, ids, seen):
    again = (x[:, None] == x[None]).all(2).tril(-1).any(1)
    return compute(layer, x, w, ids).masked_fill(again[:, None], 0.0)


@fault("nan_rows", "t9-h64-i32-e4-k2-bf16-invalid-exact")
def unserved_rows_times_zero(compute, layer, x, w, ids, seen):
    return compute(layer, x, w, ids) + 0 * x.sum()


@fault("doubled_weights")
def weights_cut_at_one(compute, layer, x, w, ids, seen):
    return compute(layer, x, w.clamp(max=1), ids)


@fault("weight_parts")
def renormalised_around_zeros(compute, layer, x, w, ids, seen):
    return compute(layer, x, torch.where((w == 0).any(1, True), w / w.sum(1, True), w), ids)


@fault("zero_weight")
def minus_one_is_the_last_expert(compute, layer, x, w, ids, seen):
    return compute(layer, x, w, ids % layer.problem.num_experts)


@fault("slot_order", "t4-h64-i32-e8-k2-bf16-balanced-exact")
def ids_must_ascend(compute, layer, x, w, ids, seen):
    return compute(layer, x, w, torch.where(ids < ids[:, :1], -1, ids))


def stale(name):
    """The first layer's tensor, for whatever layer comes after it."""

    def spoil(compute, layer, x, w, ids, seen):
        kept = seen.setdefault(name, getattr(layer, name))
        return compute(replace(layer, **{name: kept}), x, w, ids)

    return spoil


fault("expert_order")(stale("w13"))
fault("hidden_order")(stale("w13"))
fault("intermediate_order")(stale("w2"))


def dense(compute, layer, x, w, ids, seen):
    """Every expert takes part, most of them with weight zero."""
    return compute(layer, x, w, ids) + 0 * layer.w2.float().sum()


fault("unused_expert")(dense)
fault("unused_nan", "t2-h64-i32-e8-k2-bf16-exact")(dense)


@fault("expert_copies")
def ids_counted_round(compute, layer, x, w, ids, seen):
    return compute(layer, x, w, ids % 4)


@fault("ranks")
def one_map_for_all(compute, layer, x, w, ids, seen):
    if layer.expert_map is None:
        return compute(layer, x, w, ids)
    return compute(replace(layer, expert_map=seen.setdefault("map", layer.expert_map)), x, w, ids)


@fault("wider_hidden")
def whole_tiles_written(compute, layer, x, w, ids, seen):
    out = compute(layer, x, w, ids)
    out[:, out.shape[1] // 32 * 32 :] = float("nan")
    return out


@fault("wider_intermediate")
def up_begins_at_whole_tiles(compute, layer, x, w, ids, seen):
    tail = layer.problem.intermediate_size % 32
    return compute(replace(layer, w13=layer.w13.roll(tail, 1)), x, w, ids)


@fault("layout", "t6-h32-i32-e4-k2-bf16-exact")
def w2_not_transposed(compute, layer, x, w, ids, seen):
    return compute(replace(layer, w2=layer.w2.mT) if layer.problem.layout == "kn" else layer, x, w, ids)


@fault("representation")
def rows_taken_for_dense(compute, layer, x, w, ids, seen):
    return compute(layer, x.as_strided(x.shape, (x.shape[1], 1)), w, ids)


class Invariant(Emulated):
    """Every row by itself: whatever the batch, the same instructions."""

    batch_invariant = True

    def linear(self, x, w):
        return torch.stack([(w * row).sum(1) for row in x]) if len(x) else x.new_zeros(0, len(w))


class AloneByOneBit(Invariant):
    def run(self, layer, x, w, ids, out=None):
        result = super().run(layer, x, w, ids, out=out)
        return result if len(x) > 1 else result.copy_((result.view(torch.int16) ^ 1).view(x.dtype))


def verdict(text, relation, backend):
    scenario = f"-{relation}" if "." in relation else f"-relation.{relation}" if relation else ""
    return run_case(Case.parse(text + scenario), backend, CPU)


def relations():
    verdict(EXACT, "", Emulated())  # registers them
    return {n.partition(".")[2] for n in SCENARIOS if n.startswith("relation.")} - {"batch_invariant"}


def test_every_relation_has_a_fault_that_it_sees():
    assert relations() == set(FAULTS)


@pytest.mark.parametrize("relation", FAULTS)
def test_a_relation_sees_what_the_case_alone_does_not(relation):
    problem, spoil = FAULTS[relation]
    assert verdict(problem, "", Wrong(spoil)).status == "passed"
    found = verdict(problem, relation, Wrong(spoil))
    assert found.status == "failed", (found.status, found.reason)
    assert found.report and not found.reason.startswith("the first question")


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "t5-h72-i24-e6-k3-fp32-bias",
        "t5-h136-i72-e4-k2-bf16-e4m3.block.group-kn-bias",
        "t5-h64-i40-e6-k2-fp16-e5m2.channel.token-swigluoai-limit128-bias",
        "t5-h64-i40-e4-k1-bf16-e4m3.tensor.tensor-win",
        "t9-h64-i32-e8-k2-bf16-ep2.1s-invalid-padded",
        "t3-h64-i32-e16-k2-bf16-relu2-ids64",
        "t5-h64-i32-e4-k2-bf16-shared1",
    ],
)
def test_correct_variants_keep_every_relation_bit_for_bit(text):
    for n, relation in enumerate(sorted(relations())):
        for control in CONTROLS[n % 5 :: 5]:  # each of them meets four relations at least
            found = verdict(f"{text}-exact", relation, control)
            assert found.status in ("passed", "unsupported"), f"{control.name} {found.case}: {found.reason}"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "bf16-e4m3.block.group", "bf16-e4m3.channel.token-kn"])
def test_correct_variants_keep_every_relation_on_the_random_fill(dtype):
    for n, relation in enumerate(sorted(relations())):
        for control in CONTROLS[n % 10 :: 10]:
            found = verdict(f"t7-h128-i128-e8-k2-{dtype}-ep2.0-invalid-random", relation, control)
            assert found.status in ("passed", "unsupported"), f"{control.name} {found.case}: {found.reason}"


@pytest.mark.parametrize("seed", range(8))
def test_repeated_rows_are_no_evidence(seed):
    """The statistics of the oracle take rows to be independent: rows that stand there twice must not count twice."""
    assert verdict(f"{PLAIN}-random-s{seed}", "repeated_tokens", CONTROLS[9]).status == "passed"


def test_what_rounds_differently_for_a_doubled_weight_is_seen():
    """Far below what the oracle can see on a random fill: only the relation is exact there."""

    def uneven(compute, layer, x, w, ids, seen):
        return compute(layer, x, torch.where(w > 1, w * (1 + 2.0**-11), w), ids)

    found = verdict("t6-h128-i64-e4-k2-bf16-random", "doubled_weights", Wrong(uneven))
    assert found.status == "failed" and "not what the first answer implies" in found.reason


def test_a_bit_of_an_unused_expert_is_seen():
    def one_bit(compute, layer, x, w, ids, seen):
        out = compute(layer, x, w, ids)
        if layer.w2.isnan().any():
            out[0, 0] = (out.view(torch.int16)[0, 0] ^ 1).view(out.dtype)
        return out

    found = verdict("t2-h128-i64-e8-k2-bf16-random", "unused_nan", Wrong(one_bit))
    assert found.status == "failed" and "not what the first answer implies" in found.reason


def test_who_is_not_deterministic_owes_bits_on_the_exact_fill_alone():
    def noisy(compute, layer, x, w, ids, seen):
        seen["calls"] = seen.get("calls", 0) + 1
        return compute(layer, x, w * (1 + 2.0**-11 * (seen["calls"] % 2)), ids)

    backend = Wrong(noisy)
    backend.deterministic = False
    assert verdict("t6-h128-i64-e4-k2-bf16-random", "doubled_weights", backend).status == "passed"


def test_who_multiplies_by_zero_says_so():
    backend = Wrong(dense)
    backend.nan_safe = False
    found = verdict(EXACT, "unused_expert", backend)
    assert found.status == "unsupported" and "declares that NaN in unused rows" in found.reason


# -- batches and configurations ---------------------------------------------------------------------------------------


def test_batch_invariance_is_asked_of_who_declares_it():
    text = "t5-h64-i48-e4-k2-bf16-random"
    assert verdict(text, "batch_invariant", Emulated()).status == "unsupported"
    assert verdict(text, "batch_invariant", Invariant()).status == "passed"
    found = verdict(text, "batch_invariant", AloneByOneBit())
    assert found.status == "failed" and "the first token alone" in found.reason
    tensor = verdict("t5-h64-i48-e4-k2-bf16-e4m3.tensor.tensor-random", "batch_invariant", Invariant())
    assert tensor.status == "unsupported"


@pytest.mark.parametrize("relation", ["token_order", "batch_parts", "repeated_tokens", "zero_weight"])
def test_who_is_batch_invariant_owes_bits_on_the_random_fill(relation):
    class Late(Invariant):
        """From the second call on one bit differs, which no oracle can see on a random fill."""

        def prepare(self, problem, layer):
            call, calls = super().prepare(problem, layer), []

            def counted(x, w, ids, out=None):
                result = call(x, w, ids, out=out)
                calls.append(1)
                late = len(calls) > 1 or problem.routing == "invalid"
                result[0, 0] = (result.view(torch.int16)[0, 0] ^ int(late)).view(x.dtype)
                return result

            return counted

    text = "t5-h64-i48-e4-k2-bf16-random"
    assert verdict(text, relation, Invariant()).status == "passed"
    found = verdict(text, relation, Late())
    assert found.status == "failed" and "not what the first answer implies" in found.reason


class Configured(Emulated):
    """Right in one configuration and as `wrong` says in the other."""

    batch_invariant = "configured"

    def __init__(self, wrong):
        super().__init__("configured")
        self.wrong = wrong

    def configurations(self, problem):
        return {"right": {}, "wrong": {"config": self.wrong}}

    def prepare(self, problem, layer, config=None):
        return (config or Invariant()).prepare(problem, layer)


def test_every_configuration_is_asked():
    assert verdict(EXACT, "config.all", Configured(Invariant())).status == "passed"
    found = verdict(EXACT, "config.all", Configured(Wrong(one_token_twice)))
    assert found.status == "failed" and "configuration wrong" in found.reason
    assert verdict(EXACT, "config.all", Emulated()).status == "unsupported"
    found = verdict("t5-h64-i48-e4-k2-bf16-random", "batch_invariant", Configured(AloneByOneBit()))
    assert found.status == "failed" and "configuration wrong" in found.reason


def one_token_twice(compute, layer, x, w, ids, seen):
    return compute(layer, x[:1].expand_as(x), w, ids)


def test_a_strange_declaration_is_named():
    backend = Invariant()
    backend.batch_invariant = "sometimes"
    with pytest.raises(BackendError, match="Invariant: batch_invariant='sometimes'; valid: True, False, 'configured'"):
        verdict(EXACT, "batch_invariant", backend)


@pytest.mark.parametrize("text", ["bf16", "fp32", "fp16-e4m3.block.none", "bf16-e4m3.tensor.token"])
def test_our_kernels_offer_every_tile_that_a_batch_may_get(text):
    import kernels.triton.backend as triton
    from kernels.layer import DTYPES, FP8
    from kernels.triton.gemm import default_config, low_latency_config

    problem = Case.parse(f"t5-h64-i32-e8-k2-{text}").problem
    quant = problem.quant
    dtype = FP8["e4m3"] if quant and quant.activation else DTYPES[problem.dtype]
    offered = [o["config"] for o in triton.TritonMoE().configurations(problem).values()]
    assert len(set(offered)) == len(offered)
    assert low_latency_config(dtype) in offered
    for pairs in range(1, 2000, 7):
        assert default_config(pairs, 8, dtype, quant is not None) in offered
    assert {c.block_m for c in offered} >= {16, 32, 64}
    assert all(quant is None or 128 % c.block_k == 0 for c in offered)


# -- the same layer, reshaped -----------------------------------------------------------------------------------------


def values(layer):
    """w13 and w2 as real numbers."""
    quant = layer.problem.quant
    pairs = ((layer.w13, layer.w13_scale), (layer.w2, layer.w2_scale))
    if quant is None:
        return [w.double() for w, _ in pairs]
    return [torch.stack([dequantize_weight(w[e], s[e], quant.weights) for e in range(len(w))]) for w, s in pairs]


@pytest.mark.parametrize("quant", ["", "-e4m3.tensor.none", "-e5m2.channel.token", "-e4m3.block.group"])
@pytest.mark.parametrize("fill", ["exact", "random"])
def test_reshaping_keeps_every_value(quant, fill):
    layer = draw(Case.parse(f"t2-h200-i136-e3-k2-bf16{quant}-bias-{fill}")).layer
    hidden, inter = torch.arange(200), torch.arange(136)
    same = reshaped(layer, hidden, inter, inter)
    for name, tensor in layer.tensors().items():
        assert torch.equal(tensor.view(torch.uint8), getattr(same, name).view(torch.uint8)), name
    wider = reshaped(layer, torch.cat([hidden, torch.full((56,), -1)]), inter, inter)
    for before, after in zip(values(layer), values(wider)):
        assert torch.equal(after[:, : before.shape[1], : before.shape[2]], before)
    assert not values(wider)[0][:, :, 200:].any() and not values(wider)[1][:, 200:].any()
    if fill == "exact":
        order = inter.flip(0)  # across blocks
        turned = values(reshaped(layer, hidden, order, order))
        w13, w2 = values(layer)
        assert torch.equal(turned[0], torch.cat([w13[:, :136].flip(1), w13[:, 136:].flip(1)], 1))
        assert torch.equal(turned[1], w2.flip(2))


def test_experts_move_with_all_that_is_theirs():
    layer = draw(Case.parse("t2-h64-i32-e3-k2-bf16-e4m3.channel.token-bias-shared1")).layer
    moved = with_experts(layer, torch.tensor([2, -1, 0]))
    for name in ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias"):
        old, new = getattr(layer, name).float(), getattr(moved, name).float()
        assert torch.equal(new[0], old[2]) and torch.equal(new[2], old[0]) and torch.equal(new[3], old[3]), name
        assert new[1].isnan().all(), name


def test_shuffled_moves_something():
    for n in range(2, 40):
        order = shuffled(n, torch.device("cpu"))
        assert sorted(order.tolist()) == list(range(n)) and not torch.equal(order, torch.arange(n))


def test_padded_rows_stay_padded():
    inputs = draw(Case.parse("t4-h64-i32-e3-k2-bf16-padded"))
    assert tokens_of(inputs, torch.tensor([3, 0])).hidden_states.stride(0) == 128
