"""What a new run starts from: the model that `init` names, and the tower that a method borrows;
whether they fit is told beforehand.

    put = beginning(cfg.init, tokenizer.fingerprint)
    put(method)         before DeepSpeed wraps it, and once more when that has made fp32 copies
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from glimpse.model.portable import is_one
from glimpse.model.towers import ModelConfig
from glimpse.run.lib.config import build, merge, plain
from glimpse.run.lib.distributed import told
from glimpse.run.train.checkpoint import differences, manifest
from glimpse.run.train.engine import has_copy
from glimpse.run.train.load_model import TOWERS, find, load, provenance, said


def beginning(init: str, vocabulary: str) -> Callable[[torch.nn.Module], None]:
    """What puts into a method the weights that a new run starts from: those of the model `init`,
    and what it borrows from another.

    Called again it writes what has an fp32 copy by then, from the same files: a run that still goes
    on may have newer ones.
    """
    places: list[tuple[Path, dict[str, str], str | None]] = []

    def put(method: torch.nn.Module) -> None:
        parameters, again = dict(method.named_parameters()), bool(places)
        if not again:
            places.extend(found_places(method, init, vocabulary))
        for path, names, under in places:
            if chosen := {
                name: stored
                for name, stored in names.items()
                if not again or has_copy(parameters[name])
            }:
                load(method, path, chosen, None if again else under)

    return put


def found_places(
    method: torch.nn.Module, init: str, vocabulary: str
) -> Iterator[tuple[Path, dict[str, str], str | None]]:
    """Where the weights lie that a run starts from, as the arguments of `load`.

    Rank 0 alone looks for checkpoints and checks them: to many ranks a run that still goes on may
    look unlike.
    """
    names = [name for name, _ in method.named_parameters()]
    if init:
        path, under = told(
            lambda: found_for("init", init, check_start, method.cfg, vocabulary)
        ).split("\n")
        yield Path(path), {name: name for name in names if name.startswith(under)}, under
    for prefix, run in method.borrowed().items():
        path, _ = told(
            lambda run=run: found_for("options.teacher", run, check_tower, method.cfg)
        ).split("\n")
        yield (
            Path(path),
            {name: TOWERS + name.removeprefix(prefix) for name in names if name.startswith(prefix)},
            None,
        )


def found_for(key: str, given: str, check: Callable[..., str], *wanted) -> str:
    """What lies there, and on a second line what the check answers; ValueError naming the key
    otherwise.
    """
    try:
        path = find(Path(given))
        return f"{path}\n{check(path, *wanted)}"
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def check_start(path: Path, cfg: ModelConfig, vocabulary: str) -> str:
    """Under which names the weights lie that a run can start from: the towers, or the vision tower
    where there is no other.
    """
    if is_one(path):
        known = provenance(path)
        if not known["vocab"]:
            return check_tower(path, cfg)
        fingerprint = known["fingerprint"]
    else:
        fingerprint = manifest(path)["identity"]["tokenizer"]
    if fingerprint != vocabulary:
        raise ValueError(
            f"{path} was trained with tokenizer {fingerprint}, this config's data.tokenizer is"
            f" {vocabulary}; use its own"
        )
    check_alike(path, cfg, "use the model's own architecture")
    return TOWERS


def check_tower(path: Path, cfg: ModelConfig) -> str:
    """ValueError naming the first thing in which a vision tower computes its patch tokens otherwise
    than the config's.
    """
    check_alike(path, cfg, "a borrowed tower must be the same", vision_only=True)
    return f"{TOWERS}vision."


def check_alike(path: Path, cfg: ModelConfig, advice: str, vision_only: bool = False) -> None:
    """ValueError naming the first thing in which the model there computes its tokens otherwise than
    the config's.
    """
    theirs = said(path)["model"] if is_one(path) else manifest(path)["identity"]["model"]
    theirs = build(ModelConfig, merge({}, theirs), "model.")

    def computes(model: ModelConfig) -> dict:
        shape, vision = asdict(model.shape), asdict(model.vision)
        del vision["pool"], vision["freeze_patch"]
        if vision_only:
            shape = {key: shape[key] for key in ("width", "depth", "heads", "mlp")}
        return dict(
            shape=shape,
            patch=model.patch,
            grid=model.grid,
            vision=vision,
            text=None if vision_only else asdict(model.text),
        )

    for where, was, now in differences(plain(computes(theirs)), plain(computes(cfg)), "model"):
        if where in ("model.grid", "model.patch"):
            sides = " ".join(map(str, dict.fromkeys(cfg.sides)))
            advice = (
                f"python run/convert.py glimpse {path} OUT --patch {cfg.patch} --image-size {sides}"
                " makes one that fits"
            )
        raise ValueError(
            f"{path} was trained with {where}: {was!r}, this config says {now!r}; {advice}"
        )
