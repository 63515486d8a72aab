"""ResNet-50 by SGD, the example of the official README: 100 epochs, 8 GPUs at 64 images each.

    dino-jax train --config=resnet50 --config.data.train=/data/imagenet/train --workdir=gs://bucket/rn50

From the README: the optimizer, its learning rate 0.03, the weight decay and the crops' scales. All else is the official
code's default; batch norm's statistics are those of the whole batch, as there. Not run by this project.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "tfds:imagenet2012:train"
    config.batch_size = 512
    config.model.name = "resnet50"
    config.crops.global_scale = (0.14, 1.0)
    config.crops.local_scale = (0.05, 0.14)
    config.optim.name = "sgd"
    config.optim.lr = 0.03
    config.optim.weight_decay = 1e-4
    config.optim.weight_decay_end = 1e-4
    return config
