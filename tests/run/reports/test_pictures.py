"""What methods ask of a tower beyond its tokens: the class token's attention, another resolution,
and the pooled tokens alone.

Run: pytest tests/run/reports/test_pictures.py
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from glimpse.data.shards import Shards, build_index, write_shard
from glimpse.model.layers import Packed, Watch
from glimpse.model.vision import resized
from glimpse.run.reports.pictures import examples
from glimpse.tests.helpers.tiny import picture
from glimpse.tests.model.test_towers import FLAVOURS, captions, everywhere, small


def whole_captions(text, ids, lengths):
    """What the blocks are given, so that they return every token and not the pooled ones alone."""
    packed = Packed(lengths, len(ids), None, text.cfg.causal)
    return text.token(ids) + text.positions[packed.positions], packed


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_last_block_for_the_pooled_tokens_alone(flavour):
    """The short cut of both towers equals all tokens, values and gradients."""
    towers, patches, (ids, lengths) = (
        small(flavour).double(),
        torch.randn(2, 16, 192).double(),
        captions(),
    )
    grads = []
    for short in (True, False):
        towers.zero_grad()
        image = towers.vision(patches, everywhere(2), only_cls=short)[:, 0]
        if short:
            text = towers.text(ids, lengths)
        else:
            x, packed = whole_captions(towers.text, ids, lengths)
            text = towers.text.norm(
                towers.text.blocks(x, packed)[packed.last if flavour == "clip" else packed.first]
            )
        (image.sin().sum() + text.sin().sum()).backward()
        grads.append(
            [
                image,
                text,
                *(p.grad for p in (*towers.vision.parameters(), *towers.text.parameters())),
            ]
        )
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layers", [1, 4])
def test_attention_of_the_class_token(layers):
    """Against the whole attention matrix, from the weights, block by block; the tokens are
    unchanged by being watched.
    """
    vision, patches, watch = small("clip").vision, torch.randn(3, 16, 192), Watch()
    tokens = vision(patches, everywhere(3), watch=watch)
    torch.testing.assert_close(tokens, vision(patches, everywhere(3)))
    assert len(watch.layers) == 4 and watch.layers[0].shape == (3, 17)
    x = vision.patch(patches) + vision.positions[1:]
    x = vision.pre_norm(torch.cat([(vision.cls + vision.positions[0]).expand(3, 1, -1), x], 1))
    for block, found in zip(list(vision.blocks)[:layers], watch.layers):
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 4, 32)).permute(2, 0, 3, 1, 4)
        whole = (q @ k.transpose(2, 3) / 32**0.5).softmax(3)
        torch.testing.assert_close(found, whole.mean(1)[:, 0])
        torch.testing.assert_close(found.sum(1), torch.ones(3))
        x = block(x)


def test_watching_the_class_token_alone():
    vision, patches, few, all_ = small("clip").vision, torch.randn(2, 16, 192), Watch(), Watch()
    short = vision(patches, everywhere(2), only_cls=True, watch=few)
    torch.testing.assert_close(short, vision(patches, everywhere(2), watch=all_)[:, :1])
    for a, b in zip(few.layers, all_.layers, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_another_resolution(flavour):
    """Positions of a 2 x 2 grid are those of the 4 x 4 one, interpolated; the own grid's are left
    alone.
    """
    vision, patches = small(flavour).vision, torch.randn(1, 4, 192)
    table = vision.positions[1:] if flavour == "clip" else vision.positions
    made = vision(patches, torch.arange(4)[None], grid=(2, 2))
    table_there = (
        F.interpolate(table.T.reshape(1, -1, 4, 4), (2, 2), mode="bicubic").reshape(-1, 4).T
    )
    with torch.no_grad():
        table[:4] = table_there
    torch.testing.assert_close(made, vision(patches, torch.arange(4)[None]))
    assert resized(table, (4, 4), (2, 3)).shape == (6, 128)


def test_examples_leave_out_what_cannot_be_read(tmp_path):
    """A broken picture among those chosen for the pictures of a run must not end it."""
    good = [
        (f"{i}", {"png": picture("red circle", np.random.default_rng(i)), "txt": b"a red circle"})
        for i in range(3)
    ]
    write_shard(
        tmp_path / "0.tar", [*good, ("broken", {"png": good[0][1]["png"][:60], "txt": b"x"})]
    )
    images, captions = examples(Shards([tmp_path]), 4)
    assert images == [parts["png"] for _, parts in good] and captions == ["a red circle"] * 3
    write_shard(tmp_path / "0.tar", [("broken", {"png": b"x", "txt": b"x"})])
    build_index(tmp_path)
    assert examples(Shards([tmp_path]), 4) is None
