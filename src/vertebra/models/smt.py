"""SMT: Scale-Aware Modulation Meet Transformer (ICCV 2023, arXiv 2307.08579). Official code: github.com/AFeng-x/SMT,
MIT.

Where maps are large, convolutions of several widths modulate the values instead of attention; where they are small,
attention takes over; in the third stage both take turns, so that local turns into global step by step.

Unusual here: what the heads give is interleaved channel by channel before it is mixed; the embeddings' norms have eps
1e-5, those of blocks and stages 1e-6; the norm that ends a stage feeds the next one. The large model has layer scales,
as its published training configuration (not the factory function) has them. A dense file of the authors calls the
convolution of the values `dw_conv`; both names load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage, conv_norms, plus_one
from ..layers import Block, ConvStem, Mlp, PatchEmbed, ResidualConv, drop_path_rates, init_fan_out
from ..mixers import LocalEnhancedAttention, ScaleAwareModulation
from ..registry import Family, Inputs, Variant, Weights

EPS = 1e-6


class SMT(Backbone):
    """The pyramid of Fig. 2. `mixers` names each stage's: M modulation, A attention, repeated over its blocks."""

    OFFICIAL = (
        conv_norms(r"patch_embed\.convs", "patch_embed1.conv"),
        (r"^patch_embed\.convs\.1\.", "patch_embed1.conv.3."),
        (r"^patch_embed\.", "patch_embed1."),
        (r"^stages\.(\d+)\.down\.", lambda m: f"patch_embed{plus_one(m)}."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"block{plus_one(m)}."),
        (r"^stages\.(\d+)\.norm\.", lambda m: f"norm{plus_one(m)}."),
        (r"\.attn\.local\.(\d+)\.", lambda m: f".attn.local_conv_{plus_one(m)}."),
        (r"\.attn\.norm\.", ".attn.bn."),
        (r"\.mlp\.middle\.conv\.", ".mlp.dwconv.dwconv."),
        (r"\.scale(\d)\.gamma$", r".gamma_\1"),
    )

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int] = (64, 128, 256, 512),
        mlp_ratios: Sequence[float] = (4, 4, 4, 2),
        mixers: Sequence[str] = ("M", "M", "MA", "A"),
        heads: Sequence[int] = (4, 4, 8, 16),
        scales: int = 4,
        stem_kernel: int = 3,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        if len(mixers) != len(dims) or not all(mixers) or set("".join(mixers)) - set("MA"):
            raise ValueError(f"mixers needs letters of M, A for each of {len(dims)} stages, got {tuple(mixers)}")
        self.patch_embed = ConvStem(ndim, self.in_chans, dims[0], stem_kernel)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks, hidden = [], int(dim * mlp_ratios[i])
            for j, rate in enumerate(rates[i]):
                attn: nn.Module
                if mixers[i][j % len(mixers[i])] == "M":
                    attn = ScaleAwareModulation(ndim, dim, scales)
                else:
                    attn = LocalEnhancedAttention(ndim, dim, heads[i])
                mlp = Mlp(dim, hidden, middle=ResidualConv(ndim, hidden))
                blocks.append(Block(dim, attn, mlp, rate, EPS, layer_scale))
            down = PatchEmbed(ndim, dims[i - 1], dim, 3, 2, norm=nn.LayerNorm(dim)) if i else None
            self.stages.append(Stage(blocks, down=down, norm=nn.LayerNorm(dim, eps=EPS)))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        self.make_head()
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        init_fan_out(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    @classmethod
    def translate(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace(".attn.dw_conv.", ".attn.local_conv."): tensor for name, tensor in state.items()}


_URL = "https://github.com/AFeng-x/SMT/releases/download/v1.0.0"
_WIDE = dict(mlp_ratios=(8, 6, 4, 2), stem_kernel=7)


def _variant(file, depths, params, gmacs, top1, top5, drop_path, config=None, **more) -> Variant:
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, top5=top5, drop_path=drop_path) | more
    return Variant(
        dict(depths=depths) | (config or {}), figures, Inputs(), Weights(f"{_URL}/{file}.pth", "MIT", "direct")
    )


# params_m, gmacs, top1 and top5 as the repository prints them (small: counted, 21 M is printed; large: pre-trained on
# ImageNet-22k, _384: fine-tuned at 384 pixels). COCO 3x: Mask R-CNN box_ap and mask_ap, RetinaNet; ADE20K UPerNet miou,
# miou_ms at several scales
FAMILY = Family(
    name="smt",
    model=SMT,
    paper="Scale-Aware Modulation Meet Transformer",
    venue="ICCV 2023",
    arxiv="2307.08579",
    code="github.com/AFeng-x/SMT",
    licence="MIT",
    variants={
        "smt_tiny": _variant("smt_tiny", (2, 2, 8, 1), 11.5, 2.4, 82.2, 96.0, 0.1),
        "smt_small": _variant(
            "smt_small", (3, 4, 18, 2), 22.55, 4.7, 83.7, 96.5, 0.2, box_ap_3x=49.0, mask_ap_3x=43.4,
            cascade_box_ap_3x=51.9, cascade_mask_ap_3x=44.7, retinanet_ap_3x=47.3, miou=49.2, miou_ms=50.2,
        ),
        "smt_base": _variant(
            "smt_base", (4, 6, 28, 2), 32, 7.7, 84.3, 96.9, 0.3, _WIDE, box_ap_3x=49.8, mask_ap_3x=44.0, miou=49.6,
            miou_ms=50.6,
        ),
        "smt_large": _variant(
            "smt_large_22k_224_ft", (4, 6, 28, 4), 81, 17.6, 87.1, 98.1, 0.4,
            _WIDE | dict(dims=(96, 192, 384, 768), layer_scale=1e-4), gmacs_384=51.6, top1_384=88.1, top5_384=98.4,
        ),
    },
)  # fmt: skip
