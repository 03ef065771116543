"""Test what pictures need from a tower: attention, other resolutions, and the pooled tokens only.

Run: pytest tests/run/reports/test_pictures.py
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from glimpse.data.shards import Shards, build_index, write_shard
from glimpse.model.layers import AttentionRecorder, PackedSequences
from glimpse.model.text import TextTower
from glimpse.model.vision import resize_positions
from glimpse.run.reports.pictures import read_examples
from glimpse.tests.helpers.tiny import picture
from glimpse.tests.model.test_towers import FLAVOURS, captions, everywhere, small


def block_inputs(
    text: TextTower, ids: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, PackedSequences]:
    """Return inputs with which the blocks compute all tokens, not only the pooled ones."""
    packed = PackedSequences(lengths, len(ids), None, text.cfg.causal)
    return text.token(ids) + text.positions[packed.positions], packed


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_last_block_for_the_pooled_tokens_alone(flavour):
    """Computing only the pooled tokens gives the values and gradients of computing all tokens."""
    towers = small(flavour).double()
    patches = torch.randn(2, 16, 192).double()
    ids, lengths = captions()

    results = []
    for pooled_only in (True, False):
        towers.zero_grad()
        image = towers.vision(patches, everywhere(2), only_cls=pooled_only)[:, 0]
        if pooled_only:
            text = towers.text(ids, lengths)
        else:
            x, packed = block_inputs(towers.text, ids, lengths)
            pooled = packed.last_token if flavour == "clip" else packed.first_token
            text = towers.text.norm(towers.text.blocks(x, packed)[pooled])
        (image.sin().sum() + text.sin().sum()).backward()
        parameters = [*towers.vision.parameters(), *towers.text.parameters()]
        results.append([image, text, *(p.grad for p in parameters)])

    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layers", [1, 4])
def test_attention_of_the_class_token(layers):
    """The recorded attention equals that of the full attention matrix, block by block.

    Recording it does not change the tokens.
    """
    vision = small("clip").vision
    patches = torch.randn(3, 16, 192)
    recorder = AttentionRecorder()

    tokens = vision(patches, everywhere(3), recorder=recorder)

    torch.testing.assert_close(tokens, vision(patches, everywhere(3)))
    assert len(recorder.layers) == 4
    assert recorder.layers[0].shape == (3, 17)

    cls = (vision.cls + vision.positions[0]).expand(3, 1, -1)
    x = vision.patch(patches) + vision.positions[1:]
    x = vision.pre_norm(torch.cat([cls, x], 1))
    for block, attention in zip(list(vision.blocks)[:layers], recorder.layers):
        qkv = block.attn.qkv(block.norm1(x))
        q, k, _ = qkv.unflatten(2, (3, 4, 32)).permute(2, 0, 3, 1, 4)
        matrix = (q @ k.transpose(2, 3) / 32**0.5).softmax(3)
        torch.testing.assert_close(attention, matrix.mean(1)[:, 0])
        torch.testing.assert_close(attention.sum(1), torch.ones(3))
        x = block(x)


def test_attention_of_the_class_token_without_other_outputs():
    vision = small("clip").vision
    patches = torch.randn(2, 16, 192)
    cls_recorder = AttentionRecorder()
    full_recorder = AttentionRecorder()

    cls = vision(patches, everywhere(2), only_cls=True, recorder=cls_recorder)
    tokens = vision(patches, everywhere(2), recorder=full_recorder)

    torch.testing.assert_close(cls, tokens[:, :1])
    for a, b in zip(cls_recorder.layers, full_recorder.layers, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_another_resolution(flavour):
    """Positions of a 2 x 2 grid are interpolated from those of the tower's 4 x 4 grid."""
    vision = small(flavour).vision
    patches = torch.randn(1, 4, 192)
    table = vision.positions[1:] if flavour == "clip" else vision.positions

    tokens = vision(patches, torch.arange(4)[None], grid=(2, 2))

    interpolated = F.interpolate(table.T.reshape(1, -1, 4, 4), (2, 2), mode="bicubic")
    with torch.no_grad():
        table[:4] = interpolated.reshape(-1, 4).T
    torch.testing.assert_close(tokens, vision(patches, torch.arange(4)[None]))
    assert resize_positions(table, (4, 4), (2, 3)).shape == (6, 128)


def test_examples_leave_out_what_cannot_be_read(tmp_path):
    """A broken image among the examples must not end a run."""
    pictures = [picture("red circle", np.random.default_rng(i)) for i in range(3)]
    samples = []
    for i, png in enumerate(pictures):
        samples.append((f"{i}", {"png": png, "txt": b"a red circle"}))
    samples.append(("broken", {"png": pictures[0][:60], "txt": b"x"}))
    write_shard(tmp_path / "0.tar", samples)

    images, captions = read_examples(Shards([tmp_path]), 4)

    assert images == pictures
    assert captions == ["a red circle"] * 3

    write_shard(tmp_path / "0.tar", [("broken", {"png": b"x", "txt": b"x"})])
    build_index(tmp_path)

    assert read_examples(Shards([tmp_path]), 4) is None
