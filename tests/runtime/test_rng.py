"""Streams of random numbers are uniform or normal, and depend on nothing but seed, name, sample and position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.runtime.rng import KeyedRNG, sample_keys, seed_step

SAMPLES = sample_keys(f"image-{i}" for i in range(64))


def test_uniform_is_uniform() -> None:
    x = KeyedRNG.seeded(0, SAMPLES).at("u").uniform(2000).numpy()
    assert x.min() >= 0.0
    assert x.max() < 1.0
    assert stats.kstest(x.ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(x[:, 0], "uniform").pvalue > 0.01


def test_normal_is_normal() -> None:
    x = KeyedRNG.seeded(0, SAMPLES).at("n").normal(2000).numpy()
    assert np.isfinite(x).all()
    assert stats.kstest(x.ravel(), "norm").pvalue > 0.01
    assert abs(stats.kurtosis(x.ravel())) < 0.05


@pytest.mark.parametrize("other", ["position", "sample", "name", "seed", "step"])
def test_neighbouring_numbers_are_uncorrelated(other: str) -> None:
    streams = KeyedRNG.seeded(0, SAMPLES)
    x = streams.at("a", 0).normal(1001)
    y = {
        "position": x.roll(1, 1),
        "sample": x.roll(1, 0),
        "name": streams.at("b", 0).normal(1001),
        "seed": KeyedRNG.seeded(1, SAMPLES).at("a", 0).normal(1001),
        "step": streams.at("a", 1).normal(1001),
    }[other]
    correlation = np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1]
    assert abs(correlation) < 4 / np.sqrt(x.numel())


def test_a_step_has_its_own_numbers_and_has_them_again() -> None:
    """Over seeds, phases, epochs and steps: no two draw the same, and the first draws are uniform."""
    names = [(seed, phase, epoch, step) for seed in (0, 1) for phase in ("a", "b") for epoch in (0, 12) for step in range(250)]

    def draw(name: tuple[int, str, int, int]) -> float:
        seed_step(*name)
        return float(torch.rand(()))

    draws = [draw(name) for name in names]
    assert len(set(draws)) == len(names)
    assert stats.kstest(draws, "uniform").pvalue > 0.01
    assert [draw(name) for name in names] == draws


def test_a_drawn_key_is_decided_by_the_seed_of_the_step() -> None:
    def draw(step: int) -> torch.Tensor:
        seed_step(0, "fusion", 0, step)
        return KeyedRNG.drawn(len(SAMPLES), SAMPLES.device).at("start").normal(5)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_draws_do_not_depend_on_batch_order_or_size() -> None:
    whole = KeyedRNG.seeded(3, SAMPLES).at("x", 5).normal(7)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(KeyedRNG.seeded(3, SAMPLES[order]).at("x", 5).normal(7), whole[order])
    for i in (0, 13, 63):
        assert torch.equal(KeyedRNG.seeded(3, SAMPLES[i : i + 1]).at("x", 5).normal(7), whole[i : i + 1])


def test_a_longer_draw_begins_with_the_shorter() -> None:
    streams = KeyedRNG.seeded(0, SAMPLES)
    assert torch.equal(streams.bits(12)[:, :5], streams.bits(5))
    assert torch.equal(streams.bits(3, 4).flatten(1), streams.bits(12))
    assert streams.uniform().shape == (64,)


def test_vmap_over_keys_is_a_loop() -> None:
    seeds = [KeyedRNG.seeded(seed, SAMPLES) for seed in range(5)]
    keys = torch.tensor([streams.key for streams in seeds])

    def draw(key: torch.Tensor) -> torch.Tensor:
        return KeyedRNG(key, SAMPLES).at("noise", 3).normal(4, 2)

    assert torch.equal(torch.func.vmap(draw)(keys), torch.stack([streams.at("noise", 3).normal(4, 2) for streams in seeds]))


def test_a_step_may_be_a_tensor() -> None:
    streams = KeyedRNG.seeded(0, SAMPLES)
    assert int(streams.at("noise", torch.tensor(9)).key) == streams.at("noise", 9).key


def test_names_do_not_collide() -> None:
    root = KeyedRNG.seeded(0, SAMPLES)
    names: list[tuple[int | str, ...]] = [(word, i, j) for word in ("noise", "dropout") for i in range(30) for j in range(30)]
    names += [("noise",), ("dropout",), ("1",), (1,), (), (0,), (0, 0), ("a", "b"), ("b", "a"), ("ab",), (-1,)]
    keys = {int(root.at(*name).key) for name in names} | {int(KeyedRNG.seeded(seed, SAMPLES).key) for seed in range(1, 100)}
    assert len(keys) == len(names) + 99


def test_names_may_be_given_one_by_one() -> None:
    root = KeyedRNG.seeded(0, SAMPLES)
    assert int(root.at("a").at(2, "b").key) == int(root.at("a", 2, "b").key)


def test_bits_do_not_collide_across_samples_and_positions() -> None:
    assert len(torch.unique(KeyedRNG.seeded(0, SAMPLES).bits(5000))) == 64 * 5000


def test_sample_keys_are_those_of_the_id() -> None:
    assert len(torch.unique(sample_keys(str(i) for i in range(10_000)))) == 10_000
    # the first eight bytes of SHA-256("abc") (FIPS 180-2, appendix B.1), little-endian
    assert int(sample_keys(["abc"])[0]) == int.from_bytes(bytes.fromhex("ba7816bf8f01cfea"), "little", signed=True)
