"""What all commands share: flags and config from a command line, and mistakes as one line."""

import contextlib
import difflib
import itertools
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

import jax
from absl import flags, logging
from ml_collections import config_flags

from adabatch_jax import distributed
from adabatch_jax.config import ConfigError, default_config, flatten

_BOOLEANS = ('true', 't', '1', 'false', 'f', '0')  # as absl has them


class _Path(flags.ArgumentParser):
    """A path, of which no shell has replaced the ~ behind ``--name=``."""

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def define_path(name: str, what: str, values: flags.FlagValues) -> None:
    """Adds ``--name=PATH``, None where it is left out."""
    flags.DEFINE(_Path(), name, None, what, values)


def define_common(values: flags.FlagValues, argv: list[str]) -> None:
    """Adds ``--config=FILE``, ``--config.KEY=VALUE`` and what makes several processes one run."""
    flags.DEFINE_string(
        'coordinator_address',
        None,
        'Several processes: HOST:PORT of the first. This and the next two are found by JAX under SLURM, '
        'Open MPI, Kubernetes and on TPU pods.',
        flag_values=values,
    )
    flags.DEFINE_integer(
        'num_processes', None, 'How many processes there are; 1: this one alone.', flag_values=values
    )
    flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.', flag_values=values)
    config_flags.DEFINE_config_file(
        'config', None, 'Config file; its keys: --config.KEY=VALUE', values, sys_argv=argv
    )


def parse(
    argv: list[str], define_flags: Callable[[list[str]], flags.FlagValues], rest_is: str | None = None
) -> flags.FlagValues:
    """The parsed command line; every mistake in it is a ``ConfigError``.

    What is no flag goes to the list flag ``rest_is``, where a command takes such arguments.
    """
    check_overrides(argv)
    try:
        values = define_flags(argv)
        rest = values(argv)[1:]
        if 'config' in values and values.config is not None:
            dict(values.config)  # a config file that failed says so at the first access
        elif 'config' in values and values['config'].present:
            raise ValueError('get_config() gives None; accepted: a config, from default_config()')
    except (Exception, SystemExit) as error:  # a config file is the user's code: it can raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, flags.Error) and 'Traceback' not in str(error):
            raise ConfigError(' '.join(lines)) from error
        if unknown := re.search(r'[Kk]ey "?(\w+)"? does not exist', lines[-1]):
            named: dict[str, list[str]] = {}
            for key in flatten(default_config()):
                named.setdefault(key.rpartition('.')[2], []).append(key)
            accepted = ', '.join(key for name in _closest(unknown[1], named) for key in named[name])
            raise ConfigError(f'--config: unknown key {unknown[1]}; accepted: {accepted}') from error
        if 'get_config() takes 0 positional arguments' in lines[-1]:
            raise ConfigError('--config: the file has no variants; accepted: its name alone') from error
        raise ConfigError(f'--config: {_placed(lines[-1].strip(), error, argv)}') from error
    if rest_is:
        values[rest_is].value = [*values[rest_is].value, *rest]
    elif rest:
        raise ConfigError(f'arguments: got {" ".join(rest)!r}; accepted: flags only, --name=value')
    return values


def _placed(message: str, error: BaseException | None, argv: list[str]) -> str:
    """A message with the line of the config file that an error arose in, where it arose there."""
    given = []  # --config=FILE:VARIANT, or --config FILE:VARIANT
    for argument, following in itertools.pairwise([*argv, '']):
        if found := re.fullmatch('--?config(=.*)?', argument):
            given.append(found[1][1:] if found[1] else following)
    files = {os.path.realpath(name.partition(':')[0]) for name in given}
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if os.path.realpath(frame.filename) in files:
                kind = f'{type(error).__name__}: '
                message = kind + message.removeprefix(kind)
                return f'{message} ({frame.filename}, line {frame.lineno})'
        error = error.__cause__ or error.__context__
    return message


def _closest(name: str, names: Iterable[str]) -> Iterable[str]:
    """The names that are most like a misspelt one; all where none is."""
    return difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names


def check_overrides(argv: list[str]) -> None:
    """Refuses ``--config.KEY=VALUE`` of unknown keys and wrong types, more clearly than a parser."""
    numbers = {int: 'a whole number', float: 'a number'}
    defaults = flatten(default_config())
    names = {argument.lstrip('-').partition('=')[0] for argument in argv[1:] if argument[:1] == '-'}
    if 'config' not in names and any(name.startswith('config.') for name in names):
        raise ConfigError('--config: missing; --config.KEY=VALUE goes with the --config=FILE of the run')
    for argument in argv[1:]:
        key, given, value = argument.lstrip('-').partition('=')
        if not argument.startswith('-') or not key.startswith('config.'):
            continue
        key = key.removeprefix('config.')
        if key not in defaults:
            accepted = ', '.join(_closest(key, defaults))
            raise ConfigError(f'config.{key}: unknown key; accepted: {accepted}')
        kind = type(defaults[key])
        if kind is bool and given and value.lower() not in _BOOLEANS:
            raise ConfigError(f'config.{key}: got {value!r}; accepted: True or False')
        try:
            if given and kind in numbers:
                kind(value)
        except ValueError:
            raise ConfigError(f'config.{key}: got {value!r}; accepted: {numbers[kind]}') from None


@contextlib.contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; with several processes JAX watches for it in all of them."""
    stop = threading.Event()
    if not distributed.is_alone():
        yield stop
        return

    def ask(*_):
        # A second one inside `set` would wait for its lock for ever.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.set()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    """Prints lines on standard output; where they cannot be written, a warning instead."""
    try:
        print(text, flush=True)
    except OSError as error:
        distributed.complain(f'warning: standard output: {error.strerror}')


@contextlib.contextmanager
def _emptied_streams() -> Iterator[None]:
    """Lets Python end with the status that was returned where what was printed cannot be written."""
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            _empty(stream)


def _empty(stream: TextIO | None) -> None:
    with contextlib.suppress(AttributeError, ValueError):  # there is none, or it is closed
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, 'wb') as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


@_emptied_streams()
def run(
    argv: list[str],
    doc: str,
    define_flags: Callable[[list[str]], flags.FlagValues],
    command: Callable[[flags.FlagValues], int],
    interrupted: str = '',
    rest_is: str | None = None,
    trains: Callable[[flags.FlagValues], bool] = lambda values: False,
) -> int:
    """Does what a command line says; returns the exit status.

    Args:
      argv: with the name of the command first.
      doc: what ``--help`` says before it lists the flags.
      define_flags: the command's flags, fresh for every call.
      command: what to do; returns the exit status.
      interrupted: what to say after an interrupt from the keyboard.
      rest_is: as for ``parse``.
      trains: whether the command saves after SIGTERM; else that ends it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see malloc.restart
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(AttributeError):  # of what may stand in for standard output
        sys.stdout.reconfigure(errors='replace')  # a run is worth more than a character
    logging.set_verbosity(logging.WARNING)
    logging.set_stderrthreshold('warning')
    if '--help' in argv or '-h' in argv:
        say(f'{doc}\n{define_flags([]).get_help()}')
        return 0
    was_in_use = distributed.is_in_use()  # by a notebook
    try:
        values = parse(argv, define_flags, rest_is)
        if 'num_processes' in values:
            _join(values, was_in_use)
            if jax.distributed.is_initialized() and not trains(values):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX notes it, for a loop to ask about
        return command(values)
    except ConfigError as error:
        return distributed.fail(2, f'error: {" ".join(str(error).split())}')
    except KeyboardInterrupt:
        return distributed.fail(130, f'interrupted{interrupted}')
    except Exception as error:
        if not distributed.is_joined():
            raise
        if distributed.says_another_is_gone(error):
            return distributed.abandon(error)
        return distributed.fail(1, traceback.format_exc())


def _join(values: flags.FlagValues, was_in_use: bool) -> None:
    """Makes this process one of those of a run, unless the config file has begun to use JAX."""
    if distributed.is_in_use() and not was_in_use:
        count = values.num_processes or distributed.num_found()
        if count > 1:
            raise ConfigError(
                f'--config: got {values["config"].config_filename!r}, which uses JAX, as '
                f'jax.device_count() does, before the {count} processes are brought together; accepted: '
                'files that do not; give what follows from the devices as --config.KEY=VALUE, or '
                '--num_processes=1 to go on alone'
            )
    try:
        distributed.join(values.coordinator_address, values.num_processes, values.process_id)
    except ValueError as error:
        raise ConfigError(f'--{error}') from error
