"""Contrastive losses: the exact InfoNCE of the global batch, over all ranks, in tiles.

Letters: `b` pairs on this rank, `B` = b x ranks, `E` embedding width, `m` rows, `n` columns; S = scale * image @ text^T.
A rank owns the block of its b rows against all B columns and walks it tile by tile, forward and (computed again) backward: nothing of size
b x B is ever stored. Rows are complete on one rank; columns are partial sums that two all-reduces of B numbers complete.
A pair's own logit (its positive) is kept out of the sums: with margin = positive - log-sum-exp(negatives), a row's probability is
sigmoid(margin), and loss and gradients stay accurate where it is nearly 1 and `lse - positive` would cancel.
To extend: `_negatives` and `_gradients` know nothing of ranks or of the loss. Another softmax over blocks (NT-Xent: view 1 against
view 2 and against itself, whose diagonal is already kept out) merges the blocks' (largest, total) and calls `_gradients` on each
block with the merged sums; an infinite `row_lse` or `col_lse` switches that direction off.
"""
import weakref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Rows x columns of a tile: 8 MiB of fp32 logits. Forward + backward of B 4096, E 512 on 2 CPU cores, ns a logit: 256x512 18.9,
# 512x512 17.4, 1024x1024 16.7, 1024x2048 16.6, 2048x4096 18.4, 4096x4096 22.1 (dense 29.5): beyond it, exp and sums leave the cache.
# Not measured on a GPU: a tile is 2 GFLOP for about ten kernel launches, near break-even, so that smaller ones would wait for launches.
TILE = (1024, 2048)

# torch 2.13 renamed these two and deprecated the names that 2.11 knows
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_agreed = weakref.WeakKeyDictionary()  # process group -> the b all its ranks brought to the first step


def contrastive(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """image (b, E), text (b, E), scale (1,) -> (loss (), {"accuracy": ()}), the same numbers on every rank.

    The loss is the mean over the B pairs and both directions, in fp32 (fp64 stays fp64). Its gradients are those of the global mean loss
    times the number of ranks: DeepSpeed averages parameter gradients over ranks, and so applies the exact gradient (a full matrix on every
    rank, own slice re-inserted, would apply exact / ranks; local rows against detached columns only the query-side half).
    Accuracy: the share of pairs whose logit beats every other of its row, averaged with that of its column; a tie is a miss.
    """
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)}: both must be (b, E), b > 0, one row a pair")
    if scale.shape != (1,):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, must be (1,)")
    _check_batch(image)
    kind = torch.promote_types(image.dtype, torch.float32)
    loss, accuracy = _Contrastive.apply(image.to(kind), text.to(kind), scale.to(kind))
    return loss, {"accuracy": accuracy}


def dense_contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The same loss with its B x B matrix, for one process: what the tests and the benchmark compare with. (B, E), (B, E), (1,) -> ()."""
    logits = scale * image @ text.t()
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale):
        ctx.first = len(image) * _rank()
        rows, cols = image * scale, _gather(text)
        own, B = slice(ctx.first, ctx.first + len(image)), len(cols)
        positive, by_row, by_col = _negatives(rows, cols, ctx.first)
        row_neg = by_row[0] + by_row[1].log()
        peak = _all_reduce(by_col[0].clone(), dist.ReduceOp.MAX)
        positives = torch.zeros_like(peak)
        positives[own] = positive
        message = torch.cat([by_col[1] * (by_col[0] - peak).exp(), positives, _score(positive, row_neg, by_row[0])])
        col_sum, positives, rows_score = _all_reduce(message, dist.ReduceOp.SUM).split([B, B, 2])
        col_neg = peak + col_sum.log()
        loss, accuracy = (x.clone() for x in (rows_score + _score(positives, col_neg, peak)) / (2 * B))  # no views: `loss *= 2` may follow
        pull = (row_neg - positive).sigmoid() + (col_neg - positives)[own].sigmoid()
        row_lse, col_lse = torch.logaddexp(row_neg, positive), torch.logaddexp(col_neg, positives)
        ctx.save_for_backward(image, scale, cols, row_lse, col_lse, pull)
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        image, scale, cols, row_lse, col_lse, pull = ctx.saved_tensors
        rows, own = image * scale, slice(ctx.first, ctx.first + len(image))
        d_rows, d_cols = _gradients(rows, cols, ctx.first, row_lse, col_lse)
        d_rows.addcmul_(pull[:, None], cols[own], value=-1)
        d_cols[own].addcmul_(pull[:, None], rows, value=-1)
        grad = grad * _world() / (2 * len(cols))  # x ranks: DeepSpeed averages
        d_scale = (d_rows * image).sum() * grad  # sum(G * image @ text^T): this rank's share of it
        return d_rows.mul_(grad * scale), _scatter_sum(d_cols).mul_(grad), d_scale.reshape(1)


def _tiles(rows, cols, first):
    """Walk rows (m, E) @ cols (n, E)^T: yield (row slice, column slice, tile, its pairs' logits (a view into the tile), their first row).

    Row i's pair is column first + i. `out=` spares allocations, and keeps a surrounding autocast from computing the logits in bf16.
    """
    height, width = TILE
    space = rows.new_empty(min(height, len(rows)) * min(width, len(cols)))
    for top in range(0, len(rows), height):
        for left in range(0, len(cols), width):
            x, y = rows[top : top + height], cols[left : left + width]
            tile = torch.mm(x, y.t(), out=space[: len(x) * len(y)].view(len(x), len(y)))
            shift = first + top - left  # a pair's column less its row, inside the tile
            yield slice(top, top + len(x)), slice(left, left + len(y)), tile, tile.diagonal(shift), top + max(0, -shift)


def _negatives(rows, cols, first):
    """rows (m, E), cols (n, E) -> positive (m,), (largest, total) of the other logits by row (m,), the same by column (n,)."""
    positive = rows.new_empty(len(rows))
    # The least finite number, not -inf: a tile that holds nothing but a pair would compute -inf - -inf
    by_row, by_col = ((rows.new_full((k,), torch.finfo(rows.dtype).min), rows.new_zeros(k)) for k in (len(rows), len(cols)))
    for r, c, tile, pairs, at in _tiles(rows, cols, first):
        positive[at : at + len(pairs)] = pairs
        pairs.fill_(-torch.inf)
        _fold(by_row[0][r], by_row[1][r], tile, 1)
        _fold(by_col[0][c], by_col[1][c], tile, 0)
    return positive, by_row, by_col


def _fold(largest, total, tile, dim):
    """Online log-sum-exp, in place: take the tile into `largest` and into `total`, the sum of exp(logit - largest) so far."""
    new = torch.maximum(largest, tile.amax(dim))
    total.mul_((largest - new).exp_()).add_((tile - new.unsqueeze(dim)).exp_().sum(dim))
    largest.copy_(new)


def _score(positive, negatives, largest):
    """Positive logits, their negatives' log-sum-exp and largest, all (k,) -> [summed loss, pairs that win] (2,)."""
    return torch.stack([-F.logsigmoid(positive - negatives).sum(), (positive > largest).sum()])


def _gradients(rows, cols, first, row_lse, col_lse):
    """G = softmax by row + softmax by column of the pairs that do not belong together -> G @ cols (m, E), G^T @ rows (n, E)."""
    d_rows, d_cols = torch.zeros_like(rows), torch.zeros_like(cols)
    for r, c, tile, pairs, _ in _tiles(rows, cols, first):
        pairs.fill_(-torch.inf)
        weight = (tile - row_lse[r, None]).exp_()
        weight += tile.sub_(col_lse[c]).exp_()
        d_rows[r].addmm_(weight, cols[c])
        d_cols[c].addmm_(weight.t(), rows[r])
    return d_rows, d_cols


def _check_batch(image):
    """Refuse ranks with unequal batches: they would hang or corrupt the collectives.

    The sizes are compared over ranks once, at the first step; afterwards each rank holds its own to that number, with no communication.
    """
    if _world() == 1:
        return
    b, group = len(image), dist.group.WORLD
    if group not in _agreed:
        sizes = _gather(torch.tensor([b], device=image.device)).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(f"local batches {sizes} differ over the ranks: the contrastive loss needs the same number on every rank")
        _agreed[group] = b
    if b != _agreed[group]:
        raise ValueError(f"local batch {b} on rank {_rank()}, {_agreed[group]} at the first step: bring that number at every step")


def _world():
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(x):
    """x (k, ...) on each rank -> (k x ranks, ...), in rank order."""
    if _world() == 1:
        return x
    out = x.new_empty(len(x) * _world(), *x.shape[1:])
    _all_gather(out, x.contiguous())  # NCCL refuses any other
    return out


def _scatter_sum(x):
    """x (k x ranks, ...) on each rank -> this rank's (k, ...) of the sum over ranks."""
    if _world() == 1:
        return x
    out = x.new_empty(len(x) // _world(), *x.shape[1:])
    _reduce_scatter(out, x)
    return out


def _all_reduce(x, op):
    if _world() > 1:
        dist.all_reduce(x, op)
    return x
