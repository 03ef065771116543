"""Linear probes: each optimizer against scikit-learn and the others, on any number of ranks.

    bash run/test.sh tests/run/evals/test_linear_probe.py

Ranks are threads, and the model is a table of vectors.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from glimpse.run.evals import knn, linear_probe, parse_call, parse_evaluations
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.lars import LARS
from glimpse.run.evals.linear_probe import (
    NonAffineBatchNorm,
    Options,
    fit_regression,
    sweep_weight_decay,
)
from glimpse.run.lib import distributed
from glimpse.tests.helpers.table_model import CLASSES, WIDTH, TableImages, TableModel
from glimpse.tests.helpers.threads import ranks

TRAIN, TEST = 311, 307


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a set of clusters that overlap; features have scales from 0.1 to 10 and an offset."""
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH, generator=rng)
    scale = torch.logspace(-1, 1, WIDTH)
    shift = torch.linspace(-2, 2, WIDTH)
    all_labels = {"train": torch.arange(TRAIN) % CLASSES, "test": torch.arange(TEST) % CLASSES}
    tables = {}
    for split, labels in all_labels.items():
        noise = torch.randn(len(labels), WIDTH, generator=rng)
        tables[split] = (centers[labels] + 0.6 * noise) * scale + shift
    return TableImages(tmp_path_factory.mktemp("probe") / "set", "test", tables, all_labels)


def fit_sklearn(
    images: TableImages, decay: float, standardize: bool
) -> tuple[LogisticRegression, float]:
    """Return scikit-learn's regression on the train split, and its accuracy on the test split."""
    train = images.tables["train"].double()
    test = images.tables["test"].double()
    if standardize:
        mean = train.mean(0)
        std = train.std(0, correction=0)
        train = (train - mean) / std
        test = (test - mean) / std
    model = LogisticRegression(C=1 / decay, max_iter=10000, tol=1e-9)
    model.fit(train.numpy(), images.all_labels["train"].numpy())
    hits = model.predict(test.numpy()) == images.all_labels["test"].numpy()
    return model, hits.mean()


@pytest.mark.parametrize("world, decay", [(1, 300.0), (3, 1.0)])
def test_lbfgs_finds_what_scikit_learn_finds(images, monkeypatch, world, decay):
    labels = images.all_labels["train"]
    x = images.tables["train"].double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    expected, _accuracy = fit_sklearn(images, decay, True)

    def fit_share() -> nn.Linear:
        linear = nn.Linear(WIDTH, CLASSES).double()
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        share = slice(distributed.rank(), None, world)
        fit_regression(linear, x[share], labels[share], TRAIN, decay)
        return linear

    with ranks(monkeypatch, world, 4) as run:
        first, *others = run(fit_share)

    weight = first.weight.detach().numpy()
    np.testing.assert_allclose(weight, expected.coef_, rtol=1e-3, atol=1e-3)
    bias = first.bias.detach().numpy()
    bias = bias - bias.mean()
    expected_bias = expected.intercept_ - expected.intercept_.mean()
    np.testing.assert_allclose(bias, expected_bias, rtol=1e-3, atol=1e-3)
    for other in others:
        assert torch.equal(other.weight, first.weight), "all ranks take the same steps"


OPTIMIZER_OPTIONS = [
    ("lbfgs", dict(weight_decay=1.0)),
    ("lars", {}),
    ("sgd", dict(lr=(0.01, 1.0), epochs=60)),
    ("adamw", dict(features="pooled", lr=(0.1,), epochs=60)),
]


@pytest.mark.parametrize("optimizer, options", OPTIMIZER_OPTIONS)
def test_the_optimizers_agree_on_any_ranks(tmp_path, images, monkeypatch, optimizer, options):
    """With standardized features they are close to scikit-learn's regression.

    Other numbers of ranks change the prediction of at most one image.
    """
    _model, expected = fit_sklearn(images, 1.0, True)
    options = Options(optimizer, standardize=True, **options)
    lines = []

    results = {}  # {world size: results of rank 0}
    for world in (1, 3):
        model = TableModel(tmp_path, 64)
        model.log = lines.append
        with ranks(monkeypatch, world, 64) as run:
            first, *others = run(lambda model=model: linear_probe.evaluate(model, images, options))
        assert all(other == first for other in others)
        results[world] = first

    assert results[3]["top1"] == pytest.approx(results[1]["top1"], abs=1.01 / TEST)
    tolerance = 1.01 / TEST if optimizer == "lbfgs" else 0.03
    assert results[1]["top1"] == pytest.approx(expected, abs=tolerance)
    assert 0.5 < expected < 0.99
    assert results[1]["chance"] == 1 / CLASSES
    assert abs(results[1]["mean_per_class"] - results[1]["top1"]) < 0.01

    is_sweep = any("held-out" in line for line in lines)
    assert lines[-1].endswith("on all images")
    assert ("weight decay 1," if optimizer == "lbfgs" else "lr ") in lines[-1]
    assert is_sweep == (optimizer == "sgd"), "one of several learning rates is chosen"


def test_without_a_norm_and_with_a_sweep(tmp_path, images, monkeypatch):
    """The search over weight decays finds the best of all on the held-out images."""
    lines = []
    model = TableModel(tmp_path, 64)
    model.log = lines.append
    monkeypatch.setattr(linear_probe, "ITERATIONS", 25)

    with ranks(monkeypatch, 1, 64) as run:
        (results,) = run(lambda: linear_probe.evaluate(model, images, Options()))

    sweep_lines = [line for line in lines if "held-out" in line]
    percentages = [float(line.split(": ")[1].split("%")[0]) for line in sweep_lines]
    chosen = lines[-1].split(",")[0]
    assert len(sweep_lines) == 15
    assert all("of 32 held-out" in line for line in sweep_lines)
    highest = max(percentages)
    best_lines = [line for line, value in zip(sweep_lines, percentages) if value == highest]
    assert any(line.startswith(chosen + ",") for line in best_lines)
    _model, accuracy = fit_sklearn(images, 1.0, False)
    assert results["top1"] > accuracy - 0.06


def test_an_evaluation_changes_no_draw_of_a_training(tmp_path, images, monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(3)
    model = TableModel(tmp_path, 64)
    options = Options("adamw", epochs=0.1, features="pooled")

    torch.manual_seed(3)
    with ranks(monkeypatch, 1, 64) as run:
        run(lambda: linear_probe.evaluate(model, images, options))

    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("peak", [0, 1, 37, 48, 90, 96])
def test_the_sweep_finds_a_peak(peak):
    steps = []

    def accuracy(weight_decay: float) -> float:
        steps.append(round(8 * (np.log10(weight_decay) + 6)))
        return -abs(steps[-1] - peak)

    best = sweep_weight_decay(accuracy)

    assert best == pytest.approx(10 ** (peak / 8 - 6))
    assert len(steps) == len(set(steps)) <= 15
    assert min(steps) >= 0
    assert max(steps) <= 96


def test_of_equal_weight_decays_the_sweep_takes_the_largest():
    assert sweep_weight_decay(lambda value: 0.5) == pytest.approx(1e6)
    assert sweep_weight_decay(lambda value: float(value < 1)) == pytest.approx(10**-0.125)


def test_lars_by_hand():
    """Two steps of a scaled matrix, a vector without scale and decay, and a matrix of zeros."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=(3, 2)), rng.normal(size=3), np.zeros((2, 2))]
    gradients = [[rng.normal(size=p.shape) for p in start] for _ in range(2)]
    parameters = [nn.Parameter(torch.tensor(p)) for p in start]
    optimizer = LARS(parameters, lr=0.5, weight_decay=0.1, momentum=0.9, trust=0.01)

    def scaled(step: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if not weights.any():
            return step
        return step * 0.01 * np.sqrt((weights**2).sum()) / np.sqrt((step**2).sum())

    W, b, zero = start
    mW, mb, mz = 0, 0, 0
    for gradient in gradients:
        # By hand: momentum accumulates the scaled steps; then comes the learning rate.
        G, g, z = gradient
        mW = 0.9 * mW + scaled(G + 0.1 * W, W)
        mb = 0.9 * mb + g
        mz = 0.9 * mz + scaled(z + 0.1 * zero, zero)
        W = W - 0.5 * mW
        b = b - 0.5 * mb
        zero = zero - 0.5 * mz

        for p, value in zip(parameters, gradient):
            p.grad = torch.tensor(value)
        optimizer.step()

        for p, expected in zip(parameters, (W, b, zero)):
            np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12)


def test_batch_norm_over_ranks_with_unequal_shares(monkeypatch):
    x = torch.randn(11, 4) * 3 + 5
    reference = nn.BatchNorm1d(4, affine=False, eps=1e-6)
    expected = reference(x)
    # torch's running variance divides by N - 1, ours by N.
    expected_var = 0.9 + (reference.running_var - 0.9) * 10 / 11

    def normalize_share() -> tuple[torch.Tensor, torch.Tensor, NonAffineBatchNorm]:
        norm = NonAffineBatchNorm(4)
        share = torch.arange(11)[distributed.rank() :: 3]
        return share, norm(x[share]), norm

    with ranks(monkeypatch, 3, 4) as run:
        results = run(normalize_share)

    for share, output, norm in results:
        torch.testing.assert_close(output, expected[share])
        torch.testing.assert_close(norm.mean, reference.running_mean)
        torch.testing.assert_close(norm.var, expected_var)
        torch.testing.assert_close(norm.eval()(x), (x - norm.mean) / (norm.var + 1e-6).sqrt())


def test_grid_features_are_means_by_place():
    """A grid of 6 x 3 patches in 3 x 3 cells: each cell is the mean of two rows."""
    tokens = torch.randn(2, 1 + 18, 5)
    towers = SimpleNamespace(vision=lambda patches, positions: tokens)
    model = SimpleNamespace(grid=(6, 3), towers=towers)

    cells = Embedder.grid_features(model, None, None).unflatten(1, (5, 3, 3))

    places = tokens[:, 1:].unflatten(1, (6, 3))
    mean = (places[:, 2, 2] + places[:, 3, 2]) / 2
    torch.testing.assert_close(cells[:, :, 1, 2], mean)


def test_pixels_are_the_image_as_the_tower_sees_it():
    patches = torch.randint(0, 256, (2, 4, 12), dtype=torch.uint8)
    model = SimpleNamespace(
        visible_patches=lambda indices, positions: [positions],
        encoders=dict(pixels=Embedder.pixel_features),
    )
    positions = torch.arange(4).expand(2, 4)

    pixels = Embedder.encode_images(model, "pixels", torch.arange(2), patches, positions)

    torch.testing.assert_close(pixels, patches.view(2, 48).float() / 255)


@pytest.mark.parametrize(
    "module, options",
    [(linear_probe, Options(features="grid")), (knn, knn.Options(features="pixels"))],
)
def test_features_by_position_are_refused_for_masked_images(module, options):
    module.check_model(SimpleNamespace(sees_all_patches=True), options)
    with pytest.raises(ValueError, match="--mask, --ensemble: features=.* are of whole images"):
        module.check_model(SimpleNamespace(sees_all_patches=False), options)


@pytest.mark.parametrize("word, value", [("true", True), ("True", True), ("false", False)])
def test_booleans_in_the_spelling_of_python_and_yaml(word, value):
    _kind, options, _label = parse_call(f"linear_probe(standardize={word})", "", {})

    assert options == Options(standardize=value)


@pytest.mark.parametrize(
    "options, message",
    [
        ("optimizer=adam", "did you mean 'adamw'"),
        ("features=tokens", "known: .*pooled"),
        ("lr=0.1", "lbfgs has no such setting"),
        ("optimizer=sgd, lr=[0.1, 0]", "above 0"),
        ("optimizer=sgd, epochs=-1", "above 0"),
        ("weight_decay=-1", "0 or more"),
        ("optimizer=lars, batch=0", "above 0"),
        ("standardize=1", "standardize: 1"),
        ("optimizer=sgd, lr=[]", "above 0"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_evaluations([f"linear_probe({options}):{tmp_path}"])
