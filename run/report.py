"""Make pages to look at from a run.

    python run/report.py masks --run runs/aclip_nano            what each strategy keeps of the same images, the model's attention,
                                                                and where an image resembles its caption
Writes RUN/report/masks.png and masks.html (one file, no network).  The run's last checkpoint is read; nothing of the run is changed.
"""
import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import base64  # noqa: E402
import html  # noqa: E402
import io  # noqa: E402

from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from data.shards import Shards  # noqa: E402
from data.stream import is_stream  # noqa: E402
from run.lib import config, models, pictures, ranks  # noqa: E402

STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;width:100%;table-layout:fixed}th{font-weight:600;font-size:.8rem;vertical-align:bottom;padding:.2rem}
td{padding:.1rem}img{width:100%;display:block;image-rendering:pixelated}.caption{font-size:.8rem;overflow-wrap:anywhere}.wide{overflow-x:auto}
@media(max-width:50rem){table{width:60rem}}"""


def masks(args) -> None:
    path = models.find(Path(args.run).resolve())
    if args.count < 1:
        raise ValueError(f"--count {args.count}: a number of images, 1 or more")
    if not args.images and (models.home(path) == path or is_stream(models.config_of(path).data.train)):
        raise ValueError("--images: the model was trained on no folder of shards that is known here; name one")
    cfg, tokenizer, method = models.opened(path)
    chosen = pictures.examples(Shards(args.images or cfg.data.train), args.count)
    if not chosen:
        raise ValueError(f"--images: none of {args.count} samples can be read; run: run/prepare.py check DIR")
    found = pictures.gallery(method, cfg, tokenizer, *chosen)
    folder = models.home(path) / "report"
    folder.mkdir(exist_ok=True)
    Image.fromarray(pictures.sheet(found).permute(1, 2, 0).numpy()).save(folder / "masks.png")
    (folder / "masks.html").write_text(page(found, chosen[1], cfg, models.origin(path)))
    print(f"columns: {' | '.join(found)}\nwrote {folder / 'masks.png'} and {folder / 'masks.html'}")


def page(found: dict[str, Tensor], captions: list[str], cfg: config.Run, state: dict) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("caption", *found))
    rows = ""
    for i, caption in enumerate(captions):
        cells = "".join(f"<td>{inline(column[i], name)}</td>" for name, column in found.items())
        rows += f'<tr><td class="caption">{html.escape(caption)}</td>{cells}</tr>'
    title, what = html.escape(cfg.run), f"{cfg.method}, {cfg.model.size}, after {state['samples']:,} samples."
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Masks: {title}</title><style>{STYLE}</style><h1>What each mask keeps</h1>
<p>{title}: {what} Grey patches are hidden. Attention: of the class token, bright where it looks.
Resemblance: of each patch's embedding to the caption's.</p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></html>
"""


def inline(image: Tensor, name: str) -> str:
    """(3, H, W) uint8 as an <img> that carries its pixels."""
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "PNG")
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'


def main() -> None:
    args = config.parser(__doc__)
    kinds = args.add_subparsers(required=True, metavar="masks")
    kind = kinds.add_parser("masks", help="what each strategy keeps")
    kind.add_argument("--run", required=True, help="a run folder, one of its checkpoints, or a converted model")
    kind.add_argument("--images", nargs="+", help="folders of shards to take images from; default: the run's own data.train")
    kind.add_argument("--count", type=int, default=8, help="images")
    kind.set_defaults(do=masks)
    found = args.parse_args()
    ranks.start()
    found.do(found)


if __name__ == "__main__":
    ranks.run_script(main)
