"""Describe the model at a path, for `python run/convert.py inspect PATH`."""

from pathlib import Path

from torch import Tensor

from glimpse.data.builders import tokenizer_files
from glimpse.model import tensor_files
from glimpse.model.convert import detect_format
from glimpse.model.portable import PortableModel, is_glimpse_folder
from glimpse.run.train import checkpoint
from glimpse.run.train.log import format_count
from glimpse.run.verify import open_any


def describe(path: Path, given: dict | None = None) -> str:
    """Return lines with the format, the architecture, the sizes, and for a run its step, samples
    and ranks.

    For a file or folder of unknown format, the lines list its tensors.
    """
    try:
        format_name, model = open_any.load_any(path, given=given)
    except ValueError as error:
        return describe_tensors(path, error)
    source = model.about.source
    path = Path(source.get("path", path))

    # The model.
    rows = {
        "path": path,
        "format": format_name,
        "architecture": architecture_summary(model),
        "image": image_row(model),
        **parameter_row(model),
        "vision": vision_row(model),
    }
    if model.vocab:
        rows["text"] = text_row(model, path)
    rows["stored as"] = f"{' and '.join(stored_types(model))}, {format_size(path)}"

    # The run that wrote the checkpoint, or the source of a converted model.
    if manifest := checkpoint.manifest_if_complete(path):
        rows |= run_rows(manifest)
    else:
        unlisted = ("path", "format", "notes")
        known = {key: value for key, value in source.items() if key not in unlisted}
        if known:
            rows["from"] = ", ".join(f"{key} {value}" for key, value in known.items())
    if "notes" in source:
        rows["notes"] = source["notes"]

    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def vision_row(model: PortableModel) -> str:
    vision = model.cfg.vision
    return (
        f"positions {vision.positions}, pool {vision.pool}, pre_norm {vision.pre_norm}, patch_bias"
        f" {vision.patch_bias}, {vision.activation}, eps {vision.eps:g}"
    )


def text_row(model: PortableModel, path: Path) -> str:
    text = model.cfg.text
    causal = "causal" if text.causal else "not causal"
    tokenizer = model.about.tokenizer or folder_tokenizer(path)
    return (
        f"{model.vocab:,} ids, {model.context} tokens, {causal}, pool {text.pool},"
        f" {text.activation}, eps {text.eps:g}; tokenizer {tokenizer}"
    )


def stored_types(model: PortableModel) -> list[str]:
    """Return the dtypes of the stored tensors, without the prefix `torch.`."""
    metas = model.tensors.meta.values()
    return sorted({str(meta.dtype).removeprefix("torch.") for meta in metas})


def run_rows(manifest: dict) -> dict[str, str]:
    """Return the rows of a run's checkpoint."""
    precision = "bf16" if manifest["bf16"] else "fp32"
    return {
        "method": manifest["identity"]["method"],
        "step": f"{manifest['step']:,}",
        "samples": f"{manifest['samples']:,}",
        "ranks": f"{manifest['ranks']}, ZeRO {manifest['stage']}, {precision}",
    }


def folder_tokenizer(path: Path) -> str:
    """Return the tokenizer spec of the tokenizer files in a foreign folder, or "unknown"."""
    try:
        return tokenizer_files.read(path)
    except ValueError:
        return "unknown"


def describe_tensors(path: Path, why: ValueError) -> str:
    """Describe the tensors in a file or folder of unknown format.

    why: the error that `load_any` raised. It is raised again if there are no tensors.
    """
    shards = list(path.glob("*_model_states.pt"))
    if shards and not (path / "manifest.json").exists():
        raise ValueError(
            f"{path}: {len(shards)} ranks' files of a DeepSpeed checkpoint, but no manifest.json:"
            " the checkpoint is incomplete, or was not written by Glimpse"
        )
    rows = []
    for file in files_to_list(path):
        if meta := tensor_files.read_meta_tensors(file):
            rows += tensor_rows(file, meta)
    if not rows:
        raise why
    return "\n".join([*rows, str(why)])


def files_to_list(path: Path) -> list[Path]:
    """Return the files whose tensors are listed; [] for a folder of a known format."""
    if path.is_file():
        return [path]
    if detect_format(path) or is_glimpse_folder(path):
        return []
    return sorted(path.glob("*"))


def tensor_rows(file: Path, meta: dict[str, Tensor]) -> list[str]:
    """Return a line for the file, and a line for each of its first ten tensors."""
    rows = [f"{file}: {len(meta)} tensors, {format_size(file)}"]
    for name, tensor in list(meta.items())[:10]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append(f"  {name}  {tuple(tensor.shape)} {dtype}")
    if len(meta) > 10:
        rows.append(f"  ... and {len(meta) - 10} more")
    return rows


def architecture_summary(model: PortableModel) -> str:
    """Return one line, as ViT-B/32 (768 x 12 + text 512 x 12), 151 M parameters."""
    shape = model.cfg.shape
    total = sum(meta.numel() for meta in model.tensors.meta.values())
    if model.vocab:
        text = f" + text {shape.text_width} x {shape.text_depth}"
    else:
        text = ", no text tower"
    sizes = f"{shape.width} x {shape.depth}{text}"
    return f"ViT-{model.cfg.size} ({sizes}), {format_count(total)} parameters"


def image_row(model: PortableModel) -> str:
    """Return the image size and the number of patches."""
    (height, width), (rows, columns) = model.cfg.image_shape, model.cfg.grid
    return f"{height} x {width} pixels, {rows} x {columns} patches of {model.cfg.patch_size}"


def parameter_row(model: PortableModel) -> dict[str, str]:
    """Return the row with the number of parameters of each tower."""
    towers: dict[str, int] = {}
    for name, meta in model.tensors.meta.items():
        tower = name.partition(".")[0]
        towers[tower] = towers.get(tower, 0) + meta.numel()
    return {
        "parameters": ", ".join(f"{tower} {format_count(count)}" for tower, count in towers.items())
    }


def format_size(path: Path) -> str:
    """Return the size of a file or a folder in MiB."""
    files = [path] if path.is_file() else path.rglob("*")
    total = sum(file.stat().st_size for file in files if file.is_file())
    return f"{total / 2**20:,.1f} MiB"
