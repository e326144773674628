"""Pre-training from Python."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simsiam_jax import paths
from simsiam_jax.api import configuration
from simsiam_jax.api.encoder import Encoder
from simsiam_jax.checkpoints import checkpoint
from simsiam_jax.models import backbones
from simsiam_jax.pages import report, runs
from simsiam_jax.runtime import determinism, storage
from simsiam_jax.tasks import memory
from simsiam_jax.tasks import pretrain as task
from simsiam_jax.training import mesh
from simsiam_jax.training.step import TrainState

# (step, encoder, metrics of the step) -> more values to log, or None
Callback = Callable[[int, Encoder, Mapping[str, float]], Mapping[str, float] | None]

_STOPPED = 143  # exit code of a run that saved its state after Ctrl-C or SIGTERM


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of pre-training.

    Attributes:
      workdir: Folder of the run, with checkpoints, metrics.jsonl and report.html.
      finished: Whether the run reached its last epoch; if not, call pretrain() again to resume.
    """

    workdir: str
    finished: bool
    _backbone: Any = None

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder of the latest checkpoint."""
        return Encoder.load(self.workdir, backbone=self._backbone)

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Curves of the metrics as (step, value), such as 'train/loss'."""
        return runs.read_curves(self.workdir)

    @property
    def verdict(self) -> dict[str, Any]:
        """Content of verdict.json: accuracy beside its baselines; {} if there is none."""
        file = storage.folder(self.workdir) / 'verdict.json'
        return json.loads(file.read_text()) if file.exists() else {}


def pretrain(
    workdir: str | os.PathLike[str],
    images: Any = None,
    *,
    labels: Any = None,
    config: str | os.PathLike[str] | ConfigDict = 'folder',
    callbacks: Sequence[Callback] = (),
    backbone: Any = None,
    **overrides: Any,
) -> Run:
    """Pre-trains an encoder, as the command does with the same configuration.

    ::

        run = simsiam_jax.pretrain('runs/mine', images, epochs=100, **{'model.name': 'resnet18'})

    The same call resumes from the latest checkpoint. Ctrl-C saves a checkpoint and returns.

    Args:
      workdir: Folder for checkpoints and logs.
      images: uint8 array [N, H, W, C] or [N, H, W]; a list of arrays or paths; an object with
        __len__ and __getitem__, such as a data set of PyTorch, Hugging Face or Grain; a source such
        as 'folder:DIR'; None uses those of the configuration.
      labels: Class of each image, for an evaluation: set eval.split=0.2 too.
      config: Name such as 'imagenet:byol,200ep', file, or configuration.
      callbacks: Functions (step, encoder, metrics), called when metrics are logged. The values that
        they return are logged, too.
      backbone: Flax module, (images [B, H, W, C], train) -> features [B, D]. It is not stored: pass
        it again to resume and to load the encoder. None uses the configuration's.
      **overrides: Values by key; keys with a dot need ``**{'model.name': 'resnet18'}``.

    Raises:
      UserError: The configuration, the images or the workdir cannot be used, or training failed.
    """
    workdir = paths.expand(workdir)
    mesh.use_compilation_cache()
    with (
        backbones.provide(backbone) as name,
        configuration.with_images(config, images, labels, overrides) as chosen,
    ):
        if name:
            chosen.model.name = name
        if chosen.deterministic:
            determinism.check_enabled()
        observe = functools.partial(_observe, callbacks, chosen) if callbacks else None
        try:
            with memory.oom_as_user_error(chosen):
                task.run(chosen, workdir, observe)
        except SystemExit as stopped:
            if stopped.code != _STOPPED:
                raise
            return Run(workdir, finished=False, _backbone=backbone)
        if chosen.log.report and not chosen.dry_run:
            report.write_report(workdir)
    return Run(workdir, finished=not chosen.dry_run, _backbone=backbone)


def _observe(
    callbacks: Sequence[Callback],
    config: ConfigDict,
    step: int,
    state: TrainState,
    metrics: dict[str, jax.Array],
) -> dict[str, float]:
    # Copied, because the next step overwrites the state.
    variables = jax.tree.map(jnp.copy, checkpoint.encoder_variables(state))
    plain = config.to_dict()
    encoder = Encoder(backbones.from_config(plain), variables, plain)
    values = {name: float(value) for name, value in metrics.items()}
    logged: dict[str, float] = {}
    for callback in callbacks:
        logged |= callback(step, encoder, values) or {}
    return logged
