"""Charts of the metrics of runs, one chart per metric with all runs."""

import html
import math
from collections.abc import Sequence
from typing import Any

from simsiam_jax.data import sampler
from simsiam_jax.pages import page, quantities
from simsiam_jax.pages.runs import Curve, RunRecord
from simsiam_jax.training import guard

# Colors that the color-blind can distinguish, with a contrast of 3 to light and dark pages.
COLORS = (
    '#0077bb', '#d55e00', '#009e73', '#c05a96', '#a87900', '#2b8fc4', '#8a63c9', '#808080',
)  # fmt: skip
_DASHES = ('solid', 'dash', 'dot')
_MAX_POINTS = 2000  # per curve

_STYLE = """<style>
.runs:has(input) { position: sticky; top: 0; z-index: 9 }
.runs { background: var(--page); padding: .5rem 0;
        display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .85rem; max-height: 25vh;
        overflow-y: auto; border-bottom: 1px solid var(--line) }
.runs i { display: inline-block; width: 1.2em; height: .25em; margin: 0 .4em;
          vertical-align: middle }
.runs label { overflow-wrap: anywhere }
.charts { display: grid; gap: 1rem;
          grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)) }
.charts.main { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)) }
.charts > div { min-width: 0 }
</style>"""

_SCRIPT = """<script>
document.querySelectorAll('.runs input').forEach((box, run) => box.onchange = () =>
  document.querySelectorAll('.charts .js-plotly-plot').forEach(chart => {
    const own = chart.data.flatMap((trace, i) => trace.meta.run === run ? [i] : []);
    if (own.length) Plotly.restyle(chart, {visible: box.checked}, own);
  }));
document.querySelector('.runs select').onchange = event =>
  document.querySelectorAll('.charts .js-plotly-plot').forEach(chart => {
    chart.steps ??= chart.data.map(trace => trace.x);
    const factor = trace => event.target.value === 'images' ? trace.meta.batch : 1;
    Plotly.restyle(chart, {
      x: chart.steps.map((x, i) => x.map(step => step * factor(chart.data[i]))),
    });
  });
</script>"""


def render_controls(runs: Sequence[RunRecord]) -> str:
    """Returns the style of charts, and controls for the horizontal axis and the visible runs."""
    checkboxes = ''.join(
        f'<label><input type="checkbox" checked><i style="background:{_color(number)}"></i>'
        f'{html.escape(run.name)}</label>'
        for number, run in enumerate(runs)
        if len(runs) > 1
    )
    axis = (
        '<label>horizontal axis <select><option value="steps">steps</option>'
        '<option value="images">images seen</option></select></label>'
    )
    hint = '<span class="quiet">Drag in a chart to zoom, double-click to reset.</span>'
    return f'{_STYLE}<div class="runs">{axis}{checkboxes}{hint}</div>{_SCRIPT}'


def logged(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the keys of all curves, in the order of QUANTITIES; unknown keys come last.

    Metrics that are measured once, such as at the end, have no curve.
    """
    keys = {key for run in runs for key, curve in run.curves.items() if len(curve) > 1}
    known = quantities.QUANTITIES
    return [*(key for key in known if key in keys), *sorted(keys - known.keys())]


def render_charts(runs: Sequence[RunRecord], keys: Sequence[str], *, main: bool = False) -> str:
    """Returns the charts of some keys; `main` makes them larger."""
    by_name: dict[str, list[str]] = {}
    for key in keys:
        by_name.setdefault(quantities.describe(key).name, []).append(key)
    charts = ''.join(
        f'<div><h3>{page.term(name, quantities.describe(shared[0]).meaning)}</h3>'
        f'{page.plot(_chart(shared, runs, 300 if main else 220), label=_label(shared, runs))}</div>'
        for name, shared in by_name.items()
    )
    return f'<div class="charts{" main" * main}">{charts}</div>'


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _label(keys: Sequence[str], runs: Sequence[RunRecord]) -> str:
    """Returns a description of a chart: the last value of each run."""
    quantity = quantities.describe(keys[0])
    last = {run.name: run.curves[keys[0]][-1] for run in runs if keys[0] in run.curves}
    values = ', '.join(
        f'{quantity.text(value)} in {name} at step {step:,}' for name, (step, value) in last.items()
    )
    return f'Chart of {quantity.name}: {values}'


def _chart(keys: Sequence[str], runs: Sequence[RunRecord], height: int) -> Any:
    import plotly.graph_objects as go

    chart = go.Figure()
    for number, run in enumerate(runs):
        for key, dash in zip(keys, _DASHES, strict=False):
            curve = _thinned(run.curves.get(key, []))
            name = quantities.describe(key).part
            chart.add_trace(
                go.Scatter(
                    x=[step for step, _ in curve],
                    y=[value if math.isfinite(value) else None for _, value in curve],
                    mode='lines+markers' if len(curve) < 30 else 'lines',
                    marker={'size': 4},
                    line={'color': _color(number), 'dash': dash, 'width': 1.8},
                    name=name,
                    legendgroup=name,
                    showlegend=len(keys) > 1 and number == 0,
                    meta={'run': number, 'batch': run.batch_size},
                    hovertemplate='%{x}: %{y}' + f'<extra>{html.escape(run.name)}</extra>',
                )
            )
    for low, high, name in _bands(keys[0], runs):
        healthy = name == 'healthy'
        chart.add_hrect(
            low,
            high,
            fillcolor='#1a9c4b' if healthy else '#d6452b',
            opacity=0.14,
            line_width=0,
            layer='below',
            annotation={'text': name, 'font': {'size': 11}, 'opacity': 0.9},
            annotation_position='bottom right',
        )
    chart.update_layout(
        height=height + 30 * (len(keys) > 1),
        margin={'l': 55, 'r': 10, 't': 10, 'b': 30 + 30 * (len(keys) > 1)},
        legend={'orientation': 'h', 'y': -0.15, 'yanchor': 'top'},
    )
    chart.update_yaxes(hoverformat='.5g')
    if quantities.describe(keys[0]).share:
        chart.update_yaxes(tickformat='.0%', hoverformat='.1%', minallowed=-0.01, maxallowed=1.01)
    return chart


def _bands(key: str, runs: Sequence[RunRecord]) -> list[tuple[float, float, str]]:
    """Returns the ranges of healthy and unhealthy values, [] if there are none for all runs."""
    if key in ('train/z_std', 'guard/z_std'):
        return [(0.0, guard.MIN_Z_STD, 'collapsed'), (guard.MIN_Z_STD, 1.0, 'healthy')]
    if key == 'guard/uniformity':
        return [(guard.MAX_UNIFORMITY, 0.0, 'collapsed'), (-4.0, guard.MAX_UNIFORMITY, 'healthy')]
    if key == 'guard/view_distance':
        return [(0.0, guard.SAME_VIEWS, 'nothing to learn'), (guard.SAME_VIEWS, 1.0, 'healthy')]
    if key == 'guard/rankme' and len(runs) == 1:
        ranks = [rank for _, rank in runs[0].curves[key]]
        limit = guard.MIN_RANKME * ranks[0]
        return [(0.0, limit, 'collapsed'), (limit, max(ranks), 'healthy')]
    return []


def _thinned(curve: Curve) -> Curve:
    """Returns at most _MAX_POINTS evenly spaced points, including the last."""
    return [curve[i] for i in sampler.evenly_spaced(len(curve), _MAX_POINTS)]
