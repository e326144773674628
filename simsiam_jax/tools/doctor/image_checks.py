"""What is wrong, or right, with the images of a run: one line each."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from simsiam_jax.data.survey import DatasetSurvey
from simsiam_jax.tools.doctor import recommend

# The run would not start, or would end; it would go but not well; as it should be.
LEVELS = ('stops', 'warns', 'fine')

# Of digits 1,437 are enough for a network of three blocks (configs/quickstart.py); nothing
# smaller was measured.
_FEW = 1000


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the report: one of LEVELS; what was seen, what it means and what to do."""

    level: str
    text: str

    def __str__(self) -> str:
        return f'{self.level:5}  {self.text}'


def by_severity(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def check_images(
    survey: DatasetSurvey, copies: int, pairs: list[tuple[str, str]], config: ConfigDict
) -> list[Finding]:
    """Findings on the images of a survey; `copies` and `pairs` are its copies()."""
    seen = 'all' if survey.whole else f'{survey.seen:,} looked at'
    found = [_files(survey, seen)]
    if not survey.looks:
        return found
    found += _shapes(survey, config)
    found += _depth(survey)
    found += _number(survey, copies, pairs, seen)
    found += _crops(survey, config)
    return by_severity(found)


def _files(survey: DatasetSurvey, seen: str) -> Finding:
    examples = '; '.join(f'{name}: {reason}' for name, reason in list(survey.bad.items())[:3])
    more = f' and {len(survey.bad) - 3} more' if len(survey.bad) > 3 else ''
    if not survey.looks:
        return Finding('stops', f'none of {survey.count:,} images can be read ({examples}{more})')
    count = f'{survey.count:,} images ({seen})'
    if not survey.bad:
        return Finding('fine', f'{count}, none damaged')
    return Finding(
        'warns',
        f'{count}, {len(survey.bad):,} ({survey.bad_fraction:.1%}) cannot be read ({examples}'
        f'{more}); their neighbors take their place: mend them or take them out',
    )


def unreadable(survey: DatasetSurvey, config: ConfigDict) -> list[Finding]:
    """Where more images cannot be read with config.data.channels than the run allows."""
    channels = config.data.channels

    def misfits(kind: int) -> bool:
        return kind != channels and not {kind, channels} <= {1, 3}

    kinds = {kind: count for kind, count in survey.channels().items() if misfits(kind)}
    bad = (len(survey.bad) + sum(kinds.values())) / max(survey.seen, 1)
    if bad <= config.data.max_bad_fraction:
        return []
    why = [f'{count:,} have {kind} channels, not {channels}' for kind, count in kinds.items()]
    why += [f'{len(survey.bad):,} are damaged'] if survey.bad else []
    return [
        Finding(
            'stops',
            f'{bad:.1%} of the images cannot be read ({", ".join(why)}), more than '
            f'config.data.max_bad_fraction = {config.data.max_bad_fraction}: the run would end; '
            'mend them, take them out, set config.data.channels or raise the fraction',
        )
    ]


def _shapes(survey: DatasetSurvey, config: ConfigDict) -> list[Finding]:
    sides = survey.sides()
    low, high = sides.min(0), sides.max(0)
    median = np.median(sides, 0).astype(int)
    size = f'all {low[0]}x{low[1]}'
    if (low != high).any():
        size = f'{low[0]}x{low[1]} to {high[0]}x{high[1]}, median {median[0]}x{median[1]}'
    kinds = ', '.join(f'{n:,} of {c} channels' for c, n in survey.channels().items())
    bits = ' and '.join(map(str, survey.bits()))
    found = [Finding('fine', f'height x width {size}; {kinds}; {bits} bits a value')]
    if recommend.channels_of(survey) == 1 and config.data.channels == 3:
        found.append(
            Finding(
                'warns',
                'every image is gray, config.data.channels is 3: it would run, but two thirds of '
                'the input are copies; set it to 1',
            )
        )
    return found


def _depth(survey: DatasetSurvey) -> list[Finding]:
    deep = [look for look in survey.looks if look.bits > 8]
    if not deep:
        return []
    brightest = max(look.brightest for look in deep)
    bits = max(look.bits for look in deep)
    if brightest < 64:
        return [
            Finding(
                'warns',
                f'{len(deep):,} images of {bits} bits reach only {brightest / 255:.1%} of their '
                f'range: the 8 bits that are trained on would leave {brightest + 1} shades; '
                'stretch them first (12-bit data: times 16)',
            )
        ]
    return [Finding('fine', f'{len(deep):,} images of {bits} bits become 8 bits, full range')]


def _number(
    survey: DatasetSurvey, copies: int, pairs: list[tuple[str, str]], seen: str
) -> list[Finding]:
    found = []
    share = copies / len(survey.looks)
    if copies:
        names = '; '.join(f'{a} = {b}' for a, b in pairs[:2])
        text = f'{copies:,} images ({share:.1%} of {seen}) are all but copies of others ({names})'
        if not survey.whole:
            text += ', and of all images more'
        if share > 0.05:
            found.append(
                Finding(
                    'warns',
                    f'{text}: an epoch shows them again and again, and the fewer different images '
                    'the nearer a collapse; take them out',
                )
            )
        else:
            found.append(Finding('fine', text))
    else:
        found.append(Finding('fine', f'no near-duplicates ({seen})'))
    blank = sum(not look.thumb.any() for look in survey.looks)
    if blank:
        found.append(
            Finding(
                'warns', f'{blank:,} of {seen} are of one color, nothing to learn; take them out'
            )
        )
    different = distinct(survey, copies)
    if different < _FEW:
        found.append(
            Finding(
                'warns',
                f'{different:,} different images: a network from random weights learns them by '
                f'heart (the smallest set that was measured here has 1,437); start from trained '
                'weights (--config.init_from), or find more images',
            )
        )
    return found


def distinct(survey: DatasetSurvey, copies: int) -> int:
    """Different images that the source holds, at most: a sample shows fewer of the copies."""
    return max(1, round(survey.count * (len(survey.looks) - copies) / max(survey.seen, 1)))


def _crops(survey: DatasetSurvey, config: ConfigDict) -> list[Finding]:
    scale, size = survey.shrinkage(config.augment.size, config.augment.crop_scale), config.augment
    low, middle, high = scale[[len(scale) // 20, len(scale) // 2, -len(scale) // 20 - 1]]
    enlarged = (scale < 1).mean()
    text = (
        f'crops have {low:.2g} to {high:.2g} times the side of the views of {size.size} pixels '
        f'(median {middle:.2g}; {enlarged:.0%} are enlarged)'
    )
    if middle > 4:
        return [
            Finding(
                'warns',
                f'{text}: what is smaller than {middle:.0f} pixels is lost; if it matters, cut the '
                'images into tiles or raise config.augment.size',
            )
        ]
    if middle < 0.5:
        return [
            Finding(
                'warns',
                f'{text}: the network works on pixels that are not there; lower '
                'config.augment.size',
            )
        ]
    return [Finding('fine', text)]
