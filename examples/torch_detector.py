"""Trains torchvision's Faster R-CNN on top of a pre-trained ResNet, here to find bright squares.

    python examples/torch_detector.py RUN BACKBONE.pth

RUN is the workdir of a run with model.name=resnet18 and model.stem=imagenet. Needs PyTorch and
torchvision: pip install 'simsiam_jax[torch]'.
"""

import sys

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import simsiam_jax

run, file = sys.argv[1:3]
print(simsiam_jax.Encoder.load(run).save(file, 'torchvision'))

backbone = resnet_fpn_backbone(backbone_name='resnet18', weights=None, trainable_layers=5)
backbone.body.load_state_dict(torch.load(file, weights_only=True))
detector = FasterRCNN(
    backbone,
    num_classes=2,
    min_size=96,
    max_size=96,
    rpn_pre_nms_top_n_train=100,  # few proposals, to be quick
    rpn_post_nms_top_n_train=50,
)
optimizer = torch.optim.Adam(detector.parameters(), lr=3e-4)


def example() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns a noisy image [3, 96, 96] with a bright square, and its box."""
    image = 0.3 * torch.rand(3, 96, 96)
    left, top = torch.randint(0, 56, (2,)).tolist()
    image[:, top : top + 40, left : left + 40] += 0.6
    box = torch.tensor([[left, top, left + 40, top + 40]], dtype=torch.float32)
    return image, {'boxes': box, 'labels': torch.ones(1, dtype=torch.int64)}


torch.manual_seed(0)
images, targets = zip(*(example() for _ in range(2)), strict=True)
for step in range(12):
    loss = sum(detector(list(images), list(targets)).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 2:
        print(f'step {step + 1}  loss {loss.item():.4f}', flush=True)
