"""XLA's persistent compilation cache: compiled code on disk, and what was found there."""

import collections
import contextlib
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterator

import jax
import jaxlib
from jax.experimental.compilation_cache.compilation_cache import reset_cache

NAMES = ('cache_hits', 'cache_misses')
# JAX leaves out what compiles in less than a second; a run has many such steps.
KEEP_ALL = {
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}
_of_thread, _of_process = threading.local(), collections.Counter()
_lock = threading.Lock()


def _count_event(event: str, **_) -> None:
    for name in NAMES:
        if event == f'/jax/compilation_cache/{name}':
            setattr(_of_thread, name, getattr(_of_thread, name, 0) + 1)
            with _lock:
                _of_process[name] += 1


jax.monitoring.register_event_listener(_count_event)


def counts() -> tuple[int, int]:
    """Hits and misses of the persistent cache on this thread so far."""
    return tuple(getattr(_of_thread, name, 0) for name in NAMES)


def totals() -> tuple[int, int]:
    """Hits and misses of the persistent cache on all threads so far."""
    return tuple(_of_process[name] for name in NAMES)


def is_enabled() -> bool:
    """Whether there is a persistent cache."""
    return bool(jax.config.jax_compilation_cache_dir)


@contextlib.contextmanager
def empty(is_shared: Callable[[str], bool] = bool) -> Iterator[None]:
    """An empty cache of its own for a while, to see what compiling takes with it and without.

    Args:
      is_shared: as for ``enable``.
    """
    before = jax.config.jax_compilation_cache_dir
    with tempfile.TemporaryDirectory(prefix='adabatch-compile-') as directory:
        enable(directory, is_shared)
        try:
            yield
        finally:
            jax.config.update('jax_compilation_cache_dir', before)
            reset_cache()


def enable(directory: str, is_shared: Callable[[str], bool] = bool) -> None:
    """Keeps compiled code on disk from one process to the next.

    JAX lets only the first of several processes write. Others that cannot read what it wrote would
    compile what the first finds there, and on GPUs wait for its part in the search for the fastest
    kernels, for a day. So nothing is kept unless all see one folder.

    Args:
      directory: ``'auto'`` for ``~/.cache/adabatch_jax``, where each version of jaxlib has its own
        folder, or for the one that the environment variable ``JAX_COMPILATION_CACHE_DIR`` names;
        ``''`` for none.
      is_shared: whether all processes see the same in a folder; without it there is one process.
    """
    given = os.environ.get('JAX_COMPILATION_CACHE_DIR')
    if directory == 'auto' and given:
        directory = given
    elif directory:
        if directory == 'auto':
            home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
            directory = os.path.join(home, 'adabatch_jax')
        directory = os.path.join(os.path.expanduser(directory), f'jaxlib-{jaxlib.__version__}')
    jax.config.update('jax_compilation_cache_dir', None)  # for what is_shared may compile
    jax.config.update('jax_compilation_cache_dir', (is_shared(directory) and directory) or None)
    for name, value in KEEP_ALL.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    reset_cache()  # it may have been opened elsewhere, by an earlier compilation
