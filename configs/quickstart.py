"""A small ViT on the generated `scenes`, trained in minutes on a laptop's CPU by `launch/quickstart.sh`.

Why it differs from the paper's runs (cost and result: docs/benchmarks.md):

- Colors say nothing about the classes of `scenes`, so strong jitter removes them.
- So short a run with a batch of 32 collapses to uniform outputs unless the head has batch norm, the prototypes stay
  fixed and the teacher is sharp.
- At a width of 64, linear layers with the official deviation of 0.02 shrink their input to a sixth, and the network
  learns little. `model.init_std` mattered most for k-NN.
- For the attention to cover objects, a patch holds a whole period of most textures, and strong weight decay keeps
  queries and keys small. Without it each head looks at one or two patches.
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
