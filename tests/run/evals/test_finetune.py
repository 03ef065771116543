"""Fine-tuning: learning rates by layer, the papers' recipes, and any number of ranks.

bash run/test.sh tests/run/evals/test_finetune.py
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from glimpse.data.shards import write_shard
from glimpse.model.towers import ModelConfig, build_vision_tower
from glimpse.model.vision import VisionConfig, VisionTower
from glimpse.run.evals import parse_evaluations
from glimpse.run.evals.finetune import (
    Classifier,
    Options,
    format_rates,
    parameter_groups,
    rank_batches,
)
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import NAMES, launch, picture, tiny_run_arguments, write_dataset


def nano_tower(**vision) -> VisionTower:
    torch.manual_seed(0)
    return build_vision_tower(
        ModelConfig(size="nano/8", image_size=32, vision=VisionConfig(**vision))
    )


def test_scales_by_hand():
    """Parameter groups of a tower with four blocks, with a factor of 0.65 per layer.

    Norms, biases, positions and class token have no weight decay.
    """
    expected_scales = {
        "vision.patch.weight": 0.1160290625,
        "vision.patch.bias": 0.1160290625,
        "vision.cls": 0.1160290625,
        "vision.positions": 0.1160290625,
        "vision.pre_norm.weight": 0.1160290625,
        "vision.blocks.0.attn.qkv.weight": 0.17850625,
        "vision.blocks.1.norm1.bias": 0.274625,
        "vision.blocks.2.mlp.up.weight": 0.4225,
        "vision.blocks.3.mlp.down.bias": 0.65,
        "vision.norm.weight": 1.0,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }
    model = Classifier(nano_tower(positions="learned", pool="cls", pre_norm=True), 128, 10)

    groups = parameter_groups(model, Options().resolve(4))

    group_of_parameter = {id(p): group for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    group_sizes = [len(group["params"]) for group in groups]
    assert len(group_of_parameter) == sum(group_sizes) == len(parameters)
    for name, scale in expected_scales.items():
        group = group_of_parameter[id(parameters[name])]
        assert group["scale"] == pytest.approx(scale, rel=1e-12), name
        decays = name.endswith("weight") and "norm" not in name
        assert group["weight_decay"] == (0.05 if decays else 0.0), name

    table = format_rates(4, Options(batch=256).resolve(4)).splitlines()

    assert len(table) == 6
    assert table[0].split() == ["embedding", "x", "0.1160", "peak", "lr", "1.160e-04"]
    assert table[1].split()[:4] == ["block", "1", "x", "0.1785"]
    assert table[5].split()[-1] == "1.000e-03"


@pytest.mark.parametrize(
    "recipe, depth, peak, decay, drop_path, epochs, warmup",
    [
        ("beit", 12, 4e-3, 0.65, 0.1, 100, 20),
        ("beit", 24, 1e-3, 0.75, 0.2, 50, 5),
        ("mae", 12, 2e-3, 0.65, 0.1, 100, 5),
        ("mae", 24, 4e-3, 0.75, 0.2, 50, 5),
        ("mae", 32, 4e-3, 0.75, 0.3, 50, 5),
        ("maskclip", 12, 6e-4, 0.7, 0.1, 100, 20),
    ],
)
def test_recipes_are_the_papers(recipe, depth, peak, decay, drop_path, epochs, warmup):
    resolved = Options(recipe).resolve(depth)

    assert resolved.lr * resolved.batch / 256 == pytest.approx(peak)
    assert resolved.batch == 1024
    assert resolved.decay == decay
    assert resolved.drop_path == drop_path
    assert resolved.epochs == epochs
    assert resolved.warmup * epochs == pytest.approx(warmup)


@pytest.mark.parametrize("pool", ["cls", "mean", "mean_with_cls", "mean_then_norm"])
def test_the_classifier_is_a_copy(pool):
    """The tower itself does not change.

    The class token is read after the tower's norm. A mean is taken before that norm and gets a new
    one, unless the tower already normalizes the mean.
    """
    tower = nano_tower(pool=pool).requires_grad_(False)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    model = Classifier(tower, 128, 10)
    patches = torch.rand(2, 16, 192)
    positions = torch.arange(16).expand(2, -1)

    tokens = tower(patches, positions)
    if pool in ("cls", "mean_then_norm"):
        assert model.vision.norm.weight.shape == (128,)
        pooled = tokens[:, 0]
    else:
        tower.norm = torch.nn.Identity()
        mean = tower(patches, positions)[:, pool == "mean" :].mean(1)
        pooled = torch.nn.functional.layer_norm(mean, (128,), eps=1e-6)
        tower.norm = torch.nn.LayerNorm(128)
    torch.testing.assert_close(model(patches, positions), model.head(pooled))

    model(patches, positions, torch.rand(4, 2, 2)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters()), (
        "ZeRO-3 would apply an earlier gradient again"
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    for name, value in before.items():
        assert torch.equal(value, tower.state_dict()[name]), name


def test_backward_passes_and_epochs(monkeypatch):
    """Ten images in batches of 8, with two passes each: each epoch has every image once."""
    options = Options(batch=8, epochs=2.4, accumulate=2, crop=0.5)
    images = torch.arange(10) + 100

    passes = {}  # {world size: samples of each backward pass}
    for world in (1, 2):
        with ranks(monkeypatch, world, 4) as run:
            shares = run(lambda: list(rank_batches(images, options.resolve(4), options)))
        passes[world] = [sorted(sum(rows, [])) for rows in zip(*shares, strict=True)]

    assert passes[1] == passes[2]
    assert [len(rows) for rows in passes[1]] == [4] * 6
    rows = sum(passes[1], [])
    two_epochs = [(epoch, 100 + i) for epoch in (0, 1) for i in range(10)]
    assert sorted(rows)[:20] == two_epochs
    assert len(set(rows)) == 24


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(recipe="biet"), "did you mean 'beit'"),
        (dict(decay=0.0), "decay=0.0.: it must be above 0"),
        (dict(erase=1.5), "from 0 to 1"),
        (dict(drop_path=1.0), "from 0 to 0.99"),
        (dict(batch=6, accumulate=2), "a multiple of 2 x accumulate"),
        (dict(mixup=-1.0), "0 or more"),
        (dict(save="a/b"), "use a name, not a path"),
        (dict(epochs=0.0), "above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write pairs to pretrain on, and a set of 24 classes with train/."""
    folder = write_dataset(tmp_path_factory.mktemp("finetune"))
    rng = np.random.default_rng(3)
    samples = []
    for i in range(60):
        number = i % 24
        files = {"png": picture(NAMES[number], rng), "cls": b"%d" % number}
        samples.append((f"{i:04d}", files))
    train = folder / "eval" / "shapes" / "train"
    train.mkdir()
    write_shard(train / "0.tar", samples)
    return folder


def test_what_a_set_lacks_is_reported_at_the_start(data):
    spec = f"finetune:{data}/eval/shapes"

    assert parse_evaluations([spec])[0].options == replace(Options())
    for specs, message in (
        ([f"finetune:{data}/eval/retrieval"], "train/"),
        ([f"finetune(samples=61):{data}/eval/shapes"], "has 60 images"),
        ([f"finetune(augment=strong):{data}/eval/shapes"], "not in timm's notation"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_evaluations(specs)
    with pytest.raises(ValueError, match="trains the tower"):
        parse_evaluations([spec], training=True)


@pytest.mark.slow
def test_one_training_on_any_ranks_that_leaves_the_run_as_it_was(data, tmp_path):
    """Losses, weights and results are the same under ZeRO-3 on 1 and 2 ranks.

    They do not depend on the number of passes of a step, nor on the order of the evaluations.
    """
    run = tmp_path / "run"
    shapes = f"{data}/eval/shapes"
    result = launch(
        1, "run/pretrain.py", *tiny_run_arguments(data, run, "samples=160", "optim.lr=1e-3")
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    mixed = f"finetune(recipe=mae, batch=12, epochs=3, lr=0.02, save=first):{shapes}"
    plain = (
        "finetune(recipe=beit, batch=20, epochs=1, lr=0.05, mixup=0, cutmix=0, accumulate=%d)"
        f":{shapes}"
    )

    def run_evaluations(world, *evals):
        result = launch(world, "run/evaluate.py", "--run", str(run), "--evals", *evals)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        row = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
        scores = {}
        for key, value in row.items():
            if key.endswith("top1"):
                scores[re.sub(r", accumulate=\d", "", key)] = value
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
        return scores, losses

    # 1. On one rank.
    scores, losses = run_evaluations(1, f"zero_shot:{shapes}", mixed, plain % 1)

    saved = next((run / "finetuned").glob("*/first"))
    weights = torch.load(saved / "classifier.pt")
    assert weights["head.weight"].shape == (24, 128)
    assert json.loads((saved / "finetuned.json").read_text())["recipe"] == "mae"
    assert len(losses) == 15 + 3
    assert losses[14] < losses[0] - 0.02, "it learns"

    # 2. A name that exists is refused.
    refused = launch(1, "run/evaluate.py", "--run", str(run), "--evals", mixed)

    assert refused.returncode
    assert "first exists; give another name" in refused.stderr

    # 3. On two ranks, in another order, with two passes per step.
    saved.rename(tmp_path / "moved")
    scores_of_2, losses_of_2 = run_evaluations(2, plain % 2, mixed, f"zero_shot:{shapes}")

    assert losses_of_2[6:] == pytest.approx(losses[:15], abs=1e-4)
    first_passes = losses_of_2[:6:2]
    second_passes = losses_of_2[1:6:2]
    step_losses = [(a + b) / 2 for a, b in zip(first_passes, second_passes)]
    assert step_losses == pytest.approx(losses[15:], abs=1e-4), "a step in two passes"
    assert len(scores) == 3
    assert scores == pytest.approx(scores_of_2, abs=0.021), "at most one of 49 images differs"
    assert scores["zero_shot/shapes/top1"] == scores_of_2["zero_shot/shapes/top1"]
    weights_of_2 = torch.load(saved / "classifier.pt")
    for name, value in weights.items():
        assert float((weights_of_2[name] - value).abs().max()) < 1e-3, name
