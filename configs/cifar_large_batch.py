"""AdaBatch's large-batch experiment on several GPUs: CIFAR-100, batch 1024 doubling to 16384.

Devarakonda, Naumov and Garland, "AdaBatch: Adaptive Batch Sizes for Training Deep Neural Networks",
2017, arXiv:1712.02029, section 4.2. Protocol: 100 epochs of SGD with momentum 0.9 and weight decay 5e-4
on all parameters; learning rate 0.1 for the baseline of batch 128 and in proportion for larger batches,
which warm up over 5 epochs from the baseline's; every 20 epochs the effective learning rate falls to
0.25, so where the batch doubles the learning rate halves. Images as in cifar_adabatch.py.

    python -m adabatch_jax.main --config=configs/cifar_large_batch.py:VARIANT --workdir=runs/VARIANT

VARIANT is NETWORK_KIND of

    NETWORK   vgg19_bn, resnet20
    KIND      adaptive  the batch doubles every 20 epochs from 1024 to 16384
              fixed     1024: the matched control, as adaptive with --config.batch.policy=fixed
              large     16384, with a learning rate that warms up to 12.8
              baseline  128, without warm-up

--config.dataset.name=cifar10 trains on the smaller label set.

Expected: 1,860 updates of adaptive against 4,800 of fixed, 300 of large and 39,000 of baseline. The
paper's abstract reports runs up to 6.25 times as fast on four GPUs, with accuracies less than 1 % from
those of fixed batches.

Could not be verified against the paper itself: first learning rate, warm-up and decay, which come from a
replication by others that cites that section, and which networks were trained with which of these
batches. BatchNorm takes its statistics over a device's microbatch, as the official code does; for groups
of 64 examples instead, in every stage and on any machine, set --config.model.batch_norm=ghost:64.
"""

from adabatch_jax.config import default_config

BATCHES = {'adaptive': 1024, 'fixed': 1024, 'large': 16384, 'baseline': 128}  # in the first epoch
VARIANTS = [f'{network}_{kind}' for network in ('vgg19_bn', 'resnet20') for kind in BATCHES]


def get_config(variant='resnet20_adaptive'):
    if variant not in VARIANTS:
        raise ValueError(f'variant: got {variant!r}; accepted: {", ".join(VARIANTS)}')
    network, _, kind = variant.rpartition('_')

    config = default_config()
    config.num_epochs = 100.0
    config.log_every_steps = 10
    config.model.name = network
    config.dataset.name = 'cifar100'
    config.dataset.augment = 'pad_crop_flip'
    config.dataset.crop_padding = 4
    config.dataset.remainder = 'drop'
    config.batch.policy = 'adabatch' if kind == 'adaptive' else 'fixed'
    config.batch.base_size = BATCHES[kind]
    config.batch.growth_factor = 2.0
    config.batch.growth_epochs = 20.0
    config.batch.max_size = 16384
    config.learning_rate.effective = 0.1
    config.learning_rate.schedule = 'step'
    config.learning_rate.decay_factor = 0.25
    config.learning_rate.reference_batch_size = 128
    if kind != 'baseline':
        config.learning_rate.warmup_epochs = 5.0
        config.learning_rate.warmup_initial = 128 / BATCHES[kind]  # the baseline's learning rate
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    return config
