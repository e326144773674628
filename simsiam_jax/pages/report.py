"""Reports of runs: one page with curves, images, configurations and versions."""

import datetime
import html
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from simsiam_jax import config as config_lib
from simsiam_jax import config_keys, errors
from simsiam_jax.pages import curves, embedding, overview, page, quantities, ranking, runs
from simsiam_jax.pages.runs import RunRecord
from simsiam_jax.terminal import say

NAME = 'report.html'

# Facts about a run that stand above its verdict.
_FIRST_FACTS = ('model', 'data', 'steps', 'epochs')

# Number of images in the report, of nearest neighbors per image, and of images to search.
_NUM_QUERIES, _NUM_NEIGHBORS, _NUM_IMAGES = 8, 7, 1000


def write_report(workdir: str) -> None:
    """Writes WORKDIR/report.html in process 0; prints a warning if that fails."""
    if jax.process_index():
        return
    command = f'python -m simsiam_jax.tools.report {workdir}'
    try:
        # A single process of several cannot run computations on all devices.
        text = render_report([workdir], neighbors=jax.process_count() == 1)
        (epath.Path(workdir) / NAME).write_text(text)
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        say(f'no report: {package} is not installed. Run pip install {package}, then {command}')
    except Exception as error:  # of any type, because the run itself is complete
        reason = [type(error).__name__, *str(error).splitlines()[:1]]
        say(f'warning: no report: {": ".join(reason)}; to retry, run {command}')
    else:
        say(f'report: {epath.Path(workdir) / NAME}')


def render_report(
    workdirs: Sequence[str | os.PathLike[str]], *, neighbors: bool = True, images: str = ''
) -> str:
    """Returns the page of one run, or of several runs to compare.

    Args:
      workdirs: Workdirs of the runs.
      neighbors: Show nearest neighbors, computed from the newest checkpoints.
      images: Source of the images whose neighbors are shown; '' uses the run's evaluation images,
        or else its training images.

    Raises:
      UserError: A folder is not the workdir of a run.
      ModuleNotFoundError: plotly is not installed.
    """
    records = runs.read_runs(workdirs)
    sections = _curves(records)
    sections = {'Result': _result(records) + sections.pop('Curves')} | sections
    if views := _views(records):
        sections['Augmented views, each image beside its views'] = views
    if neighbors:
        sections['Nearest neighbors and map of the features'] = ''.join(
            page.folded(run.name, _embedding(run, images), opened=i == 0)
            for i, run in enumerate(records)
        )
    sections['Configuration'] = _configuration(records)
    sections['Details'] = _details(records)
    if any(run.starts for run in records):
        sections['Versions and devices'] = _versions(records)
    title = records[0].name if len(records) == 1 else f'{len(records)} runs'
    return page.page(title, sections)


def _summary(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    columns = [_facts(run) | _final_metrics(run) | _speed(run) for run in records]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, '') for column in columns] for name in names}


def _curves(records: Sequence[RunRecord]) -> dict[str, str]:
    """Returns the charts by section: results first, then signs of collapse, then the rest."""
    keys = curves.logged(records)
    if not keys:
        return {'Curves': '<p>No metric has two points yet.</p>'}
    main = [key for key in keys if key in (*quantities.ACCURACIES, 'train/top1', 'train/loss')]
    signs = [key for key in keys if key.startswith('guard/') or key == 'train/z_std']
    rest = [key for key in keys if key not in (*main, *signs)]
    controls = curves.render_controls(records)
    sections = {'Curves': controls + curves.render_charts(records, main, main=True)}
    if signs:
        sections['Signs of collapse'] = curves.render_charts(records, signs)
    if rest:
        sections['Rates and speed'] = curves.render_charts(records, rest)
    return sections


def _facts(run: RunRecord) -> dict[str, str]:
    config, step = run.config, run.step
    method = f'{config["method.name"]} on ' if 'method.name' in config else ''
    facts = {
        'task': config.get('task', ''),
        'model': f'{method}{config.get("model.name", "")}',
        'data': config.get('data.source') or config.get('eval.train') or '',
        'steps': f'step {step:,}',
        'epochs': f'{config.get("epochs", "?")} epochs',
        'images seen': f'{step * run.batch_size:,}',
    }
    if run.starts:
        facts['data'] += f', {run.starts[-1]["images"]:,} images'
        facts['steps'] += f' of {run.steps:,}'
        facts['epochs'] = f'{step / run.steps_per_epoch:.4g} of {facts["epochs"]}'
    return facts


def _final_metrics(run: RunRecord) -> dict[str, str]:
    """Returns the last value of each metric, and the best value of accuracies."""
    metrics = {}
    for key, curve in sorted(run.curves.items(), key=lambda item: item[0] != 'train/loss'):
        if key in ('train/images_per_second', 'train/data_wait') or key.startswith('train/lr'):
            continue
        quantity = quantities.describe(key)
        name = ', '.join(filter(None, (quantity.name, quantity.part)))
        metrics[name] = quantity.text(curve[-1][1])
        step, best = max(curve, key=lambda point: point[1])
        if key.startswith('eval/') and best > curve[-1][1]:
            metrics[name] += f' (best {quantity.text(best)}, step {step:,})'
    return metrics


def _speed(run: RunRecord) -> dict[str, str]:
    rows = {}
    if rate := run.median('train/images_per_second'):
        rows['images/s (median)'] = f'{rate:,.0f}'
    if (wait := run.median('train/data_wait')) is not None:
        rows['waiting for data (median)'] = f'{wait:.0%}'
    if run.seconds:
        rows['time'] = overview.duration(run)
    return rows


def _result(records: Sequence[RunRecord]) -> str:
    """Returns the verdict on a run and its main values; the ranking of several runs first."""
    verdicts = {run.name: _facts_line(run) + overview.render_verdict(run) for run in records}
    if len(records) == 1:
        return overview.STYLE + verdicts[records[0].name] + overview.render_tiles(records[0])
    return (
        overview.STYLE
        + ranking.render_ranking(records, _differing(_settings(records)))
        + ''.join(
            page.folded(
                f'Verdict on {run.name}',
                verdicts[run.name],
                opened=overview.judge(run).level == 'bad',
            )
            for run in ranking.rank(records)
        )
    )


def _facts_line(run: RunRecord) -> str:
    facts = _facts(run)
    line = ', '.join(facts[name] for name in _FIRST_FACTS if facts[name])
    return f'<p class="quiet">{html.escape(line)}</p>'


def _details(records: Sequence[RunRecord]) -> str:
    """Returns all values, and the texts that the runs wrote."""
    meanings = {quantity.name: quantity.meaning for quantity in quantities.QUANTITIES.values()}
    table = page.table([run.name for run in records], _summary(records), meanings=meanings)
    parts = [page.folded('All values', table)]
    texts = {
        'verdict.txt': 'accuracies and their intervals',
        'guard.txt': 'warnings of a collapse',
        'bad_images.txt': 'unreadable images',
    }
    for run in records:
        for name, content in texts.items():
            if (path := run.folder / name).exists():
                text = f'<pre class="text">{html.escape(path.read_text())}</pre>'
                parts.append(page.folded(f'{run.name}: {content} ({name})', text))
    return ''.join(parts)


def _views(records: Sequence[RunRecord]) -> str:
    """Returns the pictures of augmented views; runs with identical pictures share one."""
    owners: dict[bytes, list[str]] = {}
    for run in records:
        if (path := run.folder / 'views.png').exists():
            owners.setdefault(path.read_bytes(), []).append(run.name)
    pictures = []
    for content, names in owners.items():
        url = page.picture(np.asarray(Image.open(io.BytesIO(content)).convert('RGB')), side=1600)
        runs_of = html.escape(', '.join(names))
        alt = f'Training images of {runs_of}, each beside its augmented views'
        pictures.append(f'<div>{runs_of}<br><img class="views" alt="{alt}" src="{url}"></div>')
    return page.row(pictures) if pictures else ''


def _embedding(run: RunRecord, images: str) -> str:
    """Returns some images with their nearest neighbors, and the map of all images."""
    images = images or run.config.get('eval.test') or run.config.get('data.source') or ''
    try:
        embedded = embedding.embed(str(run.folder), images, 64, _NUM_IMAGES)
        k = min(_NUM_NEIGHBORS, len(embedded.features.x) - 1)
        positions, similarities = embedding.neighbors(embedded.features.x, k)
    except (errors.UserError, OSError, ModuleNotFoundError) as error:
        return f'<p>None: {html.escape(str(error))}</p>'
    rows = embedding.render_neighbors(embedded, positions, similarities, num_queries=_NUM_QUERIES)
    return (
        '<p class="quiet">Each image, left, with its nearest neighbors by cosine similarity, among '
        f'{len(embedded.features.x):,} images of {html.escape(images)}.</p>{rows}'
        + embedding.render_map(embedded, 'pca', max_points=_NUM_IMAGES)
    )


def _settings(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Returns the keys of the configurations -> values of the runs, or of one run and default."""
    columns = [run.config for run in records]
    if len(records) == 1:
        make = config_lib.DEFAULTS.get(records[0].config.get('task', ''), ConfigDict)
        columns.append(config_keys.flat(make()))
    keys = sorted({key for column in columns for key in column})
    return {key: [_text(column.get(key, '')) for column in columns] for key in keys}


def _differing(settings: dict[str, list[str]]) -> dict[str, list[str]]:
    return {key: cells for key, cells in settings.items() if len(set(cells)) > 1}


def _configuration(records: Sequence[RunRecord]) -> str:
    """Returns the values of one run that differ from the default; then all, differences marked."""
    settings = _settings(records)
    differing = _differing(settings)
    head = [run.name for run in records] + ['default'] * (len(records) == 1)
    first = ''
    if len(records) == 1:
        first = page.table(head, differing) if differing else '<p>All values are the default.</p>'
    everything = page.table(head, settings, marked=differing)
    return first + page.folded(f'All {len(settings)} keys', everything)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _versions(records: Sequence[RunRecord]) -> str:
    """Returns a table with a column for each start of each run."""
    columns: dict[str, dict[str, str]] = {}
    for run in records:
        for start in run.starts:
            time = datetime.datetime.fromtimestamp(start['time'], datetime.UTC)
            head = f'{run.name}, from step {start["step"]:,}'
            while head in columns:
                head += ', again'
            columns[head] = {
                'started': f'{time:%Y-%m-%d %H:%M} UTC',
                'host': start['host'],
                'processes': str(start['processes']),
                'devices': start['devices'],
                **start['versions'],
            }
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = {name: [column.get(name, '') for column in columns.values()] for name in names}
    return page.table(list(columns), rows)
