"""Softmax losses over the pairs of all ranks, tile by tile: no b x B matrix is ever stored.

Letters: `b` pairs on this rank, `B` = b x ranks, `E` embedding width, `m` rows, `n` columns; logits
= rows @ columns^T, `G` the gradient of the summed loss with respect to the logits.

A rank computes the logits of its b rows with all B columns. It goes through this block in tiles,
once in the forward pass and, recomputing each tile, once in the backward pass. The sum of a row
over its columns is complete on the rank. The sum of a column over its rows is partial; two
all-reduces of B numbers complete it.

The logit of a matching pair (the positive) is not part of the sums. With margin = positive -
log-sum-exp(negatives) the probability of the right answer is sigmoid(margin). Loss and gradients
then stay accurate when it is nearly 1, where `log-sum-exp - positive` would lose all digits.

To extend: `sum_negatives` and `softmax_gradients` do not depend on ranks or on the loss. A softmax
over several blocks of columns combines the (largest, total) of the blocks and calls
`softmax_gradients` on each block with the combined sums, as TiledSimCLR does. Infinite `row_lse` or
`col_lse` turn that direction off.
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
# 4096x4096 22.1 (dense 29.5). Beyond 1024x2048, exp and sums no longer fit the cache. Not measured
# on a GPU: a tile is 2 GFLOP in about ten kernel launches, which is near break-even; with smaller
# tiles the launches would dominate.
TILE = (1024, 2048)


def contrastive_memory(rows: int, batch: int, embed: int) -> float:
    """Return the peak bytes that the contrastive loss allocates besides its inputs (b x E each).

    The peak is in the backward pass, in fp32. batch: the B pairs of all ranks.
    """
    columns = 1 if rows == batch else 2  # the gradient, and the gradients from other ranks
    tile = min(rows, TILE[0]) * min(batch, TILE[1])
    return 4.0 * ((2 * rows + columns * batch) * embed + 8 * batch + 3 * tile)


class TiledContrastive(torch.autograd.Function):
    """InfoNCE in both directions.

    (image (b, E), text (b, E), scale (1,), exact) -> (loss (), accuracy ()).

    exact=False: the gradient of SLIP's released code, which multiplies the local rows with gathered
    columns that have no gradient.
    """

    @staticmethod
    def forward(
        ctx, image: Tensor, text: Tensor, scale: Tensor, exact: bool
    ) -> tuple[Tensor, Tensor]:
        offset = len(image) * rank()
        rows = image * scale
        cols = all_gather(text)
        B = len(cols)
        pairs = slice(offset, offset + len(image))  # the columns of this rank's pairs

        # 1. The block of this rank: its row sums are complete, its column sums are partial.
        positive, by_row, by_col = sum_negatives(rows, cols, offset)
        row_lse_negatives = by_row.largest + by_row.total.log()

        # 2. Complete the column sums over ranks: first the largest logits, then the sums of
        # exp(logit - largest). The same all-reduce collects the positives and the row statistics.
        col_largest = all_reduce(by_col.largest.clone(), maximum=True)
        col_total = by_col.total * (by_col.largest - col_largest).exp()
        positives = torch.zeros_like(col_largest)
        positives[pairs] = positive
        row_stats = loss_and_hits(positive, row_lse_negatives, by_row.largest)
        message = all_reduce(torch.cat([col_total, positives, row_stats]))
        col_total, positives, row_stats = message.split([B, B, 2])
        col_lse_negatives = col_largest + col_total.log()

        # 3. Loss and accuracy over rows and columns. They are cloned, because they are views and
        # the caller may change the loss in place.
        stats = (row_stats + loss_and_hits(positives, col_lse_negatives, col_largest)) / (2 * B)
        loss, accuracy = stats[0].clone(), stats[1].clone()

        # 4. For the backward pass: 1 - probability of each positive, by row and by column, (2, b).
        wrong_probability = torch.stack(
            [row_lse_negatives - positive, (col_lse_negatives - positives)[pairs]]
        ).sigmoid()
        row_lse = torch.logaddexp(row_lse_negatives, positive)
        col_lse = torch.logaddexp(col_lse_negatives, positives)
        ctx.save_for_backward(image, scale, cols, row_lse, col_lse, wrong_probability)
        ctx.exact, ctx.offset = exact, offset
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, scale, cols, row_lse, col_lse, wrong_probability = ctx.saved_tensors
        rows = image * scale
        pairs = slice(ctx.offset, ctx.offset + len(image))

        def block_gradients(col_lse: Tensor, wrong_probability: Tensor) -> tuple[Tensor, Tensor]:
            d_rows, d_cols = softmax_gradients(rows, cols, ctx.offset, row_lse, col_lse)
            d_rows.addcmul_(wrong_probability[:, None], cols[pairs], value=-1)
            d_cols[pairs].addcmul_(wrong_probability[:, None], rows, value=-1)
            return d_rows, d_cols

        # 1. The block of this rank, both directions at once.
        d_rows, d_cols = block_gradients(col_lse, wrong_probability.sum(0))
        # Times the number of ranks, because DeepSpeed averages gradients over ranks.
        grad = grad * world_size() / (2 * len(cols))
        # d loss / d scale is the sum over pairs (i, j) of G_ij * <image_i, text_j>, here over this
        # rank's rows; averaging over ranks completes it.
        d_scale = (d_rows * image).sum() * grad

        # 2. As released: an image gets only the gradient of its row's softmax, a text only that of
        # its column's.
        if not ctx.exact:
            no_column_softmax = torch.full_like(col_lse, torch.inf)
            d_rows, d_cols_of_rows = block_gradients(no_column_softmax, wrong_probability[0])
            d_cols -= d_cols_of_rows

        # 3. Send the gradients of the gathered texts back to their ranks.
        d_text = reduce_scatter_sum(d_cols)
        return d_rows.mul_(grad * scale), d_text.mul_(grad), d_scale.reshape(1), None


class TiledSimCLR(torch.autograd.Function):
    """NT-Xent over two views of each image.

    (unit vectors first (b, E) and second (b, E), scale) -> (loss (), accuracy ()).
    """

    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.offset, ctx.scale = len(first) * rank(), scale
        all_first, all_second = all_gather(first), all_gather(second)
        stats = first.new_zeros(2)
        saved = []
        for view, other_view, same_view in (
            (first, all_second, all_first),
            (second, all_first, all_second),
        ):
            rows = view * scale
            # Columns of the other view: the diagonal has the positives.
            positive, others, _ = sum_negatives(rows, other_view, ctx.offset)
            # Columns of the same view: the diagonal is each vector with itself and is left out.
            _, same, _ = sum_negatives(rows, same_view, ctx.offset)
            # One softmax over both blocks of columns.
            negatives = torch.logaddexp(
                others.largest + others.total.log(), same.largest + same.total.log()
            )
            stats += loss_and_hits(positive, negatives, torch.maximum(others.largest, same.largest))
            lse, wrong_probability = (
                torch.logaddexp(negatives, positive),
                (negatives - positive).sigmoid(),
            )
            saved += [lse, wrong_probability]
        ctx.save_for_backward(first, second, all_first, all_second, *saved)

        means = all_reduce(stats) / (2 * len(all_first))
        loss, accuracy = means[0].clone(), means[1].clone()
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        first, second, all_first, all_second, *saved = ctx.saved_tensors
        all_views = all_first, all_second
        pairs = slice(ctx.offset, ctx.offset + len(first))
        no_column_softmax = torch.full_like(all_first[:, 0], torch.inf)

        # 1. Gradients of this rank's rows, and of all columns, for each view as rows.
        d_rows_of_view = []
        d_cols_of_view = [torch.zeros_like(all_first), torch.zeros_like(all_second)]
        for n, view in enumerate((first, second)):
            rows = view * ctx.scale
            lse, wrong_probability = saved[2 * n], saved[2 * n + 1]
            other_view, same_view = all_views[1 - n], all_views[n]

            d_rows, d_other = softmax_gradients(
                rows, other_view, ctx.offset, lse, no_column_softmax
            )
            d_rows.addcmul_(wrong_probability[:, None], other_view[pairs], value=-1)
            d_other[pairs].addcmul_(wrong_probability[:, None], rows, value=-1)
            d_rows_same, d_same = softmax_gradients(
                rows, same_view, ctx.offset, lse, no_column_softmax
            )

            d_rows_of_view.append((d_rows + d_rows_same) * ctx.scale)
            d_cols_of_view[1 - n] += d_other
            d_cols_of_view[n] += d_same

        # 2. Send the gradients of the gathered columns back to their ranks. Times the number of
        # ranks, because DeepSpeed averages gradients over ranks.
        grad = grad * world_size() / (2 * len(all_first))
        d_first = (d_rows_of_view[0] + reduce_scatter_sum(d_cols_of_view[0])) * grad
        d_second = (d_rows_of_view[1] + reduce_scatter_sum(d_cols_of_view[1])) * grad
        return d_first, d_second, None


class ExpSums(NamedTuple):
    """Running log-sum-exp of k rows or columns: log-sum-exp = largest + log(total)."""

    largest: Tensor  # (k,), the largest logit
    total: Tensor  # (k,), the sum of exp(logit - largest)


class Tile(NamedTuple):
    """A tile of the logits and its position."""

    rows: slice
    cols: slice
    logits: Tensor
    positives: Tensor  # the logits of the tile's matching pairs, a view into `logits`
    first_row: int  # the row of the first positive


def iterate_tiles(rows: Tensor, cols: Tensor, offset: int) -> Iterator[Tile]:
    """Yield the tiles of rows (m, E) @ cols (n, E)^T; row i and column offset + i are a pair.

    All tiles share one buffer. This saves allocations, and `out=` prevents a surrounding autocast
    from computing the logits in bf16.
    """
    height, width = TILE
    buffer = rows.new_empty(min(height, len(rows)) * min(width, len(cols)))
    for top in range(0, len(rows), height):
        for left in range(0, len(cols), width):
            tile_rows, tile_cols = rows[top : top + height], cols[left : left + width]
            out = buffer[: len(tile_rows) * len(tile_cols)].view(len(tile_rows), len(tile_cols))
            logits = torch.mm(tile_rows, tile_cols.t(), out=out)
            diagonal = offset + top - left  # column minus row of a pair, inside the tile
            yield Tile(
                rows=slice(top, top + len(tile_rows)),
                cols=slice(left, left + len(tile_cols)),
                logits=logits,
                positives=logits.diagonal(diagonal),
                first_row=top + max(0, -diagonal),
            )


def sum_negatives(rows: Tensor, cols: Tensor, offset: int) -> tuple[Tensor, ExpSums, ExpSums]:
    """Return the positive logits (m,), and the ExpSums of the other logits by row and by column.

    rows (m, E), cols (n, E); the ExpSums have m and n elements.
    """
    positive = rows.new_empty(len(rows))
    # The smallest finite number and not -inf: for a tile with nothing but a positive, the
    # difference of largest logits would be -inf - -inf = nan.
    smallest = torch.finfo(rows.dtype).min
    by_row = ExpSums(rows.new_full((len(rows),), smallest), rows.new_zeros(len(rows)))
    by_col = ExpSums(rows.new_full((len(cols),), smallest), rows.new_zeros(len(cols)))
    for tile in iterate_tiles(rows, cols, offset):
        positive[tile.first_row : tile.first_row + len(tile.positives)] = tile.positives
        tile.positives.fill_(-torch.inf)
        update_sums(by_row.largest[tile.rows], by_row.total[tile.rows], tile.logits, 1)
        update_sums(by_col.largest[tile.cols], by_col.total[tile.cols], tile.logits, 0)
    return positive, by_row, by_col


def update_sums(largest: Tensor, total: Tensor, logits: Tensor, dim: int) -> None:
    """Add the logits of a tile to the running sums, in place (online log-sum-exp)."""
    new_largest = torch.maximum(largest, logits.amax(dim))
    total.mul_((largest - new_largest).exp_())
    total.add_((logits - new_largest.unsqueeze(dim)).exp_().sum(dim))
    largest.copy_(new_largest)


def loss_and_hits(positive: Tensor, negatives: Tensor, largest: Tensor) -> Tensor:
    """Return [summed loss, number of positives greater than every negative], (2,).

    negatives: log-sum-exp of each positive's negatives. largest: their largest logit. All are (k,).
    """
    return torch.stack([-F.logsigmoid(positive - negatives).sum(), (positive > largest).sum()])


def softmax_gradients(
    rows: Tensor, cols: Tensor, offset: int, row_lse: Tensor, col_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return G @ cols (m, E) and G^T @ rows (n, E).

    G is the softmax by row plus the softmax by column, with zeros for the matching pairs.
    """
    d_rows, d_cols = torch.zeros_like(rows), torch.zeros_like(cols)
    for tile in iterate_tiles(rows, cols, offset):
        tile.positives.fill_(-torch.inf)
        weight = (tile.logits - row_lse[tile.rows, None]).exp_()
        weight += tile.logits.sub_(col_lse[tile.cols]).exp_()
        d_rows[tile.rows].addmm_(weight, cols[tile.cols])
        d_cols[tile.cols].addmm_(weight.t(), rows[tile.rows])
    return d_rows, d_cols
