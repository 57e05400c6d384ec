"""A convex problem, whose minimum is known, for the methods that AdaBatch builds on.

Softmax regression with weight decay 1 / N on scikit-learn's 1,437 handwritten digits of 64 pixels, or on
2,048 generated examples of two classes (8 x 8 x 3 pixels). What is evaluated is the training split, so that
the objective goes to its least value, which ``--mode=analyze`` finds. Variants ``PROBLEM_METHOD``, with
PROBLEM ``digits`` or ``generated`` and METHOD one of

    sgd                  batches of 16, constant learning rate
    friedlander_schmidt  SGD whose sample grows by 1.1 B + 1 with every update
    norm_test            SGD whose batch grows by the norm test (Byrd et al.)
    svrg                 batches of 16, snapshots of all the data every two epochs
    svrg_growing         the same with snapshots that double from 64 on
    svrg_mixed           that, and examples outside of the snapshot's batch without correction
    saga                 batches of 1, memory of all the data
    dynasaga             the same on a sample that grows from 2 d on

    python -m adabatch_jax.main --config=configs/convex.py:digits_svrg --workdir=runs/convex/digits_svrg
    python -m adabatch_jax.main --mode=analyze --workdir=runs/convex/digits_svrg
    python -m adabatch_jax.report runs/convex/digits_*

The learning rates are multiples of 1 / (L + 1), L = max |x|^2 / 2 + 1 / N: 0.3 for batches of 1
(Daneshmand et al., 2016), 1 for those of 16 and for what grows from there.
"""

from adabatch_jax.config import default_config

METHODS = (
    'sgd',
    'friedlander_schmidt',
    'norm_test',
    'svrg',
    'svrg_growing',
    'svrg_mixed',
    'saga',
    'dynasaga',
)


def get_config(variant='digits_sgd'):
    problem, _, method = variant.partition('_')
    if problem not in ('digits', 'generated') or method not in METHODS:
        raise ValueError(
            f'variant: got {variant!r}; accepted: digits_ or generated_, and one of {", ".join(METHODS)}'
        )
    config = default_config()
    config.num_epochs = 40.0
    config.eval_every_epochs = 0.5
    config.checkpoint_every_epochs = 20.0
    config.log_every_steps = 1000
    config.model.name = 'linear'
    config.dataset.pipeline = 'device'
    config.dataset.augment = 'none'
    config.dataset.eval_split = 'train'
    config.dataset.eval_batch_size = 2048
    if problem == 'digits':
        config.dataset.name, num_examples, smoothness = 'digits', 1437, 45.0
    else:
        config.dataset.name, num_examples, smoothness = 'synthetic', 2048, 150.0
        config.dataset.image_size, config.dataset.num_classes = 8, 2
        config.dataset.num_examples = num_examples
    config.optimizer.momentum = 0.0
    config.optimizer.weight_decay = 1 / num_examples
    config.learning_rate.schedule = 'constant'
    config.learning_rate.coupling = 'none'
    config.learning_rate.effective = 1 / (smoothness + 1)
    config.batch.policy = 'fixed'
    config.batch.base_size = 16
    if method in ('friedlander_schmidt', 'norm_test'):
        config.batch.policy = method
    if method.startswith('svrg'):
        config.optimizer.name = 'svrg'
        config.optimizer.svrg.snapshot_epochs = 2.0
        config.optimizer.svrg.first_size = 0 if method == 'svrg' else 64
        config.optimizer.svrg.mixed = method == 'svrg_mixed'
    if method in ('saga', 'dynasaga'):
        config.optimizer.name = method
        config.batch.base_size = 1
        config.learning_rate.effective = 0.3 / (smoothness + 1)
        config.compile.updates_per_dispatch = 64
    return config
