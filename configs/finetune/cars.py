"""Stanford Cars. The authors published no setting for it: this is theirs for CIFAR-10 (issue 81), with a learning rate
that suits AdamW on so small a set. Sweep it.

dino-jax eval finetune --config=finetune/cars --checkpoint=dino_vits16 --data=DIR
"""

from dino_jax.eval.protocols.finetune import PROTOCOL


def get_config():
    config = PROTOCOL.default_config()
    config.epochs = 1000
    config.batch_size = 768
    config.lr = 5e-5
    config.erasing = 0.0
    return config
