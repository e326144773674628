"""Self-contained HTML pages that need no network."""

import base64
import html
import io
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from simsiam_jax import paths
from simsiam_jax.pages import assets

# Lines and background of charts on a light or dark page.
_LINE, _CLEAR = 'rgba(128,128,128,0.3)', 'rgba(0,0,0,0)'


def picture(image: np.ndarray, *, side: int = 128) -> str:
    """Returns a data: URL of an image [H, W, C], uint8, at most `side` pixels wide and high.

    Images that are not RGB show their first channel. The URL holds a PNG or, if it is smaller, as
    for photos, a JPEG.
    """
    small = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
    small.thumbnail((side, side))
    encoded = {}
    for kind in ('png', 'jpeg'):
        buffer = io.BytesIO()
        small.save(buffer, kind, quality=85)
        encoded[kind] = base64.b64encode(buffer.getvalue()).decode()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f'data:image/{kind};base64,{encoded[kind]}'


def figure(url: str, caption: Sequence[str], *, query: bool = False) -> str:
    """Returns an image with a caption, one line per string."""
    lines = '<br>'.join(html.escape(line) for line in caption)
    alt = html.escape(', '.join(caption))
    kind = ' class="query"' if query else ''
    return f'<figure{kind}><img src="{url}" alt="{alt}">{lines}</figure>'


def row(figures: Sequence[str]) -> str:
    """Returns figures side by side, in several lines if the page is narrow."""
    return f'<div class="row">{"".join(figures)}</div>'


def scatter(points: np.ndarray, groups: Sequence[str], names: Sequence[str]) -> Any:
    """Returns a scatter plot of points [N, 2] with a color and a legend entry for each group.

    Hovering over a point shows its name.
    """
    import plotly.graph_objects as go

    chart = go.Figure()
    for group in sorted(set(groups)):
        (members,) = np.nonzero(np.asarray(groups) == group)
        chart.add_trace(
            go.Scatter(
                x=points[members, 0],
                y=points[members, 1],
                mode='markers',
                marker={'size': 5, 'opacity': 0.7},
                name=group,
                text=[names[i] for i in members.tolist()],
                hovertemplate='%{text}',
            )
        )
    chart.update_layout(
        showlegend=len(chart.data) > 1,
        height=600,
        margin={'l': 20, 'r': 20, 't': 10, 'b': 20},
        legend={'orientation': 'h', 'itemsizing': 'constant'},
    )
    chart.update_xaxes(showticklabels=False)
    chart.update_yaxes(showticklabels=False)
    return chart


def plot(chart: Any, *, label: str) -> str:
    """Returns a chart as HTML; `label` describes it to those who cannot see it."""
    lines = {'gridcolor': _LINE, 'zerolinecolor': _LINE, 'linecolor': _LINE}
    chart.update_xaxes(**lines)
    chart.update_yaxes(**lines)
    chart.update_layout(template='none', paper_bgcolor=_CLEAR, plot_bgcolor=_CLEAR)
    return (
        f'<div class="plot" role="img" aria-label="{html.escape(label)}" '
        f'data-chart="{html.escape(chart.to_json())}" style="height:{chart.layout.height}px">'
        'This chart needs JavaScript and a browser of 2023 or later.</div>'
    )


def table(
    head: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    *,
    marked: Container[str] = (),
    meanings: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Returns a table; a narrow screen shows each row as a block.

    Args:
      head: Names of the columns; empty names omit the head.
      rows: Name of a row -> its cells.
      marked: Names of the rows to highlight.
      meanings: Name of a row or column -> sentence that explains it.
    """

    def explained(name: str) -> str:
        return term(name, meanings.get(name, ''))

    def line(name: str, cells: Sequence[str]) -> str:
        mark = ' class="marked"' if name in marked else ''
        inner = ''.join(
            f'<td{_label(column)}>{html.escape(cell)}</td>'
            for column, cell in zip(head, cells, strict=True)
        )
        return f'<tr{mark}><th scope="row">{explained(name)}</th>{inner}</tr>'

    body = ''.join(line(name, cells) for name, cells in rows.items())
    columns = ''.join(f'<th scope="col">{explained(name)}</th>' for name in head)
    top = f'<tr class="head"><td></td>{columns}</tr>' if any(head) else ''
    return (
        '<div class="table" role="region" aria-label="Table" tabindex="0">'
        f'<table>{top}{body}</table></div>'
    )


def _label(column: str) -> str:
    return f' data-label="{html.escape(column)}"' if column else ''


def term(name: str, meaning: str) -> str:
    """Returns a name whose meaning appears when the pointer or the keyboard is on it."""
    if not meaning:
        return html.escape(name)
    tip = f'<span class="tip" role="tooltip">{html.escape(meaning)}</span>'
    return f'<span class="term" tabindex="0">{html.escape(name)}{tip}</span>'


def folded(summary: str, content: str, *, opened: bool = False) -> str:
    """Returns content that a click on the summary shows or hides."""
    state = ' open' if opened else ''
    return f'<details{state}><summary>{html.escape(summary)}</summary>{content}</details>'


def page(title: str, sections: dict[str, str], *, scripts: str = '', webgl: bool = False) -> str:
    """Returns a page of sections, heading -> HTML.

    Args:
      title: Title of the page.
      sections: HTML of each section, by its heading.
      scripts: HTML elements at the end of the page; their scripts can use what assets.DRAW defines.
      webgl: Whether the scripts need the charts of plotly that use WebGL.
    """
    body = ''.join(f'<h2>{html.escape(head)}</h2>{content}' for head, content in sections.items())
    if scripts or 'class="plot"' in body:
        scripts = f'{assets.plotly_script(webgl=webgl)}<script>{assets.DRAW}</script>{scripts}'
    return paths.printable(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f'<title>{html.escape(title)}</title><style>{assets.STYLE}</style></head>'
        f'<body><h1>{html.escape(title)}</h1>{body}{scripts}</body></html>'
    )
