"""Every golden through `load_checkpoint` with official names: names, shapes, counts and outputs within 1e-5."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from figures import (
    BAR,
    GOLDEN,
    build,
    cases,
    fill_value,
    load_table,
    names_hash,
    official_shapes,
    places,
    relative_error,
    run,
)

import vertebra

TABLE = load_table()


@pytest.mark.parametrize("stem", TABLE)
def test_outputs_of_official_weights(stem):
    row, model = TABLE[stem], build(stem)
    shapes = official_shapes(model)
    assert names_hash(shapes) == row["names"]
    assert sum(p.numel() for p in model.parameters()) == row["params"]
    report = vertebra.load_checkpoint(model, {k: torch.from_numpy(fill_value(k, s)) for k, s in shapes.items()})
    assert sorted(report.loaded) == sorted(shapes)

    full = {}
    if (GOLDEN / f"{stem}.npz").exists():
        with np.load(GOLDEN / f"{stem}.npz") as stored:
            full = {k: stored[k] for k in stored.files}
        assert set(full) == set(row["outputs"]), "table.json is older than the goldens: run make_table.py"
    for suffix, x, expected in cases(row):
        found = run(model, x, list(expected))
        for name, figures in expected.items():
            ours = found[name]
            assert list(ours.shape) == figures["shape"]
            probes = ours.ravel()[places(ours.size)]
            assert relative_error(probes, figures["values"], figures["largest"]) <= BAR, f"{name}{suffix}"
            if full:
                assert relative_error(ours, full[name + suffix]) <= BAR, f"{name}{suffix}"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the full goldens are not here; the table above is")
def test_every_golden_of_our_families_is_in_the_table():
    stored = {f"{f}/{p.stem}" for f in vertebra.list_families() for p in (GOLDEN / f).glob("*.json")}
    assert stored == set(TABLE)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the full goldens are not here; the table above is")
@pytest.mark.parametrize("stem", TABLE)
def test_official_names_are_the_published_ones(stem):
    meta = json.loads((GOLDEN / f"{stem}.json").read_text())
    assert official_shapes(build(stem)) == {k: tuple(s) for k, s, kind in meta["state"] if kind != "const"}
