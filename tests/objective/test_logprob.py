"""Log-probs and entropies against plain torch on the whole vocabulary, values and gradients."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.objective.logprob import linear_logprobs, vocab_parallel_logprobs
from tests.support.gloo import run_ranks

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def reference(logits, targets, temperature=1.0):
    """The definition, on the whole vocabulary; 0 log 0 = 0 where a logit is -inf."""
    logprobs = (logits / temperature).log_softmax(-1)
    picked = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    finite = logprobs.masked_fill(logits.detach() == -torch.inf, 0.0)
    return picked, -(logprobs.exp() * finite).sum(-1)


def draw(*shape, vocab, dtype=torch.float64, seed=0, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocab, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(vocab, shape, generator=generator)
    g, h = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return logits.to(dtype), targets, g, h


def backward(logprobs, entropy, g, h, inputs):
    loss = (logprobs * g).sum()
    return torch.autograd.grad(loss if entropy is None else loss + (entropy * h).sum(), inputs)


def assert_close(got, want, tolerance):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_against_plain_torch(dtype, inplace, chunk_size, with_entropy):
    logits, targets, g, h = draw(7, 2, vocab=37, dtype=dtype)
    exact = logits.double().clone().requires_grad_()
    want = reference(exact, targets, 0.7)
    (want_grad,) = backward(want[0], want[1] if with_entropy else None, g, h, exact)
    logits.requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        logits,
        targets,
        temperature=0.7,
        with_entropy=with_entropy,
        chunk_size=chunk_size,
        inplace=inplace,
    )
    assert logprobs.dtype is dtype
    assert_close(logprobs, want[0], TOLERANCE[dtype])
    if with_entropy:
        assert_close(entropy, want[1], TOLERANCE[dtype])
    else:
        assert entropy is None
    before = logits.detach().clone()
    (grad,) = backward(logprobs, entropy, g, h, logits)
    assert_close(grad, want_grad, TOLERANCE[dtype])
    assert (grad.data_ptr() == logits.data_ptr()) is inplace
    assert torch.equal(logits, before) is not inplace


def test_bf16_is_computed_in_fp32_and_rounded_once():
    logits, targets, g, h = draw(64, vocab=1000, dtype=torch.bfloat16)
    exact = logits.double().requires_grad_()
    want = reference(exact, targets)
    (want_grad,) = backward(*want, g, h, exact)
    logprobs, entropy = vocab_parallel_logprobs(
        logits.requires_grad_(), targets, with_entropy=True, chunk_size=5
    )
    assert logprobs.dtype is torch.float32
    assert_close(logprobs, want[0], 1e-5)
    assert_close(entropy, want[1], 1e-5)
    (grad,) = backward(logprobs, entropy, g, h, logits)
    assert grad.dtype is torch.bfloat16
    assert ((grad - want_grad).abs() <= 2**-8 * want_grad.abs() + 1e-6).all()


def test_entropy_alone_carries_gradient():
    logits, targets, _, h = draw(5, vocab=11)
    exact = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad((reference(exact, targets)[1] * h).sum(), exact)
    logits.requires_grad_()
    _, entropy = vocab_parallel_logprobs(logits, targets, with_entropy=True)
    (grad,) = torch.autograd.grad((entropy * h).sum(), logits)
    assert_close(grad, want, 1e-12)


def test_gradcheck():
    logits, targets, _, _ = draw(3, vocab=5)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_logprobs(
            x, targets, temperature=1.3, with_entropy=True, chunk_size=2, inplace=False
        ),
        logits.requires_grad_(),
    )


@given(
    tokens=st.integers(0, 9),
    vocab=st.integers(1, 40),
    chunk_size=st.none() | st.integers(1, 12),
    temperature=st.floats(0.2, 5.0),
    offset=st.floats(-500, 500),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_properties(tokens, vocab, chunk_size, temperature, offset, seed):
    logits, targets, _, _ = draw(tokens, vocab=vocab, seed=seed)
    logits = (logits + offset).requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        logits,
        targets,
        temperature=temperature,
        with_entropy=True,
        chunk_size=chunk_size,
        inplace=False,
    )
    want_logprobs, want_entropy = reference(logits, targets, temperature)
    assert_close(logprobs, want_logprobs, 1e-11)
    assert_close(entropy, want_entropy, 1e-11)
    assert (logprobs <= 1e-12).all()
    (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    # Log-prob and entropy do not move when all logits do.
    assert_close(grad.sum(-1), torch.zeros(tokens), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lowest", [-torch.inf, "min"])
def test_impossible_tokens_give_no_nan(dtype, lowest):
    lowest = torch.finfo(dtype).min if lowest == "min" else lowest
    logits, targets, g, h = draw(6, vocab=20, dtype=dtype)
    banned = torch.zeros_like(logits, dtype=torch.bool)
    banned[:, 15:] = True
    targets %= 15
    logits[banned] = lowest
    few = logits[:, :15].double().requires_grad_()
    want = reference(few, targets)
    (want_grad,) = backward(*want, g, h, few)
    logprobs, entropy = vocab_parallel_logprobs(logits.requires_grad_(), targets, with_entropy=True)
    (grad,) = backward(logprobs, entropy, g, h, logits)
    assert_close(logprobs, want[0], TOLERANCE[dtype])
    assert_close(entropy, want[1], TOLERANCE[dtype])
    assert_close(grad[:, :15], want_grad, TOLERANCE[dtype])
    assert not grad[banned].any()


def test_padded_columns_have_no_probability():
    logits, targets, g, h = draw(6, vocab=20)
    targets %= 15
    few = logits[:, :15].clone().requires_grad_()
    want = reference(few, targets)
    (want_grad,) = backward(*want, g, h, few)
    logits[:, 15:] = torch.nan
    logprobs, entropy = vocab_parallel_logprobs(
        logits.requires_grad_(), targets, with_entropy=True, vocab_size=15
    )
    assert_close(logprobs, want[0], 1e-12)
    (grad,) = backward(logprobs, entropy, g, h, logits)
    assert_close(grad[:, :15], want_grad, 1e-12)
    assert not grad[:, 15:].any()


def test_ignored_targets_are_finite():
    logits, _, _, _ = draw(2, vocab=5)
    logprobs, _ = vocab_parallel_logprobs(logits.requires_grad_(), torch.tensor([-100, 5]))
    (grad,) = torch.autograd.grad((logprobs * torch.tensor([0.0, 0.0])).sum(), logits)
    assert logprobs.isfinite().all()
    assert not grad.any()


def test_no_grad_leaves_the_logits_alone():
    logits, targets, _, _ = draw(6, vocab=20)
    before = logits.clone()
    with torch.no_grad():
        logprobs, entropy = vocab_parallel_logprobs(logits, targets, with_entropy=True)
    assert not logprobs.requires_grad
    assert not entropy.requires_grad
    assert torch.equal(logits, before)


def test_second_backward_through_a_consumed_buffer_is_an_error():
    logits, targets, _, _ = draw(3, vocab=5)
    logprobs, _ = vocab_parallel_logprobs(logits.requires_grad_(), targets)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="pass inplace=False to keep them"):
        logprobs.sum().backward()
    logprobs, _ = vocab_parallel_logprobs(logits, targets, inplace=False)
    first, second = (
        torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_logits_changed_before_backward_are_an_error():
    logits, targets, _, _ = draw(3, vocab=5)
    buffer = logits.requires_grad_() * 1
    logprobs, _ = vocab_parallel_logprobs(buffer, targets)
    buffer.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets: expected shape"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
        ({"temperature": torch.inf}, "temperature"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"vocab_size": 6}, "vocab_size: expected 1 to 5"),
        ({"logits": torch.zeros(5, 3).t()}, "contiguous .* pass inplace=False"),
    ],
)
def test_bad_input(change, message):
    arguments = {"logits": torch.zeros(3, 5), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs(**arguments | change)


def test_linear_bad_shapes():
    with pytest.raises(ValueError, match=r"got \[3, 4\] and \[5, 6\]"):
        linear_logprobs(torch.zeros(3, 4), torch.zeros(5, 6), torch.zeros(3, dtype=torch.int64))


def draw_linear(tokens, size, vocab, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, size, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), *draw(tokens, vocab=vocab, seed=seed)[1:]


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_linear_against_plain_torch(chunk_size, with_entropy):
    hidden, weight, targets, g, h = draw_linear(6, 4, 29)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    want = reference(hidden @ weight.t(), targets, 1.7)
    want_grads = backward(want[0], want[1] if with_entropy else None, g, h, inputs)
    got = linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=1.7,
        with_entropy=with_entropy,
        chunk_size=chunk_size,
    )
    assert_close(got[0], want[0], 1e-12)
    for grad, want_grad in zip(backward(*got, g, h, inputs), want_grads, strict=True):
        assert_close(grad, want_grad, 1e-12)


def test_linear_bf16_equals_the_unfused_path():
    hidden, weight, targets, g, h = draw_linear(32, 16, 500, torch.bfloat16)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    unfused = vocab_parallel_logprobs(hidden @ weight.t(), targets, with_entropy=True)
    fused = linear_logprobs(hidden, weight, targets, with_entropy=True, chunk_size=7)
    assert_close(fused[0], unfused[0], 1e-5)
    assert_close(fused[1], unfused[1], 1e-5)
    grads = backward(*fused, g, h, inputs), backward(*unfused, g, h, inputs)
    for grad, want in zip(*grads, strict=True):
        assert grad.dtype is torch.bfloat16
        assert (grad - want).norm() <= 4e-3 * want.norm()


def test_linear_frozen_weight():
    hidden, weight, targets, _, _ = draw_linear(6, 4, 29)
    logprobs, _ = linear_logprobs(hidden.requires_grad_(), weight, targets)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def _shard_of(x, columns, rank):
    """Columns of this rank's shard, padded with what must never be read as a logit."""
    shard = x.new_full((*x.shape[:-1], columns), 50.0)
    mine = x[..., rank * columns : (rank + 1) * columns]
    shard[..., : mine.shape[-1]] = mine
    return shard


def _total(*differences):
    """Sum of all absolute values: NaN where there is one, as a maximum would not be."""
    return sum(difference.detach().abs().sum().item() for difference in differences)


def _on_a_tensor_parallel_rank():
    """Absolute errors of values and gradients, by case."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    errors = {}
    # 12 columns over the ranks; padded; and a last rank that holds nothing but padding.
    for vocab, columns in ((12, 12 // ranks), (10, 12 // ranks), (3, 2)):
        logits, targets, g, h = draw(6, vocab=vocab, seed=vocab)
        logits[0] *= 40
        full = logits.clone().requires_grad_()
        want = reference(full, targets, 0.8)
        (want_grad,) = backward(*want, g, h, full)
        shard = _shard_of(logits, columns, rank).requires_grad_()
        got = vocab_parallel_logprobs(
            shard,
            targets,
            group,
            temperature=0.8,
            with_entropy=True,
            chunk_size=4,
            vocab_size=vocab,
        )
        (grad,) = backward(*got, g, h, shard)
        mine = want_grad[:, rank * columns : (rank + 1) * columns]
        errors[f"logits {vocab}"] = _total(
            got[0] - want[0],
            got[1] - want[1],
            grad[:, : mine.shape[1]] - mine,
            grad[:, mine.shape[1] :],
        )
        errors |= _linear_errors(vocab, columns, rank, ranks, group)
    return errors


def _linear_errors(vocab, columns, rank, ranks, group):
    errors = {}
    hidden, weight, targets, g, h = draw_linear(6, 4, vocab, seed=vocab)
    full = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    want = reference(full[0] @ full[1].t(), targets)
    want_hidden, want_weight = backward(*want, g, h, full)
    for sequence_parallel in (False, True):
        per_rank = 6 // ranks if sequence_parallel else 6
        tokens = slice(rank * per_rank, (rank + 1) * per_rank) if sequence_parallel else slice(6)
        mine = hidden[tokens].clone().requires_grad_()
        shard = _shard_of(weight.t(), columns, rank).t().contiguous().requires_grad_()
        got = linear_logprobs(
            mine,
            shard,
            targets,
            group,
            sequence_parallel=sequence_parallel,
            with_entropy=True,
            chunk_size=2,
            vocab_size=vocab,
        )
        grad_hidden, grad_weight = backward(*got, g, h, (mine, shard))
        rows = want_weight[rank * columns : (rank + 1) * columns]
        errors[f"linear {vocab} {sequence_parallel}"] = _total(
            got[0] - want[0],
            got[1] - want[1],
            grad_hidden - want_hidden[tokens],
            grad_weight[: len(rows)] - rows,
            grad_weight[len(rows) :],
        )
    return errors


@pytest.mark.parametrize("ranks", [2, 3])
def test_tensor_parallel(ranks):
    for errors in run_ranks(ranks, _on_a_tensor_parallel_rank):
        assert all(error < 1e-12 for error in errors.values()), errors
