"""Tests of tools/embed.py and of pages/: embedding.py, explorer.py, maps.py, thumbnails.py."""

import contextlib
import importlib.util
import io
import pathlib
import subprocess
from collections.abc import Callable

import browsers
import numpy as np
import pytest
from commands import Commands
from PIL import Image
from pyarrow import parquet
from sklearn.neighbors import NearestNeighbors

import simsiam_jax
from simsiam_jax import errors
from simsiam_jax.data import sources
from simsiam_jax.pages import curves, embedding, maps, thumbnails
from simsiam_jax.tasks import feature_store


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
    flags = ('--neighbors=5', f'--html={root / "page.html"}', '--batch_size=16', '--map=pca')
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


def test_stopped_features_resume_with_the_next_image(run, tmp_path, monkeypatch, capsys) -> None:
    whole = embedding.embed(str(run), 'digits/test', 8)
    monkeypatch.setattr(feature_store, '_SAVE_SECONDS', -1)
    evaluated = feature_store.features_of
    seen = []

    def stopped(*arguments):
        for number, batch in enumerate(evaluated(*arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield batch

    def counted(encode, variables, source, loader):
        seen.append(len(source))
        return evaluated(encode, variables, source, loader)

    store = feature_store.FeatureStore(tmp_path / 'o.partial')
    monkeypatch.setattr(feature_store, 'features_of', stopped)
    with pytest.raises(KeyboardInterrupt):
        embedding.embed(str(run), 'digits/test', 8, store=store)
    monkeypatch.setattr(feature_store, 'features_of', counted)
    resumed = embedding.embed(str(run), 'digits/test', 8, store=store)
    assert 'resuming at image 40 of 360' in capsys.readouterr().out
    assert seen == [320]
    again = embedding.embed(str(run), 'digits/test', 8, store=store)  # all is computed
    assert seen == [320]
    for found in (resumed, again):
        np.testing.assert_array_equal(found.features.x, whole.features.x)
        np.testing.assert_array_equal(found.features.labels, whole.features.labels)
        np.testing.assert_array_equal(found.features.indices, np.arange(360))
        assert found.names == whole.names
    embedding.embed(str(run), 'digits/train', 8, store=store)  # other images: from the start
    assert seen[-1] == 1437
    store.remove()
    assert not (tmp_path / 'o.partial').exists()


def test_npy_is_memory_map_beside_other_columns(embed, tmp_path) -> None:
    done = embed('digits/test', tmp_path / 'o.npy', '--neighbors=3')
    assert done.returncode == 0, done.stderr
    x = np.load(tmp_path / 'o.npy', mmap_mode='r')
    table = parquet.read_table(tmp_path / 'o.npy.parquet')
    assert x.shape == (360, 32)
    assert table.column_names == ['names', 'labels', 'neighbors', 'similarities']
    cosine = x[0] @ x[table.column('neighbors')[0].as_py()[0]]
    cosine /= np.linalg.norm(x[0]) * np.linalg.norm(x[table.column('neighbors')[0].as_py()[0]])
    assert table.column('similarities')[0].as_py()[0] == pytest.approx(float(cosine), abs=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['o.npy', 'o.npy.parquet']


def test_neighbors_in_blocks_equal_those_of_one_block(monkeypatch) -> None:
    x = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    positions, similarities = embedding.neighbors(x, 4)
    monkeypatch.setattr(embedding, '_BLOCK', 33)  # the last block has a single image
    blocks = embedding.neighbors(x, 4)
    np.testing.assert_array_equal(blocks[0], positions)
    np.testing.assert_allclose(blocks[1], similarities, atol=1e-6)


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


@contextlib.contextmanager
def opened(page: pathlib.Path, width: int, scheme: str = 'light', *, webgl: bool = True):
    """Opens a page; yields its view, its console messages and its network requests."""
    software = ['--use-angle=swiftshader', '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist']
    options = software if webgl else ['--disable-gpu', '--disable-3d-apis']
    messages: list[str] = []
    with browsers.chromium(*options) as browser:
        view = browser.new_page(viewport={'width': width, 'height': 800}, color_scheme=scheme)
        view.on('console', lambda message: messages.append(message.text))
        view.on('pageerror', lambda error: messages.append(str(error)))
        view.on('request', lambda request: messages.append(request.url))
        view.goto(page.as_uri(), timeout=120_000)  # ms; a busy machine renders slowly
        view.wait_for_selector('.chosen .picture canvas[data-drawn]', timeout=120_000)
        yield view, messages
    # Chromium itself reports that it draws without a graphics card.
    messages = [x for x in messages if not x.startswith('data:') and 'GPU stall' not in x]
    assert messages == [page.as_uri()]


@pytest.mark.parametrize(('width', 'scheme'), [(1280, 'light'), (390, 'dark')])
def test_page_shows_map_and_neighbors_without_network(embedded, width, scheme) -> None:
    columns, page = embedded
    with opened(page, width, scheme) as (view, _):
        assert view.evaluate('document.documentElement.scrollWidth') == width
        assert view.locator('.explorer').get_attribute('data-drawn') == '36'
        names = view.locator('.groups button').all_inner_texts()
        members = np.bincount(columns['labels'])
        expected = [f'{name} ({n})' for name, n in zip(columns['classes'], members, strict=True)]
        assert names == expected
        # The points are seen, not only in the data: pixels of the map have their colors.
        picture = Image.open(io.BytesIO(view.locator('.map').screenshot())).convert('RGB')
        pixels = np.asarray(picture).reshape(-1, 3).astype(int)
        background = np.array([255] * 3 if scheme == 'light' else [0x16, 0x18, 0x1D])
        for color in curves.COLORS[: min(7, len(members))]:
            point = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
            shown = 0.75 * point + 0.25 * background
            assert (abs(pixels - shown).max(1) < 12).any(), color
        assert view.locator('.row').count() == 24
        assert view.locator('.row').first.locator('figure').count() == 6
        loaded = 'images => images.every(i => i.complete && i.naturalWidth > 0)'
        assert view.locator('figure img').evaluate_all(loaded)
        described = 'all => all.every(e => e.getAttribute("aria-label"))'
        assert view.locator('.explorer canvas[role=img], .map').evaluate_all(described)


def test_page_selects_images_by_pointer_keyboard_and_name(embedded) -> None:
    columns, page = embedded
    names = [pathlib.Path(name).name for name in columns['names']]

    def shown(view) -> int:
        return names.index(view.locator('.chosen h3').inner_text())

    with opened(page, 1280) as (view, _):
        assert shown(view) == 0
        near = view.locator('.near button')
        assert near.count() == 5
        for text, j, cosine in zip(
            near.all_inner_texts(), columns['neighbors'][0], columns['similarities'][0], strict=True
        ):
            label = columns['classes'][columns['labels'][j]]
            assert text.split() == [label, f'{cosine:.3f}', names[j]]
        near.nth(2).click()
        assert shown(view) == columns['neighbors'][0, 2]
        # The picture is the image itself, because digits are smaller than thumbnails.
        drawn = view.locator('.picture canvas').evaluate(
            'c => Array.from(c.getContext("2d").getImageData(0, 0, 8, 8).data)'
        )
        digit = np.asarray(Image.open(columns['names'][shown(view)]))
        np.testing.assert_allclose(np.reshape(drawn, (8, 8, 4))[..., 0], digit, atol=24)

        view.locator('.find').fill(names[20])
        view.keyboard.press('Enter')
        assert shown(view) == 20
        view.locator('.find').fill('no such image')
        view.keyboard.press('Enter')
        assert view.locator('.found').inner_text() == 'No name or label contains "no such image".'

        place = """i => {
          const [map, {x, y}] = [document.querySelector('.map'), window.positions(i)];
          const {left, top} = map.getBoundingClientRect();
          const {xaxis, yaxis} = map._fullLayout;
          return [left + xaxis._offset + xaxis.d2p(x), top + yaxis._offset + yaxis.d2p(y)];
        }"""
        view.evaluate("""() => window.positions = wanted => {
          const shape = document.querySelector('.map').layout.shapes.at(-1);
          return {x: shape.xanchor, y: shape.yanchor};
        }""")
        x, y = view.evaluate(place, 20)
        view.locator('.find').fill(names[3])
        view.keyboard.press('Enter')
        assert shown(view) == 3
        view.mouse.move(x - 1, y)
        view.mouse.move(x, y)
        view.wait_for_selector('.preview:not([hidden])')
        assert names[20] in view.locator('.preview').inner_text()
        view.mouse.click(x, y)
        view.wait_for_function(f'document.querySelector(".chosen h3").innerText === "{names[20]}"')

        span = 'map => map._fullLayout.xaxis.range[1] - map._fullLayout.xaxis.range[0]'
        before = view.locator('.map').evaluate(span)
        view.locator('.map').evaluate(
            'map => { window.zoomed = new Promise(done => map.once("plotly_relayout", done)) }'
        )
        view.mouse.wheel(0, -200)
        view.evaluate('() => window.zoomed.then(() => null)')
        assert view.locator('.map').evaluate(span) < before
        view.locator('.map').focus()
        view.keyboard.press('0')
        view.wait_for_function(
            f'Math.abs(({span})(document.querySelector(".map")) - {before}) < 1e-6'
        )
        view.locator('[aria-label="Zoom in"]').click()
        assert view.locator('.map').evaluate(span) == pytest.approx(before / 2)
        view.locator('.map').focus()
        view.keyboard.press('ArrowRight')  # unless it is the last one on the right
        start, image = view.evaluate('window.positions()'), shown(view)
        view.keyboard.press('ArrowLeft')
        left = view.evaluate('window.positions()')
        assert shown(view) != image
        assert left['x'] < start['x']

        view.locator('.groups button').first.click()
        opacity = view.locator('.map').evaluate('map => map.data.map(t => t.marker.opacity)')
        assert opacity[0] > 0.5
        assert max(opacity[1:]) < 0.2
        view.locator('.coloring').select_option('clusters')
        groups = view.locator('.groups button').all_inner_texts()
        assert groups[0].startswith('cluster 1 (')
        assert sum(int(text.split('(')[1].rstrip(')')) for text in groups) == 36


def test_page_without_webgl_draws_points_as_elements(embedded) -> None:
    with opened(embedded[1], 390, webgl=False) as (view, _):
        assert view.locator('.scatterlayer .point').count() == 36


def test_page_of_many_groups_shares_a_color_among_rare_ones(tmp_path) -> None:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(20), 3), np.arange(20, 45)])
    count = len(labels)
    images = rng.integers(0, 255, (count, 8, 8, 3), np.uint8)
    x = rng.normal(size=(count, 8)).astype(np.float32)
    source = sources.ArraySource(images, labels, tuple(f'c{i}' for i in range(45)), 'random')
    names = [f'{i}.png' for i in range(count)]
    features = embedding.Features(x, labels, np.arange(count))
    embedded = embedding.Embedding(source, features, names)
    text = embedding.render_page(embedded, None, title='45', map_name='pca', max_points=60)
    assert f'The map shows 60 of {count} images, evenly spaced; neighbors are among these' in text
    page = tmp_path / 'page.html'
    page.write_text(text)
    with opened(page, 1280) as (view, _):
        groups = view.locator('.groups button').all_inner_texts()
        shown = labels[np.unique(np.linspace(0, count - 1, 60).astype(int))]
        assert len(groups) == 21
        assert groups[0].startswith(f'{len(set(shown)) - 20} others (')


def test_maps_use_umap_if_installed_and_say_which(monkeypatch) -> None:
    x = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert maps.choose('auto') == 'pca'
    computed = maps.compute(x, 'auto')
    assert 'PCA: the two directions of the largest variance' in computed.name
    assert 'pip install umap-learn' in computed.name
    assert 'umap-learn' not in maps.compute(x, 'pca').name
    with pytest.raises(errors.UserError, match=r'umap-learn is not installed\. Run pip install'):
        maps.choose('umap')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name == 'umap')
    assert maps.choose('auto') == 'umap'


@pytest.mark.long
def test_umap_separates_distant_features() -> None:
    pytest.importorskip('umap')
    rng = np.random.default_rng(0)
    centers = np.repeat(np.eye(3, 8), 40, axis=0)
    x = (centers + rng.normal(size=centers.shape) * 0.02).astype(np.float32)
    computed = maps.compute(x, 'umap')
    assert computed.name == 'UMAP'
    near = NearestNeighbors(n_neighbors=5).fit(computed.points).kneighbors()[1]
    assert (near // 40 == np.arange(120)[:, None] // 40).all()


@pytest.mark.parametrize('count', [1, 2, 5])
def test_maps_take_few_or_identical_images(count: int) -> None:
    computed = maps.compute(np.ones((count, 4), np.float32), 'pca')
    assert computed.points.shape == (count, 2)
    np.testing.assert_array_equal(computed.points, 0)
    assert computed.clusters.shape == (count,)


def test_clusters_are_groups_of_similar_features_largest_first() -> None:
    centers = np.repeat(np.eye(10), np.arange(3, 13), axis=0)
    x = centers + np.random.default_rng(0).normal(size=centers.shape) * 0.01
    clusters = maps.compute(x.astype(np.float32), 'pca').clusters
    assert np.bincount(clusters).tolist() == list(range(12, 2, -1))
    np.testing.assert_array_equal(clusters, 9 - centers.argmax(1))


def test_thumbnails_within_limit_shrink_then_thin_out() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (600, 6, 8, 3), np.uint8)

    def read(i: int) -> np.ndarray:
        return coarse[i].repeat(20, 0).repeat(20, 1)  # 120 x 160 pixels

    limits = 10**7, 100_000, 20_000
    made = [thumbnails.make(read, 600, limit=limit) for limit in limits]
    assert [each.side for each in made] == [96, 32, 32]
    assert [each.count for each in made[:2]] == [600, 600]
    for each, limit in zip(made, limits, strict=True):
        assert sum(map(len, each.sheets)) <= limit
        (have,) = np.nonzero(each.places >= 0)
        np.testing.assert_array_equal(each.places[have], np.arange(len(have)))
        np.testing.assert_array_equal(
            each.sizes[have], [[each.side, each.side * 3 // 4]] * len(have)
        )
    assert 0 < made[2].count < 600
    sheet = np.asarray(Image.open(io.BytesIO(made[0].sheets[1])).convert('RGB'))
    tile = sheet[2 * 96 : 2 * 96 + 72, 5 * 96 : 6 * 96]  # image 256 + 2 * 16 + 5
    small = np.asarray(Image.fromarray(read(293)).resize((8, 6), Image.Resampling.BOX))
    found = np.asarray(Image.fromarray(tile).resize((8, 6), Image.Resampling.BOX))
    assert abs(found.astype(int) - small).mean() < 15  # random images differ by 85


def test_embed_command_refuses_wrong_arguments(embed, folder, tmp_path) -> None:
    for images, out, flags, message in (
        (f'folder:{folder}', 'o.npz', (), 'cannot be read, more than config.data.max_bad_fraction'),
        ('digits/test', 'o.csv', (), 'expected a name ending in .npz, .npy or .parquet'),
        ('digits/test', 'no/o.npz', (), 'cannot be written: its folder does not exist'),
        ('digits/test', 'o.npz', ('--neighbors=360',), 'expected 1 to 359'),
        ('digits/test', 'o.npz', ('--map=umop',), "--map is 'umop'; did you mean umap?"),
        ('digit', 'o.npz', (), "source is 'digit'"),
    ):
        done = embed(images, tmp_path / out, *flags)
        assert done.returncode == 1
        assert message in done.stderr
        assert 'Traceback' not in done.stderr
        assert not (tmp_path / 'o.npz').exists()
