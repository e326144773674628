"""Checks the images of a run."""

import numpy as np
from ml_collections import ConfigDict

from simsiam_jax.data import decode, value_range
from simsiam_jax.data.listed import Listed
from simsiam_jax.data.sources import ArraySource, Source
from simsiam_jax.data.survey import DatasetSurvey
from simsiam_jax.tools.doctor import masks, recommend
from simsiam_jax.tools.doctor.context import Context, Finding, by_severity

# A network of three blocks learns from 1,437 digits (configs/quickstart.py); smaller sets were not
# measured.
_FEW = 1000
_ODD = 4  # ratio to the median of the shorter sides from which images are named
_BARS = ' ▁▂▃▄▅▆▇█'  # of a histogram
_UNBALANCED = 10  # ratio of the largest to the smallest class from which there is a warning


def check_images(context: Context) -> list[Finding]:
    """Returns findings on the files, sizes, channels, depth, near-duplicates and crops."""
    survey = context.survey
    if survey is None:
        return []
    sample = 'all' if survey.whole else f'{survey.seen:,} sampled'
    findings = [_files(survey, sample)]
    if not survey.images:
        return findings
    findings += _shapes(survey, context.config)
    findings += _odd_sizes(survey)
    findings += _classes(context.source)
    findings += _depth(survey, context.config)
    findings += _display(survey, context.config)
    findings += masks.check_masks(context.source)
    findings += _duplicates(context, sample)
    findings += _blank(survey, sample)
    findings += _number(context)
    findings.append(_crops(survey, context.config))
    return by_severity(findings)


def check_readable(context: Context) -> list[Finding]:
    """Returns an error if the run, with config.data.channels, cannot read too many images."""
    survey, config = context.survey, context.config
    if survey is None or not survey.images:
        return []
    channels = config.data.channels

    kinds = {
        kind: count for kind, count in survey.channels().items() if not decode.fits(kind, channels)
    }
    bad = (len(survey.bad) + sum(kinds.values())) / max(survey.seen, 1)
    if bad <= config.data.max_bad_fraction:
        return []
    causes = [f'{count:,} have {kind} channels, not {channels}' for kind, count in kinds.items()]
    causes += [f'{len(survey.bad):,} are damaged'] if survey.bad else []
    return [
        Finding(
            'error',
            f'{bad:.1%} of the images cannot be read ({", ".join(causes)}), more than '
            f'config.data.max_bad_fraction = {config.data.max_bad_fraction}: the run would stop; '
            'fix or remove them, set config.data.channels, or raise config.data.max_bad_fraction',
        )
    ]


def _files(survey: DatasetSurvey, sample: str) -> Finding:
    examples = '; '.join(f'{name}: {reason}' for name, reason in list(survey.bad.items())[:3])
    more = f' and {len(survey.bad) - 3} more' if len(survey.bad) > 3 else ''
    if not survey.images:
        return Finding('error', f'none of {survey.count:,} images can be read ({examples}{more})')
    count = f'{survey.count:,} images ({sample})'
    if not survey.bad:
        return Finding('ok', f'{count}, none damaged')
    return Finding(
        'warning',
        f'{count}, {len(survey.bad):,} ({survey.bad_fraction:.1%}) cannot be read ({examples}'
        f'{more}): the run replaces them by the next readable image; fix or remove them',
    )


def _shapes(survey: DatasetSurvey, config: ConfigDict) -> list[Finding]:
    sides = survey.sides()
    low, high = sides.min(0), sides.max(0)
    median = np.median(sides, 0).astype(int)
    size = f'all {low[0]}x{low[1]}'
    if (low != high).any():
        size = f'{low[0]}x{low[1]} to {high[0]}x{high[1]}, median {median[0]}x{median[1]}'
    kinds = ', '.join(f'{n:,} of {c} channels' for c, n in survey.channels().items())
    bits = ' and '.join(map(str, survey.bits()))
    findings = [Finding('ok', f'height x width {size}; {kinds}; {bits} bits per value')]
    if recommend.channels_of(survey) == 1 and config.data.channels == 3:
        findings.append(
            Finding(
                'warning',
                'every image is gray but config.data.channels is 3, so two thirds of the input '
                'are copies; set config.data.channels=1',
            )
        )
    return findings


def _odd_sizes(survey: DatasetSurvey) -> list[Finding]:
    """Names the images whose shorter side is far from the median: crops of them differ in kind."""
    shorter = survey.sides().min(1)
    ratio = shorter / np.median(shorter)
    odd = np.flatnonzero((ratio >= _ODD) | (ratio <= 1 / _ODD))
    if not len(odd) or len(odd) > len(ratio) / 20:
        return []
    named = [
        f'{survey.names[i]} ({survey.images[i].height}x{survey.images[i].width})' for i in odd[:5]
    ]
    more = f' and {len(odd) - 5} more' if len(odd) > 5 else ''
    return [
        Finding(
            'warning',
            f'{len(odd):,} images have under 1/{_ODD} or over {_ODD} times the median side: '
            f'{", ".join(named)}{more}; check that they belong here, and resize or remove them',
        )
    ]


def _classes(source: Source | ArraySource | None) -> list[Finding]:
    """Returns findings on the number of images of each class; none without classes."""
    if not isinstance(source, Listed | ArraySource) or not source.classes:
        return []
    counts = np.bincount(source.labels, minlength=len(source.classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    smallest, largest = (f'{source.classes[i]} ({counts[i]:,})' for i in (least, most))
    findings = []
    if counts[most] >= _UNBALANCED * counts[least]:
        findings.append(
            Finding(
                'warning',
                f'{len(counts)} classes from {smallest} to {largest} images: top-1 follows the '
                'large ones; read the balanced accuracy that an evaluation prints beside it',
            )
        )
    if single := [source.classes[i] for i in np.flatnonzero(counts == 1)]:
        more = f' and {len(single) - 5} more' if len(single) > 5 else ''
        findings.append(
            Finding(
                'warning',
                f'{len(single)} classes have a single image ({", ".join(single[:5])}{more}): it '
                'cannot be both learned and tested; add images, or leave the class out of '
                'evaluations',
            )
        )
    return findings or [Finding('ok', f'{len(counts)} classes from {smallest} to {largest} images')]


def _depth(survey: DatasetSurvey, config: ConfigDict) -> list[Finding]:
    """Returns findings on images of other types than 8 bits: what the range makes of their values.

    Below 64 of 256 levels the 8 bits of the training lose what distinguishes images; above a
    hundredth of clipped values the range is too narrow.
    """
    channels = next((c for c in survey.channels() if survey.deep(c)), 0)
    if not channels:
        return []
    deep, auto = survey.deep(channels), config.data.range == 'auto'
    chosen = survey.value_range(channels)
    if not auto:
        chosen = value_range.parse(config.data.range, channels)
    findings, pictures = [], []
    for channel, counts in enumerate(survey.histogram(channels, chosen)):
        shares = counts.reshape(16, 16).sum(1)
        bars = ''.join(_BARS[round(8 * share / shares.max())] for share in shares)
        low, high = counts[0] / counts.sum(), counts[-1] / counts.sum()
        levels = int((counts > 0).sum())
        pictures.append(f'{bars} ({levels} levels, {low:.1%} at 0, {high:.1%} at 255)')
        if not auto and (levels < 64 or low + high > 0.02):
            findings.append(
                Finding(
                    'warning',
                    f'channel {channel}: with config.data.range={config.data.range} the values '
                    f'fill {levels} of 256 levels, {low:.1%} at 0 and {high:.1%} at 255. Set '
                    'config.data.range=auto',
                )
            )
    bits = max(image.bits for image in deep)
    text = (
        f'{len(deep):,} images of {bits} bits: config.data.range={config.data.range} makes 0 to '
        f'255 of {chosen} (low,high by channel): '
    )
    return [Finding('ok', text + '; '.join(pictures[:5])), *findings[:3]]


def _display(survey: DatasetSurvey, config: ConfigDict) -> list[Finding]:
    """Returns findings on EXIF orientation and transparency."""
    findings = []
    if turned := sum(image.orientation > 1 for image in survey.images):
        done = 'applied' if config.data.orientation else 'ignored'
        findings.append(
            Finding(
                'ok',
                f'{turned:,} images have an EXIF orientation: {done} (config.data.orientation)',
            )
        )
    if clear := sum(image.transparent for image in survey.images):
        background = tuple(config.data.background)
        behind = f'over {background}' if background else 'ignored'
        findings.append(
            Finding('ok', f'{clear:,} images have transparency: {behind} (config.data.background)')
        )
    return findings


def _duplicates(context: Context, sample: str) -> list[Finding]:
    survey, copies = context.survey, context.copies
    assert survey is not None
    if not copies:
        return [Finding('ok', f'no near-duplicates ({sample})')]
    share = copies / len(survey.images)
    names = '; '.join(f'{a} = {b}' for a, b in context.pairs[:2])
    text = f'{copies:,} images ({share:.1%} of {sample}) are near-duplicates ({names})'
    if not survey.whole:
        text += '; the whole set has more'
    if share <= 0.05:
        return [Finding('ok', text)]
    return [
        Finding(
            'warning',
            f'{text}: an epoch repeats them, and fewer distinct images make a collapse more '
            'likely; remove them',
        )
    ]


def _blank(survey: DatasetSurvey, sample: str) -> list[Finding]:
    blank = [name for name, i in zip(survey.names, survey.images, strict=True) if not i.thumb.any()]
    text = (
        f'{len(blank):,} of {sample} have a single color and nothing to learn '
        f'({"; ".join(blank[:2])}); remove them. Masks beside the images are such: leave them '
        'out with config.data.exclude'
    )
    return [Finding('warning', text)] if blank else []


def _number(context: Context) -> list[Finding]:
    if context.distinct >= _FEW:
        return []
    return [
        Finding(
            'warning',
            f'{context.distinct:,} distinct images: a network from random weights memorizes '
            'them (the smallest set measured has 1,437); start from trained weights with '
            '--config.init_from, or add images',
        )
    ]


def _crops(survey: DatasetSurvey, config: ConfigDict) -> Finding:
    augment = config.augment
    scale = survey.shrinkage(augment.size, augment.crop_scale)
    low, middle, high = scale[[len(scale) // 20, len(scale) // 2, -len(scale) // 20 - 1]]
    enlarged = (scale < 1).mean()
    text = (
        f'crops have {low:.2g} to {high:.2g} times the side of the views of {augment.size} pixels '
        f'(median {middle:.2g}; {enlarged:.0%} are enlarged)'
    )
    if middle > 4:
        return Finding(
            'warning',
            f'{text}: details below {middle:.0f} pixels are lost; if they matter, cut the images '
            'into tiles or raise config.augment.size',
        )
    if middle < 0.5:
        return Finding(
            'warning',
            f'{text}: the network processes interpolated pixels; lower config.augment.size',
        )
    return Finding('ok', text)
