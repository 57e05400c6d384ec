"""A convex problem, whose minimum is known, for the methods that AdaBatch builds on.

Softmax regression with a weight decay of 0.01 on scikit-learn's 1,437 handwritten digits of 64 pixels,
or on 4,000 generated examples of 4 classes (4 x 4 x 3 pixels). What is evaluated is the training split,
so that the objective goes to its least value, which ``--mode=analyze`` finds. Variants:
``digits_METHOD`` and ``generated_METHOD``, with METHOD one of

    sgd                  batches of 2
    friedlander_schmidt  SGD whose sample grows to 1.1 B + 1 with every update, from 2; step sizes by the
                         Armijo rule, from 1 on
    norm_test            SGD whose batch grows by the norm test (Byrd et al.), from 2; step sizes by the
                         rule of Barzilai and Borwein
    svrg                 batches of 2, snapshots of all the data every two passes
    svrg_growing         the same with snapshots that double from 64 on
    svrg_mixed           that, and examples outside of the snapshot's batch without correction
    saga                 batches of 2, memory of all the data
    dynasaga             the same on a sample that grows from twice the number of pixels on

With batches of 2 the learning rate is 1 / 50, about 1 / L with L = max |x|^2 / 2; a batch that grows has
less noise and so needs longer steps to gain anything, which are searched for.

    python -m adabatch_jax.main --config=configs/convex.py:VARIANT --workdir=runs/convex/VARIANT
    python -m adabatch_jax.main --mode=analyze --checkpoint=latest --workdir=runs/convex/VARIANT
    python -m adabatch_jax.report runs/convex/digits_*

Expected: SGD with its constant rate stays about 0.01 above the least value; SVRG, SAGA and DynaSAGA come
within 1e-7 of it, which is as far as float32 can tell, in 30 (SAGA) to 100 passes over the data.
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

VARIANTS = [f'{problem}_{method}' for problem in ('digits', 'generated') for method in METHODS]


def get_config(variant='digits_sgd'):
    if variant not in VARIANTS:
        raise ValueError(f'variant: got {variant!r}; accepted: {", ".join(VARIANTS)}')
    problem, _, method = variant.partition('_')
    config = default_config()
    config.num_epochs = 40.0
    config.eval_every_epochs = 0.5
    config.checkpoint_every_epochs = 20.0
    config.log_every_steps = 1000
    config.model.name = 'linear'
    config.dataset.name = {'digits': 'digits', 'generated': 'synthetic'}[problem]
    config.dataset.pipeline = 'device'
    config.dataset.augment = 'none'
    config.dataset.eval_split = 'train'
    config.dataset.eval_batch_size = 4000
    if problem == 'generated':
        config.dataset.update(dict(num_examples=4000, num_classes=4, image_size=4))
    config.batch.policy = method if method in ('friedlander_schmidt', 'norm_test') else 'fixed'
    config.batch.base_size = 2
    config.optimizer.momentum = 0.0
    config.optimizer.weight_decay = 0.01
    config.learning_rate.schedule = 'constant'
    config.learning_rate.coupling = 'none'
    config.learning_rate.effective = 1 / 50
    config.compile.updates_per_dispatch = 32
    if method == 'friedlander_schmidt':
        config.learning_rate.update(dict(rule='armijo', effective=1.0))
    if method == 'norm_test':
        config.learning_rate.rule = 'barzilai_borwein'
    if method.startswith('svrg'):
        config.optimizer.name = 'svrg'
        config.optimizer.svrg.snapshot_passes = 2.0
        config.optimizer.svrg.first_size = 0 if method == 'svrg' else 64
        config.optimizer.svrg.mixed = method == 'svrg_mixed'
    if method.endswith('saga'):
        config.optimizer.name = method
    return config
