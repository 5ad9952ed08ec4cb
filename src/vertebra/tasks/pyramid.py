"""Feature maps at strides 4, 8, 16, 32 from any backbone: what heads for segmentation and detection read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone
from ..layers.space import ConvTranspose, channels_first, channels_last, max_pool

FINEST, COARSEST = 4, 32  # the strides that the papers' dense heads are written for


def _nominal(reduction: int) -> int:
    """The power of two nearest to a stride: patches of 14 count as 16."""
    return 2 ** round(math.log2(reduction))


def _halved(x: Tensor) -> Tensor:
    """Maximum over cells of two per axis, at ragged ends over those that exist: (B, *S, C) -> (B, *ceil(S / 2), C)."""
    pads = [v for side in reversed(x.shape[1:-1]) for v in (0, side % 2)]
    return max_pool(F.pad(x, [0, 0, *pads], value=float("-inf")), 2)


class Finer(nn.Sequential):
    """A map at 2^`doublings` times the resolution, (B, *S, dim) -> (B, *(2^n S), dim / 2^n).

    2x2 transposed convolutions of stride two, each halving the channels, with layer norm and GELU between them: the
    simple feature pyramid of ViTDet (arXiv 2203.16527, section 3).
    """

    def __init__(self, ndim: int, dim: int, doublings: int):
        parts: list[nn.Module] = []
        for _ in range(doublings):
            if parts:
                parts += [nn.LayerNorm(dim, eps=1e-6), nn.GELU()]
            parts.append(ConvTranspose(ndim, dim, max(dim // 2, 1)))
            dim = max(dim // 2, 1)
        super().__init__(*parts)
        self.dim = dim


class Pyramid(nn.Module):
    """The maps of `backbone` as a pyramid: (B, C, *S) -> list of (B, channels[i], *S_i) at ascending `strides`.

    A stage's map is taken as it is, the last one where several have the same stride; strides below 4 are left out.
    Levels that the network lacks are made as in ViTDet's simple feature pyramid (arXiv 2203.16527): finer ones down to
    stride 4 by transposed convolutions from its finest map (`Finer`), coarser ones up to stride 32 by 2x2 maxima of its
    coarsest. A network of equal strides (a plain ViT, a mixer) so gets a pyramid from its last map, one that begins at
    stride 8 or 16 its finer levels; with ``finer=False`` the latter keep their own levels alone, for necks that make
    finer ones themselves.

    `strides` are powers of two; those of a network with patches of 14 are the nearest ones.
    """

    def __init__(self, backbone: Backbone, finer: bool = True):
        super().__init__()
        if not backbone.features_only:
            raise ValueError("a pyramid needs a backbone built with features_only=True")
        self.backbone, self.ndim = backbone, backbone.ndim
        strides = {i: _nominal(backbone.feature_info[i]["reduction"]) for i in backbone.out_indices}
        own = {s: i for i, s in strides.items() if s >= FINEST}
        if len(own) < 2:  # one resolution: its last map is all there is
            last = backbone.out_indices[-1]
            own, finer = {strides[last]: last}, True
        first, end = min(own), max(own)
        self.indices = tuple(own[s] for s in sorted(own))
        dims = [backbone.feature_info[i]["num_chs"] for i in self.indices]
        above = [first // s for s in (4, 8, 16, 32) if s < first] if finer else []
        self.finer = nn.ModuleList(Finer(self.ndim, dims[0], factor.bit_length() - 1) for factor in above)
        below = [s for s in (4, 8, 16, 32) if s > end]
        self._halvings = [(s // end).bit_length() - 1 for s in below]
        self._kept = [k for k, s in enumerate(sorted(own)) if s >= FINEST]
        self.strides = (*(first // f for f in above), *(s for s in sorted(own) if s >= FINEST), *below)
        self.channels = (*(m.dim for m in self.finer), *(dims[k] for k in self._kept), *(dims[-1] for _ in below))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone.forward_intermediates(x, self.indices)
        finer, coarser = [], []
        if len(self.finer):
            finest = channels_last(maps[0])
            finer = [channels_first(up(finest)) for up in self.finer]
        if self._halvings:
            state, done = channels_last(maps[-1]), 0
            for halvings in self._halvings:
                for _ in range(halvings - done):
                    state = _halved(state)
                done = halvings
                coarser.append(channels_first(state))
        return [*finer, *(maps[k] for k in self._kept), *coarser]


def prefixed_groups(groups: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """`groups` of timm's group_matcher for a module that lies under `prefix` (as "pyramid.backbone.")."""

    def below(rule: Any) -> Any:
        if isinstance(rule, str):
            return re.sub(r"^\^?", lambda _: "^" + re.escape(prefix) + ("" if rule.startswith("^") else ".*?"), rule)
        if isinstance(rule, tuple):
            return (below(rule[0]), *rule[1:])
        return [below(each) for each in rule]

    return {name: below(rule) for name, rule in groups.items()}


class OnPyramid(nn.Module):
    """What networks on a `pyramid` answer for their backbone: checkpointing and timm's groups of parameters."""

    pyramid: Pyramid

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
        self.pyramid.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the backbone's parameters that are exempt from weight decay."""
        return {f"pyramid.backbone.{name}" for name in self.pyramid.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's layer groups; what matches none of them (neck and heads) is timm's last group."""
        return prefixed_groups(self.pyramid.backbone.group_matcher(coarse), "pyramid.backbone.")
