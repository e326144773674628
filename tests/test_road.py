"""Runs the README's commands for a folder of images, on a small labeled one."""

import json
import pathlib
import re
import shlex
from typing import Any

import numpy as np
from commands import Commands
from PIL import Image

from simsiam_jax.data import sources

ROOT = pathlib.Path(__file__).parent.parent


def test_commands_of_readme_lead_from_folder_to_verdict_and_features(
    command: Commands, tmp_path: pathlib.Path
) -> None:
    digits = sources.open_source('digits')
    for label in range(3):
        (tmp_path / 'images' / str(label)).mkdir(parents=True)
        for i in np.flatnonzero(digits.labels == label)[:50]:
            file = tmp_path / 'images' / str(label) / f'{i}.png'
            Image.fromarray(digits.images[i, ..., 0]).save(file)

    def here(text: str) -> str:
        for name in ('/data/images', 'mine.py', 'runs/'):
            text = text.replace(name, f'{tmp_path}/{name.removeprefix("/data/")}')
        return text

    (tmp_path / 'runs').mkdir()
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 120
    commands = re.findall(r'^    (.*)$', text.replace('\\\n', ' '), re.MULTILINE)
    commands = [line for line in commands if re.match('make|python', line)]
    assert len(commands) <= 10
    for line in commands:
        if line.startswith('make'):
            continue
        module, *flags = shlex.split(here(line.removeprefix('python -m ')))
        if module == 'simsiam_jax.main':
            flags.append('--config.epochs=3')
        done = command(module, *flags)
        assert done.returncode == 0, f'{line}\n{done.stdout}{done.stderr}'
    runs = {
        path.parent.name: json.loads(path.read_text())
        for path in tmp_path.glob('runs/*/verdict.json')
    }
    assert set(runs) == {'mine', 'probe', 'finetuned'}
    names = ['raw pixels', 'random initialization', 'after training']
    assert list(runs['mine']['accuracy']) == names
    assert {run['images'] for run in runs.values()} == {runs['mine']['images']}
    assert 15 <= runs['mine']['images'] <= 45  # a fifth of 150
    assert (tmp_path / 'runs/encoder.safetensors').exists()

    scope: dict[str, Any] = {}
    exec(here(re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]), scope)
    assert scope['features'].shape == (150, scope['encoder'].features)
    assert scope['neighbors'].positions.shape == (150, 5)
    assert (tmp_path / 'runs/encoder.jax').exists()
