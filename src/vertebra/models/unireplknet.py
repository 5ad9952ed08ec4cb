"""UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image
Recognition (CVPR 2024, arXiv 2311.15599). Official code: github.com/AILab-CVC/UniRepLKNet, Apache-2.0.

Few large kernels suffice for the receptive field; depth is better bought with small ones. A 13x13 depthwise kernel is
trained beside small dilated ones, which read the same cells more sparsely, and swallows them afterwards:
``vertebra.fuse`` gives the published inference network.

Unusual here: a block has no norm in front but two batch norms behind the large kernel, squeeze-excitation before the
MLP, a global response norm inside it, and a batch norm after it; the second linear layer has a bias only once fused.
The way down is convolution, then norm. Blocks with small kernels have one plain depthwise convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import (
    BatchNorm,
    Conv,
    LayerScale,
    Linear,
    NextBlock,
    PatchEmbed,
    SqueezeExcite,
    drop_path_rates,
    init_truncated,
)
from ..layers.reparam import fold, folded
from ..mixers import DilatedReparam
from ..registry import Family, Inputs, Variant, Weights

EPS = 1e-6
SMALL = (3, 5)  # kernels that need no branches


class ResponseNorm(nn.Module):
    """Global response norm (ConvNeXt V2, arXiv 2301.00808, section 3): (B, *S, C) -> (B, *S, C).

    Each channel's length over the map, relative to the mean over channels, scales it. `beta` is None once fused.
    """

    def __init__(self, ndim: int, dim: int):
        super().__init__()
        shape = (*(1,) * (ndim + 1), dim)
        self.gamma = nn.Parameter(torch.zeros(shape))
        self.beta: nn.Parameter | None = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim - 1)), keepdim=True)
        gain = 1 + self.gamma * (length / (length.mean(-1, keepdim=True) + EPS))
        return x * gain if self.beta is None else torch.addcmul(self.beta, x, gain)


class GatedMlp(nn.Module):
    """Squeeze-excitation, linear, GELU, response norm, linear, batch norm (Fig. 3): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int):
        super().__init__()
        self.se = SqueezeExcite(ndim, dim, dim // 4)
        self.fc1, self.grn = Linear(dim, 4 * dim), ResponseNorm(ndim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim, bias=False)
        self.norm: nn.Module = BatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc2(self.grn(F.gelu(self.fc1(self.se(x))))))

    def absorb(self, scale: Tensor) -> None:
        """Move the response norm's shift, the batch norm and the factor `scale` into the second linear layer."""
        weight, shift = self.fc2.weight, self.grn.beta
        assert isinstance(self.norm, BatchNorm) and shift is not None
        weight, bias = folded(weight, weight.double() @ shift.double().flatten(), self.norm)
        merged = Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=self.fc2.weight.dtype)
        with torch.no_grad():
            merged.weight.copy_(weight * scale.double()[:, None])
            merged.bias.copy_(bias * scale.double())
        self.fc2, self.norm, self.grn.beta = merged, nn.Identity(), None


class Block(NextBlock):
    """x + scale * mlp(norm(large x)) (Fig. 3): (B, *S, C) -> (B, *S, C). A `kernel` of 3 or 5 has no branches."""

    def __init__(self, ndim: int, dim: int, kernel: int, drop_path: float, layer_scale: float):
        plain = Conv(ndim, dim, dim, kernel, groups=dim, bias=False) if kernel in SMALL else None
        mixer = plain or DilatedReparam(ndim, dim, kernel)
        super().__init__(dim, mixer, BatchNorm(dim), GatedMlp(ndim, dim), drop_path, layer_scale)

    def fuse(self, published: bool = True) -> Block:
        """The same map as convolution with bias, gate and MLP alone; nothing is left to fold beyond that."""
        if isinstance(self.norm, BatchNorm):
            assert isinstance(self.mlp, GatedMlp) and isinstance(self.scale, LayerScale)
            if isinstance(self.mixer, DilatedReparam):
                self.mixer.large = fold(self.mixer.merged(), self.norm)
            else:
                self.mixer = fold(self.mixer, self.norm)
            self.mlp.absorb(self.scale.gamma)
            self.norm, self.scale = nn.Identity(), nn.Identity()
        return self


class UniRepLKNet(Backbone):
    """Four stages at strides 4 to 32 (section 3.2). `kernels`: each stage's kernel sizes, repeated over its blocks.

    The dense version norms each output.
    """

    OFFICIAL = (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.down\.proj\.", r"downsample_layers.\1.0."),
        (r"^stages\.(\d+)\.down\.norm\.", r"downsample_layers.\1.1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.mixer\.large\.main\.conv\.", ".dwconv.lk_origin."),
        (r"\.mixer\.large\.main\.norm\.", ".dwconv.origin_bn."),
        (r"\.mixer\.large\.(k\d+_\d+)\.conv\.", r".dwconv.dil_conv_\1."),
        (r"\.mixer\.large\.(k\d+_\d+)\.norm\.", r".dwconv.dil_bn_\1."),
        (r"\.mixer\.large\.", ".dwconv.lk_origin."),
        (r"\.mixer\.", ".dwconv."),
        (r"\.scale\.gamma$", ".gamma"),
        (r"\.mlp\.se\.", ".se."),
        (r"\.mlp\.fc1\.", ".pwconv1.1."),
        (r"\.mlp\.grn\.", ".act.1."),
        (r"\.mlp\.fc2\.", ".pwconv2.0."),
        (r"\.mlp\.norm\.", ".pwconv2.2."),
        (r"^output_norms\.(\d+)", r"norm\1"),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        kernels: Sequence[Sequence[int]] = ((3,), (13,), (13,), (13,)),
        layer_scale: float = 1e-6,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        if len(kernels) != len(dims) or not all(kernels):
            raise ValueError(f"kernels needs one or more sizes for each of {len(dims)} stages, got {kernels!r}")
        half = dims[0] // 2
        self.stem = nn.Sequential(
            Conv(ndim, self.in_chans, half, 3, 2), nn.LayerNorm(half, eps=EPS), nn.GELU(),
            Conv(ndim, half, dims[0], 3, 2), nn.LayerNorm(dims[0], eps=EPS),
        )  # fmt: skip
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            cycle = kernels[i]
            blocks = [Block(ndim, dim, cycle[j % len(cycle)], rate, layer_scale) for j, rate in enumerate(rates[i])]
            down = PatchEmbed(ndim, dims[i - 1], dim, 3, 2, nn.LayerNorm(dim, eps=EPS)) if i else None
            self.stages.append(Stage(blocks, down=down))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if self.features_only:
            self.output_norms = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for dim in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.make_head()
        self.init_weights()

    def init_weights(self) -> None:
        init_truncated(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.norm(features.flatten(1, -2).mean(1))


_URL = "https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main"


def _variant(dim, depths, kernels, params, deploy, gmacs, file, **more) -> Variant:
    config = dict(dims=tuple(dim * 2**i for i in range(4)), depths=depths, kernels=((3,), (13,), kernels, (13,)))
    figures = dict(params_m=params, params_deploy_m=deploy, gmacs=gmacs) | more
    kept = {k: v for k, v in figures.items() if v is not None}
    inputs = Inputs(384, crop=1.0) if "384" in file else Inputs()
    return Variant(config, kept, inputs, Weights(f"{_URL}/unireplknet_{file}.pth", "Apache-2.0", "direct"))


_ALL, _HALF, _THIRD = (13,), (13, 3), (13, 3, 3)
# params_m: the training structure, counted; params_deploy_m and gmacs (at 224): the fused network as the repository
# prints it (gmacs of b counted). B, L and XL exist with ImageNet-22k pre-training and 384 pixels alone, which is what
# _22k_384 says. box/mask AP: COCO Cascade Mask R-CNN; miou, miou_ms: ADE20K UPerNet at one and at several scales, with
# _640 at 640 pixels
FAMILY = Family(
    name="unireplknet",
    model=UniRepLKNet,
    paper="UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and "
    "Image Recognition",
    venue="CVPR 2024",
    arxiv="2311.15599",
    code="github.com/AILab-CVC/UniRepLKNet",
    licence="Apache-2.0",
    variants={
        "unireplknet_a": _variant(40, (2, 2, 6, 2), _ALL, 4.649, 4.4, 0.6, "a_in1k_224_acc77.03", top1=77.0),
        "unireplknet_f": _variant(48, (2, 2, 6, 2), _ALL, 6.489, 6.2, 0.9, "f_in1k_224_acc78.58", top1=78.6),
        "unireplknet_p": _variant(64, (2, 2, 6, 2), _ALL, 11.081, 10.7, 1.6, "p_in1k_224_acc80.23", top1=80.2),
        "unireplknet_n": _variant(80, (2, 2, 8, 2), _ALL, 18.819, 18.3, 2.8, "n_in1k_224_acc81.64", top1=81.6),
        "unireplknet_t": _variant(
            80, (3, 3, 18, 3), _HALF, 31.693, 31, 4.9, "t_in1k_224_acc83.21", top1=83.2, drop_path=0.2,
            cascade_box_ap=51.7, cascade_mask_ap=44.9, miou=48.6, miou_ms=49.1,
        ),
        "unireplknet_s": _variant(
            96, (3, 3, 27, 3), _THIRD, 56.457, 56, 9.1, "s_in1k_224_acc83.91", top1=83.9, drop_path=0.4,
            top1_22k_384=86.4, gmacs_384=26.7, cascade_box_ap=53.0, cascade_mask_ap=45.9, cascade_box_ap_22k=54.3,
            cascade_mask_ap_22k=47.1, miou=50.5, miou_ms=51.0, miou_22k=51.9, miou_ms_22k=52.7, miou_22k_640=52.3,
            miou_ms_22k_640=52.7,
        ),
        "unireplknet_b": _variant(
            128, (3, 3, 27, 3), _THIRD, 99.089, 98, 16.06, "b_in22k_to_in1k_384_acc87.40", top1_22k_384=87.4,
            drop_path=0.2, gmacs_384=47.2, cascade_box_ap_22k=54.8, cascade_mask_ap_22k=47.4, miou_22k_640=53.5,
            miou_ms_22k_640=53.9,
        ),
        "unireplknet_l": _variant(
            192, (3, 3, 27, 3), _THIRD, 220.076, 218, None, "l_in22k_to_in1k_384_acc87.88", top1_22k_384=87.9,
            drop_path=0.3, gmacs_384=105.4, cascade_box_ap_22k=55.8, cascade_mask_ap_22k=48.4, miou_22k_640=54.5,
            miou_ms_22k_640=55.0,
        ),
        "unireplknet_xl": _variant(
            256, (3, 3, 27, 3), _THIRD, 388.691, 386, None, "xl_in22k_to_in1k_384_acc87.96", top1_22k_384=88.0,
            drop_path=0.3, gmacs_384=187, cascade_box_ap_22k=56.4, cascade_mask_ap_22k=49.0, miou_22k_640=55.2,
            miou_ms_22k_640=55.6,
        ),
    },
)  # fmt: skip
