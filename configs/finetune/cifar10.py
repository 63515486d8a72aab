"""CIFAR-10, 1000 epochs (issue 81 of the official repository).

Its lr of 7.5e-6 is taken as scaled, by analogy with issue 105 of DeiT. CIFAR-100: issue 144, `--config.lr=3.33e-6`,
which is 5e-6 after scaling.

dino-jax eval finetune --config=finetune/cifar10 --checkpoint=dino_vits16 --data=DIR
"""

from dino_jax.eval.protocols.finetune import PROTOCOL


def get_config():
    config = PROTOCOL.default_config()
    config.epochs = 1000
    config.batch_size = 768
    config.lr = 5e-6  # 7.5e-6 at 768
    config.min_lr = 1e-6  # the default is above the peak
    config.erasing = 0.0
    config.resize = 224
    return config
