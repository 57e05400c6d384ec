"""A short run whose BatchNorm does not depend on the number of devices, to be moved to others.

Its data live on the device, so that no process has to import TensorFlow.
"""

from adabatch_jax.config import default_config


def get_config():
    config = default_config()
    config.num_epochs = 2.0
    config.log_every_steps = 4
    config.checkpoint_every_epochs = 0.5
    config.model.update(dict(name='cnn', batch_norm='ghost:2'))
    config.dataset.update(dict(name='synthetic', num_examples=128, image_size=8, crop_padding=2))
    config.dataset.pipeline = 'device'
    config.batch.update(dict(base_size=8, growth_epochs=1.0))
    config.learning_rate.update(dict(effective=0.01, reference_batch_size=8))
    return config
