"""What the checks know about a run, and what they return."""

import dataclasses
import functools

from ml_collections import ConfigDict

from simsiam_jax.data.sources import ArraySource, Source
from simsiam_jax.data.survey import DatasetSurvey
from simsiam_jax.tasks.pretrain_setup import PretrainSetup
from simsiam_jax.tools.doctor import estimates

# The run would not start or would stop; it would train, but badly; no problem.
SEVERITIES = ('error', 'warning', 'ok')


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
      severity: One of SEVERITIES.
      text: What was seen, what it means and what to do.
    """

    severity: str
    text: str

    def __str__(self) -> str:
        return f'{self.severity:7}  {self.text}'


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Returns the findings, errors first, otherwise in the order given."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


@dataclasses.dataclass(frozen=True)
class Context:
    """A run as the checks see it; what is None could not be prepared.

    Attributes:
      config: Configuration to check.
      workdir: Workdir of the run; None if none was given.
      source: Images of config.data.source.
      survey: Survey of the images.
      copies: Number of near-duplicates in the survey.
      pairs: Names of some near-duplicates, each with the image that it repeats.
      setup: The run as built from the configuration, before its first step.
      problems: Findings from opening the images and building the run.
    """

    config: ConfigDict
    workdir: str | None = None
    source: Source | ArraySource | None = None
    survey: DatasetSurvey | None = None
    copies: int = 0
    pairs: tuple[tuple[str, str], ...] = ()
    setup: PretrainSetup | None = None
    problems: tuple[Finding, ...] = ()

    @property
    def distinct(self) -> int:
        """Distinct images of the source; an upper bound, since a sample shows fewer copies."""
        survey = self.survey
        if survey is None or not survey.images:
            return 0
        kept = len(survey.images) - self.copies
        return max(1, round(survey.count * kept / survey.seen))

    @functools.cached_property
    def step_rate(self) -> float:
        """Estimated images per second of the training step; needs a setup."""
        assert self.setup is not None
        return estimates.step_rate(self.config, self.setup)
