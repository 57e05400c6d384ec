"""AdaBatch on photographs within small means: ResNet-18 on a Tiny ImageNet of 64x64 pixels.

The path of imagenet_adabatch.py at the scale of a small machine: encoded images, random crops and flips,
and a batch that doubles every epoch from 64 to 1024 while the effective learning rate falls to 0.375:
the learning rate falls to 0.75 of itself a stage. Random crops keep a quarter of the area or more, since
an image of 64 pixels has less to spare than one of ImageNet.

    python -m adabatch_jax.main --config=configs/tiny_imagenet_resnet18.py --workdir=runs/tiny \\
      --config.dataset.data_dir=DIR

and the matched control, with a fixed batch of 64:

    python -m adabatch_jax.main --config=configs/tiny_imagenet_resnet18.py --workdir=runs/tiny_control \\
      --config.dataset.data_dir=DIR --config.batch.policy=fixed

DIR holds tiny_imagenet/VERSION/, a TFDS folder with the splits train and validation. Their sizes and the
number of classes are read from it, so a plan needs it too.

Expected of 30,000 training images: 906 updates against 2,340 of the control. This experiment is not from
a paper: compare the two runs with each other.
"""

from adabatch_jax.config import default_config


def get_config():
    config = default_config()
    config.num_epochs = 5.0
    config.log_every_steps = 20
    config.model.name = 'resnet18'
    config.dataset.name = 'tiny_imagenet'
    config.dataset.eval_split = 'validation'
    config.dataset.image_size = 64
    config.dataset.eval_resize = 64  # the whole image
    config.dataset.augment = 'random_resized_crop'
    config.dataset.min_crop_area = 0.25
    config.dataset.remainder = 'drop'
    config.batch.policy = 'adabatch'
    config.batch.base_size = 64
    config.batch.growth_factor = 2.0
    config.batch.growth_epochs = 1.0
    config.batch.max_size = 1024
    config.learning_rate.effective = 0.05
    config.learning_rate.schedule = 'step'
    config.learning_rate.decay_factor = 0.375
    config.learning_rate.reference_batch_size = 64
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    return config
