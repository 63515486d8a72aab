"""ViT-S/16, the released weights: 800 epochs, 2 x 224 + 10 x 96.

Published: k-NN 74.5, linear 77.0. Settings: third-party quotations of the released `args.txt`; issue 122 of the
official repository agrees. Not run by this project.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "tfds:imagenet2012:train"
    config.epochs = 800
    config.batch_size = 1024
    config.head.norm_last_layer = False
    config.crops.local_count = 10
    config.crops.global_scale = (0.25, 1.0)
    config.crops.local_scale = (0.05, 0.25)
    config.optim.clip_grad = 0.0
    config.optim.min_lr = 1e-5
    config.teacher.temp = 0.07
    config.teacher.warmup_temp_epochs = 30
    return config
