"""What lies at a path, told to people: `python run/convert.py inspect PATH`."""

from pathlib import Path

from glimpse.data.builders import tokenizer_files
from glimpse.model import tensor_files
from glimpse.model.convert import claimed
from glimpse.model.portable import Portable, is_one
from glimpse.run.train import checkpoint
from glimpse.run.train.log import short
from glimpse.run.verify import open_any


def describe(path: Path, given: dict | None = None) -> str:
    """Lines of `name: value`: the format, the architecture, sizes, and of a run its step, samples
    and ranks.
    """
    try:
        format, model = open_any.anything(path, given=given)
    except ValueError as error:
        return loose(path, error)
    path = Path(model.about.source.get("path", path))
    rows = {
        "path": path,
        "format": format,
        "architecture": architecture(model),
        "image": sides(model),
        **counts(model),
    }
    vision, text, about = model.cfg.vision, model.cfg.text, model.about
    rows["vision"] = (
        f"positions {vision.positions}, pool {vision.pool}, pre_norm {vision.pre_norm}, patch_bias"
        f" {vision.patch_bias}, {vision.activation}, eps {vision.eps:g}"
    )
    if model.vocab:
        rows["text"] = (
            f"{model.vocab:,} ids, {model.context} tokens,"
            f" {'causal' if text.causal else 'not causal'}, pool {text.pool}, {text.activation},"
            f" eps {text.eps:g}; tokenizer {about.tokenizer or vocabulary(path)}"
        )
    kinds = sorted({str(meta.dtype).removeprefix("torch.") for meta in model.tensors.meta.values()})
    rows["stored as"] = f"{' and '.join(kinds)}, {size_of(path)}"
    if found := checkpoint.manifest(path):
        rows |= {
            "method": found["identity"]["method"],
            "step": f"{found['step']:,}",
            "samples": f"{found['samples']:,}",
            "ranks": (
                f"{found['ranks']}, ZeRO {found['stage']}, {'bf16' if found['bf16'] else 'fp32'}"
            ),
        }
    elif known := {
        key: value for key, value in about.source.items() if key not in ("path", "format", "notes")
    }:
        rows["from"] = ", ".join(f"{key} {value}" for key, value in known.items())
    if "notes" in about.source:
        rows["notes"] = about.source["notes"]
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def vocabulary(path: Path) -> str:
    """Of the tokenizer files that lie in a folder of another format."""
    try:
        return tokenizer_files.read(path)
    except ValueError:
        return "unknown"


def loose(path: Path, why: ValueError) -> str:
    """Of what is of no known format: the tensors in the file, or in the folder's files; where there
    are none, ValueError that says why.
    """
    rows = []
    parts = (
        len(list(path.glob("*_model_states.pt"))) if not (path / "manifest.json").exists() else 0
    )
    if parts:
        raise ValueError(
            f"{path}: {parts} ranks' files of a DeepSpeed checkpoint, but no manifest.json: torn,"
            " or not of a run of Glimpse"
        )
    for file in (
        [path]
        if path.is_file()
        else ()
        if claimed(path) or is_one(path)
        else sorted(path.glob("*"))
    ):
        if meta := tensor_files.metas(file):
            rows += [f"{file}: {len(meta)} tensors, {size_of(file)}"]
            rows += [
                f"  {name}  {tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}"
                for name, one in list(meta.items())[:10]
            ]
            rows += [f"  ... and {len(meta) - 10} more"] * (len(meta) > 10)
    if not rows:
        raise why
    return "\n".join([*rows, str(why)])


def architecture(model: Portable) -> str:
    """In a few words: ViT-B/32 at 224 with text, 151 M parameters."""
    cfg, shape, total = (
        model.cfg,
        model.cfg.shape,
        sum(meta.numel() for meta in model.tensors.meta.values()),
    )
    text = f" + text {shape.text_width} x {shape.text_depth}" if model.vocab else ", no text tower"
    return f"ViT-{cfg.size} ({shape.width} x {shape.depth}{text}), {short(total)} parameters"


def sides(model: Portable) -> str:
    (height, width), (rows, columns) = model.cfg.sides, model.cfg.grid
    return f"{height} x {width} pixels, {rows} x {columns} patches of {model.cfg.patch}"


def counts(model: Portable) -> dict[str, str]:
    towers: dict[str, int] = {}
    for name, meta in model.tensors.meta.items():
        tower = name.partition(".")[0]
        towers[tower] = towers.get(tower, 0) + meta.numel()
    return {"parameters": ", ".join(f"{tower} {short(count)}" for tower, count in towers.items())}


def size_of(path: Path) -> str:
    total = sum(
        file.stat().st_size
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    )
    return f"{total / 2**20:,.1f} MiB"
