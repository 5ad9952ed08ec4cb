"""Dual Vision Transformer (TPAMI 2023, arXiv 2207.04976). Official code: github.com/YehLi/ImageNetModel, Apache-2.0.

A few semantic tokens, pooled from the first map, travel beside it. In the two early stages (dual) the tokens gather
from the map and refine themselves, and the map reads those few instead of itself, so that high resolutions stay cheap.
In the two late stages (merge) both are one sequence with full self-attention.

Unusual here: with token labelling, as published, the logits are the class token's plus half of the maximum over the
image tokens of a second head; the tokens' own attentions have no output projection, and ReLU, not GELU, in their MLP;
odd blocks of stage 3 have a narrower MLP; the learned queries are resampled, bicubically, to the pooled grid; in the
dense version the very last block drops the semantic tokens before its MLP. The training recipe's mixing of stem tokens
is not part of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage, conv_norms, plus_one
from ..layers import (
    Block,
    Conv,
    ConvNorm,
    CrossAttention,
    DropPath,
    LayerScale,
    Linear,
    Mlp,
    PatchEmbed,
    attend,
    avg_pool,
    check_heads,
    drop_path_rates,
    init_fan_out,
    merge_heads,
    resize,
    split_heads,
)  # fmt: skip
from ..layers.cached import tracing
from ..registry import Family, Variant, Weights

EPS, SCALE = 1e-6, 1e-6  # eps of the blocks' and stages' norms (others have 1e-5); where layer scales start
State = tuple[Tensor, Tensor | None]  # map (B, *S, C), semantic tokens (B, T, C)


def _read(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """Attention of q (B, L, C) to the keys and values kv (B, M, 2 C): (B, L, C)."""
    return merge_heads(attend(split_heads(q, heads)[0], *split_heads(kv, heads, 2)))


class Stem(PatchEmbed):
    """Three convolutions, then an embedding: (B, *S, dim) -> (B, *ceil(S / 4), out)."""

    def __init__(self, ndim: int, dim: int, width: int, out: int):
        super().__init__(ndim, width, out, 3, 2, norm=nn.LayerNorm(out))
        first = ConvNorm(ndim, dim, width, 7, 2, act=nn.ReLU)
        self.convs = nn.Sequential(first, *(ConvNorm(ndim, width, width, 3, act=nn.ReLU) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.convs(x))


class SemanticTokens(nn.Module):
    """The first semantic tokens (section 3.2): (B, *S, C) -> (B, T, C), one for each 7 cells per axis.

    Learned queries, a grid of `SIDE` per axis resampled to the pooled one, attend to the pooled map; the result and the
    pooled map are fused by a softmax gate per channel. Time O(T^2), T = prod(S // 7).
    """

    SIDE, POOL = 8, 7
    no_decay = ("q",)

    def __init__(self, ndim: int, dim: int, dense: bool):
        super().__init__()
        self.dense = dense
        self.q = nn.Parameter(nn.init.trunc_normal_(torch.empty(self.SIDE**ndim, dim), std=0.02))
        self.q_embed = nn.Sequential(nn.LayerNorm(dim), Linear(dim, dim))
        self.kv, self.proxy_ln = Linear(dim, 2 * dim), nn.LayerNorm(dim)
        self.se = nn.Sequential(Linear(dim, dim), nn.ReLU(), Linear(dim, 2 * dim))

    def queries(self, grid: Sequence[int]) -> Tensor:
        """The learned queries on `grid`: (1, T, C)."""
        count, dim = self.q.shape
        if not self.dense and not tracing() and math.prod(grid) == count:
            return self.q.unsqueeze(0)  # the classification code looks at the count alone: 4 x 16 cells pass for 8 x 8
        cells = self.q.reshape(1, *(self.SIDE,) * len(grid), dim)
        return resize(cells, tuple(grid), "cubic").flatten(1, -2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = avg_pool(x, self.POOL)
        cells = pooled.flatten(1, -2)
        q = self.q_embed(self.queries(pooled.shape[1:-1])).expand(x.shape[0], -1, -1)
        gathered = _read(q, self.kv(cells), heads=1)
        gate = self.se((gathered + cells).mean(1)).unflatten(-1, (2, x.shape[-1])).softmax(1)
        return self.proxy_ln(gathered * gate[:, :1] + cells * gate[:, 1:])


class Pathways(nn.Module):
    """One module for the map, another for the semantic tokens."""

    def __init__(self, image: nn.Module, semantic: nn.Module):
        super().__init__()
        self.image, self.semantic = image, semantic

    def forward(self, state: State) -> State:
        return self.image(state[0]), self.semantic(state[1])


class DualAttention(nn.Module):
    """Semantic pathway, then pixel pathway (section 3.3, Fig. 3): (B, *S, C), (B, T, C) -> the same.

    The tokens attend to themselves, gather from the map and pass an MLP; then the map reads them. With N cells time is
    O(N * T) and memory O(N + T). `x` comes normed, `s` does not.
    """

    def __init__(self, dim: int, heads: int, drop_path: float):
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv_proxy = nn.Sequential(nn.LayerNorm(dim), Linear(dim, 3 * dim))
        self.q_proxy_ln, self.q_proxy, self.kv_proxy = nn.LayerNorm(dim), Linear(dim, dim), Linear(dim, 2 * dim)
        self.p_ln = nn.LayerNorm(dim)
        self.mlp_proxy = nn.Sequential(Linear(dim, 4 * dim), nn.ReLU(), Linear(4 * dim, dim))
        self.q, self.proxy_ln, self.kv = Linear(dim, dim), nn.LayerNorm(dim), Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.scale1, self.scale2, self.scale3 = (LayerScale(dim, SCALE) for _ in range(3))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        pixels, heads = x.flatten(1, -2), self.heads
        q, kv = self.qkv_proxy(s).tensor_split((s.shape[-1],), -1)
        s = s + self.drop_path(self.scale1(_read(q, kv, heads)))
        gathered = _read(self.q_proxy(self.q_proxy_ln(s)), self.kv_proxy(pixels), heads)
        s = s + self.drop_path(self.scale2(gathered))
        s = s + self.drop_path(self.scale3(self.mlp_proxy(self.p_ln(s))))
        return self.proj(_read(self.q(pixels), self.kv(self.proxy_ln(s)), heads)).reshape(x.shape), s


class DualBlock(Block):
    """Block of the early stages (Fig. 2): dual attention, then an MLP on the map alone."""

    def forward(self, state: State) -> State:
        x, s = state
        y, s = self.attn(self.norm1(x), s)
        x = x + self.drop_path(self.scale1(y))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x)))), s


class MergeBlock(Block):
    """Block of the late stages (Fig. 2): self-attention over map and tokens, then an MLP for each.

    With `drop_tokens` only the map goes on after attention. Time quadratic in cells and tokens, memory linear.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, drop_tokens: bool):
        super().__init__(dim, attn, mlp, drop_path, EPS, SCALE)
        self.fc_proxy = None
        if not drop_tokens:
            self.fc_proxy = nn.Sequential(Linear(dim, 2 * dim), nn.GELU(), Linear(2 * dim, dim))

    def forward(self, state: State) -> State:
        x, s = state
        pixels = x.flatten(1, -2)
        sizes = (pixels.shape[1], s.shape[1])
        tokens = torch.cat([pixels, s], 1)
        y = self.norm1(tokens)
        tokens = tokens + self.drop_path(self.scale1(self.attn(y, y)))
        pixels, s = tokens.split(sizes, 1)
        x = pixels.reshape(x.shape)
        y = self.scale2(self.mlp(self.norm2(x)))
        if self.fc_proxy is None:
            return x + self.drop_path(y), None
        y, z = self.drop_path.together(y, self.scale2(self.fc_proxy(self.norm2(s))))
        return x + y, s + z


class ClassBlock(Block):
    """Class attention: the mean of all tokens (B, N, C) reads them all, then an MLP: (B, 1, C)."""

    def forward(self, tokens: Tensor) -> Tensor:
        cls = tokens.mean(1, keepdim=True)
        y = self.norm1(torch.cat([cls, tokens], 1))
        cls = cls + self.attn(y[:, :1], y)
        return cls + self.mlp(self.norm2(cls))


class DualViT(Backbone):
    """Two dual and two merge stages (Fig. 2, Table 1). The head reads the last map and the class token (B, C).

    `mlp_ratios` may hold a tuple for a stage whose blocks take turns. Without `token_label` the class token's head
    decides alone. Outputs: logits, class_logits and, with `token_label`, aux_logits (B, N, num_classes).
    """

    heads: ClassVar[tuple[str, ...]] = ("head", "aux_head")
    OFFICIAL = (
        conv_norms(r"patch_embed\.convs", "patch_embed1.conv"),
        (r"^patch_embed\.", "patch_embed1."),
        (r"^semantics\.", ""),
        (r"^norm\.", "norm4."),
        (r"^neck\.", "post_network.0."),
        (r"^stages\.(\d+)\.down\.image\.", lambda m: f"patch_embed{plus_one(m)}."),
        (r"^stages\.(\d+)\.down\.semantic\.", lambda m: f"proxy_embed{plus_one(m)}.proj_proxy."),
        (r"^stages\.(\d+)\.norm\.image\.", lambda m: f"norm{plus_one(m)}."),
        (r"^stages\.(\d+)\.norm\.semantic\.", lambda m: f"norm_proxy{plus_one(m)}."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"block{plus_one(m)}."),
        (r"\.fc_proxy\.", ".mlp.fc_proxy."),
        (r"\.mlp\.middle\.", ".mlp.dwconv.dwconv."),
        (r"\.scale(\d)\.gamma$", r".gamma\1"),
    )

    def __init__(
        self,
        *,
        stem: int,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        mlp_ratios: Sequence[int | Sequence[int]] = (8, 8, (4, 3), 3),
        token_label: bool = True,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans, dense = self.ndim, self.in_chans, self.features_only
        self.token_label = token_label
        self.patch_embed = Stem(ndim, in_chans, stem, dims[0])
        self.semantics = SemanticTokens(ndim, dims[0], dense)
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            last, turns = i == len(dims) - 1, mlp_ratios[i]
            blocks: list[nn.Module] = []
            for j, rate in enumerate(rates[i]):
                hidden = dim * (turns if isinstance(turns, int) else turns[j % len(turns)])
                mlp = Mlp(dim, hidden, middle=Conv(ndim, hidden, hidden, 3, groups=hidden))
                if i < 2:
                    blocks.append(DualBlock(dim, DualAttention(dim, heads[i], rate), mlp, rate, EPS, SCALE))
                else:
                    drop_tokens = dense and last and j == depth - 1
                    blocks.append(MergeBlock(dim, CrossAttention(dim, heads[i]), mlp, rate, drop_tokens))
            down, norm = None, None
            if i:
                image = PatchEmbed(ndim, dims[i - 1], dim, 3, 2, norm=nn.LayerNorm(dim))
                down = Pathways(image, nn.Sequential(Linear(dims[i - 1], dim), nn.LayerNorm(dim)))
            if not last:
                norm = Pathways(nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS))
            self.stages.append(Stage(blocks, down, norm))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        if not dense:
            self.neck = ClassBlock(dims[-1], CrossAttention(dims[-1], heads[-1]), Mlp(dims[-1], 2 * dims[-1]), eps=EPS)
        if not token_label:
            self.heads = ("head",)  # type: ignore[misc]
        self.make_head()
        self.init_weights()
        init_fan_out(self)

    def embed(self, x: Tensor) -> State:
        x = self.patch_embed(x)
        return x, self.semantics(x)

    def to_map(self, state: State, index: int) -> Tensor:
        return state[0]

    def output_norm(self, x: Tensor, index: int) -> Tensor:
        return self.norm(x) if index == len(self.stages) - 1 else x  # earlier stages end in their own

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        x, s = state
        cls = self.neck(torch.cat([x.flatten(1, -2), s], 1))
        return self.norm(x), self.norm(cls).flatten(1)

    def pre_logits(self, features: tuple[Tensor, Tensor]) -> Tensor:
        return features[1]

    def outputs(self, features: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, cls = features
        logits = self.head(cls)
        if not self.token_label or self.num_classes == 0:
            return {"logits": logits}
        aux = self.aux_head(x.flatten(1, -2))
        return {"logits": logits + 0.5 * aux.amax(1), "class_logits": logits, "aux_logits": aux}


def _variant(stem, dims, heads, depths, params, gmacs, top1, top5, drop_path, at_384, **dense) -> Variant:
    config = dict(stem=stem, dims=dims, heads=heads, depths=depths)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, top5=top5, drop_path=drop_path)
    figures |= dict(zip(("gmacs_384", "top1_384", "top5_384"), at_384, strict=True)) | dense
    where = "README of github.com/YehLi/ImageNetModel (Baidu, code nets)"
    return Variant(config, figures, weights=Weights(where, "Apache-2.0", "manual"))


# figures as the repository prints them, with token labelling; COCO 1x: RetinaNet AP, Mask R-CNN box and mask AP; 3x:
# box AP of other detectors; miou: ADE20K UPerNet
FAMILY = Family(
    name="dual_vit",
    model=DualViT,
    paper="Dual Vision Transformer",
    venue="TPAMI 2023",
    arxiv="2207.04976",
    code="github.com/YehLi/ImageNetModel",
    licence="Apache-2.0",
    variants={
        "dualvit_s": _variant(
            32, (64, 128, 320, 448), (2, 4, 10, 14), (3, 4, 6, 3), 25.1, 5.4, 84.1, 96.8, 0.15, (18.4, 85.2, 97.3),
            retinanet_ap=46.2, box_ap=46.5, mask_ap=42.2, miou=49.2,
            gfl_ap_3x=51.3, sparse_rcnn_ap_3x=51.4, atss_ap_3x=51.0, cascade_box_ap_3x=52.4,
        ),
        "dualvit_b": _variant(
            64, (64, 128, 320, 512), (2, 4, 10, 16), (3, 4, 15, 3), 42.6, 9.3, 85.2, 97.2, 0.15, (31.9, 86.0, 97.6),
            retinanet_ap=47.4, box_ap=48.4, mask_ap=43.4, miou=51.7,
        ),
        "dualvit_l": _variant(
            64, (96, 192, 384, 512), (3, 6, 12, 16), (3, 6, 21, 3), 73.0, 18.0, 85.7, 97.4, 0.3, (60.5, 86.5, 97.8)
        ),
    },
)  # fmt: skip
