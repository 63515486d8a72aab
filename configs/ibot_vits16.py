"""iBOT ViT-S/16 (Zhou et al. 2022, arXiv 2111.07832): 800 epochs of ImageNet, 2 x 224 + 10 x 96, masked patches.

    dino-jax train --config=ibot_vits16 --config.data.train=/data/imagenet/train --workdir=gs://bucket/ibot

Published (official README): k-NN 75.2, linear 77.9. Not run by this project.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "tfds:imagenet2012:train"
    config.epochs = 800
    config.batch_size = 1024
    config.model.masking = True
    config.head.out_dim = 8192
    config.head.norm_last_layer = False
    config.crops.global_scale = (0.25, 1.0)
    config.crops.local_scale = (0.05, 0.25)
    config.crops.local_count = 10
    config.teacher.temp = 0.07
    config.teacher.warmup_temp_epochs = 30
    ibot = config.objective.ibot
    ibot.weight = 1.0
    ibot.center_over = "all"
    ibot.mask_shape = "large_block"
    ibot.mask_spread = False
    return config
