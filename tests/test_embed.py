"""Tests of tools/embed.py and pages/embedding.py; one test opens the page in a browser."""

import pathlib
import shutil
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
from commands import Commands
from PIL import Image
from pyarrow import parquet
from sklearn.neighbors import NearestNeighbors

import simsiam_jax
from simsiam_jax.data import sources
from simsiam_jax.pages import embedding


@pytest.fixture(scope='module')
def run(command: Commands, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns the workdir of the quickstart's narrow network after an epoch."""
    workdir = tmp_path_factory.mktemp('run')
    flags = ['epochs=1', 'model.width_multiplier=0.125', 'log.tensorboard=False', 'guard=off']
    flags += ['log.report=False', 'eval.train=', 'eval.test=', 'augment.rotation=0.0']
    given = ('--config=configs/quickstart.py', f'--workdir={workdir}')
    done = command('simsiam_jax.main', *given, *(f'--config.{flag}' for flag in flags))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns a folder of 37 digits as PNGs in folders of their classes, one of them damaged."""
    root = tmp_path_factory.mktemp('digits')
    digits = sources.open_source('digits/test')
    for i in range(37):
        path = root / str(digits.labels[i]) / f'{i:02}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits.images[i, ..., 0]).save(path)
    (root / str(digits.labels[7]) / '07.png').write_bytes(b'no image')
    return root


@pytest.fixture(scope='module')
def embed(command: Commands, run: pathlib.Path) -> Callable[..., subprocess.CompletedProcess]:
    """Returns embed(images, out, *flags), which uses the encoder of the run."""

    def embed(images, out, *flags: str) -> subprocess.CompletedProcess:
        given = (f'--checkpoint={run}', f'--images={images}', f'--out={out}')
        return command('simsiam_jax.tools.embed', *given, *flags)

    return embed


@pytest.fixture(scope='module')
def embedded(embed, folder, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    root = tmp_path_factory.mktemp('out')
    flags = ('--neighbors=5', f'--html={root / "page.html"}', '--batch_size=16')
    # One damaged image of 37 is more than 1%, so the list leaves it out.
    names = sorted(p for p in folder.rglob('*.png') if p.name != '07.png')
    (root / 'list.csv').write_text(''.join(f'{p},{p.parent.name}\n' for p in names))
    done = embed(f'files:{root / "list.csv"}', root / 'out.npz', *flags)
    assert done.returncode == 0, done.stderr
    assert 'out.npz: 36 images' in done.stdout
    with np.load(root / 'out.npz') as file:
        return dict(file), root / 'page.html'


def test_features_equal_encoder_with_names_and_labels(run, embedded) -> None:
    columns, _ = embedded
    module, variables = simsiam_jax.load_encoder(run)
    for name, label, feature in zip(
        columns['names'], columns['labels'], columns['features'], strict=True
    ):
        assert pathlib.Path(name).parent.name == columns['classes'][label]
        image = np.asarray(Image.open(name))[None, ..., None] / 255 / 0.38
        np.testing.assert_allclose(feature, module.apply(variables, image)[0], rtol=1e-4, atol=1e-5)


def test_embed_samples_images_with_their_names(run) -> None:
    sample = embedding.embed(str(run), 'digits/test', 8, max_images=5)
    places = [0, 89, 179, 269, 359]
    assert sample.names == [f'digits/test[{i}]' for i in places]
    module, variables = simsiam_jax.load_encoder(run)
    images = sources.open_source('digits/test').images[places] / 255 / 0.38
    np.testing.assert_allclose(
        sample.features.x, module.apply(variables, images), rtol=1e-4, atol=1e-5
    )


def test_neighbors_equal_scikit_learn(embedded) -> None:
    columns, _ = embedded
    reference = NearestNeighbors(n_neighbors=5, metric='cosine').fit(columns['features'])
    distances, places = reference.kneighbors()  # of every image, without itself
    np.testing.assert_array_equal(columns['neighbors'], places)
    np.testing.assert_allclose(columns['similarities'], 1 - distances, atol=1e-5)


def test_parquet_has_row_for_each_image(embed, tmp_path) -> None:
    done = embed('digits/test', tmp_path / 'out.parquet')
    assert done.returncode == 0, done.stderr
    table = parquet.read_table(tmp_path / 'out.parquet')
    assert table.num_rows == 360
    assert table.column('names')[7].as_py() == 'digits/test[7]'
    assert table.column('labels').to_pylist() == sources.open_source('digits/test').labels.tolist()
    assert len(table.column('features')[0].as_py()) == 32


def test_page_renders_in_browser_without_network(embedded) -> None:
    browsers = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    chromium = shutil.which('chromium')
    if not chromium:
        pytest.skip('chromium is not installed')
    columns, page = embedded
    messages, requests = [], []
    with browsers.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=['--no-sandbox', '--disable-gpu']
        )
        view = browser.new_page(viewport={'width': 390, 'height': 800})  # a phone's
        view.on('console', lambda message: messages.append(message.text))
        view.on('pageerror', lambda error: messages.append(str(error)))
        view.on('request', lambda request: requests.append(request.url))
        view.goto(page.as_uri())
        assert view.locator('.row').count() == 24
        assert view.locator('.row').first.locator('figure').count() == 6
        loaded = 'images => images.every(i => i.complete && i.naturalWidth > 0)'
        assert view.locator('figure img').evaluate_all(loaded)
        assert view.locator('.scatterlayer .point').count() == 36
        assert view.locator('.legend .traces').count() == len(columns['classes'])
        assert view.evaluate('document.documentElement.scrollWidth') == 390
        browser.close()
    assert messages == []
    assert [url for url in requests if not url.startswith('data:')] == [page.as_uri()]


def test_embed_command_refuses_wrong_arguments(embed, folder, tmp_path) -> None:
    for images, out, flags, message in (
        (f'folder:{folder}', 'o.npz', (), 'cannot be read, more than config.data.max_bad_fraction'),
        ('digits/test', 'o.csv', (), 'expected a name ending in .npz or .parquet'),
        ('digits/test', 'no/o.npz', (), 'cannot be written: its folder does not exist'),
        ('digits/test', 'o.npz', ('--neighbors=360',), 'expected 1 to 359'),
        ('digits/test', 'o.npz', ('--map=umap',), "--map is 'umap'"),
        ('digit', 'o.npz', (), "source is 'digit'"),
    ):
        done = embed(images, tmp_path / out, *flags)
        assert done.returncode == 1
        assert message in done.stderr
        assert 'Traceback' not in done.stderr
        assert not (tmp_path / 'o.npz').exists()
