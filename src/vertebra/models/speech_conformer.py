"""Conformer for speech: Conformer: Convolution-augmented Transformer for Speech Recognition (Interspeech 2020, arXiv
2005.08100). The authors published no model code; here are the two implementations in PyTorch that people use:
torchaudio.models.Conformer (github.com/pytorch/audio, BSD-2-Clause) and github.com/sooftware/conformer (Apache-2.0).
Their weights do not fit each other.

Attention sees the whole utterance, convolution the neighbourhood; each layer has both, one after the other, between two
half steps of a feed-forward network.

Unusual here: every layer ends with a norm. torchaudio's form is the layers alone: no positions, frames in and frames
out. sooftware's reads 80 log-mel bins as an image of time by frequency, makes time four times shorter without padding,
tells distances by sines inside of attention, and ends in log-probabilities per frame. As published, padded frames leak:
torchaudio's form masks them as keys but not in the convolution, sooftware's nowhere; `mask_padding` closes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage, four_taps
from ..layers import Conv, Linear, Mlp
from ..layers.cached import tracing
from ..layers.space import channels_first
from ..layers.window import KEY_MASK
from ..mixers import ConvolutionModule, GlobalAttention, RelativeAttention
from ..registry import Family, Inputs, Variant, Weights

# frames (B, *S, C); what is no padding (B, *S, 1); what attention adds to its scores (B, 1, 1, N). The last two None
# where nothing is masked
State = tuple[Tensor, Tensor | None, Tensor | None]
# where the parts of the convolution module stand in torchaudio's sequence; in sooftware's two places later
_PLACES = {"norm": 0, "expand": 0, "depthwise": 2, "inner_norm": 3, "project": 5}


class HalfFeedForward(nn.Module):
    """x + FFN(x) / 2, norm first (Fig. 4): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.mlp = Mlp(dim, hidden, act=nn.SiLU, middle=nn.Dropout(dropout), act_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.drop(self.mlp(self.norm(x)))


class ConformerLayer(nn.Module):
    """Feed-forward, attention, convolution, feed-forward, norm (eq. 1), state to state.

    `convolution_first` changes places of attention and convolution. With `mask_padding` the convolution masks too.
    """

    def __init__(
        self, dim: int, hidden: int, attn: nn.Module, conv: ConvolutionModule, dropout: float,
        convolution_first: bool, mask_padding: bool,
    ):  # fmt: skip
        super().__init__()
        self.convolution_first, self.mask_padding = convolution_first, mask_padding
        self.ffn1, self.ffn2 = (HalfFeedForward(dim, hidden, dropout) for _ in range(2))
        self.attn_norm, self.attn, self.conv = nn.LayerNorm(dim), attn, conv
        self.norm, self.drop = nn.LayerNorm(dim), nn.Dropout(dropout)

    def convolve(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return x + self.drop(self.conv(x, valid if self.mask_padding else None))

    def forward(self, state: State) -> State:
        x, valid, keys = state
        x = self.ffn1(x)
        if self.convolution_first:
            x = self.convolve(x, valid)
        x = x + self.drop(self.attn(self.attn_norm(x), keys))
        if not self.convolution_first:
            x = self.convolve(x, valid)
        return self.norm(self.ffn2(x)), valid, keys


class ConformerEncoder(Backbone):
    """What both forms share: layers, lengths, masks. Each layer is a stage; the dense version gives four of them.

    `lengths` (B,), an integer for each sample, says how many frames are no padding: model(x, lengths=lengths). At
    higher ranks it is (B, ndim), one for each axis. With `mask_padding` the valid frames are what the sequence alone
    gives; frames beyond mean nothing. `norm` is that in the convolution module: "batch", "group" (torchaudio's
    use_group_norm) or "layer". `dropout` acts in training (published: 0.1), not on attention weights.
    """

    reduction: ClassVar[int] = 1
    shortest: ClassVar[int] = 1  # frames that give one frame
    conv_bias: ClassVar[bool] = True
    always_masked: ClassVar[bool] = True  # keys, also where mask_padding is off

    def __init__(
        self, *, dim: int, depth: int, heads: int, kernel: int = 31, mlp_ratio: float = 4.0, norm: str = "batch",
        convolution_first: bool = False, mask_padding: bool = False, dropout: float = 0.0, **contract: Any,
    ):  # fmt: skip
        super().__init__(**contract)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        self.mask_padding, self.stages = mask_padding, nn.ModuleList()
        for _ in range(depth):
            conv = ConvolutionModule(self.ndim, dim, kernel, norm, self.conv_bias)
            attn, hidden = self.make_attention(dim, heads), int(dim * mlp_ratio)
            layer = ConformerLayer(dim, hidden, attn, conv, dropout, convolution_first, mask_padding)
            self.stages.append(Stage([layer]))
        if self.features_only:
            self.default_indices = four_taps(depth)
        self.describe([dim] * depth, [self.reduction] * depth)

    def make_attention(self, dim: int, heads: int) -> nn.Module:
        """Attention of one layer, called with tokens and the bias that masks keys."""
        return GlobalAttention(dim, heads)

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def min_size(self) -> int:
        return self.shortest

    def subsample(self, x: Tensor) -> Tensor:
        """Input (B, *S, in_chans) -> frames (B, *S', dim)."""
        raise NotImplementedError

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """How many frames of the output belong to inputs of these lengths."""
        return lengths

    def check_lengths(self, lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
        """`lengths` as a tensor (B, ndim); ValueError unless integers that fit the input x (B, *S, C)."""
        given = torch.as_tensor(lengths, device=x.device)
        if given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
            raise ValueError(f"lengths must be integers, got {given.dtype}")
        if not tracing():
            want = (x.shape[0],) if self.ndim == 1 else (x.shape[0], self.ndim)
            if tuple(given.shape) != want:
                raise ValueError(f"lengths must have shape {want} for this batch, got {tuple(given.shape)}")
            most = torch.tensor(x.shape[1:-1], device=x.device)
            wrong = (given.reshape(-1, self.ndim) < self.shortest) | (given.reshape(-1, self.ndim) > most)
            if wrong.any():
                sides = ", ".join(f"{self.shortest}..{side}" for side in x.shape[1:-1])
                raise ValueError(f"lengths must lie in {sides}, got {given.tolist()}")
        return given.reshape(x.shape[0], self.ndim)

    def embed(self, x: Tensor, lengths: Tensor | Sequence[int] | None = None) -> State:
        frames = self.subsample(x)
        if lengths is None:
            return frames, None, None
        real = self.output_lengths(self.check_lengths(lengths, x))
        if not (self.mask_padding or self.always_masked):
            return frames, None, None
        sides = frames.shape[1:-1]
        valid = torch.ones((), dtype=torch.bool, device=x.device)
        for axis, side in enumerate(sides):
            near = torch.arange(side, device=x.device) < real[:, axis, None]
            valid = valid & near.reshape(x.shape[0], *(side if a == axis else 1 for a in range(self.ndim)), 1)
        keys = KEY_MASK * (~valid).to(frames.dtype).flatten(1)[:, None, None]
        return frames, valid, keys

    def finish(self, state: State) -> Any:
        return state[0]

    def to_map(self, state: State, index: int) -> Tensor:
        return state[0]

    def pre_logits(self, features: Tensor) -> Tensor:
        """The frames themselves, (B, C, *S): there is a prediction for each."""
        return channels_first(features)


class TorchaudioConformer(ConformerEncoder):
    """The layers alone, at any rank: (B, C, *S) -> frames (B, dim, *S), or with head="pool" logits (B, num_classes).

    The pooled head, which is ours, reads the mean over valid frames. `stem` puts a linear layer before the first layer,
    by default where in_chans is not `dim`. Order and distance enter by the convolutions only. Attention and memory are
    GlobalAttention's.
    """

    OFFICIAL: ClassVar[Rules] = (
        (r"^stages\.(\d+)\.blocks\.0\.", r"conformer_layers.\1."),
        (r"(\.ffn\d)\.norm\.", r"\1.sequential.0."),
        (r"(\.ffn\d)\.mlp\.fc(\d)\.", lambda m: f"{m[1]}.sequential.{3 * int(m[2]) - 2}."),
        (r"\.attn_norm\.", ".self_attn_layer_norm."),
        (r"\.attn\.qkv\.", ".self_attn.in_proj_"),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.conv\.norm\.", ".conv_module.layer_norm."),
        (r"\.conv\.(\w+)\.", lambda m: f".conv_module.sequential.{_PLACES[m[1]]}."),
        (r"^(conformer_layers\.\d+)\.norm\.", r"\1.final_layer_norm."),
    )

    def __init__(self, *, dim: int, head: str = "frames", stem: bool | None = None, **options: Any):
        super().__init__(dim=dim, **options)
        if head not in ("frames", "pool"):
            raise ValueError(f"head must be frames or pool, got {head!r}")
        if stem is None:
            stem = self.in_chans != dim
        if not stem and self.in_chans != dim:
            raise ValueError(f"without a stem in_chans must be dim={dim}, got {self.in_chans}")
        self.stem = Conv(self.ndim, self.in_chans, dim) if stem else nn.Identity()
        self.pooled = head == "pool"
        if not self.pooled:
            self.heads, self.prediction = (), "frames"  # type: ignore[misc]
        self.make_head()
        self.init_weights()

    def subsample(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def finish(self, state: State) -> Any:
        """The frames; where lengths were given the pooled head also reads what is valid."""
        return state[:2] if self.pooled and state[1] is not None else state[0]

    def pre_logits(self, features: Any) -> Tensor:
        if not self.pooled:
            return super().pre_logits(features)
        if not isinstance(features, tuple):
            return features.flatten(1, -2).mean(1)
        x, valid = (part.flatten(1, -2) for part in features)
        return torch.where(valid, x, 0).sum(1) / valid.sum(1)

    def outputs(self, features: Any) -> dict[str, Tensor]:
        frames = channels_first(features[0] if isinstance(features, tuple) else features)
        return {"frames": frames} | ({"logits": self.head(self.pre_logits(features))} if self.pooled else {})

    def reset_classifier(self, num_classes: int) -> None:
        if not self.pooled:
            raise ValueError('this model gives frames and has no classifier; build it with head="pool"')
        super().reset_classifier(num_classes)


class SooftwareConformer(ConformerEncoder):
    """Recogniser of log-mel bins: (B, bins, T) -> log-probabilities (B, num_classes, T'), T' = (T - 3) // 4.

    As published, `lengths` change nothing unless `mask_padding` is on. The published code counts lengths // 4 - 1
    frames, one fewer than there are where a length leaves 3 of 4.
    """

    ndims = (1,)  # the bins are an axis of the image that the subsampling convolves
    reduction, shortest, conv_bias, always_masked, prediction = 4, 7, False, False, "log_probs"
    OFFICIAL = (
        (r"^head\.", "fc.linear."),
        (r"^subsampling\.", "encoder.conv_subsample.sequential."),
        (r"^proj\.", "encoder.input_projection.0.linear."),
        (r"^stages\.(\d+)\.blocks\.0\.", r"encoder.layers.\1.sequential."),
        (r"\.ffn(\d)\.", lambda m: f".{3 * int(m[1]) - 3}.module."),
        (r"(\.[03]\.module)\.norm\.", r"\1.sequential.0."),
        (r"\.mlp\.fc(\d)\.", lambda m: f".sequential.{3 * int(m[1]) - 2}.linear."),
        (r"\.attn_norm\.", ".1.module.layer_norm."),
        (r"\.attn\.([uv])$", r".1.module.attention.\1_bias"),
        (r"\.attn\.proj\.", ".1.module.attention.out_proj.linear."),
        (r"\.attn\.(\w+)\.", r".1.module.attention.\1_proj.linear."),
        (r"\.conv\.inner_norm\.", ".2.module.sequential.5."),
        (r"\.conv\.norm\.", ".2.module.sequential.0."),
        (r"\.conv\.(\w+)\.", lambda m: f".2.module.sequential.{_PLACES[m[1]] + 2}.conv."),
        (r"(layers\.\d+\.sequential)\.norm\.", r"\1.4."),
    )

    def __init__(self, *, dim: int, **options: Any):
        super().__init__(dim=dim, **options)
        if self.in_chans < self.shortest:
            raise ValueError(f"in_chans must be at least {self.shortest} bins, got {self.in_chans}")
        self.subsampling = nn.Sequential(
            Conv(2, 1, dim, 3, 2, padding=0), nn.ReLU(), Conv(2, dim, dim, 3, 2, padding=0), nn.ReLU()
        )
        self.proj = Linear(dim * ((self.in_chans - 3) // 4), dim)
        self.make_head()
        self.init_weights()

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = Linear(self.head_features, self.num_classes, bias=False)
        nn.init.xavier_uniform_(head.weight)
        return head

    def make_attention(self, dim: int, heads: int) -> nn.Module:
        return RelativeAttention(self.ndim, dim, heads)

    def subsample(self, x: Tensor) -> Tensor:
        return self.proj(self.subsampling(x.unsqueeze(-1)).transpose(2, 3).flatten(2))

    def output_lengths(self, lengths: Tensor) -> Tensor:
        return (lengths - 3) // 4

    def outputs(self, features: Tensor) -> dict[str, Tensor]:
        frames = self.head(features)
        return {"log_probs": channels_first(frames.log_softmax(-1) if self.num_classes else frames)}


_SIZES = {"s": (144, 16, 4), "m": (256, 16, 4), "l": (512, 17, 8)}
# of the paper, whole transducers: parameters in millions, word error rates on LibriSpeech test-clean and test-other
# without a language model, then with one
_PAPER = {"s": (10.3, 2.7, 6.3, 2.1, 5.0), "m": (30.7, 2.3, 5.0, 2.0, 4.3), "l": (118.8, 2.1, 4.3, 1.9, 3.9)}
_FIGURES = ("paper_params_m", "wer_clean", "wer_other", "wer_clean_lm", "wer_other_lm")


def _variants(code: str, model: type[Backbone], licence: str, params: Sequence[float]) -> dict[str, Variant]:
    found = {}
    for (size, (dim, depth, heads)), count in zip(_SIZES.items(), params, strict=True):
        figures = dict(params_m=count, dropout=0.1) | dict(zip(_FIGURES, _PAPER[size], strict=True))
        bins = 80 if model is SooftwareConformer else dim
        config = dict(model=model, dim=dim, depth=depth, heads=heads, ndim=1, in_chans=bins)
        inputs = Inputs(200, (0.0,), (1.0,), "80 log-mel bins", 1.0, "none")
        found[f"{code}_conformer_{size}"] = Variant(config, figures, inputs, Weights("", licence, "none"))
    return found


# params_m: counted, of the layers alone (torchaudio), with 80 bins and 1000 outputs (sooftware)
FAMILY = Family(
    name="speech_conformer",
    model=TorchaudioConformer,
    paper="Conformer: Convolution-augmented Transformer for Speech Recognition",
    venue="Interspeech 2020",
    arxiv="2005.08100",
    code="github.com/pytorch/audio, github.com/sooftware/conformer",
    licence="BSD-2-Clause, Apache-2.0",
    variants=_variants("torchaudio", TorchaudioConformer, "BSD-2-Clause", (7.77, 24.37, 103.03))
    | _variants("sooftware", SooftwareConformer, "Apache-2.0", (8.83, 27.51, 115.35)),
)
