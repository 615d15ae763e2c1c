"""An image tower, a projector and a language model, called as one; the features go where the text says -200.

Sequences leave the splice right-padded, so a causal language model never lets a real token see a padded one:
no attention mask is passed (SDPA and flash-attn then take their fast causal kernels), except under the
reference's routing rules, where padding is routed and its hidden states therefore matter, and for a dense model in
evaluation, whose outputs are then the reference's at padding too.

The reference warns that flash-attn degraded its models (README of MoE-LLaVA, its issue 25). Two causes are known and
shown in tests/moe/test_attention.py: transformers before 4.37 gave Phi's flash-attn a scale of 1 for 1 / sqrt(width of
a head) (its issue 28488, pull request 28537; the reference's first release pins 4.36.2); and given a padding mask,
flash-attn returns zeros for padded rows, where eager attention and SDPA compute something. Those rows went on to the
routers, which gave them experts' capacity that real tokens then lost. Here padding is routed nowhere; under the
reference's rules, which route it, the model goes on with SDPA (moe.upcycle).

Shapes: B sequences, S positions, N images, P patches an image, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe import apart, backbones, weights
from moe.apart import there
from moe.batches import checked, without_blanks
from moe.parallel import Groups
from moe.parts import VLMError, parts, train_only
from moe.router import Traffic, balance
from moe.spec import LoraSpec, ModelSpec, MoESpec

__all__ = [
    "IGNORE",
    "IMAGE",
    "VLM",
    "Output",
    "Spliced",
    "VLMError",
    "build",
    "parts",
    "projector",
    "train_only",
]

IMAGE, IGNORE = -200, -100  # LLaVA's: where an image goes; a label that is not learnt
ROWS = 2048  # positions whose logits are alive at once: 0.8 GB in fp32 for 100k tokens


@dataclass(frozen=True)
class Spliced:
    """Text and images in one sequence, right-padded."""

    embeds: Tensor  # [B, S, D]
    mask: Tensor  # [B, S] bool: a real position
    image: Tensor  # [B, S] bool: an image's
    labels: Tensor | None  # [B, S] int64
    segments: Tensor | None = (
        None  # [B, S] int64, of packed sequences: the sample a position is of, 0 padding
    )


@dataclass
class Output:
    """What one forward pass gives; `logits` are computed when first asked for."""

    hidden: Tensor  # [B, S, D], after the last norm
    mask: Tensor  # [B, S] bool, as spliced
    head: Any = field(repr=False)
    labels: Tensor | None = None  # [B, S] int64, as spliced
    loss: Tensor | None = None  # ce_sum / tokens + router_loss
    ce_sum: Tensor | None = None  # fp32, summed over this batch's supervised tokens
    tokens: Tensor | None = None  # int64, how many those are
    aux_losses: list[Tensor] = field(default_factory=list)  # one a sparse layer; without their coefficient
    router_loss: Tensor | None = None  # aux and z losses over all layers, with their coefficients
    expert_counts: list[Tensor] = field(default_factory=list)  # int64 [E], one a sparse layer
    dropped: list[Tensor] = field(default_factory=list)  # int64, choices lost to capacity, one a sparse layer

    @property
    def logits(self) -> Tensor:
        """[B, S, vocabulary]."""
        if "_logits" not in self.__dict__:
            self.__dict__["_logits"] = self.head(self.hidden)
        return self.__dict__["_logits"]  # type: ignore[no-any-return]


class VLM(nn.Module):
    """`moe` is None until `moe.upcycle` has made FFNs sparse, `lora` unless `moe.lora` has added adapters."""

    def __init__(self, spec: ModelSpec, language: Any, tower: Any, projector: nn.Module) -> None:
        super().__init__()
        self.spec, self.vision = spec, backbones.vision(spec)
        self.language, self.tower, self.projector = language, tower, projector
        self.moe: MoESpec | None = None
        self.lora: LoraSpec | None = None
        self.groups = Groups.single()

    def train(self, mode: bool = True) -> VLM:
        super().train(mode)
        self.tower.eval()
        return self

    def recompute(self, on: bool = True) -> None:
        """Recompute each decoder layer's activations in the backward pass instead of keeping them."""
        if on:
            # The re-entrant kind cuts the balancing loss off from its gradient (as it did in the reference).
            self.language.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.language.gradient_checkpointing_disable()

    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers: nn.ModuleList = self.language.model.layers
        return layers

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W], bytes or normalised floats -> [N, P, D]; the tower is frozen."""
        with torch.no_grad():
            if pixel_values.dtype == torch.uint8:
                pixel_values = normalised(pixel_values, self.vision.mean, self.vision.std)
            patches_NPV = self.tower(pixel_values.to(self.tower.dtype)).last_hidden_state
            if self.vision.drop_first:
                patches_NPV = patches_NPV[:, 1:]
        features: Tensor = self.projector(patches_NPV.to(next(self.projector.parameters()).dtype))
        # A model that scales its input embeddings inside (MiniCPM) must not scale these: as the reference.
        return features / getattr(self.language.config, "embedding_multiplier", 1.0)

    def splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Spliced:
        """Put the images' features where -200 stands, drop masked positions, pad on the right.

        As the reference (moellava/model/llava_arch.py), except that a text-only sample need bring no blank image.
        Raises VLMError when the images and their places differ in number, or shapes do not fit. Ids that lie on the
        host are looked at there, and no one waits for a GPU; all but `embeds` then lies there too.
        """
        beside = {"attention_mask": attention_mask, "labels": labels, "segments": segments}
        pixel_values = checked(input_ids, beside, pixel_values, self.vision.size)
        everything = torch.ones_like(input_ids, dtype=torch.bool)
        keep_BS = everything if attention_mask is None else attention_mask.bool()
        place_BS = (input_ids == IMAGE) & keep_BS
        images = 0 if pixel_values is None else pixel_values.shape[0]
        places = int(place_BS.sum())
        if pixel_values is not None and images > places:
            pixel_values = without_blanks(pixel_values, place_BS.sum(1).to(pixel_values.device))
            images = len(pixel_values)
        if images != places:
            raise VLMError(
                f"the batch brings {images} image(s), but its texts have {places} place(s) for one (-200); "
                "a text was cut inside its images, or a sample names another number of images than it brings (a sample "
                "without pictures brings none)"
            )
        embed = self.language.get_input_embeddings()
        device = embed.weight.device
        if images:
            assert pixel_values is not None
            features_NPD = self.image_features(pixel_values)
        else:
            # No image on this rank: the projector stays in the graph all the same, with a gradient of zero,
            # because the other ranks wait for it.
            if hasattr(
                embed.weight, "ds_id"
            ):  # ZeRO 3: all ranks must call the tower, to bring its weights together
                blank = embed.weight.new_zeros(1, 3, self.vision.size, self.vision.size)
                features_NPD = self.image_features(blank)[:0]
            else:
                zero = embed.weight.new_zeros(1, 1, self.tower.config.hidden_size)
                features_NPD = self.projector(zero)[:0]
        patches = features_NPD.shape[1] if images else self.vision.patches
        width_BS = torch.where(place_BS, patches, 1) * keep_BS
        end_BS = width_BS.cumsum(1)
        length_B = end_BS[:, -1]
        longest = int(length_B.max())
        text_BS = keep_BS & ~place_BS
        row_B, at_BS = torch.arange(input_ids.shape[0], device=input_ids.device), end_BS - width_BS
        text_rows, text_at = row_B[:, None].expand_as(at_BS)[text_BS], at_BS[text_BS]
        text_TD = embed(there(input_ids[text_BS], device))
        blank = text_TD.new_zeros(input_ids.shape[0], longest, text_TD.shape[-1])
        embeds = blank.index_put((there(text_rows, device), there(text_at, device)), text_TD)
        image = torch.zeros(blank.shape[:2], dtype=torch.bool, device=input_ids.device)
        step = torch.arange(patches, device=input_ids.device)
        image_rows = row_B[:, None].expand_as(at_BS)[place_BS][:, None].expand(-1, patches)
        image_at = at_BS[place_BS][:, None] + step
        image_there = there(image_rows, device), there(image_at, device)
        embeds = embeds.index_put(image_there, features_NPD.to(embeds.dtype))
        image[image_rows, image_at] = True
        if not images:
            embeds = embeds + features_NPD.sum().to(embeds.dtype)
        spliced_labels = None
        if labels is not None:
            spliced_labels = torch.full(blank.shape[:2], IGNORE, dtype=labels.dtype, device=labels.device)
            spliced_labels[text_rows, text_at] = labels[text_BS]
        mask = torch.arange(longest, device=input_ids.device) < length_B[:, None]
        spliced_segments = None
        if segments is not None:
            spliced_segments = segments.new_zeros(blank.shape[:2])
            spliced_segments[text_rows, text_at] = segments[text_BS]
            spliced_segments[image_rows, image_at] = segments[place_BS][:, None].expand(-1, patches)
        return Spliced(embeds, mask, image, spliced_labels, spliced_segments)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Output:
        """Batch as in `data.loader`: [B, S] ids with -200 for an image, bool mask, labels, [N, 3, H, W].

        `segments` [B, S]: which of a row's packed samples a token is of, from 1; samples do not see each other.
        """
        spliced = self.splice(input_ids, attention_mask, labels, pixel_values, segments)
        traffic = Traffic.of(spliced.mask, self.moe)
        if traffic is not None and traffic.real is not None:
            traffic.real = there(traffic.real, spliced.embeds.device)
        hidden = self.decode(spliced, traffic)
        output = Output(hidden, spliced.mask, self.head, spliced.labels)
        if traffic is not None and self.moe is not None:
            reports = traffic.in_order()
            output.aux_losses = [balance(report) for report in reports]
            if self.moe.rules == "moe_llava" and self.training and self.language.is_gradient_checkpointing:
                # The reference loses this gradient to re-entrant checkpointing, which it always trains with.
                output.aux_losses = [loss.detach() for loss in output.aux_losses]
            output.expert_counts = [report.counts_E for report in reports]
            output.dropped = [report.dropped for report in reports]
            output.router_loss = self.moe.aux_loss * torch.stack(output.aux_losses).sum()
            if self.moe.z_loss:
                z_losses = torch.stack([report.z for report in reports])
                output.router_loss = output.router_loss + self.moe.z_loss * z_losses.sum()
        if spliced.labels is not None:
            output.ce_sum, output.tokens = self.cross_entropy(hidden, spliced.labels)
            output.loss = output.ce_sum / output.tokens.clamp(min=1)
            if output.router_loss is not None:
                output.loss = output.loss + output.router_loss
        return output

    def decode(self, spliced: Spliced, traffic: Traffic | None) -> Tensor:
        """The language model without its head and without a cache: [B, S, D]."""
        extra: dict[str, Any] = {} if traffic is None else {"traffic": traffic}
        embeds = spliced.embeds
        if spliced.segments is not None:
            extra |= apart.told(self.language, spliced.segments)
            if extra["position_ids"].shape != spliced.segments.shape:
                embeds = embeds.flatten(0, 1)[None]  # all rows as one, cut at the samples' ends
        elif self._masked():
            extra["attention_mask"] = there(spliced.mask.long(), embeds.device)
        elif self.language.config._attn_implementation == "sdpa" and apart.window(self.language) is None:
            # Right-padded, and no mask is needed: see the module's head. Told so, transformers does not look for one.
            apart.register()
            extra["attention_mask"] = apart.sizes_as_mask((), embeds.device)
        hidden: Tensor = self.language.model(inputs_embeds=embeds, use_cache=False, **extra).last_hidden_state
        return hidden.view_as(spliced.embeds)

    def _masked(self) -> bool:
        """Whether what stands where padding is matters: to routers, or to who compares a dense model's outputs."""
        if self.moe is not None:
            return self.moe.rules == "moe_llava"
        return not self.training and not self.language.config._attn_implementation.startswith("flash")

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of any number of positions."""
        logits: Tensor = self.language.lm_head(hidden)
        return logits / getattr(self.language.config, "logits_scaling", 1.0)

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) over the supervised next tokens; only their logits are computed, a chunk at a time."""
        wanted = labels[:, 1:] != IGNORE
        at_T = there(F.pad(wanted, (0, 1)).flatten().nonzero()[:, 0], hidden.device)
        rows_TD = hidden.flatten(0, 1).index_select(0, at_T)
        target_T = there(labels[:, 1:][wanted].long(), hidden.device)

        def chunk(rows: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.head(rows).float(), target, reduction="sum")

        # Under ZeRO 3 in one go: ranks with unequal numbers of chunks would wait for each other's head for ever.
        if len(rows_TD) <= ROWS or hasattr(self.language.lm_head.weight, "ds_id"):
            return chunk(rows_TD, target_T), wanted.sum()
        total = rows_TD.new_zeros((), dtype=torch.float32)
        for rows, target in zip(torch.split(rows_TD, ROWS), torch.split(target_T, ROWS), strict=True):
            total = total + checkpoint(chunk, rows, target, use_reentrant=False)
        return total, wanted.sum()


def projector(kind: str, width: int, hidden: int) -> nn.Module:
    """`linear`, or `mlpNx_gelu`: N linear maps with GELU between (LLaVA, multimodal_projector/builder.py)."""
    if kind == "linear":
        return nn.Linear(width, hidden)
    depth = int(kind.removeprefix("mlp").removesuffix("x_gelu"))
    parts: list[nn.Module] = [nn.Linear(width, hidden)]
    for _ in range(depth - 1):
        parts += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*parts)


def normalised(raw: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [N, 3, H, W] as a tower takes it: scaled to 0..1, less the mean, over the deviation.

    A loader hands bytes on, a quarter of what floats would be on their way to the device.
    """
    floats = raw.to(torch.float32, memory_format=torch.contiguous_format)
    for channel, (centre, spread) in enumerate(zip(mean, std, strict=True)):
        floats[:, channel].mul_(1 / (255 * spread)).sub_(centre / spread)
    return floats


def build(spec: ModelSpec, *, vocab_size: int, seed: int, dtype: torch.dtype, filled: bool = True) -> VLM:
    """The dense model on the CPU in `dtype`, random or from its weights; equal on every rank for equal seeds.

    Without `filled` no weight is drawn or read. Raises backbones.BackboneError, in words, for weights that
    cannot be had.
    """
    language = weights.load_language(spec, vocab_size=vocab_size, seed=seed, dtype=dtype, filled=filled)
    tower = weights.load_tower(spec, seed=seed + 1, dtype=dtype, filled=filled)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        between = projector(spec.projector, tower.config.hidden_size, language.config.hidden_size).to(dtype)
    return VLM(spec, language, tower, between)
