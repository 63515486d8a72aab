"""ViT-B/8, the released weights: 300 epochs.

Published: k-NN 77.4, linear 80.1. Settings: third-party quotations of the released `args.txt`. UNCONFIRMED: the crops,
taken from the B/16 run. Not run by this project.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "tfds:imagenet2012:train"
    config.model.name = "vit_base"
    config.model.patch_size = 8
    config.epochs = 300
    config.batch_size = 1056  # 176 GPUs x 6
    config.crops.local_count = 10  # unconfirmed, as are the two scales
    config.crops.global_scale = (0.25, 1.0)
    config.crops.local_scale = (0.05, 0.25)
    config.optim.lr = 5e-4
    config.optim.min_lr = 2e-6
    config.optim.clip_grad = 3.0
    config.optim.freeze_last_layer = 3
    config.teacher.warmup_temp = 0.03
    config.teacher.temp = 0.07
    config.teacher.warmup_temp_epochs = 50
    return config
