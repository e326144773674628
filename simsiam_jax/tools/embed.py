"""Writes features of images, their nearest neighbors, and an HTML page that shows both.

::

    python -m simsiam_jax.tools.embed --checkpoint=RUN --images=SOURCE --out=FILE \\
        [--neighbors=K] [--html=PAGE]

RUN is the workdir of a run or a file of weights. SOURCE is a value of config.data.source
(folder:DIR, files:LIST, tfds:NAME/split, digits). FILE is a .npz with ``features`` [N, D] float32,
``names``, ``labels`` and ``classes``, a .parquet with a row per image, or a .npy to open as a
memory map; then FILE.parquet has the other columns. The features are collected in FILE.partial:
after a stop, the same command resumes. --neighbors adds ``neighbors`` [N, K], without the image
itself, and ``similarities``, their cosines. PAGE shows the images as points of an interactive map,
and the nearest neighbors of the selected image. --map selects the map: umap (pip install
umap-learn), pca, tsne, or auto, which is umap if it is installed.
"""

import pathlib
import sys
from typing import Any

import numpy as np
from absl import flags, logging

from simsiam_jax import command_line, errors
from simsiam_jax.pages import embedding, maps
from simsiam_jax.tasks.feature_store import FeatureStore
from simsiam_jax.training import mesh as mesh_lib

_ROWS = 16384  # per group of rows in a file


def save(path: str, columns: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Writes a .npz, .npy or .parquet file.

    Args:
      path: File to write; beside a .npy, FILE.parquet gets the columns other than the features.
      columns: Arrays or lists with a row per image, by name.
      classes: Names of the classes, written to .npz only.

    Raises:
      UserError: The file cannot be written.
    """
    try:
        if path.endswith('.npz'):
            np.savez_compressed(path, **columns, classes=np.array(classes))
        elif path.endswith('.npy'):
            x = columns['features']
            file = np.lib.format.open_memmap(path, mode='w+', dtype=x.dtype, shape=x.shape)
            for start in range(0, len(x), _ROWS):
                file[start : start + _ROWS] = x[start : start + _ROWS]
            file.flush()
            rest = {name: column for name, column in columns.items() if name != 'features'}
            _write_parquet(f'{path}.parquet', rest)
        else:
            _write_parquet(path, columns)
    except OSError as error:
        raise errors.UserError(f'{path} cannot be written: {error.strerror or error}') from error


def _write_parquet(path: str, columns: dict[str, Any]) -> None:
    """Writes columns in groups of rows, so that few of them are in memory."""
    import pyarrow
    from pyarrow import parquet

    writer = None
    for start in range(0, len(columns['names']), _ROWS):
        arrays = {}
        for name, column in columns.items():
            part = column[start : start + _ROWS]
            if isinstance(part, np.ndarray) and part.ndim > 1:
                ends = np.arange(0, part.size + 1, part.shape[1], dtype=np.int32)
                arrays[name] = pyarrow.ListArray.from_arrays(ends, part.ravel())
            else:
                arrays[name] = pyarrow.array(part)
        table = pyarrow.table(arrays)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def run(_: command_line.Arguments) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    mesh_lib.use_compilation_cache()
    out, html = given.out, given.html
    try:
        maps.choose(given.map)
        if not out.endswith(('.npz', '.npy', '.parquet')):
            raise errors.UserError(
                f'invalid --out: {out}; expected a name ending in .npz, .npy or .parquet'
            )
        for path in filter(None, (out, html)):
            if not pathlib.Path(path).absolute().parent.is_dir():
                raise errors.UserError(f'{path} cannot be written: its folder does not exist')
        store = FeatureStore(f'{out}.partial')
        embedded = embedding.embed(given.checkpoint, given.images, given.batch_size, store=store)
        features = embedded.features
        columns: dict[str, Any] = {
            'names': embedded.names,
            'labels': features.labels,
            'features': features.x,
        }
        if given.neighbors:
            columns['neighbors'], columns['similarities'] = embedding.neighbors(
                features.x, given.neighbors
            )
        save(out, columns, embedded.source.classes)
        print(f'{out}: {len(features.x)} images, features of {features.x.shape[1]}')
        if html:
            title = f'Features of {given.images} by {given.checkpoint}'
            found = (columns['neighbors'], columns['similarities']) if given.neighbors else None
            text = embedding.render_page(
                embedded, found, title=title, map_name=given.map, max_points=given.points
            )
            pathlib.Path(html).write_text(text)
            print(f'{html}: open it in a browser')
        store.remove()
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        sys.exit(f'error: {html} cannot be written: {error.strerror}')


def main() -> None:
    command_line.define_path('checkpoint', None, 'Workdir of a run, or file of weights.')
    flags.DEFINE_string('images', None, 'Source of images, a value of config.data.source.')
    command_line.define_path('out', None, 'File to write: .npz, .npy or .parquet.')
    flags.DEFINE_integer(
        'neighbors', 0, 'Number of neighbors of each image, in the file and on the page.'
    )
    flags.DEFINE_alias('neighbours', 'neighbors')
    command_line.define_path('html', None, 'Page to write.')
    flags.DEFINE_string('map', 'auto', 'Map of the features on the page: auto, umap, pca or tsne.')
    flags.DEFINE_integer(
        'points', 0, 'Most images on the page, evenly spaced; 0: 50,000, and 5,000 for tsne.'
    )
    flags.DEFINE_integer('batch_size', 256, 'Images in a batch.')
    command_line.start(run, 'checkpoint', 'images', 'out')


if __name__ == '__main__':
    main()
