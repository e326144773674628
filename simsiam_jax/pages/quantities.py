"""Plain names and meanings of the quantities that runs log."""

import dataclasses

from simsiam_jax.training import guard


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A quantity as pages show it.

    Attributes:
      name: Name in plain words.
      meaning: Sentence that explains the quantity; '' if it is unknown.
      share: Whether values are shares, shown in percent.
      part: Name of the curve in a chart of several.
    """

    name: str
    meaning: str = ''
    share: bool = False
    part: str = ''

    def text(self, value: float) -> str:
        """Returns a value as text."""
        return f'{value:.1%}' if self.share else f'{value:.4g}'


_RATE = Quantity('Learning rate', 'Step size of the optimizer.')
_SPREAD = Quantity(
    'Spread of the embeddings (z_std)',
    'Standard deviation of the embeddings of different images. 1 is an even spread, 0 is a '
    f'collapse; below {guard.MIN_Z_STD:g} counts as a complete collapse.',
)

# Quantities in the order of their charts; keys with the same name share a chart.
QUANTITIES = {
    'eval/knn_top1': Quantity(
        'kNN accuracy',
        'Share of the test images whose nearest training images, by their features, have the '
        'right class.',
        share=True,
    ),
    'eval/test_top1': Quantity(
        'Test accuracy', 'Share of the test images that get the right class.', share=True
    ),
    'eval/holdout_top1': Quantity(
        'Held-out accuracy',
        'Share of the training images kept for the choice of the rate that get the right class.',
        share=True,
    ),
    'eval/test_top5': Quantity(
        'Test accuracy, top 5',
        'Share of the test images whose right class is among the five most likely.',
        share=True,
    ),
    'train/top1': Quantity(
        'Training accuracy',
        'Share of the training images of a batch that get the right class.',
        share=True,
    ),
    'train/loss': Quantity(
        'Loss',
        'The value that the training minimizes. A very low loss can also mean a collapse, so read '
        'it together with the spread of the embeddings.',
    ),
    'train/z_std': dataclasses.replace(_SPREAD, part='one batch'),
    'guard/z_std': dataclasses.replace(_SPREAD, part='several batches'),
    'guard/rankme': Quantity(
        'Effective rank (RankMe)',
        f'Number of directions that the features use. Below {guard.MIN_RANKME:.0%} of the value '
        'before training counts as a partial collapse.',
    ),
    'guard/uniformity': Quantity(
        'Uniformity',
        'How evenly the embeddings of different images spread: near -4 all are far apart, at 0 '
        f'all are identical. Above {guard.MAX_UNIFORMITY:g} counts as a partial collapse.',
    ),
    'guard/view_distance': Quantity(
        'Difference between views',
        'Pixel distance between two views of an image, as a share of the distance between '
        f'different images. Below {guard.SAME_VIEWS:g} the views are nearly identical, so there '
        'is nothing to learn.',
    ),
    'guard/alignment': Quantity(
        'Alignment',
        'Mean squared distance between the embeddings of two views of an image, from 0, '
        'identical, to 4.',
    ),
    'guard/loss_floor': Quantity(
        'Lowest possible loss',
        'Loss of SimSiam for these embeddings with a perfect predictor.',
    ),
    'guard/dead_channels': Quantity(
        'Constant channels',
        'Share of the feature channels that have the same value for all images.',
        share=True,
    ),
    'train/lr': dataclasses.replace(_RATE, part='network'),
    'train/lr_predictor': dataclasses.replace(_RATE, part='predictor'),
    'train/lr_backbone': dataclasses.replace(_RATE, part='backbone'),
    'train/images_per_second': Quantity(
        'Images per second', 'Number of training images that a second of training takes.'
    ),
    'train/data_wait': Quantity(
        'Waiting for data', 'Share of the time in which the training waits for images.', share=True
    ),
}

ACCURACIES = ('eval/knn_top1', 'eval/test_top1', 'eval/holdout_top1')


def describe(key: str) -> Quantity:
    """Returns the quantity of a key of metrics.jsonl; unknown keys are their own names."""
    return QUANTITIES.get(key) or Quantity(key.rpartition('/')[2].replace('_', ' '))
