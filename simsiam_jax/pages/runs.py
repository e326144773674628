"""Records of runs, read from workdirs of running, finished or interrupted runs."""

import dataclasses
import functools
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from simsiam_jax import errors, migration, patience
from simsiam_jax.runtime import storage

Curve = list[tuple[int, float]]  # (step, value)

# Metrics of earlier versions -> their names now.
_RENAMED_METRICS = {'guard/rank': 'guard/rankme'}


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Content of the files in a workdir; missing files leave fields empty.

    Attributes:
      name: Name that is unique on a page.
      folder: Workdir of the run.
      config: Values by this version's keys, such as optim.momentum.
      curves: Curves by key, such as train/loss.
      starts: Lines of starts.jsonl, as written by MetricWriter.start.
      seconds: Time the run has taken, measured as far as the files have times.
    """

    name: str
    folder: epath.Path
    config: dict[str, Any]
    curves: dict[str, Curve]
    starts: list[dict[str, Any]]
    seconds: float

    @property
    def step(self) -> int:
        """Last step with a metric."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    @property
    def steps(self) -> int:
        """Planned number of steps; 0 if unknown."""
        return self.steps_per_epoch * self.config.get('epochs', 0)

    @property
    def steps_per_epoch(self) -> int:
        return self.starts[-1]['steps_per_epoch'] if self.starts else 0

    @property
    def batch_size(self) -> int:
        return self.config.get('batch_size', 0)

    def median(self, key: str) -> float | None:
        """Returns the median of a curve; None if there is none."""
        return statistics.median(y for _, y in self.curves[key]) if key in self.curves else None


def read_runs(workdirs: Sequence[str | os.PathLike[str]]) -> list[RunRecord]:
    """Reads the records of runs, named by the parts of their paths that differ.

    Raises:
      UserError: A folder is not the workdir of a run.
    """
    paths = list(dict.fromkeys(storage.folder(workdir) for workdir in workdirs))
    levels = zip(*(path.parent.parts for path in paths), strict=False)
    common = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
    records = []
    for path in paths:
        with storage.reading(path):
            read = functools.partial(_read_run, path, '/'.join(path.parts[common:]))
            records.append(patience.call(read, f'the workdir {path}'))
    return records


def _read_run(folder: epath.Path, name: str) -> RunRecord:
    lines = _read_json_lines(folder / 'metrics.jsonl')
    if not lines and not (folder / 'metrics.jsonl').exists():
        raise errors.UserError(
            f'{folder} has no metrics.jsonl; expected the workdir of a run of task pretrain, '
            'linear or finetune'
        )
    starts = _read_json_lines(folder / 'starts.jsonl')
    path = folder / 'config.json'
    config = {}
    if path.exists():
        config = migration.complete(json.loads(path.read_text()), origin=str(path))
    return RunRecord(
        name, folder, flatten_dict(config, sep='.'), _curves(lines), starts, _seconds(starts, lines)
    )


def _read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Reads the lines of a file, [] if it is missing; skips truncated lines."""
    values = []
    for line in storage.read_text(path).splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def read_curves(folder: str | os.PathLike[str]) -> dict[str, Curve]:
    """Reads the curves of a workdir's metrics.jsonl, by key."""
    return _curves(_read_json_lines(epath.Path(folder) / 'metrics.jsonl'))


def _curves(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for values in lines:
        for key in values.keys() - {'step', 'time'}:
            name = _RENAMED_METRICS.get(key, key)
            curves.setdefault(name, []).append((values['step'], values[key]))
    return curves


def _seconds(starts: list[dict[str, Any]], lines: list[dict[str, Any]]) -> float:
    """Sums the times from each start to the last metrics before the next start."""
    total = 0.0
    start_times = [start['time'] for start in starts]
    for start, end in itertools.pairwise([*start_times, float('inf')]):
        times = [line['time'] for line in lines if start <= line.get('time', 0) < end]
        total += max(times, default=start) - start
    return total
