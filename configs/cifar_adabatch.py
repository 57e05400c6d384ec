"""AdaBatch's single-device experiments: three networks on CIFAR-10 and CIFAR-100.

Devarakonda, Naumov and Garland, "AdaBatch: Adaptive Batch Sizes for Training Deep Neural Networks",
2017, arXiv:1712.02029. Protocol: 100 epochs of SGD with momentum 0.9 and weight decay 5e-4 on all
parameters, random crops of images padded by 4 pixels, random flips, CIFAR-10's mean and deviation for
both data sets, partial batches dropped, learning rate 0.01 at first.

    python -m adabatch_jax.main --config=configs/cifar_adabatch.py:VARIANT --workdir=runs/VARIANT

VARIANT is DATASET_NETWORK_KIND, or DATASET_NETWORK_KIND_short, of

    DATASET   cifar10, cifar100
    NETWORK   alexnet, vgg19_bn, resnet20
    KIND      adaptive  the batch doubles every 20 epochs, alexnet's from 256 to 4096, the others' from
                        128 to 2048; the learning rate falls to 0.75 each time
              small     fixed at the first of these sizes; the learning rate falls to 0.375: the matched
                        control, the same as adaptive with --config.batch.policy=fixed
              large     fixed at the last of these sizes, from the same learning rate 0.01, as the paper
                        starts all of its single-device runs; for a rate that is scaled up linearly add
                        --config.learning_rate.reference_batch_size=256 (alexnet) or 128
    short     10 epochs with a growth every 2 and a learning rate of 0.05: for two CPU cores

Expected of the full protocol: 15,080 updates against 39,000 of small (alexnet: 7,520 against 19,500).
The paper reports a change of accuracy under 1 % against small fixed batches. A replication by others
(github.com/AIforMS/AdaBatch-numerical-experiments) found large far behind both.
"""

from adabatch_jax.config import default_config

NETWORKS = {  # model.name and the smallest batch
    'alexnet': ('alexnet_cifar', 256),
    'vgg19_bn': ('vgg19_bn', 128),
    'resnet20': ('resnet20', 128),
}
VARIANTS = [
    f'{dataset}_{network}_{kind}{length}'
    for dataset in ('cifar10', 'cifar100')
    for network in NETWORKS
    for kind in ('small', 'large', 'adaptive')
    for length in ('', '_short')
]


def get_config(variant='cifar10_resnet20_adaptive'):
    if variant not in VARIANTS:
        raise ValueError(f'variant: got {variant!r}; accepted: {", ".join(VARIANTS)}')
    dataset, _, rest = variant.removesuffix('_short').partition('_')
    network, _, kind = rest.rpartition('_')
    model, base_size = NETWORKS[network]

    config = default_config()
    config.num_epochs = 100.0
    config.model.name = model
    config.dataset.name = dataset
    config.dataset.augment = 'pad_crop_flip'
    config.dataset.crop_padding = 4
    config.dataset.remainder = 'drop'
    config.batch.policy = 'adabatch' if kind == 'adaptive' else 'fixed'
    config.batch.base_size = 16 * base_size if kind == 'large' else base_size
    config.batch.growth_factor = 2.0
    config.batch.growth_epochs = 20.0
    config.batch.max_size = 16 * base_size
    config.learning_rate.effective = 0.01
    config.learning_rate.schedule = 'step'
    config.learning_rate.decay_factor = 0.375
    config.learning_rate.reference_batch_size = config.batch.base_size
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    if variant.endswith('_short'):
        config.num_epochs = 10.0
        config.batch.growth_epochs = 2.0
        config.learning_rate.effective = 0.05
        config.log_every_steps = 10
    return config
