"""Tests of the package's structure: imports, sizes of files, heavy packages."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / 'simsiam_jax'
MODULES = sorted(PACKAGE.rglob('*.py'))

# The floors, from the ground up: each may import those before it.
FLOORS = [
    {
        '_version',
        'errors',
        'terminal',
        'lazy_tf',
        'paths',
        'patience',
        'import_path',
        'config',
        'config_files',
        'config_keys',
        'method_defaults',
        'variants',
        'migration',
    },
    {'models'},
    {'methods', 'data', 'runtime'},
    {'training', 'logs', 'command_line'},
    {'checkpoints'},
    {'tasks'},
    {'pages'},
    {'main', 'tools'},
    {'api'},
    {'__main__'},
]


def imported_parts(path: pathlib.Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'simsiam_jax':
            parts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('simsiam_jax.'):
            parts.add(node.module.split('.')[1])
    return parts


def test_rooms_import_only_lower_floors() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix('.py') for path in MODULES}
    assert set().union(*FLOORS) == parts - {'__init__'}
    for path in MODULES:
        part = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
        imported = imported_parts(path) - {part}
        if part == '__init__':
            assert imported <= {'_version', 'api', 'checkpoints', 'errors'}
            continue
        floor = next(i for i, floor in enumerate(FLOORS) if part in floor)
        below = set().union(*FLOORS[:floor]) | (FLOORS[0] if floor == 0 else set())
        assert imported <= below, path


def test_no_module_exceeds_300_lines() -> None:
    assert {
        p: n for p in PACKAGE.rglob('*.py') if (n := len(p.read_text().splitlines())) > 300
    } == {}


def test_heavy_packages_are_imported_inside_functions() -> None:
    heavy = {'tensorflow', 'tensorflow_datasets', 'clu', 'ml_collections'}
    for part in ('models', 'methods', 'data', 'runtime', 'training', 'logs', 'checkpoints'):
        for path in (PACKAGE / part).rglob('*.py'):
            for node in ast.parse(path.read_text()).body:
                names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
                if isinstance(node, ast.ImportFrom):
                    names = {(node.module or '').split('.')[0]}
                assert not names & heavy, path
