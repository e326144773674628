"""A run as its workdir tells of it: running, ended or broken off."""

import dataclasses
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from simsiam_jax import errors
from simsiam_jax.runtime import storage

Curve = list[tuple[int, float]]  # (step, value)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What the files of a workdir hold; empty where one is not there.

    Attributes:
      name: tells it from the others of a page.
      config: by key, such as optim.momentum.
      curves: by key, such as train/loss.
      starts: see runtime/versions.py.
      seconds: it ran, as far as times were kept.
    """

    name: str
    folder: epath.Path
    config: dict[str, Any]
    curves: dict[str, Curve]
    starts: list[dict[str, Any]]
    seconds: float

    @property
    def step(self) -> int:
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    @property
    def steps(self) -> int:
        """In all, as planned; 0 where that is not known."""
        return self.steps_per_epoch * self.config.get('epochs', 0)

    @property
    def steps_per_epoch(self) -> int:
        return self.starts[-1]['steps_per_epoch'] if self.starts else 0

    @property
    def batch_size(self) -> int:
        return self.config.get('batch_size', 0)

    def typical(self, key: str) -> float | None:
        """The median."""
        return statistics.median(y for _, y in self.curves[key]) if key in self.curves else None


def read(workdirs: Sequence[str | os.PathLike[str]]) -> list[RunRecord]:
    """The runs, named by what their paths do not have in common.

    Raises:
      UserError: a folder is not the workdir of a run.
    """
    paths = list(dict.fromkeys(storage.folder(workdir) for workdir in workdirs))
    levels = zip(*(path.parent.parts for path in paths), strict=False)
    common = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
    found = []
    for path in paths:
        with storage.reading(path):
            found.append(_read(path, '/'.join(path.parts[common:])))
    return found


def _read(folder: epath.Path, name: str) -> RunRecord:
    if not (folder / 'metrics.jsonl').exists():
        raise errors.UserError(
            f'{folder} has no metrics.jsonl; expected the workdir of a run of task pretrain, '
            'linear or finetune'
        )
    lines = json_lines(folder / 'metrics.jsonl')
    starts = json_lines(folder / 'starts.jsonl')
    path = folder / 'config.json'
    config = json.loads(path.read_text()) if path.exists() else {}
    return RunRecord(
        name, folder, flatten_dict(config, sep='.'), _curves(lines), starts, _seconds(starts, lines)
    )


def json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """[] where there is no such file; a line that is cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def curves(folder: str | os.PathLike[str]) -> dict[str, Curve]:
    """Those of a workdir's metrics.jsonl, name -> (step, value) of every point."""
    return _curves(json_lines(epath.Path(folder) / 'metrics.jsonl'))


def _curves(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for values in lines:
        for key in values.keys() - {'step', 'time'}:
            found.setdefault(key, []).append((values['step'], values[key]))
    return found


def _seconds(starts: list[dict[str, Any]], lines: list[dict[str, Any]]) -> float:
    """From each start to the last measurement before the next."""
    total = 0.0
    begins = [start['time'] for start in starts]
    for begin, end in itertools.pairwise([*begins, float('inf')]):
        times = [line['time'] for line in lines if begin <= line.get('time', 0) < end]
        total += max(times, default=begin) - begin
    return total
