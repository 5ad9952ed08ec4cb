"""What a network is fed where nobody says."""

from __future__ import annotations

from ..backbone import Backbone
from ..layers import ntuple
from ..registry import model_info


def usual_sides(backbone: Backbone) -> tuple[int, ...]:
    """The size that the model was built or published for; at rank 3 a small volume where that would be a huge one."""
    name, size = backbone.recipe.get("name"), backbone.recipe.get("kwargs", {}).get("img_size")
    least, ndim = backbone.min_size, backbone.ndim
    if size is None and name is not None:
        size = model_info(name).inputs.size
    if size is None or (not isinstance(size, int) and len(size) != ndim):
        size = 7 * least
    if ndim == 3 and isinstance(size, int):
        size = min(size, max(2 * least, 64))
    return tuple(max(side, least) for side in ntuple(size, ndim, "img_size"))
