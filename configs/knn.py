"""kNN evaluation of a checkpoint: top-1 and top-5 of every k with every temperature, in one pass.

    python -m simsiam_jax.main --config=configs/knn.py --workdir=DIR --config.init_from=RUN

The image sets are inherited from pre-training unless given:
--config.eval.train=folder:DIR/train --config.eval.test=folder:DIR/val. The bank of features is
float16 (5.2 GB for ImageNet at width 2048, sharded over the devices);
--config.eval.bank_dtype=float32 is exact. Not from the paper, which shows only
curves for k 200.
"""

from ml_collections import ConfigDict

from simsiam_jax import config as config_lib


def get_config() -> ConfigDict:
    return config_lib.knn()
