"""ViT-S/16, the vanilla run of the official README: 100 epochs of ImageNet, 2 x 224 + 8 x 96.

    dino-jax train --config=vit_s16 --config.data.train=/data/imagenet/train --workdir=gs://bucket/s16

Published (official README): k-NN 69.3, linear 74.0, 1.75 days on 8 GPUs at 64 images each. Not run by this project.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "tfds:imagenet2012:train"
    config.batch_size = 512
    return config
