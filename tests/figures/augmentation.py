"""Writes augmentation.npz: torchvision's figures for tests/test_augment.py.

Needs torch, torchvision and scikit-learn (for its photograph):

    python tests/figures/augmentation.py

Operations run on float tensors: torchvision's PIL ones round after each. Values in [0, 1] are
stored as uint16 (65535 is 1), which costs 0.002/255; the normalized chains as float32.
"""

import pathlib

import numpy as np
import PIL.Image
import torch
import torchvision
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

SIZE = 24  # of the crops
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FACTORS = (0.6, 1.4)
SHIFTS = (-0.5, -0.1, 0.04, 0.1, 0.3)
SIGMAS = (0.1, 0.7, 2.0)
# top, left, height, width: one pixel to one, smaller, larger, taller, whole.
BOXES = ((20, 30, 24, 24), (9, 4, 50, 66), (31, 47, 13, 11), (2, 70, 57, 9), (0, 0, 60, 80))
RESIZES = (24, 28, 31)  # of the shorter side, before a center crop
ANGLES = (15.0, -40.0)  # degrees; torchvision's positive angle turns counter-clockwise
CHAINS = (  # box, brightness, contrast, saturation, hue, order, gray, sigma, solarize, flip
    ((9, 4, 40, 52), (1.3, 0.7, 1.35, -0.08), (0, 1, 2, 3), False, 0.9, False, True),
    ((5, 11, 51, 43), (0.65, 1.38, 0.7, 0.1), (3, 1, 0, 2), False, 1.7, True, False),
    ((17, 2, 19, 25), (1.2, 1.25, 0.8, 0.05), (2, 0, 3, 1), True, 0.4, True, True),
)
DRAWS = 40_000
LEVELS = np.linspace(0.05, 0.95, 19)
# height, width: a usual one, one where most draws fall back on the central crop, one where all do.
SHAPES = ((375, 500), (120, 600), (600, 60))


def photograph() -> np.ndarray:
    """The flower at 60x80, uint8: saturated colors and, made small, much detail."""
    image = PIL.Image.fromarray(load_sample_image('flower.jpg')).crop((0, 0, 560, 420))
    return np.array(image.resize((80, 60), PIL.Image.Resampling.BOX))


def chain(image: torch.Tensor, case: tuple) -> torch.Tensor:
    box, factors, order, gray, sigma, solarize, flip = case
    x = F.resized_crop(image, *box, [SIZE, SIZE], antialias=True)
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for turn in order:
        x = operations[turn](x, factors[turn])
    if gray:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    x = F.gaussian_blur(x, [13, 13], [sigma, sigma])
    if solarize:
        x = F.solarize(x, 0.5)
    if flip:
        x = F.hflip(x)
    return F.normalize(x, MEAN, STD)


def crops(height: int, width: int) -> np.ndarray:
    """Quantiles [4, levels] of RandomResizedCrop's area share, log ratio and position.

    A position is that of the crop's corner among all it may take, (i + 1/2) / (slack + 1).
    """
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    boxes = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    top, left, h, w = np.array(boxes, np.float64).T
    draws = (
        h * w / (height * width),
        np.log(w / h),
        (top + 0.5) / (height - h + 1),
        (left + 0.5) / (width - w + 1),
    )
    return np.array([np.quantile(d, LEVELS, method='inverted_cdf') for d in draws])


def main() -> None:
    pixels = photograph()
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    part = image[:, 14:38, 24:56]
    values: dict[str, list[torch.Tensor]] = {
        'brightness': [F.adjust_brightness(part, f) for f in FACTORS],
        'contrast': [F.adjust_contrast(part, f) for f in FACTORS],
        'saturation': [F.adjust_saturation(part, f) for f in FACTORS],
        'hue': [F.adjust_hue(part, s) for s in SHIFTS],
        'gray': [F.rgb_to_grayscale(part)],
        'solarize': [F.solarize(part, 0.5)],
        'blur': [F.gaussian_blur(part, [13, 13], [s, s]) for s in SIGMAS],
        'crop': [F.resized_crop(image, *b, [SIZE, SIZE], antialias=True) for b in BOXES],
        'center': [
            F.center_crop(F.resize(image, r, antialias=True), [SIZE, SIZE]) for r in RESIZES
        ],
        # Without `fill`: with one, torchvision darkens the border a second time.
        'rotate': [F.rotate(part, a, InterpolationMode.BILINEAR) for a in ANGLES],
    }
    figures: dict[str, np.ndarray] = {'photograph': pixels}
    for name, results in values.items():
        x = torch.stack(results).permute(0, 2, 3, 1).numpy()
        figures[name] = np.round(np.clip(x, 0, 1) * 65535).astype(np.uint16)
    chains = torch.stack([chain(image, case) for case in CHAINS])
    figures['chain'] = chains.permute(0, 2, 3, 1).numpy()
    for height, width in SHAPES:
        figures[f'quantiles_{height}x{width}'] = crops(height, width).astype(np.float32)
    figures['versions'] = np.array([torch.__version__, torchvision.__version__])
    np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), **figures)


if __name__ == '__main__':
    main()
