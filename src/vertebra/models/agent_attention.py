"""Agent Attention: On the Integration of Softmax and Linear Attention (ECCV 2024, arXiv 2312.08874). Official code:
github.com/LeapLabTHU/Agent-Attention, no licence stated (the Swin and CSwin files carry MIT headers).

A few agent tokens, pooled from the queries, gather what all tokens hold and hand it back to them: two small softmax
attentions in the place of one quadratic one, so attention can be global in every stage. It goes into four known hosts:
DeiT, PVT, Swin and CSWin; late blocks may keep the host's own attention.

Unusual here: PVT has a table of positions beside the agents' biases, no class token and no norm before the mean; Swin's
windows are as large as its map, that is, there are none. For dense prediction PVT and Swin take more agents, resampling
the tables that were learned for fewer. At rank 1 and 3 the number of agents stays near the published one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Block, GridBlock, Mlp, PatchEmbed, built_grid, drop_path_rates, ntuple
from ..mixers import AgentAttention, CrossShapedAttention, SpatialReductionAttention
from ..registry import Family, Inputs, Variant, Weights
from . import pvt
from .deit import DeiT
from .swin import SwinTransformer
from .vit import EPS

AGENTS = (9, 16, 49, 49)


def _per_stage(count: int, **options: Sequence[int] | None) -> None:
    for name, value in options.items():
        if value is not None and len(value) != count:
            raise ValueError(f"{name} needs one number per stage, {count} in all, got {tuple(value)}")


class AgentDeiT(DeiT):
    """DeiT whose first `agent_blocks` blocks have agent attention; the class token takes part as key and query."""

    def __init__(
        self, *, agents: int = 49, agent_blocks: int = 12, img_size: int | Sequence[int] = 224, **deit: Any
    ):  # fmt: skip
        super().__init__(img_size=img_size, **deit)
        dim, grid = self.num_features, self.pos_embed.grid
        for stage in self.stages[:agent_blocks]:
            blocks: Any = stage.blocks
            host = blocks[0]
            attn = AgentAttention(self.ndim, dim, host.attn.heads, grid, agents, prefix=len(self.prefix))
            blocks[0] = GridBlock(dim, attn, host.mlp, host.drop_path.rate, EPS)
        self.init_weights()


class AgentPVT(Backbone):
    """PVT v1 without a class token; the first `agent_blocks` blocks of each stage (default all) have agent attention.

    The others reduce keys and values by `ratios`. `dense_agents` take part in the dense version, which gives raw maps.
    """

    OFFICIAL = pvt.PyramidVisionTransformer.OFFICIAL

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int],
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        ratios: Sequence[int] = (8, 4, 2, 1),
        agents: Sequence[int] = AGENTS,
        dense_agents: Sequence[int] = (144, 256, 784, 784),
        agent_blocks: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        img_size: int | Sequence[int] = 224,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, count = self.ndim, len(dims)
        _per_stage(count, agents=agents, dense_agents=dense_agents, agent_blocks=agent_blocks)
        rates, grid = drop_path_rates(drop_path_rate, depths), ntuple(img_size, ndim, "img_size")
        pooled = dense_agents if self.features_only else agents
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            grid = tuple(max(s // pvt.KERNELS[i], 1) for s in grid)
            down = pvt.Embed(ndim, dims[i - 1] if i else self.in_chans, dim, pvt.KERNELS[i], grid)
            if i == 0:
                self.patch_embed = down
            blocks = []
            for j, rate in enumerate(rates[i]):
                attn: nn.Module
                if agent_blocks is None or j < agent_blocks[i]:
                    attn = AgentAttention(ndim, dim, heads[i], grid, agents[i], pooled[i], packed=False)
                else:
                    attn = SpatialReductionAttention(ndim, dim, heads[i], ratios[i])
                blocks.append(Block(dim, attn, Mlp(dim, int(dim * mlp_ratios[i])), rate, pvt.EPS))
            self.stages.append(Stage(blocks, down=down if i else None))
        self.describe(dims, [4 * 2**i for i in range(count)])
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)


class AgentSwin(SwinTransformer):
    """Swin where the first `agent_blocks` blocks of each stage attend globally through agents.

    The others keep their windows of `window`, shifted by the block's place in the stage.
    """

    def __init__(
        self,
        *,
        agents: Sequence[int] = AGENTS,
        dense_agents: Sequence[int] = (81, 144, 196, 49),
        agent_blocks: Sequence[int],
        img_size: int | Sequence[int] = 224,
        **swin: Any,
    ):
        super().__init__(img_size=img_size, **swin)
        _per_stage(len(self.stages), agents=agents, dense_agents=dense_agents, agent_blocks=agent_blocks)
        grid, pooled = built_grid(img_size, self.ndim, 4), dense_agents if self.features_only else agents
        for i, stage in enumerate(self.stages):
            dim = self.feature_info[i]["num_chs"]
            for block in list(stage.blocks)[: agent_blocks[i]]:
                block.attn = AgentAttention(self.ndim, dim, block.attn.heads, grid, agents[i], pooled[i])
            grid = tuple((s + 1) // 2 for s in grid)
        self.init_weights()


class AgentCSwin(Backbone):
    """CSWin (arXiv 2107.00652, Fig. 2) where the first `agent_blocks` blocks of each stage attend through agents.

    The others attend in cross-shaped stripes of width `stripes`, in the last stage to the whole map.
    """

    OFFICIAL = (
        (r"^patch_embed\.proj\.", "stage1_conv_embed.0."),
        (r"^patch_embed\.norm\.", "stage1_conv_embed.2."),
        (r"^stages\.(\d+)\.down\.proj\.", r"merge\1.conv."),
        (r"^stages\.(\d+)\.down\.norm\.", r"merge\1.norm."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"stage{int(m[1]) + 1}."),
        (r"\.attn\.(qkv|proj)\.", r".\1."),
        (r"\.attn\.local\.(\d+)\.", r".attns.\1.get_v."),
        (r"\.attn\.dwc\.", ".attns.0.get_v."),
        (r"\.attn\.", ".attns.0."),
    )

    def __init__(
        self,
        *,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        stripes: Sequence[int] = (1, 2, 7, 7),
        agents: Sequence[int] = AGENTS,
        agent_blocks: Sequence[int],
        drop_path_rate: float = 0.0,
        img_size: int | Sequence[int] = 224,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, count = self.ndim, len(depths)
        _per_stage(count, heads=heads, stripes=stripes, agents=agents, agent_blocks=agent_blocks)
        dims, rates = [dim * 2**i for i in range(count)], drop_path_rates(drop_path_rate, depths)
        grid = tuple((s + 1) // 4 for s in ntuple(img_size, ndim, "img_size"))
        self.patch_embed = PatchEmbed(ndim, self.in_chans, dim, 7, 4, norm=nn.LayerNorm(dim), padding=2)
        self.stages = nn.ModuleList()
        for i, width in enumerate(dims):
            blocks = []
            for j, rate in enumerate(rates[i]):
                attn: nn.Module
                if j < agent_blocks[i]:
                    attn = AgentAttention(ndim, width, heads[i], grid, agents[i])
                else:
                    attn = CrossShapedAttention(ndim, width, heads[i], stripes[i], whole=i == count - 1)
                blocks.append(Block(width, attn, Mlp(width, 4 * width), rate))
            down = PatchEmbed(ndim, dims[i - 1], width, 3, 2, norm=nn.LayerNorm(width)) if i else None
            self.stages.append(Stage(blocks, down=down))
            grid = tuple((s + 1) // 2 for s in grid)
        self.describe(dims, [4 * 2**i for i in range(count)])
        if not self.features_only:
            self.norm = nn.LayerNorm(dims[-1])
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


_DEIT = {"tiny": dict(dim=192, heads=3), "small": dict(dim=384, heads=6), "base": dict(dim=768, heads=12)}
_PVT = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}
_SWIN = {  # dim, depths, heads, blocks with agents
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), (2, 2, 6, 0)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24), (2, 2, 0, 0)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32), (2, 2, 2, 0)),
}
_CSWIN = {
    "tiny": (64, (2, 4, 18, 1), (2, 4, 8, 16), (2, 4, 0, 0)),
    "small": (64, (3, 6, 29, 2), (2, 4, 8, 16), (3, 6, 0, 0)),
    "base": (96, (3, 6, 29, 2), (4, 8, 16, 32), (3, 6, 0, 0)),
}


def _config(host: str, size: str, img: int) -> dict[str, Any]:
    if host == "deit":
        return (
            dict(model=AgentDeiT, patch=16) | _DEIT[size] | (dict(agents=81, agent_blocks=4) if size == "base" else {})
        )
    if host == "pvt":
        return dict(model=AgentPVT, depths=_PVT[size])
    row = (_SWIN if host == "swin" else _CSWIN)[size]
    config: dict[str, Any] = dict(zip(("dim", "depths", "heads", "agent_blocks"), row, strict=True))
    reach = max(7, img // 32)  # the last map's side, the window of blocks without agents
    if host == "swin":
        return dict(model=AgentSwin, window=reach) | config
    return dict(model=AgentCSwin, stripes=(1, 2, reach, reach)) | config


def _variant(name: str, file: str, drop_path, params, gmacs, top1, crop=0.875, **more) -> Variant:
    _, host, size, *img = name.split("_")
    inputs = Inputs(int(img[0]) if img else 224, crop=crop)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path) | more
    where = Weights(f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1", "none stated", "direct")
    return Variant(_config(host, size, inputs.size), figures, inputs, where)


# file, drop path, params_m, gmacs, top1 as the repository prints them. COCO 1x: RetinaNet AP, Mask R-CNN box and mask
# AP (_3x: three times as long; cascade_: Cascade Mask R-CNN). ADE20K miou: PVT with Semantic FPN, Swin with UPerNet.
_TABLE: dict[str, tuple[tuple[Any, ...], dict[str, float]]] = {
    "agent_deit_tiny": (("57e0904221824ee7b7af", 0.0, 6.0, 1.2, 74.9), {}),
    "agent_deit_small": (("fdd43304372541db8ea7", 0.1, 22.7, 4.4, 80.5), {}),
    "agent_deit_small_448": (("a228f86241c445f1969b", 0.1, 23.1, 17.7, 83.1), {}),
    "agent_deit_base": (("5115f15fdd7e4ab58fbc", 0.3, 87.2, 17.6, 82.0), {}),
    "agent_pvt_tiny": (
        ("13fdf0e0a7c5498c934f", 0.1, 11.6, 2.0, 78.4), dict(retinanet_ap=40.3, box_ap=41.4, mask_ap=38.7, miou=40.18)
    ),
    "agent_pvt_small": (
        ("36b8be9a8863456685a3", 0.1, 20.6, 4.0, 82.2), dict(retinanet_ap=44.1, box_ap=44.5, mask_ap=41.2, miou=44.18)
    ),
    "agent_pvt_medium": (
        ("4d00ecacf18b45f9b88c", 0.3, 35.9, 7.0, 83.4), dict(retinanet_ap=45.8, box_ap=45.9, mask_ap=42.0, miou=44.30)
    ),
    "agent_pvt_medium_256": (("654df734121643b19c52", 0.3, 36.1, 9.2, 83.8), {}),
    "agent_pvt_large": (
        ("040cfe0cfbbe4762ad09", 0.3, 48.7, 10.4, 83.7), dict(retinanet_ap=46.8, box_ap=46.9, mask_ap=42.8, miou=46.52)
    ),
    "agent_swin_tiny": (
        ("a2ddc1190c224f768a41", 0.2, 29, 4.5, 82.6),
        dict(box_ap=44.6, mask_ap=40.7, box_ap_3x=47.3, mask_ap_3x=42.7, cascade_box_ap=49.2, cascade_mask_ap=42.7,
             cascade_box_ap_3x=51.4, cascade_mask_ap_3x=44.5, miou=46.68),
    ),
    "agent_swin_small": (
        ("f607172c9fea4d6e99bb", 0.3, 50, 8.7, 83.7),
        dict(box_ap=47.2, mask_ap=42.7, box_ap_3x=48.9, mask_ap_3x=43.8, cascade_box_ap_3x=52.6,
             cascade_mask_ap_3x=45.5, miou=48.08),
    ),
    "agent_swin_small_288": (("09760394e93b4046a25e", 0.3, 50, 14.6, 84.1, 1.0), {}),
    "agent_swin_base": (
        ("4fcd2d0114bb490483c3", 0.5, 88, 15.4, 84.0),
        dict(cascade_box_ap_3x=52.6, cascade_mask_ap_3x=45.3, miou=48.73),
    ),
    "agent_swin_base_384": (("bb84ee9058954706a557", 0.5, 88, 46.3, 84.9, 1.0), {}),
    "agent_cswin_tiny": (("8c562a74441e46d5902b", 0.2, 21, 4.3, 83.1), {}),
    "agent_cswin_small": (("30eb8af675bc4b7a8747", 0.4, 33, 6.8, 83.9), {}),
    "agent_cswin_base": (("c8035b0839b2410c8c9f", 0.5, 73, 14.9, 84.7), {}),
    "agent_cswin_base_384": (("1239be0df44b47719432", 0.7, 73, 46.3, 85.8), {}),
}  # fmt: skip

FAMILY = Family(
    name="agent_attention",
    model=AgentSwin,
    paper="Agent Attention: On the Integration of Softmax and Linear Attention",
    venue="ECCV 2024",
    arxiv="2312.08874",
    code="github.com/LeapLabTHU/Agent-Attention",
    licence="none",
    variants={name: _variant(name, *row, **more) for name, (row, more) in _TABLE.items()},
)
