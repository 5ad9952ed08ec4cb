"""RepVGG: fusing, the group pattern, both structures' checkpoints, and timm as a second opinion."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import vertebra

SMALL = dict(blocks=(1, 2, 2, 1), widths=(16, 16, 32, 32, 48))


def build(ndim=2, name="repvgg_a0", **options):
    """A small network whose batch norms have statistics and weights far from their defaults."""
    torch.manual_seed(0)
    model = vertebra.create_model(name, ndim=ndim, num_classes=5, **SMALL, **options).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 3)
                module.weight.uniform_(0.3, 1.5)
                module.bias.normal_(0, 0.3)
    return model


def error(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("squeeze", [False, True])
def test_fused_network_gives_the_same_outputs(ndim, groups, squeeze):
    model = build(ndim, groups=groups, squeeze=squeeze)
    x = torch.randn(2, 3, *(33, 40, 37)[:ndim])
    fused = vertebra.fuse(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    with torch.no_grad():
        assert error(fused(x), model(x)) <= 1e-5
        for a, b in zip(fused.forward_intermediates(x), model.forward_intermediates(x), strict=True):
            assert error(a, b) <= 1e-5
    convs = [m for n, m in fused.named_modules() if n.endswith("reparam")]
    assert len(convs) == 7 and all(c.bias is not None for c in convs)
    assert sum(".se." in n for n in fused.state_dict()) == (28 if squeeze else 0)  # seven blocks, two convolutions


def test_branches_add_up_as_published():
    block = build().stages[1].blocks[1]
    x = torch.randn(2, 5, 6, 32)
    nchw, branch = x.movedim(-1, 1), block.reparam

    def norm(y, n):
        return nn.functional.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-5)

    dense, one = getattr(branch, "dense"), getattr(branch, "1x1")  # noqa: B009
    want = norm(nn.functional.conv2d(nchw, dense.conv.weight, padding=1), dense.norm)
    want = want + norm(nn.functional.conv2d(nchw, one.conv.weight), one.norm) + norm(nchw, branch.identity)
    with torch.no_grad():
        assert error(block(x), want.relu().movedim(1, -1)) <= 1e-6


def test_squeeze_excitation_stands_before_the_relu():
    model = build(squeeze=True)
    with torch.no_grad():
        block = model.stem
        block.se.up.weight.zero_()
        block.se.up.bias.fill_(50.0)  # gate 1
        x = torch.randn(1, 8, 8, 3)
        assert torch.equal(block(x), block.reparam(x).relu())
        block.se.down.weight.fill_(1.0)
        seen = []
        hook = block.se.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
        block(x)
        hook.remove()
    assert seen[0].min() < 0  # the gate reads the sum, not its positive part


@pytest.mark.parametrize(("name", "groups"), [("repvgg_a0", 1), ("repvgg_b1g2", 2), ("repvgg_b1g4", 4)])
def test_every_second_block_of_the_whole_network_is_grouped(name, groups):
    with torch.device("meta"):
        model = vertebra.create_model(name)
    convs = [m.dense.conv for n, m in model.named_modules() if n.endswith("reparam")]
    assert [c.groups for c in convs] == [groups if i and i % 2 == 0 else 1 for i in range(len(convs))]


def test_training_step_at_the_published_size_leaves_memory_alone():
    """torch's own backward of the stem's strided 1x1 branch corrupts the heap; seen only when the process ends."""
    code = """
import torch, vertebra
for size in (70, 224):
    widths = (16 if size == 70 else 48, 16, 16, 16, 16)
    model = vertebra.create_model("repvgg_a0", blocks=(1, 1, 1, 1), widths=widths).train()
    for _ in range(2):
        model(torch.randn(2, 3, size, size)).square().sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_identity_exists_only_where_the_shape_allows():
    model = build()
    for stage in model.stages:
        assert [b.reparam.identity is not None for b in stage.blocks] == [False] + [True] * (len(stage.blocks) - 1)
    assert model.stem.reparam.identity is None


def test_checkpoints_of_the_other_structure_are_refused_with_the_reason():
    model = build()
    fused = vertebra.fuse(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for state in (fused.state_dict(), vertebra.to_official(fused)):
        with pytest.raises(vertebra.CheckpointError, match="fused"):
            vertebra.load_checkpoint(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for state in (model.state_dict(), vertebra.to_official(model)):
        with pytest.raises(vertebra.CheckpointError, match="unfused checkpoint before"):
            vertebra.load_checkpoint(fused, state)


def test_official_names_of_both_structures():
    model = build()
    official = set(vertebra.to_official(model))
    assert {"stage0.rbr_dense.conv.weight", "stage0.rbr_1x1.bn.running_var", "linear.bias"} <= official
    assert "stage2.1.rbr_identity.weight" in official and "stage2.0.rbr_identity.weight" not in official
    fused = vertebra.to_official(vertebra.fuse(model))
    assert {"stage0.rbr_reparam.weight", "stage4.0.rbr_reparam.bias"} <= set(fused)
    assert not any(re.search("dense|1x1|identity", k) for k in fused)
    other = vertebra.fuse(build(groups=1))
    assert not vertebra.load_checkpoint(other, fused).missing


@pytest.mark.parametrize("name", vertebra.list_models(family="repvgg"))
def test_parameter_counts_of_both_structures(name):
    published = vertebra.model_info(name).published
    with torch.device("meta"):
        model = vertebra.create_model(name).eval()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - published["params_m"]) <= 0.0006
    deployed = 0  # by arithmetic: a 3x3 kernel and a bias for each block, and all that is outside of the branches
    for n, m in model.named_modules():
        if n.endswith("reparam"):
            deployed += m.dense.conv.weight.numel() + m.dense.conv.weight.shape[0]
    deployed += sum(p.numel() for n, p in model.named_parameters() if "reparam" not in n)
    assert abs(deployed / 1e6 - published["params_deploy_m"]) <= 0.011  # the paper cuts the third decimal off


def test_no_residual_paths_to_drop():
    with pytest.raises(ValueError, match="no residual paths"):
        vertebra.create_model("repvgg_a0", drop_path_rate=0.1)


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b0"])
def test_agrees_with_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.5)
                module.weight.uniform_(0.3, 0.8)
    table = (
        (r"^stem\.", "stage0."),
        (r"^stages\.(\d)\.", lambda m: f"stage{int(m[1]) + 1}."),
        (r"\.conv_kxk\.", ".rbr_dense."),
        (r"\.conv_1x1\.", ".rbr_1x1."),
        (r"\.identity\.", ".rbr_identity."),
        (r"^head\.fc\.", "linear."),
    )
    state = {}
    for key, value in theirs.state_dict().items():
        for pattern, replacement in table:
            key = re.sub(pattern, replacement, key)
        state[key] = value
    ours = vertebra.create_model(name).eval()
    report = vertebra.load_checkpoint(ours, state)
    assert report.naming == "official" and not report.missing and not report.unexpected
    x = torch.randn(2, 3, 65, 96)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 1e-5
