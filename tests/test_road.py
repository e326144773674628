"""Runs the README's commands for a folder of images, on a small labeled one."""

import json
import pathlib
import re
import shlex

import numpy as np
from commands import Commands
from PIL import Image

from simsiam_jax.data import sources

ROOT = pathlib.Path(__file__).parent.parent


def test_commands_of_readme_lead_from_folder_to_verdict(
    command: Commands, tmp_path: pathlib.Path
) -> None:
    digits = sources.open_source('digits')
    for label in range(3):
        (tmp_path / 'images' / str(label)).mkdir(parents=True)
        for i in np.flatnonzero(digits.labels == label)[:50]:
            file = tmp_path / 'images' / str(label) / f'{i}.png'
            Image.fromarray(digits.images[i, ..., 0]).save(file)
    text = (ROOT / 'README.md').read_text()
    road = re.search(r'\*\*From a folder to a verdict.*?\n\*\*', text, re.DOTALL)[0]
    commands = re.findall(r'^    python -m (.*)$', road.replace('\\\n', ' '), re.MULTILINE)
    assert len(commands) == 5
    for line in commands:
        line = line.replace('/data/images', f'{tmp_path}/images').replace('runs/', f'{tmp_path}/')
        module, *flags = shlex.split(line.replace('mine.py', f'{tmp_path}/mine.py'))
        if module == 'simsiam_jax.main':
            flags.append('--config.epochs=3')
        done = command(module, *flags)
        assert done.returncode == 0, f'{line}\n{done.stdout}{done.stderr}'
    runs = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob('*/verdict.json')
    }
    assert set(runs) == {'mine', 'probe', 'finetuned'}
    names = ['raw pixels', 'random initialization', 'after training']
    assert list(runs['mine']['accuracy']) == names
    assert {run['images'] for run in runs.values()} == {runs['mine']['images']}
    assert 15 <= runs['mine']['images'] <= 45  # a fifth of 150
    assert (tmp_path / 'encoder.safetensors').exists()
