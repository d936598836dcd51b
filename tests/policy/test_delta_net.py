"""Gated DeltaNet: the rule by chunks against the rule by tokens, and its layer on one process.

`test_matrix.py` has the layer in every layout, `test_families.py` against transformers. Where
megatron-core's own module packs sequences, it is compared as well, on stand-ins for its kernels.
"""

import itertools
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import gated_delta_net as upstream
from megatron.core.transformer.spec_utils import ModuleSpec
from safetensors.torch import load_file

from sapo_megatron.errors import UserError
from sapo_megatron.hf.architecture import parse_architecture
from sapo_megatron.policy import cpu, delta_net, spec
from sapo_megatron.policy.delta_net import KernelGatedDeltaNet, PlainNorm, TorchGatedDeltaNet
from sapo_megatron.policy.delta_rule import causal_convolution, gated_delta_rule
from sapo_megatron.policy.layers import RMSNorm
from sapo_megatron.policy.spec import transformer_config
from sapo_megatron.recipe.schema import ModelConfig, ParallelConfig
from tests.support.families import Place, make_model, measure
from tests.support.gloo import run_ranks
from tests.support.minibatches import MODELS

PACKS = hasattr(upstream.GatedDeltaNet, "_resolve_cu_seqlens")
"""Whether this release's own module takes packed sequences."""


def by_token(query, key, value, decay, beta, state=None):
    """What the rule says, a token after the other."""
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    if state is None:
        state = query.new_zeros(len(query), *key.shape[2:], value.shape[-1])
    outputs = []
    for t in range(query.shape[1]):
        state = state * decay[:, t, :, None, None].exp()
        lacking = value[:, t] - torch.einsum("bnkv,bnk->bnv", state, key[:, t])
        written = beta[:, t, :, None] * lacking
        state = state + torch.einsum("bnk,bnv->bnkv", key[:, t], written)
        outputs.append(torch.einsum("bnkv,bnk->bnv", state, query[:, t]) * key.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state


def inputs(length, dtype=torch.float64, fade=1.0):
    generator = torch.Generator().manual_seed(length)

    def draw(*size):
        return torch.randn(2, length, 3, *size, generator=generator, dtype=dtype)

    found = [draw(4), draw(4), draw(5), -fade * draw().exp(), draw().sigmoid()]
    return [x.requires_grad_() for x in found]


@pytest.mark.parametrize("length", [1, 7, 64, 77])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_chunks_are_exact(length, chunk_size):
    given = inputs(length)
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for before in (None, state):
        mine = gated_delta_rule(*given, state=before, chunk_size=chunk_size)
        exact = by_token(*given, state=before)
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-13)
        leaves = given if before is None else [*given, state]
        got, expected = (
            torch.autograd.grad(out.square().sum() + (last * 0.3).sum(), leaves)
            for out, last in (mine, exact)
        )
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_what_fades_at_once_has_finite_gradients():
    """In fp32 the decay over a chunk is e^-2000, and its inverse no number at all."""
    given = inputs(64, torch.float32, fade=30.0)
    out, state = gated_delta_rule(*given)
    expected = by_token(*given)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)
    for gradient in torch.autograd.grad(out.sum() + state.sum(), given):
        assert torch.isfinite(gradient).all()


def test_a_convolution_goes_on_where_it_was():
    x, weight = torch.randn(2, 9, 6), torch.randn(6, 1, 4)
    whole = causal_convolution(x, weight)
    second = causal_convolution(x[:, 5:], weight, x[:, 2:5])
    torch.testing.assert_close(torch.cat((causal_convolution(x[:, :5], weight), second), 1), whole)
    alone = F.silu(sum(weight[:, 0, 3 - back] * x[:, 4 - back] for back in range(4)))
    torch.testing.assert_close(whole[:, 4], alone)


# The layer


class _Alone:
    def size(self):
        return 1

    def rank(self):
        return 0


class _Linear(torch.nn.Module):
    def __init__(self, width, height, *, config, **_):
        super().__init__()
        weight = torch.randn(height, width, dtype=config.params_dtype) / width**0.5
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        return F.linear(x, self.weight), None


def make_layer(kind=TorchGatedDeltaNet, dtype="float64"):
    cpu.enable()
    arch = parse_architecture(MODELS["hybrid"])
    config = transformer_config(arch, ModelConfig(path="x", params_dtype=dtype), ParallelConfig())
    config.perform_initialization = False
    torch.manual_seed(3)
    submodules = upstream.GatedDeltaNetSubmodules(
        in_proj=_Linear, out_norm=ModuleSpec(PlainNorm, {"norm": RMSNorm}), out_proj=_Linear
    )
    groups = SimpleNamespace(tp=_Alone(), cp=_Alone())
    layer = kind(config, submodules, 1, pg_collection=groups)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return layer


def packed(bounds):
    bounds = torch.tensor(bounds, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)


BOUNDS = [0, 5, 6, 80, 82]


def test_no_state_crosses_from_a_sequence_to_the_next():
    layer, x = make_layer(), torch.randn(82, 1, 32, dtype=torch.float64, requires_grad=True)
    got, _ = layer(x, packed_seq_params=packed(BOUNDS))
    parts = [layer(x[a:b])[0] for a, b in itertools.pairwise(BOUNDS)]
    expected = torch.cat(parts)
    torch.testing.assert_close(got, expected)
    upstream_gradient = torch.randn_like(got)
    leaves = [x, *layer.parameters()]
    got, expected = (
        torch.autograd.grad(y, leaves, upstream_gradient, retain_graph=True)
        for y in (got, expected)
    )
    torch.testing.assert_close(got, expected)
    assert all(gradient.any() for gradient in got)


def test_what_stands_behind_a_sequence_does_not_reach_it():
    layer, x = make_layer(), torch.randn(9, 2, 32, dtype=torch.float64)
    poisoned = x.clone()
    poisoned[6:, 0] = 1e6
    got, expected = layer(poisoned)[0], layer(x)[0]
    torch.testing.assert_close(got[:6], expected[:6])
    torch.testing.assert_close(got[:, 1], expected[:, 1])


@pytest.mark.parametrize("prompt", [1, 2, 70])
def test_token_by_token_is_the_whole(prompt):
    layer, x = make_layer(), torch.randn(75, 3, 32, dtype=torch.float64)
    context = SimpleNamespace(key_value_memory_dict={})
    found = [layer(x[:prompt], inference_context=context)[0]]
    found += [layer(x[t : t + 1], inference_context=context)[0] for t in range(prompt, 75)]
    torch.testing.assert_close(torch.cat(found), layer(x)[0])
    window, state = context.key_value_memory_dict[1]
    assert window.shape == (3, 3, 2 * 24 + 80), "however long the sequence"
    assert state.shape == (3, 8, 6, 10)


# On the kernels of megatron-core's module


def _rule(q, k, v, *, g, beta, cu_seqlens=None, **_):
    parts = [slice(None)] if cu_seqlens is None else itertools.starmap(slice, _pairs(cu_seqlens))
    outputs = [gated_delta_rule(*(x[:, part] for x in (q, k, v, g, beta)))[0] for part in parts]
    return torch.cat(outputs, 1), None


def _convolution(x, weight, *, cu_seqlens=None, **_):
    parts = [slice(None)] if cu_seqlens is None else itertools.starmap(slice, _pairs(cu_seqlens))
    return torch.cat([causal_convolution(x[:, part], weight[:, None]) for part in parts], 1), None


def _pairs(bounds):
    return itertools.pairwise(bounds.tolist())


@contextmanager
def standing_in():
    """flash-linear-attention's functions in torch, as megatron-core's module calls them."""
    from megatron.core.ssm.gated_delta_net import common, gdn

    patches = [
        mock.patch.object(common, "HAVE_FLA", True),
        mock.patch.object(common, "l2norm", lambda x: x),  # the rule above does it
        mock.patch.object(gdn, "chunk_gated_delta_rule", _rule),
        mock.patch.object(gdn, "causal_conv1d", _convolution),
        mock.patch.object(delta_net, "find_spec", lambda name: name),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


@pytest.mark.skipif(not PACKS, reason="of megatron-core 0.19")
def test_the_kernels_compute_the_same():
    with standing_in():
        kernels = make_layer(KernelGatedDeltaNet, "float32")
        mine, x = make_layer(dtype="float32"), torch.randn(82, 1, 32)
        names = dict(mine.named_parameters())
        assert {n: w.shape for n, w in kernels.named_parameters()} == {
            n: w.shape for n, w in names.items()
        }
        for n, weight in kernels.named_parameters():
            assert torch.equal(weight, names[n]), n
        for params in (None, packed(BOUNDS)):
            got, expected = (y(x, None, packed_seq_params=params)[0] for y in (kernels, mine))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        context = SimpleNamespace(key_value_memory_dict={})
        steps = [kernels(t[None], None, inference_context=context)[0] for t in x]
        torch.testing.assert_close(torch.cat(steps), mine(x)[0], rtol=1e-4, atol=1e-5)


def measure_on_kernels(place, model, out):
    def module(*, kernels):
        return delta_net.delta_net(kernels=True)

    with standing_in(), mock.patch.object(spec, "delta_net", module):
        return measure(place, model, out)


@pytest.mark.skipif(not PACKS, reason="of megatron-core 0.19")
def test_the_kernels_have_the_same_gradients_cut_over_ranks(tmp_path):
    place = Place(family="qwen3.5-moe", world=4, tp=2, cp=2)
    make_model(place.family, tmp_path / "model")
    folders = [tmp_path / "mine", tmp_path / "kernels"]
    for folder, function in zip(folders, (measure, measure_on_kernels), strict=True):
        folder.mkdir()
        run_ranks(4, function, place, tmp_path / "model", folder)
    mine, kernels = (
        {k: x for f in (o / "gradients").glob("*.safetensors") for k, x in load_file(f).items()}
        for o in folders
    )
    assert mine.keys() == kernels.keys()
    for name, gradient in mine.items():
        assert (kernels[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_without_kernels_it_is_said_in_a_line():
    with pytest.raises(UserError) as caught:
        delta_net.delta_net(kernels=True)
    part = "flash-linear-attention" if PACKS else "packs no sequences"
    assert part in str(caught.value)
    assert "model.layers" in str(caught.value)
    assert "\n" not in str(caught.value)
