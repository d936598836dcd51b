"""What a vLLM server runs for the trainer, inside its workers.

``--worker-extension-cls sapo_megatron.rollout.vllm.worker.Worker`` adds these methods to every
worker of a server; the trainer calls them through ``/collective_rpc``. It is written against vLLM
0.32, and imports nothing else of this package: the server's environment needs vLLM, and the folder
that holds ``sapo_megatron`` on its PYTHONPATH.
"""

from pathlib import Path
from typing import Any

INITIAL = "initial"
"""Label of the weights that a server has started with."""


class Worker:
    """Mixed into vLLM's worker, which has ``model_runner``, ``vllm_config`` and ``device``."""

    model_runner: Any
    vllm_config: Any
    device: Any
    sapo_weights: str = INITIAL

    def sapo_describe(self) -> dict[str, Any]:
        """Have the server return the log-probs that training needs, and say what it serves.

        Returns the model's sizes, the settings that matter and ``weights``, the label of the last
        ``sapo_load`` or ``sapo_label``.
        """
        # With pipeline parallelism only the last stage samples.
        if (sampler := getattr(self.model_runner, "sampler", None)) is not None:
            _return_logprobs_before_top_p(sampler)
        model = self.vllm_config.model_config
        transfer = self.vllm_config.weight_transfer_config
        return {
            "weights": self.sapo_weights,
            "model_type": model.hf_text_config.model_type,
            "num_layers": model.hf_text_config.num_hidden_layers,
            "hidden_size": model.hf_text_config.hidden_size,
            "vocab_size": model.get_vocab_size(),
            "max_model_len": model.max_model_len,
            "generation_config": model.generation_config,
            "quantized": model.model_arch_config.quantization_config is not None,
            "routed_experts": self.vllm_config.aux_output_config.enable_return_routed_experts,
            "sleep_mode": model.enable_sleep_mode,
            "weight_transfer": transfer.backend if transfer else None,
            "on_cpu": self.device.type == "cpu",
            "chunked_prefill": self.vllm_config.scheduler_config.enable_chunked_prefill,
        }

    def sapo_label(self, label: str) -> None:
        """Remember the ``label`` of weights that come another way than by ``sapo_load``."""
        self.sapo_weights = label

    def sapo_load(self, folder: str, label: str) -> dict[str, bool]:
        """Load the weights of a Hugging Face folder in place, and remember their ``label``.

        Returns ``found``: whether there is such a folder on the server's machine.
        """
        from vllm.config import set_current_vllm_config

        if not Path(folder).is_dir():
            return {"found": False}
        self.sapo_weights = f"part of {label}"
        model = self.model_runner.get_model()
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            _forget_packed_experts(model)
        with set_current_vllm_config(self.vllm_config):
            weights = _weights_in(folder, self.vllm_config.model_config, model)
            self.model_runner.reload_weights(weights_iterator=weights)
            if on_cpu:
                _pack_embeddings(model)
        self.sapo_weights = label
        return {"found": True}


def _weights_in(folder: str, model_config: Any, model: Any) -> Any:
    """Names and tensors, also for a server that was started without (``--load-format dummy``)."""
    import copy

    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    there = copy.copy(model_config)
    there.model, there.model_weights, there.revision = folder, "", None
    return get_model_loader(LoadConfig()).get_all_weights(there, model)


def _forget_packed_experts(model: Any) -> None:
    """Have the weights of experts packed again when they are loaded again.

    vLLM's reload brings every layer back to the form it has in a file, loads it and packs it. On
    CPUs it packs the weights of experts when it makes their kernel, and a kernel that is there is
    not made again: it would read weights that are not packed as if they were.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_embeddings(model: Any) -> None:
    """Pack the output weights again, which a reload forgets where they are the embedding's.

    They have no tensor of their own in the folder, and their packed copy stays as it was.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)


def _return_logprobs_before_top_p(sampler: Any) -> None:
    """Have ``sampler`` return log-probs with temperature applied and top-p not.

    vLLM's own modes return them with neither (raw_logprobs), or with both and so renormalised over
    the tokens that top-p leaves (processed_logprobs).
    """
    if hasattr(sampler, "sapo_original"):
        return
    sampler.logprobs_mode = "processed_logprobs"
    if hasattr(sampler, "topk_topp_sampler"):
        _change_v1(sampler)
    else:
        _change_v2(sampler)


def _change_v1(sampler: Any) -> None:
    """The sampler of vLLM's model runner V1, on CPUs."""
    inner = sampler.topk_topp_sampler
    sampler.sapo_original = original = inner.forward
    inner.logprobs_mode = "raw_logprobs"  # nobody would read what it computes otherwise

    def forward(logits: Any, generators: Any, k: Any, p: Any) -> tuple[Any, Any]:
        logprobs = logits.log_softmax(dim=-1)  # before top-p, which writes to the logits
        sampled, _ = original(logits, generators, k, p)
        return sampled, logprobs

    inner.forward = forward


def _change_v2(sampler: Any) -> None:
    """The sampler of model runner V2, on GPUs. It has not been run."""
    sampler.sapo_original = original = sampler._sample_random

    def sample_random(logits: Any, *args: Any) -> tuple[Any, Any]:
        sampled, _ = original(logits.clone(), *args)  # top-p may write to what it is given
        return sampled, logits

    sampler._sample_random = sample_random
