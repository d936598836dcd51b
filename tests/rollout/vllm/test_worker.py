"""What the trainer adds to vLLM's workers, as far as it can be run without vLLM."""

from types import SimpleNamespace

import pytest
import torch

from sapo_megatron.rollout.vllm import worker
from sapo_megatron.rollout.vllm.answers import Description
from tests.support.fakevllm import DESCRIPTION

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.5, 0.5, 3.0]])


def spoil(logits):
    """What vLLM's top-p does to the tensor that it is given."""
    logits[logits < logits.max(dim=-1, keepdim=True).values] = -torch.inf


class FirstRunner:
    """The sampler of vLLM's model runner V1: its own log-probs come from what top-p leaves."""

    def __init__(self):
        self.logprobs_mode = "raw_logprobs"
        self.topk_topp_sampler = SimpleNamespace(
            forward=self.forward, logprobs_mode="processed_logprobs"
        )
        self.calls = 0

    def forward(self, logits, generators, k, p):
        self.calls += 1
        spoil(logits)
        return logits.argmax(dim=-1), logits.log_softmax(dim=-1)


class SecondRunner:
    """The sampler of model runner V2, which takes log-probs of the logits that it returns."""

    def __init__(self):
        self.logprobs_mode = "raw_logprobs"
        self.calls = 0

    def _sample_random(self, logits, *args):
        self.calls += 1
        spoil(logits)
        return logits.argmax(dim=-1), logits


def ready(sampler, times=1):
    for _ in range(times):
        worker._return_logprobs_before_top_p(sampler)
    assert sampler.logprobs_mode == "processed_logprobs"
    return sampler


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_runner_returns_log_probs_from_before_top_p(times):
    sampler = ready(FirstRunner(), times)
    sampled, logprobs = sampler.topk_topp_sampler.forward(LOGITS.clone(), {}, None, 0.5)
    assert sampled.tolist() == [0, 2]
    assert torch.equal(logprobs, LOGITS.log_softmax(dim=-1))
    assert sampler.topk_topp_sampler.logprobs_mode == "raw_logprobs"
    assert sampler.calls == 1


@pytest.mark.parametrize("times", [1, 2])
def test_the_second_runner_keeps_the_logits_from_before_top_p(times):
    sampler = ready(SecondRunner(), times)
    logits = LOGITS.clone()
    sampled, kept = sampler._sample_random(logits, None, 0.5)
    assert sampled.tolist() == [0, 2]
    assert torch.equal(kept, LOGITS)
    assert sampler.calls == 1


def made(sampler=None, **config):
    """A worker as vLLM makes one, with the extension mixed in."""
    wanted = DESCRIPTION | config
    served = worker.Worker()
    served.device = torch.device("cpu" if wanted["on_cpu"] else "cuda")
    served.model_runner = SimpleNamespace(**({} if sampler is None else {"sampler": sampler}))
    served.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(
                model_type=wanted["model_type"],
                num_hidden_layers=wanted["num_layers"],
                hidden_size=wanted["hidden_size"],
            ),
            get_vocab_size=lambda: wanted["vocab_size"],
            max_model_len=wanted["max_model_len"],
            generation_config=wanted["generation_config"],
            enable_sleep_mode=wanted["sleep_mode"],
            model_arch_config=SimpleNamespace(
                quantization_config={"quant_method": "fp8"} if wanted["quantized"] else None
            ),
        ),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=wanted["chunked_prefill"]),
        aux_output_config=SimpleNamespace(enable_return_routed_experts=wanted["routed_experts"]),
        weight_transfer_config=(
            SimpleNamespace(backend=wanted["weight_transfer"])
            if wanted["weight_transfer"]
            else None
        ),
    )
    return served


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"weight_transfer": "nccl", "sleep_mode": True, "routed_experts": True, "quantized": True},
        {"on_cpu": False, "chunked_prefill": True},
    ],
)
def test_it_says_what_the_trainer_reads(config):
    sampler = FirstRunner()
    served = made(sampler, **config)
    said = served.sapo_describe()
    assert Description(**said).model_dump() == said
    assert said == DESCRIPTION | config | {"weights": worker.INITIAL}
    assert sampler.logprobs_mode == "processed_logprobs"
    served.sapo_label("new")
    assert served.sapo_describe()["weights"] == "new"


def test_a_pipeline_stage_that_does_not_sample():
    assert made().sapo_describe()["weights"] == worker.INITIAL


def test_packed_experts_are_forgotten():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.ReLU())
    model[0].quant_method = SimpleNamespace(moe_kernel=object())
    model[1].quant_method = SimpleNamespace(other=1)
    worker._forget_packed_experts(model)
    assert model[0].quant_method.moe_kernel is None
    assert vars(model[1].quant_method) == {"other": 1}
