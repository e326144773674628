"""Self-contained HTML pages that need no network."""

import base64
import html
import io
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from simsiam_jax import paths

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px;
       padding: 0 1rem 3rem; color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.row { display: flex; flex-wrap: wrap; gap: .5rem; padding: .5rem 0;
       overflow-wrap: anywhere; border-bottom: 1px solid #ddd }
figure { margin: 0; width: 84px; font-size: .72rem; line-height: 1.25; overflow-wrap: anywhere }
figure img { width: 84px; height: 84px; object-fit: contain; image-rendering: pixelated;
             background: #eee; display: block }
figure.query { border-right: 3px solid #36c; padding-right: .5rem; margin-right: .25rem }
@media (max-width: 480px) { figure, figure img { width: 68px } figure img { height: 68px } }
table { border-collapse: collapse; font-size: .85rem }
.table { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .2rem .75rem .2rem 0; min-width: 6rem;
         border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
th:first-child { position: sticky; left: 0; background: #fff; font-weight: normal; color: #555 }
tr.marked > * { background: #fff3c4 }
img.views { max-width: 100%; height: auto }
pre.text { white-space: pre-wrap }
summary { cursor: pointer; padding: .25rem 0 }
pre { overflow-x: auto; background: #f6f6f6; padding: .75rem; font-size: .8rem }
"""


def picture(image: np.ndarray, *, side: int = 128) -> str:
    """Returns a data: URL of an image [H, W, C], uint8, at most `side` pixels wide and high.

    Images that are not RGB show their first channel.
    """
    pixels = image if image.shape[-1] == 3 else image[..., 0]
    small = Image.fromarray(pixels)
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def figure(url: str, caption: Sequence[str], *, query: bool = False) -> str:
    """Returns an image with a caption, one line per string."""
    lines = '<br>'.join(html.escape(line) for line in caption)
    alt = html.escape(caption[0])
    kind = ' class="query"' if query else ''
    return f'<figure{kind}><img src="{url}" alt="{alt}">{lines}</figure>'


def row(figures: Sequence[str]) -> str:
    """Returns figures side by side, in several lines if the page is narrow."""
    return f'<div class="row">{"".join(figures)}</div>'


def scatter(points: np.ndarray, groups: Sequence[str], names: Sequence[str], *, title: str) -> Any:
    """Returns a scatter plot of points [N, 2] with a color and a legend entry for each group.

    Hovering over a point shows its name.
    """
    import plotly.graph_objects as go

    plot = go.Figure()
    for group in sorted(set(groups)):
        (members,) = np.nonzero(np.asarray(groups) == group)
        plot.add_trace(
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
    plot.update_layout(
        title=title,
        template='plotly_white',
        showlegend=len(plot.data) > 1,
        height=600,
        margin={'l': 20, 'r': 20, 't': 50, 'b': 20},
        legend={'orientation': 'h', 'itemsizing': 'constant'},
    )
    plot.update_xaxes(showticklabels=False)
    plot.update_yaxes(showticklabels=False)
    return plot


def plot(chart: Any, *, first: bool) -> str:
    """Returns a chart as HTML; the first chart of a page must include the library."""
    import plotly.io

    return plotly.io.to_html(
        chart,
        full_html=False,
        include_plotlyjs=first,
        config={'responsive': True, 'displaylogo': False},
    )


def table(
    head: Sequence[str], rows: Mapping[str, Sequence[str]], *, marked: Container[str] = ()
) -> str:
    """Returns a table that scrolls if it is too wide.

    Args:
      head: Names of the columns; empty names omit the head.
      rows: Name of a row -> its cells.
      marked: Names of the rows to highlight.
    """

    def line(kind: str, name: str, cells: Sequence[str]) -> str:
        mark = ' class="marked"' if name in marked else ''
        inner = ''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)
        return f'<tr{mark}><th>{html.escape(name)}</th>{inner}</tr>'

    body = ''.join(line('td', name, cells) for name, cells in rows.items())
    top = line('th', '', head) if any(head) else ''
    return f'<div class="table"><table>{top}{body}</table></div>'


def folded(summary: str, content: str, *, opened: bool = False) -> str:
    """Returns content that a click on the summary shows or hides."""
    state = ' open' if opened else ''
    return f'<details{state}><summary>{html.escape(summary)}</summary>{content}</details>'


def page(title: str, sections: dict[str, str]) -> str:
    """Returns a page of sections, heading -> HTML."""
    body = ''.join(f'<h2>{html.escape(head)}</h2>{content}' for head, content in sections.items())
    return paths.printable(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f'<title>{html.escape(title)}</title><style>{_STYLE}</style></head>'
        f'<body><h1>{html.escape(title)}</h1>{body}</body></html>'
    )
