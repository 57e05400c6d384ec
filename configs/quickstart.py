"""Quickstart: a small ResNet on scikit-learn's handwritten digits, in half a minute on two cores.

1,437 training and 360 test images of 8x8 pixels that ship with scikit-learn: no download. The batch
doubles every 8 epochs, 16 to 128, while the effective learning rate falls to 0.375 each time: the
learning rate falls to 0.75 of itself a stage (AdaBatch, section 3). The matched control is the same
command with --config.batch.policy=fixed and another --workdir.

    python -m adabatch_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Expected: about 99 % test accuracy for both.
"""

from adabatch_jax.config import default_config


def get_config():
    config = default_config()
    config.num_epochs = 32.0
    config.checkpoint_every_epochs = 4.0
    config.eval_every_epochs = 2.0
    config.log_every_steps = 20
    config.model.name = 'resnet8'
    config.dataset.name = 'digits'
    config.dataset.pipeline = 'device'  # begins in seconds: TensorFlow is not imported
    config.compile.quick = True  # its stages last no longer than compiling would
    config.dataset.augment = 'pad_crop'
    config.dataset.crop_padding = 1
    config.batch.policy = 'adabatch'
    config.batch.base_size = 16
    config.batch.growth_epochs = 8.0
    config.learning_rate.effective = 0.05
    config.learning_rate.reference_batch_size = 16
    config.optimizer.weight_decay = 5e-4
    return config
