"""A small ViT on the embedded `scenes`, in minutes on a laptop's CPU: what `launch/quickstart.sh` trains."""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "scenes:train?size=4096&image_size=64"
    config.epochs = 5
    config.batch_size = 64
    config.model.name = "vit_tiny"
    config.model.patch_size = 8
    config.model.embed_dim = 96
    config.model.depth = 4
    config.model.heads = 3
    config.model.drop_path = 0.0
    config.head.out_dim = 1024
    config.head.hidden_dim = 256
    config.head.bottleneck_dim = 64
    config.crops.global_size = (48, 48)
    config.crops.local_size = (24, 24)
    config.crops.local_count = 4
    config.optim.warmup_epochs = 1
    config.optim.lr = 2e-3
    config.teacher.momentum = 0.99
    return config
