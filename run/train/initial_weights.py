"""The weights that a new run starts from.

They are those of the model at `init`, and of the tower that a method borrows; both are checked
before they are loaded.

    put = beginning(cfg.init, tokenizer.fingerprint)
    put(method)         before deepspeed.initialize, and again after it, for the fp32 master copies
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from glimpse.model.methods import Method
from glimpse.model.portable import is_one
from glimpse.model.towers import ModelConfig
from glimpse.run.lib.config import build, merge, tuples_to_lists
from glimpse.run.lib.distributed import broadcast_from_rank0
from glimpse.run.train.checkpoint import differences, read_manifest
from glimpse.run.train.engine import has_fp32_copy
from glimpse.run.train.load_model import (
    TOWERS,
    find_model,
    load_weights,
    read_portable_config,
    read_provenance,
)

# The arguments of `load`: a checkpoint or converted model, {parameter: its name there}, and the
# prefix of the names there that must all be used.
WeightSource = tuple[Path, dict[str, str], str | None]


def init_weights(init: str, vocabulary: str) -> Callable[[Method], None]:
    """Return a function that loads the weights that a new run starts from into a method.

    The second call, after deepspeed.initialize, writes the fp32 master copies. It reads the same
    checkpoint as the first call, even if the source run has saved a newer one since.
    """
    places: list[WeightSource] = []

    def put(method: Method) -> None:
        if not places:
            places.extend(weight_sources(method, init, vocabulary))
            for path, names, under in places:
                if names:
                    load_weights(method, path, names, under)
            return

        parameters = dict(method.named_parameters())
        for path, names, _ in places:
            master_copies = {
                name: stored for name, stored in names.items() if has_fp32_copy(parameters[name])
            }
            if master_copies:
                load_weights(method, path, master_copies, None)

    return put


def weight_sources(method: Method, init: str, vocabulary: str) -> Iterator[WeightSource]:
    """Yield the places of the weights that a run starts from, as the arguments of `load`.

    Rank 0 alone looks for checkpoints and checks them: a run that is still being trained may look
    different to each rank.
    """
    names = [name for name, _ in method.named_parameters()]
    if init:
        start = partial(find_source, "init", init, check_init_source, method.cfg, vocabulary)
        path, under = broadcast_from_rank0(start).split("\n")
        yield Path(path), {name: name for name in names if name.startswith(under)}, under

    for prefix, run in method.teacher_checkpoint().items():
        tower = partial(find_source, "options.teacher", run, check_vision_tower, method.cfg)
        path, _under = broadcast_from_rank0(tower).split("\n")
        stored = {
            name: TOWERS + name.removeprefix(prefix) for name in names if name.startswith(prefix)
        }
        yield Path(path), stored, None


def find_source(key: str, source: str, check: Callable[..., str], *expected) -> str:
    """Return the path of a model, and on a second line the result of check(path, *expected).

    Raises ValueError naming the key if there is no model, or it is refused.
    """
    try:
        path = find_model(Path(source))
        under = check(path, *expected)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return f"{path}\n{under}"


def check_init_source(path: Path, cfg: ModelConfig, vocabulary: str) -> str:
    """Return the prefix of the weights that a run can start from.

    The towers, or the vision tower if there is no other.
    """
    if is_one(path):
        source = read_provenance(path)
        if not source["vocab"]:
            return check_vision_tower(path, cfg)
        fingerprint = source["fingerprint"]
    else:
        fingerprint = read_manifest(path)["identity"]["tokenizer"]
    if fingerprint != vocabulary:
        raise ValueError(
            f"{path} was trained with tokenizer {fingerprint}, this config's data.tokenizer is"
            f" {vocabulary}; use its own"
        )
    check_architecture(path, cfg, "use the model's own architecture")
    return TOWERS


def check_vision_tower(path: Path, cfg: ModelConfig) -> str:
    """Return the prefix of a vision tower.

    Raises ValueError naming the first thing in which its patch tokens differ from the config's.
    """
    check_architecture(path, cfg, "a borrowed tower must be the same", vision_only=True)
    return f"{TOWERS}vision."


def check_architecture(
    path: Path, cfg: ModelConfig, advice: str, vision_only: bool = False
) -> None:
    """Raise ValueError naming the first thing in which the model's tokens differ."""
    tree = (
        read_portable_config(path)["model"]
        if is_one(path)
        else read_manifest(path)["identity"]["model"]
    )
    model = build(ModelConfig, merge({}, tree), "model.")
    stored_settings = tuples_to_lists(architecture_settings(model, vision_only))
    config_settings = tuples_to_lists(architecture_settings(cfg, vision_only))
    for where, was, now in differences(stored_settings, config_settings, "model"):
        if where in ("model.grid", "model.patch"):
            sides = " ".join(map(str, dict.fromkeys(cfg.sides)))
            advice = (
                f"python run/convert.py glimpse {path} OUT --patch {cfg.patch} --image-size {sides}"
                " makes one that fits"
            )
        raise ValueError(
            f"{path} was trained with {where}: {was!r}, this config says {now!r}; {advice}"
        )


def architecture_settings(model: ModelConfig, vision_only: bool) -> dict:
    """Return the settings that a model's tokens depend on; vision_only: its patch tokens alone."""
    shape = asdict(model.shape)
    vision = asdict(model.vision)
    del vision["pool"], vision["freeze_patch"]
    if vision_only:
        shape = {key: shape[key] for key in ("width", "depth", "heads", "mlp")}
    text = None if vision_only else asdict(model.text)
    return dict(shape=shape, patch=model.patch, grid=model.grid, vision=vision, text=text)
