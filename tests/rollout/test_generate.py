"""Generation: what is sampled, with which log-probs, and the same on every layout."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.rollout.engine import Request, SamplingParams, part_of
from sapo_megatron.rollout.generate import generate, nucleus, sample, uniform
from tests.support.generating import check_layouts, check_one_rank
from tests.support.gloo import run_ranks

EOS = 1
MASK = (1 << 64) - 1


# Noise


def splitmix(x):
    """Steele, Lea and Flood's finaliser on Python's unbounded numbers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def noise(seed, uids, positions):
    return uniform(seed, torch.as_tensor(uids), torch.as_tensor(positions))


@given(
    seed=st.integers(0, 2**31 - 1),
    uid=st.integers(-1, 2**62),
    position=st.integers(-1000, 10**6),
)
def test_noise_is_splitmix_of_seed_uid_and_position(seed, uid, position):
    bits = splitmix(splitmix(splitmix(seed) ^ (uid & MASK)) ^ (position & MASK))
    got = noise(seed, [uid], [position])
    assert got.dtype == torch.float64
    assert got.item() == (bits >> 11) / 2**53
    assert 0 <= got.item() < 1


def test_noise_stays_what_it_was():
    # A change here would change every run that is resumed.
    got = noise(1234, [0, 0, 1, 123456], [0, 1, 0, 7])
    expected = [0.323102120879034, 0.7065807593813511, 0.5967959612721673, 0.3538667787708033]
    assert got.tolist() == expected


@pytest.mark.parametrize(
    "vary",
    [
        lambda i: (1, i, torch.zeros_like(i)),
        lambda i: (1, torch.zeros_like(i), i),
        lambda i: (1, i // 100, i % 100),
        lambda i: (1, i, 3 - i),
    ],
    ids=["uids", "positions", "both", "opposed"],
)
def test_noise_is_uniform_and_shows_no_correlation(vary):
    n = 40_000
    u = uniform(*vary(torch.arange(n))).numpy()
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    chi_square = ((counts - n / 50) ** 2 / (n / 50)).sum()
    assert chi_square < 49 + 5 * math.sqrt(2 * 49)  # 5 standard deviations
    for lag in (1, 2, 8, 100):
        correlation = np.corrcoef(u[:-lag], u[lag:])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n)


def test_seeds_have_nothing_to_do_with_each_other():
    i = torch.arange(40_000)
    a, b = (uniform(seed, i // 50, i % 50).numpy() for seed in (1, 2))
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(i))


# Sampling


def test_sampling_matches_the_probabilities():
    logits = torch.tensor([2.0, -1.0, 0.5, -math.inf, 1.0, 0.0, -3.0])
    n, temperature = 50_000, 1.7
    u = noise(7, torch.arange(n), torch.zeros(n, dtype=torch.long))
    tokens, logprobs = sample(logits.expand(n, -1), u, temperature, 1.0)
    probs = torch.softmax(logits.double() / temperature, -1)
    expected = n * probs
    counts = torch.bincount(tokens, minlength=7).double()
    assert counts[3] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert chi_square < 5 + 5 * math.sqrt(2 * 5)  # 5 degrees of freedom, 5 standard deviations
    assert logprobs.dtype == torch.float64
    torch.testing.assert_close(logprobs, probs.log()[tokens])


def test_noise_at_the_ends_takes_a_possible_token():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -math.inf]])
    first, _ = sample(logits, torch.tensor([0.0]), 1.0, 1.0)
    last, _ = sample(logits, torch.tensor([1 - 2.0**-53], dtype=torch.float64), 1.0, 1.0)
    assert (first.item(), last.item()) == (1, 3)


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, -1.0]])
    tokens, logprobs = sample(logits, torch.tensor([0.99, 0.99]), 0.0, 0.5)
    assert tokens.tolist() == [1, 0]
    expected = torch.log_softmax(logits.double(), -1)[[0, 1], tokens]
    torch.testing.assert_close(logprobs, expected)


def test_top_p_restricts_the_tokens_and_not_the_logprobs():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    n = 5_000
    u = noise(3, torch.arange(n), torch.zeros(n, dtype=torch.long))
    tokens, logprobs = sample(logits.expand(n, -1), u, 1.0, 0.75)
    counts = torch.bincount(tokens, minlength=4)
    assert counts[2:].tolist() == [0, 0]
    assert counts[0].item() / n == pytest.approx(0.5 / 0.8, abs=5 * math.sqrt(0.24 / n))
    torch.testing.assert_close(logprobs, logits.double()[tokens])


def test_logits_that_are_not_numbers_still_give_a_token():
    for temperature in (0.0, 1.0):
        tokens, logprobs = sample(torch.full((2, 5), math.nan), torch.rand(2), temperature, 0.9)
        assert ((tokens >= 0) & (tokens < 5)).all()
        assert logprobs.isnan().all()


@given(
    weights=st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any),
    top_p=st.floats(0.01, 1.0),
)
def test_the_nucleus_is_the_smallest_set_of_likely_tokens_that_holds_top_p(weights, top_p):
    probs = torch.tensor(weights, dtype=torch.float64)
    probs = probs / probs.sum()
    kept = nucleus(probs[None], top_p)[0]
    inside = kept > 0
    assert torch.equal(kept[inside], probs[inside])
    assert kept.sum() >= top_p - 1e-12
    # Without its least likely token it would hold less than top_p.
    assert kept.sum() - kept[inside].min() < top_p + 1e-12
    assert probs[inside].min() >= probs[~inside].max() if (~inside).any() else True


# Batches, with a toy for a model


class Toy:
    """Its next token depends on all tokens so far; counts what it is fed."""

    device = torch.device("cpu")
    VOCAB = 11

    def __init__(self, company=0):
        self.company = company  # iterations that another rank needs
        self.calls = 0

    def start(self, batch_size, max_length):
        self.seen = torch.zeros(batch_size, 0, dtype=torch.long)
        self.max_length = max_length

    def logits(self, tokens):
        self.calls += 1
        self.seen = torch.cat([self.seen, tokens], 1)
        return toy_logits(self.seen)

    def agree(self, tokens, logprobs):
        return tokens, logprobs

    def any(self, flag):
        self.company -= 1
        return flag or self.company >= 0

    def routes(self):
        return None


def toy_logits(tokens):
    """``[B, V]`` from whole sequences, a hash of all their tokens; eos is likely now and then."""
    places = torch.arange(1, tokens.shape[1] + 1)
    key = (tokens * places * 7919 + places * 31).sum(1)
    return torch.sin(key[:, None] * 0.37 + torch.arange(Toy.VOCAB) ** 2 * 1.3) * 2


def params(**kwargs):
    values = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 6, "stop_ids": (EOS,), "seed": 5}
    return SamplingParams(**(values | kwargs))


def alone(request, p):
    """What generation must give for one request: token by token, without cache or batch."""
    tokens, logprobs = list(request.prompt_tokens), []
    for position in range(p.max_new_tokens):
        u = uniform(p.seed, torch.tensor([request.uid]), torch.tensor([position]))
        token, logprob = sample(toy_logits(torch.tensor([tokens])), u, p.temperature, p.top_p)
        tokens.append(token.item())
        logprobs.append(logprob.item())
        if token.item() in p.stop_ids:
            break
    return tokens[len(request.prompt_tokens) :], logprobs


REQUESTS = [
    Request(uid=10 * i + 3, prompt_tokens=tuple(range(2, 2 + n)))
    for i, n in enumerate([3, 1, 7, 2, 7, 4, 1, 5, 2, 2, 3, 6])
]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_batch_gives_what_each_request_gives_alone(batch_size, temperature):
    p = params(temperature=temperature, top_p=0.9)
    samples = generate(Toy(), REQUESTS, p, batch_size=batch_size)
    assert [s.uid for s in samples] == [r.uid for r in REQUESTS]
    for request, s in zip(REQUESTS, samples, strict=True):
        tokens, logprobs = alone(request, p)
        assert s.prompt_tokens == request.prompt_tokens
        assert s.response_tokens == tokens
        assert s.rollout_logprobs == logprobs
        assert s.truncated == (tokens[-1] != EOS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_of_several_tokens_ends_a_response(temperature):
    p = params(temperature=temperature, stop_ids=(EOS, 4, 8))
    samples = generate(Toy(), REQUESTS, p, batch_size=5)
    for request, s in zip(REQUESTS, samples, strict=True):
        assert (s.response_tokens, s.rollout_logprobs) == alone(request, p)
        assert s.truncated == (s.response_tokens[-1] not in p.stop_ids)
    if temperature:
        assert {s.response_tokens[-1] for s in samples if not s.truncated} == set(p.stop_ids)
        assert any(s.truncated for s in samples)
    for request in REQUESTS:
        toy = Toy()
        (s,) = generate(toy, [request], dataclasses.replace(p, max_new_tokens=50), batch_size=1)
        assert toy.calls == len(s.response_tokens)


def test_both_ends_of_a_response_were_seen():
    samples = generate(Toy(), REQUESTS, params(), batch_size=100)
    assert any(s.truncated and len(s.response_tokens) == 6 for s in samples)
    ended = [s for s in samples if not s.truncated]
    assert {len(s.response_tokens) for s in ended} & {1, 2, 3, 4}
    assert all(s.response_tokens.count(EOS) == 1 for s in ended)


def test_an_eos_in_the_prompt_ends_nothing():
    request = Request(uid=4, prompt_tokens=(2, EOS, 3, EOS))
    (s,) = generate(Toy(), [request], params(), batch_size=4)
    assert (s.response_tokens, s.rollout_logprobs) == alone(request, params())


def test_a_rank_goes_on_until_the_last_one_is_done_and_changes_nothing():
    without = generate(Toy(), REQUESTS, params(), batch_size=100)
    toy = Toy(company=40)
    assert generate(toy, REQUESTS, params(), batch_size=100) == without
    assert toy.calls == 40


def test_generation_ends_with_the_last_response():
    toy = Toy()
    request = Request(uid=REQUESTS[0].uid, prompt_tokens=REQUESTS[0].prompt_tokens)
    (s,) = generate(toy, [request], params(max_new_tokens=50), batch_size=1)
    assert toy.calls == len(s.response_tokens) < 50


@given(n=st.integers(1, 20), size=st.integers(1, 6))
@settings(max_examples=50)
def test_shares_are_of_one_size_and_cover_all(n, size):
    requests = [Request(uid=i, prompt_tokens=(i,)) for i in range(n)]
    parts = [part_of(requests, rank, size) for rank in range(size)]
    assert len({len(s) for s in parts}) == 1
    assert sorted(r.uid for s in parts for r in s if r.uid >= 0) == list(range(n))
    assert sum(r.uid < 0 for s in parts for r in s) < size


# The real model


def test_one_rank_generates_as_the_model_is(tmp_path):
    (errors,) = run_ranks(1, check_one_rank, tmp_path)
    # fp32, one token at a time with a cache, against the whole sequence at once.
    assert errors["incremental"] < 1e-5
    # The training engine, on packed sequences, of the tokens that generation recorded.
    assert errors["logprob"] < 1e-5
    assert errors["logprob at 0.7"] < 1e-5
    # And a wrong temperature would be seen.
    assert errors["other temperature"] > 0.05


def test_two_ranks_generate_the_tokens_of_one(tmp_path):
    (one,) = run_ranks(1, check_layouts, tmp_path, [{}])
    layouts = [
        {"expert_model_parallel_size": 2},  # and data parallel, as its attention is
        {"pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    ]
    two = run_ranks(2, check_layouts, tmp_path, layouts)
    expected = [(s.uid, s.response_tokens) for s in one[0]]
    assert len({len(tokens) for _, tokens in expected}) > 2  # the ranks were not done together
    for i, layout in enumerate(layouts):
        for rank in two:
            assert [(s.uid, s.response_tokens) for s in rank[i]] == expected, layout
            for s, t in zip(rank[i], one[0], strict=True):
                np.testing.assert_allclose(s.rollout_logprobs, t.rollout_logprobs, atol=1e-5)
