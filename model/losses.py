"""The losses. Contrastive ones are the exact InfoNCE of the global batch, over all ranks, in tiles;
the others a number a sample, (b,).

Letters: `b` pairs on this rank, `B` = b x ranks, `E` embedding width, `m` rows, `n` columns; S =
scale * image @ text^T.
A rank owns the block of its b rows against all B columns and walks it tile by tile, forward and
(computed again) backward: nothing of size b x B is ever stored. Rows are complete on one rank;
columns are partial sums that two all-reduces of B numbers complete.
A pair's own logit (its positive) is kept out of the sums: with margin = positive -
log-sum-exp(negatives), a row's probability is sigmoid(margin), and loss and gradients stay accurate
where it is nearly 1 and `lse - positive` would cancel.
To extend: `_negatives` and `_gradients` know nothing of ranks or of the loss. Another softmax over
blocks merges the blocks' (largest, total) and calls `_gradients` on each block with the merged
sums, as _SimCLR does; an infinite `row_lse` or `col_lse` switches that direction off.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from glimpse.model.collectives import all_reduce, check_batch, gather, rank, scatter_sum, world

# Rows x columns of a tile: 8 MiB of fp32 logits. Forward + backward of B 4096, E 512 on 2 CPU
# cores, ns a logit: 256x512 18.9,
# 512x512 17.4, 1024x1024 16.7, 1024x2048 16.6, 2048x4096 18.4, 4096x4096 22.1 (dense 29.5): beyond
# it, exp and sums leave the cache.
# Not measured on a GPU: a tile is 2 GFLOP for about ten kernel launches, near break-even, so that
# smaller ones would wait for launches.
TILE = (1024, 2048)


def contrastive(
    image: Tensor, text: Tensor, scale: Tensor, exact: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """image (b, E), text (b, E), scale (1,) -> (loss (), {"accuracy": ()}), the same numbers on
    every rank.

    The loss is the mean over the B pairs and both directions, in fp32 (fp64 stays fp64). Its
    gradients are those of the global mean loss times the number of ranks: DeepSpeed averages
    parameter gradients over ranks, and so applies the exact gradient (a full matrix on every rank,
    own slice re-inserted, would apply exact / ranks; local rows against detached columns only the
    query-side half).
    exact False: the same loss with the gradients of SLIP's release, whose local rows meet gathered
    columns that carry none.
    Accuracy: the share of pairs whose logit beats every other of its row, averaged with that of its
    column; a tie is a miss.
    """
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(
            f"image {tuple(image.shape)} and text {tuple(text.shape)}: both must be (b, E), b > 0,"
            " one row a pair"
        )
    if scale.shape != (1,):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, must be (1,)")
    check_batch(image)
    kind = torch.promote_types(image.dtype, torch.float32)
    loss, accuracy = _Contrastive.apply(image.to(kind), text.to(kind), scale.to(kind), exact)
    return loss, {"accuracy": accuracy}


def contrastive_memory(rows: int, batch: int, embed: int) -> float:
    """Bytes that `contrastive` holds at most beside its inputs, b x E each, for B columns: in the
    backward pass, fp32.
    """
    columns = 1 if rows == batch else 2  # their gradient, and what other ranks sent
    return 4.0 * (
        (2 * rows + columns * batch) * embed
        + 8 * batch
        + 3 * min(rows, TILE[0]) * min(batch, TILE[1])
    )


def dense_contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The same loss with its B x B matrix, for one process: what the tests and the benchmark
    compare with. (B, E), (B, E), (1,) -> ().
    """
    logits = scale * image @ text.t()
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, exact):
        ctx.exact, ctx.first = exact, len(image) * rank()
        rows, cols = image * scale, gather(text)
        own, B = slice(ctx.first, ctx.first + len(image)), len(cols)
        positive, by_row, by_col = _negatives(rows, cols, ctx.first)
        row_neg = by_row[0] + by_row[1].log()
        peak = all_reduce(by_col[0].clone(), largest=True)
        positives = torch.zeros_like(peak)
        positives[own] = positive
        message = torch.cat(
            [by_col[1] * (by_col[0] - peak).exp(), positives, _score(positive, row_neg, by_row[0])]
        )
        col_sum, positives, rows_score = all_reduce(message).split([B, B, 2])
        col_neg = peak + col_sum.log()
        # no views: `loss *= 2` may follow
        loss, accuracy = (
            x.clone() for x in (rows_score + _score(positives, col_neg, peak)) / (2 * B)
        )
        # of each pair, by row and by column
        pull = torch.stack([row_neg - positive, (col_neg - positives)[own]]).sigmoid()
        row_lse, col_lse = torch.logaddexp(row_neg, positive), torch.logaddexp(col_neg, positives)
        ctx.save_for_backward(image, scale, cols, row_lse, col_lse, pull)
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        image, scale, cols, row_lse, col_lse, pull = ctx.saved_tensors
        rows, own = image * scale, slice(ctx.first, ctx.first + len(image))

        def pulled(col_lse, pull):
            d_rows, d_cols = _gradients(rows, cols, ctx.first, row_lse, col_lse)
            d_rows.addcmul_(pull[:, None], cols[own], value=-1)
            d_cols[own].addcmul_(pull[:, None], rows, value=-1)
            return d_rows, d_cols

        d_rows, d_cols = pulled(col_lse, pull.sum(0))
        grad = grad * world() / (2 * len(cols))  # x ranks: DeepSpeed averages
        d_scale = (d_rows * image).sum() * grad  # sum(G * image @ text^T): this rank's share of it
        # an image feels the softmax of its own row alone, a text that of its column
        if not ctx.exact:
            d_rows, by_row = pulled(torch.full_like(col_lse, torch.inf), pull[0])
            d_cols -= by_row
        return d_rows.mul_(grad * scale), scatter_sum(d_cols).mul_(grad), d_scale.reshape(1), None


def simclr(one: Tensor, two: Tensor, temperature: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """one (b, E), two (b, E), two views' vectors -> (loss (), {"simclr_accuracy": ()}), the same
    numbers on every rank.

    SimCLR's NT-Xent (arXiv 2002.05709, equation 1) over the views of all ranks: each view's
    positive is the other view of its image, its negatives both views of all other images. Mean over
    the 2 B rows; gradients as `contrastive`'s.
    """
    if one.ndim != 2 or one.shape != two.shape or not len(one):
        raise ValueError(
            f"one {tuple(one.shape)} and two {tuple(two.shape)}: both must be (b, E), b > 0, one"
            " row an image"
        )
    check_batch(one)
    loss, accuracy = _SimCLR.apply(unit(one), unit(two), 1 / temperature)
    return loss, {"simclr_accuracy": accuracy}


def unit(x: Tensor) -> Tensor:
    """(..., E) -> (..., E) of length 1, fp32 (fp64 stays fp64)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class _SimCLR(torch.autograd.Function):
    @staticmethod
    def forward(ctx, one, two, scale):
        ctx.first, ctx.scale = len(one) * rank(), scale
        every = gather(one), gather(two)
        score, kept = one.new_zeros(2), []
        for mine, (other, same) in ((one, (every[1], every[0])), (two, (every[0], every[1]))):
            rows = mine * scale
            positive, (peak, total), _ = _negatives(rows, other, ctx.first)
            # whose diagonal is the view itself
            _, (peak_same, total_same), _ = _negatives(rows, same, ctx.first)
            negatives = torch.logaddexp(peak + total.log(), peak_same + total_same.log())
            score += _score(positive, negatives, torch.maximum(peak, peak_same))
            kept += [torch.logaddexp(negatives, positive), (negatives - positive).sigmoid()]
        ctx.save_for_backward(one, two, *every, *kept)
        loss, accuracy = (x.clone() for x in all_reduce(score) / (2 * len(every[0])))
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        one, two, every_one, every_two, *kept = ctx.saved_tensors
        own, off = (
            slice(ctx.first, ctx.first + len(one)),
            torch.full_like(every_one[:, 0], torch.inf),
        )
        everyone, mine = (every_one, every_two), []
        columns = [torch.zeros_like(every_one), torch.zeros_like(every_two)]
        for view, x in enumerate((one, two)):
            rows, lse, pull = x * ctx.scale, kept[2 * view], kept[2 * view + 1]
            d_rows, d_other = _gradients(rows, everyone[1 - view], ctx.first, lse, off)
            d_rows.addcmul_(pull[:, None], everyone[1 - view][own], value=-1)
            d_other[own].addcmul_(pull[:, None], rows, value=-1)
            more, d_same = _gradients(rows, everyone[view], ctx.first, lse, off)
            mine.append((d_rows + more) * ctx.scale)
            columns[1 - view] += d_other
            columns[view] += d_same
        grad = grad * world() / (2 * len(every_one))
        return *((x + scatter_sum(y)) * grad for x, y in zip(mine, columns)), None


def byol(prediction: Tensor, target: Tensor) -> Tensor:
    """(b, E) x 2 -> (b,): 2 - 2 cos (BYOL, arXiv 2006.07733, equation 2); no gradient reaches the
    target.
    """
    return 2 - 2 * (unit(prediction) * unit(target.detach())).sum(-1)


def simsiam(prediction: Tensor, target: Tensor) -> Tensor:
    """(b, E) x 2 -> (b,): -cos (SimSiam, arXiv 2011.10566, equation 1); no gradient reaches the
    target.
    """
    return -(unit(prediction) * unit(target.detach())).sum(-1)


def distillation(
    made: Tensor, target: Tensor, beta: float = 2.0, normalise: bool = False
) -> Tensor:
    """(b, M, D) x 2 -> (b,): smooth L1, mean over tokens and channels (MaskCLIP section 3.2);
    normalise: layer-normalise the targets.
    """
    made, target = made.float(), target.detach().float()
    target = F.layer_norm(target, target.shape[-1:]) if normalise else target
    return F.smooth_l1_loss(made, target, beta=beta, reduction="none").mean((1, 2))


def reconstruction(made: Tensor, target: Tensor, normalise: bool = True) -> Tensor:
    """(b, M, X) x 2 -> (b,): mean squared error of patches; normalise: of each target patch's own
    mean and deviation (MAE section 3).
    """
    made, target = made.float(), target.detach().float()
    if normalise:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True) + 1e-6
        ).sqrt()
    return (made - target).square().mean((1, 2))


def _tiles(rows, cols, first):
    """Walk rows (m, E) @ cols (n, E)^T: yield (row slice, column slice, tile, its pairs' logits (a
    view into the tile), their first row).

    Row i's pair is column first + i. `out=` spares allocations, and keeps a surrounding autocast
    from computing the logits in bf16.
    """
    height, width = TILE
    space = rows.new_empty(min(height, len(rows)) * min(width, len(cols)))
    for top in range(0, len(rows), height):
        for left in range(0, len(cols), width):
            x, y = rows[top : top + height], cols[left : left + width]
            tile = torch.mm(x, y.t(), out=space[: len(x) * len(y)].view(len(x), len(y)))
            shift = first + top - left  # a pair's column less its row, inside the tile
            yield (
                slice(top, top + len(x)),
                slice(left, left + len(y)),
                tile,
                tile.diagonal(shift),
                top + max(0, -shift),
            )


def _negatives(rows, cols, first):
    """rows (m, E), cols (n, E) -> positive (m,), (largest, total) of the other logits by row (m,),
    the same by column (n,).
    """
    positive = rows.new_empty(len(rows))
    # The least finite number, not -inf: a tile that holds nothing but a pair would compute -inf -
    # -inf
    by_row, by_col = (
        (rows.new_full((k,), torch.finfo(rows.dtype).min), rows.new_zeros(k))
        for k in (len(rows), len(cols))
    )
    for r, c, tile, pairs, at in _tiles(rows, cols, first):
        positive[at : at + len(pairs)] = pairs
        pairs.fill_(-torch.inf)
        _fold(by_row[0][r], by_row[1][r], tile, 1)
        _fold(by_col[0][c], by_col[1][c], tile, 0)
    return positive, by_row, by_col


def _fold(largest, total, tile, dim):
    """Online log-sum-exp, in place: take the tile into `largest` and into `total`, the sum of
    exp(logit - largest) so far.
    """
    new = torch.maximum(largest, tile.amax(dim))
    total.mul_((largest - new).exp_()).add_((tile - new.unsqueeze(dim)).exp_().sum(dim))
    largest.copy_(new)


def _score(positive, negatives, largest):
    """Positive logits, their negatives' log-sum-exp and largest, all (k,) -> [summed loss, pairs
    that win] (2,).
    """
    return torch.stack([-F.logsigmoid(positive - negatives).sum(), (positive > largest).sum()])


def _gradients(rows, cols, first, row_lse, col_lse):
    """G = softmax by row + softmax by column of the pairs that do not belong together -> G @ cols
    (m, E), G^T @ rows (n, E).
    """
    d_rows, d_cols = torch.zeros_like(rows), torch.zeros_like(cols)
    for r, c, tile, pairs, _ in _tiles(rows, cols, first):
        pairs.fill_(-torch.inf)
        weight = (tile - row_lse[r, None]).exp_()
        weight += tile.sub_(col_lse[c]).exp_()
        d_rows[r].addmm_(weight, cols[c])
        d_cols[c].addmm_(weight.t(), rows[r])
    return d_rows, d_cols
