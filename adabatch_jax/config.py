"""Every configuration key with its default and unit, and what is made of configs."""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from adabatch_jax import accepted_values


class ConfigError(ValueError):
    """A user's mistake: one clear line, exit status 2."""


# What bad arguments make the parts raise.
_OF_ARGUMENTS = (ValueError, OSError, OverflowError, MemoryError)


@contextlib.contextmanager
def user_errors(key: str, kinds: tuple[type[Exception], ...] = _OF_ARGUMENTS):
    """Turns what the parts raise about their arguments into a ``ConfigError`` naming ``key``.

    A message that begins with the name of an argument, as in ``max_size: got 3``, continues the key.
    """
    try:
        yield
    except ConfigError:
        raise
    except kinds as error:
        message = str(error) or type(error).__name__
        joint = '.' if re.match(r'\w+(\.\w+)*: ', message) else ': '
        raise ConfigError(f'{key}{joint}{message}') from error


def default_config() -> ml_collections.ConfigDict:
    """All keys. A config file takes this, changes what differs, and returns it."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # root of every random number: initialisation, order, augmentation
    config.num_epochs = 100.0  # epochs
    config.eval_every_epochs = 1.0  # epochs; the end of the run is always evaluated
    config.checkpoint_every_epochs = 1.0  # epochs; the end of the run is always saved
    config.log_every_steps = 50  # updates

    config.model = model = ml_collections.ConfigDict()
    model.name = 'resnet20'  # see adabatch_jax.models
    model.dtype = 'float32'  # of activations: float32 or bfloat16; parameters stay float32
    # Statistics over: local (a device's microbatch), sync (all devices') or ghost:N (N examples).
    model.batch_norm = 'local'
    model.loss = 'cross_entropy'  # cross_entropy, squared or hinge; see adabatch_jax.losses
    model.shortcut = 'projection'  # CIFAR ResNets: projection or identity
    model.zero_init_residual = False  # ImageNet ResNets: the last scale of every block starts at 0

    config.dataset = dataset = ml_collections.ConfigDict()
    dataset.name = 'cifar10'  # digits, synthetic, npz, image_folder, or a TFDS name
    dataset.data_dir = ''  # TFDS folder, or that of npz or image_folder; '': TFDS's default
    dataset.train_split = 'train'  # also slices: train[:20%], train[1000:2000]
    dataset.eval_split = 'test'
    # none; pad_crop or pad_crop_flip (images in memory); random_resized_crop (encoded images; flips too)
    dataset.augment = 'pad_crop_flip'
    dataset.crop_padding = 4  # pixels of zeros on each side before a random crop
    dataset.min_crop_area = 0.08  # smallest part of an image that random_resized_crop takes
    dataset.image_size = 0  # pixels, of encoded images (0: 224) and of synthetic ones (0: 32)
    dataset.eval_resize = 0  # pixels, shorter side before the centre crop; 0: image_size x 256 / 224
    dataset.skip_undecodable = False  # leave out encoded images that cannot be decoded, and count them
    dataset.remainder = 'carry'  # partial batch at an epoch's end: carry or drop
    # Where batches are made: tf_data, on the host; device, inside the compiled step, of data that lives
    # on every device; auto: device for small data on an accelerator, or without TensorFlow.
    dataset.pipeline = 'auto'
    # Examples at once, at most (but for rounding up to the devices); 0: what suits the devices.
    dataset.eval_batch_size = 0
    dataset.num_examples = 1024  # synthetic only: examples a split
    dataset.num_classes = 0  # 0: as many as the data has (synthetic: 10); else it must have as many

    config.batch = batch = ml_collections.ConfigDict()
    batch.policy = 'adabatch'  # see adabatch_jax.policies
    batch.base_size = 128  # examples per update in the first stage
    batch.growth_factor = 2.0  # ratio of one batch size to the one before it
    batch.growth_epochs = 20.0  # epochs between two growths
    batch.max_size = 0  # examples; ceiling of growth, 0: none
    batch.stages = ()  # policy stages: ((start epoch, batch size), ...)
    batch.patience_epochs = 3  # policy plateau: epochs without improvement before growth
    batch.min_improvement = 0.01  # policy plateau: relative fall of the loss that is improvement
    batch.update_growth_factor = 1.1  # policy friedlander_schmidt: growth of the sample per update
    batch.replay = ''  # policy replay: work directory of the run whose batch sizes to use again
    batch.gradient_statistics = False  # measure variance and norm of the gradient with any policy
    batch.max_per_device = 0  # examples; largest microbatch of one device, 0: what its memory holds

    batch.statistics = statistics = ml_collections.ConfigDict()  # policies that decide by statistics
    statistics.min_size = 0  # examples; floor of policies that may shrink, 0: base_size
    # Parts of a batch, over all devices, whose gradients are told apart, at least: more give better
    # estimates, and the same ones on any number of devices that divides them. Of each device policy
    # inner_product tells at most 8 apart, or all where no number from 2 to 8 divides how many there are.
    statistics.min_groups = 2
    # Of the averages, for base_size examples (adascale: for reference_batch_size).
    statistics.decay = 0.99
    statistics.decision_epochs = 0.25  # epochs between two decisions at least
    statistics.hysteresis = 0.1  # relative distance past the boundary of two rungs
    statistics.max_rungs = 1  # of the ladder, in one decision
    statistics.max_switches = 20  # of the batch size in a run; 0: any number
    statistics.min_speedup = 0.0  # in examples per second by the last rung, for growth to go on; 0: any

    batch.cabs = ml_collections.ConfigDict()
    batch.cabs.scale = 1.0  # factor of the batch size
    batch.cabs.reference = False  # averages as in the authors' code, with their bias
    batch.big_batch = ml_collections.ConfigDict()
    batch.big_batch.theta = 1.0  # noise over signal
    batch.big_batch.unbiased = True  # signal without its noise; else the published test
    batch.norm_test = ml_collections.ConfigDict()
    batch.norm_test.theta = 0.5  # noise over norm of the gradient
    batch.inner_product = ml_collections.ConfigDict()
    batch.inner_product.theta = 0.9  # noise along the gradient over its norm
    batch.inner_product.nu = 5.84  # noise orthogonal to the gradient over its norm; 0: no such test
    batch.noise_scale = ml_collections.ConfigDict()
    batch.noise_scale.scale = 1.0  # factor of the batch size
    batch.gradient_diversity = ml_collections.ConfigDict()
    batch.gradient_diversity.delta = 1.0  # factor of the batch size
    batch.critical_batch = ml_collections.ConfigDict()
    batch.critical_batch.every_epochs = 2.0  # epochs between two probes
    batch.critical_batch.probe_epochs = 0.25  # epochs; length of each branch
    batch.critical_batch.tolerance = 0.01  # in units of the loss
    batch.simigrad = ml_collections.ConfigDict()
    batch.simigrad.cosine = 0.5  # of the gradients of two halves of a batch

    config.learning_rate = rate = ml_collections.ConfigDict()
    rate.effective = 0.01  # at the reference batch size
    # schedule: as follows below. armijo, barzilai_borwein: searched for on each batch, from `effective`
    # on, without schedule and coupling.
    rate.rule = 'schedule'
    rate.schedule = 'step'  # constant, step, cosine or polynomial
    rate.decay_factor = 0.375  # step: ratio at each decay
    rate.decay_epochs = 0.0  # step: epochs between two decays; 0: batch.growth_epochs
    rate.decay_at_epochs = ()  # step: the epochs themselves, instead of an interval
    rate.power = 2.0  # polynomial: exponent
    rate.warmup_epochs = 0.0  # epochs of linear warm-up
    rate.warmup_initial = 0.0  # fraction of the rate at which warm-up begins
    # To the batch size: linear, sqrt or none; auto: what the policy goes with. Of no account where step
    # sizes are searched for, and with policy adascale, which has its gain in its place.
    rate.coupling = 'auto'
    rate.reference_batch_size = 128  # examples

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.name = 'sgd'  # see adabatch_jax.optimizers
    optimizer.momentum = 0.9
    optimizer.nesterov = False
    optimizer.weight_decay = 0.0  # coefficient
    optimizer.decayed = 'all'  # parameters: all, or kernels (neither biases nor BatchNorm)
    optimizer.trust_coefficient = 0.001  # LARS
    optimizer.beta1 = 0.9  # Adam, LAMB
    optimizer.beta2 = 0.999  # Adam, LAMB
    optimizer.epsilon = 1e-8  # added to denominators
    optimizer.svrg = svrg = ml_collections.ConfigDict()
    svrg.snapshot_passes = 1.0  # over as many examples as a snapshot has, until the next
    svrg.first_size = 0  # examples of the first, rounded up to the ladder; 0: the whole data set
    svrg.growth_factor = 2.0  # of that size, from one snapshot to the next
    svrg.error_decay = 0.0  # of its error, from one to the next, instead of growth_factor; 0: no
    svrg.mixed = False  # examples outside of the snapshot's batch count with their gradient alone
    svrg.skip_zeros = False  # leave out examples whose gradient was 0 several times; for hinge losses
    optimizer.saga = saga = ml_collections.ConfigDict()
    saga.first_size = 0  # dynasaga: examples of the first sample; 0: twice the number of features
    saga.doubling = False  # dynasaga: whether the sample doubles, instead of growing one by one
    saga.from_zero = False  # memory of an example not seen before: 0, rather than its gradient then

    # A loss, gradient or parameter that is not finite: stop; skip the update; or fall_back to the last
    # checkpoint and go on from there with a lower rate.
    config.divergence = divergence = ml_collections.ConfigDict()
    divergence.action = 'stop'  # stop, skip or fall_back
    divergence.max_skipped = 10  # skip: updates one after the other; with the next the run stops
    divergence.rate_factor = 0.5  # fall_back: ratio of the effective rate, each time
    divergence.max_fall_backs = 3  # fall_back: times in a run; with the next the run stops

    # What --mode=analyze measures of each checkpoint, on fixed examples of the training split.
    config.analysis = analysis = ml_collections.ConfigDict()
    analysis.num_examples = 2000
    analysis.batch_size = 250  # examples at once
    analysis.epsilons = (1e-3, 5e-4)  # of sharpness; see adabatch_jax.sharpness
    analysis.iterations = 10  # of L-BFGS-B
    analysis.subspace = 100  # dimensions of the random subspace; 0: the whole space only
    analysis.lanczos_steps = 20  # products with the Hessian, and with the Gauss-Newton matrix; 0: none
    analysis.eigenvalues = 5  # to write, of each
    analysis.trace_samples = 10  # products for the trace of the Hessian; 0: none

    config.compile = compile_ = ml_collections.ConfigDict()
    compile_.precompile = True  # compile later stages in the background
    # Updates that one call of a compiled step makes, with pipeline device, where nothing looks at every
    # update; 0: on an accelerator as many as make 4,096 examples, on a CPU 1.
    compile_.updates_per_dispatch = 0
    compile_.cache_dir = 'auto'  # persistent cache; auto: ~/.cache/adabatch_jax, '': off
    # On a CPU: in as little as half the time, for steps up to an eighth slower.
    compile_.quick = False

    config.lock()
    return config


CONFIG_FILE = 'config.json'  # of a run, in its work directory

# Keys that change how a run is carried out but not what it computes: they may differ when a
# work directory is continued.
RUNTIME_KEYS = (
    'compile.precompile',
    'compile.updates_per_dispatch',
    'compile.cache_dir',
    'compile.quick',
    'dataset.pipeline',
    'dataset.eval_batch_size',
    'dataset.skip_undecodable',  # up to an image that cannot be read it makes no difference
    'checkpoint_every_epochs',
    *(f'analysis.{key}' for key in default_config().analysis),
)

# Keys that processes, and who evaluates a run, may have other values of.
OF_A_MACHINE = ('compile.cache_dir', 'dataset.data_dir')

# Sections and keys that a run may be continued with other values of, where that is asked for.
SCHEDULE = ('num_epochs', 'batch.', 'learning_rate.', 'divergence.')


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """``{'batch.base_size': 128, ...}`` from a config or a dictionary of dictionaries."""
    flat = {}
    for key, value in tree.items():
        if hasattr(value, 'items'):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[prefix + key] = value
    return flat


def resolve(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
    """Checks every value by itself, fills in what follows from other keys, and freezes the config.

    Raises:
      ConfigError: naming the key, the value received and what is accepted.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise ConfigError(f'config: got a {kind}; accepted: what config.default_config() makes')
    defaults, given = flatten(default_config()), flatten(config)
    if unknown := sorted(given.keys() - defaults.keys()):
        raise ConfigError(f'config.{unknown[0]}: unknown key; known: {", ".join(defaults)}')
    if missing := sorted(defaults.keys() - given.keys()):
        raise ConfigError(f'config.{missing[0]}: missing; start from config.default_config()')

    with user_errors('config'):
        accepted_values.check(given, defaults)
    resolved = ml_collections.ConfigDict(config).copy_and_resolve_references()  # frozen ones have none
    with resolved.unlocked():
        if resolved.learning_rate.decay_epochs == 0:
            resolved.learning_rate.decay_epochs = resolved.batch.growth_epochs
    return ml_collections.FrozenConfigDict(resolved)


def schedule_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The ``SCHEDULE`` of a config by key, in JSON types."""
    flat = {key: value for key, value in flatten(config).items() if key.startswith(SCHEDULE)}
    return json.loads(json.dumps(flat))


def changes(
    one: dict[str, Any], other: dict[str, Any], names: tuple[str, str] = ('before', 'now')
) -> list[str]:
    """What differs between two flat configs or parts of them, as ``key (1 before, 2 now)``."""
    return [
        f'{key} ({one.get(key)!r} {names[0]}, {other.get(key)!r} {names[1]})'
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as readable JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def from_json(text: str) -> ml_collections.ConfigDict:
    """The inverse of ``to_json``: keys that are missing in an older file get their default."""
    config = default_config()
    known, given = flatten(config), flatten(json.loads(text))
    if unknown := [key for key in given if key not in known]:
        raise ConfigError(f'config.json: unknown key {unknown[0]}')
    config.update_from_flattened_dict({key: _tuples(value) for key, value in given.items()})
    return config


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def identifies_data(name: str) -> bool:
    """Whether the folder of a data set says what data they are, rather than its name."""
    return name in ('npz', 'image_folder')


def differences(
    ours: ml_collections.ConfigDict,
    theirs: ml_collections.ConfigDict,
    may_differ: tuple[str, ...] = (),
) -> list[str]:
    """The keys whose values differ, as ``key (1 here, 2 there)``.

    ``RUNTIME_KEYS`` and those that begin with one of ``may_differ`` are left out; so is the folder of a
    data set that its name identifies.
    """
    ignored = {*RUNTIME_KEYS, *([] if identifies_data(ours.dataset.name) else ['dataset.data_dir'])}
    here, there = (
        {k: v for k, v in flatten(c).items() if k not in ignored and not k.startswith(may_differ)}
        for c in (ours, theirs)
    )
    return changes(here, there, ('here', 'there'))
