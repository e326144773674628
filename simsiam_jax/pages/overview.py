"""First screen of a report: the verdict on a run in words, and its main values."""

import dataclasses
import datetime
import html
import json
import math
import re
from typing import Any

from simsiam_jax.pages import page, quantities
from simsiam_jax.pages.runs import RunRecord
from simsiam_jax.training import guard
from simsiam_jax.training.monitor import RepresentationMetrics

STYLE = """<style>
.verdict { border-left: 6px solid; padding: .5rem 1rem; background: var(--soft) }
.verdict.good { border-color: var(--good) } .verdict.check { border-color: var(--check) }
.verdict.bad { border-color: var(--bad) }
.verdict strong { font-size: 1.2rem } .verdict.good strong { color: var(--good) }
.verdict.check strong { color: var(--check) } .verdict.bad strong { color: var(--bad) }
.verdict ol { margin: .25rem 0; padding-left: 1.5rem; overflow-wrap: anywhere }
.verdict code { display: inline-block; max-width: 100%; font-size: .75em; white-space: nowrap;
                overflow-x: auto; vertical-align: middle }
.ranking :is(th, td) { min-width: 3.5rem } .ranking th:first-child { min-width: 5.5rem }
.ranking td:nth-child(2) { min-width: 9rem }
.tiles { display: grid; gap: .75rem; margin: .75rem 0;
         grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)) }
.tiles > div { background: var(--soft); padding: .6rem .8rem; font-size: .85rem }
.tiles b { display: block; font-size: 1.6rem; line-height: 1.3 }
</style>"""

_MARKS = {'good': '\N{CHECK MARK}', 'check': '!', 'bad': '\N{BALLOT X}'}


@dataclasses.dataclass(frozen=True)
class Health:
    """The verdict on a run.

    Attributes:
      level: 'good', 'check' or 'bad'.
      headline: The verdict in one line.
      remarks: Sentences that explain it.
      fixes: Possible causes and fixes, most likely first.
    """

    level: str
    headline: str
    remarks: tuple[str, ...] = ()
    fixes: tuple[str, ...] = ()


def judge(run: RunRecord) -> Health:
    """Returns the verdict of the guard, completed by the comparison with a random network."""
    health = _collapse(run)
    sentence, better = _comparison(run)
    if not sentence:
        return health
    remarks = tuple(line[:1].upper() + line[1:] for line in sentence.splitlines())
    first, *likely = remarks[0].split('. ', 1)
    if health.level == 'good' and not better:
        headline = f'No collapse, but {first[:1].lower()}{first[1:]}'
        return Health('check', headline, (*likely, *remarks[1:]))
    if health.fixes:  # of the guard, which knows the configuration
        remarks = (first, *remarks[1:])
    return dataclasses.replace(health, remarks=(*health.remarks, *remarks))


def _collapse(run: RunRecord) -> Health:
    """Returns the verdict from the losses, the warnings and the measurements of the guard."""
    losses = run.curves.get('train/loss', [])
    if losses and not math.isfinite(losses[-1][1]):
        return Health('bad', f'The loss is not finite at step {losses[-1][0]:,}')
    history = _measurements(run)
    path = run.folder / 'guard.txt'
    if path.exists():
        text = path.read_text().strip().split('\n\n')[-1]  # the latest warning
        reason = re.split(r'[:\n]', text, maxsplit=1)[0]
        fixes = tuple(re.findall(r'^ +\d+\. (.+)$', text, re.MULTILINE))
        if len(history) > guard.WINDOW and _verdicts(history)[-1] == guard.HEALTHY:
            headline = f'Healthy at step {history[-1][0]:,}, after {reason}'
            return Health('check', headline, fixes=fixes)
        return Health('bad', reason[:1].upper() + reason[1:], fixes=fixes)
    if len(history) > guard.WINDOW:
        unhealthy = [verdict for verdict in _verdicts(history) if verdict != guard.HEALTHY]
        remark = f'The guard measured {len(history)} times and never warned.'
        if unhealthy:
            remark = (
                f'{len(unhealthy)} of {len(history)} measurements showed a collapse, but fewer '
                f'than {guard.WINDOW} in a row.'
            )
        return Health('good', 'Healthy: no sign of collapse', (remark,))
    if run.config.get('task', 'pretrain') != 'pretrain':
        done = run.steps and run.step >= run.steps
        return Health('good', 'Training has ended' if done else f'Training is at step {run.step:,}')
    return Health(
        'check',
        'Not checked for collapse',
        (
            f'The guard has {len(history)} measurements; a verdict needs {guard.WINDOW + 1}. '
            'Train longer, or enable the guard: --config.guard=warn.',
        ),
    )


def _measurements(run: RunRecord) -> list[tuple[int, RepresentationMetrics]]:
    """Returns the steps and values of the guard's measurements."""
    names = [field.name for field in dataclasses.fields(RepresentationMetrics)]
    curves = {name: dict(run.curves.get(f'guard/{name}', [])) for name in names}
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    return [
        (step, RepresentationMetrics(**{name: float(curves[name][step]) for name in names}))
        for step in steps
    ]


def _verdicts(history: list[tuple[int, RepresentationMetrics]]) -> list[str]:
    """Returns the verdict on each measurement but the first, which is from before training."""
    metrics = [measured for _, measured in history]
    return [guard.classify(metrics[: i + 1]) for i in range(1, len(metrics))]


def _result(run: RunRecord) -> dict[str, Any]:
    """Returns the content of verdict.json; {} if the run has none."""
    path = run.folder / 'verdict.json'
    return json.loads(path.read_text()) if path.exists() else {}


def _comparison(run: RunRecord) -> tuple[str, bool]:
    """Returns the sentence of verdict.json, and whether training improved on a random network."""
    result = _result(run)
    comparison = result.get('comparison')
    better = comparison['interval'][0] > 0 if comparison else bool(result.get('closer', True))
    return result.get('sentence', ''), better


def render_verdict(run: RunRecord) -> str:
    """Returns the HTML of the verdict with the possible fixes."""
    health = judge(run)
    remarks = ''.join(f'<p>{html.escape(remark)}</p>' for remark in health.remarks)
    fixes = ''.join(f'<li>{html.escape(fix)}</li>' for fix in health.fixes)
    fixes = re.sub(r'--[^ <]+', r'<code>\g<0></code>', fixes)  # a line must not end in a flag
    if fixes:
        fixes = f'<p>Possible causes and fixes, most likely first:</p><ol>{fixes}</ol>'
    return (
        f'<div class="verdict {health.level}"><strong>{_MARKS[health.level]} '
        f'{html.escape(health.headline)}</strong>{fixes}{remarks}</div>'
    )


def render_tiles(run: RunRecord) -> str:
    """Returns the HTML of the last accuracy, loss and spread beside what to compare them with."""
    tiles = []
    accuracy = accuracy_key(run)
    if accuracy:
        shares = _result(run).get('accuracy', {})
        names = {'random initialization': 'random network', 'raw pixels': 'raw pixels'}
        notes = [f'{names[name]} {shares[name]["top1"]:.1%}' for name in names if name in shares]
        tiles.append(_tile(run, accuracy, ', '.join(notes)))
    elif 'guard/rankme' in run.curves:
        before = run.curves['guard/rankme'][0][1]
        tiles.append(_tile(run, 'guard/rankme', f'{before:.4g} before training'))
    if 'train/loss' in run.curves:
        step, value = run.curves['train/loss'][0]
        tiles.append(_tile(run, 'train/loss', f'{value:.4g} at step {step:,}'))
    if 'train/z_std' in run.curves:
        tiles.append(_tile(run, 'train/z_std', '1 is healthy, 0 collapsed'))
    if run.seconds:
        rate = run.median('train/images_per_second')
        note = f'{rate:,.0f} images per second' if rate else ''
        tiles.append(f'<div>Time<b>{duration(run)}</b>{note}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(run: RunRecord, key: str, note: str) -> str:
    quantity = quantities.describe(key)
    value = quantity.text(run.curves[key][-1][1])
    name = page.term(quantity.name, quantity.meaning)
    return f'<div>{name}<b>{value}</b>{html.escape(note)}</div>'


def accuracy_key(run: RunRecord) -> str:
    """Returns the key of the accuracy that says most about a run; '' if there is none."""
    return next((key for key in quantities.ACCURACIES if key in run.curves), '')


def duration(run: RunRecord) -> str:
    """Returns the time that a run has taken; '' if it is unknown."""
    return str(datetime.timedelta(seconds=round(run.seconds))) if run.seconds else ''
