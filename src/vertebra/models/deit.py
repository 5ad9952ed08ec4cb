"""DeiT: Training data-efficient image transformers & distillation through attention (ICML 2021, arXiv 2012.12877).
Official code: github.com/facebookresearch/deit, Apache-2.0.

ViT trained on ImageNet-1k alone. The distilled models have a second prefix token whose own head learns from a teacher,
as the class token's head learns from the label; the prediction is the mean of both heads' logits.

Unusual here: the official code returns a pair of logits while training; here ``forward_outputs`` has both by name in
either mode. A table of positions of another grid is resampled without antialiasing on loading (fine-tuning, as the
official code does), with it in the forward pass (as timm does).
"""

from __future__ import annotations

from torch import Tensor

from ..registry import Family, Inputs, Variant, Weights
from .vit import VisionTransformer


class DeiT(VisionTransformer):
    """ViT with DeiT's initialisation and its rule for fine-tuning at another size."""

    prefix_std = 0.02
    load_antialias = False


class DistilledDeiT(DeiT):
    """DeiT with a distillation token behind the class token (Fig. 2): outputs logits, class_logits, dist_logits."""

    prefix = ("cls_token", "dist_token")
    no_decay = prefix
    pools = ("token",)
    heads = ("head", "head_dist")

    def pre_logits(self, features: Tensor) -> Tensor:
        return (features[:, 0] + features[:, 1]) / 2

    def outputs(self, features: Tensor) -> dict[str, Tensor]:
        by_class, by_teacher = self.head(features[:, 0]), self.head_dist(features[:, 1])
        return {"logits": (by_class + by_teacher) / 2, "class_logits": by_class, "dist_logits": by_teacher}


_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def _variant(name: str, digits: str, params: float, gmacs: float | None, top1: float) -> Variant:
    size, img = name.split("_")[1], int(name.rsplit("_", 1)[1])
    dim, heads = _SIZES[size]
    config = dict(patch=16, dim=dim, depth=12, heads=heads) | (dict(model=DistilledDeiT) if "distilled" in name else {})
    where = Weights(f"https://dl.fbaipublicfiles.com/deit/{name}-{digits}.pth", "Apache-2.0", "direct", digits)
    return Variant(config, dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=0.1), Inputs(img), where)


_TABLE = {  # digits of the file's name, params_m, gmacs, top1 as the repository's README prints it
    "deit_tiny_patch16_224": ("a1311bcf", 5.717, 1.26, 72.2),
    "deit_small_patch16_224": ("cd65a155", 22.05, 4.61, 79.9),
    "deit_base_patch16_224": ("b5f2ef4d", 86.57, 17.58, 81.8),
    "deit_tiny_distilled_patch16_224": ("b40b3cf7", 5.911, 1.27, 74.5),
    "deit_small_distilled_patch16_224": ("649709d9", 22.436, 4.63, 81.2),
    "deit_base_distilled_patch16_224": ("df68dfff", 87.34, 17.68, 83.4),
    "deit_base_patch16_384": ("8de9b5d1", 86.86, None, 82.9),
    "deit_base_distilled_patch16_384": ("d0272ac0", 87.63, None, 85.2),
}

FAMILY = Family(
    name="deit",
    model=DeiT,
    paper="Training data-efficient image transformers & distillation through attention",
    venue="ICML 2021",
    arxiv="2012.12877",
    code="github.com/facebookresearch/deit",
    licence="Apache-2.0",
    variants={name: _variant(name, *row) for name, row in _TABLE.items()},
)
