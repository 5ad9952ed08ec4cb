"""MLP-Mixer: An all-MLP Architecture for Vision (NeurIPS 2021, arXiv 2105.01601). Official code (JAX):
github.com/google-research/vision_transformer, Apache-2.0.

The image is cut into patches as for ViT. Each block then has two MLPs: one mixes the patches, channel by channel with
the same weights, the other mixes the channels of each patch. No attention, no positions, no class token.

Unusual here: the token MLP's hidden width is half of the channels, whatever the number of patches; the last norm comes
before the mean over patches; norms have eps 1e-6; GELU is the exact one, as in timm (the JAX code has the tanh form).
The official code runs at one size only. Here a map of another size is resampled to the built grid inside the token MLP
and back, so that each weight goes on seeing its part of the image; `img_size` builds for another size, and published
weights are then joined with the same resampling on loading. (The paper fine-tunes at larger sizes with several copies
of the token MLP side by side, which is another network.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage, four_taps
from ..layers import Block, Conv, Mlp, PatchEmbed, built_grid, drop_path_rates
from ..mixers import TokenMlp
from ..registry import Family, Inputs, Variant, Weights
from .vit import EPS, from_jax


class MlpMixer(Backbone):
    """Patches, mixer blocks, norm, mean (Fig. 1). Each block is a stage, so that any depth can be tapped.

    A ragged image end is filled with zeros to whole patches. The dense version (four taps, evenly spaced) gives raw
    maps; the paper has none.
    """

    OFFICIAL = (
        (r"^stages\.(\d+)\.blocks\.0\.", r"blocks.\1."),
        (r"\.attn\.", ".mlp_tokens."),
        (r"\.mlp\.", ".mlp_channels."),
    )

    def __init__(
        self,
        *,
        patch: int,
        dim: int,
        depth: int,
        token_ratio: float = 0.5,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        img_size: int | Sequence[int] = 224,
        **contract: Any,
    ):
        super().__init__(**contract)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        grid = built_grid(img_size, self.ndim, patch)
        if min(grid) < 1:
            raise ValueError(f"img_size must be at least 1 on every axis, got {img_size}")
        self.stem = PatchEmbed(self.ndim, self.in_chans, dim, patch, pad=True)
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.stages = nn.ModuleList()
        for rate in rates:
            tokens, channels = TokenMlp(grid, int(dim * token_ratio)), Mlp(dim, int(dim * mlp_ratio))
            self.stages.append(Stage([Block(dim, tokens, channels, rate, EPS)]))  # eq. 1
        if self.features_only:
            self.default_indices = four_taps(depth)
        self.describe([dim] * depth, [patch] * depth)
        if not self.features_only:
            self.norm = nn.LayerNorm(dim, eps=EPS)
        self.init_weights()
        self.make_head()

    def init_weights(self) -> None:
        """Every layer normal with variance 1 / inputs and zero bias, as in the JAX code (which cuts the tails)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | Conv):
                if not module.weight.is_meta:  # where torch would import for seconds, to fill nothing
                    nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)

    @classmethod
    def translate(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return from_jax(state, _JAX) if "pre_head_layer_norm/scale" in state else state


_JAX = (  # names of the JAX files
    (r"^MixerBlock_(\d+)/", r"blocks.\1."),
    (r"^pre_head_layer_norm/", "norm."),
    (r"^stem/", "stem.proj."),
    (r"LayerNorm_0/", "norm1."),
    (r"LayerNorm_1/", "norm2."),
    (r"(token|channel)_mixing/Dense_0/", r"mlp_\1s.fc1."),
    (r"(token|channel)_mixing/Dense_1/", r"mlp_\1s.fc2."),
)

_HALF = (0.5, 0.5, 0.5)
_SIZES = {"s": (512, 8), "b": (768, 12), "l": (1024, 24), "h": (1280, 32)}


def _variant(size: str, patch: int, params: float, gmacs: float | None, top1: float | None = None, **more) -> Variant:
    dim, depth = _SIZES[size]
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=0.1) | more
    file = f"https://storage.googleapis.com/mixer_models/imagenet1k/Mixer-{size.upper()}_{patch}.npz"
    where = Weights(file, "Apache-2.0", "direct") if top1 else Weights()
    return Variant(dict(patch=patch, dim=dim, depth=depth), figures, Inputs(224, _HALF, _HALF), where)


FAMILY = Family(
    name="mlp_mixer",
    model=MlpMixer,
    paper="MLP-Mixer: An all-MLP Architecture for Vision",
    venue="NeurIPS 2021",
    arxiv="2105.01601",
    code="github.com/google-research/vision_transformer",
    licence="Apache-2.0",
    # top1: trained on ImageNet-1k alone (folder imagenet21k has B/16 and L/16 before fine-tuning); top1_in21k and
    # top1_jft: after pre-training there, _448 where fine-tuned at 448 pixels, of which no weights were released.
    # params_m and gmacs as timm counts them, H/14 as measured (the paper prints 431); None: not published
    variants={
        "mixer_s32_224": _variant("s", 32, 19.105, 1.00, top1_jft=68.7),
        "mixer_s16_224": _variant("s", 16, 18.528, 3.79, top1_jft=73.8),
        "mixer_b32_224": _variant("b", 32, 60.29, 3.24, top1_jft=75.5),
        "mixer_b16_224": _variant("b", 16, 59.880, 12.62, 76.4, top1_in21k=80.6),
        "mixer_l32_224": _variant("l", 32, 206.94, 11.27, top1_jft=80.7),
        "mixer_l16_224": _variant("l", 16, 208.20, None, 71.8, top1_in21k_448=84.2),
        "mixer_h14_224": _variant("h", 14, 432.35, None, top1_jft_448=87.9),
    },
)
