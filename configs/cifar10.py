"""ViT-T/4 on CIFAR-10 at 32 x 32: a class-folder tree or arrays, k-NN on the test split as it trains.

    dino-jax train --config=cifar10 --workdir=runs/cifar10 \\
        --config.data.train=DIR/cifar10_train.npz --config.eval.knn_train=DIR/cifar10_train.npz \\
        --config.eval.knn_test=DIR/cifar10_test.npz

Images of 32 pixels hold little for a crop of 5% of their area, and blur of two pixels erases them: hence larger local
crops and less blur. Small batch: slower teacher and fewer prototypes. Cost and result: docs/benchmarks.md.
"""

from dino_jax.config import default


def get_config():
    config = default()
    config.data.train = "data/cifar10/train"
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.epochs = 200
    config.batch_size = 256
    config.model.name = "vit_tiny"
    config.model.patch_size = 4
    config.head.out_dim = 4096
    config.crops.global_size = (32, 32)
    config.crops.local_size = (16, 16)
    config.crops.local_count = 6
    config.crops.local_scale = (0.1, 0.4)
    config.crops.blur_prob = (0.5, 0.1, 0.2)
    config.crops.blur_radius = (0.1, 1.0)
    config.optim.lr = 1e-3
    config.teacher.momentum = 0.9995
    config.eval.knn_every = 10
    config.eval.knn_train = "data/cifar10/train"
    config.eval.knn_test = "data/cifar10/test"
    config.eval.resize = 0
    config.eval.crop = 32
    return config
