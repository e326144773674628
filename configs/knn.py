"""kNN accuracy of a checkpoint: every k with every temperature, top-1 and top-5, in one pass.

    python -m simsiam_jax.main --config=configs/knn.py --workdir=DIR --config.init_from=RUN

The image sets are those of the pre-training where they are not given:
--config.eval.train=folder:DIR/train --config.eval.test=folder:DIR/val. The bank is float16
(ImageNet's at 2048 wide takes 5.2 GB, shared by the devices); --config.eval.bank_dtype=float32
is exact. Not from the paper, which shows k 200 only as curves.
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib


def get_config() -> ConfigDict:
    return config_lib.knn()
