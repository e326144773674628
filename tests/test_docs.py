"""Tests of docs/: the reference is complete, links and commands exist, pages fit the screen.

`make docs` builds the site and runs its tutorials.
"""

import ast
import json
import pathlib
import re
import runpy

import browsers
import pytest
from test_install import SOURCES

import simsiam_jax
from simsiam_jax import __main__ as program
from simsiam_jax import config as config_lib
from simsiam_jax import config_keys, method_defaults
from simsiam_jax.pages import quantities

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs'
SITE = ROOT / 'build' / 'docs'
# Written by the build, so that links to them cannot be checked without it.
BUILT = ('reference/modules/', 'benchmarks/')
# Texts of headings and paragraphs that are wider than their place; code and tables may scroll.
OVERFLOWING = """[...document.querySelectorAll('.bd-article :is(h1, h2, h3, p, li, img)')]
  .filter(part => !part.closest('pre, table') && getComputedStyle(part).display != 'inline')
  .filter(part => part.scrollWidth > part.clientWidth + 1
    || part.getBoundingClientRect().right > innerWidth + 1)
  .map(part => part.textContent)"""
PAGES = sorted(
    path
    for path in [*DOCS.rglob('*.md'), *ROOT.glob('*.md'), *(ROOT / '.github').rglob('*.md')]
    if not str(path.relative_to(DOCS if DOCS in path.parents else ROOT)).startswith(BUILT)
)
BENCHMARKS = sorted((ROOT / 'benchmarks').glob('*.md'))


def names(paths: list[pathlib.Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def read(name: str) -> str:
    return (DOCS / name).read_text()


@pytest.fixture(scope='module')
def generated() -> dict[str, str]:
    """Page of the reference -> text that docs/generate.py writes."""
    generate = runpy.run_path(str(DOCS / 'generate.py'))
    return {'config.md': generate['config_page'](), 'cli.md': generate['cli_page']()}


@pytest.mark.parametrize('page', ['config.md', 'cli.md'])
def test_reference_is_what_the_code_says(page: str, generated: dict[str, str]) -> None:
    assert read(f'reference/{page}') == generated[page], 'run make docs-reference'


@pytest.mark.parametrize('task', config_lib.DEFAULTS)
def test_reference_has_every_key_with_its_default(task: str) -> None:
    section = 'linear' if task == 'finetune' else task
    text = read('reference/config.md')
    tables = text[text.index(f'`config.task = {section}`') :].split('\n## ')[0]
    config = config_lib.DEFAULTS[task]()
    for key in config_keys.keys(config):
        value = config_keys.flat(config)[key]
        (row,) = re.findall(rf'^\| `{re.escape(key)}` \| (.*) \|$', tables, re.MULTILINE)
        kind, default, *meaning = re.split(r'(?<!\\) \| ', row)
        assert kind
        assert len(meaning) == 1
        assert len(meaning[0]) > 5
        if not isinstance(value, tuple):
            assert default == f'`{value!r}`'


def test_reference_has_every_key_of_the_methods() -> None:
    text = read('reference/config.md')
    for name, keys in method_defaults.METHODS.items():
        table = text.partition(f'\n### {name}\n')[2].partition('\n### ')[0]
        assert re.findall(r'^\| `method\.(\w+)`', table, re.MULTILINE) == list(keys)


def test_reference_has_every_command() -> None:
    text = read('reference/cli.md')
    for command, module in program.COMMANDS.items():
        assert re.search(rf'^\| .*`{command}`.* \| `python -m {module}` \| \S', text, re.MULTILINE)
    assert all(f'| `{name}` |' in text for name in program.FOLDERS)


def test_help_lists_the_flags_of_the_reference(command) -> None:
    done = command('simsiam_jax.main', '--help')
    for flag in ('workdir', 'coordinator', 'timeout'):
        assert f'--{flag}:' in done.stdout
        assert f'`--{flag}`' in read('reference/cli.md')


def test_reference_has_every_public_name() -> None:
    text = read('reference/api.md')
    assert all(f'`{name}`' in text for name in simsiam_jax.__all__)


def test_reference_has_every_configuration() -> None:
    text = read('reference/config_files.md')
    for path in (ROOT / 'configs').glob('*.py'):
        assert f'](#{path.stem})' in text
        assert f'{{literalinclude}} ../../configs/{path.name}\n' in text


def test_reference_has_every_file_and_metric_of_a_run(command, tmp_path: pathlib.Path) -> None:
    text = read('reference/workdir.md')
    flags = ['--config=configs/quickstart.py:1ep', f'--workdir={tmp_path}/run']
    flags += ['--config.model.width_multiplier=0.125', '--config.model.stages=(1,)']
    done = command('simsiam_jax.main', *flags)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / 'run').iterdir():
        known = re.sub(r'tfevents\..*', 'tfevents.*', path.name)
        assert re.search(rf'^\| .*`{re.escape(known)}[/`]', text, re.MULTILINE), path
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    for key in set().union(*map(json.loads, lines)) - {'step', 'time'}:
        assert re.search(rf'^\| `{key}` \| \w.+ \|', text, re.MULTILINE), key
    assert all(f'`{key}`' in text for key in quantities.QUANTITIES)


def test_reference_has_every_file_that_the_code_names() -> None:
    text = read('reference/workdir.md')
    parts = {'images.json', 'checksums.json'}  # of files that tools.convert writes
    old = {'held.json'}  # of version 0.1.0
    found = set()
    for room in ('logs', 'checkpoints', 'runtime', 'tasks', 'pages', 'tools/ledger'):
        for path in (ROOT / 'simsiam_jax' / room).glob('*.py'):
            found |= set(re.findall(r"'(\w+\.(?:jsonl?|txt|png|html|md))'", path.read_text()))
    assert {'metrics.jsonl', 'guard.txt', 'lock.json', 'knn.json'} <= found
    assert {name for name in found - parts - old if f'{name}`' not in text} == set()


def test_reference_has_every_exit_code() -> None:
    codes = set()
    for path in (ROOT / 'simsiam_jax').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name, code = ast.unparse(node.func), node.args[0]
                if name in ('sys.exit', 'os._exit', 'SystemExit'):
                    codes |= {x.value for x in ast.walk(code) if isinstance(x, ast.Constant)}
                    codes |= {'75'} if 'EX_TEMPFAIL' in ast.unparse(code) else set()
    numbers = {code for code in codes if isinstance(code, int)} | {75}
    assert {1, 143} <= numbers
    assert all(f'\n| {code} | ' in read('reference/exit_codes.md') for code in numbers)


def test_every_question_is_answered_with_a_command() -> None:
    _, *answers = re.split(r'^## ', read('faq.md'), flags=re.MULTILINE)
    assert len(answers) == 10
    for answer in answers:
        assert '?' in answer.partition('\n')[0]
        assert re.search(r'^    simsiam-jax \w+', answer, re.MULTILINE), answer.partition('\n')[0]


@pytest.mark.parametrize('name', names([*PAGES, *BENCHMARKS]))
def test_links_within_the_project_exist(name: str) -> None:
    path = ROOT / name
    text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
    links = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r':link: (\S+)', path.read_text())
    for link in links:
        target = link.partition('#')[0]
        if not target or re.match(r'\w+:', target):
            continue
        found = (path.parent / target).resolve()
        built = DOCS in found.parents and str(found.relative_to(DOCS)).startswith(BUILT)
        exists = found.exists() or found.with_name(f'{found.name}.md').exists()
        assert built or exists, f'{name}: {link}'


@pytest.mark.parametrize('name', names(PAGES))
def test_commands_of_the_pages_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    keys = {key for make in config_lib.DEFAULTS.values() for key in config_keys.keys(make())}
    keys |= {f'method.{key}' for method in method_defaults.METHODS.values() for key in method}
    for key in re.findall(r'--config\.([\w.]+)=', text):
        free = key.startswith(config_keys.FREE_SECTIONS)
        assert free or key in keys | {'SECTION.KEY', 'KEY', 'key'}, f'{name}: {key}'
    known = {*program.COMMANDS, *program.FOLDERS, 'COMMAND'}
    for command in re.findall(r'(?:^|`)\s*simsiam-jax (\w+)', text, re.MULTILINE):
        assert command in known, f'{name}: {command}'
    for module in re.findall(r'-m (simsiam_jax[\w.]*\w)', text):
        file = ROOT / module.replace('.', '/')
        assert file.is_dir() or file.with_suffix('.py').exists(), f'{name}: {module}'


def test_version_is_the_same_everywhere() -> None:
    version = simsiam_jax.__version__
    assert f'\nversion: {version}\n' in (ROOT / 'CITATION.cff').read_text()
    latest = re.findall(r'^## \[(.*)\]', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    assert version in latest[:2]  # below what is not released yet


def test_dockerfile_copies_what_the_wheel_is_built_from() -> None:
    text = (ROOT / 'Dockerfile').read_text()
    copies = [line.split()[1:-1] for line in text.splitlines() if line.startswith('COPY')]
    copied = {name for line in copies for name in line}
    assert copied == set(SOURCES)  # test_install.py builds and installs the wheel from these
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / '.dockerignore').read_text().splitlines()
    assert ignored[0] == '**'
    assert {line[1:] for line in ignored if line.startswith('!')} == copied
    setup = (ROOT / 'setup.py').read_text()
    (extras,) = re.findall(r'^ARG EXTRAS=(.*)$', text, re.MULTILINE)
    assert all(f"'{extra}': [" in setup for extra in extras.split(','))
    assert 'ENTRYPOINT ["simsiam-jax"]' in text
    assert "'simsiam-jax = simsiam_jax.__main__:main'" in setup


@pytest.fixture(scope='module')
def browser():
    if not (SITE / 'searchindex.js').exists():  # written last
        pytest.skip('the site is not built; run make docs')
    with browsers.chromium('--disable-gpu') as opened:
        yield opened


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize(
    'page', ['index', 'tutorials/own_images', 'reference/config', 'reference/modules/methods']
)
def test_pages_fit_the_screen(browser, page: str, width: int, scheme: str, tmp_path) -> None:
    view = browser.new_page(viewport={'width': width, 'height': 900}, color_scheme=scheme)
    failed: list[str] = []
    view.on('pageerror', lambda error: failed.append(str(error)))
    view.on('request', lambda request: failed.append(request.url))
    view.goto((SITE / f'{page}.html').as_uri(), timeout=120_000)  # ms
    assert view.evaluate('document.documentElement.scrollWidth') == width
    assert view.evaluate(OVERFLOWING) == []
    background = view.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (max(map(int, re.findall(r'\d+', background)[:3])) < 100) == (scheme == 'dark')
    picture = view.screenshot(path=str(tmp_path / 'page.png'))
    assert len(picture) > 10_000
    assert [url for url in failed if not url.startswith('file:')] == []  # no other site
    view.close()
