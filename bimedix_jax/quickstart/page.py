"""A report as a single HTML file with embedded pictures and Arabic text from right to left."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from bimedix_jax.files import write_text
from bimedix_jax.notice import NOTICE_AR, NOTICE_EN

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222;
overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th { text-align: left; }
td, th { overflow-wrap: normal; } .scroll { overflow-x: auto; } img { max-width: 100%; }
.notice { background: #fff4e5; border-inline-start: 4px solid #d98200; padding: .5rem 1rem; }
[dir=rtl] { text-align: right; } .answer { background: #f5f5f5; padding: .5rem 1rem; white-space: pre-wrap; }
code { background: #f0f0f0; padding: .1rem .3rem; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; } .scroll { overflow: visible; }
h2 { break-after: avoid; } tr, img, .notice, .answer { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def paragraph(text: str, language: str = "en", css: str = "") -> str:
    """A paragraph in the text direction of its language."""
    direction = "rtl" if language == "ar" else "ltr"
    return f'<p lang="{language}" dir="{direction}" class="{css}">{html.escape(text)}</p>'


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def picture(path: str | Path, description: str) -> str:
    """An embedded PNG."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<p><img src="data:image/png;base64,{data}" alt="{html.escape(description, quote=True)}"></p>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def before_after(unit: str, before: Mapping[str, float], after: Mapping[str, float], scale: float = 1.0) -> str:
    """A table of the groups that are in both."""
    rows = [
        (group, f"{scale * before[group]:.3f}", f"{scale * after[group]:.3f}", f"{scale * (after[group] - old):+.3f}")
        for group, old in before.items()
        if group in after
    ]
    return table((unit, "before", "after", "change"), rows)


def commands(lines: Sequence[str]) -> str:
    return "".join(f"<p><code>{html.escape(line)}</code></p>" for line in lines)


def write_page(path: str | Path, title: str, parts: Sequence[str]) -> Path:
    """Writes the page, which begins with the research-only notice in both languages."""
    notice = paragraph(NOTICE_EN, "en", "notice") + paragraph(NOTICE_AR, "ar", "notice")
    document = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{notice}{''.join(parts)}</body></html>\n"
    )
    write_text(path, document)
    return Path(path)
