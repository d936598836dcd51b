"""The policy loss: one number by hand, and the same numbers however the batch is cut."""

import dataclasses
import math
from collections import Counter
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sapo_megatron.metrics import Mean, Metrics
from sapo_megatron.objective.loss import LOSSES, PolicyLoss, policy_loss, sequence_ess
from sapo_megatron.recipe.schema import AlgorithmConfig, CorrectionConfig, LossType
from sapo_megatron.sample import Denominators, PackedBatch
from tests.support.gloo import run_ranks

PROMPT = 2
RESPONSES = (3, 1, 0, 5)
DENOMINATORS = Denominators(sequences=3, tokens=9)
ADVANTAGES = (1.5, -2.0, 0.7, -0.4)


def make_sequences(seed=0):
    """Per sequence: dict of [PROMPT + R] vectors; masked entries hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for response, advantage in zip(RESPONSES, ADVANTAGES, strict=True):
        length = PROMPT + response
        mask = torch.arange(length) >= PROMPT

        def draw(mean, spread, mask=mask):
            noise = torch.randn(len(mask), generator=generator, dtype=torch.float64)
            return torch.where(mask, mean + spread * noise, math.nan)

        old = draw(-2.0, 0.5)
        sequences.append(
            {
                "mask": mask,
                "old_logprob": old,
                "ref_logprob": old + draw(0.0, 0.2),
                "logprob": old + draw(0.0, 0.3),
                "entropy": draw(2.0, 0.3),
                "advantages": torch.full((length,), advantage, dtype=torch.float64),
                "length": response,
            }
        )
    return sequences


def pack(sequences, keep=None):
    """A micro-batch; ``keep`` picks each sequence's entries on this context-parallel rank."""
    keep = keep or (lambda x: x)

    def cat(name):
        return torch.cat([keep(s[name]) for s in sequences])

    ids = [torch.full_like(keep(s["mask"]), i, dtype=torch.int64) for i, s in enumerate(sequences)]
    tokens = torch.zeros_like(cat("mask"), dtype=torch.int64)
    sizes = torch.tensor([0] + [len(s["mask"]) for s in sequences])
    batch = PackedBatch(
        tokens=tokens,
        targets=tokens,
        mask=cat("mask"),
        position_ids=tokens,
        sequence_ids=torch.cat(ids),
        cu_seqlens=sizes.cumsum(0).int(),
        max_seqlen=int(sizes.max()),
        lengths=torch.tensor([s["length"] for s in sequences]),
        advantages=cat("advantages"),
        rollout_logprob=cat("old_logprob"),
        sample_uids=tuple(range(len(sequences))),
        old_logprob=cat("old_logprob"),
        ref_logprob=cat("ref_logprob"),
    )
    return batch, cat("logprob").requires_grad_(), cat("entropy").requires_grad_()


def run(algorithm, batch, logprob, entropy, **kwargs):
    loss, metrics = policy_loss(
        batch,
        logprob,
        entropy,
        algorithm=algorithm,
        denominators=DENOMINATORS,
        max_response_length=8,
        **kwargs,
    )
    gradients = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True)
    return loss.detach(), gradients, metrics


def test_sapo_with_kl_and_entropy_by_hand():
    old = [-1.0, -2.0, -0.5]
    new = [-0.7, -2.4, -0.5]
    ref = [-1.0, -2.0, -1.0]
    entropy = [1.0, 2.0, 3.0]
    names = ("old_logprob", "logprob", "ref_logprob", "entropy")

    def sequence(cut, advantage):
        values = {
            name: torch.tensor(column[cut], dtype=torch.float64)
            for name, column in zip(names, (old, new, ref, entropy), strict=True)
        }
        count = len(values["logprob"])
        return values | {
            "mask": torch.ones(count, dtype=torch.bool),
            "advantages": torch.full((count,), advantage, dtype=torch.float64),
            "length": count,
        }

    batch, logprob, entropies = pack([sequence(slice(0, 2), 2.0), sequence(slice(2, 3), -1.0)])
    loss, metrics = policy_loss(
        batch,
        logprob,
        entropies,
        algorithm=AlgorithmConfig(kl_coef=0.1, kl_type="k2", entropy_coef=0.01),
        denominators=Denominators(sequences=2, tokens=3),
        max_response_length=8,
    )

    def gate(log_ratio, tau):
        return 4 / tau / (1 + math.exp(-tau * (math.exp(log_ratio) - 1)))

    pg = ((-2 * gate(0.3, 1.0) - 2 * gate(-0.4, 1.0)) / 2 + gate(0.0, 1.05)) / 2
    kl = ((0.3**2 / 2 + 0.4**2 / 2) / 2 + 0.5**2 / 2) / 2
    mean_entropy = (1.5 + 3.0) / 2
    assert loss.item() == pytest.approx(pg + 0.1 * kl - 0.01 * mean_entropy, rel=1e-12)
    values = metrics.values()
    assert values["actor/pg_loss"] == pytest.approx(pg, rel=1e-12)
    assert values["actor/kl_loss"] == pytest.approx(kl, rel=1e-12)
    assert values["actor/entropy"] == pytest.approx(2.0)
    assert values["actor/ppo_kl"] == pytest.approx((-0.3 + 0.4) / 3)
    assert values["ratio/max"] == pytest.approx(math.exp(0.3))
    assert values["sapo/gate_pos_mean"] == pytest.approx((gate(0.3, 1.0) + gate(-0.4, 1.0)) / 2)
    assert values["sapo/gate_neg_mean"] == pytest.approx(2 / 1.05)


def test_the_ratio_in_both_readings_by_hand():
    """A token that the rollout engine gave 0.25, the training engine first 0.4, and now 0.5."""
    names = ("old_logprob", "logprob", "ref_logprob", "entropy")
    values = {name: torch.tensor([math.log(0.4)], dtype=torch.float64) for name in names}
    values |= {"mask": torch.ones(1, dtype=torch.bool), "length": 1}
    values["advantages"] = torch.ones(1, dtype=torch.float64)
    recomputed, _, _ = pack([values])
    sampled = torch.tensor([math.log(0.25)], dtype=torch.float64)
    recomputed = dataclasses.replace(recomputed, rollout_logprob=sampled)
    now = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)

    def found(batch, correction):
        loss, _ = policy_loss(
            batch,
            now,
            None,
            algorithm=AlgorithmConfig(),
            denominators=Denominators(sequences=1, tokens=1),
            max_response_length=8,
            correction=correction,
        )
        return loss.item(), torch.autograd.grad(loss, now)[0].item()

    def expected(ratio, factor):
        gate, weight = 4 / (1 + math.exp(1 - ratio)), 1 / math.cosh((ratio - 1) / 2) ** 2
        return pytest.approx((-factor * gate, -factor * weight * ratio), rel=1e-12)

    tis = CorrectionConfig(rollout_is="tis", tis_cap=1.5)
    assert found(recomputed, CorrectionConfig()) == expected(1.25, 1.0)
    assert found(recomputed, tis) == expected(1.25, 1.5)
    to_the_sampler = dataclasses.replace(recomputed, old_logprob=recomputed.rollout_logprob)
    assert found(to_the_sampler, CorrectionConfig()) == expected(2.0, 1.0)


ALGORITHMS = {
    "sapo": AlgorithmConfig(kl_coef=0.1, entropy_coef=0.01),
    "grpo": AlgorithmConfig(loss_type="grpo", clip_ratio_c=1.2, loss_agg_mode="token-mean"),
    "gspo": AlgorithmConfig(loss_type="gspo", clip_ratio_low=0.3, clip_ratio_high=0.3),
    "cispo": AlgorithmConfig(loss_type="cispo", loss_agg_mode="seq-mean-token-sum-norm"),
    "vespo": AlgorithmConfig(loss_type="vespo"),
}
NAMES = {
    "actor/pg_loss",
    "actor/kl_loss",
    "actor/entropy",
    "actor/ppo_kl",
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "ratio/log_var",
    "ratio/ess",
}
OWN_NAMES = {
    "sapo": {"sapo/gate_mean", "sapo/gate_pos_mean", "sapo/gate_neg_mean", "sapo/weight_mean"},
    "grpo": {"actor/clip_fraction", "actor/dual_clip_fraction"},
    "gspo": {"actor/clip_fraction"},
    "cispo": {"actor/clip_fraction"},
    "vespo": {"vespo/w_mean", "vespo/phi_mean"},
}


def merge(pieces):
    """Loss, gradients by (sequence, entry) order, and metrics of pieces that make up one whole."""
    metrics = Metrics()
    for _, _, piece in pieces:
        metrics.update(piece)
    gradients = [g[0] for _, g, _ in pieces]
    return sum(loss for loss, _, _ in pieces), torch.cat(gradients), metrics


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-14)
    got_values, want_values = got[2].values(), want[2].values()
    assert got_values == pytest.approx(want_values, rel=1e-9, abs=1e-12)
    for name, histogram in want[2].histograms().items():
        assert torch.equal(got[2].histograms()[name].counts, histogram.counts)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_gradients_and_metrics_do_not_depend_on_the_split(name):
    algorithm, sequences = ALGORITHMS[name], make_sequences()
    whole = merge([run(algorithm, *pack(sequences))])
    # The third piece has no valid token.
    cuts = (sequences[:1], sequences[1:2], sequences[2:3], sequences[3:])
    pieces = [run(algorithm, *pack(cut)) for cut in cuts]
    assert_same(merge(pieces), whole)
    assert whole[1].isfinite().all()
    assert whole[1].any()
    assert whole[2].values().keys() == NAMES | OWN_NAMES[name]
    assert {"ratio/hist_pos", "ratio/hist_neg"} <= whole[2].histograms().keys()
    counts = [whole[2].histograms()[f"ratio/hist_{sign}"].counts.sum() for sign in ("pos", "neg")]
    assert counts == [3, 6]


def _on_a_context_parallel_rank(name):
    """Entries of each sequence alternate between the two ranks."""
    rank = torch.distributed.get_rank()
    batch, logprob, entropy = pack(make_sequences(), keep=lambda x: x[rank::2])
    group = torch.distributed.group.WORLD
    loss, gradients, metrics = run(ALGORITHMS[name], batch, logprob, entropy, cp_group=group)
    metrics.add("ess", sequence_ess(batch, logprob, group))
    return loss, gradients, metrics.to_host()


@pytest.mark.parametrize("name", ["sapo", "gspo", "vespo"])
def test_context_parallel_ranks_add_up(name):
    sequences = make_sequences()
    whole = merge([run(ALGORITHMS[name], *pack(sequences))])
    whole[2].add("ess", sequence_ess(*pack(sequences)[:2]))
    loss, gradient, metrics = merge(run_ranks(2, _on_a_context_parallel_rank, name))
    order = [
        entry
        for rank in range(2)
        for s, start in zip(sequences, pack(sequences)[0].cu_seqlens.tolist(), strict=False)
        for entry in range(start + rank, start + len(s["mask"]), 2)
    ]
    assert_same((loss, gradient, metrics), (whole[0], whole[1][order], whole[2]))


def test_every_name_has_a_loss():
    assert LOSSES.keys() == {*get_args(LossType)} == ALGORITHMS.keys()


def test_a_loss_is_a_line_of_the_table(monkeypatch):
    def plain_metrics(r, algorithm):
        metrics = Metrics()
        metrics.add("plain/advantage", Mean.of(r.advantages, r.mask))
        return metrics

    plain = PolicyLoss(lambda r, a: -r.log_ratio * r.advantages, plain_metrics)
    monkeypatch.setitem(LOSSES, "plain", plain)
    algorithm = AlgorithmConfig(loss_type="plain", loss_agg_mode="token-mean")
    sequences = make_sequences()
    _, (gradient, _), metrics = run(algorithm, *pack(sequences))
    expected = [
        torch.where(s["mask"], -s["advantages"] / DENOMINATORS.tokens, 0) for s in sequences
    ]
    torch.testing.assert_close(gradient, torch.cat(expected))
    assert metrics.values()["plain/advantage"] == pytest.approx((1.5 * 3 - 2.0 - 0.4 * 5) / 9)


class Counting(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.calls[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_ratio_is_computed_once(name):
    with Counting() as counting:
        run(ALGORITHMS[name], *pack(make_sequences()))
    # gspo and vespo take the ratio of the sequences too; vespo's weight is an exp, asked for twice.
    assert counting.calls["exp"] == {"gspo": 2, "vespo": 4}.get(name, 1)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_a_valid_token_it_is_zero_with_a_gradient(name):
    loss, (gradient, _), metrics = run(ALGORITHMS[name], *pack(make_sequences()[2:3]))
    assert loss == 0
    assert gradient.tolist() == [0.0] * PROMPT
    assert metrics.values()["actor/pg_loss"] == 0


def test_terms_without_a_coefficient_have_no_gradient():
    batch, logprob, entropy = pack(make_sequences())
    _, (with_ref, entropy_gradient), metrics = run(AlgorithmConfig(), batch, logprob, entropy)
    assert entropy_gradient is None
    assert "actor/kl_loss" in metrics
    batch = dataclasses.replace(batch, ref_logprob=None)
    _, (without_ref, _), metrics = run(AlgorithmConfig(), batch, logprob, entropy)
    assert "actor/kl_loss" not in metrics
    assert torch.equal(with_ref, without_ref)


def test_fp32_stays_fp32():
    batch, logprob, entropy = pack(make_sequences())
    batch = dataclasses.replace(
        batch, old_logprob=batch.old_logprob.float(), ref_logprob=batch.ref_logprob.float()
    )
    loss, _ = policy_loss(
        batch,
        logprob.float(),
        entropy.float(),
        algorithm=ALGORITHMS["sapo"],
        denominators=DENOMINATORS,
        max_response_length=8,
    )
    assert loss.dtype is torch.float32


def test_vespo_takes_the_product_over_a_whole_sequence():
    sequences = make_sequences()
    w, phi, expected = [], [], []
    for s in sequences:
        difference = (s["logprob"] - s["old_logprob"])[s["mask"]].clamp(-20, 20)
        product, advantage = math.exp(difference.sum()), float(s["advantages"][0])
        k, rate = (2, 3) if advantage >= 0 else (3, 2)
        w.append(product)
        phi.append(product**k * math.exp(rate * (1 - product)))
        slope = -phi[-1] * advantage / max(s["length"], 1) / DENOMINATORS.sequences
        expected += [0.0] * PROMPT + [slope] * s["length"]
    _, (gradient, _), metrics = run(ALGORITHMS["vespo"], *pack(sequences))
    assert gradient.tolist() == pytest.approx(expected, rel=1e-12)
    for name, values in (("w", w), ("phi", phi)):
        mean = sum(n * x for n, x in zip(RESPONSES, values, strict=True)) / DENOMINATORS.tokens
        assert metrics.values()[f"vespo/{name}_mean"] == pytest.approx(mean)


def test_each_ratio_of_a_product_is_bounded():
    sequences = make_sequences()
    sequences[0]["logprob"][PROMPT] = sequences[0]["old_logprob"][PROMPT] - 60
    sequences[0]["logprob"][PROMPT + 1] = sequences[0]["old_logprob"][PROMPT + 1] + 20
    assert run(ALGORITHMS["vespo"], *pack(sequences))[1][0][PROMPT].item() != pytest.approx(
        0, abs=1e-6
    )


def test_the_effective_number_of_sequences():
    """Against what sampled, not against the old policy; the empty response is none of them."""
    sequences = make_sequences()
    batch, logprob, _ = pack(sequences)
    sums = [(s["logprob"] - s["old_logprob"])[s["mask"]].sum() for s in sequences]
    w = [math.exp(x) for x, length in zip(sums, RESPONSES, strict=True) if length]
    expected = sum(w) ** 2 / sum(x * x for x in w) / 3
    assert 0.5 < expected < 0.99
    moved = dataclasses.replace(batch, old_logprob=batch.old_logprob + 1)
    assert sequence_ess(moved, logprob).value() == pytest.approx(expected, rel=1e-12)
    same = sequence_ess(batch, batch.rollout_logprob)
    assert (same.value(), float(same.count)) == (1.0, 3.0)
    rollout = torch.where(batch.sequence_ids == 3, batch.rollout_logprob - 50, logprob.detach())
    far = sequence_ess(dataclasses.replace(batch, rollout_logprob=rollout), logprob)
    largest = math.exp(20)
    expected = (2 + largest) ** 2 / (2 + largest**2) / 3
    assert far.value() == pytest.approx(expected, rel=1e-12)


def test_gspo_counts_the_tokens_of_clipped_sequences():
    sequences = make_sequences()
    outside = sum(
        s["length"]
        for s in sequences
        if s["length"] > 0
        for ratio in [(s["logprob"] - s["old_logprob"])[s["mask"]].mean().exp()]
        if (ratio > 1.001 if s["advantages"][0] > 0 else ratio < 0.999)
    )
    assert 0 < outside < DENOMINATORS.tokens
    algorithm = AlgorithmConfig(loss_type="gspo", clip_ratio_low=1e-3, clip_ratio_high=1e-3)
    _, _, metrics = run(algorithm, *pack(sequences))
    assert metrics.values()["actor/clip_fraction"] == pytest.approx(outside / DENOMINATORS.tokens)
