"""Names, options and what is said about wrong ones."""

from __future__ import annotations

import dataclasses

import pytest

from vertebra import create_model, list_families, list_models, model_info
from vertebra.backbone import Backbone
from vertebra.registry import families

TINY = dict(depths=(1, 1, 1, 1), dim=32)


def test_list_models():
    every = list_models()
    assert every == sorted(set(every))
    assert set(every) == {name for family in families().values() for name in family.variants}
    assert list_families() == sorted(families())
    plus = [f"crossformer_pp_{size}" for size in ("base", "huge", "large", "small")]
    assert list_models("crossformer_pp_*") == plus
    assert list_models("*_pp_*", family="crossformer") == plus
    assert list_models("crossformer_[tl]*") == ["crossformer_large", "crossformer_tiny"]
    assert list_models("crossformer") == []
    assert all(name.startswith("crossformer") for name in list_models(family="crossformer"))
    with pytest.raises(ValueError, match=r"unknown family 'crossfomer'; did you mean crossformer"):
        list_models(family="crossfomer")


@pytest.mark.parametrize("call", (create_model, model_info))
def test_unknown_names(call):
    with pytest.raises(ValueError, match=r"unknown model 'crossformer_tinny'; did you mean crossformer_tiny"):
        call("crossformer_tinny")
    with pytest.raises(ValueError, match=r"unknown model '@@@'; see vertebra.list_models\(\)"):
        call("@@@")


def test_options_of_parents_are_known_too():
    model = create_model("deit_tiny_distilled_patch16_224", dim=48, heads=3, depth=2, drop_path_rate=0.5, img_size=64)
    assert model.num_features == 48 and model.stages[1].blocks[0].drop_path.rate == 0.5
    with pytest.raises(ValueError, match=r"no option 'dept'; it has: depth, .*drop_path_rate, .*in_chans, .*ndim"):
        create_model("deit_tiny_distilled_patch16_224", dept=2)


def test_misspelt_options():
    with pytest.raises(
        ValueError, match=r"crossformer_tiny has no option 'dimm', 'goups'; it has: cooling, depths, dim,"
    ):
        create_model("crossformer_tiny", goups=3, dimm=2)


@pytest.mark.parametrize("rate", (-0.1, 1, 1.5, float("nan")))
def test_drop_path_rate_bounds(rate):
    with pytest.raises(ValueError, match=r"drop_path_rate must be in \[0, 1\), got"):
        create_model("crossformer_tiny", drop_path_rate=rate, **TINY)


def test_drop_path_rate_reaches_the_blocks():
    model = create_model("crossformer_tiny", drop_path_rate=0.3, **TINY)
    assert [s.blocks[0].drop_path.rate for s in model.stages] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert create_model("crossformer_tiny", **TINY).stages[3].blocks[0].drop_path.rate == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(ndim=4), "not at ndim=4"),
        (dict(ndim=0), "not at ndim=0"),
        (dict(in_chans=0), "in_chans must be a whole number of at least 1, got 0"),
        (dict(num_classes=-1), "num_classes must be a whole number of at least 0, got -1"),
        (dict(out_indices=(0, 1)), "out_indices needs features_only=True"),
        (dict(features_only=True, out_indices=(4,)), r"\(4,\) are not all in 0\.\.3"),
        (dict(pretrained=True), "crossformer_tiny has no weights that can be fetched .*checkpoint=PATH"),
        (dict(dim=36), "channels cannot be shared out over 4 kernels"),
    ],
)
def test_impossible_values(options, words):
    with pytest.raises(ValueError, match=words):
        create_model("crossformer_tiny", **(TINY | options))


def test_model_info_is_a_copy():
    info = model_info("crossformer_small")
    assert (info.name, info.family, info.published["params_m"]) == ("crossformer_small", "crossformer", 30.7)
    info.published["params_m"] = 0
    info.config["depths"] = ()
    assert model_info("crossformer_small").published["params_m"] == 30.7
    assert model_info("crossformer_small").config["depths"] == (2, 2, 6, 2)
    for thing, field in ((info, "name"), (info.weights, "status"), (info.inputs, "size")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, "other")


def test_every_variant_is_described():
    for name in list_models():
        info = model_info(name)
        assert info.paper and info.venue and info.arxiv and info.licence, name
        assert info.weights.status in ("direct", "manual", "none"), name
        assert info.weights.status != "direct" or info.weights.location.startswith("https://"), name
        assert "model" not in info.config
        assert issubclass(
            families()[info.family].variants[name].config.get("model", families()[info.family].model), Backbone
        )


def test_the_recipe_is_what_was_asked():
    config = dict(model_info("crossformer_tiny").config)
    model = create_model("crossformer_tiny", ndim=1, in_chans=2, num_classes=3, **TINY)
    assert (model.ndim, model.in_chans, model.num_classes) == (1, 2, 3)
    assert model.recipe["name"] == "crossformer_tiny"
    assert model.recipe["kwargs"]["depths"] == (1, 1, 1, 1)
    assert model_info("crossformer_tiny").config == config
