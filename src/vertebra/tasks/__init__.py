"""What networks are trained for: heads and losses."""

from .losses import CoarseToFineLoss

__all__ = ["CoarseToFineLoss"]
