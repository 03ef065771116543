"""Softmax losses over the pairs of all ranks, tile by tile: nothing of size b x B is ever stored.

Letters: `b` pairs on this rank, `B` = b x ranks, `E` embedding width, `m` rows, `n` columns; S =
rows @ columns^T, the logits.

A rank owns the block of its b rows against all B columns. It walks the block in tiles, forward and,
computing each tile again, backward. A row's sum over its columns is complete on the rank; a
column's sum over its rows is partial, and two all-reduces of B numbers complete it.

The logit of a pair that belongs together (its positive) is kept out of the sums. With margin =
positive - log-sum-exp(negatives) the probability of the right answer is sigmoid(margin), so that
loss and gradients stay accurate where it is nearly 1 and `log-sum-exp - positive` would cancel.

To extend: `negatives` and `softmax_gradients` know nothing of ranks or of the loss. Another softmax
over several blocks merges the blocks' (largest, total) and calls `softmax_gradients` on each block
with the merged sums, as SimCLR does; an infinite `row_lse` or `col_lse` switches that direction
off.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from glimpse.model.collectives import all_gather, all_reduce, rank, reduce_scatter_sum, world_size

# Rows x columns of a tile: 8 MiB of fp32 logits. Forward + backward of B 4096, E 512 on 2 CPU
# cores, ns per logit: 256x512 18.9, 512x512 17.4, 1024x1024 16.7, 1024x2048 16.6, 2048x4096 18.4,
# 4096x4096 22.1 (dense 29.5); beyond 1024x2048, exp and sums leave the cache. Not measured on a
# GPU: a tile is 2 GFLOP for about ten kernel launches, near break-even, so that smaller ones would
# wait for launches.
TILE = (1024, 2048)


def contrastive_memory(rows: int, batch: int, embed: int) -> float:
    """Return the most bytes that the contrastive loss holds beside its inputs (b x E each).

    It holds them in the backward pass, for B columns in fp32.
    """
    columns = 1 if rows == batch else 2  # their gradient, and what other ranks sent
    tile = min(rows, TILE[0]) * min(batch, TILE[1])
    return 4.0 * ((2 * rows + columns * batch) * embed + 8 * batch + 3 * tile)


class TiledContrastive(torch.autograd.Function):
    """InfoNCE in both directions.

    (image (b, E), text (b, E), scale (1,), exact) -> (loss (), accuracy ()).

    exact False: the gradients of SLIP's release, whose local rows meet gathered columns that carry
    none.
    """

    @staticmethod
    def forward(
        ctx, image: Tensor, text: Tensor, scale: Tensor, exact: bool
    ) -> tuple[Tensor, Tensor]:
        first = len(image) * rank()
        rows = image * scale
        cols = all_gather(text)
        B = len(cols)
        pairs = slice(first, first + len(image))

        # 1. This rank's block: rows are complete, columns are partial sums.
        positive, by_row, by_col = sum_negatives(rows, cols, first)
        row_neg = by_row.largest + by_row.total.log()

        # 2. Complete the columns over the ranks: the largest logit, then the sums under it.
        peak = all_reduce(by_col.largest.clone(), largest=True)
        col_total = by_col.total * (by_col.largest - peak).exp()
        positives = torch.zeros_like(peak)
        positives[pairs] = positive
        row_score = summarize(positive, row_neg, by_row.largest)
        message = all_reduce(torch.cat([col_total, positives, row_score]))
        col_total, positives, row_score = message.split([B, B, 2])
        col_neg = peak + col_total.log()

        # 3. Loss and accuracy over rows and columns; clones, since `loss *= 2` may follow.
        scores = (row_score + summarize(positives, col_neg, peak)) / (2 * B)
        loss, accuracy = scores[0].clone(), scores[1].clone()

        # 4. For the backward pass: 1 - the probability of each positive, by row and by column.
        pull = torch.stack([row_neg - positive, (col_neg - positives)[pairs]]).sigmoid()
        row_lse = torch.logaddexp(row_neg, positive)
        col_lse = torch.logaddexp(col_neg, positives)
        ctx.save_for_backward(image, scale, cols, row_lse, col_lse, pull)
        ctx.exact, ctx.first = exact, first
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, scale, cols, row_lse, col_lse, pull = ctx.saved_tensors
        rows = image * scale
        pairs = slice(ctx.first, ctx.first + len(image))

        def block_gradients(col_lse: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
            d_rows, d_cols = softmax_gradients(rows, cols, ctx.first, row_lse, col_lse)
            d_rows.addcmul_(pull[:, None], cols[pairs], value=-1)
            d_cols[pairs].addcmul_(pull[:, None], rows, value=-1)
            return d_rows, d_cols

        # 1. This rank's block, in both directions at once.
        d_rows, d_cols = block_gradients(col_lse, pull.sum(0))
        grad = grad * world_size() / (2 * len(cols))  # x ranks: DeepSpeed averages
        d_scale = (d_rows * image).sum() * grad  # sum(G * image @ text^T): this rank's share of it

        # 2. As released, an image feels the softmax of its own row alone, a text its column.
        if not ctx.exact:
            d_rows, by_row = block_gradients(torch.full_like(col_lse, torch.inf), pull[0])
            d_cols -= by_row

        # 3. The texts' gradients go back to the ranks that they came from.
        return (
            d_rows.mul_(grad * scale),
            reduce_scatter_sum(d_cols).mul_(grad),
            d_scale.reshape(1),
            None,
        )


class TiledSimCLR(torch.autograd.Function):
    """NT-Xent over two views.

    (unit vectors one (b, E) and two (b, E), scale) -> (loss (), accuracy ()).
    """

    @staticmethod
    def forward(ctx, one: Tensor, two: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.first, ctx.scale = len(one) * rank(), scale
        all_one, all_two = all_gather(one), all_gather(two)
        total = one.new_zeros(2)
        saved = []
        for view, other, same in ((one, all_two, all_one), (two, all_one, all_two)):
            rows = view * scale
            # Against the other view: the diagonal holds the positives.
            positive, others, _ = sum_negatives(rows, other, ctx.first)
            # Against the same view: the diagonal holds each view with itself, which is left out.
            _, sames, _ = sum_negatives(rows, same, ctx.first)
            lse = torch.logaddexp(
                others.largest + others.total.log(), sames.largest + sames.total.log()
            )
            total += summarize(positive, lse, torch.maximum(others.largest, sames.largest))
            saved += [torch.logaddexp(lse, positive), (lse - positive).sigmoid()]
        ctx.save_for_backward(one, two, all_one, all_two, *saved)
        means = all_reduce(total) / (2 * len(all_one))
        loss, accuracy = means[0].clone(), means[1].clone()
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        one, two, all_one, all_two, *saved = ctx.saved_tensors
        everyone = all_one, all_two
        pairs = slice(ctx.first, ctx.first + len(one))
        off = torch.full_like(everyone[0][:, 0], torch.inf)  # no softmax by column

        d_views = []
        d_everyone = [torch.zeros_like(everyone[0]), torch.zeros_like(everyone[1])]
        for n, view in enumerate((one, two)):
            rows = view * ctx.scale
            lse, pull = saved[2 * n], saved[2 * n + 1]
            other, same = everyone[1 - n], everyone[n]

            d_rows, d_other = softmax_gradients(rows, other, ctx.first, lse, off)
            d_rows.addcmul_(pull[:, None], other[pairs], value=-1)
            d_other[pairs].addcmul_(pull[:, None], rows, value=-1)
            d_rows_same, d_same = softmax_gradients(rows, same, ctx.first, lse, off)

            d_views.append((d_rows + d_rows_same) * ctx.scale)
            d_everyone[1 - n] += d_other
            d_everyone[n] += d_same

        grad = grad * world_size() / (2 * len(everyone[0]))  # x ranks: DeepSpeed averages
        d_one = (d_views[0] + reduce_scatter_sum(d_everyone[0])) * grad
        d_two = (d_views[1] + reduce_scatter_sum(d_everyone[1])) * grad
        return d_one, d_two, None


class ExpSums(NamedTuple):
    """The largest logit, and the sum of exp(logit - largest), each (k,)."""

    largest: Tensor
    total: Tensor


class Tile(NamedTuple):
    """A tile of the logits, with its place in them."""

    rows: slice
    cols: slice
    logits: Tensor
    positives: Tensor  # the logits of its pairs that belong together, a view into `logits`
    first: int  # the row of the first of them


def iterate_tiles(rows: Tensor, cols: Tensor, first: int) -> Iterator[Tile]:
    """Walk rows (m, E) @ cols (n, E)^T; row i and column first + i belong together.

    All tiles share one buffer: it spares allocations, and `out=` keeps a surrounding autocast from
    computing the logits in bf16.
    """
    height, width = TILE
    buffer = rows.new_empty(min(height, len(rows)) * min(width, len(cols)))
    for top in range(0, len(rows), height):
        for left in range(0, len(cols), width):
            x, y = rows[top : top + height], cols[left : left + width]
            space = buffer[: len(x) * len(y)].view(len(x), len(y))
            logits = torch.mm(x, y.t(), out=space)
            shift = first + top - left  # a pair's column less its row, inside the tile
            yield Tile(
                rows=slice(top, top + len(x)),
                cols=slice(left, left + len(y)),
                logits=logits,
                positives=logits.diagonal(shift),
                first=top + max(0, -shift),
            )


def sum_negatives(rows: Tensor, cols: Tensor, first: int) -> tuple[Tensor, ExpSums, ExpSums]:
    """Return the positives (m,), and the Sums of the other logits by row and by column.

    rows (m, E), cols (n, E); the Sums are (m,) and (n,).
    """
    positive = rows.new_empty(len(rows))
    # The least finite number, not -inf: a tile that holds nothing but a pair would compute
    # -inf - -inf.
    least = torch.finfo(rows.dtype).min
    by_row = ExpSums(rows.new_full((len(rows),), least), rows.new_zeros(len(rows)))
    by_col = ExpSums(rows.new_full((len(cols),), least), rows.new_zeros(len(cols)))
    for tile in iterate_tiles(rows, cols, first):
        positive[tile.first : tile.first + len(tile.positives)] = tile.positives
        tile.positives.fill_(-torch.inf)
        update_sums(by_row.largest[tile.rows], by_row.total[tile.rows], tile.logits, 1)
        update_sums(by_col.largest[tile.cols], by_col.total[tile.cols], tile.logits, 0)
    return positive, by_row, by_col


def update_sums(largest: Tensor, total: Tensor, logits: Tensor, dim: int) -> None:
    """Take a tile's logits into the sums so far, in place: online log-sum-exp."""
    new = torch.maximum(largest, logits.amax(dim))
    total.mul_((largest - new).exp_()).add_((logits - new.unsqueeze(dim)).exp_().sum(dim))
    largest.copy_(new)


def summarize(positive: Tensor, lse: Tensor, largest: Tensor) -> Tensor:
    """Return [summed loss, number of positives that beat every negative], (2,).

    lse, largest: of the negatives of each positive; all are (k,).
    """
    return torch.stack([-F.logsigmoid(positive - lse).sum(), (positive > largest).sum()])


def softmax_gradients(
    rows: Tensor, cols: Tensor, first: int, row_lse: Tensor, col_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return G @ cols (m, E) and G^T @ rows (n, E).

    G is the softmax by row plus the softmax by column, zero at the pairs that belong together.
    """
    d_rows, d_cols = torch.zeros_like(rows), torch.zeros_like(cols)
    for tile in iterate_tiles(rows, cols, first):
        tile.positives.fill_(-torch.inf)
        weight = (tile.logits - row_lse[tile.rows, None]).exp_()
        weight += tile.logits.sub_(col_lse[tile.cols]).exp_()
        d_rows[tile.rows].addmm_(weight, cols[tile.cols])
        d_cols[tile.cols].addmm_(weight.t(), rows[tile.rows])
    return d_rows, d_cols
