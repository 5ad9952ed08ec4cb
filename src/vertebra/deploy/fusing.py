"""Fold training-time structure into the published inference structure."""

from __future__ import annotations

import copy

from torch import nn

from ..backbone import Backbone


def _replace(module: nn.Module, published: bool) -> nn.Module:
    """Outermost first: a module that can fuse returns its replacement and is not descended into."""
    if callable(getattr(module, "fuse", None)):
        return module.fuse(published=published)
    for name, child in list(module.named_children()):
        replacement = _replace(child, published)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def fuse(model: Backbone, published: bool = True) -> Backbone:
    """A copy of `model` in the paper's inference structure, with the same outputs (folded in float64).

    published=False also folds the batch norms that the paper's own deployed network leaves in place. Nothing to fuse is
    no error; fusing twice changes nothing. Raises ValueError when any part of the model is in training mode, because
    batch statistics cannot be folded.
    """
    training = next((name or "the model" for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise ValueError(f"{training} is in training mode: call model.eval() before fuse")
    fused = _replace(copy.deepcopy(model), published).eval()  # new modules begin in training mode
    if getattr(fused, "recipe", None):
        fused.recipe["fused"] = published and fused.recipe.get("fused", True)  # once folded further, always
    return fused
