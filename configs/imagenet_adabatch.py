"""AdaBatch's ImageNet experiments: batches that grow from 8192 by 2, 4 or 8, up to 524,288.

Devarakonda, Naumov and Garland, "AdaBatch: Adaptive Batch Sizes for Training Deep Neural Networks",
2017, arXiv:1712.02029. Protocol: 90 epochs of SGD with momentum 0.9 and weight decay 1e-4 on all
parameters. The learning rate is 0.1 for the baseline of batch 256 and in proportion for larger batches,
which warm up over 5 epochs from the baseline's. The effective learning rate falls to a tenth at epochs
30 and 60, where the batch grows. Training images are crops of random size and place, flipped at random;
evaluation takes the centre.

    python -m adabatch_jax.main --config=configs/imagenet_adabatch.py:VARIANT --workdir=runs/VARIANT \\
      --config.dataset.data_dir=DIR

VARIANT is NETWORK_KIND of

    NETWORK   alexnet, alexnet_bn, resnet50
    KIND      small       256, without warm-up
              fixed       8192: the matched control of the adaptive kinds
              adaptive_2  8192 growing by 2: 16,384 and 32,768; the learning rate falls to 0.2
              adaptive_4  8192 growing by 4: 32,768 and 131,072; the learning rate falls to 0.4
              adaptive_8  8192 growing by 8: 65,536 and 524,288; the learning rate falls to 0.8

DIR holds imagenet2012/, as "tfds build imagenet2012" leaves it. Plans need no data: --mode=plan. Batches
that do not fit into memory are split by themselves (batch.max_per_device=0).

Expected: 8,190, 6,120 and 5,310 updates of adaptive_2, adaptive_4 and adaptive_8 against 14,040 of fixed
and 450,360 of small. A partial batch at an epoch's end makes no update, as in the official code
(NVlabs/AdaBatch on GitHub, adabatch_imagenet.py), which for 524,288 is 18 % of the images of an epoch;
--config.dataset.remainder=carry skips none.

Where the official code differs: its fixed runs decay the learning rate one epoch earlier than its
adaptive ones, which change batch and rate at the same epochs as here; its warm-up is a staircase that is
at its end in the fifth epoch; and running BatchNorm statistics move with each microbatch there, while
here they move with each update, by the mean of its microbatches.

Could not be verified against the paper: alexnet's learning rate, which is 0.01 here, since the PyTorch
example that the official script is built on calls 0.1 too high for a network without BatchNorm; the
learning rate's factors 0.4 and 0.8, which follow from the paper's rule; and which networks it trained
with which batches.
"""

from adabatch_jax.config import default_config

KINDS = {  # first batch and growth
    'small': (256, None),
    'fixed': (8192, None),
    'adaptive_2': (8192, 2.0),
    'adaptive_4': (8192, 4.0),
    'adaptive_8': (8192, 8.0),
}
VARIANTS = [f'{network}_{kind}' for network in ('alexnet', 'alexnet_bn', 'resnet50') for kind in KINDS]


def get_config(variant='resnet50_adaptive_2'):
    if variant not in VARIANTS:
        raise ValueError(f'variant: got {variant!r}; accepted: {", ".join(VARIANTS)}')
    kind = next(kind for kind in KINDS if variant.endswith(f'_{kind}'))
    network = variant.removesuffix(f'_{kind}')
    base_size, growth = KINDS[kind]

    config = default_config()
    config.num_epochs = 90.0
    config.model.name = network
    config.dataset.name = 'imagenet2012'
    config.dataset.eval_split = 'validation'
    config.dataset.augment = 'random_resized_crop'
    config.dataset.remainder = 'drop'
    config.batch.policy = 'adabatch' if growth else 'fixed'
    config.batch.base_size = base_size
    config.batch.growth_factor = growth or 2.0  # fixed does not grow
    config.batch.growth_epochs = 30.0
    config.learning_rate.effective = 0.01 if network == 'alexnet' else 0.1
    config.learning_rate.schedule = 'step'
    config.learning_rate.decay_factor = 0.1
    config.learning_rate.reference_batch_size = 256
    if kind != 'small':
        config.learning_rate.warmup_epochs = 5.0
        config.learning_rate.warmup_initial = 256 / base_size  # the baseline's learning rate
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    return config
