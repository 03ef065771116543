"""Readers: small transformers over text that look at an image's patch tokens; put on a trained
tower for captions and for answers.

Letters: B samples, K tokens of an image, N tokens of the longest text, D width of the image's
tokens, V vocabulary.
Row 0 of a vocabulary is the pad, which stands after a text's end.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glimpse.model.layers import Embedding, Linear, normal_parameter

PAD = 0


class TextDecoder(nn.Module):
    """Text tokens that attend each other (causal: those before them), then the image, layer after
    layer; pre-norm, no dropout.

    forward: ids (B, N) int64, image tokens (B, K, D) -> (B, N, width). Places in text and image are
    learned: of an image's tokens the tower may have kept little of where they were.
    """

    def __init__(
        self,
        vocab: int,
        context: int,
        image: tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        causal: bool,
    ):
        """image: K and D."""
        super().__init__()
        self.causal = causal
        self.token, self.positions = (
            Embedding(vocab, width, 0.02),
            normal_parameter(context, width, std=0.02),
        )
        self.image, self.places = (
            Linear(image[1], width, "xavier"),
            normal_parameter(image[0], width, std=0.02),
        )
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, depth, nn.LayerNorm(width))

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        x = self.token(ids) + self.positions[: ids.shape[1]]
        image = self.image(image) + self.places
        if self.causal:  # what is before a token is no pad
            later = torch.ones(
                ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device
            ).triu(1)
            return self.layers(x, image, tgt_mask=later)
        return self.layers(x, image, tgt_key_padding_mask=ids == PAD)


class Captioner(nn.Module):
    """A causal reader that says the next token: ids (B, N), image (B, K, D) -> logits (B, N, V), by
    the token embedding transposed.
    """

    def __init__(
        self, vocab: int, context: int, image: tuple[int, int], width: int, depth: int, heads: int
    ):
        super().__init__()
        self.reader, self.context = (
            TextDecoder(vocab, context, image, width, depth, heads, causal=True),
            context,
        )

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        return F.linear(self.reader(ids, image), self.reader.token.weight)

    @torch.no_grad()
    def greedy(self, image: Tensor, start: int) -> Tensor:
        """(B, K, D) -> (B, context) ids: after `start`, the likeliest token each time; from the end
        on, pads.
        """
        ids = torch.full((len(image), 1), start, device=image.device)
        going = torch.ones(len(image), dtype=torch.bool, device=image.device)
        for _ in range(self.context):
            likeliest = (
                F.linear(self.reader(ids, image)[:, -1], self.reader.token.weight).argmax(1) * going
            )
            ids, going = torch.cat([ids, likeliest[:, None]], dim=1), going & (likeliest != PAD)
            if not going.any():
                break
        return F.pad(ids[:, 1:], (0, self.context + 1 - ids.shape[1]), value=PAD)


class Answerer(nn.Module):
    """A reader of questions whose first token becomes the answer: ids (B, N), image (B, K, D) ->
    logits (B, answers).
    """

    def __init__(
        self,
        vocab: int,
        context: int,
        image: tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        answers: int,
    ):
        super().__init__()
        self.reader, self.answer = (
            TextDecoder(vocab, context, image, width, depth, heads, causal=False),
            Linear(width, answers, "xavier"),
        )
        # as unlikely as one of so many: else the first steps learn that alone
        nn.init.constant_(self.answer.bias, -math.log(answers))

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        return self.answer(self.reader(ids, image)[:, 0])


class DecoderWithTower(nn.Module):
    """A reader and the tower by which it sees, to be trained together: ids (B, N), patches (B, L, 3
    P P) at (B, L) -> logits.
    """

    def __init__(self, vision: nn.Module, reader: nn.Module):
        super().__init__()
        self.vision, self.reader = vision, reader

    def forward(self, ids: Tensor, patches: Tensor, positions: Tensor) -> Tensor:
        return self.reader(ids, self.vision(patches, positions))
