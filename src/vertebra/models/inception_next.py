"""InceptionNeXt: When Inception Meets ConvNeXt (CVPR 2024, arXiv 2303.16900). Official code:
github.com/sail-sg/inceptionnext, Apache-2.0.

ConvNeXt's 7x7 depthwise convolution costs little arithmetic but much memory traffic. Here it is taken apart: most
channels are left alone, a few go through a small square and through one long band per axis.

Unusual here: norms are batch norms, on the mixer's output and before each way down; the last stage's MLP ratio is 3;
the head is an MLP whose norm comes after its activation, and nothing is normed before the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import BatchNorm, Conv, Linear, Mlp, NextBlock, PatchEmbed, drop_path_rates, init_truncated
from ..mixers import InceptionMixer
from ..registry import Family, Inputs, Variant, Weights


class InceptionNeXt(Backbone):
    """Four stages at strides 4 to 32 (Table 2). A ragged end is cut off by each non-overlapping convolution.

    The repository has no dense version: features_only gives raw maps.
    """

    OFFICIAL = (
        (r"^head\.", "head.fc2."),
        (r"^neck\.0\.", "head.fc1."),
        (r"^neck\.2\.", "head.norm."),
        (r"^stem\.proj\.", "stem.0."),
        (r"^stem\.norm\.", "stem.1."),
        (r"\.down\.", ".downsample."),
        (r"\.mixer\.square\.", ".token_mixer.dwconv_hw."),
        (r"\.mixer\.bands\.(\d)\.", lambda m: f".token_mixer.dwconv_{'whd'[int(m[1])]}."),
        (r"\.scale\.gamma$", ".gamma"),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float] = (4, 4, 4, 3),
        ratio: float = 0.125,
        band: int = 11,
        layer_scale: float = 1e-6,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        self.stem = PatchEmbed(ndim, self.in_chans, dims[0], 4, norm=BatchNorm(dims[0]))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                mlp = Mlp(dim, int(dim * mlp_ratios[i]), linear=partial(Conv, ndim))
                mixer = InceptionMixer(ndim, dim, ratio, band=band)
                blocks.append(NextBlock(dim, mixer, BatchNorm(dim), mlp, rate, layer_scale))
            down = None
            if i:
                down = nn.Sequential(BatchNorm(dims[i - 1]), Conv(ndim, dims[i - 1], dim, 2, 2, padding=0))
            self.stages.append(Stage(blocks, down=down))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        hidden = 3 * dims[-1]
        if not self.features_only:
            self.neck = nn.Sequential(Linear(dims[-1], hidden), nn.GELU(), nn.LayerNorm(hidden, eps=1e-6))
        self.make_head(hidden)
        self.init_weights()

    def init_weights(self) -> None:
        init_truncated(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(features.flatten(1, -2).mean(1))


_URL = "https://github.com/sail-sg/inceptionnext/releases/download/model"


def _variant(name, dim, depth, drop_path, params, gmacs, top1, size=224, depths=None, **config) -> Variant:
    config |= dict(dims=tuple(dim * 2**i for i in range(4)), depths=depths or (3, 3, depth, 3))
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path)
    inputs = Inputs(size, crop=0.875 if size == 224 else 1.0)
    return Variant(config, figures, inputs, Weights(f"{_URL}/{name}.pth", "Apache-2.0", "direct"))


_ATTO = dict(depths=(2, 2, 6, 2), ratio=0.25, band=9)
# file, dim, depth of stage 3, drop path, params_m, gmacs and top1 as the repository prints them
_TABLE: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "inceptionnext_atto": ((40, 6, 0.1, 4.2, 0.51, 75.3), _ATTO),
    "inceptionnext_tiny": ((96, 9, 0.1, 28, 4.2, 82.3), {}),
    "inceptionnext_small": ((96, 27, 0.3, 49, 8.4, 83.5), {}),
    "inceptionnext_base": ((128, 27, 0.4, 87, 14.9, 84.0), {}),
    "inceptionnext_base_384": ((128, 27, 0.7, 87, 43.6, 85.2, 384), {}),
}

FAMILY = Family(
    name="inception_next",
    model=InceptionNeXt,
    paper="InceptionNeXt: When Inception Meets ConvNeXt",
    venue="CVPR 2024",
    arxiv="2303.16900",
    code="github.com/sail-sg/inceptionnext",
    licence="Apache-2.0",
    variants={name: _variant(name, *row, **config) for name, (row, config) in _TABLE.items()},
)
