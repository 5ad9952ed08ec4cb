"""scikit-learn's handwritten digits: 1797 real grey 8x8 images in ten classes, part of the installed package."""

import numpy as np

from .source import Source, carve, from_arrays


def open_digits() -> Source:
    """A tenth of every class for validation, a fifth for the test, the rest for training."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    classes = tuple(str(name) for name in data.target_names)
    splits = carve(from_arrays(images, data.target, "digits"), {"val": 0.1, "test": 0.2}, classes)
    return Source("digits", "digits", classes, 1, splits)
