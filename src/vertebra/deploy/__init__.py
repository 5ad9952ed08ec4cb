"""Making trained models ready to run: structural fusion, packing for the machine, export."""

from .deploying import DeployReport, deploy, load_deployed, save_deployed
from .fusing import fuse

__all__ = ["DeployReport", "deploy", "fuse", "load_deployed", "save_deployed"]
