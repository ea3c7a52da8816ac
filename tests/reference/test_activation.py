"""reference.activation against torch, Python's math module and 50-digit arithmetic, and at extreme points."""

import decimal
import math

import pytest
import torch

from reference.activation import ACTIVATIONS, GATED, activate, combine_gate_up, is_gated, split_gate_up


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def gate_only(name, g):
    """Return act(g): u is 1, or 0 for swigluoai, which adds 1 to u."""
    return combine_gate_up(g, torch.zeros_like(g) if name == "swigluoai" else torch.ones_like(g), name, limit=math.inf)


GRID = torch.cat([torch.linspace(-12, 12, 4001, dtype=torch.float64), f64(-40, -25, 25, 40, 1e-30, -1e-30)])


def test_gates_against_torch():
    functional = torch.nn.functional
    for name, expected in {
        "silu": functional.silu(GRID),
        "gelu": functional.gelu(GRID),
        "gelu_tanh": functional.gelu(GRID, approximate="tanh"),
        "swigluoai": GRID * torch.sigmoid(1.702 * GRID),
    }.items():
        torch.testing.assert_close(gate_only(name, GRID), expected, rtol=1e-14, atol=1e-14)


def test_gates_keep_their_relative_precision_at_negative_arguments():
    # 1 + erf(g) and 1 + tanh(g) cancel at negative g. The expected values have 50 digits.
    decimal.getcontext().prec = 50
    for g in (-3.0, -6.5, -10.0, -20.0):
        exact = decimal.Decimal(g) / (1 + decimal.Decimal(-g).exp())
        assert gate_only("silu", f64(g)).item() == pytest.approx(float(exact), rel=1e-14, abs=0)
        # gelu(g) = g/2 erfc(-g/sqrt 2), and Python's erfc keeps its relative precision.
        assert gate_only("gelu", f64(g)).item() == pytest.approx(g / 2 * math.erfc(-g / math.sqrt(2)), rel=1e-13, abs=0)
        z = (decimal.Decimal(2) / decimal.Decimal(math.pi)).sqrt() * (
            decimal.Decimal(g) + decimal.Decimal("0.044715") * decimal.Decimal(g) ** 3
        )
        exact = decimal.Decimal(g) / (1 + (-2 * z).exp())
        if exact > decimal.Decimal("-1e-300"):
            assert abs(gate_only("gelu_tanh", f64(g)).item()) < 1e-299
        else:
            assert gate_only("gelu_tanh", f64(g)).item() == pytest.approx(float(exact), rel=1e-12, abs=0)


@pytest.mark.parametrize("name", GATED)
def test_extreme_gates(name):
    g = f64(-1000, -1e308, 1000, math.inf, math.nan, 0.0)
    a = gate_only(name, g)
    assert torch.equal(a[[0, 1, 2, 3, 5]], f64(0, 0, 1000, math.inf, 0))
    assert torch.isnan(a[4])
    assert torch.isnan(gate_only(name, f64(-math.inf))).all()  # IEEE: -inf * 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_reaches_one_output_from_every_position(name):
    size = 6
    for position in range(size):
        h = torch.ones(2, size, dtype=torch.float64)
        h[1, position] = math.nan
        for limit in (None, 5.0) if name != "relu2" else (None,):
            a = activate(h, name, limit)
            assert torch.isnan(a).sum() == 1 and not torch.isnan(a[0]).any()
            expected = {"relu2": position, "swigluoai": position // 2}.get(name, position % 3)
            assert torch.isnan(a[1, expected])


def test_gate_and_up_are_split_by_layout():
    h = f64(1, 2, 3, 4, 5, 6)
    g, u = split_gate_up(h, "silu")
    assert torch.equal(g, f64(1, 2, 3)) and torch.equal(u, f64(4, 5, 6))
    g, u = split_gate_up(h, "swigluoai")
    assert torch.equal(g, f64(1, 3, 5)) and torch.equal(u, f64(2, 4, 6))
    assert split_gate_up(h, "relu2")[1] is None
    assert torch.equal(activate(f64(-2, 0, 3), "relu2"), f64(0, 0, 9))
    assert activate(torch.zeros(2, 3, 8, dtype=torch.float64), "gelu").shape == (2, 3, 4)


def test_limits_clamp_the_gate_from_above_and_up_on_both_sides():
    silu7 = 7 / (1 + math.exp(-7))
    torch.testing.assert_close(activate(f64(100, -100, 1, 1, 3, 100), "silu", 7.0)[:1], f64(silu7 * 1))
    torch.testing.assert_close(activate(f64(7, 100), "silu", 7.0), f64(silu7 * 7))
    torch.testing.assert_close(activate(f64(7, -100), "silu", 7.0), f64(silu7 * -7))
    torch.testing.assert_close(activate(f64(-30, 1), "silu", 7.0), f64(-30 / (1 + math.exp(30))))
    gate = 7 / (1 + math.exp(-1.702 * 7))
    torch.testing.assert_close(activate(f64(100, 100), "swigluoai"), f64(gate * 8))  # 7 by default
    torch.testing.assert_close(activate(f64(100, -100), "swigluoai"), f64(gate * -6))
    torch.testing.assert_close(activate(f64(2, 3), "swigluoai", alpha=1.0), f64(2 / (1 + math.exp(-2)) * 4))
    assert activate(f64(100, 100), "swigluoai", limit=math.inf).item() == pytest.approx(100 * 101)
    assert activate(f64(math.inf, math.inf), "swigluoai").item() == pytest.approx(gate * 8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_autograd_reaches_gate_and_up(name):
    torch.manual_seed(0)
    g = torch.randn(20, dtype=torch.float64, requires_grad=True)
    u = torch.randn(20, dtype=torch.float64, requires_grad=True) if is_gated(name) else None
    inputs = (g, u) if is_gated(name) else (g,)
    assert torch.autograd.gradcheck(lambda *gu: combine_gate_up(gu[0], gu[1] if u is not None else None, name), inputs)


def test_gradients_are_finite_at_extreme_gates():
    for name in GATED:
        g = f64(-1000.0, -90.0, 0.0, 90.0, 1000.0).requires_grad_()
        gate_only(name, g).sum().backward()
        torch.testing.assert_close(g.grad, f64(0.0, 0.0, 0.5, 1.0, 1.0))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_the_accelerator_agrees_with_the_cpu():
    device = torch.accelerator.current_accelerator()
    for name in GATED:
        on_device = gate_only(name, GRID.to(device)).cpu()
        torch.testing.assert_close(on_device, gate_only(name, GRID), rtol=1e-12, atol=1e-300)
        extreme = f64(-1000, 1000, math.inf, -math.inf, math.nan)
        torch.testing.assert_close(gate_only(name, extreme.to(device)).cpu(), gate_only(name, extreme), equal_nan=True)


def test_errors_name_the_field_the_value_and_what_is_valid():
    with pytest.raises(ValueError, match="activation is 'tanh'; valid are silu, gelu"):
        is_gated("tanh")
    with pytest.raises(ValueError, match="last size of h is 3"):
        activate(torch.zeros(3, dtype=torch.float64), "silu")
    with pytest.raises(ValueError, match="limit is -1; valid are None and positive"):
        activate(f64(1, 2), "silu", limit=-1)
    with pytest.raises(ValueError, match="limit is 7.0 .* must be None for relu2"):
        activate(f64(1, 2), "relu2", limit=7.0)
    with pytest.raises(ValueError, match="u is None; activation 'silu' is gated"):
        combine_gate_up(f64(1, 2), None, "silu")
    with pytest.raises(TypeError, match="h is torch.float32"):
        activate(torch.zeros(4), "silu")
