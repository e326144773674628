"""Tests of examples/: the scripts, except for the one that needs PyTorch, on few images."""

import importlib.util
import pathlib
import re
import runpy
import sys

import pytest
from PIL import Image

import simsiam_jax
from simsiam_jax import errors
from simsiam_jax.data import sources

EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'
pytestmark = pytest.mark.usefixtures('_compiled_quickly')


def example(name: str, *arguments: object) -> None:
    """Runs an example with arguments of its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [name, *map(str, arguments)])
        # umap-learn takes long to import.
        find = importlib.util.find_spec
        patch.setattr(
            importlib.util, 'find_spec', lambda name, *rest: name != 'umap' and find(name, *rest)
        )
        runpy.run_path(str(EXAMPLES / name), run_name='__main__')


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns the workdir of a short run on digits."""
    workdir = tmp_path_factory.mktemp('digits') / 'run'
    settings = {'model.width_multiplier': 0.125, 'log.tensorboard': False, 'guard': 'off'}
    settings |= {'log.report': False, 'eval.baselines': False, 'eval.every_epochs': 1}
    simsiam_jax.pretrain(workdir, config='quickstart', epochs=1, **settings)
    return workdir


def test_search_page_shows_similar_images_of_a_folder(tmp_path, capsys) -> None:
    digits = sources.open_source('digits/test')
    folder = tmp_path / 'images'
    folder.mkdir()
    for i in range(40):
        Image.fromarray(digits.images[i, ..., 0].repeat(4, 0).repeat(4, 1)).save(
            folder / f'{i:02}.png'
        )
    for resumed in (False, True):
        example('search_page.py', folder, tmp_path / 'out', 1)
        shown = capsys.readouterr().out
        assert ('40 images' in shown) == (not resumed)  # of the training
        assert re.search(r'^00\.png is similar to \d\d\.png \(0\.\d\d\), ', shown, re.MULTILINE)
    page = (tmp_path / 'out' / 'search.html').read_text()
    assert 'The map shows 40 images' in page


def test_finetune_nnx_learns_from_few_labels(run, capsys) -> None:
    example('finetune_nnx.py', run)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith('epoch')]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert float(lines[-1].removeprefix('test top-1 ')) > 0.5


def test_write_page_refuses_unknown_map(run, tmp_path) -> None:
    encoder = simsiam_jax.Encoder.load(run)
    with pytest.raises(errors.UserError, match="--map is 'umop'; did you mean umap"):
        encoder.write_page('digits/test', tmp_path / 'page.html', map='umop')


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob('*.py')}
    assert len(lengths) == 3
    assert max(lengths.values()) <= 50, lengths
