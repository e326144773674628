"""Style and scripts of pages, and the plotting library inside them."""

import base64
import functools
import gzip
import html
import importlib.resources
import string

# Digits of base64.b85encode.
_BASE85 = (
    string.digits + string.ascii_uppercase + string.ascii_lowercase + '!#$%&()*+-;<=>?@^_`{|}~'
)

STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --soft: #f4f5f7; --line: #d5d8dd;
        --quiet: #555b63; --marked: #fff3c4; --good: #1a7f37; --check: #8a5a00; --bad: #b42318 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --page: #16181d; --soft: #21242b; --line: #3a3f48;
          --quiet: #a9b0ba; --marked: #4a3d10; --good: #4cc26a; --check: #e0a93b; --bad: #ff7b6b }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px;
       padding: 0 1rem 3rem; color: var(--text); background: var(--page) }
h1 { font-size: 1.4rem; margin: 1rem 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem } h1 + h2 { margin-top: 1rem }
h3 { font-size: .95rem; margin: 0 }
p { margin: .5rem 0 } .quiet { color: var(--quiet); font-size: .85rem }
:focus-visible { outline: 2px solid #1f7fc4; outline-offset: 2px }
.row { display: flex; flex-wrap: wrap; gap: .5rem; padding: .5rem 0;
       overflow-wrap: anywhere; border-bottom: 1px solid var(--line) }
figure { margin: 0; width: 84px; font-size: .72rem; line-height: 1.25; overflow-wrap: anywhere }
figure img { width: 84px; height: 84px; object-fit: contain; image-rendering: pixelated;
             background: var(--soft); display: block }
figure.query { border-right: 3px solid #1f7fc4; padding-right: .5rem; margin-right: .25rem }
.table { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .85rem }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem .25rem;
         border-bottom: 1px solid var(--line); overflow-wrap: anywhere; min-width: 4.5rem }
th { font-weight: normal; color: var(--quiet) } tr.head th { overflow-wrap: normal }
tr.marked > * { background: var(--marked) }
tr.marked > th:first-child::before { content: '* ' }
img.views { max-width: 100%; height: auto }
pre { overflow-x: auto; background: var(--soft); padding: .75rem; font-size: .8rem }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; padding: .25rem 0; overflow-wrap: anywhere }
.term { position: relative; border-bottom: 1px dotted var(--quiet); cursor: help }
.tip { display: none; position: absolute; left: 0; top: 100%; z-index: 20; width: max-content;
       max-width: 19rem; padding: .5rem .75rem; font-size: .85rem; font-weight: normal;
       line-height: 1.4; color: var(--text); background: var(--soft); border-radius: 4px;
       border: 1px solid var(--quiet) }
.term:hover .tip, .term:focus .tip { display: block }
.table .tip { position: fixed; top: auto; left: 1rem; bottom: 1rem }
.plot { min-height: 200px; color: var(--quiet); font-size: .8rem }
@media (max-width: 600px) {
  .tip { position: fixed; top: auto; left: 1rem; right: 1rem; bottom: 1rem; width: auto;
         max-width: none }
  figure, figure img { width: 68px } figure img { height: 68px }
  .table :is(table, tbody, tr, th, td) { display: block; min-width: 0; border: 0 }
  .table tr { border-bottom: 1px solid var(--line); padding: .35rem 0 }
  .table tr.head { display: none }
  .table tr > th:first-child { font-weight: 600; color: var(--text) }
  .table td { padding: 0 .25rem }
  .table td[data-label]::before { content: attr(data-label) ': '; color: var(--quiet) }
}
"""

# Unpacks the library, then draws the charts of a page one after the other in the page's colors.
# Scripts of a page can use `plotly`, which resolves when the library is loaded, and `unpack`.
DRAW = """
const charts = [...document.querySelectorAll('.plot')];
const dark = matchMedia('(prefers-color-scheme: dark)');
const color = () => getComputedStyle(document.body).color;
const draw = chart => {
  const { data, layout } = JSON.parse(chart.dataset.chart);
  layout.font = { color: color(), size: 12 };
  if (matchMedia('(pointer: coarse)').matches) layout.dragmode = false;
  chart.textContent = '';
  return Plotly.newPlot(chart, data, layout, { responsive: true, displayModeBar: false });
};
const unpack = ({ textContent: text, dataset }) => {
  const words = new DataView(new ArrayBuffer(text.length / 5 * 4));
  const digits = new Uint8Array(128);
  [...dataset.digits].forEach((letter, value) => digits[letter.charCodeAt()] = value);
  for (let i = 0; i < text.length; i += 5) {
    let word = 0;
    for (let k = i; k < i + 5; k++) word = word * 85 + digits[text.charCodeAt(k)];
    words.setUint32(i / 5 * 4, word);
  }
  const packed = new Blob([words.buffer.slice(0, dataset.size)]).stream();
  return new Response(packed.pipeThrough(new DecompressionStream('gzip')));
};
const plotly = unpack(document.getElementById('plotly')).text().then(code => {
  const script = document.createElement('script');
  script.textContent = code;
  document.head.append(script);
});
plotly.then(async () => {
  for (const chart of charts) {
    await draw(chart);
    await new Promise(resolve => setTimeout(resolve));  // shows the chart
  }
  for (const fold of document.querySelectorAll('details')) {
    fold.ontoggle = () => fold.open && fold.querySelectorAll('.plot').forEach(Plotly.Plots.resize);
  }
  dark.onchange = () => charts.forEach(chart => Plotly.relayout(chart, 'font.color', color()));
  document.body.dataset.drawn = charts.length;
});
"""


def packed(name: str, content: bytes) -> str:
    """Returns bytes as an HTML element of this id, compressed with gzip, in base 85."""
    return _element(name, gzip.compress(content, 9, mtime=0))


def _element(name: str, compressed: bytes) -> str:
    text = base64.b85encode(compressed, pad=True).decode()
    return (
        f'<script type="text/plain" id="{name}" data-size="{len(compressed)}" '
        f'data-digits="{html.escape(_BASE85)}">{text}</script>'
    )


@functools.cache
def plotly_script(*, webgl: bool) -> str:
    """Returns plotly's JavaScript as an HTML element.

    Without WebGL it is the basic bundle (line, scatter, bar and pie charts), which starts in a
    third of the time and is a quarter of the size. The Python package has only the whole one.
    """
    if not webgl:
        basic = importlib.resources.files(__package__) / 'plotly-basic.min.js.gz'
        return _element('plotly', basic.read_bytes())
    import plotly.offline

    return packed('plotly', plotly.offline.get_plotlyjs().encode())
