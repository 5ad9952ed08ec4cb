"""Pathformer: Multi-scale Transformers with Adaptive Pathways for Time Series Forecasting (ICLR 2024,
arXiv 2402.05956). Official code: github.com/decisionintelligence/pathformer, no licence file.

A forecaster of n variables. Each layer has several experts that cut time into patches of different length and attend
inside a patch and between patches. A router looks at trend and seasonality of a sample and sends it to k of them.

Unusual here: a sample's experts depend on its data; their outputs are combined as a weighted log-sum-exp; each
variable has its own key and value weights, made by a small network from a learned memory; a patch has one learned
query. Two plain reshapes of the official code mix time and variables: published weights expect them. The length of
the input, the number of variables and the horizon are fixed by the weights, and the idea exists for signals alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import BatchNorm, Conv, Linear, Mlp, RevIN, attend, check_heads, merge_heads, ntuple, split_heads
from ..layers.cached import sized_cache, tracing
from ..registry import Family, Inputs, Variant

HEADS, MEMORY, INNER = 2, 16, 10  # of intra-patch attention; width of a memory; side of the matrix made from it
TREND, SEASONS = (4, 8, 12), 3  # widths of the moving averages; frequencies that count as seasonality
BALANCE, LEAST_NOISE = 0.01, 0.01
FLOOR, LEAST = 2.0**-52, 2.0**-149  # stands for a sum that is zero; float32's smallest number


class State(NamedTuple):
    """What travels between layers."""

    x: Tensor  # (B, T, n, d)
    balance: Tensor  # the layers' balance losses so far, a scalar
    mean: Tensor  # of the input, (B, 1, n)
    deviation: Tensor


@sized_cache
def moving_averages(length: int, widths: tuple[int, ...], device=None) -> Tensor:
    """(len(widths) * T, T) averages over windows of each width; the first and the last step repeat beyond the ends."""
    step, rows = torch.arange(length, device=device), []
    for width in widths:
        reach = torch.arange(width, device=device) - (width - 1 - (width - 1) // 2)
        cells = (step[:, None] + reach).clamp(0, length - 1)
        rows.append(F.one_hot(cells, length).sum(1) / width)
    return torch.cat(rows).float()


@sized_cache
def waves(length: int, device=None) -> Tensor:
    """(2 K, T) cosines, then negative sines, of the frequencies between zero and Nyquist's, both left out."""
    bins = torch.arange(1, (length - 1) // 2 + 1, device=device)
    # reduced before the conversion, or the angle would lose digits
    angle = (bins[:, None] * torch.arange(length, device=device) % length).double() * (2 * math.pi / length)
    return torch.cat([angle.cos(), -angle.sin()]).float()


def seasonality(s: Tensor, count: int = SEASONS) -> Tensor:
    """The `count` strongest frequencies of each variable, as a signal: (B, T, n) -> (B, T, n), section 3.2.

    The transform is two matrix products: T is short, and no complex numbers reach an export.
    """
    basis = waves(s.shape[1], device=s.device).to(s.dtype)
    spectrum = (basis @ s).unflatten(1, (2, basis.shape[0] // 2))  # real, imaginary
    power = spectrum.square().sum(1)
    strong = power.topk(min(count, power.shape[1]), 1).indices
    kept = torch.zeros_like(power).scatter(1, strong, 2 / s.shape[1]).unsqueeze(1)
    return basis.T @ (spectrum * kept).flatten(1, 2)


def variation(load: Tensor) -> Tensor:
    """Squared coefficient of variation over experts, zero when all have the same."""
    return load.var(correction=1) / (load.mean().square() + 1e-10) if load.shape[0] > 1 else load.new_zeros(())


class Router(nn.Module):
    """Multi-scale router (section 3.2): (B, T, n) -> experts (B, k), log of their gates (B, k), balance loss."""

    def __init__(self, length: int, variables: int, experts: int, top: int):
        super().__init__()
        self.top = top
        self.trend, self.mix = Linear(1, len(TREND)), Linear(variables, 1)
        self.gate, self.noise = Linear(length, experts), Linear(length, experts)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = s.device.type
        # which expert is a matter of small differences; without autocast the block would be one more thing to trace
        casting = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if casting else nullcontext():
            return self.route(s.to(self.gate.weight.dtype))

    def route(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length, top = s.shape[1], self.top
        averages = moving_averages(length, TREND, device=s.device).to(s.dtype) @ s
        shares = self.trend(s.unsqueeze(-1)).softmax(-1)
        trend = (averages.unflatten(1, (len(TREND), length)) * shares.movedim(-1, 1)).sum(1)
        r = self.mix(s + seasonality(s) + trend).squeeze(-1)
        clean = logits = self.gate(r)
        if self.training:
            scale = F.softplus(self.noise(r)) + LEAST_NOISE
            logits = clean + torch.randn_like(clean) * scale
        best, chosen = logits.topk(min(top + 1, logits.shape[1]), 1)
        chosen, log_gates = chosen[:, :top], best[:, :top].log_softmax(1)
        gates = torch.zeros_like(logits).scatter(1, chosen, log_gates.exp())
        if self.training and top < logits.shape[1]:
            # the chance to be chosen if an expert's noise alone were drawn again: it must beat the k-th of the others
            bar = torch.where(logits > best[:, top:], best[:, top:], best[:, top - 1 : top])
            load = torch.special.ndtr((clean - bar) / scale).sum(0)
        else:
            load = (gates > 0).to(gates.dtype).sum(0)
        return chosen, log_gates, BALANCE * (variation(gates.sum(0)) + variation(load))


class Distinct(nn.Module):
    """Weights for each variable from its memory: () -> keys (n, d, d), values (n, d, d), bias of values (n, d)."""

    def __init__(self, variables: int, dim: int, hidden: int = 64):
        super().__init__()
        self.memory = nn.Parameter(torch.randn(variables, MEMORY))
        self.generator = nn.Sequential(
            Linear(MEMORY, hidden), nn.Tanh(), Linear(hidden, hidden), nn.Tanh(), Linear(hidden, INNER**2)
        )
        for name, shape in (("P", (dim, INNER)), ("Q", (INNER, dim)), ("B", (INNER**2, dim))):
            self.add_module(name, nn.ParameterList(_uniform(*shape) for _ in range(2)))
        self.B[0].requires_grad_(False)  # the bias of keys: softmax does not see what all keys have in common

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        made = self.generator(self.memory)
        matrix = made.unflatten(1, (INNER, INNER))
        keys, values = (p @ matrix @ q for p, q in zip(self.P, self.Q, strict=True))
        return keys, values, made @ self.B[1]


class Shared(nn.Module):
    """Two matrices and biases that all variables have in common."""

    def __init__(self, dim: int):
        super().__init__()
        self.P = nn.ParameterList(_uniform(dim, dim) for _ in range(2))
        self.B = nn.ParameterList(_uniform(1, dim) for _ in range(2))


def _uniform(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))


class PatchAttention(nn.Module):
    """Attention between patches, d heads of p channels: (B, P, d * p) -> (B, P, d * p)."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))
        self.scale = nn.Parameter(torch.tensor((dim // heads) ** -0.5), requires_grad=False)  # stored, not trained
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        (q,), (k,), (v,) = (split_heads(y, self.heads) for y in (self.q(x) * self.scale, self.k(x), self.v(x)))
        return self.drop(self.proj(merge_heads(attend(q, k, v, scale=1.0))))


class Expert(nn.Module):
    """Dual attention on patches of `patch` steps, then an MLP (section 3.1): (B, T, n, d) -> (B, T, n, d)."""

    no_decay = ("queries", "positions")

    def __init__(
        self, length: int, variables: int, dim: int, patch: int, hidden: int, batch_norm: bool,
        drop: float, attn_drop: float, mlp_drop: float,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.count = patch, length // patch
        self.queries = nn.Parameter(torch.rand(self.count, 1, 1, variables, MEMORY))
        self.generators = nn.ModuleList(Linear(MEMORY, dim) for _ in range(self.count))
        self.distinct, self.shared = Distinct(variables, dim), Shared(dim)
        self.spread = Linear(self.count, length)
        self.embed = Linear(dim * patch, dim * patch)
        self.positions = nn.Parameter(torch.empty(self.count, dim * patch).uniform_(-0.02, 0.02))
        self.inter_attn = PatchAttention(dim * patch, dim, attn_drop)
        self.mlp = Mlp(dim, hidden, middle=nn.Dropout(mlp_drop), act_first=True)
        self.drop, self.batch_norm = nn.Dropout(drop), batch_norm
        # part of every checkpoint, used with batch_norm alone
        self.norm1, self.norm2 = (BatchNorm(dim).requires_grad_(batch_norm) for _ in range(2))

    def intra(self, x: Tensor) -> Tensor:
        """Attention inside of patches (section 3.1): each patch of each variable has one learned query.

        All patches at once. One query for p + 1 tokens makes it cheap to carry the generated weights to the other side:
        the query goes through the keys' matrix instead of the tokens, the attended token through the values' one, as
        the weights of softmax sum to one.
        """
        batch, _, variables, dim = x.shape
        count, patch, half = self.count, self.patch, dim // HEADS
        made = list(self.generators.parameters())
        weight, bias = torch.stack(made[::2]), torch.stack(made[1::2]).unsqueeze(1)
        query = torch.baddbmm(bias, self.queries.flatten(0, 2), weight.transpose(1, 2))  # (P, n, d)
        keys, values, shift = self.distinct()
        asked = torch.einsum("pnhc,ndhc->pnhd", query.unflatten(2, (HEADS, half)), keys.unflatten(2, (HEADS, half)))
        cells = count * variables
        tokens = x.reshape(batch, count, patch, variables, dim).transpose(2, 3)
        first = query[:, :, None].to(x.dtype).expand(batch, -1, -1, -1, -1)
        tokens = torch.cat([first, tokens], 3).reshape(batch, cells, patch + 1, dim)  # the query is a token, too
        asked = asked.reshape(cells, HEADS, dim).to(x.dtype).expand(batch, -1, -1, -1)
        seen = attend(asked, tokens, tokens, scale=half**-0.5, fused=False).reshape(
            batch, count, variables, HEADS * dim
        )
        # matrix of values and first shared matrix in one
        matrix, last = self.shared.P
        joint = torch.einsum("ndhc,hce->nhde", values.unflatten(2, (HEADS, half)), matrix.unflatten(0, (HEADS, half)))
        y = torch.einsum("bpnk,nke->bpne", seen, joint.flatten(1, 2)) + (shift @ matrix + self.shared.B[0])
        y = y.relu() @ last + self.shared.B[1]
        y = torch.matmul(self.spread.weight, y.reshape(batch, count, variables * dim)) + self.spread.bias.unsqueeze(1)
        return y.reshape(x.shape)

    def inter(self, x: Tensor) -> Tensor:
        """Attention between the patches of a variable."""
        batch, _, variables, dim = x.shape
        count, patch = self.count, self.patch
        y = x.reshape(batch, count, patch, variables, dim).permute(0, 3, 1, 4, 2)  # a vector runs channel by channel
        y = self.embed(y.reshape(batch * variables, count, dim * patch)) + self.positions
        # official: (B, n, P, p * d) is read as (B, T, n, d) without a permutation, which mixes variables and time
        return self.inter_attn(self.drop(y)).reshape(x.shape)

    def normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.batch_norm else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.drop(x + self.intra(x) + self.inter(x)), self.norm1)
        return self.normed(self.mlp(x) + x, self.norm2)


class PathwayLayer(nn.Module):
    """Layer of adaptive pathways (section 3.2): router, the k chosen experts of each sample, their log-sum-exp."""

    def __init__(
        self, length: int, variables: int, dim: int, patches: Sequence[int], top: int, residual: bool, **expert
    ):
        super().__init__()
        self.residual = residual
        self.router = Router(length, variables, len(patches), top)
        self.experts = nn.ModuleList(Expert(length, variables, dim, patch, **expert) for patch in patches)
        self.unused = Conv(2, length, length).requires_grad_(False)  # part of every checkpoint

    def combine(self, y: Tensor, log_gates: Tensor) -> Tensor:
        """ln(sum of gate * exp(y)) over axis 1 of (B, k, T, n, d), in a form that does not overflow."""
        total = (y + log_gates[:, :, None, None, None]).logsumexp(1)
        # official: the sum itself is formed, zero where float32 cannot hold it, and zero becomes FLOOR
        return torch.where(total < math.log(LEAST), math.log(FLOOR), total)

    def dense(self, x: Tensor, chosen: Tensor, log_gates: Tensor) -> Tensor:
        """Every expert on the whole batch: no shape depends on data, so it can be traced."""
        y = torch.stack([expert(x) for expert in self.experts], 1)
        shut = torch.full_like(y[:, :, 0, 0, 0], -math.inf, dtype=log_gates.dtype)
        return self.combine(y, shut.scatter(1, chosen, log_gates))

    def sparse(self, x: Tensor, chosen: Tensor, log_gates: Tensor) -> Tensor:
        """Each expert on the samples routed to it. The host reads how many, which only eager mode can."""
        batch, top = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # pairs of sample and expert, by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        rows = (order // top).split(counts)
        # while training, one without samples runs as well: zero gradients, not none; batch norm needs samples
        parts = [
            expert(x.index_select(0, row))
            for expert, row in zip(self.experts, rows, strict=True)
            if row.shape[0] or (torch.is_grad_enabled() and not expert.batch_norm)
        ]
        y = torch.cat(parts).index_select(0, order.argsort())
        return self.combine(y.unflatten(0, (batch, top)), log_gates)

    def forward(self, state: State) -> State:
        x = state.x
        chosen, log_gates, balance = self.router(x[..., 0])  # the router reads the first channel
        y = (self.dense if tracing() else self.sparse)(x, chosen, log_gates)
        return state._replace(x=y + x if self.residual else y, balance=state.balance + balance)


class Pathformer(Backbone):
    """Layers of experts over (B, n, T), a linear forecast for each variable: model(x) -> (B, n, horizon).

    `in_chans` is the number of variables n, `img_size` the length T, `num_classes` the horizon (read as `pred_len`): it
    is the width of the head, so ``reset_classifier`` makes a forecaster of another horizon. ``forward_outputs`` adds
    ``balance_loss``, which keeps experts equally busy; `vertebra.tasks.ForecastLoss` reads both. A feature map has
    n * d channels, variable outer. A compiled or exported network runs every expert on every sample, same numbers.
    """

    ndims = (1,)
    prediction = "forecast"
    EXPORT = "its linear layers over time are as long as the series"
    OFFICIAL = (
        (r"^head\.", "projections.0."),
        (r"^start\.", "start_fc."),
        (r"^stages\.(\d+)\.blocks\.0\.", r"AMS_lists.\1."),
        (r"\.router\.trend\.", ".trend_model.layer."),
        (r"\.router\.mix\.", ".start_linear."),
        (r"\.router\.(gate|noise)\.", r".w_\1."),
        (r"\.unused\.", ".end_MLP.fc."),
        (r"\.queries$", ".intra_embeddings"),
        (r"\.positions$", ".W_pos"),
        (r"\.generators\.(\d+)\.", r".embeddings_generator.\1.0."),
        (r"\.(distinct|shared)\.", r".weights_generator_\1."),
        (r"\.spread\.", ".intra_Linear."),
        (r"\.embed\.", ".emb_linear."),
        (r"\.inter_attn\.([qkv])\.", lambda m: f".inter_patch_attention.W_{m[1].upper()}."),
        (r"\.inter_attn\.proj\.", ".inter_patch_attention.to_out.0."),
        (r"\.inter_attn\.scale$", ".inter_patch_attention.sdp_attn.scale"),
        (r"\.norm1\.", ".norm_attn.1."),
        (r"\.norm2\.", ".norm_ffn.1."),
        (r"\.mlp\.fc1\.", ".ff.0."),
        (r"\.mlp\.fc2\.", ".ff.3."),
    )
    CONSTANT = (r"^AMS_lists\.\d+\.(mean|std)$",)

    def __init__(
        self,
        *,
        dim: int,
        patches: Sequence[Sequence[int]],
        top: int = 2,
        residual: bool = False,
        hidden: int = 64,
        batch_norm: bool = False,
        drop: float = 0.1,
        attn_drop: float = 0.1,
        mlp_drop: float = 0.2,
        img_size: int | Sequence[int] = 96,
        **contract: Any,
    ):
        super().__init__(**contract)
        (self.length,) = ntuple(img_size, 1, "img_size")
        check_heads(dim, HEADS)
        for sizes in patches:
            wrong = [p for p in sizes if p < 1 or self.length % p]
            if wrong:
                raise ValueError(f"patches of {wrong} do not divide a length of {self.length}")
            if not 1 <= top <= len(sizes):
                raise ValueError(f"top, the experts for each sample, must be in 1..{len(sizes)}, got {top}")
        self.revin, self.start = RevIN(self.in_chans), Linear(1, dim)
        options = dict(hidden=hidden, batch_norm=batch_norm, drop=drop, attn_drop=attn_drop, mlp_drop=mlp_drop)
        self.stages = nn.ModuleList(
            Stage([PathwayLayer(self.length, self.in_chans, dim, sizes, top, residual, **options)]) for sizes in patches
        )
        self.describe([self.in_chans * dim] * len(patches), [1] * len(patches))
        self.make_head(self.length * dim)

    @property
    def pred_len(self) -> int:
        """The horizon, another name for num_classes."""
        return self.num_classes

    @property
    def min_size(self) -> int:
        """The length T, the only one."""
        return self.length

    def embed(self, x: Tensor) -> State:
        if x.shape[1] != self.length:
            raise ValueError(f"input has {x.shape[1]} steps, this model needs {self.length} (img_size)")
        x, statistics = self.revin(x)
        return State(self.start(x.unsqueeze(-1)), x.new_zeros(()), *statistics)

    def to_map(self, state: State, index: int) -> Tensor:
        return state.x.flatten(2)

    def finish(self, state: State) -> tuple[Tensor, ...]:
        return state.x.flatten(2), *state[1:]

    def pre_logits(self, features: tuple[Tensor, ...]) -> Tensor:
        """Each variable over time, (B, n, T * d)."""
        return features[0].unflatten(2, (self.in_chans, -1)).transpose(1, 2).flatten(2)

    def outputs(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        y, (_, balance, *statistics) = self.head(self.pre_logits(features)), features
        if self.num_classes:
            y = self.revin.undo(y.transpose(1, 2), statistics).transpose(1, 2)
        return {"forecast": y, "balance_loss": balance}


# patch sizes of each layer's experts
_HOURLY = ((16, 12, 8, 32), (12, 8, 6, 4), (8, 6, 4, 2))
_MINUTE = ((16, 12, 8, 4), (12, 8, 6, 4), (8, 6, 2, 12))
_LONG = ((16, 12, 8, 32), (12, 8, 6, 32), (8, 6, 16, 12))
_LATE = ((16, 12, 8, 32), (12, 8, 6, 16), (8, 6, 4, 16))
# data set: variables, (d, hidden, k, residual, patches), millions of parameters at horizons 96, 192, 336, 720
_SETS: dict[str, tuple] = {
    "etth1": (7, (4, 64, 3, True, _HOURLY), (0.4385, 0.4754, 0.5542, 0.6787)),
    "etth2": (7, (4, 64, 2, False, _HOURLY), (0.4385, 1.0365, 0.5309, 5.6117)),
    "ettm1": (7, (8, 64, 3, True, _MINUTE), (0.682, 0.7558, 0.8665, 1.1618)),
    "ettm2": (7, (16, 64, 2, False, _LONG), (4.6526, 4.8002, 5.0215, 5.6117)),
    "weather": (21, (8, 64, 2, True, _MINUTE), (0.7282, 0.802, 0.9127, 1.208)),
    "electricity": (321, (16, 128, 2, True, _HOURLY), (3.946, 4.0936, 4.3149, 4.9051)),
    "traffic": (862, (16, 128, 2, True, _LONG), (6.3495, 6.4971, 6.7184, 7.3086)),
}
_OTHERS: dict[tuple[str, int], tuple] = {  # where a horizon has its own settings
    ("etth1", 336): (4, 64, 3, False, _LATE),
    ("etth1", 720): (4, 64, 2, False, _HOURLY),
    ("etth2", 192): (8, 64, 2, False, _HOURLY),
    ("etth2", 720): (16, 64, 3, False, _LONG),
}


def _variant(data: str, horizon: int, count: float) -> Variant:
    variables, settings, _ = _SETS[data]
    dim, hidden, top, residual, patches = _OTHERS.get((data, horizon), settings)
    shape = dict(in_chans=variables, num_classes=horizon)
    config = dict(dim=dim, patches=patches, top=top, residual=residual, hidden=hidden) | shape
    # standardised by mean and deviation of the training part
    return Variant(config, dict(params_m=count), Inputs(96, (), (), "variables", 1.0, "none"))


FAMILY = Family(
    name="pathformer",
    model=Pathformer,
    paper="Pathformer: Multi-scale Transformers with Adaptive Pathways for Time Series Forecasting",
    venue="ICLR 2024",
    arxiv="2402.05956",
    code="github.com/decisionintelligence/pathformer",
    licence="none stated",
    # the paper gives no counts: params_m is counted, and equals the official code's where that was run (*_96 of ETT)
    variants={
        f"pathformer_{data}_{horizon}": _variant(data, horizon, count)
        for data, (_, _, counts) in _SETS.items()
        for horizon, count in zip((96, 192, 336, 720), counts, strict=True)
    },
)
