"""A small ViT on the embedded `scenes`, in minutes on a laptop's CPU: what `launch/quickstart.sh` trains.

Colors say nothing about the classes of `scenes`, so they are jittered away. A batch of 32 and some hundred steps are
far from the paper's regime: batch norm in the head with fixed prototypes and a sharp teacher keep so young a run from
the uniform collapse. At a width of 64, linear layers of the official deviation 0.02 shrink what they are given to a
sixth, so that such a network hardly sees its input and learns little: `model.init_std` is what mattered most for k-NN.
For the attention to cover objects, patches hold a whole period of most textures, and strong weight decay keeps queries
and keys small: without it each head looks at one or two patches. Cost and result: docs/benchmarks.md.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "scenes:train?size=4800&image_size=96"
    config.epochs = 10
    config.batch_size = 32
    config.model.name = "vit_tiny"
    config.model.patch_size = 16
    config.model.embed_dim = 64
    config.model.depth = 2
    config.model.heads = 4
    config.model.init_std = 0.15
    config.model.drop_path = 0.0
    config.head.out_dim = 1024
    config.head.hidden_dim = 256
    config.head.bottleneck_dim = 64
    config.head.use_bn = True
    config.crops.global_size = (80, 80)
    config.crops.global_scale = (0.5, 1.0)
    config.crops.local_size = (48, 48)
    config.crops.local_count = 2
    config.crops.local_scale = (0.2, 0.6)
    config.crops.hue = 0.5
    config.crops.gray_prob = 0.2
    config.crops.jitter_prob = 1.0
    config.crops.blur_prob = (0.1, 0.1, 0.0)
    config.crops.solarize_prob = (0.0, 0.0, 0.0)
    config.optim.warmup_epochs = 1
    config.optim.lr = 4e-3
    config.optim.weight_decay = 5.0
    config.optim.weight_decay_end = 5.0
    config.optim.freeze_last_layer = config.epochs
    config.teacher.momentum = 0.99
    config.teacher.temp = 0.04
    config.teacher.warmup_temp = 0.04
    config.run.checkpoint_every = 2.0
    return config
