"""SAPO in NeMo-RL: on a stand-in, and on the host itself where ``SAPO_NEMO_RL`` is a checkout."""

import importlib
import itertools
import math
import os
import pickle
import sys
import typing
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import typing_extensions

from sapo_megatron.errors import UserError
from sapo_megatron.objective.loss import policy_loss
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.patches import nemo_rl, replace
from sapo_megatron.patches.measure import PER_SEQUENCE, PER_TOKEN, measure_rows
from sapo_megatron.recipe.schema import AlgorithmConfig, CorrectionConfig
from sapo_megatron.sample import Denominators, PackedBatch
from tests.hosts import absent, nemo_standin
from tests.support import gloo

ALGORITHM = AlgorithmConfig(tau_pos=1.3, tau_neg=1.7)
TAUS = {"tau_pos": 1.3, "tau_neg": 1.7}
LENGTHS, VOCAB = (9, 6, 8, 7), 11
TIS = {
    "use_importance_sampling_correction": True,
    "truncated_importance_sampling_type": "tis",
    "truncated_importance_sampling_ratio": 1.05,
}
KL = {"reference_policy_kl_penalty": 0.3}
NLL = {"positive_example_nll_weight": 0.2}
BARE = {"reference_policy_kl_penalty": 0.0}


@pytest.fixture
def host(monkeypatch):
    nemo_standin.stand_in(lambda *at: monkeypatch.setitem(sys.modules, *at))
    yield nemo_standin
    nemo_rl.uninstall()


def a_batch(dtype=torch.float64):
    """(logits, data): four rows, the last of which counts for nothing; logits a leaf."""
    generator = torch.Generator().manual_seed(3)

    def near(x, spread):
        noise = torch.randn(x.shape, generator=generator, dtype=dtype)
        return F.pad(x + spread * noise, (1, 0))

    width = max(LENGTHS)
    logits = torch.randn(len(LENGTHS), width, VOCAB, generator=generator, dtype=dtype)
    tokens = torch.randint(VOCAB, (len(LENGTHS), width), generator=generator)
    logprob = next_logprobs(logits, tokens)
    position = torch.arange(width)
    token_mask = (position >= 3) & (position < torch.tensor(LENGTHS)[:, None])
    token_mask[1, 4] = False
    advantages = torch.tensor([1.5, -0.7, 0.2, 9.0], dtype=dtype)[:, None].expand_as(tokens)
    data = {
        "input_ids": tokens,
        "input_lengths": torch.tensor(LENGTHS),
        "advantages": advantages.clone(),
        "prev_logprobs": near(logprob, 0.4),
        "generation_logprobs": near(logprob, 0.3),
        "reference_policy_logprobs": near(logprob, 0.5),
        "token_mask": token_mask.to(dtype),
        "sample_mask": torch.tensor([1, 1, 1, 0], dtype=dtype),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype),
    }
    return logits.requires_grad_(), data


def next_logprobs(logits, tokens):
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def counts(data):
    """global_valid_seqs and global_valid_toks, as the host counts them."""
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    return data["sample_mask"].sum(), mask.sum()


def evaluate(loss_fn, logits, data):
    """(loss, gradient, metrics) on the whole batch."""
    loss, metrics = loss_fn(next_logprobs(logits, data["input_ids"]), data, *counts(data))
    return loss.detach(), torch.autograd.grad(loss, logits)[0], metrics


def grpo(host, **changed):
    return host.ClippedPGLossFn(host.ClippedPGLossConfig(**{**BARE, **changed}))


def sapo(host, **changed):
    cfg = host.ClippedPGLossConfig(**{**BARE, **changed})
    return nemo_rl.SapoLoss(cfg, algorithm=ALGORITHM)


def ours(logits, data, *, token_level, tis=False, forced=False):
    """Our own (loss, gradient) of the policy term."""
    logprob = next_logprobs(logits, data["input_ids"])
    mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).bool()
    rows = torch.arange(len(mask))[:, None].expand_as(mask)
    old = logprob.detach() if forced else data["prev_logprobs"][:, 1:]
    packed = PackedBatch(
        tokens=data["input_ids"][:, :-1].flatten(),
        targets=data["input_ids"][:, 1:].flatten(),
        mask=mask.flatten(),
        position_ids=rows.flatten(),
        sequence_ids=rows.flatten(),
        cu_seqlens=torch.arange(len(mask) + 1) * mask.shape[1],
        max_seqlen=mask.shape[1],
        lengths=mask.sum(1),
        advantages=data["advantages"][:, 1:].flatten(),
        rollout_logprob=data["generation_logprobs"][:, 1:].flatten(),
        sample_uids=tuple(range(len(mask))),
        old_logprob=old.flatten(),
    )
    sequences, tokens = counts(data)
    loss, _ = policy_loss(
        packed,
        logprob.flatten(),
        None,
        algorithm=AlgorithmConfig(
            **TAUS, loss_agg_mode="token-mean" if token_level else "seq-mean-token-mean"
        ),
        denominators=Denominators(sequences=int(sequences), tokens=int(tokens)),
        max_response_length=mask.shape[1],
        correction=CorrectionConfig(rollout_is="tis", tis_cap=1.05) if tis else None,
    )
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def assert_same(found, expected, rtol=1e-7):
    """Pairs of loss and gradient; the host adds 1e-8 to its denominators."""
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * 1e-2)


def check_policy_term(host, token_level):
    logits, data = a_batch()
    level = {"token_level_loss": token_level}
    bare = evaluate(sapo(host, **level), logits, data)
    assert_same(bare, ours(logits, data, **{"token_level": token_level}))
    corrected = evaluate(sapo(host, **level, **TIS), logits, data)
    assert_same(corrected, ours(logits, data, token_level=token_level, tis=True))
    expected = ours(logits, data, token_level=token_level, tis=True, forced=True)
    del data["prev_logprobs"]
    forced = evaluate(sapo(host, **level, **TIS, force_on_policy_ratio=True), logits, data)
    assert_same(forced, expected)


def check_other_terms(host, token_level, *options):
    """What an option of the host adds to the loss is what it adds to the host's own."""
    logits, data = a_batch()
    level = {"token_level_loss": token_level}
    bare = [evaluate(make(host, **level), logits, data) for make in (sapo, grpo)]
    for option in options:
        added = []
        for make, without in zip((sapo, grpo), bare, strict=True):
            with_it = evaluate(make(host, **level, **option), logits, data)
            added.append([x - y for x, y in zip(with_it[:2], without[:2], strict=True)])
        assert_same(*added)
        assert added[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("token_level", [False, True])
def test_policy_term_is_ours(host, token_level):
    check_policy_term(host, token_level)


@pytest.mark.parametrize("token_level", [False, True])
def test_other_terms_are_the_hosts(host, token_level):
    check_other_terms(host, token_level, KL, NLL, {**KL, **NLL})


def check_parts(host):
    """Rows one by one, as the packed wrapper takes them: their numbers add up to the batch's."""
    logits, data = a_batch()
    loss_fn = sapo(host, token_level_loss=False, **KL, **TIS)
    whole = evaluate(loss_fn, logits, data)
    logprob = next_logprobs(logits, data["input_ids"])
    total, parts = 0.0, []
    for i, length in enumerate(LENGTHS):
        row = {
            name: x[i : i + 1, :length] if x.ndim > 1 else x[i : i + 1] for name, x in data.items()
        }
        loss, metrics = loss_fn(logprob[i : i + 1, : length - 1], row, *counts(data))
        total += loss
        parts.append(metrics)
    assert_same((total.detach(), torch.autograd.grad(total, logits)[0]), whole)
    for name, value in whole[2].items():
        values = [part[name] for part in parts]
        combine = min if name.endswith("_min") else max if name.endswith("_max") else sum
        assert combine(values) == pytest.approx(value, rel=1e-6, abs=1e-9), name


def check_metrics(host):
    logits, data = a_batch()
    loss_fn = sapo(host, token_level_loss=False)
    _, _, metrics = evaluate(loss_fn, logits, data)
    mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).bool()
    z = next_logprobs(logits, data["input_ids"]).detach() - data["prev_logprobs"][:, 1:]
    found = measure_rows(Ratio.of(z, data["advantages"][:, 1:], mask), ALGORITHM.temperatures)
    for name in (*PER_TOKEN, *PER_SEQUENCE):
        part = found.means[name]
        assert metrics[name] == pytest.approx(float(part.total / part.count)), name
    assert metrics["ratio/log_mean"] == pytest.approx(float(z[mask].mean()))
    assert metrics["probs_ratio"] == pytest.approx(float(z[mask].exp().mean()))
    assert metrics["probs_ratio_max"] == pytest.approx(float(z[mask].exp().max()))
    assert metrics["sapo/bound_violations"] == 0
    assert not any("clamped" in name for name in metrics)
    kinds = {name: kind.value for name, kind in loss_fn.metric_normalizations.items()}
    assert kinds["ratio/log_mean"] == "tokens"
    assert kinds["sapo/bound_lhs"] == "sequences"
    assert kinds["sapo/bound_violations"] == "none"


def check_garbage(host):
    logits, data = a_batch()
    clean = evaluate(sapo(host), logits, data)
    off = data["token_mask"] * data["sample_mask"][:, None] == 0
    logprob = next_logprobs(logits, data["input_ids"]).detach()
    filtered = torch.where(off[:, 1:], -math.inf, logprob).requires_grad_()
    loss, _ = sapo(host)(filtered, data, *counts(data))
    torch.testing.assert_close(loss.detach(), clean[0], rtol=1e-12, atol=0)
    assert torch.autograd.grad(loss, filtered)[0].isfinite().all()
    for name in ("prev_logprobs", "generation_logprobs", "advantages"):
        data[name][off] = math.nan
    spoilt = evaluate(sapo(host), logits, {**data, "advantages": data["advantages"]})
    assert_same(spoilt, clean, rtol=1e-12)
    data["prev_logprobs"][0] -= 300
    data["prev_logprobs"][1] += 300
    loss, grad, _ = evaluate(sapo(host), logits, data)
    assert loss.isfinite()
    assert grad.isfinite().all()


def check_no_valid_token(host):
    logits, data = a_batch()
    data["sample_mask"].zero_()
    one = torch.ones(())
    loss, metrics = sapo(host)(next_logprobs(logits, data["input_ids"]), data, one, one)
    assert loss == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()
    assert math.isinf(metrics["probs_ratio_min"])
    assert metrics["ratio/log_square"] == 0


def check_pickle(host):
    logits, data = a_batch()
    loss_fn = sapo(host, **TIS)
    copied = pickle.loads(pickle.dumps(loss_fn))
    assert_same(evaluate(copied, logits, data), evaluate(loss_fn, logits, data), rtol=0)
    host_loss = grpo(host)
    for name in ("loss_type", "input_type", "use_fused_linear_logprobs"):
        assert getattr(copied, name) == getattr(host_loss, name)
    assert sapo(host, **KL).reference_policy_kl_penalty == KL["reference_policy_kl_penalty"]


CHECKS = (check_parts, check_metrics, check_garbage, check_no_valid_token, check_pickle)


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_stand_in(host, check):
    check(host)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"disable_ppo_ratio": True}, "loss_fn.disable_ppo_ratio: expected False .* got True"),
        ({"use_cispo": True}, "loss_fn.use_cispo: expected False"),
        ({"sequence_level_importance_ratios": True}, "loss_fn.sequence_level_importance_ratios"),
        ({"ratio_clip_c": 3.0}, "loss_fn.ratio_clip_c: expected None .* got 3.0"),
    ],
)
def test_refuses(host, changed, message):
    with pytest.raises(UserError, match=message):
        sapo(host, **changed)


def test_refuses_temperatures(host):
    cfg = host.ClippedPGLossConfig()
    with pytest.raises(ValueError, match="tau_neg: expected a finite number > 0, got 0"):
        nemo_rl.SapoLoss(cfg, algorithm=AlgorithmConfig(tau_neg=0))


def a_config(host, **changed):
    return SimpleNamespace(loss_fn=host.ClippedPGLossConfig(**changed))


def test_setup_hands_out_sapo(host):
    nemo_rl.install(ALGORITHM)
    nemo_rl.install(ALGORITHM)
    parts = host.setup(a_config(host, token_level_loss=False), None, None, val_dataset=None)
    _, _, loss_fn, logger, _ = parts
    assert isinstance(loss_fn, nemo_rl.SapoLoss)
    assert loss_fn.use_fused_linear_logprobs
    assert loss_fn.temperatures == ALGORITHM.temperatures
    logger.log_metrics({"ratio/log_mean": 0.5, "ratio/log_square": 1.25}, 3, prefix="train")
    logger.log_metrics({"reward": 1.0}, 3, prefix="train")
    (first, step, prefix), (second, _, _) = logger.logged
    assert (first["ratio/log_var"], step, prefix) == (1.0, 3, "train")
    assert second == {"reward": 1.0}
    nemo_rl.uninstall()
    nemo_rl.uninstall()
    assert isinstance(host.setup(a_config(host), None, None, None)[2], host.ClippedPGLossFn)


def test_setup_refuses_before_it_starts_anything(host, monkeypatch):
    monkeypatch.setattr(host, "Logger", lambda: pytest.fail("started"))
    nemo_rl.install(ALGORITHM)
    with pytest.raises(UserError, match="use_cispo"):
        host.setup(a_config(host, use_cispo=True), None, None, None)


def test_a_token_mean_is_said(host, caplog):
    nemo_rl.install(ALGORITHM)
    host.setup(a_config(host), None, None, None)
    assert "token_level_loss is on" in caplog.text


def test_a_loss_from_elsewhere_is_refused(host):
    nemo_rl.install(ALGORITHM)
    with pytest.raises(UserError, match="expected a script that takes its loss from"):
        grpo(host)
    nemo_rl.uninstall()
    grpo(host)


def test_a_setup_that_returns_no_loss(host, monkeypatch):
    monkeypatch.setattr(host, "ClippedPGLossFn", lambda *args, **kwargs: None)
    nemo_rl.install(ALGORITHM)
    with pytest.raises(UserError, match="expected one ClippedPGLossFn"):
        host.setup(a_config(host), None, None, None)


def test_grpo_is_untouched(host):
    logits, data = a_batch()
    before = evaluate(grpo(host), logits, data)
    nemo_rl.install(ALGORITHM)
    evaluate(sapo(host), logits, data)
    nemo_rl.uninstall()
    assert_same(evaluate(grpo(host), logits, data), before, rtol=0)


def test_another_version_or_symbol(host, monkeypatch):
    monkeypatch.setattr(sys.modules["nemo_rl"], "__version__", "0.5.0+abc")
    with pytest.raises(UserError, match=r"NeMo-RL: expected 0.6.0 or later, got 0.5.0"):
        nemo_rl.install(ALGORITHM)
    monkeypatch.setattr(sys.modules["nemo_rl"], "__version__", "0.6.0")
    monkeypatch.setattr(host, "setup", lambda master_config: ())
    with pytest.raises(UserError, match=r"grpo.setup: expected the parameters \(master_config,"):
        nemo_rl.install(ALGORITHM)
    monkeypatch.delattr(host, "setup")
    with pytest.raises(UserError, match=r"grpo.setup: expected it in NeMo-RL"):
        nemo_rl.install(ALGORITHM)


# The host itself.

BESIDE_THE_LOSS = (
    "aiohttp",
    "datasets",
    "fastapi",
    "hydra",
    "mlflow",
    "pandas",
    "prometheus_client",
    "pynvml",
    "ray",
    "scipy",
    "soundfile",
    "swanlab",
    "tensordict",
    "torchdata",
    "uvicorn",
    "zmq",
)
"""Packages that NeMo-RL imports on the way to its losses and its ``setup``."""


def start_real(path):
    sys.path.insert(0, path)
    absent.stand_in_for(BESIDE_THE_LOSS)
    os.environ["NO_VCS_VERSION"] = "1"
    # It wants Python 3.13, whose TypedDict pydantic takes.
    typing.TypedDict = typing_extensions.TypedDict
    loss = importlib.import_module("nemo_rl.algorithms.loss")
    assert loss.__file__.startswith(path)
    return loss


def real_checks(path):
    host = start_real(path)
    for token_level in (False, True):
        check_policy_term(host, token_level)
        check_other_terms(
            host,
            token_level,
            KL,
            NLL,
            {**KL, "reference_policy_kl_type": "k2"},
            {**KL, "use_on_policy_kl_approximation": True},
            {**KL, "kl_input_clamp_value": 0.3, "kl_output_clamp_value": None},
        )
    for check in CHECKS:
        check(host)
    check_corrections(host)
    check_packing(host)
    check_install(host)


def check_corrections(host):
    """Each importance-sampling correction weighs our token losses as it weighs the host's.

    At a clip range and advantages at which the clipped loss is linear, -A r, and with a gate that
    is nearly linear (f(r) ~ 2 / tau + r - 1 for a small tau), the two losses differ by the weighted
    mean of -A (2 / tau - 1), which has no gradient.
    """
    logits, data = a_batch()
    kinds = [
        {**TIS, "truncated_importance_sampling_ratio_min": 0.9},
        {**TIS, "truncated_importance_sampling_type": "icepop"},
        {**TIS, "truncated_importance_sampling_type": "seq-mask-tis"},
        {"use_importance_sampling_correction": True},
    ]
    small = AlgorithmConfig(tau_pos=1e-4, tau_neg=1e-4)
    for kind, token_level in itertools.product(kinds, (False, True)):
        if "truncated_importance_sampling_type" in kind:
            kind = {"truncated_importance_sampling_ratio_min": 0.8, **kind}
        wide = {"ratio_clip_min": 100.0, "ratio_clip_max": 100.0}
        cfg = host.ClippedPGLossConfig(**BARE, **kind, **wide, token_level_loss=token_level)
        theirs = evaluate(host.ClippedPGLossFn(cfg), logits, data)
        found = evaluate(nemo_rl.SapoLoss(cfg, algorithm=small), logits, data)
        torch.testing.assert_close(found[1], theirs[1], rtol=1e-6, atol=1e-9)
        if "truncated_importance_sampling_type" in kind:
            assert found[2]["is_oob_ratio"] == theirs[2]["is_oob_ratio"]
        assert theirs[1].abs().max() > 1e-3


def check_packing(host):
    """Through the host's own preparation and packed wrapper, and its driver's reduction."""
    from nemo_rl.algorithms.single_controller_utils.utils import aggregate_step_metrics
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    torch.Tensor.cuda = lambda self: self  # its preparation moves token ids to a GPU
    logits, data = a_batch(torch.float32)
    loss_fn = sapo(host, token_level_loss=False, **KL, **TIS)
    loss, metrics = host.wrap_loss_fn_with_input_preparation(
        logits, BatchedDataDict(data), *counts(data), loss_fn, host.prepare_loss_input
    )
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    packed = torch.cat([rows[:n] for rows, n in zip(logits, LENGTHS, strict=True)])[None]
    wrapper = host.SequencePackingLossWrapper(loss_fn, host.prepare_loss_input, bounds)
    packed_loss, packed_metrics = wrapper(packed, BatchedDataDict(data), *counts(data))
    grads = [torch.autograd.grad(x, logits)[0] for x in (loss, packed_loss)]
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)
    reduced = [
        aggregate_step_metrics({"all_mb_metrics": {name: [x] for name, x in of.items()}})
        for of in (metrics, packed_metrics)
    ]
    for name, value in reduced[0].items():
        assert reduced[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def check_install(host):
    grpo_module = importlib.import_module("nemo_rl.algorithms.grpo")
    replace.check(nemo_rl.HOST)
    original = grpo_module.setup
    nemo_rl.install(ALGORITHM)
    nemo_rl.install(ALGORITHM)
    assert grpo_module.setup is not original
    with pytest.raises(UserError, match="expected a script that takes its loss from"):
        grpo(host)
    with pytest.raises(UserError, match="use_cispo"):
        grpo_module.setup(a_config(host, use_cispo=True), None, None, None)
    sapo(host)
    nemo_rl.uninstall()
    assert grpo_module.setup is original
    grpo(host)


def test_real_host():
    path = os.environ.get("SAPO_NEMO_RL")
    if path is None:
        pytest.skip("SAPO_NEMO_RL names no checkout of NeMo-RL")
    gloo.run_ranks(1, real_checks, path)
