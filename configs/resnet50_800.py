"""ResNet-50 with LARS, the released weights: 800 epochs, 2 x 224 + 6 x 96.

Published: k-NN 67.5, linear 75.3. Settings: third-party quotations of the released `args.txt`. UNCONFIRMED: the
values marked below. Not run by this project.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "tfds:imagenet2012:train"
    config.epochs = 800
    config.batch_size = 4080
    config.model.name = "resnet50"
    config.head.out_dim = 60000
    config.head.use_bn = True
    config.crops.local_count = 6
    config.crops.global_scale = (0.14, 1.0)
    config.crops.local_scale = (0.05, 0.14)
    config.optim.name = "lars"
    config.optim.lr = 0.3
    config.optim.min_lr = 0.0048
    config.optim.weight_decay = 1e-6
    config.optim.weight_decay_end = 1e-6  # unconfirmed
    config.optim.clip_grad = 0.0
    config.teacher.temp = 0.07  # unconfirmed
    config.teacher.warmup_temp_epochs = 50  # unconfirmed
    return config
