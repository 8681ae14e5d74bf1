"""The stateless hash: values against plain integers, distributions against scipy."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from scipy import stats

from distill.data import randomness as rnd


def plain_mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
    x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
    return x ^ (x >> 15)


def plain_hash(seed: int, epoch: int, name: str, index: int) -> int:
    words = []
    for salt in (1, 2):
        state = salt
        for word in (zlib.crc32(name.encode()), seed % 2**32, seed >> 32, epoch):
            state = plain_mix((state + 0x9E3779B9 + word) % 2**32)
        words.append(state)
    return plain_mix(plain_mix((index + words[0]) % 2**32) ^ words[1])


def draw(name: str, count: int = 40_000, seed: int = 3, epoch: int = 7) -> torch.Tensor:
    return rnd.hashes(rnd.keys(seed, epoch, [name]), torch.arange(count))[0]


def test_hash_is_that_of_plain_integers() -> None:
    indices = torch.tensor([0, 1, 77, 49_999, 2**31, 2**32 - 1])
    hashed = rnd.hashes(rnd.keys(2**31 - 1, 299, ["flip", "crop/x"]), indices)
    for row, name in enumerate(["flip", "crop/x"]):
        assert hashed[row].tolist() == [plain_hash(2**31 - 1, 299, name, int(index)) for index in indices]


def test_hash_is_a_bijection_in_the_index_and_mixes_every_bit() -> None:
    hashed = draw("flip", 1 << 18)
    assert hashed.unique().numel() == 1 << 18
    key = rnd.keys(0, 0, ["flip"])
    indices = torch.arange(4096) * 12_345
    for bit in range(32):
        changed = rnd.hashes(key, indices) ^ rnd.hashes(key, indices ^ (1 << bit))
        share = torch.stack([((changed >> out) & 1).double().mean() for out in range(32)])
        assert share.min() > 0.45, f"bit {bit}"
        assert share.max() < 0.55, f"bit {bit}"


def test_uniforms_are_uniform_within_an_epoch_and_over_epochs() -> None:
    values = rnd.uniform(draw("flip"))
    assert values.dtype == torch.float32
    assert 0 <= values.min() < values.max() < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    index = torch.tensor([5])
    over_epochs = [rnd.uniform(rnd.hashes(rnd.keys(0, epoch, ["flip"]), index)).item() for epoch in range(3000)]
    assert stats.kstest(over_epochs, "uniform").pvalue > 1e-3
    over_seeds = [rnd.uniform(rnd.hashes(rnd.keys(seed, 0, ["flip"]), index)).item() for seed in range(3000)]
    assert stats.kstest(over_seeds, "uniform").pvalue > 1e-3


def test_extreme_hashes_stay_in_range() -> None:
    ends = torch.tensor([0, 2**32 - 1])
    assert rnd.uniform(ends).tolist() == [0.0, 1 - 2.0**-24]
    assert rnd.integers(ends, 9).tolist() == [0, 8]
    assert rnd.look_up(torch.arange(16.0), ends).tolist() == [0.0, 15.0]


def test_draws_of_names_epochs_seeds_and_neighbours_are_uncorrelated() -> None:
    reference = rnd.uniform(draw("flip"))
    others = [
        rnd.uniform(draw("erase/whether")),
        rnd.uniform(draw("flip", epoch=8)),
        rnd.uniform(draw("flip", seed=4)),
        reference.roll(1),
    ]
    for other in others:
        assert abs(np.corrcoef(reference.numpy(), other.numpy())[0, 1]) < 4 / 40_000**0.5


def test_a_name_keeps_its_key_in_any_company() -> None:
    alone = rnd.keys(1, 2, ["crop/x"])
    assert torch.equal(alone[0], rnd.keys(1, 2, ["flip", "crop/x"])[1])


def test_integers_are_uniform_with_a_bound_per_draw() -> None:
    hashed = draw("crop/x")
    counts = torch.bincount(rnd.integers(hashed, 9), minlength=9)
    assert len(counts) == 9
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    bounds = torch.tensor([1, 5])
    drawn = rnd.integers(hashed[:2000, None], bounds)
    assert drawn[:, 0].max() == 0
    assert set(drawn[:, 1].tolist()) == set(range(5))


@pytest.mark.parametrize("bits", [10, 16])
def test_normals(bits: int) -> None:
    table = rnd.normal_table(bits)
    expected = stats.norm.ppf((np.arange(1 << bits) + 0.5) / (1 << bits))
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)
    values = rnd.look_up(table, draw("noise"))
    assert stats.kstest(values.numpy(), "norm").statistic < 1.95 / 40_000**0.5 + 0.5 / (1 << bits)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 2.5, 100.0])
def test_beta_draws(alpha: float) -> None:
    table = rnd.beta_table(alpha)
    quantiles = stats.beta.ppf((np.arange(4096) + 0.5) / 4096, alpha, alpha)
    np.testing.assert_allclose(table.numpy(), quantiles, atol=1e-4)
    values = rnd.look_up(table, draw("mixup")).numpy().astype(np.float64)
    # The lower half only: near 1 a float32 cannot tell the values of a small alpha apart.
    lower = values[values < 0.5]
    assert (
        stats.kstest(lower, lambda x: 2 * stats.beta.cdf(x, alpha, alpha)).statistic < 1.95 / len(lower) ** 0.5 + 1e-3
    )
    assert abs(len(lower) - 20_000) < 4 * 100
    assert abs(values.mean() - 0.5) < 4 * 0.5 / 200


def test_permutation_is_one_and_differs_between_epochs() -> None:
    orders = [rnd.permutation(0, epoch, 1000) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])
    assert torch.equal(orders[0], rnd.permutation(0, 0, 1000))
    expected = sorted(range(1000), key=lambda index: (plain_hash(0, 0, "order", index), index))
    assert orders[0].tolist() == expected


def test_a_prefix_of_the_order_is_an_even_sample() -> None:
    positions = torch.stack([torch.argsort(rnd.permutation(0, epoch, 50)) for epoch in range(2000)])
    assert stats.chisquare(torch.bincount(positions[:, 7], minlength=50).numpy()).pvalue > 1e-3
    neighbours = ((positions[:, 1] - positions[:, 0]) % 50).numpy()
    assert stats.chisquare(np.bincount(neighbours, minlength=50)[1:]).pvalue > 1e-3
