"""What the comparisons with other libraries share."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


def fill(module):
    """Weights far from their initialisation, so that a norm or a bias out of place shows."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=0.05).add_(1.0 if name.endswith("weight") and p.ndim == 1 else 0.0)
    return module.eval()


def error(ours, theirs):
    """Relative error in the Euclidean norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def spread(module):
    """Weights large enough that every path counts: queries and biases move the softmax, gates the channels."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.normal_(std=0.3).add_(1.0 if name.endswith("weight") else 0.0)
            else:
                p.normal_(std=1.0 if name.endswith("table") else p[0].numel() ** -0.5)
        for name, b in module.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(std=0.3)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 2.0)
    return module.eval()


def loud(module):
    """Weights large enough that attention is far from uniform, running statistics far from 0 and 1."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.7)
        for name, b in module.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(std=0.3)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 2)
    return module.eval()


class Largest(TorchFunctionMode):
    """Remembers the `numbers` of the largest tensor that any torch call gives while it is entered."""

    numbers = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out
