"""Makes a page to search your own images: pre-trains an encoder, then maps the images.

    python examples/search_page.py FOLDER OUT [EPOCHS]

Rerun it to resume an interrupted training, or to use the trained encoder with other images.
"""

import pathlib
import sys

import simsiam_jax


def main(folder: str, out: str, epochs: str = '') -> None:
    source = f'folder:{folder}'
    workdir = pathlib.Path(out) / 'run'
    if (workdir / 'report.html').exists():  # the training is complete
        encoder = simsiam_jax.Encoder.load(workdir)
    else:
        settings = simsiam_jax.advice(source)
        if epochs:
            settings['epochs'] = int(epochs)
        encoder = simsiam_jax.pretrain(workdir, source, **settings).encoder

    endings = {'.png', '.jpg', '.jpeg'}
    images = [p for p in sorted(pathlib.Path(folder).rglob('*')) if p.suffix.lower() in endings]
    nearest = encoder.similar(images, k=3)
    for image, others, cosines in zip(images[:5], *nearest, strict=False):
        similar = ', '.join(
            f'{images[i].name} ({s:.2f})' for i, s in zip(others, cosines, strict=True)
        )
        print(f'{image.name} is similar to {similar}')
    encoder.write_page(source, f'{out}/search.html')
    print(f'open {out}/search.html in a browser')


if __name__ == '__main__':
    main(*sys.argv[1:])
