"""What a probe says of servers: real policies, and a server that is written from the definition."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sapo_megatron.errors import RunFailed
from sapo_megatron.policy import parallel, weights
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import load
from sapo_megatron.training import engine as engines
from sapo_megatron.training.engine import open_engine
from sapo_megatron.training.inputs import read_inputs
from tests.support import reference
from tests.support.fakevllm import FakeVllm
from tests.support.gloo import run_ranks
from tests.support.tiny import ARCH, write_recipe

ROLLOUT = {"engine": "vllm", "max_response_length": 40, "servers": ["http://unread"]}
EXPERTS = "model.layers.1.mlp.experts."
LAYOUTS = [
    {},  # two ranks that are data parallel
    {"context_parallel_size": 2},
    {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
]


def untouched(state):
    pass


def noisy(state):
    """The experts of one layer, with noise of 30 percent."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(state.items()):
        if name.startswith(EXPERTS):
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)


def permuted(state):
    """The experts of one layer, each in the place of the one before it."""
    moved = {}
    for name, weight in state.items():
        if name.startswith(EXPERTS):
            expert, rest = name.removeprefix(EXPERTS).split(".", 1)
            moved[f"{EXPERTS}{(int(expert) - 1) % ARCH['num_experts']}.{rest}"] = weight
    state.update(moved)


CASES = [
    (dtype, change)
    for dtype in (torch.bfloat16, torch.float32)
    for change in (untouched, noisy, permuted)
]


def read(folder):
    files = Path(folder).glob("*.safetensors")
    return {name: x.float() for file in files for name, x in load_file(file).items()}


def logprobs_of(state, tokens):
    """Those of ``tokens[1:]``, by the definition of the model."""
    ids = torch.tensor(tokens)
    logits, _ = reference.forward(state, ARCH, ids)
    return logits[:-1].float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0].tolist()


def computing(dtype, change):
    """A server's answers: with the weights that it was sent, after ``change``, in ``dtype``."""
    state = {}

    def answer(path, body, own):
        if body.get("method") == "sapo_load":
            state.update(read(body["args"][0]))
            change(state)
            state.update({name: weight.to(dtype) for name, weight in state.items()})
        if "prompt_logprobs" not in body:
            return own()
        tokens = body["prompt"]
        found = zip(tokens[1:], logprobs_of(state, tokens), strict=True)
        entries = [None, *({token: {"logprob": x}} for token, x in found)]
        return 200, {"choices": [{"prompt_logprobs": entries}]}

    return answer


def opened(folder, *, layout=None, dtype="float32", **rollout):
    """Recipe, inputs and policy on this rank, the same random weights each time."""
    if dist.get_rank() == 0:
        write_recipe(
            folder,
            model={"params_dtype": dtype},
            parallel=layout or {},
            rollout=ROLLOUT | rollout,
            eval={"num_problems": 9, "k": 1},
        )
    dist.barrier()
    recipe = load(folder / "recipe.yaml")
    groups = parallel.setup(recipe.parallel, seed=1)
    inputs = read_inputs(recipe, dist.get_world_size())
    start = folder / "weights"
    if dist.get_rank() == 0:
        weights.save_random(inputs.arch, recipe.model, start, seed=3)
    dist.barrier()
    return (
        recipe,
        inputs,
        Policy(recipe, inputs.arch, groups, start, optimizer=recipe.optimizer, total_updates=1),
    )


def differences(folder, dtype):
    """By case: the difference at the first load, or what ends the run."""
    found = []
    with FakeVllm() as server:
        server.description["max_model_len"] = 56
        recipe, inputs, policy = opened(folder, dtype=dtype, servers=[server.url])
        with closing(policy):
            for case in CASES:
                server.fault = computing(*case)
                with open_engine(recipe, inputs, policy, folder, None) as engine:
                    try:
                        with engine.serving(version=0, record=False) as metrics:
                            found.append(metrics.values()["rollout/probe_diff"])
                    except RunFailed as error:
                        found.append(str(error))
    return dict(zip(CASES, found, strict=True))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By dtype of the policy."""
    return {
        dtype: run_ranks(1, differences, tmp_path_factory.mktemp(dtype), dtype)[0]
        for dtype in ("bfloat16", "float32")
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_to_bfloat16_passes(found, dtype):
    """Where both engines round, and where one of them does."""
    assert 1e-3 < found["bfloat16"][dtype, untouched] < 0.03


def test_in_float32_nothing_but_the_last_digits_differs(found):
    assert found["float32"][torch.float32, untouched] < 1e-5


@pytest.mark.parametrize("params_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("change", [noisy, permuted])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wrong_experts_in_one_layer_are_refused(found, params_dtype, change, dtype):
    tolerance = {"bfloat16": 0.1, "float32": 0.001}[params_dtype]
    expected = f"a probe to {tolerance} nats per token after new weights, got a difference of 0."
    assert expected in str(found[params_dtype][dtype, change])


def test_a_server_that_rounds_where_the_training_engine_does_not_is_refused(found):
    assert "look at its log, --dtype" in str(found["float32"][torch.bfloat16, untouched])


def probed(folder):
    """By layout: the probe on this rank, its log-probs, and the weights.

    The second rank draws other tokens, as one may that rounds otherwise.
    """
    generate = engines.generate

    def drawn(*args, **options):
        samples = generate(*args, **options)
        for sample in samples:
            sample.response_tokens[0] ^= dist.get_rank()
        return samples

    engines.generate = drawn
    found = []
    for layout in LAYOUTS:
        recipe, inputs, policy = opened(folder, layout=layout, temperature=0.7)
        with closing(policy):
            samples = engines._probe_samples(recipe, inputs, policy)
            logprobs = policy.logprobs(samples, policy.groups.micro_batching(recipe))
        found.append(([(s.prompt_tokens, s.response_tokens) for s in samples], logprobs))
        parallel.teardown()
        dist.barrier()
    return found, read(folder / "weights")


def test_every_rank_of_every_layout_has_the_same_probe(tmp_path):
    (found, state), (others, _) = run_ranks(2, probed, tmp_path)
    assert found == others
    texts, _ = found[0]
    assert len(texts) == 8
    assert max(len(response) for _, response in texts) == 32
    expected = [
        logprob
        for prompt, response in texts
        for logprob in logprobs_of(state, [*prompt, *response])[-len(response) :]
    ]
    for each, logprobs in found:
        assert each == texts
        assert logprobs == pytest.approx(expected, abs=1e-4)
