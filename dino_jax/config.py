"""Every configuration key, with its default, meaning and source.

`default()` is the paper's vanilla ViT-S/16 run. A file in `configs/` is a short delta on it:

    from dino_jax.config import default

    def get_config():
        config = default()
        config.epochs = 300
        return config

Groups: `model head crops data optim teacher loss eval run`. `run.*` never changes the mathematics (mesh, workers,
logging, checkpoints, profiling), so it may differ when a run resumes; any other difference is an error.

Sources: the paper (arXiv 2104.14294) and the command-line defaults of the official `main_dino.py`.
"""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default() -> ConfigDict:
    """The defaults of the official code, as a locked `ConfigDict` with every key the package reads."""
    config = ConfigDict()
    config.seed = 0  # every random draw is a function of this and a position
    config.epochs = 100  # an epoch is N // batch_size steps
    config.batch_size = 1024  # images per step, over all devices
    config.init_from = placeholder(str)  # start from these weights (a checkpoint or weight file); null: from scratch

    config.model = _model()
    config.head = _head()
    config.crops = _crops()
    config.data = _data()
    config.optim = _optim()
    config.teacher = _teacher()
    config.loss = _loss()
    config.eval = _eval()
    config.run = _run()
    return config.lock()


def _model() -> ConfigDict:
    model = ConfigDict()
    model.name = "vit_small"  # a key of dino_jax.models.BACKBONES
    model.patch_size = 16  # pixels; must divide both crop sizes (ViT and XCiT)
    model.in_chans = 3  # channels of the input pictures
    model.embed_dim = placeholder(int)  # width; null: the named model's own (likewise the next two; ViT and XCiT)
    model.depth = placeholder(int)  # blocks
    model.heads = placeholder(int)  # attention heads; must divide the width
    model.init_std = placeholder(float)  # of the blocks' linear layers; null: 0.02, too little for a narrow ViT (ViT)
    model.small_stem = False  # ResNet: begin with a 3 x 3 convolution and no pooling, for pictures of 32 pixels or so
    model.drop_path = 0.1  # stochastic depth rate of the last block, student only; linear from 0 at the first
    model.dtype = "float32"  # compute type: float32, bfloat16 (parameters, norms, softmax and loss stay float32)
    model.precision = "default"  # matmul precision: default, high, highest (TPU: bf16 passes; NVIDIA: TF32)
    return model


def _head() -> ConfigDict:
    head = ConfigDict()
    head.out_dim = 65536  # K, the number of prototypes
    head.hidden_dim = 2048
    head.bottleneck_dim = 256
    head.layers = 3  # linear layers of the MLP before the prototypes
    head.use_bn = False  # batch norm after each hidden linear layer
    head.norm_last_layer = True  # the gain of the weight-normed last layer is fixed at 1; False: trained
    return head


def _crops() -> ConfigDict:
    crops = ConfigDict()
    crops.global_size = (224, 224)  # height, width in pixels; a bare integer is accepted on the command line
    crops.local_size = (96, 96)
    crops.local_count = 8  # local crops per image; there are always 2 global ones
    crops.global_scale = (0.4, 1.0)  # share of the image's area
    crops.local_scale = (0.05, 0.4)
    crops.ratio = (3 / 4, 4 / 3)  # aspect ratio (width / height), log-uniform
    crops.flip_prob = 0.5
    crops.jitter_prob = 0.8  # colour jitter as a whole, its four operations in random order
    crops.brightness = 0.4  # factor uniform in 1 +- this
    crops.contrast = 0.4
    crops.saturation = 0.2
    crops.hue = 0.1  # shift uniform in +- this, in turns
    crops.gray_prob = 0.2
    crops.blur_prob = (1.0, 0.1, 0.5)  # first global, second global, local
    crops.blur_radius = (0.1, 2.0)  # PIL GaussianBlur radius in pixels
    crops.solarize_prob = (0.0, 0.2, 0.0)  # first global, second global, local
    crops.solarize_threshold = 128  # of 255
    return crops


def _data() -> ConfigDict:
    data = ConfigDict()
    data.train = "scenes:train?size=20000"  # a source, e.g. /data/imagenet/train, tfds:imagenet2012:train
    data.mean = (0.485, 0.456, 0.406)  # per channel, of pixel values in 0..1 (ImageNet)
    data.std = (0.229, 0.224, 0.225)
    data.render = "host"  # host: PIL, the oracle; device: crops are rendered on the accelerator
    data.canvas = 512  # device rendering: pictures whose longer side exceeds this are shrunk to it first
    data.max_bad_share = 0.01  # more unreadable pictures than this share of the data set is an error
    return data


def _optim() -> ConfigDict:
    optim = ConfigDict()
    optim.name = "adamw"  # adamw, sgd, lars
    optim.lr = 5e-4  # for 256 images; scaled by batch_size / 256
    optim.min_lr = 1e-6  # end of the cosine, not scaled
    optim.warmup_epochs = 10  # linear from 0
    optim.weight_decay = 0.04  # start of a cosine ...
    optim.weight_decay_end = 0.4  # ... to this
    optim.clip_grad = 3.0  # largest norm of each tensor's gradient; 0: off
    optim.freeze_last_layer = 1  # epochs during which the prototypes are not updated
    optim.momentum = 0.9  # sgd, lars
    optim.b1 = 0.9  # adamw
    optim.b2 = 0.999
    optim.eps = 1e-8
    return optim


def _teacher() -> ConfigDict:
    teacher = ConfigDict()
    teacher.momentum = 0.996  # start of a cosine ... (0.9995 suggested for a batch of 256)
    teacher.momentum_end = 1.0  # ... to this
    teacher.temp = 0.04  # after the warm-up
    teacher.warmup_temp = 0.04  # at the first epoch; linear to `temp`
    teacher.warmup_temp_epochs = 0
    return teacher


def _loss() -> ConfigDict:
    loss = ConfigDict()
    loss.student_temp = 0.1
    loss.center_momentum = 0.9
    return loss


def _eval() -> ConfigDict:
    evaluation = ConfigDict()
    evaluation.knn_every = 0  # epochs between online k-NN evaluations of the teacher; 0: never
    evaluation.knn_train = placeholder(str)  # labelled source of the neighbours
    evaluation.knn_test = placeholder(str)  # labelled source of the queries
    evaluation.knn_k = 20
    evaluation.knn_temperature = 0.07
    evaluation.voc_every = 0  # epochs between attention Jaccards of the teacher; 0: never
    evaluation.voc_data = placeholder(str)  # pictures with masks: a VOC folder, scenes:..., or images/ and masks/
    evaluation.voc_size = 480  # side of the square that they are squeezed to
    evaluation.resize = 256  # for k-NN: shorter side before the centre crop, bicubic; 0: no resize
    evaluation.crop = 224
    evaluation.batch_size = 256
    return evaluation


def _run() -> ConfigDict:
    run = ConfigDict()
    run.mesh = ConfigDict({"data": -1, "fsdp": 1, "model": 1})  # devices per axis; -1: all that remain
    run.accum_steps = 1  # microbatches per step
    run.remat = "none"  # none, blocks: recompute each block's activations in the backward pass
    run.attention = "auto"  # plain, fused: by cuDNN (NVIDIA, bfloat16), auto: fused where that can be (ViT)
    run.workers = 0  # grain worker processes; 0: threads of this process
    run.threads = 2  # reading threads in each process
    run.prefetch = 2  # batches on the device ahead of the step
    run.log_every = 10  # steps
    run.checkpoint_every = 1.0  # epochs; fractions are allowed
    run.keep = 2  # latest checkpoints kept
    run.keep_every = 20  # epochs; these are kept for good; 0: none
    run.async_checkpoint = True
    run.stall_timeout = 600.0  # of several processes: seconds one may wait for input before all stop; 0: endless
    run.profile_steps = (0, 0)  # first and last step of an xprof trace; equal: none
    run.tensorboard = True
    run.wandb = ""  # Weights & Biases project; empty: off
    run.progress = True  # progress bar with an ETA on stderr
    run.max_bad_steps = 3  # non-finite losses in a row before a rewind to the last good checkpoint
    run.max_rewinds = 2  # rewinds before the run stops with a reason
    run.stop_after = 0  # stop cleanly after this many steps of this session; 0: at the end (tests, time slots)
    return run
