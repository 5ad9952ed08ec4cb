"""Making trained models ready to run: structural fusion."""

from .fusing import fuse

__all__ = ["fuse"]
