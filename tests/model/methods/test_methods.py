"""Methods on nano models in one process: the student sees visible patches alone; losses are the
sums of the papers, computed by hand; gradients reach every trained parameter and no teacher.
(A-CLIP's choice of patches: tests/model/methods/test_attentive.py.)

Run: pytest tests/model/methods/test_methods.py
The real Reader builds the batches, of B pictures of 64 x 64 pixels, L = 8 x 8 patches. WHOLE: a
view shows the picture without a change.
"""

import dataclasses
import io
from itertools import combinations, permutations

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from glimpse.data.loader import DataConfig, SampleReader
from glimpse.data.patches import unpatchify
from glimpse.data.shards import Sample
from glimpse.data.tokenizer import train_sentencepiece
from glimpse.data.transforms import View
from glimpse.model import ema
from glimpse.model.losses import dense_contrastive, simclr
from glimpse.model.methods import METHODS
from glimpse.model.methods.attentive import PatchSelector, gather_patches, scores_in_view
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
    "mae": {"image": View(**WHOLE, mask="random(0.75)")},
    "maskclip": {"image": View(**WHOLE, mask="random(0.75)")},
    "aclip": {"view": View(**WHOLE, count=2), "teacher": View(encloses=("view",))},
}
HEADS = dict(hidden=64, out=32)
AUXILIARY = dict(simclr=1.0, simsiam=0.5, byol=2.0)
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
    """Build a method, whose teacher has other weights than the student.

    views: the number of A-CLIP's views.
    """
    torch.manual_seed(0)
    cfg = ModelConfig() if name in ("clip", "mae") else CLIP  # FLIP's flavor, or CLIP's
    vision = cfg.vision
    if name == "maskclip":
        vision = dataclasses.replace(vision, pool="mean")
    elif name == "aclip":
        vision = dataclasses.replace(vision, freeze_patch=True)
    cfg = dataclasses.replace(cfg, size="nano/8", image_size=64, vision=vision)
    method_options = METHODS[name].Options(**{**OPTIONS[name], **options})
    METHODS[name].check_options(method_options, cfg, {"view": views})
    return METHODS[name](cfg, VOCAB, CONTEXT, method_options)


def pictures() -> torch.Tensor:
    """Draw all patches (B, L, 3 * 8 * 8) of the pictures, uint8."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (B, L, 192), dtype=torch.uint8, generator=rng)


def sample(number: int, patches: torch.Tensor) -> Sample:
    pixels = unpatchify(patches[None], 8, GRID)[0].permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return Sample("", "", {"png": out.getvalue(), "txt": b"red circle " * (1 + number)})


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """Return part(method name, patches, views to replace) -> the Reader's batch of the pictures."""
    path = tmp_path_factory.mktemp("methods") / "tokenizer.model"
    texts = ["a red circle", "a red square", "a green circle", "a green square"]
    train_sentencepiece(texts, path, VOCAB)
    data = DataConfig(train=("none",), tokenizer=f"sentencepiece({path})", context=CONTEXT)

    def batch(name, patches=None, **views):
        extra = dict(hidden=METHODS[name].hidden_patch_views, noise=METHODS[name].noise_views)
        reader = SampleReader(
            data, {**VIEWS[name], **views}, image_size=64, patch=8, seed=0, **extra
        )
        if patches is None:
            patches = pictures()
        rows = [reader.prepare(sample(i, x), 0, i) for i, x in enumerate(patches)]
        return reader.collate(rows, [])

    return batch


def hooked(module: torch.nn.Module, work) -> tuple:
    """Return (the result of work(), [(arguments, output) of each call of the module])."""
    calls = []

    def record(_, args, output):
        calls.append((args, output))

    with module.register_forward_hook(record):
        return work(), calls


def dense(features: dict, image: str = "image") -> torch.Tensor:
    return dense_contrastive(features[image], features["text"], features["scale"])


# ---- what is seen and what is learned


def masked(method: Method, part: dict) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the outputs that depend on visible patches alone, and the patches (B, L) that each
    masked view shows.
    """
    decoder = getattr(method, "decoder", torch.nn.Identity())
    vision = method.towers.vision
    (features, decoded), calls = hooked(vision, lambda: hooked(decoder, lambda: method(part)))

    # The patches of each view; views of equal length share a call.
    shown = []
    for (_, positions), _ in calls:
        for keep in positions.split(B):
            mask = torch.zeros(B, L, dtype=torch.bool)
            shown.append(mask.scatter_(1, keep.long(), True))
    partial = [x for x in shown if not x.all()]

    outputs = [output for _, output in decoded]
    # Without a pass over all patches, no image feature may depend on the hidden ones.
    if len(partial) == len(shown):
        others = ("text", "scale", "reconstruction", "distillation")
        outputs += [x for key, x in features.items() if key not in others]
    return outputs, partial


@pytest.mark.parametrize("name, options", [*VARIANTS, ("aclip", dict(strategy="mixed"))])
def test_the_student_never_sees_a_hidden_patch(part, monkeypatch, name, options):
    """The pictures are changed wherever no masked view shows them, and then in a patch that the
    first view shows.
    """
    method = build(name, **options)
    patches = pictures()
    # A-CLIP's teacher sees everything.
    scores_and_tokens = (torch.rand(B, L), torch.randn(B, 128))
    monkeypatch.setattr(method, "run_teacher", lambda seen: scores_and_tokens, raising=False)

    def outputs_with_changes(changed):
        changed_patches = torch.where(changed[:, :, None], 255 - patches, patches)
        return masked(method, part(name, changed_patches))[0]

    outputs, shown = masked(method, part(name))
    seen = torch.stack(shown).any(0)
    first_shown = F.one_hot(shown[0].int().argmax(1), L).bool()
    without_hidden = outputs_with_changes(~seen)
    with_visible = outputs_with_changes(first_shown)

    assert not seen.all(1).any()
    assert all(map(torch.equal, outputs, without_hidden))
    assert (outputs[0] != with_visible[0]).flatten(1).any(1).all()


def leaves(loss: torch.Tensor) -> set[int]:
    """Return the ids of the tensors that a backward pass would reach."""
    seen = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions if before is not None]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


@pytest.mark.parametrize("name, options", VARIANTS)
def test_gradients_reach_what_is_trained_and_no_teacher(part, name, options):
    method = build(name, **options)
    frozen = ["teacher.", "byol_teacher."]
    if name == "aclip":
        frozen += ["towers.vision.patch."]
    if options.get("contrast") is False:
        frozen += ["towers.text", "towers.image_projection.", "towers.temperature."]
    trained = {}
    for key, p in method.named_parameters():
        if not key.startswith(tuple(frozen)):
            trained[key] = p

    loss, _ = method.loss(method(part(name)))
    reached = leaves(loss)
    loss.backward()

    assert reached == {id(p) for p in trained.values()}
    for key, p in method.named_parameters():
        assert p.requires_grad == (key in trained), key
        assert (p.grad is not None) == (key in trained), key
    for key, p in trained.items():
        assert p.grad.isfinite().all(), key
        assert p.grad.any(), key


@pytest.mark.parametrize("name, options", [("maskclip", {}), ("aclip", {}), *VARIANTS[-2:]])
def test_every_weight_of_a_teacher_follows_its_own(name, options):
    method = build(name, **options)
    names = {id(p): key for key, p in method.named_parameters()}
    teacher_names = {key for key in names.values() if key.startswith(("teacher.", "byol_teacher."))}

    pairs = {}
    for teacher, student in ema.pair_parameters(method.ema_pairs()).values():
        pairs[names[id(teacher)]] = names[id(student)]

    assert pairs.keys() == teacher_names
    for teacher, student in pairs.items():
        expected = teacher.replace("byol_teacher.", "byol_projector.")
        assert student == expected.replace("teacher.", "towers.")
    assert any(".text" in key for key in pairs) == ("average_text" in options)


@pytest.mark.parametrize(
    "name, expected",
    [("maskclip", (0.999, 0.999225, 0.9999)), ("aclip", (0.996, 0.998 - 0.002 * 0.5**0.5, 1.0))],
)
def test_momentum(name, expected):
    method = build(name)

    momenta = [method.momentum(t) for t in (0, 0.25, 1)]

    assert momenta == pytest.approx(expected, abs=1e-9)


# ---- losses by hand


def test_clip(part):
    method = build("clip")
    batch = part("clip")
    view = batch["views"]["image"]

    features = method(batch)

    patches = gather_patches(pictures(), view["positions"].long())
    assert torch.equal(view["patches"], patches), "WHOLE shows the picture's own pixels"
    embedding = method.towers.encode_image(view["patches"], view["positions"])
    torch.testing.assert_close(features["image"], embedding)
    torch.testing.assert_close(method.loss(features)[0], dense(features))


@pytest.mark.parametrize("as_released, mask", [(False, "none"), (True, "random(0.75)")])
def test_slip(part, as_released, mask):
    """Each view has its own batch statistics.

    as_released: the columns that a row is compared with carry no gradient.
    """
    method = build("slip", weight=0.7, temperature=0.2, as_released=as_released)
    batch = part("slip", image=View(mask=mask), augmented=View(count=2))

    # The features of each view.
    def image_features(name):
        view = batch["views"][name]
        return method.towers.image_features(view["patches"], view["positions"])

    features = method(batch)
    image = method.towers.embed_image(image_features("image"))
    torch.testing.assert_close(features["image"], image)
    torch.testing.assert_close(features["augmented1"], method.head(image_features("augmented1")))
    torch.testing.assert_close(features["augmented2"], method.head(image_features("augmented2")))

    # The loss, and its gradients with respect to the features.
    actual = {key: x.detach().requires_grad_() for key, x in features.items()}
    reference = {key: x.detach().requires_grad_() for key, x in features.items()}
    image, text, scale = (reference[key] for key in ("image", "text", "scale"))
    images, texts = (image.detach(), text.detach()) if as_released else (image, text)
    image_loss = F.cross_entropy(scale * image @ texts.T, torch.arange(B))
    text_loss = F.cross_entropy(scale * text @ images.T, torch.arange(B))
    simclr_loss, _ = simclr(reference["augmented1"], reference["augmented2"], 0.2)
    expected = (image_loss + text_loss) / 2 + 0.7 * simclr_loss
    loss, _ = method.loss(actual)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for key in actual:
        assert_close_gradients(key, actual[key].grad, reference[key].grad)


def assert_close_gradients(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    def message(text: str) -> str:
        return f"{name}: {text}"

    torch.testing.assert_close(actual, expected, msg=message)


def hidden(batch: dict) -> torch.Tensor:
    """Return the positions (B, L - K) that a batch's masked views do not show."""
    rows = batch["views"]["image"]["positions"].tolist()
    return torch.tensor([sorted(set(range(L)) - set(row)) for row in rows])


@pytest.mark.parametrize("contrast", ["image", "visible"])
@pytest.mark.parametrize("normalise", [True, False])
def test_mae(part, contrast, normalise):
    method = build("mae", contrast=contrast, normalise=normalise, weight=0.3)
    batch = part("mae")
    view = batch["views"]["image"]

    features, ((_, prediction),) = hooked(method.decoder, lambda: method(batch))
    loss, _ = method.loss(features)

    # The reconstruction of hidden patches.
    mean = torch.tensor(method.cfg.vision.mean).repeat_interleave(64)
    std = torch.tensor(method.cfg.vision.std).repeat_interleave(64)
    target = gather_patches((pictures() / 255 - mean) / std, hidden(batch))
    if normalise:
        target = (target - target.mean(2, keepdim=True)) / target.std(2, keepdim=True)
    errors = ((prediction - target) ** 2).mean((1, 2))
    torch.testing.assert_close(features["reconstruction"], errors, rtol=1e-4, atol=1e-5)

    # The embedding, and the sum.
    if contrast == "image":
        embedding = method.towers.encode_image(pictures(), torch.arange(L).expand(B, -1))
    else:
        embedding = method.towers.encode_image(view["patches"], view["positions"])
    total = dense(features) + 0.3 * features["reconstruction"].mean()
    torch.testing.assert_close(features["image"], embedding)
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("teacher", ["average", "student", "runs/x"])
@pytest.mark.parametrize("convention, beta, normalise", [("sum", 2.0, False), ("half", 0.5, True)])
def test_maskclip(part, teacher, convention, beta, normalise):
    """The target is the teacher's output for the whole picture, at the hidden patches.

    The teacher of another run works without a contrast, too.
    """
    contrast = teacher != "runs/x"
    method = build(
        "maskclip",
        teacher=teacher,
        convention=convention,
        beta=beta,
        normalise=normalise,
        weight=0.3,
        contrast=contrast,
    )
    assert method.teacher_checkpoint() == ({} if contrast else {"teacher.": "runs/x"})
    assert len(method.ema_pairs()) == (teacher == "average")
    batch = part("maskclip")
    all_patches = (pictures(), torch.arange(L).expand(B, -1))
    vision = (method.towers if teacher == "student" else method.teacher).vision
    vision.norm.weight.data.uniform_(0.5, 2)  # or its outputs are layer-normalized already

    # Distillation at the hidden patches.
    features, ((_, prediction),) = hooked(method.decoder, lambda: method(batch))
    target = gather_patches(vision(*all_patches)[:, 1:], hidden(batch))
    if normalise:
        target = F.layer_norm(target, (128,))
    error = (prediction - target).abs()
    smooth_l1 = torch.where(error < beta, error**2 / (2 * beta), error - beta / 2)
    expected = smooth_l1.mean((1, 2))
    torch.testing.assert_close(features["distillation"], expected)

    # The sum.
    total = 0.3 * expected.mean()
    if contrast:
        torch.testing.assert_close(features["image"], method.towers.encode_image(*all_patches))
        total += {"sum": 2, "half": 1}[convention] * dense(features)
    torch.testing.assert_close(method.loss(features)[0], total)

    # Hidden patches in another order.
    order = torch.randperm(L - L // 4)
    view = batch["views"]["image"]
    for key in ("hidden", "hidden_positions"):
        view[key] = view[key][:, order]
    reordered = method(batch)["distillation"]
    message = "the order of the hidden patches does not matter"
    torch.testing.assert_close(reordered, expected, msg=message)


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
    """Views choose patches by the scores at their boxes; each view is contrasted with the text;
    auxiliary losses are means over views, or pairs of them.
    """
    method = build("aclip", count, **options)
    batch = part("aclip", view=View(count=count), teacher=View(encloses=("view",), size=size))
    teacher_view = batch["views"]["teacher"]
    teacher_grid = (4, 4) if size else GRID
    share = options.get("keep", 1 / count)

    features = method(batch)
    loss, metrics = method.loss(features)

    # The choice of patches, and the embeddings of the views.
    scores, teacher_tokens = method.run_teacher(teacher_view)
    attentive = PatchSelector(method.options.strategy, 16, 8, GRID)
    pooled = []
    for i in range(count):
        view = batch["views"][f"view{i + 1}" if count > 1 else "view"]
        view_scores = scores_in_view(scores, teacher_grid, teacher_view["box"], view["box"], GRID)
        keep = attentive.choose(view_scores, share, view["noise"])
        assert keep.shape == (B, kept)
        pooled.append(method.towers.image_features(gather_patches(view["patches"], keep), keep))
        torch.testing.assert_close(features[f"image{i}"], method.towers.embed_image(pooled[i]))

    # The loss.
    contrasts = [dense(features, f"image{i}") for i in range(count)]
    expected = torch.stack(contrasts).mean()
    expected += auxiliary_losses(method, torch.cat(pooled), teacher_tokens, count, options)
    torch.testing.assert_close(loss, expected)
    auxiliary = options.keys() & AUXILIARY.keys()
    assert metrics.keys() == {"accuracy", "contrastive", "temperature", *auxiliary}


def auxiliary_losses(
    method: Method, pooled: torch.Tensor, teacher_tokens: torch.Tensor, count: int, options: dict
) -> torch.Tensor:
    """Return the weighted sum of A-CLIP's auxiliary losses of `count` views, (count B, D)."""
    total = torch.zeros(())
    if weight := options.get("simclr"):
        z = method.simclr_head(pooled).chunk(count)
        temperature = method.options.temperature
        pairs = [(0, 0)] if "as_released" in options else combinations(range(count), 2)
        terms = [simclr(z[i], z[j], temperature)[0] for i, j in pairs]
        total = total + weight * torch.stack(terms).mean()
    if weight := options.get("simsiam"):
        projected = method.simsiam_projector(pooled)
        p = method.simsiam_predictor(projected).chunk(count)
        z = projected.chunk(count)
        pairs = permutations(range(count), 2)
        terms = [F.cosine_similarity(p[i], z[j]) for i, j in pairs]
        total = total - weight * torch.stack(terms).mean()
    if weight := options.get("byol"):
        p = method.byol_predictor(method.byol_projector(pooled)).chunk(count)
        target = method.byol_teacher(teacher_tokens)
        terms = [2 - 2 * F.cosine_similarity(x, target) for x in p]
        total = total + weight * torch.stack(terms).mean()
    return total


# ---- cost and refusals


@pytest.mark.parametrize(
    "work, message",
    [
        (
            lambda: build("mae", contrast="text"),
            "options.contrast: unknown 'text'; known: image, visible",
        ),
        (
            lambda: build("mae", width=62),
            "options.width: 62 does not fit a decoder of options.heads 2; use a multiple of 4",
        ),
        (
            lambda: build("maskclip", convention="mean"),
            "options.convention: unknown 'mean'; known: half, sum",
        ),
        (
            lambda: build("maskclip", contrast=False),
            "options.contrast: false does not work with options.teacher 'average'",
        ),
        (
            lambda: build("maskclip", momentum=(0.9, 1.1)),
            "options.momentum: .* from 0 to 1, the first not above the second",
        ),
        (
            lambda: build("aclip", momentum=(1.0, 0.9)),
            "options.momentum: .* from 0 to 1, the first not above the second",
        ),
        (
            lambda: build("aclip", layers="first"),
            "options.layers: unknown 'first'; known: all, last",
        ),
        (lambda: build("aclip", keep=1.5), "options.keep: 1.5; it must be from 0 to 1"),
        (lambda: build("aclip", keep=0.01), "options.keep: 0.01 keeps 0 of 16 blocks"),
        (
            lambda: build("aclip", views=1, simsiam=1.0),
            "these losses compare views, but views.view.count is 1",
        ),
    ],
)
def test_refuses(work, message):
    with pytest.raises(ValueError, match=message):
        work()
