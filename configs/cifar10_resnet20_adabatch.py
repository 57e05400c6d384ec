"""AdaBatch's single-device protocol: ResNet-20 on CIFAR-10, batch 128 doubling to 2048.

Devarakonda, Naumov and Garland, "AdaBatch: Adaptive Batch Sizes for Training Deep Neural Networks",
2017: 100 epochs of SGD with momentum 0.9 and weight decay 5e-4 on all parameters, random crops of
images padded by 4 pixels, random flips, partial batches dropped. The batch doubles every 20 epochs. The
effective learning rate falls to 0.375 at the same epochs, so the learning rate falls to 0.75 of itself a
stage.

    python -m adabatch_jax.main --config=configs/cifar10_resnet20_adabatch.py --workdir=runs/adabatch

15,080 updates; the fixed control takes 39,000 (--config.batch.policy=fixed). The paper reports a test
error within 1 % of the small fixed batch's. For a shorter run set num_epochs and batch.growth_epochs;
the decay of the learning rate follows the growth.
"""

from adabatch_jax.config import default_config


def get_config():
    config = default_config()
    config.num_epochs = 100.0
    config.model.name = 'resnet20'
    config.dataset.name = 'cifar10'
    config.dataset.augment = 'pad_crop_flip'
    config.dataset.crop_padding = 4
    config.dataset.remainder = 'drop'
    config.batch.policy = 'adabatch'
    config.batch.base_size = 128
    config.batch.growth_factor = 2.0
    config.batch.growth_epochs = 20.0
    config.batch.max_size = 2048
    config.learning_rate.effective = 0.01
    config.learning_rate.schedule = 'step'
    config.learning_rate.decay_factor = 0.375
    config.learning_rate.reference_batch_size = 128
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    return config
