"""Load the weights that a new run starts from.

They come from the model at `init`, and from the checkpoint of an earlier run that some methods use
as a teacher (options.teacher). Both are checked before any weights are loaded.

    load = init_weights(cfg.init, tokenizer.fingerprint)
    load(method)        before deepspeed.initialize, and again after it for the fp32 master copies
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from glimpse.model.methods import Method
from glimpse.model.portable import is_glimpse_folder
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

# Arguments of load_weights(): the path of a model, {parameter: its name there}, and the prefix
# under which no name there may be left over.
WeightSource = tuple[Path, dict[str, str], str | None]


def init_weights(init: str, vocabulary: str) -> Callable[[Method], None]:
    """Return a function that loads the weights that a new run starts from into a method.

    The second call, after deepspeed.initialize, writes the fp32 master copies. It reads the same
    checkpoint as the first call, even if the source run has saved a newer one since.

    init: the config's `init`. vocabulary: the fingerprint of the config's tokenizer.
    """
    sources: list[WeightSource] = []

    def load(method: Method) -> None:
        # First call: find the sources, and load all of their weights.
        if not sources:
            sources.extend(weight_sources(method, init, vocabulary))
            for path, names, required_prefix in sources:
                if names:
                    load_weights(method, path, names, required_prefix)
            return

        # Second call: only the parameters that DeepSpeed made fp32 copies of.
        parameters = dict(method.named_parameters())
        for path, names, _ in sources:
            trained_names = {
                name: stored_name
                for name, stored_name in names.items()
                if has_fp32_copy(parameters[name])
            }
            if trained_names:
                load_weights(method, path, trained_names, None)

    return load


def weight_sources(method: Method, init: str, vocabulary: str) -> Iterator[WeightSource]:
    """Yield the models that a run's initial weights come from.

    Only rank 0 looks for checkpoints: while the source run is still training, other ranks could
    find a newer one.
    """
    names = [name for name, _ in method.named_parameters()]
    if init:
        find = partial(find_source, "init", init, check_init_source, method.cfg, vocabulary)
        path, prefix = broadcast_from_rank0(find).split("\n")
        yield Path(path), {name: name for name in names if name.startswith(prefix)}, prefix

    for prefix, run in method.teacher_checkpoint().items():
        find = partial(find_source, "options.teacher", run, check_vision_tower, method.cfg)
        path, _prefix = broadcast_from_rank0(find).split("\n")
        stored_names = {
            name: TOWERS + name.removeprefix(prefix) for name in names if name.startswith(prefix)
        }
        yield Path(path), stored_names, None


def find_source(key: str, source: str, check: Callable[..., str], *expected) -> str:
    """Return the path of a model and, on a second line, the result of check(path, *expected).

    One string, because broadcast_from_rank0 sends a string. Raises ValueError that starts with the
    config key if there is no model or the check fails.
    """
    try:
        path = find_model(Path(source))
        prefix = check(path, *expected)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return f"{path}\n{prefix}"


def check_init_source(path: Path, cfg: ModelConfig, vocabulary: str) -> str:
    """Return the prefix of the weights that a run can start from.

    That is both towers, or the vision tower if the model has no text tower. Raises ValueError if
    the vocabulary or the architecture differs from the config's.
    """
    if is_glimpse_folder(path):
        provenance = read_provenance(path)
        if not provenance["vocab"]:
            return check_vision_tower(path, cfg)
        fingerprint = provenance["fingerprint"]
    else:
        fingerprint = read_manifest(path)["identity"]["tokenizer"]
    if fingerprint != vocabulary:
        raise ValueError(
            f"{path} was trained with tokenizer {fingerprint}, but this config's data.tokenizer is"
            f" {vocabulary}; use the model's own tokenizer"
        )
    check_architecture(path, cfg, "use the model's own architecture")
    return TOWERS


def check_vision_tower(path: Path, cfg: ModelConfig) -> str:
    """Return the prefix of the vision tower's weights.

    Raises ValueError with the first setting in which the vision tower differs from the config's.
    """
    advice = "both vision towers must have the same architecture"
    check_architecture(path, cfg, advice, vision_only=True)
    return f"{TOWERS}vision."


def check_architecture(
    path: Path, cfg: ModelConfig, advice: str, vision_only: bool = False
) -> None:
    """Raise ValueError with the first architecture setting in which a model differs from cfg."""
    if is_glimpse_folder(path):
        tree = read_portable_config(path)["model"]
    else:
        tree = read_manifest(path)["identity"]["model"]
    model = build(ModelConfig, merge({}, tree), "model.")
    stored_settings = tuples_to_lists(architecture_settings(model, vision_only))
    config_settings = tuples_to_lists(architecture_settings(cfg, vision_only))
    for key, stored, current in differences(stored_settings, config_settings, "model"):
        if key in ("model.grid", "model.patch"):
            sides = " ".join(map(str, dict.fromkeys(cfg.image_shape)))
            advice = (
                f"python run/convert.py glimpse {path} OUT --patch {cfg.patch_size}"
                f" --image-size {sides}"
                " writes a model that fits"
            )
        raise ValueError(
            f"{path} was trained with {key}: {stored!r}, but this config has {current!r}; {advice}"
        )


def architecture_settings(model: ModelConfig, vision_only: bool) -> dict:
    """Return the settings that a model's output tokens depend on, before they are pooled.

    vision_only: of the vision tower only.
    """
    shape = asdict(model.shape)
    vision = asdict(model.vision)
    del vision["pool"], vision["freeze_patch"]
    if vision_only:
        shape = {key: shape[key] for key in ("width", "depth", "heads", "mlp")}
    text = None if vision_only else asdict(model.text)
    return dict(shape=shape, patch=model.patch_size, grid=model.grid, vision=vision, text=text)
