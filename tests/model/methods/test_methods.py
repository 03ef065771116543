"""Methods on nano models in one process: the student sees visible patches alone; losses are the
papers' sums, made again by hand; gradients reach all that is trained and nothing of a teacher;
FLOPs are torch's count. (A-CLIP's choice of patches: tests/model/methods/test_attentive.py.)

Run: pytest tests/model/methods/test_methods.py
The real Reader makes the batches, of B pictures of 64 x 64 pixels, L = 8 x 8 patches. WHOLE: a view
shows the picture as it is.
"""

import dataclasses
import io
from itertools import combinations, permutations

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from glimpse.data.loader import DataConfig, Reader
from glimpse.data.patches import unpatchify
from glimpse.data.shards import Sample
from glimpse.data.tokenizer import train_sentencepiece
from glimpse.data.transforms import View
from glimpse.model import ema
from glimpse.model.losses import dense_contrastive, simclr
from glimpse.model.methods import METHODS
from glimpse.model.methods.attentive import Attentive, scores_at, take
from glimpse.model.methods.base import Method
from glimpse.model.towers import ModelConfig
from glimpse.tests.model.test_towers import CLIP

B, L, GRID, VOCAB, CONTEXT = 6, 64, (8, 8), 320, 24
WHOLE = dict(crop=(1.0, 1.0), ratio=(1.0, 1.0))
VIEWS = {
    "clip": {"image": View(**WHOLE, mask="random(0.5)")},
    "slip": {
        "image": View(**WHOLE, mask="gaussian(0.5)"),
        "augmented": View(**WHOLE, mask="random(0.75)", count=2),
    },
    **{name: {"image": View(**WHOLE, mask="random(0.75)")} for name in ("mae", "maskclip")},
    "aclip": {"view": View(**WHOLE, count=2), "teacher": View(encloses=("view",))},
}
HEADS, AUXILIARY = dict(hidden=64, out=32), dict(simclr=1.0, simsiam=0.5, byol=2.0)
OPTIONS = {
    "clip": {},
    "slip": HEADS,
    "mae": dict(width=64, depth=1, heads=2),
    "maskclip": {},
    "aclip": dict(block=16, **HEADS),
}
VARIANTS = [
    ("clip", {}),
    ("slip", {}),
    ("mae", {}),
    ("mae", dict(contrast="visible")),
    ("maskclip", {}),
    ("maskclip", dict(teacher="student")),
    ("maskclip", dict(teacher="runs/x", contrast=False)),
    ("aclip", AUXILIARY),
    ("aclip", dict(average_text=True, byol=1.0)),
]


def build(name: str, views: int = 2, **options) -> Method:
    """A teacher is drawn apart from the student, so that the two cannot be confused.

    views: how many A-CLIP is given.
    """
    torch.manual_seed(0)
    cfg = {"clip": ModelConfig(), "mae": ModelConfig()}.get(name, CLIP)  # FLIP's flavour, or CLIP's
    changes = {"maskclip": dict(pool="mean"), "aclip": dict(freeze_patch=True)}.get(name, {})
    cfg = dataclasses.replace(
        cfg, size="nano/8", image_size=64, vision=dataclasses.replace(cfg.vision, **changes)
    )
    options = METHODS[name].Options(**{**OPTIONS[name], **options})
    METHODS[name].check(options, cfg, {"view": views})
    return METHODS[name](cfg, VOCAB, CONTEXT, options)


def pictures() -> torch.Tensor:
    """All their patches (B, L, 3 * 8 * 8), uint8."""
    return torch.randint(
        0, 256, (B, L, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def sample(number: int, patches: torch.Tensor) -> Sample:
    out = io.BytesIO()
    Image.fromarray(unpatchify(patches[None], 8, GRID)[0].permute(1, 2, 0).numpy()).save(out, "PNG")
    return Sample("", "", {"png": out.getvalue(), "txt": b"red circle " * (1 + number)})


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """part(method's name, patches, other views, if so) -> what the Reader makes of pictures."""
    path = tmp_path_factory.mktemp("methods") / "tokenizer.model"
    train_sentencepiece(
        [f"a {colour} {shape}" for colour in ("red", "green") for shape in ("circle", "square")],
        path,
        VOCAB,
    )
    data = DataConfig(train=("none",), tokenizer=f"sentencepiece({path})", context=CONTEXT)

    def made(name, patches=None, **views):
        extra = dict(hidden=METHODS[name].hidden, noise=METHODS[name].noise)
        reader = Reader(data, {**VIEWS[name], **views}, image_size=64, patch=8, seed=0, **extra)
        return reader.part(
            [
                reader.row(sample(i, x), 0, i)
                for i, x in enumerate(pictures() if patches is None else patches)
            ],
            [],
        )

    return made


def hooked(module: torch.nn.Module, work) -> tuple:
    """(what work() returns, [(arguments, output) of each call of the module])."""
    calls = []
    with module.register_forward_hook(lambda _, args, out: calls.append((args, out))):
        return work(), calls


def dense(features: dict, image: str = "image") -> torch.Tensor:
    return dense_contrastive(features[image], features["text"], features["scale"])


# ---- what is seen and what is learned


def masked(method: Method, part: dict) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a student makes of visible patches alone, and which patches each of its masked views
    shows, (B, L).
    """
    decoder = getattr(method, "decoder", torch.nn.Identity())
    (features, decoded), calls = hooked(
        method.towers.vision, lambda: hooked(decoder, lambda: method(part))
    )
    shown = [
        torch.zeros(B, L, dtype=torch.bool).scatter_(1, own.long(), True)
        for (_, at), _ in calls
        for own in at.split(B)
    ]
    few, made = [x for x in shown if not x.all()], [out for _, out in decoded]
    # no pass over whole pictures: no feature of them may know what is hidden
    if len(few) == len(shown):
        made += [
            x
            for key, x in features.items()
            if key not in ("text", "scale", "reconstruction", "distillation")
        ]
    return made, few


@pytest.mark.parametrize("name, options", [*VARIANTS, ("aclip", dict(strategy="mixed"))])
def test_the_student_never_sees_a_hidden_patch(part, monkeypatch, name, options):
    """The pictures themselves are changed, wherever no masked view shows them, and then in one
    patch that the first view shows.
    """
    method, patches, fixed = (
        build(name, **options),
        pictures(),
        (torch.rand(B, L), torch.randn(B, 128)),
    )
    # A-CLIP's teacher sees everything
    monkeypatch.setattr(method, "look", lambda seen: fixed, raising=False)
    made, few = masked(method, part(name))
    seen, one = torch.stack(few).any(0), F.one_hot(few[0].int().argmax(1), L).bool()
    unseen, other = (
        masked(method, part(name, torch.where(x[:, :, None], 255 - patches, patches)))[0]
        for x in (~seen, one)
    )
    assert not seen.all(1).any() and all(map(torch.equal, made, unseen))
    assert (made[0] != other[0]).flatten(1).any(1).all()


def leaves(loss: torch.Tensor) -> set[int]:
    """The ids of the tensors that a backward pass would reach."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions if before is not None]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


@pytest.mark.parametrize("name, options", VARIANTS)
def test_gradients_reach_what_is_trained_and_no_teacher(part, name, options):
    method = build(name, **options)
    loss, _ = method.loss(method(part(name)))
    frozen = ("teacher.", "byol_teacher.") + ("towers.vision.patch.",) * (name == "aclip")
    frozen += ("towers.text", "towers.image_projection.", "towers.temperature.") * (
        options.get("contrast") is False
    )
    trained = {key: p for key, p in method.named_parameters() if not key.startswith(frozen)}
    assert leaves(loss) == {id(p) for p in trained.values()}
    loss.backward()
    for key, p in method.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (key in trained), key
        assert key not in trained or p.grad.isfinite().all() and p.grad.any(), key


@pytest.mark.parametrize("name, options", [("maskclip", {}), ("aclip", {}), *VARIANTS[-2:]])
def test_every_weight_of_a_teacher_follows_its_own(name, options):
    method = build(name, **options)
    names = {id(p): key for key, p in method.named_parameters()}
    pairs = {
        names[id(mine)]: names[id(theirs)]
        for mine, theirs in ema.parameters(method.averaged()).values()
    }
    assert pairs.keys() == {
        key for key in names.values() if key.startswith(("teacher.", "byol_teacher."))
    }
    assert all(
        theirs == mine.replace("byol_teacher.", "byol_projector.").replace("teacher.", "towers.")
        for mine, theirs in pairs.items()
    )
    assert any(".text" in key for key in pairs) == ("average_text" in options)


@pytest.mark.parametrize(
    "name, expected",
    [("maskclip", (0.999, 0.999225, 0.9999)), ("aclip", (0.996, 0.998 - 0.002 * 0.5**0.5, 1.0))],
)
def test_momentum(name, expected):
    assert [build(name).momentum(t) for t in (0, 0.25, 1)] == pytest.approx(expected, abs=1e-9)


# ---- losses by hand


def test_clip(part):
    method, batch = build("clip"), part("clip")
    features, view = method(batch), batch["views"]["image"]
    assert torch.equal(view["patches"], take(pictures(), view["positions"].long())), (
        "WHOLE shows the picture's own pixels"
    )
    torch.testing.assert_close(
        features["image"], method.towers.encode_image(view["patches"], view["positions"])
    )
    torch.testing.assert_close(method.loss(features)[0], dense(features))


@pytest.mark.parametrize("as_released, mask", [(False, "none"), (True, "random(0.75)")])
def test_slip(part, as_released, mask):
    """Each view has its own batch statistics.

    as_released: what a row is compared with carries no gradient.
    """
    method = build("slip", weight=0.7, temperature=0.2, as_released=as_released)
    batch = part("slip", image=View(mask=mask), augmented=View(count=2))
    made, views = (
        method(batch),
        (batch["views"][view] for view in ("image", "augmented1", "augmented2")),
    )
    image, one, two = (
        method.towers.image_features(view["patches"], view["positions"]) for view in views
    )
    for key, expected in dict(
        image=method.towers.embed_image(image), one=method.head(one), two=method.head(two)
    ).items():
        torch.testing.assert_close(made[key], expected)
    ours, theirs = ({key: x.detach().requires_grad_() for key, x in made.items()} for _ in range(2))
    others = [theirs[key].detach() if as_released else theirs[key] for key in ("text", "image")]
    logits = [
        theirs["scale"] * theirs[key] @ other.T for key, other in zip(("image", "text"), others)
    ]
    expected = (
        sum(F.cross_entropy(x, torch.arange(B)) for x in logits) / 2
        + 0.7 * simclr(theirs["one"], theirs["two"], 0.2)[0]
    )
    loss, _ = method.loss(ours)
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    for key in ours:
        torch.testing.assert_close(
            ours[key].grad, theirs[key].grad, msg=lambda text, key=key: f"{key}: {text}"
        )


def hidden(batch: dict) -> torch.Tensor:
    """The positions (B, L - K) that a batch's masked views do not show."""
    return torch.tensor(
        [sorted({*range(L)} - {*row}) for row in batch["views"]["image"]["positions"].tolist()]
    )


@pytest.mark.parametrize("contrast", ["image", "visible"])
@pytest.mark.parametrize("normalise", [True, False])
def test_mae(part, contrast, normalise):
    method, batch = build("mae", contrast=contrast, normalise=normalise, weight=0.3), part("mae")
    features, ((_, made),) = hooked(method.decoder, lambda: method(batch))
    mean, std = (
        torch.tensor(x).repeat_interleave(64)
        for x in (method.cfg.vision.mean, method.cfg.vision.std)
    )
    target = take((pictures() / 255 - mean) / std, hidden(batch))
    if normalise:
        target = (target - target.mean(2, keepdim=True)) / target.std(2, keepdim=True)
    torch.testing.assert_close(
        features["reconstruction"], ((made - target) ** 2).mean((1, 2)), rtol=1e-4, atol=1e-5
    )
    view = batch["views"]["image"]
    shown = (
        (pictures(), torch.arange(L).expand(B, -1))
        if contrast == "image"
        else (view["patches"], view["positions"])
    )
    torch.testing.assert_close(features["image"], method.towers.encode_image(*shown))
    torch.testing.assert_close(
        method.loss(features)[0], dense(features) + 0.3 * features["reconstruction"].mean()
    )


@pytest.mark.parametrize("teacher", ["average", "student", "runs/x"])
@pytest.mark.parametrize("convention, beta, normalise", [("sum", 2.0, False), ("half", 0.5, True)])
def test_maskclip(part, teacher, convention, beta, normalise):
    """The target is what the teacher makes of the whole picture, at the hidden patches.

    Another run's goes without a contrast, too.
    """
    both = teacher != "runs/x"
    method = build(
        "maskclip",
        teacher=teacher,
        convention=convention,
        beta=beta,
        normalise=normalise,
        weight=0.3,
        contrast=both,
    )
    assert method.borrowed() == ({} if both else {"teacher.": "runs/x"}) and len(
        method.averaged()
    ) == (teacher == "average")
    batch, everything = part("maskclip"), (pictures(), torch.arange(L).expand(B, -1))
    vision = (method.towers if teacher == "student" else method.teacher).vision
    vision.norm.weight.data.uniform_(0.5, 2)  # or its outputs are layer-normalised already
    features, ((_, made),) = hooked(method.decoder, lambda: method(batch))
    target = take(vision(*everything)[:, 1:], hidden(batch))
    far = (made - (F.layer_norm(target, (128,)) if normalise else target)).abs()
    expected = torch.where(far < beta, far**2 / (2 * beta), far - beta / 2).mean((1, 2))
    torch.testing.assert_close(features["distillation"], expected)
    total = 0.3 * expected.mean()
    if both:
        torch.testing.assert_close(features["image"], method.towers.encode_image(*everything))
        total += {"sum": 2, "half": 1}[convention] * dense(features)
    torch.testing.assert_close(method.loss(features)[0], total)
    order, view = torch.randperm(L - L // 4), batch["views"]["image"]
    view |= {key: view[key][:, order] for key in ("hidden", "hidden_positions")}
    torch.testing.assert_close(
        method(batch)["distillation"],
        expected,
        msg="the order of the hidden patches does not matter",
    )


@pytest.mark.parametrize(
    "count, size, kept, options",
    [
        (1, 0, 32, dict(keep=0.5, byol=2.0)),
        (2, 0, 32, {}),
        # size: half the resolution for the teacher
        (2, 32, 32, dict(simclr=1.0, byol=2.0, layers="last", strategy="high")),
        (
            2,
            0,
            16,
            dict(keep=0.25, simclr=0.5, as_released=True, temperature=0.3, average_text=True),
        ),
        (3, 0, 20, dict(simsiam=0.7, byol=2.0, strategy="mixed")),  # a third of 16 blocks: 5
        (4, 32, 16, dict(simclr=1.0, simsiam=0.5, byol=0.5, strategy="random")),
    ],
)
def test_aclip(part, count, size, kept, options):
    """Views choose by scores read off at their own boxes; each meets the text; auxiliary losses are
    means over views, or pairs of them.
    """
    method, batch = (
        build("aclip", count, **options),
        part("aclip", view=View(count=count), teacher=View(encloses=("view",), size=size)),
    )
    features, seen = method(batch), batch["views"]["teacher"]
    (scores, whole), teacher_grid = method.look(seen), (4, 4) if size else GRID
    choice, share, pooled = (
        Attentive(method.options.strategy, 16, 8, GRID),
        options.get("keep", 1 / count),
        [],
    )
    for i in range(count):
        view = batch["views"][f"view{i + 1}" if count > 1 else "view"]
        keep = choice.choose(
            scores_at(scores, teacher_grid, seen["box"], view["box"], GRID), share, view["noise"]
        )
        assert keep.shape == (B, kept)
        pooled.append(method.towers.image_features(take(view["patches"], keep), keep))
        torch.testing.assert_close(features[f"image{i}"], method.towers.embed_image(pooled[i]))
    expected, both = (
        torch.stack([dense(features, f"image{i}") for i in range(count)]).mean(),
        torch.cat(pooled),
    )
    if weight := options.get("simclr"):
        z, t = method.simclr_head(both).chunk(count), method.options.temperature
        pairs = [(0, 0)] if "as_released" in options else combinations(range(count), 2)
        expected = (
            expected + weight * torch.stack([simclr(z[i], z[j], t)[0] for i, j in pairs]).mean()
        )
    if weight := options.get("simsiam"):
        z = method.simsiam_projector(both)
        p, z = method.simsiam_predictor(z).chunk(count), z.chunk(count)
        expected = (
            expected
            - weight
            * torch.stack(
                [F.cosine_similarity(p[i], z[j]) for i, j in permutations(range(count), 2)]
            ).mean()
        )
    if weight := options.get("byol"):
        p = method.byol_predictor(method.byol_projector(both)).chunk(count)
        expected = (
            expected
            + weight
            * torch.stack(
                [2 - 2 * F.cosine_similarity(x, method.byol_teacher(whole)) for x in p]
            ).mean()
        )
    loss, metrics = method.loss(features)
    torch.testing.assert_close(loss, expected)
    assert metrics.keys() == {
        "accuracy",
        "contrastive",
        "temperature",
        *(options.keys() & AUXILIARY.keys()),
    }


# ---- cost and refusals


@pytest.mark.parametrize(
    "work, message",
    [
        (
            lambda: build("mae", contrast="text"),
            "options.contrast 'text': unknown; known: image, visible",
        ),
        (
            lambda: build("mae", width=62),
            "options.width 62: a decoder of 2 heads needs a multiple of 4",
        ),
        (
            lambda: build("maskclip", convention="mean"),
            "options.convention 'mean': unknown; known: half, sum",
        ),
        (
            lambda: build("maskclip", contrast=False),
            "options.contrast: false with teacher 'average': nothing would be learned",
        ),
        (
            lambda: build("maskclip", momentum=(0.9, 1.1)),
            "options.momentum .* two numbers from 0 to 1, first <= last",
        ),
        (
            lambda: build("aclip", momentum=(1.0, 0.9)),
            "options.momentum .* two numbers from 0 to 1, first <= last",
        ),
        (
            lambda: build("aclip", layers="first"),
            "options.layers 'first': unknown; known: all, last",
        ),
        (lambda: build("aclip", keep=1.5), "options.keep 1.5: the share of patches"),
        (lambda: build("aclip", keep=0.01), "options.keep 0.01: keeps 0 of 16 blocks"),
        (
            lambda: build("aclip", views=1, simsiam=1.0),
            "they compare views, and views.view.count is 1",
        ),
    ],
)
def test_refuses(work, message):
    with pytest.raises(ValueError, match=message):
        work()
