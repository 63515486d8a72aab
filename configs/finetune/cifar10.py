"""CIFAR-10, 1000 epochs (issue 81 of the official repository; lr 7.5e-6 is after scaling, as issue 105 of DeiT says
of its like). CIFAR-100: issue 144, with `--config.lr=3.33e-6`, 5e-6 after scaling.

dino-jax eval finetune --config=finetune/cifar10 --checkpoint=dino_vits16 --data=DIR
"""

from dino_jax.eval.protocols.finetune import PROTOCOL


def get_config():
    config = PROTOCOL.default_config()
    config.epochs = 1000
    config.batch_size = 768
    config.lr = 5e-6  # 7.5e-6 at 768
    config.min_lr = 1e-6  # below the peak, which the default is not
    config.erasing = 0.0
    config.resize = 224
    return config
