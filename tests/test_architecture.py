"""Imports point one way, and files stay readable."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / 'simsiam_jax'

# What each part may import of the package, beside itself and what all may.
EVERYWHERE = {'errors', 'tensorflow', 'terminal'}
MAY_IMPORT = {
    'models': set(),
    'data': set(),
    'methods': {'models'},
    'training': {'methods', 'models', 'data', 'config'},
    'tasks': {'training', 'methods', 'models', 'data', 'config'},
    'pages': {'tasks', 'training', 'methods', 'data', 'config'},
    'main': {'pages', 'tasks', 'training'},
    'tools': {'main', 'pages', 'tasks', 'training', 'methods', 'models', 'data', 'config'},
    'config': set(),
    'compared': set(),
    'errors': set(),
    'tensorflow': set(),
    'terminal': set(),
    '__init__': {'training'},
}


def imported_parts(path: pathlib.Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'simsiam_jax':
            parts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('simsiam_jax.'):
            parts.add(node.module.split('.')[1])
    return parts


def test_imports_point_one_way() -> None:
    for path in PACKAGE.rglob('*.py'):
        part = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
        allowed = MAY_IMPORT[part] | EVERYWHERE | {part}
        assert imported_parts(path) <= allowed, path


def test_files_are_read_in_one_sitting() -> None:
    assert {
        p: n for p in PACKAGE.rglob('*.py') if (n := len(p.read_text().splitlines())) > 300
    } == {}


def test_heavy_packages_are_imported_where_used() -> None:
    heavy = {'tensorflow', 'tensorflow_datasets', 'clu', 'ml_collections'}
    for part in ('models', 'methods', 'data', 'training'):
        for path in (PACKAGE / part).rglob('*.py'):
            for node in ast.parse(path.read_text()).body:
                names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
                if isinstance(node, ast.ImportFrom):
                    names = {(node.module or '').split('.')[0]}
                assert not names & heavy, path
