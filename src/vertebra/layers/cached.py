"""Tables that depend on sizes only are built once per size; what depends on parameters only in a deployed model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch


def tracing() -> bool:
    """True inside torch.compile and torch.export, where sizes may be symbolic and must not be compared."""
    return torch.compiler.is_compiling()


_of_trace: ContextVar[dict[Hashable, Any] | None] = ContextVar("vertebra tables of one trace", default=None)


@contextlib.contextmanager
def one_trace() -> Iterator[None]:
    """Inside, `sized_cache` keeps what torch.export traced: blocks of one stage share their tables in the program."""
    token = _of_trace.set({})
    try:
        yield
    finally:
        _of_trace.reset(token)


def _name(size: Any) -> Hashable:
    """A size or whatever else a table is built from as part of a key; symbolic sizes by their expression."""
    if isinstance(size, torch.SymInt):
        return "symbol", size.node.expr
    return tuple(map(_name, size)) if isinstance(size, tuple | list) else size


def sized_cache(build: Callable) -> Callable:
    """Cache `build(*sizes, device=...)` per size.

    While tracing it builds anew, because traced tensors must not outlive their trace, or once inside `one_trace`. It
    builds outside inference mode, because an inference tensor could not be used in training afterwards.
    """
    kept = functools.lru_cache(maxsize=128)(build)

    @functools.wraps(build)
    def call(*args, **kwargs):
        if tracing():
            tables = _of_trace.get() if torch.compiler.is_exporting() else None
            if tables is None:
                return build(*args, **kwargs)
            key = (build, _name(args), _name(sorted(kwargs.items())))
            if key not in tables:
                tables[key] = build(*args, **kwargs)
            return tables[key]
        if kwargs.get("device") is None:  # the default is part of the size's key: it may be meta inside a context
            kwargs["device"] = torch.get_default_device()
        with torch.inference_mode(False), torch.no_grad():
            return kept(*args, **kwargs)

    return call


def version(tensor: torch.Tensor) -> int:
    """How often `tensor` was changed in place; 0 where torch does not count, as in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


_KEPT = 4  # sizes that a deployed module remembers


def settled(method: Callable) -> Callable:
    """Keep what `method(self, *sizes)` makes of a module's parameters, per sizes, once `vertebra.deploy` froze them.

    Elsewhere nothing is kept: it would be stale after the next optimizer step or load. In a deployed module it is made
    anew when a parameter was changed in place, moved or cast.
    """

    @functools.wraps(method)
    def call(self, *sizes):
        kept = getattr(self, "kept", None)
        if kept is None or tracing():
            return method(self, *sizes)
        weights = list(self.parameters())
        places = tuple(tuple(s) if isinstance(s, Sequence) else s for s in sizes)
        key = (method.__qualname__, places, *{(w.dtype, w.device) for w in weights}, sum(map(version, weights)))
        if key not in kept:
            if len(kept) >= _KEPT:
                kept.pop(next(iter(kept)))
            with torch.inference_mode(False), torch.no_grad():
                kept[key] = method(self, *sizes)
        return kept[key]

    return call
