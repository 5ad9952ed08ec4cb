"""CF-ViT: A General Coarse-to-Fine Method for Vision Transformer (AAAI 2023, arXiv 2203.03821).
Official code: github.com/ChenMnZ/CF-ViT, Apache-2.0.

One network runs twice. First on a coarse image of half the size, a quarter of the tokens; if that answer is not sure,
on the image itself, but only the half of the coarse patches that the class token looked at most is split into fine
ones. What the first run computed is added to the fine patches.

Unusual here: the score of a patch is the class token's attention, averaged over layers as they come, so only that row
of each map is computed and attention stays fused; patches that are not split enter the second run as embeddings from
before the first; the coarse image is resized with align_corners=True. In the DeiT models the second run without a
selection (training before epoch 201) goes without positions, a slip of the official code: `full_positions` mends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import (
    Attention,
    Block,
    Conv,
    ConvNorm,
    Mlp,
    PatchEmbed,
    Positions,
    attend,
    built_grid,
    crop,
    drop_path_rates,
    merge_heads,
    pad_to,
    resize,
    space_to_depth,
    split_heads,
    windows,
)
from ..registry import Family, Inputs, Variant, Weights

PATCH, MOMENTUM, FIRST_SCORED = 16, 0.99, 3  # beta of eq. 7; the first block that counts, from 0


class State(NamedTuple):
    """Tokens (B, 1 + L, C) on their way, and what else the run knows."""

    tokens: Tensor
    score: Tensor | None = None  # first run: attention of the class token so far, (B, 1 + L)
    coarse: Tensor | None = None  # second run: the first run's normed tokens (B, 1 + M, C)
    place: Tensor | None = None  # second run: which token stands for each fine cell, (B, N)
    grid: tuple[int, ...] = ()  # second run: the fine cells, and how many of them hold image
    sides: tuple[int, ...] = ()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, M, C) by an index (B, K) -> (B, K, C)."""
    batch, count, dim = x.shape
    start = count * torch.arange(batch, device=x.device).unsqueeze(1)
    return x.reshape(batch * count, dim).index_select(0, (index + start).flatten()).reshape(*index.shape, dim)


class ClassRowAttention(Attention):
    """Self-attention that on request also tells how much the first token looks at each: (B, L, C) -> same, (B, L)."""

    def forward(self, x: Tensor, row: bool = False) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        y = self.proj(merge_heads(attend(q, k, v)))
        if not row:
            return y, None
        first = q[:, :, :1].detach() * q.shape[-1] ** -0.5  # only an order is read from it: no gradient
        return y, (first @ k.detach().transpose(-2, -1)).softmax(-1).mean((1, 2))


class Half(nn.Module):
    """LV-ViT's factor on both branches of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class ScoringBlock(Block):
    """A block that in the first run keeps the moving average of the class token's attention (eq. 7)."""

    def __init__(self, dim, attn, mlp, drop_path: float, eps: float, halve: bool, scored: bool):
        super().__init__(dim, attn, mlp, drop_path, eps)
        self.scored = scored
        if halve:
            self.scale1, self.scale2 = Half(), Half()  # type: ignore[assignment]

    def forward(self, state: State) -> State:
        x, score = state.tokens, state.score
        y, row = self.attn(self.norm1(x), row=self.scored and score is not None)
        x = x + self.drop_path(self.scale1(y))
        x = x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
        return State(x, score if row is None else MOMENTUM * score + (1 - MOMENTUM) * row, *state[2:])


class LVStem(nn.Module):
    """LV-ViT's four convolutions: (B, *S, dim) -> (B, *S / 16, out)."""

    def __init__(self, ndim: int, dim: int, out: int, width: int = 64):
        super().__init__()
        self.convs = nn.Sequential(
            ConvNorm(ndim, dim, width, 7, 2, act=nn.ReLU),
            ConvNorm(ndim, width, width, 3, act=nn.ReLU),
            ConvNorm(ndim, width, width, 3, act=nn.ReLU),
        )
        self.proj = Conv(ndim, width, out, 8, 8, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.convs(x))


class CFDeiT(Backbone):
    """Coarse-to-fine DeiT (Fig. 2). An image is padded with zeros to multiples of 32, the coarse one is half of it.

    ``logits`` are the second run's, of the informative half (`alpha`) of the coarse patches, or of all fine patches
    with `select` False, which is how the first 200 epochs train (an attribute, so that training can switch it).
    ``forward_outputs`` adds ``coarse_logits``, ``early_exit_logits`` (the coarse ones where their probability reaches
    `threshold`; 1 means never) and, in evaluation, ``full_fine_logits``. The method `early_exit` spares sure samples
    the second run. forward_features gives the tokens of the second run, of the first, and which stands for each cell.

    There is no dense version. forward_intermediates gives maps of the second run, a token that was not split repeated
    over its cells.
    """

    tokens = True
    no_decay = ("cls_token",)
    OFFICIAL = (
        (r"^pos_embed\.(\d)\.table$", r"pos_embed_list.\1"),
        (r"^stages\.(\d+)\.blocks\.0\.", r"blocks.\1."),
        (r"^patch_embed\.convs\.(\d)\.conv", lambda m: f"patch_embed.conv{int(m[1]) + 1}"),
        (r"^patch_embed\.convs\.(\d)\.norm", lambda m: f"patch_embed.bn{int(m[1]) + 1}"),
    )
    eps: ClassVar[float] = 1e-6
    qkv_bias: ClassVar[bool] = True
    halve: ClassVar[bool] = False
    stem: ClassVar[Any] = staticmethod(lambda ndim, dim, out: PatchEmbed(ndim, dim, out, PATCH))

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        alpha: float = 0.5,
        threshold: float = 1.0,
        select: bool = True,
        full_positions: bool = False,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        if self.features_only:
            raise ValueError("CF-ViT has no dense version (half of its tokens stay coarse): use forward_intermediates")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha, the share of patches to split, must be in (0, 1], got {alpha!r}")
        if threshold < 0:
            raise ValueError(f"threshold is a probability (1: never leave early), got {threshold!r}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.alpha, self.threshold = Fraction(alpha).limit_denominator(1000), threshold
        self.select, self.full_positions = select, full_positions
        self.patch_embed = self.stem(ndim, in_chans, dim)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        coarse = built_grid(img_size, ndim, 2 * PATCH)
        self.pos_embed = nn.ModuleList(Positions(dim, [n * c for c in coarse], 1) for n in (1, 2))
        self.stages = nn.ModuleList()
        hidden = int(dim * mlp_ratio)
        for i, rate in enumerate(drop_path_rates(drop_path_rate, [depth])[0]):
            attn = ClassRowAttention(dim, heads, self.qkv_bias)
            # a network of so few layers that none is late enough counts its last
            scored = i >= min(FIRST_SCORED, depth - 1)
            block = ScoringBlock(dim, attn, Mlp(dim, hidden), rate, self.eps, self.halve, scored)
            self.stages.append(Stage([block]))
        self.norm = nn.LayerNorm(dim, eps=self.eps)
        self.reuse_block = nn.Sequential(nn.LayerNorm(dim, eps=self.eps), Mlp(dim, hidden))
        self.describe([dim] * depth, [PATCH] * depth)
        self.make_head()
        self.init_weights()

    # --- the two runs -----------------------------------------------------------------------------------------------

    def coarse(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First run -> normed tokens (B, 1 + M, C), their embeddings, scores of the M patches."""
        x = self.patch_embed(resize(image, [s // 2 for s in image.shape[1:-1]], align_corners=True))
        token = self.cls_token.expand(x.shape[0], -1, -1)
        embedded = torch.cat([token, x.flatten(1, -2)], 1) + self.pos_embed[0](tuple(x.shape[1:-1]))
        state, _ = self.through(State(embedded, embedded.new_zeros(embedded.shape[:2])))
        return self.norm(state.tokens), embedded, state.score[:, 1:]

    def fine(self, image: Tensor, normed: Tensor, embedded: Tensor, score: Tensor, select: bool) -> State:
        """The tokens that the second run starts from (section 3.3): fine ones by coarse patch, then whole coarse ones.

        Feature reuse (eq. 9) is one vector per coarse patch, added to each of its fine ones.
        """
        x = self.patch_embed(image)
        batch, dim, grid = x.shape[0], x.shape[-1], tuple(x.shape[1:-1])
        count, per = embedded.shape[1] - 1, 2**self.ndim
        cells = space_to_depth(x, 2).reshape(batch, count, per, dim)
        cells = cells + self.reuse_block(normed[:, 1:]).unsqueeze(2)
        token = self.cls_token.expand(batch, -1, -1)
        if select or self.full_positions:
            table = self.pos_embed[1](grid)
            token = token + table[:, :1]
            cells = cells + space_to_depth(table[:, 1:].reshape(1, *grid, dim), 2).reshape(1, count, per, dim)
        offset = torch.arange(per, device=x.device)
        if select:
            kept = (count * self.alpha.numerator + self.alpha.denominator - 1) // self.alpha.denominator
            order = score.argsort(1, descending=True)
            split = take(cells.reshape(batch, count, per * dim), order[:, :kept]).reshape(batch, kept * per, dim)
            tokens = torch.cat([token, split, take(embedded[:, 1:], order[:, kept:])], 1)
            rank = order.argsort(1).unsqueeze(-1)
            place = torch.where(rank < kept, per * rank + offset, (per - 1) * kept + rank)
        else:
            tokens = torch.cat([token, cells.flatten(1, 2)], 1)
            place = (per * torch.arange(count, device=x.device).unsqueeze(-1) + offset).expand(batch, -1, -1)
        back = windows(grid, (2,) * self.ndim, device=x.device).back
        return State(tokens, None, normed, place.flatten(1).index_select(1, back), grid)

    def embed(self, x: Tensor) -> State:
        image = pad_to(x, 2 * PATCH)
        sides = tuple((s + PATCH - 1) // PATCH for s in x.shape[1:-1])
        return self.fine(image, *self.coarse(image), self.select)._replace(sides=sides)

    def finish(self, state: State) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.norm(state.tokens), state.coarse, state.place

    def to_map(self, state: State, index: int) -> Tensor:
        cells = take(state.tokens[:, 1:], state.place)
        return crop(cells.reshape(cells.shape[0], *state.grid, cells.shape[-1]), state.sides)

    # --- the answers ------------------------------------------------------------------------------------------------

    def classify(self, tokens: Tensor, coarse: bool = False) -> Tensor:
        """Logits from normed tokens (B, 1 + L, C) of either run."""
        return self.head(tokens[:, 0])

    def pre_logits(self, features: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return features[0][:, 0]

    def outputs(self, features: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        if not self.num_classes:
            return {"logits": self.pre_logits(features)}
        fine, coarse = self.classify(features[0]), self.classify(features[1], coarse=True)
        early = torch.where(self.unsure(coarse, self.threshold).unsqueeze(1), fine, coarse)
        return {"logits": fine, "coarse_logits": coarse, "early_exit_logits": early}

    @staticmethod
    def unsure(logits: Tensor, threshold: float) -> Tensor:
        """(B,) whether a sample needs the second run: its largest probability is below `threshold`."""
        highest = logits.softmax(-1).amax(-1)
        return highest < threshold if threshold < 1 else torch.ones_like(highest, dtype=torch.bool)

    def forward_outputs(self, x: Tensor) -> dict[str, Tensor]:
        self._check(x)
        image = pad_to(x.movedim(1, -1).contiguous(), 2 * PATCH)
        first = self.coarse(image)
        features = self.finish(self.through(self.fine(image, *first, self.select))[0])
        found = self.outputs(features) | self.extras(features)
        if self.num_classes and not (self.training and self.select):  # a third run that no loss reads
            if self.select:
                everything = self.finish(self.through(self.fine(image, *first, False))[0])
                found["full_fine_logits"] = self.classify(everything[0])
            else:
                found["full_fine_logits"] = found["logits"]
        return found

    def extras(self, features: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        """What a loss may want beside the logits."""
        return {}

    def early_exit(self, x: Tensor, threshold: float | None = None) -> Tensor:
        """``early_exit_logits`` with the second run for unsure samples only (section 3.4): not for export, its batch
        depends on the data. `threshold` defaults to the model's."""
        if not self.num_classes:
            raise ValueError("early exit reads probabilities: the model needs num_classes of at least 1")
        self._check(x)
        image = pad_to(x.movedim(1, -1).contiguous(), 2 * PATCH)
        normed, embedded, score = self.coarse(image)
        logits = self.classify(normed, coarse=True)
        rows = self.unsure(logits, self.threshold if threshold is None else threshold).nonzero().squeeze(1)
        if not rows.shape[0]:
            return logits
        state = self.fine(image[rows], normed[rows], embedded[rows], score[rows], self.select)
        return logits.index_copy(0, rows, self.classify(self.finish(self.through(state)[0])[0]))


class CFLVViT(CFDeiT):
    """Coarse-to-fine LV-ViT: convolutional stem, halved branches, and a second head that reads every patch.

    ``forward_outputs`` adds ``class_logits`` (the class token's alone) and ``aux_logits`` (B, N, num_classes), one row
    per fine cell, for token labelling.
    """

    heads = ("head", "aux_head")
    eps, qkv_bias, halve, stem = 1e-5, False, True, LVStem

    def classify(self, tokens: Tensor, coarse: bool = False) -> Tensor:
        logits = self.head(tokens[:, 0]) + 0.25 * self.aux_head(tokens[:, 1:]).max(1)[0]
        return logits / 1.25 if coarse else logits

    def extras(self, features: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        if not self.num_classes:
            return {}
        fine, _, place = features
        return {"class_logits": self.head(fine[:, 0]), "aux_logits": take(self.aux_head(fine[:, 1:]), place)}


# the same variants with img_size=288 (9x9 coarse patches): *_288; gmacs: coarse and fine run together
_DRIVE = Weights("README of github.com/ChenMnZ/CF-ViT (Google Drive)", "Apache-2.0", "manual")
_LVVIT = dict(model=CFLVViT, dim=384, depth=16, heads=6, mlp_ratio=3.0, full_positions=True)

FAMILY = Family(
    name="cf_vit",
    model=CFDeiT,
    paper="CF-ViT: A General Coarse-to-Fine Method for Vision Transformer",
    venue="AAAI 2023",
    arxiv="2203.03821",
    code="github.com/ChenMnZ/CF-ViT",
    licence="Apache-2.0",
    # params_m and gmacs as counted, top1 as the README prints it (no early exit)
    variants={
        "cf_deit_small": Variant(
            dict(dim=384, depth=12, heads=6),
            dict(
                params_m=23.252, gmacs=4.01, top1=80.8, params_m_288=23.31, gmacs_288=6.76, top1_288=81.9, drop_path=0.1
            ),
            Inputs(224),
            _DRIVE,
        ),
        "cf_lvvit_small": Variant(
            _LVVIT,
            dict(
                params_m=27.058,
                gmacs=6.15,
                top1=83.6,
                params_m_288=27.12,
                gmacs_288=10.34,
                top1_288=84.4,
                drop_path=0.1,
            ),
            Inputs(224, crop=0.9),
            _DRIVE,
        ),
    },
)
