"""The doctor from Python: what will go wrong with a run, and what fits its images."""

import os
from typing import Any

from ml_collections import ConfigDict

from simsiam_jax.api import configuration
from simsiam_jax.tools.doctor import examine
from simsiam_jax.tools.doctor.examine import Examination


def doctor(
    images: Any = None,
    *,
    config: str | os.PathLike[str] | ConfigDict = 'folder',
    workdir: str | None = None,
    probe: bool = False,
    **overrides: Any,
) -> Examination:
    """Checks a run before it starts, as tools.doctor does; trains nothing.

    ::

        print(simsiam_jax.doctor(images))

    Args:
      images: Images as pretrain() takes them.
      config: Name, file or configuration, as for pretrain().
      workdir: Workdir of the run, whose disk is checked; None checks none.
      probe: Search for the learning rate too, by short trainings.
      **overrides: Values by key; these keys are kept.

    Returns:
      Findings (`findings`, errors first), whether the run would start (`starts`), and which keys
      to change (`advice`) or would be changed if they were not given (`kept`).

    Raises:
      UserError: The configuration cannot be used.
    """
    with configuration.with_images(config, images, None, overrides) as chosen:
        return examine.inspect(chosen, workdir, probe=probe, given=frozenset(overrides))


def advice(images: Any = None, **arguments: Any) -> dict[str, Any]:
    """Returns the keys that doctor() recommends to change, with their values.

    ::

        simsiam_jax.pretrain('runs/mine', images, **simsiam_jax.advice(images))

    Args:
      images: Images as pretrain() takes them.
      **arguments: Other arguments of doctor().

    Raises:
      UserError: The configuration cannot be used.
    """
    return {a.key: a.value for a in doctor(images, **arguments).advice}
