"""Which module may import which: small parts that work alone, effects at the edges."""

import ast
import importlib
import inspect
import pathlib
import pkgutil

import pytest

import adabatch_jax

PACKAGE = pathlib.Path(__file__).parent.parent / 'adabatch_jax'

# For each room what it may import of ours, at the top of a module or inside a function.
ALLOWED = {
    'schedules': set(),
    'optimizers': set(),
    'losses': set(),
    'curvature': set(),
    'sharpness': set(),
    'variance_reduction': {'losses'},
    'analysis': {
        'checkpoint', 'compilation_cache', 'config', 'curvature', 'experiment', 'files',
        'input_pipeline', 'metrics', 'optimizers', 'sharpness',
    },
    'models': set(),
    'metrics': set(),
    'checkpoint': set(),
    'compilation_cache': set(),
    'distributed': set(),
    'accepted_values': set(),
    'config': {'accepted_values'},
    'figures': set(),
    'sweep': {'config', 'distributed', 'experiment', 'pages', 'report', 'terminal', 'workdir'},
    'progress': {'scaling', 'schedules', 'terminal'},
    'comparison': {'config', 'metrics'},
    'files': set(),
    'pages': {'figures', 'files'},
    'report': {'command_line', 'comparison', 'config', 'figures', 'pages'},
    'policies': {'scaling', 'schedules'},
    'scaling': {'schedules'},
    'timing': {
        'compilation_cache', 'distributed', 'experiment', 'steps', 'stream', 'terminal', 'train_state',
    },
    'train_state': {'checkpoint'},
    'steps': {
        'compilation_cache', 'train_state', 'gradient_statistics', 'line_search', 'losses', 'malloc',
        'optimizers', 'variance_reduction',
    },
    'input_pipeline': {'distributed'},
    'terminal': {'scaling', 'schedules'},
    'host_state': set(),
    'workdir': {'config', 'checkpoint', 'experiment', 'files', 'metrics', 'policies', 'schedules'},
    'experiment': {
        'config', 'input_pipeline', 'models', 'optimizers', 'policies', 'reducing', 'schedules', 'steps',
        'train_state', 'variance_reduction',
    },
    'reducing': {
        'config', 'input_pipeline', 'models', 'optimizers', 'schedules', 'variance_reduction',
    },
    'gradient_statistics': set(),
    'line_search': {'gradient_statistics'},
    'probing': {'distributed', 'metrics', 'stream'},
    'stream': {'distributed', 'experiment', 'malloc', 'schedules', 'steps', 'train_state'},
    'records': {'compilation_cache', 'host_state', 'metrics', 'optimizers', 'train_state'},
    'memory': {'config', 'distributed', 'experiment', 'steps'},
    'continuation': {
        'checkpoint', 'config', 'distributed', 'experiment', 'host_state', 'optimizers', 'policies',
        'schedules', 'terminal', 'train_state',
    },
    'evaluate': {
        'checkpoint', 'compilation_cache', 'config', 'distributed', 'experiment', 'input_pipeline',
        'metrics', 'steps', 'train_state',
    },
    'main': {
        'analysis', 'command_line', 'comparison', 'config', 'distributed', 'evaluate', 'experiment',
        'malloc', 'progress', 'scaling', 'sweep', 'terminal', 'train', 'workdir',
    },
    'command_line': {'config', 'distributed'},
    'malloc': set(),
}  # fmt: skip
EVERYTHING_BUT = {
    'train': {'main', 'report', 'benchmark'},
    'run': {'main', 'report', 'benchmark', 'train'},
    'benchmark': {'main', 'report'},
}
MODULES = [module.name for module in pkgutil.walk_packages(adabatch_jax.__path__, 'adabatch_jax.')]
FILES = sorted(PACKAGE.rglob('*.py'))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported_rooms(path):
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'adabatch_jax':
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('adabatch_jax.'):
            rooms.add(node.module.split('.')[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split('.') for alias in node.names]
            rooms |= {name[1] for name in names if name[0] == 'adabatch_jax' and len(name) > 1}
    return rooms


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stay_within_the_rules(path):
    here = room(path)
    imported = imported_rooms(path) - {here}
    if here in EVERYTHING_BUT:
        assert not imported & EVERYTHING_BUT[here]
    elif here != '__init__':
        assert imported <= ALLOWED[here]


def test_every_permission_to_import_is_used():
    used = {}
    for path in FILES:
        used.setdefault(room(path), set()).update(imported_rooms(path) - {room(path)})
    assert {here: rooms - used[here] for here, rooms in ALLOWED.items() if rooms - used[here]} == {}


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_the_package_does_not_import_tensorflow(command_line):
    modules = ['main', 'train', 'train_state', 'schedules', 'models', 'steps', 'input_pipeline']
    code = 'import sys\n' + ''.join(f'import adabatch_jax.{name}\n' for name in modules)
    result = command_line('-c', f'{code}\nassert "tensorflow" not in sys.modules', module=None)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('name', MODULES)
def test_every_public_name_is_documented(name):
    """In its own words, or in those of what it overrides."""
    module = importlib.import_module(name)
    assert module.__doc__
    for public, value in vars(module).items():
        if public.startswith('_') or getattr(value, '__module__', None) != name:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), f'{name}.{public}'
        for attribute, member in vars(value).items() if inspect.isclass(value) else ():
            is_method = inspect.isfunction(member) and member.__qualname__.endswith(f'.{attribute}')
            if (is_method or isinstance(member, property)) and not attribute.startswith('_'):
                assert inspect.getdoc(getattr(value, attribute)), f'{name}.{public}.{attribute}'
