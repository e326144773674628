"""Ranking of several runs, with the values of their configurations that differ."""

from collections.abc import Mapping, Sequence

from simsiam_jax.pages import overview, page, quantities
from simsiam_jax.pages.runs import RunRecord

_LEVELS = ('good', 'check', 'bad')
_COLUMNS = ('train/loss', 'train/z_std', 'guard/rankme')


def rank(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns runs by falling accuracy, then by verdict and by falling effective rank."""

    def order(run: RunRecord) -> tuple[bool, float, int, float]:
        accuracy = overview.accuracy_key(run)
        return (
            not accuracy,
            -run.curves[accuracy][-1][1] if accuracy else 0.0,
            _LEVELS.index(overview.judge(run).level),
            -_last(run, 'guard/rankme'),
        )

    return sorted(records, key=order)


def render_ranking(records: Sequence[RunRecord], differing: Mapping[str, Sequence[str]]) -> str:
    """Returns the table of the runs, best first.

    Args:
      records: Runs in their order in `differing`.
      differing: Keys of the configuration -> values of the runs.
    """
    ranked = rank(records)
    accuracies = list(dict.fromkeys(filter(None, map(overview.accuracy_key, ranked))))
    keys = [*accuracies, *(key for key in _COLUMNS if any(key in run.curves for run in ranked))]
    described = [quantities.describe(key) for key in keys]
    rows = {}
    for place, run in enumerate(ranked, 1):
        values = [
            quantity.text(_last(run, key)) if key in run.curves else ''
            for key, quantity in zip(keys, described, strict=True)
        ]
        position = records.index(run)
        settings = [cells[position] for cells in differing.values()]
        verdict = overview.judge(run).headline
        rate = run.median('train/images_per_second')
        speed = [overview.duration(run), f'{rate:,.0f}' if rate else '']
        rows[f'{place}. {run.name}'] = [verdict, *values, *speed, *settings]
    names = [quantity.name for quantity in described]
    head = ['Verdict', *names, 'Time', 'Images per second', *differing]
    meanings = {quantity.name: quantity.meaning for quantity in described}
    criterion = (
        f'Ranked by {quantities.describe(accuracies[0]).name}'
        if accuracies
        else 'No run has an accuracy: ranked by verdict, then by effective rank'
    )
    note = 'the last columns are the settings that differ' if differing else 'no settings differ'
    table = page.table(head, rows, meanings=meanings)
    return f'<p class="quiet">{criterion}; {note}.</p><div class="ranking">{table}</div>'


def _last(run: RunRecord, key: str) -> float:
    return run.curves[key][-1][1] if key in run.curves else 0.0
