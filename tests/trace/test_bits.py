"""trace/bits.py: a digest changes with every bit and with every order of the bits, and with nothing else."""

import pytest
import torch

from harness.trace.bits import WIDTH, digest, same_bits

#: Sizes in bytes around those of a word, of a run of words that share a sum, and of several runs.
SIZES = (1, 3, 4, 7, 1024, 4 * WIDTH - 4, 4 * WIDTH, 4 * WIDTH + 6, 12 * WIDTH + 20)


def drawn(size):
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", SIZES)
def test_a_flipped_bit_changes_the_digest(size):
    tensor = drawn(size)
    whole = digest(tensor)
    for at in {0, size // 3, size // 2, size - 1}:
        for bit in range(8):
            tensor[at] ^= 1 << bit
            assert digest(tensor) != whole, (at, bit)
            tensor[at] ^= 1 << bit
    assert digest(tensor) == whole


def test_two_flipped_sign_bits_do_not_cancel():
    """Where 64-bit words are multiplied by odd numbers, their top bits do."""
    tensor = torch.randn(64, 16).bfloat16()
    for step in range(1, 9):
        changed = tensor.clone()
        changed[0, 3] *= -1
        changed[0, 3 + step] *= -1
        assert digest(changed) != digest(tensor), step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(6, 8), (4, 3 * WIDTH)])
def test_swapped_rows_columns_and_halves_change_the_digest(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    bits = tensor.view(torch.uint8).view(*shape, -1)  # float8 has no index_select
    rows, columns, halves = bits.clone(), bits.clone(), bits.roll(shape[0] // 2, 0)
    rows[[1, 2]] = bits[[2, 1]]
    columns[:, [0, 1]] = bits[:, [1, 0]]
    digests = {digest(t) for t in (bits, rows, columns, halves)}
    assert len(digests) == 4 and digest(tensor) in digests


def test_words_that_move_by_a_whole_run_change_the_digest():
    tensor = drawn(16 * WIDTH)
    assert digest(tensor.roll(4 * WIDTH)) != digest(tensor)


def test_zeros_of_every_length_differ():
    assert len({digest(torch.zeros(n, dtype=torch.uint8)) for n in range(20)}) == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
def test_strides_and_offsets_do_not_matter(dtype):
    tensor = torch.randn(7, 33).mul(9).to(dtype)
    wide = torch.zeros(7, 64, dtype=dtype)
    wide[:, 5:38] = tensor
    for same in (wide[:, 5:38], tensor.t().contiguous().t(), torch.cat([tensor[:1], tensor])[1:]):
        assert same_bits(same, tensor) and digest(same) == digest(tensor)


def test_nan_has_a_digest_of_its_bits():
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert digest(nan[:1]) == digest(nan[:1].clone()) != digest(nan[1:])
