"""Increase the batch instead of decaying the learning rate: Wide ResNet-16-4 on CIFAR-10.

Smith, Kindermans, Ying and Le, "Don't Decay the Learning Rate, Increase the Batch Size", ICLR 2018,
arXiv:1711.00489. 200 epochs in which the ratio of learning rate to batch size falls to a fifth at epochs
60, 120 and 160: the schedule of Wide ResNets (Zagoruyko and Komodakis, 2016). It can fall by either.

    python -m adabatch_jax.main --config=configs/smith_wrn16_4.py:VARIANT --workdir=runs/VARIANT

VARIANT   decay     batch 128, the learning rate falls to a fifth each time
          hybrid    the batch grows once to 640, then the learning rate falls
          increase  the batch grows to 640 and 3200, then the learning rate falls once

Expected: 78,125, 34,376 and 29,376 updates, and by the paper's account the same learning curves over
epochs. The effective learning rate is the same in all three, so decay is the control of the other two.

BatchNorm takes its statistics over groups of 128 examples in every stage, so that growth does not change
what is trained. That asks for 128 examples or more on a device: on several devices lower the group, for
two of them --config.model.batch_norm=ghost:64.

Could not be verified against the paper: the group of 128, the padding of the crops, and where the batch
stops growing; with --config.batch.max_size=16000 the last decay is a growth too (28,876 updates).
Learning rate 0.1, batch 128, weight decay 5e-4 and the epochs are those of public Wide ResNet code. That
code has Nesterov momentum; the paper's abstract has the rule hold for both, and this file takes plain
momentum 0.9 (--config.optimizer.nesterov=True for the other).
"""

from adabatch_jax.config import default_config

MAX_SIZES = {'decay': 128, 'hybrid': 640, 'increase': 3200}  # ceilings of the batch
VARIANTS = list(MAX_SIZES)


def get_config(variant='increase'):
    if variant not in VARIANTS:
        raise ValueError(f'variant: got {variant!r}; accepted: {", ".join(VARIANTS)}')
    config = default_config()
    config.num_epochs = 200.0
    config.model.name = 'wrn16_4'
    config.model.batch_norm = 'ghost:128'
    config.dataset.name = 'cifar10'
    config.dataset.augment = 'pad_crop_flip'
    config.dataset.crop_padding = 4
    config.batch.policy = 'fixed' if variant == 'decay' else 'increase_dont_decay'
    config.batch.base_size = 128
    config.batch.max_size = MAX_SIZES[variant]
    config.learning_rate.effective = 0.1
    config.learning_rate.schedule = 'step'
    config.learning_rate.decay_factor = 0.2
    config.learning_rate.decay_at_epochs = (60, 120, 160)
    config.learning_rate.reference_batch_size = 128
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    return config
