"""ViT: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale (ICLR 2021, arXiv 2010.11929); the
small variants and the AugReg weights are of How to train your ViT? (TMLR 2022, arXiv 2106.10270). Official code (JAX):
github.com/google-research/vision_transformer, Apache-2.0.

The image is cut into patches, each becomes a token, and a plain transformer encoder does the rest: a class token in
front gathers what the head reads, a learned table says where each patch was.

Unusual here: positions are added after the class token is in place; norms have eps 1e-6; GELU is the exact one, as
every PyTorch port has it (the JAX code's tanh form moves the third or fourth digit of the logits).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage, four_taps
from ..layers import Attention, Mlp, PatchEmbed, Positions, TokenBlock, built_grid, drop_path_rates, ntuple
from ..registry import Family, Inputs, Variant, Weights

EPS = 1e-6
State = tuple[Tensor, tuple[int, ...]]  # tokens (B, P + N, C) with P prefix tokens, and the grid of the N patches


class VisionTransformer(Backbone):
    """Patches, prefix tokens, positions, encoder (Fig. 1). Each block is a stage, so that any depth can be tapped.

    A ragged image end is filled with zeros to whole patches. On another grid the table of positions is resampled,
    antialiased, in the forward pass. `global_pool` says what the head reads: "token" the normed class token, "avg" the
    mean over the patches, normed after pooling. The dense version (four taps, evenly spaced) gives raw maps.

    Class attributes for descendants: `prefix` names the prefix tokens in their order; `load_antialias` is the rule for
    a table of another grid in a checkpoint; `eps` that of every layer norm. Methods for them: `make_stem`,
    `make_positions`, `make_block`.
    """

    tokens = True
    prefix: ClassVar[tuple[str, ...]] = ("cls_token",)
    prefix_std: ClassVar[float] = 1e-6
    pools: ClassVar[tuple[str, ...]] = ("token", "avg")
    load_antialias: ClassVar[bool] = True
    eps: ClassVar[float] = EPS
    no_decay = prefix
    OFFICIAL: ClassVar[Rules] = ((r"^pos_embed\.table$", "pos_embed"), (r"^stages\.(\d+)\.blocks\.0\.", r"blocks.\1."))

    def __init__(
        self,
        *,
        patch: int,
        dim: int,
        depth: int = 12,
        heads: int,
        mlp_ratio: float = 4.0,
        global_pool: str = "token",
        drop_path_rate: float = 0.0,
        img_size: int | Sequence[int] = 224,
        **contract: Any,
    ):
        super().__init__(**contract)
        if global_pool not in self.pools:
            raise ValueError(f"global_pool must be one of {', '.join(self.pools)}, got {global_pool!r}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.global_pool = global_pool
        self.patch_embed = self.make_stem(dim, patch)
        for name in self.prefix:
            setattr(self, name, nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=self.prefix_std)))
        self.pos_embed = self.make_positions(dim, ntuple(img_size, self.ndim, "img_size"), patch)
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        hidden = int(dim * mlp_ratio)
        self.stages = nn.ModuleList(Stage([self.make_block(dim, heads, hidden, rate)]) for rate in rates)
        if self.features_only:
            self.default_indices = four_taps(depth)
        self.describe([dim] * depth, [patch] * depth)
        if not self.features_only:
            self.add_module("norm" if global_pool == "token" else "fc_norm", nn.LayerNorm(dim, eps=self.eps))
        self.make_head()
        self.init_weights()

    def make_stem(self, dim: int, patch: int) -> nn.Module:
        """Image (B, *S, in_chans) -> patches (B, *grid, dim)."""
        return PatchEmbed(self.ndim, self.in_chans, dim, patch, pad=True)

    def make_positions(self, dim: int, img_size: tuple[int, ...], patch: int) -> Positions:
        """The table of positions for the patches of an image of `img_size`."""
        grid = built_grid(img_size, self.ndim, patch)
        return Positions(dim, grid, len(self.prefix), load_antialias=self.load_antialias)

    def make_block(self, dim: int, heads: int, hidden: int, drop_path: float) -> nn.Module:
        """One block of the encoder, state to state; `hidden` is the width inside the MLP."""
        return TokenBlock(dim, Attention(dim, heads), Mlp(dim, hidden), drop_path, self.eps)

    def embed(self, x: Tensor) -> State:
        patches = self.patch_embed(x)
        grid = tuple(patches.shape[1:-1])
        front = [getattr(self, name).expand(patches.shape[0], -1, -1) for name in self.prefix]
        return torch.cat([*front, patches.flatten(1, -2)], 1) + self.pos_embed(grid), grid

    def to_map(self, state: State, index: int) -> Tensor:
        tokens, grid = state
        return tokens[:, len(self.prefix) :].reshape(tokens.shape[0], *grid, tokens.shape[-1])

    def finish(self, state: State) -> Tensor:
        return self.norm(state[0]) if self.global_pool == "token" else state[0]

    def pre_logits(self, features: Tensor) -> Tensor:
        if self.global_pool == "token":
            return features[:, 0]
        return self.fc_norm(features[:, len(self.prefix) :].mean(1))

    @classmethod
    def translate(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return from_jax(state) if "Transformer/encoder_norm/scale" in state else state


_JAX = (  # names of the JAX files, in order; big_vision numbers the parts of a block 0, 1, 0 instead of 0, 2, 1, 3
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm."),
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed.proj."),
    (r"LayerNorm_0/", "norm1."),
    (r"LayerNorm_[12]/", "norm2."),
    (r"MultiHeadDotProductAttention_[01]/", "attn."),
    (r"attn\.out/", "attn.proj."),
    (r"MlpBlock_[013]/Dense_0/", "mlp.fc1."),
    (r"MlpBlock_[013]/Dense_1/", "mlp.fc2."),
)


def from_jax(state: dict[str, Tensor], names: Rules = _JAX) -> dict[str, Tensor]:
    """The arrays of an official JAX file under PyTorch names (by the rules `names`) and in PyTorch's layouts.

    Kernels are (*K, in, out) there, attention's (dim, heads, D) and for the output (heads, D, dim).
    """
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        kernel = name.endswith("/kernel")
        for pattern, replacement in (*names, (r"/", "."), (r"\.(kernel|scale)$", ".weight")):
            name = re.sub(pattern, replacement, name)
        if ".attn.proj." in name:
            tensor = tensor.flatten(0, 1).T if kernel else tensor
        elif ".attn." in name:
            tensor = tensor.flatten(1).T if kernel else tensor.flatten()
        elif kernel:
            tensor = tensor.movedim((-1, -2), (0, 1))
        found[name] = tensor
    for name in [n for n in found if ".attn.query." in n]:
        parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        found[name.replace("query", "qkv")] = torch.cat(parts)
    return found


_HALF = (0.5, 0.5, 0.5)
_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def _variant(size, patch, img, params, gmacs, top1, file="", folder="augreg", status="direct", **more) -> Variant:
    dim, depth, heads = _SIZES[size]
    figures = dict(params_m=params, gmacs=gmacs, top1=top1) | more
    if folder == "augreg":
        file += f"-res_{img}"
    where = Weights(f"https://storage.googleapis.com/vit_models/{folder}/{file}.npz", "Apache-2.0", status)
    inputs = Inputs(img, _HALF, _HALF, crop=0.9 if img == 224 else 1.0)
    return Variant(dict(patch=patch, dim=dim, depth=depth, heads=heads), figures, inputs, where)


def _augreg(name: str, recipe: str, rate: float) -> str:
    return f"{name}-i21k-300ep-lr_0.001-{recipe}--imagenet2012-steps_20k-lr_{rate}"


_TI16 = _augreg("Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", 0.03)
_S16 = _augreg("S_16", "aug_light1-wd_0.03-do_0.0-sd_0.0", 0.03)
_S32 = _augreg("S_32", "aug_light1-wd_0.03-do_0.0-sd_0.0", 0.03)
_B8 = _augreg("B_8", "aug_medium1-wd_0.1-do_0.0-sd_0.0", 0.01)
_B16 = _augreg("B_16", "aug_medium1-wd_0.1-do_0.0-sd_0.0", 0.01)
_B32_224 = _augreg("B_32", "aug_medium1-wd_0.03-do_0.0-sd_0.0", 0.03)
_B32_384 = _augreg("B_32", "aug_light1-wd_0.1-do_0.0-sd_0.0", 0.03)
_L16 = _augreg("L_16", "aug_medium1-wd_0.1-do_0.1-sd_0.1", 0.01)

FAMILY = Family(
    name="vit",
    model=VisionTransformer,
    paper="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale; How to train your ViT?",
    venue="ICLR 2021; TMLR 2022",
    arxiv="2010.11929, 2106.10270",
    code="github.com/google-research/vision_transformer",
    licence="Apache-2.0",
    # top1 of the AugReg weights (ImageNet-21k, then 1k) as timm measured them; top1_in1k: trained on ImageNet-1k alone;
    # top1_original: the first paper's weights; gmacs None: not published
    variants={
        "vit_tiny_patch16_224": _variant("tiny", 16, 224, 5.72, 1.26, 75.45, _TI16),
        "vit_tiny_patch16_384": _variant("tiny", 16, 384, 5.79, 4.70, 78.44, _TI16),
        "vit_small_patch32_224": _variant("small", 32, 224, 22.88, 1.15, 76.01, _S32),
        "vit_small_patch32_384": _variant("small", 32, 384, 22.92, 3.45, 80.48, _S32),
        "vit_small_patch16_224": _variant("small", 16, 224, 22.05, 4.61, 81.40, _S16, top1_in1k=78.84),
        "vit_small_patch16_384": _variant("small", 16, 384, 22.20, None, 83.81, _S16, top1_in1k=81.13),
        "vit_base_patch32_224": _variant("base", 32, 224, 88.22, 4.41, 80.73, _B32_224, top1_in1k=74.91),
        "vit_base_patch32_384": _variant("base", 32, 384, 88.30, 13.06, 83.36, _B32_384, top1_in1k=78.75),
        "vit_base_patch16_224": _variant("base", 16, 224, 86.57, 17.58, 84.53, _B16, top1_original=81.78),
        "vit_base_patch16_384": _variant("base", 16, 384, 86.86, None, 86.01, _B16, top1_original=84.21),
        "vit_base_patch8_224": _variant("base", 8, 224, 86.58, None, 85.84, _B8),
        "vit_large_patch16_224": _variant("large", 16, 224, 304.3, None, 85.86, _L16),
        "vit_large_patch16_384": _variant("large", 16, 384, 304.7, None, 87.10, _L16),
        "vit_large_patch32_384": _variant(
            "large", 32, 384, 306.6, None, 81.51, "ViT-L_32", folder="imagenet21k+imagenet2012"
        ),
        # the paper's 88.55 is of 518 pixels after pre-training on JFT; the released file is of ImageNet-21k, head zero
        "vit_huge_patch14_224": _variant(
            "huge", 14, 224, 632, None, None, "ViT-H_14", folder="imagenet21k", status="manual", top1_jft_518=88.55
        ),
    },
)
