"""Fine-tunes a pre-trained encoder with Flax NNX, here on 200 labeled digits.

python examples/finetune_nnx.py RUN    # workdir of a run on digits: make quickstart
"""

import sys

import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import simsiam_jax


class Classifier(nnx.Module):
    def __init__(self, encoder: simsiam_jax.Encoder, classes: int):
        self.backbone = encoder.to_nnx()
        self.head = nnx.Linear(encoder.features, classes, rngs=nnx.Rngs(0))

    def __call__(self, images, train=False):
        return self.head(self.backbone(images, train))


@nnx.jit
def step(model, optimizer, images, labels):
    def loss(model):
        logits = model(images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


encoder = simsiam_jax.Encoder.load(sys.argv[1])
digits = load_digits()
images = encoder.normalize((digits.images * 15.9).astype('uint8')[..., None])
labels = jnp.asarray(digits.target)
model = Classifier(encoder, classes=10)
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
for epoch in range(10):
    for start in range(0, 200, 50):
        value = step(model, optimizer, images[start : start + 50], labels[start : start + 50])
    print(f'epoch {epoch + 1}  loss {value:.4f}')
accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).mean()
print(f'test top-1 {accuracy:.4f}')
