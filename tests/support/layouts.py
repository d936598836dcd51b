"""The layouts of the exactness tests: how the work is cut, and what is computed."""

from dataclasses import dataclass

from sapo_megatron.recipe.schema import ParallelConfig
from tests.support.gloo import TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to cut the work, and what is computed under it."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    first_stage: int | None = None
    last_stage: int | None = None
    recompute: str | None = None
    """``uniform`` or ``block`` (full), or modules joined by commas (selective)."""
    model: str = "moe"
    objective: str = "sapo"
    packing: bool = True
    fused: bool = False
    replay: bool = False
    """Experts are those of the samples' routes."""
    replay_threshold: float = 0.0
    batch: str = "ragged"
    max_tokens: int = 48
    """Of a micro-batch, over all context-parallel ranks."""
    contract: str = "2-tuple"
    per_token_loss: bool = False

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def name(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "CP": self.cp, "EP": self.ep}
        sizes["DP"] = self.dp
        words = ["x".join(f"{key}{n}" for key, n in sizes.items() if n and n > 1) or "one rank"]
        words += [f"first stage {self.first_stage}"] if self.first_stage else []
        words += [f"last stage {self.last_stage}"] if self.last_stage else []
        words += [f"recompute {self.recompute}"] if self.recompute else []
        for f in ("model", "objective", "batch", "contract", "max_tokens"):
            value = getattr(self, f)
            words += [f"{f.replace('_', ' ')} {value}"] if value != getattr(Layout, f) else []
        words += ["per-token loss"] if self.per_token_loss else []
        words += [] if self.packing else ["padded"]
        words += ["fused"] if self.fused else []
        words += ["replay"] if self.replay else []
        words += [f"threshold {self.replay_threshold}"] if self.replay_threshold else []
        return ", ".join(words)

    @property
    def parallel(self) -> ParallelConfig:
        full = self.recompute in ("uniform", "block")
        selective = self.recompute is not None and not full
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            num_layers_in_first_pipeline_stage=self.first_stage,
            num_layers_in_last_pipeline_stage=self.last_stage,
            recompute_granularity="full" if full else "selective" if selective else None,
            recompute_method=self.recompute if full else None,
            recompute_num_layers=1 if full else None,
            distributed_timeout_s=TIMEOUT_S,
            recompute_modules=tuple(self.recompute.split("+")) if selective else None,
        )


REPRESENTATIVE = (
    Layout(),
    Layout(world=8),
    Layout(world=2, tp=2, fused=True, objective="warm"),
    Layout(world=4, tp=4, model="tied"),
    Layout(world=2, pp=2, first_stage=1),
    Layout(world=2, pp=2, vpp=2, max_tokens=24),
    Layout(world=4, pp=2, vpp=2, model="tied", packing=False),
    Layout(world=4, cp=2, objective="gspo"),
    Layout(world=4, cp=4, objective="token-mean"),
    Layout(world=2, ep=2),
    Layout(world=4, ep=4, batch="few"),
    Layout(world=4, tp=2, cp=2),
    Layout(world=4, cp=2, pp=2, model="mixed"),
    Layout(world=4, tp=2, pp=2, ep=2),
    Layout(world=8, tp=2, pp=2, cp=2, ep=4, vpp=2, model="tied", fused=True),
    Layout(world=4, cp=2, ep=2, recompute="uniform"),
    Layout(world=2, tp=2, packing=False, recompute="layernorm+moe_act"),
    Layout(world=2, tp=2, model="dense", recompute="core_attn"),
    Layout(world=4, tp=2, contract="3-tuple", per_token_loss=True),
    Layout(world=4, tp=2, ep=2, objective="balanced", batch="same", max_tokens=16),
    Layout(replay=True, model="mixed"),
    Layout(world=4, tp=2, pp=2, ep=2, replay=True, recompute="uniform"),
    Layout(world=4, tp=2, pp=2, ep=2, replay=True, replay_threshold=0.3, recompute="uniform"),
    Layout(world=4, cp=2, pp=2, vpp=2, replay=True, max_tokens=24, recompute="moe"),
    Layout(model="hybrid"),
    Layout(world=2, tp=2, packing=False, model="hybrid"),
    Layout(world=4, tp=2, cp=2, model="hybrid"),
    Layout(world=4, tp=2, pp=2, ep=2, model="hybrid", recompute="uniform"),
    Layout(world=4, cp=2, pp=2, vpp=2, model="hybrid", max_tokens=24),
)
"""What an ordinary test run walks through, in fp64."""

NARROW = tuple(
    layout
    for layout in REPRESENTATIVE
    if layout.world == 8
    or layout.contract == "3-tuple"
    or (layout.replay and layout.vpp)
    or (layout.model == "hybrid" and layout.world == 4 and not layout.vpp)
)
"""What it walks through in fp32 as well."""

LAYOUTS = (
    *REPRESENTATIVE,
    Layout(max_tokens=21),
    Layout(max_tokens=256),
    Layout(batch="reversed"),
    Layout(packing=False),
    Layout(fused=True, objective="warm"),
    Layout(model="dense"),
    Layout(model="unnormed"),
    Layout(world=2, batch="few", max_tokens=21),
    Layout(world=2, tp=2),
    Layout(world=2, tp=2, packing=False),
    Layout(world=2, tp=2, packing=False, fused=True, model="dense"),
    Layout(world=4, tp=4, model="tied", fused=True),
    Layout(world=4, tp=2, objective="warm"),
    Layout(world=2, pp=2),
    Layout(world=2, pp=2, model="tied", packing=False),
    Layout(world=2, pp=2, last_stage=1, model="mixed"),
    Layout(world=4, pp=4, model="tied"),
    Layout(world=2, cp=2),
    Layout(world=4, cp=4, objective="gspo"),
    Layout(world=4, cp=2, objective="token-mean"),
    Layout(world=4, ep=2, packing=False),
    Layout(world=8, ep=8, batch="reversed"),
    Layout(world=4, tp=2, cp=2, fused=True, model="dense"),
    Layout(world=4, cp=2, pp=2),
    Layout(world=4, cp=2, pp=2, vpp=2, model="mixed"),
    Layout(world=4, tp=2, ep=4, model="unnormed"),
    Layout(world=8, tp=2, pp=2, ep=2),
    Layout(world=8, tp=2, pp=2, ep=4, vpp=2, model="mixed"),
    Layout(world=8, tp=2, cp=2, ep=8, objective="token-mean"),
    Layout(world=2, tp=2, recompute="uniform"),
    Layout(world=4, tp=2, pp=2, recompute="block", model="mixed"),
    Layout(world=2, tp=2, recompute="core_attn"),
    Layout(world=2, cp=2, recompute="core_attn"),
    Layout(world=2, pp=2, recompute="moe"),
    Layout(world=2, tp=2, model="dense", recompute="mlp"),
    Layout(world=8, tp=2, cp=2, contract="3-tuple"),
    Layout(world=8, tp=2, cp=2, per_token_loss=True),
    Layout(world=4, cp=2, contract="3-tuple", per_token_loss=True),
    Layout(world=4, pp=2, contract="3-tuple", per_token_loss=True, model="tied"),
    Layout(objective="balanced", batch="same", max_tokens=16),
    Layout(objective="balanced", batch="same", max_tokens=64),
    Layout(world=2, cp=2, objective="balanced", batch="same", max_tokens=16),
    Layout(world=4, pp=2, ep=2, objective="balanced", batch="same", max_tokens=16),
    Layout(world=4, objective="balanced", batch="same", max_tokens=16, contract="3-tuple"),
    Layout(
        world=4,
        tp=2,
        objective="balanced",
        batch="same",
        max_tokens=16,
        contract="3-tuple",
        per_token_loss=True,
    ),
    Layout(replay=True),
    Layout(world=2, tp=2, replay=True),
    Layout(world=2, tp=2, replay=True, packing=False),
    Layout(world=4, tp=2, ep=2, replay=True, recompute="moe"),
    Layout(world=2, pp=2, vpp=2, replay=True, model="mixed"),
    Layout(world=2, pp=2, replay=True, recompute="block", max_tokens=24),
    Layout(world=4, cp=4, replay=True, model="unnormed"),
    Layout(world=4, ep=4, replay=True, batch="few"),
    Layout(world=8, tp=2, pp=2, cp=2, ep=4, replay=True, fused=True),
    Layout(packing=False, model="hybrid"),
    Layout(world=4, tp=4, model="hybrid"),
    Layout(world=4, cp=4, model="hybrid", objective="gspo"),
    Layout(world=2, pp=2, first_stage=1, model="hybrid"),
    Layout(world=4, pp=4, model="hybrid", packing=False),
    Layout(world=4, cp=2, ep=4, model="hybrid", recompute="uniform"),
    Layout(world=2, tp=2, model="hybrid", recompute="layernorm+moe_act"),
    Layout(world=4, tp=2, ep=4, model="hybrid", replay=True, recompute="moe"),
    Layout(world=8, tp=2, pp=2, cp=2, ep=4, vpp=2, model="hybrid", fused=True),
)
