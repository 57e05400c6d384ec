"""Command line: ``python -m adabatch_jax.main --config=configs/NAME.py --workdir=DIR``.

Exit status: 0 success; 2 a mistake in config or input, one line on standard error; 3 training
diverged; 130 interrupted; 143 stopped by SIGTERM after saving.
"""

import signal
import sys
import threading

from absl import flags, logging
from ml_collections import config_flags

from adabatch_jax import evaluate, terminal, train, workdir
from adabatch_jax.config import ConfigError, resolve
from adabatch_jax.metrics import read_records

FLAGS = flags.FLAGS
flags.DEFINE_string('workdir', None, 'Directory of the run.')
flags.DEFINE_enum('mode', 'train', ['train', 'eval', 'plan'], 'What to do.')
flags.DEFINE_enum('checkpoint', 'latest', ['latest', 'best'], 'Which one to evaluate (mode eval).')
config_flags.DEFINE_config_file('config', None, 'Config file, with :VARIANT where it has any.')


def parse(argv: list[str]) -> None:
    """Parses the command line into ``FLAGS``; every mistake in it is a ``ConfigError``."""
    try:
        rest = FLAGS(argv)[1:]
        if FLAGS.config is not None:
            FLAGS.config.lock  # noqa: B018  a config file that failed says so at the first access
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # a config file is the user's code: it can raise anything
        raise ConfigError(f'--config: {type(error).__name__}: {error}') from error
    if rest:
        raise ConfigError(f'arguments: got {" ".join(rest)!r}; accepted: flags only, --name=value')


def run() -> int:
    """Does what the flags say; returns the exit status."""
    config = FLAGS.config
    if FLAGS.mode != 'plan' and not FLAGS.workdir:
        raise ConfigError('--workdir: missing; give the directory of the run')
    if config is None:
        if FLAGS.mode != 'eval':
            raise ConfigError('--config: missing; for example --config=configs/quickstart.py')
        config = workdir.read_config(FLAGS.workdir)
    if FLAGS.mode == 'plan':
        terminal.print_plan(train.plan(config))
        return 0
    if FLAGS.mode == 'eval':
        result = evaluate.evaluate_checkpoint(resolve(config), FLAGS.workdir, FLAGS.checkpoint)
        terminal.print_evaluation(result)
        return 0
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        train.train(config, FLAGS.workdir, stop)
    except train.Preempted as reason:
        terminal.console.print(f'{reason}; the same command continues')
        return 143
    except train.Diverged as reason:
        print(reason, file=sys.stderr)
        return 3
    terminal.print_stages(read_records(FLAGS.workdir))
    return 0


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)
    logging.set_stderrthreshold('warning')
    try:
        parse(argv)
        return run()
    except ConfigError as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; the same command continues from the last checkpoint', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main(sys.argv))
