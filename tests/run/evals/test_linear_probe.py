"""Linear probes: each optimizer against a known answer and the others, on any number of ranks.

    bash run/test.sh tests/run/evals/test_linear_probe.py

Ranks are threads, and the model a table of vectors (tests/run/evals/test_features.py).
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
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.run.evals.test_features import CLASSES, WIDTH, Model, Table

TRAIN, TEST = 311, 307


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Clusters that overlap, of features on scales from 0.1 to 10 that lie off the origin."""
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, WIDTH, generator=rng)
    scale = torch.logspace(-1, 1, WIDTH)
    shift = torch.linspace(-2, 2, WIDTH)
    numbers = {"train": torch.arange(TRAIN) % CLASSES, "test": torch.arange(TEST) % CLASSES}
    tables = {}
    for split, labels in numbers.items():
        noise = torch.randn(len(labels), WIDTH, generator=rng)
        tables[split] = (centers[labels] + 0.6 * noise) * scale + shift
    return Table(tmp_path_factory.mktemp("probe") / "set", "test", tables, numbers)


def by_sklearn(images: Table, decay: float, standardize: bool) -> tuple[LogisticRegression, float]:
    """Return scikit-learn's regression of the train split, and its accuracy on the test split."""
    train = images.tables["train"].double()
    test = images.tables["test"].double()
    if standardize:
        mean = train.mean(0)
        std = train.std(0, correction=0)
        train = (train - mean) / std
        test = (test - mean) / std
    model = LogisticRegression(C=1 / decay, max_iter=10000, tol=1e-9)
    model.fit(train.numpy(), images.numbers["train"].numpy())
    right = model.predict(test.numpy()) == images.numbers["test"].numpy()
    return model, right.mean()


@pytest.mark.parametrize("world, decay", [(1, 300.0), (3, 1.0)])
def test_lbfgs_finds_what_scikit_learn_finds(images, monkeypatch, world, decay):
    labels = images.numbers["train"]
    x = images.tables["train"].double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    wanted, _accuracy = by_sklearn(images, decay, True)

    def work() -> nn.Linear:
        linear = nn.Linear(WIDTH, CLASSES).double()
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        r = linear_probe.rank()
        fit_regression(linear, x[r::world], labels[r::world], TRAIN, decay)
        return linear

    with ranks(monkeypatch, world, 4) as run:
        first, *others = run(work)

    weight = first.weight.detach().numpy()
    np.testing.assert_allclose(weight, wanted.coef_, rtol=1e-3, atol=1e-3)
    bias = first.bias.detach().numpy()
    bias = bias - bias.mean()
    wanted_bias = wanted.intercept_ - wanted.intercept_.mean()
    np.testing.assert_allclose(bias, wanted_bias, rtol=1e-3, atol=1e-3)
    for other in others:
        assert torch.equal(other.weight, first.weight), "no rank steps aside"


OF_EACH = [
    ("lbfgs", dict(weight_decay=1.0)),
    ("lars", {}),
    ("sgd", dict(lr=(0.01, 1.0), epochs=60)),
    ("adamw", dict(features="pooled", lr=(0.1,), epochs=60)),
]


@pytest.mark.parametrize("optimizer, more", OF_EACH)
def test_the_optimizers_agree_on_any_ranks(tmp_path, images, monkeypatch, optimizer, more):
    """All standardized: near the regression, and on other ranks within an image of the same."""
    _model, wanted = by_sklearn(images, 1.0, True)
    options = Options(optimizer, standardize=True, **more)
    alone = None
    said = []
    for world in (1, 3):
        model = Model(tmp_path, 64)
        model.log = said.append

        with ranks(monkeypatch, world, 64) as run:
            first, *others = run(lambda model=model: linear_probe.evaluate(model, images, options))

        alone = alone or first
        assert all(other == first for other in others)
        assert first["top1"] == pytest.approx(alone["top1"], abs=1.01 / TEST)

    tolerance = 1.01 / TEST if optimizer == "lbfgs" else 0.03
    assert alone["top1"] == pytest.approx(wanted, abs=tolerance)
    assert 0.5 < wanted < 0.99
    assert alone["chance"] == 1 / CLASSES
    assert abs(alone["mean_per_class"] - alone["top1"]) < 0.01
    assert said[-1].endswith("on all images")
    assert ("weight decay 1," if optimizer == "lbfgs" else "lr ") in said[-1]
    assert any("held-out" in line for line in said) == (optimizer == "sgd"), (
        "several rates: one is chosen"
    )


def test_without_a_norm_and_with_a_sweep(tmp_path, images, monkeypatch):
    """The search over weight decays ends near the best of all on the images that it holds out."""
    said = []
    model = Model(tmp_path, 64)
    model.log = said.append
    monkeypatch.setattr(linear_probe, "ITERATIONS", 25)

    with ranks(monkeypatch, 1, 64) as run:
        (results,) = run(lambda: linear_probe.evaluate(model, images, Options()))

    tried = [line for line in said if "held-out" in line]
    shares = [float(line.split(": ")[1].split("%")[0]) for line in tried]
    chosen = said[-1].split(",")[0]
    assert len(tried) == 15
    assert all("of 32 held-out" in line for line in tried)
    best = [line for line, share in zip(tried, shares) if share == max(shares)]
    assert any(line.startswith(chosen + ",") for line in best)
    _model, accuracy = by_sklearn(images, 1.0, False)
    assert results["top1"] > accuracy - 0.06


def test_an_evaluation_changes_no_draw_of_a_training(tmp_path, images, monkeypatch):
    torch.manual_seed(3)
    wanted = torch.rand(3)
    model = Model(tmp_path, 64)
    options = Options("adamw", epochs=0.1, features="pooled")

    torch.manual_seed(3)
    with ranks(monkeypatch, 1, 64) as run:
        run(lambda: linear_probe.evaluate(model, images, options))

    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("peak", [0, 1, 37, 48, 90, 96])
def test_the_sweep_finds_a_peak(peak):
    asked = []

    def tried(value: float) -> float:
        asked.append(round(8 * (np.log10(value) + 6)))
        return -abs(asked[-1] - peak)

    assert sweep_weight_decay(tried) == pytest.approx(10 ** (peak / 8 - 6))
    assert len(asked) == len(set(asked)) <= 15
    assert min(asked) >= 0
    assert max(asked) <= 96


def test_of_equal_weight_decays_the_sweep_takes_the_largest():
    assert sweep_weight_decay(lambda value: 0.5) == pytest.approx(1e6)
    assert sweep_weight_decay(lambda value: float(value < 1)) == pytest.approx(10**-0.125)


def test_lars_by_hand():
    """Two steps: a matrix by trust x |W| / |G|, a vector plain and undecayed, zeros plain."""
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
        # by hand: momentum of the scaled steps, then the learning rate
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

        for p, wanted in zip(parameters, (W, b, zero)):
            np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=1e-12)


def test_batch_norm_over_ranks_with_unequal_shares(monkeypatch):
    x = torch.randn(11, 4) * 3 + 5
    reference = nn.BatchNorm1d(4, affine=False, eps=1e-6)
    wanted = reference(x)
    # torch's running variance divides by N - 1
    wanted_var = 0.9 + (reference.running_var - 0.9) * 10 / 11

    def work() -> tuple[torch.Tensor, torch.Tensor, NonAffineBatchNorm]:
        norm = NonAffineBatchNorm(4)
        share = torch.arange(11)[linear_probe.rank() :: 3]
        return share, norm(x[share]), norm

    with ranks(monkeypatch, 3, 4) as run:
        results = run(work)

    for share, output, norm in results:
        torch.testing.assert_close(output, wanted[share])
        torch.testing.assert_close(norm.mean, reference.running_mean)
        torch.testing.assert_close(norm.var, wanted_var)
        torch.testing.assert_close(norm.eval()(x), (x - norm.mean) / (norm.var + 1e-6).sqrt())


def test_grid_features_are_means_by_place():
    """A 6 x 3 grid of patches in 3 x 3 cells: pairs of rows."""
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
    "kind, options",
    [(linear_probe, Options(features="grid")), (knn, knn.Options(features="pixels"))],
)
def test_what_lies_in_its_place_is_not_asked_of_images_seen_in_part(kind, options):
    kind.check_model(SimpleNamespace(sees_all_patches=True), options)
    with pytest.raises(ValueError, match="--mask, --ensemble: features=.* are of whole images"):
        kind.check_model(SimpleNamespace(sees_all_patches=False), options)


@pytest.mark.parametrize("word, value", [("true", True), ("True", True), ("false", False)])
def test_yes_and_no_as_python_or_yaml_has_them(word, value):
    _kind, options, _label = parse_call(f"linear_probe(standardize={word})", "", {})

    assert options == Options(standardize=value)


@pytest.mark.parametrize(
    "options, words",
    [
        ("optimizer=adam", "did you mean 'adamw'"),
        ("features=tokens", "known: .*pooled"),
        ("lr=0.1", "lbfgs has none"),
        ("optimizer=sgd, lr=[0.1, 0]", "above 0"),
        ("optimizer=sgd, epochs=-1", "above 0"),
        ("weight_decay=-1", "0 or more"),
        ("optimizer=lars, batch=0", "above 0"),
        ("standardize=1", "standardize: 1"),
        ("optimizer=sgd, lr=[]", "above 0"),
    ],
)
def test_bad_options(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        parse_evaluations([f"linear_probe({options}):{tmp_path}"])
