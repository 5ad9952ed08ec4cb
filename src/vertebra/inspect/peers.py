"""The same architectures in timm and torchvision, with our weights: what speed and outputs are compared with.

timm and torchvision are imported where they are asked for; looking at this module needs neither.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import to_official
from ..registry import model_info

PEERS = {  # where timm has another name, or torchvision the model
    "gc_vit_xxtiny": "gcvit_xxtiny",
    "gc_vit_xtiny": "gcvit_xtiny",
    "gc_vit_tiny": "gcvit_tiny",
    "gc_vit_small": "gcvit_small",
    "gc_vit_base": "gcvit_base",
    **{f"crossvit_{k}_224": f"crossvit_{k}_240" for k in ("tiny", "small", "base", "9", "15", "18")},
    **{f"crossvit_{k}_dagger_224": f"crossvit_{k}_dagger_240" for k in (9, 15, 18)},
    **{f"crossvit_{k}_dagger_384": f"crossvit_{k}_dagger_408" for k in (15, 18)},
    "torchvision_maxvit_t": "torchvision.maxvit_t",
    "inceptionnext_atto": "inception_next_atto",
    "inceptionnext_tiny": "inception_next_tiny",
    "inceptionnext_small": "inception_next_small",
    "inceptionnext_base": "inception_next_base",
    "mobilenet_v2": "torchvision.mobilenet_v2",
    "shufflenet_v2_x0_5": "torchvision.shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0": "torchvision.shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5": "torchvision.shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0": "torchvision.shufflenet_v2_x2_0",
    "mobilevit_xx_small": "mobilevit_xxs",
    "mobilevit_x_small": "mobilevit_xs",
    "mobilevit_small": "mobilevit_s",
}
TOLERANCE = 1e-4  # of the logits, relative to the largest: below it two networks count as equally weighted

Rename = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

TIMM_NAMES: dict[str, Rename] = {  # official names -> timm's, where it has names of its own and no filter for them
    "repvgg": (
        (r"^stage0\.", "stem."),
        (r"^stage(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
        (r"rbr_dense\.", "conv_kxk."),
        (r"rbr_1x1\.", "conv_1x1."),
        (r"rbr_identity\.", "identity."),
        (r"^linear\.", "head.fc."),
    ),
    "mobilevit": (
        (r"^conv_1\.block\.", "stem."),
        (r"^conv_1x1_exp\.block\.", "final_conv."),
        (r"^classifier\.fc\.", "head.fc."),
        (r"^layer_(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
        (r"\.block\.exp_1x1\.block\.", ".conv1_1x1."),
        (r"\.block\.conv_3x3\.block\.", ".conv2_kxk."),
        (r"\.block\.red_1x1\.block\.", ".conv3_1x1."),
        (r"\.local_rep\.conv_3x3\.block\.", ".conv_kxk."),
        (r"\.local_rep\.conv_1x1\.block\.conv\.", ".conv_1x1."),
        (r"\.conv_proj\.block\.", ".conv_proj."),
        (r"\.fusion\.block\.", ".conv_fusion."),
        (r"\.global_rep\.\d+\.(weight|bias)$", r".norm.\1"),
        (r"\.global_rep\.", ".transformer."),
        (r"\.pre_norm_(mha|ffn)\.0\.", lambda m: f".norm{1 + (m[1] == 'ffn')}."),
        (r"\.pre_norm_mha\.1\.qkv_proj\.", ".attn.qkv."),
        (r"\.pre_norm_mha\.1\.out_proj\.", ".attn.proj."),
        (r"\.pre_norm_ffn\.(1|4)\.", lambda m: f".mlp.fc{1 + (m[1] == '4')}."),
        (r"(stem|final_conv|_1x1|_kxk|conv_proj|conv_fusion)\.norm\.", r"\1.bn."),
    ),
    "crossvit": ((r"^(pos_embed|cls_token)\.", r"\1_"),),
    "gcvit": (
        (r"^patch_embed\.proj", "stem.conv1"),
        (r"^patch_embed\.conv_down", "stem.down"),
        (r"^levels\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample"),
        (r"^levels\.", "stages."),
        (r"q_global_gen\.to_q_global\.(\d)\.conv", lambda m: f"global_block.blocks.conv{int(m[1]) + 1}"),
        (r"(down|downsample)\.conv\.", r"\1.conv_block."),
        (r"(conv_block|blocks\.conv\d)\.0\.", r"\1.conv_dw."),
        (r"(conv_block|blocks\.conv\d)\.2\.fc\.0\.", r"\1.se.fc1."),
        (r"(conv_block|blocks\.conv\d)\.2\.fc\.2\.", r"\1.se.fc2."),
        (r"(conv_block|blocks\.conv\d)\.3\.", r"\1.conv_pw."),
        (r"relative_position_bias_table", "rel_pos.relative_position_bias_table"),
        (r"gamma([12])$", r"ls\1.gamma"),
        (r"^norm\.", "stages.3.norm."),
        (r"^head\.", "head.fc."),
    ),
}


def import_timm() -> Any:
    """timm, or a ValueError that says how to get it."""
    try:
        import timm
    except ImportError:
        raise ValueError("comparing with timm needs timm: pip install timm") from None
    return timm


def has_peer(name: str) -> bool:
    """Whether timm or torchvision has our `name`."""
    return name in PEERS or import_timm().is_model(name)


def peer_model(name: str, num_classes: int = 1000, img_size: int | None = None) -> nn.Module:
    """The other library's model of our `name`, in evaluation mode; ValueError where neither has it.

    `img_size` is the side its tables are built for, where it takes that; None leaves what it was published with.
    """
    theirs = PEERS.get(name, name)
    library, _, model = theirs.rpartition(".")
    if library == "torchvision":
        try:
            import torchvision
        except ImportError:
            raise ValueError(f"{name} is compared with torchvision's: pip install torchvision") from None
        return torchvision.models.get_model(model, num_classes=num_classes).eval()
    timm = import_timm()
    if not timm.is_model(theirs):
        raise ValueError(f"{name} is in neither timm nor torchvision")
    if img_size is not None:
        try:
            return timm.create_model(theirs, num_classes=num_classes, img_size=img_size).eval()
        except TypeError:  # a network of convolutions takes any size and has no such argument
            pass
    return timm.create_model(theirs, num_classes=num_classes).eval()


def renamed(state: Mapping[str, Tensor], family: str, peer: nn.Module) -> dict[str, Tensor]:
    """The official `state` under timm's names, in timm's shapes where only axes of one cell differ."""
    wanted, out = peer.state_dict(), {}
    for key, tensor in state.items():
        for pattern, new in TIMM_NAMES[family]:
            key = re.sub(pattern, new, key)
        if key in wanted and wanted[key].shape != tensor.shape:
            tensor = tensor.reshape(wanted[key].shape)
        out[key] = tensor
    return out


def by_shape(state: Mapping[str, Tensor], peer: nn.Module) -> dict[str, Tensor]:
    """Last resort: match tensors in order of definition among those of equal shape."""
    left = list(state.values())
    out = {}
    for key, want in peer.state_dict().items():
        found = next((i for i, t in enumerate(left) if t.shape == want.shape), None)
        if found is not None:
            out[key] = left.pop(found)
    return out


def learnt(module: nn.Module) -> set[str]:
    """Names that a copy must fill: parameters and running statistics, not constant tables or counters."""
    return {k for k, _ in module.named_parameters()} | {k for k in module.state_dict() if ".running_" in k}


def copy_weights(ours: nn.Module, peer: nn.Module, x: Tensor) -> float:
    """Gives `peer` our weights; returns how far its logits are from ours, relative to the largest.

    Tries timm's own filter for official checkpoints, the official names as they are, then order and shape, and keeps
    the first that agrees. The check on the logits, not the way of copying, decides whether the weights count as equal.
    """
    official = {k: v.detach().clone() for k, v in to_official(ours).items()}
    timm_filter = getattr(sys.modules[type(peer).__module__], "checkpoint_filter_fn", None)
    ways: list[Callable[[], dict[str, Tensor]]] = [lambda: official]
    family = model_info(ours.recipe["name"]).family  # type: ignore[index, union-attr, arg-type]
    if family in TIMM_NAMES:
        ways.insert(0, lambda: renamed(official, family, peer))
    if timm_filter is not None:
        ways.insert(0, lambda: timm_filter(dict(official), peer))
    ways.append(lambda: by_shape(official, peer))
    with torch.inference_mode():
        want = ours(x)
    error = math.inf
    for way in ways:
        try:
            result = peer.load_state_dict(way(), strict=False)
        except (RuntimeError, KeyError, AttributeError, ValueError):
            continue  # this way does not fit the names or shapes; the next may
        if learnt(peer) & set(result.missing_keys):
            continue
        with torch.inference_mode():
            error = ((peer(x) - want).abs().max() / want.abs().max()).item()
        if error <= TOLERANCE:
            break
    return error


def merged(peer: nn.Module) -> nn.Module | None:
    """A copy of `peer` with branches and norms merged as its own library does that; None where there is no such way."""
    if not type(peer).__module__.startswith("timm."):
        return None
    from timm.utils import reparameterize_model

    found = reparameterize_model(peer, inplace=False).eval()
    return None if list(map(type, found.modules())) == list(map(type, peer.modules())) else found


def unsettle(model: nn.Module, generator: torch.Generator) -> None:
    """Moves every parameter and running statistic a little: zeros and ones of the initialisation hide mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
        for key, b in model.named_buffers():
            if key.endswith("running_mean"):
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))
            elif key.endswith("running_var"):
                b.copy_(1 + 0.1 * torch.rand(b.shape, generator=generator))


def corrupts_memory(model: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a channels_last training step of `model` would hit oneDNN's issue 6035.

    The float32 weight gradient of a strided 1x1 convolution of fewer than 16 channels writes past its workspace there
    and takes the process down (seen with torch 2.15: RepVGG's first 1x1 branch).
    """
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    hit = any(c.kernel_size == (1, 1) and max(c.stride) > 1 and c.in_channels < 16 for c in convs)
    return hit and dtype == torch.float32 and device.type == "cpu"
