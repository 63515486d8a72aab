"""XCiT-S12/16. For the other released sizes: `--config.model.patch_size=8`, `--config.model.name=xcit_medium_24`.

Published k-NN / linear: S12/16 76.0 / 77.8, S12/8 77.1 / 79.2, M24/16 76.4 / 78.8, M24/8 77.9 / 80.3. UNCONFIRMED:
every setting. No source gives those of the released XCiTs; these are from the boosted S/16 run, which has the same
width. Not run by this project.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "tfds:imagenet2012:train"
    config.epochs = 300
    config.batch_size = 1024
    config.model.name = "xcit_small_12"
    config.head.norm_last_layer = False
    config.teacher.temp = 0.07
    config.teacher.warmup_temp_epochs = 30
    return config
