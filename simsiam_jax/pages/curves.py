"""The curves of runs, one chart a quantity, all runs in each."""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from simsiam_jax.pages import page
from simsiam_jax.pages.runs import Curve, RunRecord

# Colors that the color-blind tell apart (Okabe & Ito), and some more.
_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#882255', '#555555')
_DASHES = ('solid', 'dash', 'dot')

# Keys in the order of their charts; those of one title share it. Others follow under their names.
_TITLES = {
    'train/loss': 'loss',
    'train/z_std': 'z_std: 1 is healthy, 0 collapsed',
    'guard/rank': 'effective rank',
    'eval/knn_top1': 'kNN top-1',
    'train/lr': 'learning rate',
    'train/lr_predictor': 'learning rate',
    'train/lr_backbone': 'learning rate',
    'train/images_per_second': 'images/s',
    'train/data_wait': 'waiting for data, share of the time',
}
_MOST = 2000  # points of a curve

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
  const of = trace => event.target.value === 'images' ? trace.meta.batch : 1;
  Plotly.restyle(chart, {x: steps[i].map((x, k) => x.map(step => step * of(chart.data[k])))});
});
</script>"""


def draw(runs: Sequence[RunRecord]) -> str:
    """Charts that stand beside each other where there is room, and what chooses their runs."""
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(runs))]
    # What is measured once, as at the end, stands in the summary.
    keys = {key for run in runs for key, curve in run.curves.items() if len(curve) > 1}
    if not keys:
        return '<p>Nothing is measured twice yet.</p>'
    by_title: dict[str, list[str]] = {}
    for key in [*(key for key in _TITLES if key in keys), *sorted(keys - _TITLES.keys())]:
        by_title.setdefault(_TITLES.get(key, key), []).append(key)
    charts = [
        f'<div>{page.plot(_chart(title, together, runs, colors), first=i == 0)}</div>'
        for i, (title, together) in enumerate(by_title.items())
    ]
    chosen = ''.join(
        f'<label><input type="checkbox" checked><i style="background:{color}"></i>'
        f'{html.escape(run.name)}</label>'
        for run, color in zip(runs, colors, strict=True)
        if len(runs) > 1
    )
    axis = (
        '<label>against <select><option value="steps">steps</option>'
        '<option value="images">images seen</option></select></label>'
    )
    return (
        f'{_STYLE}<div class="runs">{axis}{chosen}</div>'
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
            what = key.rpartition('/')[2]
            chart.add_trace(
                go.Scatter(
                    x=[step for step, _ in curve],
                    y=[value if math.isfinite(value) else None for _, value in curve],
                    mode='lines+markers' if len(curve) < 30 else 'lines',
                    marker={'size': 4},
                    line={'color': color, 'dash': dash, 'width': 1.5},
                    name=what,
                    legendgroup=what,
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
    """At most so many points, spread evenly, the last among them."""
    places = np.unique(np.linspace(0, len(curve) - 1, min(_MOST, len(curve))).astype(int))
    return [curve[i] for i in places]
