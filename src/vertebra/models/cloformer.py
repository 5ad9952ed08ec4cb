"""CloFormer: Rethinking Local Perception in Lightweight Vision Transformer (2023, arXiv 2303.17803). Official code:
github.com/qhfan/CloFormer, MIT.

In every block some heads attend to a pooled map, for what is far and of low frequency, and the others look near by a
depthwise convolution whose result is weighted by its own content, for what is fine. The share of global heads grows
with depth, and the pooling shrinks so that there are always 49 keys at 224 pixels.

Unusual here: there is no patch merging: the last block of a stage makes the map smaller inside its MLP, after attention
at the high resolution, and its shortcut is a dense 5x5 convolution. Norms have one group, over all channels and cells.
The local gate is scaled by the head width although it has no heads. A stage's map is what its ordinary blocks give; the
block that shrinks it is the next stage's way `down`, under the number that it has in the published stage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage, plus_one
from ..layers import Block, Conv, ConvNorm, DeepStem, DownBlock, Mlp, OneGroup, drop_path_rates
from ..mixers import CloAttention
from ..registry import Family, Variant


class ShrinkingPyramid(Backbone):
    """Four stages at strides 4 to 32 whose last blocks shrink the map: what CloFormer and FAT have in common."""

    OFFICIAL: ClassVar[Rules] = (
        (r"^patch_embed\.convs\.(\d+)\.conv\.", lambda m: f"patch_embed.conv{plus_one(m)}.conv.0."),
        (r"^patch_embed\.convs\.(\d+)\.norm\.", lambda m: f"patch_embed.conv{plus_one(m)}.conv.1."),
        (r"^patch_embed\.proj\.", "patch_embed.conv5."),
        (r"^patch_embed\.norm\.", "patch_embed.layernorm."),
        (r"^stages\.(\d+)\.down\.", lambda m: f"layers.{int(m[1]) - 1}.blocks."),
        (r"^stages\.", "layers."),
        (r"\.shortcut\.0\.conv\.", ".downsample.0."),
        (r"\.shortcut\.0\.norm\.", ".downsample.1."),
        (r"\.shortcut\.1\.", ".downsample.2."),
    )

    def grow(
        self, dims: Sequence[int], depths: Sequence[int], drop_path_rate: float,
        make: Callable[[int, float, int | None], nn.Module],
    ) -> None:  # fmt: skip
        """Build everything; `make(i, rate, out)` gives a block of stage i, with `out` one that shrinks the map."""
        if len(depths) != len(dims) or min(depths) < 1:
            raise ValueError(f"depths needs a number of at least 1 for each of {len(dims)} stages, got {tuple(depths)}")
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = DeepStem(self.ndim, self.in_chans, dims[0])
        self.stages, down = nn.ModuleList(), None
        for i in range(len(dims)):
            here = rates[i] if i == len(dims) - 1 else rates[i][:-1]
            self.stages.append(Stage([make(i, rate, None) for rate in here], down=down))
            if len(here) < len(rates[i]):
                down = nn.Sequential(OrderedDict({str(len(here)): make(i, rates[i][-1], dims[i + 1])}))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if not self.features_only:  # there is no published dense version: raw maps
            self.norm = OneGroup(dims[-1])
        self.make_head()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


class CloFormer(ShrinkingPyramid):
    """The pyramid. Each stage has its heads, their `shares` (local ones per kernel, global last), kernels and
    pooling window."""

    OFFICIAL: ClassVar[Rules] = (
        *ShrinkingPyramid.OFFICIAL,
        (r"\.attn\.(q|kv)\.", r".attn.global_\1."),
        (r"\.attn\.local\.(\d+)\.qkv\.", r".attn.qkvs.\1."),
        (r"\.attn\.local\.(\d+)\.conv\.", r".attn.convs.\1."),
        (r"\.attn\.local\.(\d+)\.gate\.", r".attn.act_blocks.\1.act_block."),
        (r"\.mlp\.middle\.", ".mlp.dwconv."),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        heads: Sequence[int],
        shares: Sequence[Sequence[int]],
        depths: Sequence[int] = (2, 2, 6, 2),
        kernels: Sequence[Sequence[int]] = ((3,), (5,), (7,), (9,)),
        windows: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        mlp_kernel: int = 5,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim = self.ndim

        def make(i: int, rate: float, out: int | None) -> nn.Module:
            dim, hidden = dims[i], int(dims[i] * mlp_ratio)
            attn = CloAttention(ndim, dim, heads[i], shares[i], kernels[i], windows[i])
            local = Conv(ndim, hidden, hidden, mlp_kernel, 2 if out else 1, groups=hidden)
            mlp = Mlp(dim, hidden, out, middle=local, linear=partial(Conv, ndim), act_first=True)
            if out is None:
                return Block(dim, attn, mlp, rate, norm=OneGroup)
            shortcut = nn.Sequential(ConvNorm(ndim, dim, dim, 5, 2, bias=True), Conv(ndim, dim, out))
            return DownBlock(dim, attn, mlp, shortcut, rate, norm=OneGroup)

        self.grow(dims, depths, drop_path_rate, make)


def _variant(dims, heads, shares, params, gmacs, top1) -> Variant:
    config = dict(dims=dims, heads=heads, shares=shares)
    return Variant(config, dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=0.0))


# figures as the paper prints them; drop path as the published configuration has it; no weights were ever published
FAMILY = Family(
    name="cloformer",
    model=CloFormer,
    paper="Rethinking Local Perception in Lightweight Vision Transformer",
    venue="arXiv 2023",
    arxiv="2303.17803",
    code="github.com/qhfan/CloFormer",
    licence="MIT",
    variants={
        "cloformer_xxs": _variant((32, 64, 128, 256), (4, 4, 8, 16), ((3, 1), (2, 2), (4, 4), (4, 12)), 4.2, 0.6, 77.0),
        "cloformer_xs": _variant((48, 96, 160, 352), (3, 6, 10, 22), ((2, 1), (3, 3), (5, 5), (7, 15)), 7.2, 1.1, 79.8),
        "cloformer_s": _variant(
            (64, 128, 224, 448), (4, 8, 14, 28), ((3, 1), (4, 4), (7, 7), (7, 21)), 12.3, 2.0, 81.6
        ),
    },
)
