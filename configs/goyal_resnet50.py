"""ResNet-50 on ImageNet with one large batch: the linear scaling rule and gradual warm-up.

Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, arXiv:1706.02677. The
learning rate is 0.1 for each 256 examples of a batch. The large batch begins with 0.1 and warms up to
its own 3.2 over 5 epochs; the schedule, a tenth at epochs 30, 60 and 80 of 90, is the baseline's.

    python -m adabatch_jax.main --config=configs/goyal_resnet50.py:VARIANT --workdir=runs/VARIANT \\
      --config.dataset.data_dir=DIR

VARIANT   baseline  batch 256
          large     batch 8192

DIR holds imagenet2012/, as "tfds build imagenet2012" leaves it.

Expected: 450,411 updates of baseline and 14,076 of large, and the same accuracy from both, as the
paper's abstract reports for batches up to 8192.

BatchNorm takes its statistics over 32 examples in both, since a worker's share stays the same in the
paper: a device needs a multiple of 32. The rest of the recipe: Nesterov momentum 0.9, weight decay 1e-4
on kernels only, the last BatchNorm scale of a residual block zero at first. The learning rate is outside
the momentum buffer, so that it can change without a correction.

Could not be verified against the paper: the group of 32, the epochs of the decays, Nesterov momentum,
value and scope of the weight decay, and the zero scale. The last layer starts with PyTorch's default,
which may not be the paper's.
"""

from adabatch_jax.config import default_config

BATCHES = {'baseline': 256, 'large': 8192}
VARIANTS = list(BATCHES)


def get_config(variant='large'):
    if variant not in VARIANTS:
        raise ValueError(f'variant: got {variant!r}; accepted: {", ".join(VARIANTS)}')
    config = default_config()
    config.num_epochs = 90.0
    config.model.name = 'resnet50'
    config.model.batch_norm = 'ghost:32'
    config.model.zero_init_residual = True
    config.dataset.name = 'imagenet2012'
    config.dataset.eval_split = 'validation'
    config.dataset.augment = 'random_resized_crop'
    config.batch.policy = 'fixed'
    config.batch.base_size = BATCHES[variant]
    config.learning_rate.effective = 0.1
    config.learning_rate.schedule = 'step'
    config.learning_rate.decay_factor = 0.1
    config.learning_rate.decay_at_epochs = (30, 60, 80)
    config.learning_rate.reference_batch_size = 256
    if variant == 'large':
        config.learning_rate.warmup_epochs = 5.0
        config.learning_rate.warmup_initial = 256 / BATCHES[variant]  # the baseline's learning rate
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.decayed = 'kernels'
    return config
