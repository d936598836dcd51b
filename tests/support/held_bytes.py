"""What ``test_plan`` runs on ranks: the bytes that training really holds."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from sapo_megatron.commands.plan import activations
from sapo_megatron.hf.architecture import read_architecture
from sapo_megatron.policy import parallel, weights
from sapo_megatron.policy.decode import MegatronDecoder
from sapo_megatron.policy.gpt import LogprobGPT
from sapo_megatron.policy.step import Policy
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import Recipe

TOKENS = 256


def held(recipe_path: Path, folder: Path, overrides: dict[str, str]) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer and KV cache on this rank of a recipe."""
    recipe, policy = _policy(recipe_path, folder, overrides)
    weights_ = sum(_size(w) for chunk in policy.model.chunks for w in chunk.parameters())
    gradients = sum(
        _size(buffer.grad_data)
        for chunk in policy.ddp
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    )
    optimizer = 0
    for part in policy.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                state = part.optimizer.state[master]
                optimizer += sum(_size(state[name]) for name in ("exp_avg", "exp_avg_sq"))
                optimizer += _size(master) if part.config.bf16 else 0
    kv_cache = _kv_cache(recipe, policy)
    parallel.teardown()
    return {
        "weights": weights_,
        "gradients": gradients,
        "optimizer": optimizer,
        "kv_cache": kv_cache,
    }


def _kv_cache(recipe: Recipe, policy: Policy) -> int:
    decoder, rows = MegatronDecoder(policy.model), recipe.rollout.generation_batch_size
    longest = recipe.rollout.max_prompt_length + recipe.rollout.max_response_length
    with decoder.generating(), torch.no_grad():
        decoder.start(rows, longest)
        decoder.logits(torch.zeros(rows, 1, dtype=torch.long))
        caches = [context.key_value_memory_dict for context in decoder._contexts]
        return sum(_size(x) for cache in caches for pair in cache.values() for x in pair)


def all_held(
    recipe_path: Path, folder: Path, layouts: list[dict[str, str]]
) -> list[dict[str, int]]:
    return [held(recipe_path, folder / str(i), layout) for i, layout in enumerate(layouts)]


def all_saved(recipe_path: Path, folder: Path, settings: list[dict[str, str]]) -> list[float]:
    return [saved_share(recipe_path, folder / str(i), each) for i, each in enumerate(settings)]


def saved_share(recipe_path: Path, folder: Path, overrides: dict[str, str]) -> float:
    """Bytes that the model says a forward pass stores, as a share of those that are stored."""
    recipe, policy = _policy(recipe_path, folder, overrides)
    (model,) = policy.model.chunks
    assert isinstance(model, LogprobGPT)
    ours = {w.untyped_storage().data_ptr() for w in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in ours:
            saved[place] = tensor
        return tensor

    ends = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)
    positions = torch.arange(TOKENS // 2).repeat(2)[None]
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=TOKENS // 2,
        max_seqlen_kv=TOKENS // 2,
    )
    model.train()
    hidden = model.embedding(torch.zeros(1, TOKENS, dtype=torch.long), positions)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=model.rotary_pos_emb(TOKENS // 2, packed_seq=True),
            packed_seq_params=packed,
        )
    arch = read_architecture(recipe.model.path)
    layers = activations.chunk(arch, tuple(range(arch.num_layers)), recipe.parallel)
    numbers = layers.stored + 2 * arch.hidden_size  # the last norm keeps two
    parallel.teardown()
    return numbers * TOKENS * 4 / sum(_size_of_storage(x) for x in saved.values())


def _policy(recipe_path: Path, folder: Path, overrides: dict[str, str]) -> tuple[Recipe, Policy]:
    recipe = load(recipe_path, overrides)
    arch = read_architecture(recipe.model.path)
    groups = parallel.setup(recipe.parallel, seed=1)
    if dist.get_rank() == 0:
        weights.save_random(arch, recipe.model, folder, seed=1)
    dist.barrier(groups.world)
    policy = Policy(recipe, arch, groups, folder, optimizer=recipe.optimizer, total_updates=1)
    return recipe, policy


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size_of_storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
