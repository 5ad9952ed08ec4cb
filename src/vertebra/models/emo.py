"""EMO: Rethinking Mobile Block for Efficient Attention-based Models (ICCV 2023, arXiv 2301.01146). Official code:
github.com/zhangzjn/EMO, no licence stated.

MobileNet's inverted residual and the transformer's attention and MLP are one pattern: expand, mix, shrink. The network
is built from that one block alone; where maps are small its expansion begins with attention in windows.

Unusual here: windows are spread over the map (cells ceil(side / 7) apart) and padded with zeros that take part as keys;
attention averages the normalised input before the expansion; batch norms have eps 1e-6; the convolution inside a block
has a skip of its own; the block that halves the map expands twice as much, from the width before. No positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import BatchNorm, Conv, ConvNorm, DropPath, SqueezeExcite, drop_path_rates
from ..mixers import SpreadWindowAttention
from ..registry import Family, Inputs, Variant, Weights

EPS = 1e-6


class InvertedResidualMobileBlock(nn.Module):
    """iRMB: x + shrink(mix(expand(attend(norm x)))); (B, *S, dim) -> (B, *ceil(S / stride), out).

    Mixing is a depthwise convolution plus the identity. A stride takes away both shortcuts. With `heads` attention in
    windows comes first. `late` blocks have LayerNorm and GELU, others batch norm and SiLU.
    """

    def __init__(
        self, ndim: int, dim: int, out: int, ratio: float, kernel: int = 3, stride: int = 1, heads: int | None = None,
        window: int | None = 7, late: bool = False, drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        hidden = int(dim * ratio)
        self.skip = stride == 1 and dim == out
        self.norm = nn.LayerNorm(dim, eps=EPS) if late else BatchNorm(dim, eps=EPS)
        self.attn = SpreadWindowAttention(ndim, dim, heads, window) if heads else nn.Identity()
        self.v, self.act = Conv(ndim, dim, hidden), nn.GELU() if late else nn.SiLU()
        self.local = ConvNorm(ndim, hidden, hidden, kernel, stride, groups=hidden, act=nn.SiLU, eps=EPS)
        self.proj = Conv(ndim, hidden, out, bias=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.v(self.attn(self.norm(x))))
        if not self.skip:
            return self.proj(self.local(y))
        return x + self.drop_path(self.proj(y + self.local(y)))


class EMO(Backbone):
    """A stem at stride 2 and four stages at strides 4 to 32.

    `head_dims` are channels per head, None for a stage without attention; the first block of a stage never attends.
    """

    OFFICIAL = (
        (r"^stem\.0\.(conv|norm)\.", lambda m: f"stage0.0.convs.0.{int(m[1] == 'norm')}."),
        (r"^stem\.1\.", "stage0.1.conv_local."),
        (r"^stem\.2\.(down|up)\.", lambda m: f"stage0.1.se.conv_{'reduce' if m[1] == 'down' else 'expand'}."),
        (r"^stem\.3\.", "stage0.1.proj."),
        (r"^stages\.([23])\.blocks\.(\d+)\.norm\.", r"stages.\1.blocks.\2.norm.norm."),
        (r"^stages\.(\d)\.blocks\.", lambda m: f"stage{int(m[1]) + 1}."),
        (r"\.attn\.qk\.", ".qk.conv."),
        (r"\.(v|proj)\.", r".\1.conv."),
        (r"\.local\.", ".conv_local."),
        (r"^norm\.", "norm.norm."),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        ratios: Sequence[float],
        head_dims: Sequence[int | None],
        stem: int = 24,
        kernels: Sequence[int] = (3, 3, 5, 5),
        window: int | None = 7,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        for dim, width in zip(dims, head_dims, strict=True):
            if width is not None and (width < 1 or dim % width):
                raise ValueError(f"head_dims: {dim} channels do not divide into heads of {width}")
        self.stem = nn.Sequential(
            ConvNorm(ndim, self.in_chans, stem, 3, 2, bias=True, eps=EPS),
            ConvNorm(ndim, stem, stem, 3, groups=stem, act=nn.SiLU, eps=EPS),
            SqueezeExcite(ndim, stem, stem, act=nn.SiLU),
            Conv(ndim, stem, stem, bias=False),
        )
        self.stages, before = nn.ModuleList(), stem
        for i, dim in enumerate(dims):
            common = dict(kernel=kernels[i], late=i >= 2)
            heads = None if head_dims[i] is None else dim // head_dims[i]
            blocks = [
                InvertedResidualMobileBlock(
                    ndim, dim, dim, ratios[i], heads=heads, window=window, drop_path=rate, **common
                )
                for rate in rates[i][1:]
            ]
            down = InvertedResidualMobileBlock(ndim, before, dim, 2 * ratios[i], stride=2, **common)
            self.stages.append(Stage([down, *blocks]))
            before = dim
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if not self.features_only:
            self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


_URL = "https://github.com/zhangzjn/EMO/raw/27d9b40fea9c2a12a2fe7acc51032184852a99d8/resources"


def _variant(size, dims, depths, ratios, heads, drop_path, params, gmacs, top1, top5, **more) -> Variant:
    config = dict(dims=dims, depths=depths, ratios=ratios, head_dims=(None, None, *heads))
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, top5=top5, drop_path=drop_path) | more
    return Variant(config, figures, Inputs(), Weights(f"{_URL}/EMO_{size}/net.pth", "none stated", "direct"))


# params_m, gmacs, top1 and top5 as the repository prints them (counted: 1.36, 2.38, 5.11 and 6.17 M). COCO: box_ap
# SSDLite at 320 pixels, retinanet_ap RetinaNet 1x; ADE20K: miou DeepLabv3, pspnet_miou PSPNet
FAMILY = Family(
    name="emo",
    model=EMO,
    paper="Rethinking Mobile Block for Efficient Attention-based Models",
    venue="ICCV 2023",
    arxiv="2301.01146",
    code="github.com/zhangzjn/EMO",
    licence="none stated",
    variants={
        "emo_1m": _variant(
            "1M", (32, 48, 80, 168), (2, 2, 8, 3), (2, 2.5, 3, 3.5), (20, 21), 0.04036, 1.3, 0.261, 71.5, 90.4,
            box_ap=22.0, retinanet_ap=34.4, miou=33.5, pspnet_miou=33.2,
        ),
        "emo_2m": _variant(
            "2M", (32, 48, 120, 200), (3, 3, 9, 3), (2, 2.5, 3, 3.5), (20, 20), 0.05, 2.3, 0.439, 75.1, 92.2,
            box_ap=25.2, retinanet_ap=36.2, miou=35.3, pspnet_miou=34.5,
        ),
        "emo_5m": _variant(
            "5M", (48, 72, 160, 288), (3, 3, 9, 3), (2, 3, 4, 4), (32, 32), 0.05, 5.1, 0.903, 78.4, 94.0,
            box_ap=27.9, retinanet_ap=38.9, miou=37.8, pspnet_miou=38.2,
        ),
        "emo_6m": _variant(
            "6M", (48, 72, 160, 320), (3, 3, 9, 3), (2, 3, 4, 5), (20, 32), 0.05, 6.1, 0.961, 79.0, 94.2
        ),
    },
)  # fmt: skip
