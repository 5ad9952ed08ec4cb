"""GLNet: Revisiting the Integration of Convolution and Attention for Vision Backbone (NeurIPS 2024, arXiv 2411.14429).
Official code: github.com/rayleizhu/GLMix, MIT.

Convolution and attention work side by side at different grains: convolution on the fine grid, attention on 64 slots,
which are soft clusters of the cells. The whole costs no more than convolution, even in the first stage.

Unusual here: slots start from the block's raw input, before its position convolution and norm, but collect what is
normed; no residual around attention among slots. Norms are batch norms between stages and before the head, layer norms
with eps 1e-6 in blocks. Swin-T's layout (stl) has neither position nor MLP convolutions, and its merges norm first.
Token labelling adds half of the best cell's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage
from ..layers import BatchNorm, Block, Conv, ConvNorm, LayerScale, Linear, Mlp, ResidualConv, drop_path_rates
from ..mixers import GLMixAttention, GlobalAttention
from ..registry import Family, Variant, Weights

EPS = 1e-6


class SlotBlock(Block):
    """GLMix block (Fig. 2): the seeds of the slots are taken first; (B, *S, C) -> (B, *S, C)."""

    attn: GLMixAttention

    def forward(self, x: Tensor) -> Tensor:
        seeds = self.attn.seeds(x)
        x = self.position(x)
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x), seeds)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class GLNet(Backbone):
    """The pyramid. `mixers` names each stage's kinds of block, repeated over its depth: S slots, A plain attention."""

    plain: ClassVar[bool] = False  # without convolutions for positions and in the MLP
    OFFICIAL: ClassVar[Rules] = (
        (
            r"^patch_embed\.(\d)\.(conv|norm)\.",
            lambda m: f"downsample_layers.0.{3 * int(m[1]) + 1 + (m[2] == 'norm')}.",
        ),
        (r"^patch_embed\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.down\.", r"downsample_layers.\1."),
        (r"^(downsample_layers\.\d+)\.(conv|norm)\.", lambda m: f"{m[1]}.{int(m[2] == 'norm')}."),
        (r"\.attn\.(slot_scale|init_slots)$", r".\1"),
        (r"\.attn\.local\.", ".feature_conv."),
        (r"\.attn\.relation\.", ".relation_mha."),
        (r"\.attn\.", ".mha_op."),
        (r"\.qkv\.(weight|bias)$", r".in_proj_\1"),
        (r"\.proj\.(weight|bias)$", r".out_proj.\1"),
        (r"\.position\.conv\.", ".pos_conv."),
        (r"\.scale([12])\.gamma$", r".ls\1.gamma"),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.middle\.conv\.", ".mlp.1."),
        (r"\.blocks\.(\d+)\.mlp\.fc2\.", r".blocks.\1.mlp.3."),
        (r"^aux_head\.", "tklb_aux_head."),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int] = (4, 4, 18, 4),
        mixers: Sequence[str] = ("S", "S", "SA", "A"),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        slots: int = 64,
        learned_slots: bool = False,
        kernel: int = 5,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        if len(mixers) != len(dims) or not all(mixers) or set("".join(mixers)) - set("SA"):
            raise ValueError(f"mixers needs letters of S, A for each of {len(dims)} stages, got {tuple(mixers)}")
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"dims {tuple(dims)} do not all divide into heads of {head_dim}")
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        self.patch_embed = self.stem(dims[0])
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks, heads = [], dim // head_dim
            for j, rate in enumerate(rates[i]):
                attn: nn.Module
                if mixers[i][j % len(mixers[i])] == "S":
                    attn = GLMixAttention(ndim, dim, heads, slots, kernel, learned_slots)
                else:
                    attn = GlobalAttention(dim, heads)
                blocks.append(self.block(dim, attn, int(dim * mlp_ratio), rate, layer_scale))
            self.stages.append(Stage(blocks, down=self.merge(dims[i - 1], dim) if i else None))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if not self.features_only:  # there is no published dense version: raw maps
            self.norm = BatchNorm(dims[-1])
        self.make_head()
        self.init_weights()

    def stem(self, dim: int) -> nn.Module:
        """Image -> first map: (B, *S, in_chans) -> (B, *ceil(S / 4), dim)."""
        first = ConvNorm(self.ndim, self.in_chans, dim // 2, 3, 2, act=nn.GELU, bias=True)
        return nn.Sequential(first, ConvNorm(self.ndim, dim // 2, dim, 3, 2, bias=True))

    def merge(self, dim: int, out: int) -> nn.Module:
        """Between stages: (B, *S, dim) -> (B, *ceil(S / 2), out)."""
        return ConvNorm(self.ndim, dim, out, 3, 2, bias=True)

    def block(self, dim: int, attn: nn.Module, hidden: int, rate: float, layer_scale: float | None) -> Block:
        ndim, slotted = self.ndim, isinstance(attn, GLMixAttention)
        linear = Linear if self.plain and not slotted else partial(Conv, ndim)
        mlp = Mlp(dim, hidden, middle=None if self.plain else ResidualConv(ndim, hidden), linear=linear)
        position = None if self.plain else ResidualConv(ndim, dim)
        block = (SlotBlock if slotted else Block)(dim, attn, mlp, rate, EPS, layer_scale, position)
        if layer_scale is not None:  # checkpoints have those of channels-first branches with further axes
            shape = (1, dim, *(1,) * ndim)
            block.scale1 = LayerScale(dim, layer_scale, shape if slotted else None)
            block.scale2 = LayerScale(dim, layer_scale, None if linear is Linear else shape)
        return block

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


class GLNetSTL(GLNet):
    """Swin-T's layout: plain patches (a ragged end is cut off), no convolutions but those of GLMix."""

    plain = True
    OFFICIAL = (*GLNet.OFFICIAL, (r"^(stages\.3\..*\.mlp)\.3\.", r"\1.2."))

    def stem(self, dim: int) -> nn.Module:
        return ConvNorm(self.ndim, self.in_chans, dim, 4, 4, padding=0, bias=True)

    def merge(self, dim: int, out: int) -> nn.Module:
        return nn.Sequential(BatchNorm(dim), Conv(self.ndim, dim, out, 2, 2, padding=0))


class GLNetTokenLabel(GLNet):
    """With a second head on every cell. Outputs: logits, class_logits (the mean's) and aux_logits (B, N, classes)."""

    heads = ("head", "aux_head")

    def outputs(self, features: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.pre_logits(features))
        if self.num_classes == 0:
            return {"logits": logits}
        aux = self.aux_head(features.flatten(1, -2))
        return {"logits": logits + 0.5 * aux.amax(1), "class_logits": logits, "aux_logits": aux}


_STL = dict(model=GLNetSTL, depths=(2, 2, 6, 2), mixers=("S", "S", "S", "A"), mlp_ratio=4.0)


def _variant(name, dim, drop_path, params, gmacs, top1, **config) -> Variant:
    where = Weights(f"README of github.com/rayleizhu/GLMix (OneDrive): {name}.pth", "MIT", "manual")
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path)
    return Variant(dict(dims=tuple(dim * 2**i for i in range(4))) | config, figures, weights=where)


# name, width of the first stage, drop path, params_m, gmacs and top1 as the repository prints them (16g: of the
# averaged weights, which its file has as model_ema; plain ones 84.9)
_TABLE: tuple[tuple[Any, ...], ...] = (
    ("glnet_stl", 96, 0.1, 30, 4.4, 82.5, _STL),
    ("glnet_stl_paramslot", 96, 0.1, 30, 4.4, 82.1, _STL | dict(learned_slots=True)),
    ("glnet_4g", 64, 0.15, 27, 4.5, 83.7, {}),
    ("glnet_9g", 96, 0.3, 60, 9.7, 84.5, {}),
    ("glnet_16g", 128, 0.4, 106, 16.7, 85.0, dict(layer_scale=1e-4)),
    ("glnet_4g_tklb", 64, 0.1, 27, 4.5, 84.4, dict(model=GLNetTokenLabel)),
    ("glnet_9g_tklb", 96, 0.1, 61, 9.7, 85.3, dict(model=GLNetTokenLabel)),
)

FAMILY = Family(
    name="glnet",
    model=GLNet,
    paper="Revisiting the Integration of Convolution and Attention for Vision Backbone",
    venue="NeurIPS 2024",
    arxiv="2411.14429",
    code="github.com/rayleizhu/GLMix",
    licence="MIT",
    variants={name: _variant(name, *row, **config) for name, *row, config in _TABLE},
)
