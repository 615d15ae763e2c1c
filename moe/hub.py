"""Our model as transformers sees it: a config and a class, registered so that `from_pretrained` finds them.

    import moe.hub
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model(input_ids, attention_mask, labels, pixel_values)      # one -200 where an image goes
    model.generate(input_ids, pixel_values=..., max_new_tokens=64)

Runs on one device, with all experts, by the PyTorch dispatcher: it needs neither DeepSpeed nor Tutel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe import weights
from moe.parallel import Groups
from moe.spec import ModelSpec, MoESpec
from moe.upcycle import upcycle
from moe.vlm import VLM, build

_hub = weights.hub_bases()


class MoEVLMConfig(_hub.Config):  # type: ignore[misc,name-defined]
    """`model` and `moe`: moe.spec.ModelSpec and MoESpec as mappings; `moe` is None for a dense model."""

    model_type = "moe_vlm"
    model: dict | None = None  # type: ignore[type-arg]
    moe: dict | None = None  # type: ignore[type-arg]
    vocab_size: int = 0


@dataclass
class MoEVLMOutput(_hub.Output):  # type: ignore[misc,name-defined]
    """As moe.vlm.Output."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    aux_losses: tuple[Tensor, ...] | None = None
    expert_counts: tuple[Tensor, ...] | None = None


class MoEVLM(_hub.Model):  # type: ignore[misc,name-defined]
    """A VLM in transformers' clothes."""

    config_class = MoEVLMConfig
    main_input_name = "input_ids"
    _tied_weights_keys = None
    _no_split_modules = ()
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config: MoEVLMConfig, vlm: VLM | None = None) -> None:
        super().__init__(config)
        if vlm is None:
            vlm = _rebuilt(config)
        self.vlm = vlm
        config.tie_word_embeddings = bool(vlm.language.config.tie_word_embeddings)
        if config.tie_word_embeddings:
            self._tied_weights_keys = {
                "vlm.language.lm_head.weight": "vlm.language.model.embed_tokens.weight"
            }
        with weights.unfilled():  # transformers would draw new weights for the parts it knows
            self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing: weights are always read, and the parts initialise themselves."""

    def get_input_embeddings(self) -> Any:
        return self.vlm.language.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **_: Any,
    ) -> MoEVLMOutput:
        out = self.vlm(input_ids, attention_mask, labels, pixel_values)
        return MoEVLMOutput(
            loss=out.loss,
            logits=out.logits,
            aux_losses=tuple(out.aux_losses),
            expert_counts=tuple(out.expert_counts),
        )

    @torch.no_grad()
    def generate(  # type: ignore[no-untyped-def]
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options,
    ) -> Tensor:
        """New tokens only, [B, up to max_new_tokens]; `options` are transformers' own."""
        from moe.generate import left

        embeds, mask = left(self.vlm, input_ids, attention_mask, pixel_values)
        tokens: Tensor = self.vlm.language.generate(
            inputs_embeds=embeds, attention_mask=mask.long(), use_cache=True, **options
        )
        return tokens


def _rebuilt(config: MoEVLMConfig) -> VLM:
    spec = ModelSpec(**(config.model or {}))
    dtype = torch.get_default_dtype()
    vlm = build(spec, vocab_size=config.vocab_size, seed=0, dtype=dtype, filled=False)
    if config.moe is not None:
        upcycle(vlm, MoESpec(**_tuples(config.moe)), Groups.single(), seed=0)
    return vlm


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()} | {
        "dispatcher": "torch",
        "expert_parallel": 1,
    }


def wrap(vlm: VLM, model: Mapping[str, Any], moe: Mapping[str, Any] | None) -> MoEVLM:
    """The same model, weights shared, in transformers' clothes."""
    config = MoEVLMConfig(
        model=dict(model),
        moe=dict(moe) if moe is not None else None,
        vocab_size=vlm.language.config.vocab_size,
        dtype=next(vlm.parameters()).dtype,
    )
    return MoEVLM(config, vlm)


_hub.register(MoEVLMConfig, MoEVLM)
