"""Class imbalance: weights against torch's formulas, draws against expected frequencies, resuming to the bit."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight

from vertebra.data import DataError, Split, open_source
from vertebra.data.loader import Samples, TrainOrder, eval_loader, train_loader
from vertebra.tasks import create_loss
from vertebra.train import Config, ConfigError, Run, fit, resume
from vertebra.train.balance import Weighted, class_weights, draw_weights, group_weights, sample_weights
from vertebra.train.watch import Watch


def split_of(labels):
    labels = np.asarray(labels)
    names, index = [str(i) for i in range(len(labels))], np.arange(len(labels))
    return Split(names, labels, lambda i: torch.tensor([[float(i)]]), index)


LABELS = np.repeat([0, 1, 2], [80, 15, 5])
MULTI = (np.random.default_rng(0).random((200, 3)) < [0.5, 0.1, 0.02]).astype(np.int64)


def test_weights_are_inverse_to_frequency_with_mean_one():
    weights = np.array(class_weights(split_of(LABELS)))
    assert np.allclose(weights, compute_class_weight("balanced", classes=np.arange(3), y=LABELS), rtol=1e-5)
    assert weights[LABELS].mean() == pytest.approx(1, abs=1e-5)
    assert class_weights(split_of([0, 0, 0, 2])) == pytest.approx((2 / 3, 0, 2), rel=1e-5)
    yes = MULTI.sum(0)
    assert np.allclose(class_weights(split_of(MULTI)), (200 - yes) / yes, rtol=1e-5)
    assert class_weights(split_of([[0, 1], [0, 0], [0, 1]]))[0] == 1  # never there


def test_group_weights_keep_one_group_from_making_up_a_class():
    labels, groups = np.array([0] * 8 + [1] * 4), np.array(list("aaaaaabb") + list("aaab"))
    split = dataclasses.replace(split_of(labels), groups=groups)
    weights = group_weights(split).numpy()
    pairs = {("a", 0): 6, ("b", 0): 2, ("a", 1): 3, ("b", 1): 1}
    want = np.array([(8, 4)[c] * pairs[g, c] for g, c in zip(groups, labels)]) ** -0.5
    assert np.allclose(weights, want / want.mean(), rtol=1e-12)
    assert torch.equal(draw_weights("group", split), group_weights(split)) and draw_weights("loss", split) is None
    with pytest.raises(ConfigError, match="balance: group needs samples of one label"):
        fit(Config(data="digits", balance="group", epochs=1))


def test_weighted_loss_is_torchs():
    logits, target = torch.randn(12, 3, dtype=torch.float64), torch.tensor(LABELS[::9][:12])
    weights = (0.5, 2.0, 4.0)
    w = torch.tensor(weights, dtype=torch.float64)
    loss = Weighted(create_loss("cross_entropy", reduction="none"), weights)
    summed = F.cross_entropy(logits, target, weight=w, reduction="sum")
    assert loss({"logits": logits}, target).item() == pytest.approx(summed.item() / 12, rel=1e-12)
    halves = [loss({"logits": logits[s]}, target[s]) * n / 12 for s, n in ((slice(5), 5), (slice(5, 12), 7))]
    assert sum(halves).item() == pytest.approx(summed.item() / 12, rel=1e-12)  # uneven parts add up
    smooth = Weighted(create_loss("cross_entropy", reduction="none", label_smoothing=0.1), weights)
    values = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
    assert smooth({"logits": logits}, target).item() == pytest.approx((w[target] * values).mean().item(), rel=1e-12)


def drawn_in(order, epoch):
    order.epoch = epoch
    return [key for batch in order for key in batch]


def test_draws_have_the_expected_frequencies():
    weights = sample_weights(split_of(LABELS))
    assert float(weights.mean()) == pytest.approx(1)
    order = TrainOrder(100, 10, 0, weights=weights)
    counts = np.zeros(100)
    for epoch in range(200):
        keys = drawn_in(order, epoch)
        mine = np.bincount([key[1] for key in keys], minlength=100)
        per_class = [mine[c == LABELS].sum() for c in range(3)]
        assert len(keys) == 100 and max(per_class) - min(per_class) <= 1  # 100 / 3 each, rounded up or down
        assert (np.abs(mine - weights.numpy()) < 1).all()  # each n w rounded up or down
        counts += mine
    for c in range(3):
        assert counts[c == LABELS].sum() / 200 == pytest.approx(100 / 3, abs=0.5)
    assert np.abs(counts / 200 - weights.numpy()).max() < 5 * 0.5 / 200**0.5  # deviation of one draw at most 1/2
    position = np.array([i for i, key in enumerate(keys) if LABELS[key[1]] == 2])
    assert position.min() < 15 and position.max() > 84  # mixed, not class after class


def test_several_labels_are_drawn_by_the_mean_over_classes():
    weights = sample_weights(split_of(MULTI)).numpy()
    yes = MULTI.sum(0)
    by_hand = np.array([np.mean([1 / (yes[c] if row[c] else 200 - yes[c]) for c in range(3)]) for row in MULTI])
    assert np.allclose(weights, by_hand / by_hand.mean(), rtol=1e-12)


def test_draws_depend_on_seed_and_epoch_and_are_shared_by_processes():
    weights = sample_weights(split_of(LABELS))
    order = TrainOrder(100, 10, 3, weights=weights)
    first = drawn_in(order, 4)
    drawn_in(order, 5)
    torch.manual_seed(1)
    assert drawn_in(order, 4) == first != drawn_in(order, 5)
    assert drawn_in(TrainOrder(100, 10, 4, weights=weights), 4) != first
    shards = [TrainOrder(100, 10, 3, rank, 2, weights) for rank in range(2)]
    for shard in shards:
        shard.epoch = 4
    merged = [key for a, b in zip(*shards, strict=True) for pair in zip(a, b, strict=True) for key in pair]
    assert merged == first
    plain = TrainOrder(100, 10, 3)
    assert sorted(drawn_in(plain, 4)) == [(4, i) for i in range(100)]  # without weights as ever


def test_what_is_drawn_again_is_augmented_otherwise():
    split = split_of([0] * 30 + [1] * 2)
    order = TrainOrder(32, 32, 0, weights=sample_weights(split))
    [keys] = list(order)
    again = [key for key in keys if len(key) == 3]
    assert sorted(key[2] for key in again if key[1] == 30) == list(range(1, len([k for k in keys if k[1] == 30])))
    [batch] = list(train_loader(Samples(split, lambda x: x + torch.rand(()), 0), order, 0))
    assert len(batch.images.unique()) == 32 and len(batch.positions.unique()) < 32


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """Two kinds of sine in noise, nine of one to one of the other; people keep to one split."""
    rng = np.random.default_rng(0)
    y = (np.arange(300) % 10 == 0).astype(np.int64)
    x = np.sin(np.arange(64) * (0.3 + 0.3 * y[:, None]) + rng.random((300, 1)) * 6) + rng.normal(0, 0.5, (300, 64))
    path = tmp_path_factory.mktemp("waves") / "waves.npz"
    multi = np.stack([y, 1 - y], 1)
    np.savez(path, x=(x * 1000).astype(np.int16), y=y, multi=multi, who=np.arange(300) // 20)
    return path


@pytest.fixture(scope="module")
def small(waves):
    return {
        "model": "smt_tiny",
        "overrides": {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "heads": [1, 1, 2, 2]},
        "data": str(waves),
        "data_options": {"group": "who", "val": 0.2, "scale": 0.001},
        "epochs": 2,
        "batch_size": 32,
        "augment": "light",
        "label_smoothing": 0.0,
        "threads": 1,
        "accelerator": "cpu",
    }


class StopIn(Watch):
    def __init__(self, epoch):
        self.last = epoch

    def epoch(self, row, epochs, score):
        if row["epoch"] == self.last:
            raise KeyboardInterrupt


def test_resumed_with_drawn_samples_is_bit_identical(small, tmp_path):
    config = Config(**small | {"balance": "sample", "select": "f1"})
    whole = fit(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "broken", StopIn(1))
    resumed = resume(tmp_path / "broken")
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert whole.test == resumed.test
    best = max(whole.history, key=lambda row: (row["val_f1"], -row["val_loss"]))
    assert whole.best_epoch == best["epoch"] and Run.open(tmp_path / "whole").config.select == "f1"
    assert Run.open(tmp_path / "whole").config.ndim == 1


def test_the_loss_that_is_trained_is_the_weighted_one(small, tmp_path):
    config = Config(**small | {"balance": "loss", "epochs": 1, "lr": 1e-12, "augment": "none", "warmup": 0.0,
                               "data_options": small["data_options"] | {"only": ["0", "1"]}})  # fmt: skip
    result = fit(config, tmp_path)
    run = Run.open(tmp_path)
    source = open_source(str(config.data), **config.data_options)
    labels = source.splits["train"].labels
    n, ones = len(labels), int(labels.sum())
    weights = (n / (2 * (n - ones)), n / (2 * ones))
    assert run.config.class_weights == pytest.approx(weights, rel=1e-5)
    # the weights hardly moved: the training loss is that of the best (only) epoch's model over what was seen
    from vertebra.train.build import make_model, make_transforms
    from vertebra.train.use import load_best

    model = load_best(run, make_model(run.config, 2)).train()
    order = TrainOrder(n, 32, config.seed)
    total = seen = 0.0
    for batch in train_loader(Samples(source.splits["train"], make_transforms(run.config)[0], 0), order, 0):
        w = torch.tensor(weights)
        loss = F.cross_entropy(model(batch.images), batch.targets, weight=w, reduction="sum")
        total, seen = total + loss.item(), seen + len(batch.targets)
    assert result.history[0]["train_loss"] == pytest.approx(total / seen, rel=1e-4)


def test_several_labels_get_a_weight_for_yes(small, tmp_path):
    options = small["data_options"] | {"y": "multi"}
    config = Config(**small | {"balance": "loss", "epochs": 1, "data_options": options})
    result = fit(config, tmp_path)
    wanted = class_weights(open_source(config.data, **options).splits["train"])
    assert result.score == "auc"
    assert Run.open(tmp_path).config.class_weights == pytest.approx(wanted)
    focal = config.model_copy(update={"loss": "sigmoid_focal"})
    with pytest.raises(ConfigError, match="balance: loss needs binary_cross_entropy, not sigmoid_focal"):
        fit(focal, tmp_path / "focal")


def test_what_cannot_be_chosen_is_said(small, tmp_path):
    with pytest.raises(ConfigError, match="select: task single has the figures accuracy, f1, loss, got 'auc'"):
        fit(Config(**small | {"select": "auc"}), tmp_path)
    with pytest.raises(ConfigError, match="reduction cannot be chosen with balance: loss"):
        fit(Config(**small | {"balance": "loss", "loss_options": {"reduction": "sum"}}), tmp_path)
    with pytest.raises(ConfigError, match="class_weights: needs 2"):
        fit(Config(**small | {"balance": "loss", "class_weights": (1.0, 1.0, 1.0)}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_of_a_patients_samples_are_tested_once(small):
    split = open_source(small["data"], **small["data_options"]).splits["test"]
    seen = [int(i) for batch in eval_loader(Samples(split, lambda x: x), 7, 0) for i in batch.positions]
    assert seen == list(range(len(split)))
    with pytest.raises(DataError, match="shared by 4"):
        TrainOrder(3, 16, 0, 0, 4, torch.ones(3))
