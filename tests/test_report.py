"""Tests of logs/progress.py, pages/ and tools/report.py: a live terminal, pages in a browser."""

import fcntl
import json
import os
import pathlib
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import browsers
import pytest
from commands import environment

from simsiam_jax import errors
from simsiam_jax.pages import assets, curves, overview, ranking, report, runs
from simsiam_jax.training import guard

ROOT = pathlib.Path(__file__).parent.parent
# Whether the legend of a chart overlaps the area of its curves.
OVERLAID = """charts => charts.map(chart => {
  const legend = chart.querySelector('.legend')?.getBoundingClientRect();
  const { t, h } = chart._fullLayout._size;
  return Boolean(legend && legend.top < chart.getBoundingClientRect().top + t + h);
})"""


def in_a_terminal(command: list[str], columns: int, **variables: str) -> str:
    """Returns what the command sent to a terminal of this width; it must succeed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 40, columns, 0, 0))
    env = environment() | {'TERM': 'xterm'} | variables
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    sent = b''
    while True:
        try:
            sent += os.read(master, 65536)
        except OSError:  # the command has ended
            break
    os.close(master)
    assert process.wait() == 0, sent.decode()
    return sent.decode()


def screen(sent: str) -> list[str]:
    """Returns the visible lines, without colors, after a terminal has overwritten characters."""
    sent = re.sub(r'\x1b\[[\d;]*m', '', sent)
    lines, row, column = [''], 0, 0
    for token in re.findall(r'\x1b\[A|[\r\n]|[^\x1b\r\n]+', sent):
        if token == '\x1b[A':
            row -= 1
        elif token == '\r':
            column = 0
        elif token == '\n':
            row, column = row + 1, 0
            lines += [''] * (row + 1 - len(lines))
        else:
            before = lines[row].ljust(column)
            lines[row] = before[:column] + token + before[column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """Workdir of a short run, and what it sent to its terminal."""
    workdir = tmp_path_factory.mktemp('runs') / 'whole'
    flags = ['epochs=6', 'model.width_multiplier=0.125', 'model.stages=(1,)']
    flags += ['log.tensorboard=False', 'log.every_steps=2', 'eval.every_epochs=3']
    command = [sys.executable, '-m', 'simsiam_jax.main', '--config=configs/quickstart.py']
    command += [f'--workdir={workdir}', *(f'--config.{flag}' for flag in flags)]
    return workdir, in_a_terminal(command, 120)


@pytest.fixture(scope='module')
def pages(run) -> tuple[pathlib.Path, pathlib.Path]:
    """Page of the run, and page of the run and an interrupted one."""
    workdir, _ = run
    other = workdir.parent / 'other'
    other.mkdir()
    config = json.loads((workdir / 'config.json').read_text())
    config['batch_size'], config['optim']['momentum'] = 64, 0.75
    (other / 'config.json').write_text(json.dumps(config))
    text = (workdir / 'metrics.jsonl').read_text()
    (other / 'metrics.jsonl').write_text(text[: text.index('"step": 34') + 20])
    (other / 'guard.txt').write_text('the rank falls & <the loss> too')
    command = [sys.executable, '-m', 'simsiam_jax.tools.report', str(workdir), str(other)]
    command += [f'--out={workdir.parent / "both.html"}', '--noneighbors']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'both.html: open it in a browser' in done.stdout
    return workdir / 'report.html', workdir.parent / 'both.html'


def test_terminal_shows_progress_in_one_live_line(run) -> None:
    workdir, sent = run
    assert sent.count('eta 0:') > 2  # the line was updated
    seen = screen(sent)
    assert seen[0].startswith('simsiam on resnet18: 1437 images of digits/train, 6 epochs of 11')
    hint = f'view curves with: python -m simsiam_jax.tools.report {workdir}'
    assert seen[1] == f'writing to {workdir}; {hint}'
    (live,) = [i for i, line in enumerate(seen) if 'images/s' in line]
    assert re.match(r'100%\|█{10}\| step 66/66  eta 0:00:00  \d+ images/s  loss -0\.', seen[live])
    evaluated = [i for i, line in enumerate(seen) if re.match(r'step \d+  kNN top-1 0\.', line)]
    assert [seen[i].split()[1] for i in evaluated] == ['33', '66']
    assert evaluated[0] < live < evaluated[1]
    assert f'report: {workdir / "report.html"}' in seen


def test_terminal_shows_result_in_color_below_a_heading(run) -> None:
    _, sent = run
    seen = screen(sent)
    heading = seen.index('Result')
    assert seen[heading - 1] == ''
    assert seen[heading + 1].startswith('kNN top-1 of 360 test images')
    assert re.search(r'\x1b\[3[23]m(better|no better|worse) than a random network', sent)


def test_doctor_groups_findings_in_a_terminal(tmp_path) -> None:
    command = [sys.executable, '-m', 'simsiam_jax.tools.doctor', '--config=configs/quickstart.py']
    command += ['--config.model.stages=(1,)', '--config.model.width_multiplier=0.125']
    plain = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert '\x1b' not in plain
    assert re.match(r'(warning|ok)  ', plain)
    sent = in_a_terminal(command, 100)
    assert '\x1b[32m' in sent  # green
    seen = screen(sent)
    groups = [i for i, line in enumerate(seen) if re.match(r'(Warnings|Checked) \(\d+\)$', line)]
    assert groups[0] == 0
    (checked,) = [i for i in groups if seen[i].startswith('Checked')]
    assert seen[checked + 1].startswith('+ ')
    # The same findings: only line breaks and the marks differ.
    listed = [line[9:] for line in plain.splitlines() if line.startswith('ok ')]
    assert seen[checked] == f'Checked ({len(listed)})'
    text = ' '.join(' '.join(seen[checked + 1 :]).split())
    devices = [line for line in listed if 'images/s' not in line and 'GiB' not in line]
    assert devices
    for line in devices:
        assert ' '.join(line.split()) in text


def test_no_color_leaves_out_colors() -> None:
    code = "import sys; from simsiam_jax import terminal; terminal.show('ok  fine', sys.stdout)"
    command = [sys.executable, '-c', code]
    assert '\x1b[32m' in in_a_terminal(command, 100)
    assert '\x1b[3' not in in_a_terminal(command, 100, NO_COLOR='1')


@pytest.fixture(scope='module')
def browser():
    with browsers.chromium('--disable-gpu') as opened:
        yield opened


def open_page(browser, page: pathlib.Path, width: int):
    """Opens a page; returns its view, and its console messages and network requests."""
    view = browser.new_page(viewport={'width': width, 'height': 800})
    messages: list[str] = []
    view.on('console', lambda message: messages.append(message.text))
    view.on('pageerror', lambda error: messages.append(str(error)))
    view.on('request', lambda request: messages.append(request.url))
    view.goto(page.as_uri(), timeout=120_000)  # ms; a busy machine renders slowly
    view.wait_for_selector('body[data-drawn]', timeout=120_000)
    assert view.evaluate('document.documentElement.scrollWidth') == width
    return view, messages


def test_report_shows_curves_images_and_configuration(run, pages, browser) -> None:
    workdir, _ = run
    view, messages = open_page(browser, pages[0], 375)  # a phone's
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    names = view.locator('.charts h3').evaluate_all('all => all.map(h3 => h3.innerText)')
    assert names[:4] == [
        'kNN accuracy',
        'Loss',
        'Spread of the embeddings (z_std)',
        'Effective rank (RankMe)',
    ]
    assert names[-2:] == ['Images per second', 'Waiting for data']
    assert not re.search(r'(guard|train|eval)/', view.locator('body').inner_text())
    loss = view.locator('[aria-label^="Chart of Loss:"]')
    drawn = loss.evaluate('chart => [chart.data[0].x, chart.data[0].y]')
    assert drawn == [
        [line['step'] for line in lines if 'train/loss' in line],
        [line['train/loss'] for line in lines if 'train/loss' in line],
    ]
    assert loss.locator('.scatterlayer .trace .js-line').get_attribute('d').startswith('M')
    overlaid = view.locator('.charts .plot').evaluate_all(OVERLAID)
    assert overlaid == [False] * len(names)
    spread = view.locator('[aria-label^="Chart of Spread of the embeddings"]')
    bands = spread.evaluate('chart => chart.layout.shapes.map(({ y0, y1 }) => [y0, y1])')
    assert bands == [[0, guard.MIN_Z_STD], [guard.MIN_Z_STD, 1]]
    first = view.locator('.verdict').inner_text()
    assert re.match(r'✓ Healthy|! (Not checked|No collapse, but)', first)
    tiles = view.locator('.tiles > div').evaluate_all('all => all.map(tile => tile.innerText)')
    accuracy = json.loads((workdir / 'verdict.json').read_text())['accuracy']
    assert f'\n{lines[-1]["eval/knn_top1"]:.1%}\n' in tiles[0]
    assert f'random network {accuracy["random initialization"]["top1"]:.1%}' in tiles[0]
    assert [tile.split('\n')[0] for tile in tiles[1:]] == ['Loss', names[2], 'Time']
    assert 'step 66 of 66, 6 of 6 epochs' in view.locator('p.quiet').first.inner_text()
    view.locator('summary:has-text("verdict.txt")').click()
    assert (workdir / 'verdict.txt').read_text().strip() in view.locator('pre').first.inner_text()
    loaded = 'images => images.every(i => i.complete && i.naturalWidth > 0)'
    assert view.locator('img').evaluate_all(loaded)
    assert view.locator('img.views').count() == 1
    assert view.locator('figure.query').count() == 8
    assert view.locator('figure').count() == 8 * 8
    tables = view.locator('table').all_inner_texts()
    assert 'orbax-checkpoint' in tables[-1]
    differing = view.locator('h2:text("Configuration") + .table').inner_text()
    assert re.search(r'augment\.size\s+8\s+224', differing)  # beside the default
    described = 'all => all.every(e => e.alt || e.getAttribute("aria-label"))'
    assert view.locator('img, .plot').evaluate_all(described)
    view.locator('.tiles .term').first.focus()
    assert view.locator('.tiles .tip').first.inner_text().startswith('Share of the test images')
    assert view.locator('.tiles .tip').first.is_visible()
    assert pages[0].stat().st_size < 1e6
    messages = [text for text in messages if not text.startswith('data:')]
    assert messages == [pages[0].as_uri()]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colors, #rgb or #rrggbb, as WCAG 2.2 defines it."""

    def luminance(color: str) -> float:
        digits = color[1:] if len(color) == 7 else ''.join(2 * digit for digit in color[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_text_and_curves_stand_out_on_light_and_dark_pages() -> None:
    assert contrast('#000', '#ffffff') == pytest.approx(21)
    themes = [dict(re.findall(r'--(\w+): (#\w+)', root)) for root in assets.STYLE.split('@media')]
    for theme in themes[:2]:
        for ground in ('page', 'soft'):
            for text in ('text', 'quiet', 'good', 'check', 'bad'):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        assert contrast(theme['text'], theme['marked']) >= 4.5
        assert contrast(theme['quiet'], theme['marked']) >= 4.5
        for color in curves.COLORS:
            assert contrast(color, theme['page']) >= 3, color


def test_report_of_two_runs_compares_them(pages, browser) -> None:
    view, messages = open_page(browser, pages[1], 1280)
    loss = view.locator('[aria-label^="Chart of Loss:"]')
    x = 'chart => chart.data.map(trace => trace.x.at(-1))'
    assert loss.evaluate(x) == [66, 32]  # the line of step 34 is truncated
    view.locator('.runs select').select_option('images')
    assert loss.evaluate(x) == [66 * 128, 32 * 64]
    assert loss.locator('.scatterlayer .trace').count() == 2
    view.locator('.runs input').nth(1).uncheck()
    assert loss.locator('.scatterlayer .trace').count() == 1
    shown = view.locator('.verdict').all_inner_texts()
    assert shown[1] == '✗ The rank falls & <the loss> too'
    rows = view.locator('.ranking tr').all_inner_texts()
    head, *ranked = [row.strip('\n').split('\t') for row in rows]
    assert head[:3] == ['', 'Verdict', 'kNN accuracy']
    assert head[-2:] == ['batch_size', 'optim.momentum']
    assert [row[0] for row in ranked] == ['1. whole', '2. other']
    assert [row[-2:] for row in ranked] == [['128', '0.9'], ['64', '0.75']]
    view.set_viewport_size({'width': 375, 'height': 800})
    view.wait_for_function('document.documentElement.scrollWidth === 375')
    right = 'all => Math.max(...all.map(cell => cell.getBoundingClientRect().right))'
    assert view.locator('.ranking td').evaluate_all(right) <= 375
    assert [text for text in messages if not text.startswith('data:')] == [pages[1].as_uri()]


def write_run(folder: pathlib.Path, rows: list[dict], **texts: str) -> overview.Health:
    """Writes a run with a row of the guard's metrics per measurement; returns its verdict."""
    usual = {'rankme': 40.0, 'z_std': 0.9, 'alignment': 0.5, 'uniformity': -3.0}
    usual |= {'dead_channels': 0.0, 'loss_floor': -0.8, 'view_distance': 0.7}
    lines = [
        {'step': 10 * i, **{f'guard/{key}': value for key, value in (usual | row).items()}}
        for i, row in enumerate(rows)
    ]
    folder.mkdir()
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    for name, text in texts.items():
        (folder / name.replace('_', '.')).write_text(text)
    return overview.judge(*runs.read_runs([folder]))


def test_verdict_in_words(tmp_path: pathlib.Path) -> None:
    warning = (
        'complete collapse at step 30: loss -0.99; values before training in parentheses\n'
        '  possible causes and fixes, most likely first:\n'
        '  1. the stop-gradient is off: --config.method.stop_gradient=True\n'
        '  there is no checkpoint from before the collapse'
    )
    low = {'z_std': 0.1}
    health = write_run(tmp_path / 'healthy', [{}] * 5)
    assert (health.level, health.headline) == ('good', 'Healthy: no sign of collapse')
    health = write_run(tmp_path / 'short', [{}] * 3)
    assert (health.level, health.headline) == ('check', 'Not checked for collapse')
    health = write_run(tmp_path / 'collapsed', [{}, low, low, low], guard_txt=warning)
    assert (health.level, health.headline) == ('bad', 'Complete collapse at step 30')
    assert health.fixes == ('the stop-gradient is off: --config.method.stop_gradient=True',)
    health = write_run(tmp_path / 'recovered', [{}, low, low, low, {}], guard_txt=warning)
    assert health.level == 'check'
    assert health.headline == 'Healthy at step 40, after complete collapse at step 30'
    result = {
        'sentence': 'no better than a random network: +1.0 points. Likely causes: x',
        'comparison': {'interval': [-2.0, 4.0]},
    }
    health = write_run(tmp_path / 'useless', [{}] * 5, verdict_json=json.dumps(result))
    assert health == overview.Health(
        'check',
        'No collapse, but no better than a random network: +1.0 points',
        ('Likely causes: x',),
    )


def test_runs_without_labels_are_ranked_by_verdict_and_rank(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path / 'narrow', [{'rankme': 30.0}] * 5)
    write_run(tmp_path / 'collapsed', [{'rankme': 90.0}] * 5, guard_txt='partial collapse: why')
    write_run(tmp_path / 'wide', [{'rankme': 60.0}] * 5)
    records = runs.read_runs([tmp_path / name for name in ('narrow', 'collapsed', 'wide')])
    ranked = [run.name for run in ranking.rank(records)]
    assert ranked == ['wide', 'narrow', 'collapsed']


def test_run_time_sums_from_each_start_to_its_last_metric(tmp_path: pathlib.Path) -> None:
    def write(name: str, rows: list[dict]) -> None:
        (tmp_path / name).write_text(''.join(json.dumps(row) + '\n' for row in rows))

    write('starts.jsonl', [{'time': t, 'steps_per_epoch': 5} for t in (100.0, 1000.0, 5000.0)])
    rows = [{'step': i, 'time': t, 'train/loss': 0.5} for i, t in ((1, 110.0), (2, 130.0))]
    write('metrics.jsonl', [*rows, {'step': 3, 'time': 1007.0, 'train/loss': float('nan')}])
    (record,) = runs.read_runs([tmp_path])
    assert (record.seconds, record.step, record.name) == (30 + 7, 3, tmp_path.name)


def test_failing_report_prints_warning_only(run, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(errors.UserError, match=r'has no metrics\.jsonl; expected the workdir'):
        report.render_report([tmp_path])
    shutil.copy(run[0] / 'metrics.jsonl', tmp_path)
    (tmp_path / 'config.json').write_text('{"cut of')
    report.write_report(str(tmp_path))
    assert 'warning: no report: JSONDecodeError: ' in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, 'plotly.graph_objects', None)
    (tmp_path / 'config.json').unlink()
    report.write_report(str(tmp_path))
    assert 'plotly is not installed. Run pip install plotly, then' in capsys.readouterr().out
