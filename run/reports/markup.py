"""Build self-contained HTML pages: document, style, tables, plots and galleries of pictures."""

import base64
import html
import io
import re

from PIL import Image
from torch import Tensor

from glimpse.run.reports.plots import Figure, render_svg

STYLE = """:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:75rem;padding:0 1rem;
 color:#222;background:#fff}
h1{font-size:1.6rem;line-height:1.2}
h2{font-size:1.25rem;margin:2.2rem 0 .4rem;border-bottom:1px solid #ddd}
h3{font-size:1rem;margin:1.2rem 0 .2rem}
p,li{max-width:48rem}p,li,h1,h2,h3,summary{overflow-wrap:anywhere}.wide{overflow-x:auto}
small,.absent,figcaption{color:#666}.absent{font-style:italic}
.values{border-collapse:collapse;font-size:.9rem;margin-bottom:1.2rem}
.values th,.values td{padding:.3rem .7rem .3rem 0;text-align:left;vertical-align:top;
 border-bottom:1px solid #eee}
.values td{white-space:nowrap;font-variant-numeric:tabular-nums}
.values td.absent{white-space:normal}
.values thead th{overflow-wrap:anywhere;min-width:6.5rem;font-weight:600;vertical-align:bottom}
.values tbody th{position:sticky;left:0;background:#fff;font-weight:600;min-width:5.5rem}
.values div{max-width:min(40rem,60vw)}
.values .to{display:block}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:.5rem 0;max-width:33rem;break-inside:avoid}
figcaption{font-size:.85rem;overflow-wrap:anywhere}
figure svg{width:100%;height:auto;display:block}
figure svg text{font-family:system-ui,sans-serif!important}
.gallery{border-collapse:collapse;width:100%;table-layout:fixed}
.gallery th{font-weight:600;font-size:.8rem;vertical-align:bottom;padding:.2rem;
 overflow-wrap:anywhere}
.gallery td{padding:.1rem}.gallery img{width:100%;display:block;image-rendering:pixelated}
.caption{font-size:.8rem;overflow-wrap:anywhere}
details{margin:.4rem 0}summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem;background:#f6f6f6;padding:.5rem}
@media(max-width:50rem){.gallery{width:60rem}}
@media print{html{font-size:11px}body{margin:0;max-width:none;font-size:1rem}
h2,h3{break-after:avoid}tr{break-inside:avoid}.wide{overflow:visible}
.gallery{width:100%}.plots{grid-template-columns:1fr 1fr}
details.run::details-content{content-visibility:visible;height:auto}
.values td,.values small{white-space:normal}}"""


def html_document(title: str, body: str) -> str:
    """Return a complete page; `body` is HTML, `title` is plain text."""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style>{body}</html>
"""


def html_table(heads: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """Return a table; a row is (label, <td> elements)."""
    head = ""
    for name in heads:
        # Allow line breaks inside names of metrics.
        breakable = escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")
        head += f"<th>{breakable}</th>"
    body = ""
    for label, cells in rows:
        body += f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>"
    return (
        '<div class="wide"><table class="values">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def plot_grid(figures: dict[str, Figure], captions: dict[str, str]) -> str:
    """Return plots with captions, side by side where the window is wide enough.

    captions: {name of a figure: caption}. Captions without a figure are skipped.
    """
    elements = ""
    for name, caption in captions.items():
        if name in figures:
            plot = render_svg(figures[name], slug(name))
            elements += (
                f'<figure role="img" aria-label="{escape(name)}">{plot}'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
    return f'<div class="plots">{elements}</div>'


def gallery_table(columns: dict[str, Tensor], captions: list[str]) -> str:
    """Return a table of pictures, one row per caption.

    columns: {name: (n, 3, H, W) uint8}; captions: one text per row.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in ("caption", *columns))
    rows = ""
    for i, caption in enumerate(captions):
        cells = "".join(
            f"<td>{inline_image(column[i], name)}</td>" for name, column in columns.items()
        )
        rows += f'<tr><td class="caption">{escape(caption)}</td>{cells}</tr>'
    return (
        '<div class="wide"><table class="gallery">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def inline_image(image: Tensor, name: str) -> str:
    """Return an <img> element that embeds a picture (3, H, W) uint8.

    Pictures up to 128 pixels are lossless PNG, larger ones are WebP.
    """
    kind = "png" if max(image.shape) <= 128 else "webp"
    data = base64.b64encode(encode_image(image, kind)).decode()
    return f'<img alt="{escape(name)}" src="data:image/{kind};base64,{data}">'


def encode_image(image: Tensor, kind: str) -> bytes:
    """Encode a picture (3, H, W) uint8; kind: png or webp."""
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, kind)
    return out.getvalue()


def slug(name: str) -> str:
    """Replace all characters but letters, digits and _, for file names and ids."""
    return re.sub(r"\W+", "_", name).strip("_")


def escape(text: str) -> str:
    return html.escape(text)
