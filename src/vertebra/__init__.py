"""Vision backbones in one layout: published checkpoints with proven parity, 1-D, 2-D and 3-D from one definition."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from .backbone import Backbone
from .checkpoint import CheckpointError, LoadReport, load_checkpoint, save_checkpoint, to_official
from .compose import compose
from .deploy import fuse
from .registry import ModelInfo, create_model, list_families, list_models, model_info

if TYPE_CHECKING:
    from .tasks.detection import detection
    from .tasks.segmentation import segmentation

__all__ = [
    "Backbone",
    "CheckpointError",
    "LoadReport",
    "ModelInfo",
    "__version__",
    "compose",
    "create_model",
    "detection",
    "fuse",
    "list_families",
    "list_models",
    "load_checkpoint",
    "model_info",
    "save_checkpoint",
    "segmentation",
    "to_official",
]


def __getattr__(name: str) -> Any:
    """The builders of dense networks, loaded at their first use: they need more than torch (torchvision)."""
    if name in ("detection", "segmentation"):
        import importlib

        return getattr(importlib.import_module(f"{__name__}.tasks.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
