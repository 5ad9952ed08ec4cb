"""Every golden through `load_checkpoint` with official names: names, shapes, counts and outputs within 1e-5."""

from __future__ import annotations

import json

import pytest
import torch
from figures import (
    BAR,
    GOLDEN,
    build,
    call,
    cases,
    full_arrays,
    load_table,
    names_hash,
    official_shapes,
    places,
    relative_error,
    run,
    weights,
)

import vertebra

TABLE = load_table()
# Weights drawn for EfficientViT make softmaxes so sharp that its golden is itself 2.5e-4 from float64: only a processor
# that takes float32 sums in the golden's order can be nearer to it than two float32 runs are to each other
ORDERED = {"efficientvit": BAR if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 1e-3}


def _all_rows() -> list:
    """Every golden; of those with the same class and options in a family, all but the smallest are marked slow."""
    seen, rows = set(), {}
    for stem in sorted(TABLE, key=lambda s: TABLE[s]["params"]):
        name, options, fused = call(stem)
        config = vertebra.registry._find(name)[1].config
        kind = (stem.split("/")[0], config.get("model"), frozenset(options), fused)
        rows[stem] = pytest.param(stem, marks=[pytest.mark.parity_all] if kind in seen else [])
        seen.add(kind)
    return [rows[stem] for stem in TABLE]


@pytest.mark.parametrize("stem", _all_rows())
def test_outputs_of_official_weights(stem):
    row, model, bar = TABLE[stem], build(stem), ORDERED.get(stem.split("/")[0], BAR)
    shapes = official_shapes(model)
    assert names_hash(shapes) == row["names"]
    assert sum(p.numel() for p in model.parameters()) == row["params"]
    full = full_arrays(stem)
    if full:
        assert set(full) == set(row["outputs"]), "table.json is older than the goldens: run make_table.py"
    for suffix, x, expected in cases(row):
        report = vertebra.load_checkpoint(model, weights(row, shapes, suffix))
        assert sorted(report.loaded) == sorted(shapes)
        found = run(model, x, list(expected), row.get("lengths"))
        for name, figures in expected.items():
            ours = found[name]
            assert list(ours.shape) == figures["shape"]
            probes = ours.ravel()[places(ours.size)]
            assert relative_error(probes, figures["values"], figures["largest"]) <= bar, f"{name}{suffix}"
            if full:
                assert relative_error(ours, full[name + suffix]) <= bar, f"{name}{suffix}"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the full goldens are not here; the table above is")
def test_every_golden_of_our_families_is_in_the_table():
    stored = {f"{f}/{p.stem}" for f in vertebra.list_families() for p in (GOLDEN / f).glob("*.json")}
    assert stored == set(TABLE)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the full goldens are not here; the table above is")
@pytest.mark.parametrize("stem", TABLE)
def test_official_names_are_the_published_ones(stem):
    meta = json.loads((GOLDEN / f"{stem}.json").read_text())
    with torch.device("meta"):  # names and shapes need no numbers
        model = build(stem)
    assert official_shapes(model) == {k: tuple(s) for k, s, kind in meta["state"] if kind != "const"}
