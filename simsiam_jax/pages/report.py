"""The report of runs: one page with their curves, pictures, configurations and versions."""

import base64
import datetime
import html
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from simsiam_jax import config as config_lib
from simsiam_jax import errors
from simsiam_jax.pages import curves, embedding, page, runs
from simsiam_jax.pages.runs import RunRecord
from simsiam_jax.terminal import say

NAME = 'report.html'

# Images whose nearest neighbors are shown, so many of each, found among so many.
_QUERIES, _NEAREST, _AMONG = 8, 7, 1000


def at_end(workdir: str) -> None:
    """WORKDIR/report.html, by the first process. What is in its way is said and ends no run."""
    if jax.process_index():
        return
    again = f'python -m simsiam_jax.tools.report {workdir}'
    try:
        # One process of several cannot compute on the devices of all.
        text = draw([workdir], neighbors=jax.process_count() == 1)
        (epath.Path(workdir) / NAME).write_text(text)
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        say(f'no report: {package} is not installed; pip install {package}, then {again}')
    except Exception as error:  # whatever it is: the run is whole
        reason = [type(error).__name__, *str(error).splitlines()[:1]]
        say(f'warning: no report: {": ".join(reason)}; {again} tries again')
    else:
        say(f'report: {epath.Path(workdir) / NAME}')


def draw(
    workdirs: Sequence[str | os.PathLike[str]], *, neighbors: bool = True, images: str = ''
) -> str:
    """The page of one run, or of several to compare.

    Args:
      neighbors: whether to compute them, from the newest checkpoints.
      images: a source to show the neighbors of; '': as the run says, those of the evaluation or
        else of the training.

    Raises:
      UserError: a folder is not the workdir of a run.
      ModuleNotFoundError: plotly is not installed.
    """
    found = runs.read(workdirs)
    sections = {'Summary': page.table([run.name for run in found], _summary(found))}
    if warnings := _warnings(found):
        sections['Warnings'] = warnings
    sections['Curves'] = curves.draw(found)
    if views := _views(found):
        sections['Augmented views, each image and its views side by side'] = views
    if neighbors:
        sections['Images, left, and their nearest by cosine similarity'] = ''.join(
            page.folded(run.name, _neighbors(run, images), opened=i == 0)
            for i, run in enumerate(found)
        )
    sections['Configuration'] = _configuration(found)
    if any(run.starts for run in found):
        sections['Versions and devices'] = _versions(found)
    title = found[0].name if len(found) == 1 else f'{len(found)} runs'
    return page.page(title, sections)


def _summary(found: Sequence[RunRecord]) -> dict[str, list[str]]:
    columns = [_facts(run) | _figures(run) | _circumstances(run) for run in found]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, '') for column in columns] for name in names}


def _facts(run: RunRecord) -> dict[str, str]:
    config, step = run.config, run.step
    method = f'{config["method.name"]} on ' if 'method.name' in config else ''
    facts = {
        'task': config.get('task', ''),
        'what': f'{method}{config.get("model.name", "")}',
        'data': config.get('data.source') or config.get('eval.train') or '',
        'steps': f'{step:,}',
        'epochs': f'of {config.get("epochs", "?")}',
        'images seen': f'{step * run.batch_size:,}',
    }
    if run.starts:
        facts['data'] += f', {run.starts[-1]["images"]:,} images'
        facts['steps'] += f' of {run.steps:,}'
        facts['epochs'] = f'{step / run.steps_per_epoch:.4g} {facts["epochs"]}'
    return facts


def _figures(run: RunRecord) -> dict[str, str]:
    """The last of what was measured; of accuracies the best, too."""
    figures = {}
    for key, curve in sorted(run.curves.items(), key=lambda item: item[0] != 'train/loss'):
        part, _, name = key.rpartition('/')
        if key in ('train/images_per_second', 'train/data_wait') or name.startswith('lr'):
            continue
        figures[name if part == 'train' else key] = f'{curve[-1][1]:.5g}'
        step, best = max(curve, key=lambda point: point[1])
        if part == 'eval' and best > curve[-1][1]:
            figures[key] += f' (best {best:.5g}, step {step:,})'
    return figures


def _circumstances(run: RunRecord) -> dict[str, str]:
    rows = {}
    if rate := run.typical('train/images_per_second'):
        rows['images/s (median)'] = f'{rate:,.0f}'
    if (wait := run.typical('train/data_wait')) is not None:
        rows['waiting for data (median)'] = f'{wait:.0%}'
    if run.seconds:
        rows['time'] = str(datetime.timedelta(seconds=round(run.seconds)))
    return rows


def _warnings(found: Sequence[RunRecord]) -> str:
    """What the guard has said, and the images that could not be read."""
    parts = []
    for run in found:
        for name in ('guard.txt', 'bad_images.txt'):
            if (path := run.folder / name).exists():
                text = f'<pre class="text">{html.escape(path.read_text())}</pre>'
                parts.append(page.folded(f'{run.name}: {name}', text, opened=name == 'guard.txt'))
    return ''.join(parts)


def _views(found: Sequence[RunRecord]) -> str:
    """Each picture once, though several runs may have it."""
    owners: dict[bytes, list[str]] = {}
    for run in found:
        if (path := run.folder / 'views.png').exists():
            owners.setdefault(path.read_bytes(), []).append(run.name)
    pictures = [
        f'<div>{html.escape(", ".join(names))}<br><img class="views" alt="augmented views" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"></div>'
        for picture, names in owners.items()
    ]
    return page.row(pictures) if pictures else ''


def _neighbors(run: RunRecord, images: str) -> str:
    images = images or run.config.get('eval.test') or run.config.get('data.source') or ''
    try:
        embedded = embedding.embed(str(run.folder), images, 64, _AMONG)
        nearest = min(_NEAREST, len(embedded.features.x) - 1)
        places, similarities = embedding.neighbors(embedded.features, nearest)
    except (errors.UserError, OSError, ModuleNotFoundError) as error:
        return f'<p>None: {html.escape(str(error))}</p>'
    among = f'<p>Among {len(embedded.features.x):,} images of {html.escape(images)}.</p>'
    return among + embedding.draw(embedded, places, similarities, queries=_QUERIES)


def _configuration(found: Sequence[RunRecord]) -> str:
    """What differs between the runs, or of one run from the default; then all."""
    columns = {run.name: run.config for run in found}
    if len(found) == 1:
        make = config_lib.DEFAULTS.get(found[0].config.get('task', ''), ConfigDict)
        columns['default'] = flatten_dict(make().to_dict(), sep='.')
    keys = sorted({key for column in columns.values() for key in column})
    rows = {key: [_shown(column.get(key, '')) for column in columns.values()] for key in keys}
    differing = {key: cells for key, cells in rows.items() if len(set(cells)) > 1}
    everything = page.table(list(columns), rows, marked=differing)
    first = page.table(list(columns), differing) if differing else '<p>Nothing differs.</p>'
    return first + page.folded(f'All {len(rows)} keys', everything)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _versions(found: Sequence[RunRecord]) -> str:
    """A column for every start of every run."""
    columns: dict[str, dict[str, str]] = {}
    for run in found:
        for start in run.starts:
            begun = datetime.datetime.fromtimestamp(start['time'], datetime.UTC)
            head = f'{run.name}, from step {start["step"]:,}'
            while head in columns:
                head += ', again'
            columns[head] = {
                'begun': f'{begun:%Y-%m-%d %H:%M} UTC',
                'host': start['host'],
                'processes': str(start['processes']),
                'devices': start['devices'],
                **start['versions'],
            }
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = {name: [column.get(name, '') for column in columns.values()] for name in names}
    return page.table(list(columns), rows)
