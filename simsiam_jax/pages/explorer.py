"""An interactive map of images: zoom, pan, and select an image to see its nearest neighbors."""

import base64
import dataclasses
import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from simsiam_jax import paths
from simsiam_jax.pages import assets, curves
from simsiam_jax.pages.maps import Map
from simsiam_jax.pages.thumbnails import COLUMNS, Thumbnails

# Most bytes of the thumbnails of a page; base64 makes them a third longer.
THUMBNAIL_BYTES = 10_000_000
NEIGHBORS = 8  # most neighbors of each image on a page

_FOLDER = pathlib.Path(__file__).parent
# Groups beyond the number of colors have the next symbol.
_SYMBOLS = ('circle', 'diamond', 'square')


@dataclasses.dataclass(frozen=True)
class Explorer:
    """What the map shows.

    Attributes:
      map: Positions and groups of N images.
      names: Name of each image, such as its path.
      labels: Class [N] of each image; -1 if unknown.
      classes: Names of the classes; () if there are no labels.
      neighbors: Positions [N, K] of the nearest neighbors of each image.
      similarities: Their cosine similarities [N, K].
      thumbnails: Thumbnails of the images.
      total: Number of images of which these N are shown.
    """

    map: Map
    names: Sequence[str]
    labels: Int[np.ndarray, 'N']
    classes: Sequence[str]
    neighbors: Int[np.ndarray, 'N K']
    similarities: Float[np.ndarray, 'N K']
    thumbnails: Thumbnails
    total: int


def render(shown: Explorer) -> tuple[str, str]:
    """Returns the HTML of the map, and the scripts and data that it needs, see page.page()."""
    style = (_FOLDER / 'explorer.css').read_text()
    script = (_FOLDER / 'explorer.js').read_text()
    colorings = '<option value="clusters">cluster</option>'
    if shown.classes:
        colorings = f'<option value="labels">label</option>{colorings}'
    content = (
        f'<style>{style}</style>'
        '<div class="explorer">'
        '<div class="bar">'
        f'<label>Color by <select class="coloring">{colorings}</select></label>'
        '<label>Find <input class="find" type="search" placeholder="part of a name"></label>'
        '<span class="zoom" role="group" aria-label="Zoom">'
        '<button type="button" data-zoom="0.5" aria-label="Zoom in">+</button>'
        '<button type="button" data-zoom="2" aria-label="Zoom out">&minus;</button>'
        '<button type="button" data-zoom="0">Show all</button></span>'
        '<span class="found quiet" role="status"></span></div>'
        '<div class="split"><div class="left">'
        f'<div class="map" tabindex="0" role="application" aria-label="{_description(shown)}">'
        '<p class="quiet">The map needs JavaScript and a browser of 2023 or later.</p></div>'
        '<div class="groups" role="group" aria-label="Colors; select one to highlight it"></div>'
        '</div><div class="chosen" aria-live="polite"></div></div>'
        f'{_notes(shown)}</div>'
    )
    sheets = ''.join(
        f'<script type="text/plain" class="sheet">{base64.b64encode(sheet).decode()}</script>'
        for sheet in shown.thumbnails.sheets
    )
    data = assets.packed('points', _data(shown))
    return content, f'{data}<script>{script}</script>{sheets}'


def _description(shown: Explorer) -> str:
    text = (
        f'Map of {len(shown.names):,} images; images with similar features are close. '
        'Arrow keys select the next image in a direction, plus and minus zoom, 0 shows all.'
    )
    return html.escape(text)


def _notes(shown: Explorer) -> str:
    """Returns sentences about how to use the map, and what it shows."""
    count, pictures = len(shown.names), shown.thumbnails
    which = f'{count:,} images'
    if count < shown.total:
        which = f'{count:,} of {shown.total:,} images, evenly spaced; neighbors are among these'
    have = 'all of them' if pictures.count == count else f'{pictures.count:,} of them'
    lines = [
        'Images with similar features are close. Drag to move the map, scroll to zoom. Click a '
        'point, or use the arrow keys, to see an image and its nearest neighbors.',
        f'{shown.map.name}.',
        f'The map shows {which}. It has thumbnails of up to {pictures.side} pixels of {have}.',
    ]
    return ''.join(f'<p class="quiet">{html.escape(line)}</p>' for line in lines)


def _data(shown: Explorer) -> bytes:
    """Returns the length of a JSON header, the header, and the arrays that it lists.

    All are aligned to eight bytes.
    """
    count = len(shown.names)
    arrays = {
        'x': shown.map.points[:, 0].astype('<f4'),
        'y': shown.map.points[:, 1].astype('<f4'),
        'labels': shown.labels.astype('<i4'),
        'clusters': shown.map.clusters.astype('<i4'),
        'neighbors': shown.neighbors.astype('<u2' if count <= 2**16 else '<u4'),
        'similarities': np.round(shown.similarities * 1e4).astype('<i2'),
        'places': shown.thumbnails.places.astype('<i4'),
        'sizes': shown.thumbnails.sizes.astype('<u1'),
    }
    header: dict[str, Any] = {
        'names': [paths.printable(name) for name in shown.names],
        'classes': list(shown.classes),
        'colors': curves.COLORS[:-1],
        'other': curves.COLORS[-1],
        'symbols': _SYMBOLS,
        'tile': shown.thumbnails.side,
        'columns': COLUMNS,
        'arrays': {name: [array.dtype.str[1:], array.size] for name, array in arrays.items()},
    }
    parts = [json.dumps(header).encode(), *(array.tobytes() for array in arrays.values())]
    return len(parts[0]).to_bytes(8, 'little') + b''.join(
        part.ljust(-(-len(part) // 8) * 8) for part in parts
    )
