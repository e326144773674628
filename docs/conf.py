"""Settings of the documentation, which `make docs` builds."""

import os
import pathlib
import re
import shutil
import sys
import tempfile

from sphinx.application import Sphinx

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate  # noqa: E402

from simsiam_jax import __version__  # noqa: E402

# The tutorials run the commands of this checkout on the CPU, with the compilation cache of users.
os.environ['PATH'] = f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
os.environ['PYTHONPATH'] = str(DOCS.parent)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
# Our own settings of IPython, not the user's.
_ipython = tempfile.TemporaryDirectory()
shutil.copytree(DOCS / '_profile', pathlib.Path(_ipython.name, 'profile_default'))
os.environ['IPYTHONDIR'] = _ipython.name

project, author, version = 'simsiam_jax', 'simsiam_jax developers', __version__
copyright = author

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx_design',
    'sphinx_copybutton',
]
exclude_patterns = ['_profile']
smartquotes = False  # '' is an empty value

default_role = 'code'  # of `x` in docstrings
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
napoleon_use_ivar = True

myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3
nb_execution_mode = 'force'
nb_execution_allow_errors = False
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300  # seconds a cell
nb_merge_streams = True

html_theme = 'pydata_sphinx_theme'
html_title = f'simsiam_jax {version}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {
    'navbar_align': 'left',
    'header_links_before_dropdown': 8,
    'show_prev_next': True,
    'secondary_sidebar_items': {'**': ['page-toc'], 'index': []},
    'footer_start': ['copyright'],
    'footer_end': [],
}
html_sidebars = {page: [] for page in ('index', 'install', 'faq', 'glossary')}
html_show_sourcelink = False
copybutton_prompt_text = '$ '


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file unless it has this content, so that a second build skips its page."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def _write_pages() -> None:
    """Writes the pages of the modules, and copies those of benchmarks/."""
    for name, text in generate.module_pages().items():
        _write(DOCS / 'reference' / 'modules' / f'{name}.rst', text.encode())
    for path in (DOCS.parent / 'benchmarks').iterdir():
        if path.suffix in ('.md', '.png'):
            _write(DOCS / 'benchmarks' / path.name, path.read_bytes())


def _link_within_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to files outside docs/, which work in a checkout, become links to their pages."""
    source[0] = re.sub(r'\]\((\.\./)+benchmarks/(\w+\.md)', r'](/benchmarks/\2', source[0])
    source[0] = re.sub(
        r'\]\((\.\./)+configs/(\w+)\.py', r'](/reference/config_files.md#\2', source[0]
    )


def setup(app: Sphinx) -> None:
    app.connect('source-read', _link_within_the_site)


_write_pages()
