"""Files that are whole: what takes the place of another does so at once."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The file to write in place of another, whose place it then takes: whole or not at all.

    Also where the process is killed. What is there and is no regular file, such as a pipe, is written
    to directly.

    Raises:
      OSError: what was raised inside, or it cannot take that place; with the name ``path``.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = pathlib.Path(os.path.realpath(path))  # a link stays one
    temporary = target.with_name(f'.{target.name}')
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # usually it has been moved by then
            temporary.unlink()


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all, also where the process is killed."""
    with replacing(path) as file:
        file.write_text(text, encoding='utf-8')
