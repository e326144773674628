"""Tests of the words in documentation, docstrings, comments and messages."""

import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# What readers stumble over -> what to write instead.
SUBSTITUTIONS = {
    r'colour\w*': 'color',
    r'behaviour\w*': 'behavior',
    r'neighbour\w*': 'neighbor',
    r'centre\w*': 'center',
    r'licence\w*': 'license',
    r'grey\w*': 'gray',
    r'labelled|unlabelled': 'labeled',
    r'\w*(normal|optim|initial|synchron|symmetr|solar|serial|vector|recogn|summar|random)is'
    r'(e|ed|es|er|ing|ation)': '-ize',
    r'anew': 'again, recreate',
    r'mend(s|ed|ing)?': 'fix',
    r'alike': 'the same, identical',
    r'go(es)? on|went on|going on': 'continue, resume',
    r'(is|are|was|were) told': 'report, print',
    r'so many': 'N, this number of',
    r'by heart': 'from memory',
    r'passed over|passes over': 'skip',
    r'what is left': 'rest, remaining',
    r'(is|are) said': 'print, report',
    r'a good minute': 'about a minute',
    r'by chance': 'at random',
}
PATTERN = re.compile('|'.join(rf'\b({pattern})\b' for pattern in SUBSTITUTIONS), re.IGNORECASE)
# Names that are kept because earlier versions or other programs have them.
EXEMPT = {'simsiam_jax/migration.py', 'tests/test_words.py'}
NAMES = re.compile(r"--neighbours|'neighbours'|on_device=colour")


def texts(path: pathlib.Path) -> list[tuple[int, str]]:
    """Line numbers and text that people read: all of it, or strings and comments of Python."""
    source = path.read_text()
    if path.suffix != '.py':
        return list(enumerate(source.splitlines(), 1))
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, 'FSTRING_MIDDLE', -1)}
    return [
        (token.start[0] + i, line)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type in kinds
        for i, line in enumerate(token.string.splitlines())
    ]


def files() -> list[pathlib.Path]:
    found = [*ROOT.glob('*.md'), ROOT / 'CITATION.cff', ROOT / 'Dockerfile', ROOT / 'Makefile']
    folders = (
        'simsiam_jax',
        'configs',
        'launch',
        'benchmarks',
        'docs',
        'examples',
        'tests',
        '.github',
    )
    for folder in folders:
        found += [
            path
            for path in (ROOT / folder).rglob('*')
            if path.suffix in ('.py', '.md', '.sh', '.sbatch', '.yaml')
        ]
    return [
        path
        for path in found
        if str(path.relative_to(ROOT)) not in EXEMPT and 'compatibility' not in path.parts
    ]


def test_words_are_those_of_the_field() -> None:
    odd = [
        f'{path.relative_to(ROOT)}:{number}: {match[0]!r} in: {line.strip()[:80]}'
        for path in files()
        for number, line in texts(path)
        if (match := PATTERN.search(NAMES.sub('', line)))
    ]
    assert not odd, 'see SUBSTITUTIONS for what to write:\n' + '\n'.join(odd)


@pytest.mark.parametrize(
    'text', ['the colours', 'Initialised', 'it goes on', 'mended', 'grey-scale', 'neighbours']
)
def test_words_to_replace_are_found(text: str) -> None:
    assert PATTERN.search(text)


@pytest.mark.parametrize('text', ['the color', 'noise', 'recommend', 'likewise', 'supervised'])
def test_other_words_are_not(text: str) -> None:
    assert not PATTERN.search(text)
