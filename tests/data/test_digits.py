import numpy as np
import pytest

from vertebra.data import DataError, open_source


def test_digits_counts():
    source = open_source("digits")
    counts = {key: np.bincount(split.labels).tolist() for key, split in source.splits.items()}
    assert counts["test"] == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert counts["val"] == [18, 18, 18, 18, 18, 18, 18, 18, 17, 18]
    assert sum(map(sum, counts.values())) == 1797
    assert len({name for split in source.splits.values() for name in split.names}) == 1797
    images = [source.splits["train"].read(i) for i in range(9)]
    assert {x.shape for x in images} == {(1, 8, 8)} and max(x.max() for x in images) == 255


def test_limit_is_balanced_and_nested():
    small, large = open_source("digits", limit=25), open_source("digits", limit=100)
    assert np.bincount(large.splits["train"].labels).tolist() == [10] * 10
    assert sorted(np.bincount(small.splits["train"].labels).tolist()) == [2] * 5 + [3] * 5
    assert set(small.splits["train"].names) <= set(large.splits["train"].names)
    with pytest.raises(DataError, match="a limit of 9 leaves classes empty"):
        open_source("digits", limit=9)
