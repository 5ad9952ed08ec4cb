"""Vision backbones in one layout: published checkpoints with proven parity, 1-D, 2-D and 3-D from one definition."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from .backbone import Backbone
from .checkpoint import CheckpointError, LoadReport, load_checkpoint, save_checkpoint, to_official
from .compose import compose
from .deploy import DeployReport, deploy, fuse, load_deployed, save_deployed
from .registry import ModelInfo, create_model, list_families, list_models, model_info

if TYPE_CHECKING:
    from .deploy.exporting import export, load_exported
    from .tasks.detection import detection
    from .tasks.segmentation import segmentation

__all__ = [
    "Backbone",
    "CheckpointError",
    "DeployReport",
    "LoadReport",
    "ModelInfo",
    "__version__",
    "compose",
    "create_model",
    "deploy",
    "detection",
    "export",
    "fuse",
    "list_families",
    "list_models",
    "load_checkpoint",
    "load_deployed",
    "load_exported",
    "model_info",
    "save_checkpoint",
    "save_deployed",
    "segmentation",
    "to_official",
]


def __getattr__(name: str) -> Any:
    """What is loaded at its first use: the builders of dense networks need more than torch (torchvision)."""
    if name in ("detection", "segmentation"):
        import importlib

        return getattr(importlib.import_module(f"{__name__}.tasks.{name}"), name)
    if name in ("export", "load_exported"):
        from .deploy import exporting

        return getattr(exporting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
