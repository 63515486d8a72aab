"""ViT-S/8, the released weights: 800 epochs.

Published: k-NN 78.3, linear 79.7. Confirmed (issue 104 of the official repository): 800 epochs, 64 GPUs x 16 images,
float32 advised. UNCONFIRMED: everything else, taken from the 800-epoch S/16 run. Not run by this project.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "tfds:imagenet2012:train"
    config.model.patch_size = 8
    config.epochs = 800
    config.batch_size = 1024
    # Unconfirmed from here on.
    config.head.norm_last_layer = False
    config.crops.local_count = 10
    config.crops.global_scale = (0.25, 1.0)
    config.crops.local_scale = (0.05, 0.25)
    config.optim.clip_grad = 0.0
    config.optim.min_lr = 1e-5
    config.teacher.temp = 0.07
    config.teacher.warmup_temp_epochs = 30
    return config
