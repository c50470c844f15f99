"""The noise contract: known vectors, the same numbers everywhere, and the right distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import tolerances
import torch
from cells import Cell
from torch import nn

import mmfuse
from mmfuse import NoiseStream, ops
from mmfuse.noise import default_stream
from mmfuse.reference.noise import philox4x32, uniform_from_bits

# Known-answer tests of Philox4x32-10 that its authors distribute with Random123.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def drawn(cell: Cell, stream: NoiseStream, numel: int, stream_id: int, offset: int = 0):
    """The noise as a backend draws it: 1·0 + 1·N."""
    grad = torch.zeros(numel, device=cell.device)
    one = torch.ones(1, device=cell.device)
    placed = stream.place([stream_id], [offset])
    ops.update_grads_([grad], one, noise_std=one, stream=placed, backend=cell.backend)
    return grad.cpu()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_vectors(counter: str, key: str, expected: str) -> None:
    bits = philox4x32(torch.tensor([words(counter)]), torch.tensor(words(key)))
    assert bits[0].tolist() == words(expected)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_vectors_in_every_backend(cell: Cell, counter: str, key: str, expected: str) -> None:
    """The words go in through seed, step, stream id and offset, and come out through Box-Muller."""
    low, high, stream_id, step = words(counter)
    seed = words(key)[0] | words(key)[1] << 32
    if high >= 2**29:  # the element offset 4·block must fit into int64
        high = 0
        bits = philox4x32(torch.tensor([[low, 0, stream_id, step]]), torch.tensor(words(key)))
        expected = " ".join(f"{w:08x}" for w in bits[0].tolist())
    stream = NoiseStream(seed, cell.device)
    stream.advance(step)
    u = [float(uniform_from_bits(torch.tensor(w))) for w in words(expected)]
    z = []
    for a, b in ((u[0], u[1]), (u[2], u[3])):
        radius = math.sqrt(-2 * math.log(a))
        z += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    z = torch.tensor(z, dtype=torch.float64)
    actual = drawn(cell, stream, 4, stream_id, 4 * (low | high << 32))
    tolerances.assert_within(actual, z, tolerances.noise(z))


def block_that_draws(bits: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """The counter whose block under this key is `bits`: every round of Philox can be undone."""
    m0, m1 = 0xD2511F53, 0xCD9E8D57
    inverse0, inverse1 = pow(m0, -1, 2**32), pow(m1, -1, 2**32)
    x0, x1, x2, x3 = bits
    for round_ in reversed(range(10)):
        k0 = (key[0] + round_ * 0x9E3779B9) % 2**32
        k1 = (key[1] + round_ * 0xBB67AE85) % 2**32
        old0, old2 = x3 * inverse0 % 2**32, x1 * inverse1 % 2**32
        x0, x1, x2, x3 = old0, x0 ^ (m1 * old2 >> 32) ^ k0, old2, x2 ^ (m0 * old0 >> 32) ^ k1
    return [x0, x1, x2, x3]


# Both ends of the unit interval, where the radius is largest and where it goes to 0, and both sides
# of 63/64, where the GPU's logarithm changes from one formula to the other.
RADIUS_BITS = [
    *(0, 1, 2, 255, 2**16, 2**24 - 1, 2**31 - 1, 2**31, 3 * 2**30),
    *(2**32 - 2**26 + d for d in (-513, -257, -129, -128, -1, 0, 1, 128, 129, 257)),
    *(2**32 - d for d in (2**20, 2**12, 1025, 1024, 513, 512, 385, 384, 257, 256, 129, 128, 2, 1)),
]


@pytest.mark.parametrize("angle", [0, 1, 2**29 - 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
def test_extreme_words(cell: Cell, angle: int) -> None:
    """Words that no test of random counters would meet, drawn by choosing the counter for them."""
    radii = RADIUS_BITS[::4] if cell.slow else RADIUS_BITS
    for a, c in itertools.pairwise(radii):
        d = (angle + 2**30) % 2**32
        seeds = ((seed, 0) for seed in itertools.count())
        # The element's offset, 4 * block, has to fit into int64.
        key = next(k for k in seeds if block_that_draws((a, angle, c, d), k)[1] < 2**28)
        low, high, stream_id, step = block_that_draws((a, angle, c, d), key)
        stream = NoiseStream(key[0], cell.device)
        stream.advance(step)
        u, turn = (uniform_from_bits(torch.tensor(w)).double() for w in ([a, c], [angle, d]))
        radius = (-2 * u.log()).sqrt()
        z = torch.stack([radius * (turn * math.tau).cos(), radius * (turn * math.tau).sin()], 1)
        actual = drawn(cell, stream, 4, stream_id, 4 * (low | high << 32))
        tolerances.assert_within(actual, z.flatten(), tolerances.noise(z.flatten()))


def test_uniform_is_in_the_open_closed_unit_interval() -> None:
    bits = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert uniform_from_bits(bits).tolist() == [2.0**-33, 2.0**-32 + 2.0**-33, 0.5, 1.0]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63, 2**64 - 1, -1])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 1000003, 2**31 + 5, 2**34 - 500, 2**40 + 1])
def test_every_backend_agrees_with_the_reference(cell: Cell, seed: int, offset: int) -> None:
    stream = NoiseStream(seed, cell.device)
    stream.advance(17)
    z = stream.normal(1001, 5, offset, dtype=torch.float64)
    actual = drawn(cell, stream, 1001, 5, offset)
    tolerances.assert_within(actual, z, tolerances.noise(z.cpu()))


def test_tails_agree_too(cell: Cell) -> None:
    """A million deviates reach |z| = 4.9 and radii near 0, where a fast logarithm is wrong."""
    count = 50_000 if cell.slow else 1_000_000
    stream = NoiseStream(99, cell.device)
    z = stream.normal(count, 0, dtype=torch.float64)
    assert float(z.abs().max()) > 4
    tolerances.assert_within(drawn(cell, stream, count, 0), z, tolerances.noise(z.cpu()))


@pytest.mark.parametrize("splits", [[1, 2], [5, 997], [4, 8, 500], [333, 334, 700]], ids=str)
def test_any_split_of_a_tensor_gives_the_same_numbers(cell: Cell, splits: list[int]) -> None:
    stream = NoiseStream(8, cell.device)
    whole = drawn(cell, stream, 1002, 2)
    edges = [0, *splits, 1002]
    parts = [drawn(cell, stream, b - a, 2, a) for a, b in itertools.pairwise(edges)]
    # Not merely close: vectorised and scalar code paths must round alike.
    joined = torch.cat(parts)
    tolerances.assert_within(joined, whole, tolerances.noise(whole.double()) * 0.1)


def test_same_bits_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            grads = [torch.zeros(200_001), torch.zeros(3), torch.zeros(70_000)]
            ops.update_grads_(grads, torch.ones(3), noise_std=torch.ones(3), stream=NoiseStream(1))
            results.append(torch.cat(grads))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_tensors_steps_and_seeds_are_independent() -> None:
    first = NoiseStream(1).normal(1000, 0)
    later = NoiseStream(1)
    later.advance()
    others = [NoiseStream(1).normal(1000, 1), later.normal(1000, 0), NoiseStream(2).normal(1000, 0)]
    for other in others:
        # 1,000 independent pairs: the correlation has standard deviation 0.032.
        assert abs(float((first * other).mean())) < 5 * 1000**-0.5


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_moments_and_kolmogorov_smirnov(backend: str) -> None:
    count = 1_000_000
    z = drawn(Cell(backend, "cpu"), NoiseStream(12345), count, 0).double()
    # Standard errors of the first four moments of a normal sample; five of them are allowed.
    error = count**-0.5
    assert abs(float(z.mean())) < 5 * error
    assert abs(float(z.var()) - 1) < 5 * 2**0.5 * error
    assert abs(float((z**3).mean())) < 5 * 15**0.5 * error
    assert abs(float((z**4).mean()) - 3) < 5 * 96**0.5 * error
    # The seed is fixed: this is a property of the stream, not a game of chance.
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    # The pairs of Box-Muller and neighbouring blocks must not be correlated either.
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 * error


def test_torch_manual_seed_controls_the_default_stream() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(5)
    first = default_stream(cpu)
    assert default_stream(cpu) is first
    torch.manual_seed(6)
    second = default_stream(cpu)
    assert second.state.tolist() == NoiseStream(6, name="ogm_backward").state.tolist()
    assert first.state is second.state  # in place: a captured graph reads the same memory
    assert NoiseStream().state.tolist() == [6, 0]


def test_names_set_streams_of_one_seed_apart() -> None:
    made = {name: NoiseStream(3, name=name) for name in (None, "OGM/a", "OGM/b", "OPM/None")}
    draws = [stream.normal(4000) for stream in made.values()]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert abs(float((one * other).mean())) < 5 / 4000**0.5
    # The numbers of a name are part of what a run repeats: on any machine, in any version.
    assert made["OGM/a"].state.tolist() == [3271046140287080556, 0]
    assert torch.equal(NoiseStream(3, name="OGM/a").normal(9), made["OGM/a"].normal(9))
    assert NoiseStream(4, name="OGM/a").state[0] != made["OGM/a"].state[0]


def objects() -> dict[str, NoiseStream]:
    """Streams of all objects that make one of their own, with the default seed."""
    nets = {"audio": nn.Linear(3, 2), "visual": nn.Linear(3, 2)}
    others = {"text": nn.Linear(3, 2), "image": nn.Linear(3, 2)}
    return {
        "OGM": mmfuse.OGM(nets).stream,
        "OGM on others": mmfuse.OGM(others).stream,
        "OGM by name": mmfuse.OGM(nets, name="second").stream,
        "RedReg": mmfuse.RedReg(nets).stream,
        "OPM": NoiseStream.from_state(mmfuse.OPM().noise_state),
        "OPM by name": NoiseStream.from_state(mmfuse.OPM(name="second").noise_state),
        "OPM.official by name": NoiseStream.from_state(mmfuse.OPM.official(name="3").noise_state),
        "ContributionSampler": mmfuse.ContributionSampler(torch.ones(2))._stream,
        "ogm_backward": default_stream(torch.device("cpu")),
    }


def test_objects_draw_numbers_of_their_own() -> None:
    torch.manual_seed(5)
    made = objects()
    keys = {name: int(stream.state[0]) for name, stream in made.items()}
    assert len(set(keys.values())) == len(keys), keys
    again = {name: int(stream.state[0]) for name, stream in reversed(list(objects().items()))}
    assert again == keys, "neither the order nor the number of objects counts"
    torch.manual_seed(6)
    assert not set(keys.values()) & {int(stream.state[0]) for stream in objects().values()}


def test_opm_and_ogm_are_independent() -> None:
    """The mask of OPM and the noise of OGM came from the same numbers: a variance of 2.2 or 0.5."""
    torch.manual_seed(0)
    made = objects()
    uniform = made["OPM"].uniform(4000)
    noise = made["OGM"].normal(4000)
    dropped, kept = noise[uniform < 0.5], noise[uniform >= 0.5]
    for part in (dropped, kept):
        assert abs(float(part.var()) - 1) < 5 * (2 / len(part)) ** 0.5


def test_pytorchs_generators_are_not_touched() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    ops.update_grads_(
        [torch.zeros(10)], torch.ones(1), noise_std=torch.ones(1), stream=NoiseStream(1)
    )
    NoiseStream().normal(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_state_round_trip() -> None:
    stream = NoiseStream(2**64 - 1)
    stream.advance(41)
    other = NoiseStream(0)
    placed = other.place([7])
    other.load_state_dict(stream.state_dict())
    assert torch.equal(other.normal(100, 7), stream.normal(100, 7))
    assert torch.equal(placed.state, stream.state)
    stream.advance()
    assert not torch.equal(other.state, stream.state)  # the state dict was a copy


def test_bad_input() -> None:
    stream = NoiseStream(0)
    for arguments, match in [
        (([-1],), "stream id"),
        (([2**32],), "stream id"),
        (([0], [-1]), "offsets must not be negative"),
        (([0], [2**62]), r"every offset must be below 2\*\*62"),
        (([0, 1], [0, 2**63 - 1]), r"every offset must be below 2\*\*62"),
        (([0, 1], [0]), "2 ids but 1 offsets"),
    ]:
        with pytest.raises(ValueError, match=match):
            stream.place(*arguments)
    for bad in ({}, {"state": torch.zeros(3, dtype=torch.int64)}, {"state": torch.zeros(2)}):
        with pytest.raises(ValueError, match="int64 tensor"):
            stream.load_state_dict(bad)
    column = torch.zeros(2, 2, dtype=torch.int64)[:, 0]
    with pytest.raises(ValueError, match=r"must be contiguous, got strides \(2,\)"):
        NoiseStream.from_state(column)


def test_the_last_offsets(cell: Cell) -> None:
    """The largest offset leaves room for all places behind it."""
    stream = NoiseStream(3, cell.device)
    z = stream.normal(9, 2, 2**62 - 1, dtype=torch.float64)
    actual = drawn(cell, stream, 9, 2, 2**62 - 1)
    tolerances.assert_within(actual, z, tolerances.noise(z.cpu()))
