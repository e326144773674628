"""Damages copies of a run's checkpoints at random and resumes from each; prints the counts.

PYTHONPATH=. python tests/faults/corruptions.py 100

Each must restore exactly what was saved at the step that it reports, or raise a UserError.
"""

import collections
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint, checkpoint_reader
from simsiam_jax.training.step import TrainState

STEPS = (11, 22, 33)
CONFIG = {'seed': 0, 'optim': {'momentum': 0.9}}


def state_at(step: int) -> TrainState:
    """Returns a small state with different values at each step."""
    rng = np.random.default_rng(step)

    def parts(*names: str) -> dict[str, Any]:
        shapes = {'kernel': (3, 3, 8, 16), 'bias': (16,)}
        return {
            name: {'fc': {key: rng.standard_normal(s, np.float32) for key, s in shapes.items()}}
            for name in names
        }

    params = parts('backbone', 'projector')
    momentum = (collections.namedtuple('Trace', 'trace')(parts('backbone')), ())
    return jax.device_put(
        TrainState(np.int32(step), params, parts('backbone'), momentum, None, None)
    )


def save(workdir: pathlib.Path | str) -> None:
    with checkpoint.open(str(workdir), CONFIG, max_to_keep=len(STEPS)) as checkpoints:
        for step in STEPS:
            checkpoints.save(state_at(step))
        failure = checkpoints.failure(wait=True)
    if failure:
        raise RuntimeError(failure)


def corrupt(workdir: pathlib.Path, rng: np.random.Generator) -> str:
    """Damages one file or folder of a checkpoint, mostly of the newest, and returns how."""
    step = STEPS[-1] if rng.random() < 0.7 else int(rng.choice(STEPS))
    folder = workdir / checkpoint_reader.FOLDER / str(step)
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    path = paths[rng.integers(len(paths))]
    size = path.stat().st_size
    kind = str(rng.choice(['flip', 'flip', 'truncate', 'remove', 'zero', 'grow', 'swap', 'folder']))
    data = bytearray(path.read_bytes())
    if kind == 'flip' and size:
        for at in rng.integers(size, size=16):
            data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
    elif kind == 'truncate' and size:
        path.write_bytes(data[: rng.integers(size)])
    elif kind == 'zero':
        path.write_bytes(bytes(size))
    elif kind == 'grow':
        path.write_bytes(data + rng.bytes(64))
    elif kind == 'swap':  # with the same file of another step
        other = folder.parent / str(STEPS[0] if step != STEPS[0] else STEPS[1])
        twin = other / path.relative_to(folder)
        if twin.exists():
            shutil.copy(twin, path)
    elif kind == 'folder' and path.parent != folder:
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    return f'{kind} {path.relative_to(workdir)}'


def outcome(workdir: pathlib.Path) -> str:
    """Returns 'restored STEP' if that is exactly what was saved at STEP, or 'refused'."""
    try:
        encoder = checkpoint_reader.load(workdir, 'encoder')
        same(encoder.tree, checkpoint.encoder_variables(state_at(encoder.step)))
        with checkpoint.open(str(workdir), CONFIG, max_to_keep=len(STEPS)) as checkpoints:
            state = checkpoints.restore(state_at(0))
            same(state, state_at(int(state.step)))
            checkpoints.save(state_at(STEPS[-1]))  # a run reaches the damaged step again
            failure = checkpoints.failure(wait=True)
        same(checkpoint_reader.load(workdir, 'state').tree, vars(state_at(STEPS[-1])))
        if failure:
            raise RuntimeError(failure)
    except errors.UserError:
        return 'refused'
    return f'restored {int(state.step)}'


def same(state: Any, expected: Any) -> None:
    """Raises AssertionError unless two states are equal bit for bit."""
    given, wanted = (
        {name: np.asarray(x).tobytes() for name, x in checkpoint_reader.flatten(tree).items()}
        for tree in (state, expected)
    )
    if given != wanted:
        raise AssertionError('a wrong state was restored')


def run(count: int, folder: pathlib.Path, seed: int = 0) -> collections.Counter[str]:
    """Returns the outcomes of `count` corruptions of one to three files each."""
    rng = np.random.default_rng(seed)
    save(folder / 'whole')
    counts: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        copy = shutil.copytree(folder / 'whole', folder / 'copy')
        damage = [corrupt(copy, rng) for _ in range(rng.integers(1, 4))]
        try:
            counts[outcome(copy)] += 1
        except Exception as error:
            raise AssertionError(f'{damage}: {error!r}') from error
        shutil.rmtree(copy)
    return counts


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        print(dict(run(int(sys.argv[1]), pathlib.Path(scratch))))
