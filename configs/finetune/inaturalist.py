"""iNaturalist 2018 and 2019 (issue 171 of the official repository).

dino-jax eval finetune --config=finetune/inaturalist --checkpoint=dino_vits16 --data=DIR
"""

from dino_jax.eval.protocols.finetune import PROTOCOL


def get_config():
    config = PROTOCOL.default_config()
    config.epochs = 300
    config.batch_size = 1024
    config.lr = 5e-5
    return config
