import pytest

from vertebra.train.config import ConfigError, make_config


def test_settings():
    config = make_config({"lr": 0.1, "overrides": {"dim": 8}}, ["lr=3e-4", "overrides.depths=[1, 2]", "ema=null"])
    assert config.lr == 3e-4 and config.overrides == {"dim": 8, "depths": [1, 2]} and config.ema is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "--set lr: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("epoch=3", "unknown setting 'epoch'; did you mean epochs?"),
        ("epochs=many", "epochs: input should be a valid integer.*got 'many'"),
        ("epochs=0", "epochs: input should be greater than 0, got 0"),
        ("lr=.nan", "lr: "),
        ("lr=.inf", "lr: "),
        ("augment=heavy", "augment: input should be 'none', 'light', 'standard' or 'strong', got 'heavy'"),
        ("epochs=[1", "the value is not YAML"),
        ("data.x=1", "only overrides has keys inside"),
        ("precision=!!python/object/apply:os.system [true]", "the value is not YAML"),
    ],
)
def test_bad_settings_are_one_line(setting, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_config({}, [setting])
    assert "\n" not in str(error.value)
