"""Tables that depend on sizes only are built once per size; what depends on parameters never is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def tracing() -> bool:
    """True inside torch.compile and torch.export, where sizes may be symbolic and must not be compared."""
    return torch.compiler.is_compiling()


def sized_cache(build: Callable) -> Callable:
    """Cache `build(*sizes, device=...)` per size.

    Steps aside while tracing (symbolic sizes cannot be hashed, traced tensors must not leak) and builds outside
    inference mode, because an inference tensor could not be used in training afterwards.
    """
    kept = functools.lru_cache(maxsize=128)(build)

    @functools.wraps(build)
    def call(*args, **kwargs):
        if tracing():
            return build(*args, **kwargs)
        if kwargs.get("device") is None:  # the default is part of the size's key: it may be meta inside a context
            kwargs["device"] = torch.get_default_device()
        with torch.inference_mode(False), torch.no_grad():
            return kept(*args, **kwargs)

    return call
