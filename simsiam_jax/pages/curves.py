"""Charts of the metrics of runs, one chart per metric with all runs."""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from simsiam_jax.pages import page
from simsiam_jax.pages.runs import Curve, RunRecord

# Colors that the color-blind can distinguish (Okabe & Ito), and some more.
_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#882255', '#555555')
_DASHES = ('solid', 'dash', 'dot')

# Titles of charts in their order; keys with the same title share a chart. Charts of all other keys
# follow, titled by the key.
_TITLES = {
    'train/loss': 'loss',
    'train/z_std': 'z_std: 1 is healthy, 0 collapsed',
    'guard/rankme': 'effective rank (RankMe)',
    'eval/knn_top1': 'kNN top-1',
    'train/lr': 'learning rate',
    'train/lr_predictor': 'learning rate',
    'train/lr_backbone': 'learning rate',
    'train/images_per_second': 'images/s',
    'train/data_wait': 'waiting for data, fraction of the time',
}
_MAX_POINTS = 2000  # per curve

_STYLE = """<style>
.runs { position: sticky; top: 0; z-index: 9; background: #fff; padding: .5rem 0; display: flex;
        flex-wrap: wrap; gap: .25rem 1rem; font-size: .85rem; border-bottom: 1px solid #ddd;
        max-height: 25vh; overflow-y: auto }
.runs i { display: inline-block; width: 1.2em; height: .25em; margin: 0 .4em;
          vertical-align: middle }
.runs label { overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)) }
.charts > div { min-width: 0 }
</style>"""

_SCRIPT = """<script>
const charts = [...document.querySelectorAll('.charts .js-plotly-plot')];
const steps = charts.map(chart => chart.data.map(trace => trace.x));
document.querySelectorAll('.runs input').forEach((box, run) => box.onchange = () =>
  charts.forEach(chart => {
    const own = chart.data.flatMap((trace, i) => trace.meta.run === run ? [i] : []);
    if (own.length) Plotly.restyle(chart, {visible: box.checked}, own);
  }));
document.querySelector('.runs select').onchange = event => charts.forEach((chart, i) => {
  const factor = trace => event.target.value === 'images' ? trace.meta.batch : 1;
  Plotly.restyle(chart, {x: steps[i].map((x, k) => x.map(step => step * factor(chart.data[k])))});
});
</script>"""


def render_curves(runs: Sequence[RunRecord]) -> str:
    """Returns the HTML of all charts, with controls for the runs and the horizontal axis."""
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(runs))]
    # Metrics that are measured once, such as at the end, are in the summary only.
    keys = {key for run in runs for key, curve in run.curves.items() if len(curve) > 1}
    if not keys:
        return '<p>No metric has two points yet.</p>'
    by_title: dict[str, list[str]] = {}
    for key in [*(key for key in _TITLES if key in keys), *sorted(keys - _TITLES.keys())]:
        by_title.setdefault(_TITLES.get(key, key), []).append(key)
    charts = [
        f'<div>{page.plot(_chart(title, shared, runs, colors), first=i == 0)}</div>'
        for i, (title, shared) in enumerate(by_title.items())
    ]
    checkboxes = ''.join(
        f'<label><input type="checkbox" checked><i style="background:{color}"></i>'
        f'{html.escape(run.name)}</label>'
        for run, color in zip(runs, colors, strict=True)
        if len(runs) > 1
    )
    axis = (
        '<label>x axis <select><option value="steps">steps</option>'
        '<option value="images">images seen</option></select></label>'
    )
    return (
        f'{_STYLE}<div class="runs">{axis}{checkboxes}</div>'
        f'<div class="charts">{"".join(charts)}</div>{_SCRIPT}'
    )


def _chart(
    title: str, keys: Sequence[str], runs: Sequence[RunRecord], colors: Sequence[str]
) -> Any:
    import plotly.graph_objects as go

    chart = go.Figure()
    for number, (run, color) in enumerate(zip(runs, colors, strict=True)):
        for key, dash in zip(keys, _DASHES, strict=False):
            curve = _thinned(run.curves.get(key, []))
            name = key.rpartition('/')[2]
            chart.add_trace(
                go.Scatter(
                    x=[step for step, _ in curve],
                    y=[value if math.isfinite(value) else None for _, value in curve],
                    mode='lines+markers' if len(curve) < 30 else 'lines',
                    marker={'size': 4},
                    line={'color': color, 'dash': dash, 'width': 1.5},
                    name=name,
                    legendgroup=name,
                    showlegend=len(keys) > 1 and number == 0,
                    meta={'run': number, 'batch': run.batch_size},
                    hovertemplate='%{x}: %{y:.5g}' + f'<extra>{html.escape(run.name)}</extra>',
                )
            )
    chart.update_layout(
        title={'text': title, 'font': {'size': 14}},
        template='plotly_white',
        height=260,
        margin={'l': 45, 'r': 10, 't': 40, 'b': 30},
        legend={'orientation': 'h', 'y': 1.0, 'yanchor': 'bottom', 'x': 1, 'xanchor': 'right'},
    )
    return chart


def _thinned(curve: Curve) -> Curve:
    """Returns at most _MAX_POINTS evenly spaced points, including the last."""
    count = min(_MAX_POINTS, len(curve))
    return [curve[i] for i in np.unique(np.linspace(0, len(curve) - 1, count).astype(int))]
