"""One self-contained HTML page without scripts, other files or links to the network. It follows the reader's light or dark mode."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --text: #1c2026; --quiet: #57606a; --page: #ffffff; --box: #f6f8fa; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --quiet: #9198a1; --page: #0d1117; --box: #161b22; --line: #30363d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 24px; background: var(--page); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 4px 0; } .quiet { color: var(--quiet); }
section { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin: 20px 0; }
.row { display: flex; flex-wrap: wrap; gap: 16px; margin-top: 12px; align-items: flex-start; }
figure { margin: 0; flex: 1 1 260px; max-width: 420px; } figure img { width: 100%; height: auto; display: block; border-radius: 4px; }
figure svg { width: 100%; height: auto; } figcaption { font-size: .9rem; margin-bottom: 4px; color: var(--quiet); }
.wide { flex: 1 1 420px; max-width: 640px; }
table { border-collapse: collapse; margin-top: 8px; } th, td { padding: 4px 14px 4px 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; } th { color: var(--quiet); font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def render_page(title: str, intro: Sequence[str], sections: Sequence[str]) -> str:
    """A whole document. `intro`: lines of plain text; `sections`: HTML from `render_section`."""
    lines = "".join(f'<p class="quiet">{html.escape(line)}</p>' for line in intro)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>{lines}\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def render_section(title: str, lines: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The section of one image; `rows`: lists of HTML from `render_figure` or `render_drawing`."""
    text = "".join(f'<p class="quiet">{html.escape(line)}</p>' for line in lines)
    body = "".join(f'<div class="row">{"".join(row)}</div>' for row in rows)
    return f"<section><h2>{html.escape(title)}</h2>{text}{body}</section>"


def render_figure(caption: str, image: Image.Image) -> str:
    """An image with a caption, embedded as WebP, which is a fifth of a PNG's size: pages with many images stay usable."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    words = html.escape(caption, quote=True)
    return (
        f'<figure><figcaption>{words}</figcaption><img alt="{words}" loading="lazy" width="{image.width}" '
        f'height="{image.height}" src="data:image/webp;base64,{data}"></figure>'
    )


def render_drawing(caption: str, svg: str) -> str:
    """An SVG element with a caption."""
    return f'<figure class="wide"><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>'


def render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<section><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></section>"


def render_preformatted(title: str, text: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><pre>{html.escape(text)}</pre></section>"
