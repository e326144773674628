"""Writes features of images, their nearest neighbors, and an HTML page that shows both.

python -m simsiam_jax.tools.embed --checkpoint=RUN --images=SOURCE --out=FILE
    [--neighbors=K] [--html=PAGE]

RUN is the workdir of a run or a file of weights. SOURCE is a value of config.data.source
(folder:DIR, files:LIST, tfds:NAME/split, digits). FILE is a .npz with `features` [N, D] float32,
`names`, `labels` and `classes`, or a .parquet with a row per image. --neighbors adds `neighbors`
[N, K], without the image itself, and `similarities`, their cosines. PAGE shows some images with
their neighbors, and a map of all images in two dimensions (--map=pca or tsne).
"""

import pathlib
import sys
from typing import Any

import numpy as np
from absl import flags, logging

from simsiam_jax import command_line, errors
from simsiam_jax.pages import embedding, page
from simsiam_jax.training import mesh as mesh_lib

# Maxima of images with neighbors and of points in the map on a page.
_QUERIES, _POINTS = 24, 5000


def save(path: str, columns: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Writes a .npz or .parquet file.

    Args:
      path: File to write; a name that does not end in .npz is written as Parquet.
      columns: Arrays or lists with a row per image, by name.
      classes: Names of the classes, written to .npz only.

    Raises:
      UserError: The file cannot be written.
    """
    try:
        if path.endswith('.npz'):
            np.savez_compressed(path, **columns, classes=np.array(classes))
        else:
            import pyarrow
            from pyarrow import parquet

            lists = {
                key: list(x) if isinstance(x, np.ndarray) and x.ndim > 1 else x
                for key, x in columns.items()
            }
            parquet.write_table(pyarrow.table(lists), path)
    except OSError as error:
        raise errors.UserError(f'{path} cannot be written: {error.strerror or error}') from error


def draw(
    embedded: embedding.Embedding, columns: dict[str, Any], *, title: str, map_name: str
) -> str:
    """Returns the HTML page: evenly spaced images with their neighbors, and the map.

    Args:
      embedded: Images and features.
      columns: Columns of the file; without 'neighbors' the page has only the map.
      title: Title of the page.
      map_name: One of embedding.MAPS.
    """
    sections = {
        f'Map of the features ({map_name})': embedding.render_map(
            embedded, map_name, max_points=_POINTS
        )
    }
    if 'neighbors' in columns:
        sections['Images, left, and their nearest neighbors by cosine similarity'] = (
            embedding.render_neighbors(
                embedded, columns['neighbors'], columns['similarities'], num_queries=_QUERIES
            )
        )
    return page.page(title, sections)


def run(_: command_line.Arguments) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    mesh_lib.use_compilation_cache()
    out, html = given.out, given.html
    try:
        errors.check_choice('--map', given.map, embedding.MAPS)
        if not out.endswith(('.npz', '.parquet')):
            raise errors.UserError(
                f'invalid --out: {out}; expected a name ending in .npz or .parquet'
            )
        for path in filter(None, (out, html)):
            if not pathlib.Path(path).absolute().parent.is_dir():
                raise errors.UserError(f'{path} cannot be written: its folder does not exist')
        embedded = embedding.embed(given.checkpoint, given.images, given.batch_size)
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
            text = draw(embedded, columns, title=title, map_name=given.map)
            pathlib.Path(html).write_text(text)
            print(f'{html}: open it in a browser')
    except errors.UserError as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        sys.exit(f'error: {html} cannot be written: {error.strerror}')


def main() -> None:
    command_line.define_path('checkpoint', None, 'Workdir of a run, or file of weights.')
    flags.DEFINE_string('images', None, 'Source of images, a value of config.data.source.')
    command_line.define_path('out', None, 'File to write: .npz or .parquet.')
    flags.DEFINE_integer(
        'neighbors', 0, 'Number of neighbors of each image, in the file and on the page.'
    )
    flags.DEFINE_alias('neighbours', 'neighbors')
    command_line.define_path('html', None, 'Page to write.')
    flags.DEFINE_string('map', 'pca', 'Projection of the features on the page: pca or tsne.')
    flags.DEFINE_integer('batch_size', 256, 'Images in a batch.')
    command_line.start(run, 'checkpoint', 'images', 'out')


if __name__ == '__main__':
    main()
