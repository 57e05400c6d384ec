"""ResNet-50 on ImageNet with batch 32,768 and LARS, a learning rate for each layer.

You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, arXiv:1708.03888. Each
kernel's learning rate is scaled by the ratio of the norms of its weights and gradient (trust coefficient
0.001); biases and BatchNorm parameters have the plain learning rate and no weight decay. Momentum 0.9,
polynomial decay of power 2 after warm-up.

    python -m adabatch_jax.main --config=configs/lars_resnet50.py --workdir=runs/lars \\
      --config.dataset.data_dir=DIR

DIR holds imagenet2012/, as "tfds build imagenet2012" leaves it. A batch that does not fit into memory is
split by itself (batch.max_per_device=0).

Expected: 3,910 updates. No accuracy is given here, since none could be checked against the paper.

Could not be verified against the paper: learning rate, warm-up, number of epochs and weight decay. Those
here are what an author's public solver has for AlexNet with BatchNorm at this batch (borisgin/nvcaffe on
GitHub, models/alexnet_bn/solver_32k.prototxt): 32 after a warm-up of 10 epochs from 1, 100 epochs, 5e-4.
The same author's ResNet-50 solver for batch 1024 (models/resnet50/solver_lars.prototxt) has 9 after 8
epochs from 1, and a weight decay of 1e-4. So the learning rate grows more slowly there than the batch:
for another batch size set learning_rate.effective, and reference_batch_size to that batch.
"""

from adabatch_jax.config import default_config


def get_config():
    config = default_config()
    config.num_epochs = 100.0
    config.log_every_steps = 10
    config.model.name = 'resnet50'
    config.dataset.name = 'imagenet2012'
    config.dataset.eval_split = 'validation'
    config.dataset.augment = 'random_resized_crop'
    config.batch.policy = 'fixed'
    config.batch.base_size = 32_768
    config.learning_rate.effective = 32.0
    config.learning_rate.schedule = 'polynomial'
    config.learning_rate.power = 2.0
    config.learning_rate.warmup_epochs = 10.0
    config.learning_rate.warmup_initial = 1 / 32
    config.learning_rate.reference_batch_size = 32_768
    config.optimizer.name = 'lars'
    config.optimizer.trust_coefficient = 0.001
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    return config
