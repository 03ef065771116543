"""A-CLIP (arXiv 2212.08653): views with the patches that a teacher attends to.

A view keeps half of its patches, those with the most attention from the class token of the teacher,
a moving average of the student. The teacher runs once, on the smallest box around all views; its
attention is interpolated at the patches of each view (section 3.3). Each view has a contrastive
loss with the text (section 3.4). Auxiliary losses: SimCLR or SimSiam between the views, and BYOL
between each view and the teacher's box.

Views: one to four of `view`, and `teacher`, which encloses them.

Letters: B samples, k views, K kept patches, L patches of the grid, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from glimpse.model.collectives import batch_mean
from glimpse.model.ema import check_momentum
from glimpse.model.ema import cosine_momentum as cosine_momentum
from glimpse.model.heads import (
    byol_predictor,
    byol_projector,
    simclr_head,
    simsiam_predictor,
    simsiam_projector,
)
from glimpse.model.layers import AttentionRecorder
from glimpse.model.losses import byol, contrastive, simclr, simsiam
from glimpse.model.methods.attentive import PatchSelector, gather_patches, scores_in_view
from glimpse.model.methods.base import (
    EmaMethod,
    MicroBatch,
    ViewBatch,
    require_above,
    require_at_least,
)
from glimpse.model.towers import ModelConfig, Towers, build_vision_tower
from glimpse.model.vision import VisionTower


@dataclass(frozen=True)
class Options:
    # Patches to drop: low (those with the lowest attention), high (the highest), mixed (low,
    # but a quarter of the kept patches are drawn at random) or random.
    strategy: str = "low"
    # Share of a view's patches to keep, 0 to 1; 0 keeps one divided by the number of views.
    keep: float = 0.0
    # Side in pixels of the square blocks in which patches are kept or dropped.
    block: int = 32
    # Layers whose attention is averaged into the scores: all or last.
    layers: str = "all"
    # Weight of the SimCLR loss, which needs at least two views; 0 turns it off.
    simclr: float = 0.0
    # Weight of the SimSiam loss, which needs at least two views; 0 turns it off.
    simsiam: float = 0.0
    # Weight of the BYOL loss; 0 turns it off.
    byol: float = 0.0
    # Temperature of the SimCLR loss.
    temperature: float = 0.1
    # Hidden width of the SimCLR and BYOL heads; SimSiam's heads have half of it.
    hidden: int = 4096
    # Output width of the SimCLR and BYOL heads.
    out: int = 256
    # Momentum of the teacher's moving average at the start and at the end; it follows a
    # cosine in between.
    momentum: tuple[float, float] = (0.996, 1.0)
    # Also average the text tower and the projections, as the released code does.
    average_text: bool = False
    # Compare the first view with itself in the SimCLR loss, a bug of the released code.
    as_released: bool = False

    def __post_init__(self) -> None:
        if self.layers not in ("all", "last"):
            raise ValueError(f"options.layers: unknown {self.layers!r}; known: all, last")
        if not 0 <= self.keep <= 1:
            raise ValueError(
                f"options.keep: {self.keep}; it must be from 0 to 1, the share of its patches that"
                " a view keeps; 0 keeps one divided by the number of views"
            )
        check_momentum(self.momentum)
        require_at_least(0, simclr=self.simclr, simsiam=self.simsiam, byol=self.byol)
        require_at_least(1, out=self.out)
        require_at_least(8, hidden=self.hidden)  # SimSiam's narrowest layer has hidden / 8
        require_above(0, temperature=self.temperature)


class Aclip(EmaMethod):
    """Contrastive loss of views masked by the teacher's attention, and auxiliary losses."""

    Options = Options
    allowed_view_counts = {"view": (1, 2, 3, 4), "teacher": (1,)}
    noise_views = ("view",)
    enclosing_views = ("teacher",)
    teacher: Towers | nn.ModuleDict

    def __init__(self, cfg: ModelConfig, vocab: int, context: int, options):
        super().__init__(cfg, vocab, context, options)
        width, hidden, out = cfg.shape.width, options.hidden, options.out
        self.selector = build_selector(options, cfg)
        if options.average_text:
            # The averaged text tower serves only evaluations of the teacher (eval_towers). The
            # deleted parts have no average: they are the student's, as in A-CLIP's code.
            self.teacher = Towers(cfg, vocab, context)
            del self.teacher.temperature
            del self.teacher.text.token
            del self.teacher.text.positions
            del self.teacher.text.norm
        else:
            # A ModuleDict, so that the parameter names are the same in both cases.
            self.teacher = nn.ModuleDict({"vision": build_vision_tower(cfg)})
        self.teacher.requires_grad_(False)
        if options.simclr:
            self.simclr_head = simclr_head(width, hidden, out)
        if options.simsiam:
            self.simsiam_projector = simsiam_projector(width, hidden // 2)
            self.simsiam_predictor = simsiam_predictor(hidden // 2)
        if options.byol:
            self.byol_projector = byol_projector(width, hidden, out)
            self.byol_teacher = byol_projector(width, hidden, out)
            self.byol_teacher.requires_grad_(False)
            self.byol_predictor = byol_predictor(hidden, out)

    @staticmethod
    def check_options(options, cfg: ModelConfig, counts: Mapping[str, int]) -> None:
        # Both raise ValueError if block size and share do not fit the model.
        build_selector(options, cfg).count_blocks(options.keep or 1 / counts["view"])
        if (options.simclr or options.simsiam) and counts["view"] < 2:
            raise ValueError(
                "options.simclr, options.simsiam: these losses compare views, but views.view.count"
                " is 1; set both to 0, or views.view.count to 2"
            )

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        teacher, towers = self.teacher, self.towers
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.teacher_vision(), towers.vision)]
        if self.options.byol:
            pairs.append((self.byol_teacher, self.byol_projector))
        if isinstance(teacher, Towers):  # options.average_text
            pairs += [
                (teacher.image_projection, towers.image_projection),
                (teacher.text.blocks, towers.text.blocks),
                (teacher.text_projection, towers.text_projection),
            ]
        return pairs

    def momentum(self, progress: float) -> float:
        start, end = self.options.momentum
        return cosine_momentum(start, end, progress)

    def forward(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        options, teacher_view = self.options, micro_batch["views"]["teacher"]
        views = [view for name, view in sorted(micro_batch["views"].items()) if name != "teacher"]
        share = options.keep or 1 / len(views)

        # 1. The teacher runs once, on the box that encloses all views. Without it the scores are 0
        # and unused: patches are random, or all are kept.
        scores = torch.zeros_like(teacher_view["positions"], dtype=torch.float32)
        teacher_features = None
        if self.needs_teacher(share):
            with torch.no_grad():
                scores, teacher_features = self.run_teacher(teacher_view)

        # 2. Each view keeps the patches that the teacher attends to. All views go through the
        # student.
        selected = [self.select_patches(scores, teacher_view, view, share) for view in views]
        pooled = self.pool_views(selected)  # k x (B, D)
        features = {f"image{i}": self.towers.embed_image(x) for i, x in enumerate(pooled)}
        features["text"] = self.towers.encode_text(**micro_batch["text"])
        features["scale"] = self.towers.temperature()

        # 3. Auxiliary heads.
        return features | self.auxiliary_features(pooled, teacher_features)

    def auxiliary_features(
        self, pooled: list[Tensor], teacher_features: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the vectors of SimCLR's loss, and the losses (B,) of SimSiam and BYOL.

        SimSiam and BYOL have no negatives: the loss of a sample needs no other sample, so it is
        computed here and averaged in loss().
        """
        options, k = self.options, len(pooled)
        # One call of each head, so that all views share batch statistics.
        all_views = torch.cat(pooled)  # (k B, D)
        features = {}
        if options.simclr:
            for i, vectors in enumerate(self.simclr_head(all_views).chunk(k)):
                features[f"simclr{i}"] = vectors
        if options.simsiam:
            projections = self.simsiam_projector(all_views)
            predictions = self.simsiam_predictor(projections)
            features["simsiam"] = pairwise_simsiam(predictions.chunk(k), projections.chunk(k))
        if options.byol:
            with torch.no_grad():
                # With batch statistics of the teacher's features alone, as in A-CLIP's code.
                target = self.byol_teacher(teacher_features)
            predictions = self.byol_predictor(self.byol_projector(all_views))
            losses = [byol(prediction, target) for prediction in predictions.chunk(k)]
            features["byol"] = torch.stack(losses).mean(0)
        return features

    def needs_teacher(self, share: float) -> bool:
        """Return True if the teacher's forward pass is needed to keep this share of the patches."""
        needs_scores = self.options.strategy != "random" and share < 1
        return bool(self.options.byol) or needs_scores

    def run_teacher(self, teacher_view: ViewBatch) -> tuple[Tensor, Tensor]:
        """Return the teacher's attention scores (B, L) and its pooled features (B, D).

        The scores are means over heads and, with options.layers=all, over layers (equation 4).
        """
        vision, recorder = self.teacher_vision(), AttentionRecorder()
        tokens = vision(
            teacher_view["patches"],
            teacher_view["positions"],
            grid=self.teacher_grid(teacher_view),
            only_cls=vision.cfg.pool == "cls",
            recorder=recorder,
        )
        if self.options.layers == "all":
            scores = torch.stack(recorder.layers).mean(0)
        else:
            scores = recorder.layers[-1]
        # Column 0 is the attention of the class token to itself.
        return scores[:, 1:], vision.pool(tokens)

    def select_patches(
        self, scores: Tensor, teacher_view: ViewBatch, view: ViewBatch, share: float
    ) -> ViewBatch:
        """Return the patches of a view to keep, (B, K, 3 P P), and their positions (B, K)."""
        view_scores = scores_in_view(
            scores,
            self.teacher_grid(teacher_view),
            teacher_view["box"],
            view["box"],
            self.cfg.grid,
        )
        # RunConfig allows no mask on these views: row i of their patches is patch i of the grid.
        keep = self.selector.choose(view_scores, share, view["noise"])
        return ViewBatch(patches=gather_patches(view["patches"], keep), positions=keep)

    def teacher_vision(self) -> VisionTower:
        """Return the teacher's vision tower."""
        vision = self.teacher.vision
        assert isinstance(vision, VisionTower)
        return vision

    def teacher_grid(self, teacher_view: ViewBatch) -> tuple[int, int]:
        """Return the grid (rows, columns) of the teacher's view.

        The view may have another resolution than the model (views.teacher.size), but not another
        aspect ratio. The method does not see the view's config, so the grid follows from the number
        of patches.
        """
        rows, columns = self.cfg.grid
        scale = (teacher_view["positions"].shape[1] / (rows * columns)) ** 0.5
        return round(rows * scale), round(columns * scale)

    def loss(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean contrastive loss of the views + the weighted auxiliary losses.

        See sections 3.1 and 3.4 of the paper.
        """
        options = self.options

        # 1. The contrastive loss of each view with the text.
        losses, accuracies = [], []
        for image in numbered_features(features, "image"):
            loss, metrics = contrastive(image, features["text"], features["scale"])
            losses.append(loss)
            accuracies.append(metrics["accuracy"])
        total = torch.stack(losses).mean()
        metrics = {
            "accuracy": torch.stack(accuracies).mean(),
            "contrastive": total.detach(),
            "temperature": 1 / features["scale"].detach(),
        }

        # 2. The auxiliary losses.
        auxiliary = {}
        if options.simclr:
            auxiliary["simclr"] = self.simclr_loss(numbered_features(features, "simclr"))
        for name in ("simsiam", "byol"):
            if name in features:
                auxiliary[name] = batch_mean(features[name])
        for name, loss in auxiliary.items():
            total = total + getattr(options, name) * loss
            metrics[name] = loss.detach()
        return total, metrics

    def simclr_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Return SimCLR's loss, as the mean over all pairs of views.

        The released code has only one pair: the first view with itself.
        """
        pairs = list(combinations(views, 2))
        if self.options.as_released:
            pairs = [(views[0], views[0])]
        losses = [simclr(first, second, self.options.temperature)[0] for first, second in pairs]
        return torch.stack(losses).mean()


def build_selector(options: Options, cfg: ModelConfig) -> PatchSelector:
    """Build the patch selector for the model's grid."""
    return PatchSelector(options.strategy, options.block, cfg.patch_size, cfg.grid)


def numbered_features(features: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Return the features name0, name1, ... in this order."""
    return [features[f"{name}{i}"] for i in range(len(features)) if f"{name}{i}" in features]


def pairwise_simsiam(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return SimSiam's loss (B,), as the mean over all ordered pairs of views."""
    losses = []
    for i, prediction in enumerate(predictions):
        for j, target in enumerate(targets):
            if i != j:
                losses.append(simsiam(prediction, target))
    return torch.stack(losses).mean(0)
