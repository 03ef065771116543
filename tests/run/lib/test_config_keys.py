"""Config keys are all used, shipped configs load, and errors name the key.

bash run/test.sh tests/run/lib/test_config_keys.py
"""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from glimpse.model.methods import METHODS
from glimpse.run.lib.config import RunConfig, build, load, save

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "run/configs").glob("*.yaml"))
FILES = [path for top in ("data", "model", "run") for path in (ROOT / top).rglob("*.py")]
SOURCES = [path.read_text() for path in FILES]


def keys(cls):
    """Yield (class, field) of a config dataclass and of the dataclasses of its fields."""
    for field, hint in typing.get_type_hints(cls).items():
        yield cls, field
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from keys(inner)


def unread(cls):
    """Return the keys of a config dataclass that no source file reads as an attribute."""

    def is_read(name):
        return any(re.search(rf"\.{name}\b(?!\s*=[^=])", text) for text in SOURCES)

    return [f"{owner.__name__}.{name}" for owner, name in keys(cls) if not is_read(name)]


def test_every_key_is_read():
    assert not unread(RunConfig)
    for method in METHODS.values():
        assert not unread(method.Options)


def test_an_unread_key_would_be_found():
    @dataclasses.dataclass
    class Extra:
        unused_key: int = 0

    assert unread(Extra) == ["Extra.unused_key"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_saves(path, tmp_path):
    cfg = load(path)
    save(cfg, tmp_path / "config.yaml", {"commit": "x"})
    text = path.read_text()
    head = text.split("\nbase:")[0]
    has_command = f"run/configs/{path.name}" in head or "run/quickstart.sh" in head

    assert load(tmp_path / "config.yaml") == cfg
    assert has_command, "the comment at the top has the command"
    assert "Cost" in head, "the comment at the top has the cost"
    assert len(text.splitlines()) <= 30


@pytest.mark.parametrize(
    "override, message",
    [
        ("bacth=64", "did you mean 'batch'"),
        ("model.vision.pol=cls", "did you mean 'pool'"),
        ("batch=many", "batch: 'many'; it must be of type int"),
        ("batch=0", "batch: 0; it must be at least 1"),
        ("batch=.inf", "batch: inf; it must be of type int"),
        ("samples=1e999", "samples: '1e999'; it must be of type int"),
        ("samples=.nan", "samples: nan; it must be of type int"),
        ("method=flop", "method: unknown 'flop'; known: "),
        ("views.image.mask=gausian(0.5)", "gaussian"),
        ("views.image.mask=random(1.0)", "1.0"),
        ("optim.lr=fast", "optim.lr: 'fast'"),
        ("optim.lr=4e-6 per 0", "optim.lr: '4e-6 per 0' is per batch of 0; use a batch size of"),
        ("optim.lr=-1e-3", "optim.lr: '-1e-3' is negative or infinite; use a positive number"),
        ("optim.lr=1e999", "optim.lr: '1e999' is negative or infinite"),
        ("optim.no_decay=[biases]", "unknown 'biases'"),
        ("model.size=B/15", "B/15"),
        ("data.max_bad=2", "data.max_bad: 2.0"),
        ("seed", "write key=value"),
        ("batch.x=1", "batch is a value"),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(ROOT / "run/configs/quickstart.yaml", [override])


def test_units_and_rates():
    flip = load(ROOT / "run/configs/flip_h14.yaml")
    flip_unmask = load(ROOT / "run/configs/flip_unmask_l16.yaml")
    clip = load(ROOT / "run/configs/clip_b16.yaml")

    assert flip.samples == 12_800_000_000
    assert flip.optim.warmup == 256_000_000
    # the values in FLIP's released configs
    assert flip.optim.peak_lr(flip.batch) == pytest.approx(1.024e-3)
    assert flip_unmask.optim.peak_lr(65536) == pytest.approx(1.024e-5)
    assert clip.optim.peak_lr(4096) == 5e-4


def test_missing_key():
    with pytest.raises(ValueError, match="run: missing"):
        build(RunConfig, {})
