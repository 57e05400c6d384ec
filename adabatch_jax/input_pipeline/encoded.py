"""Images that stay encoded on disk until they are needed: folders of files, and TFDS records.

Every example can be read by itself, so an epoch's order is a permutation of all of them and a run
resumes at any position at once: no shuffle buffer, nothing to read up to there.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import re
import time

import numpy as np

PAUSES = (0.1, 0.5, 2.0, 5.0)  # seconds between tries to read an image
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif')


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """Where the examples of a split lie.

    Attributes:
      paths: the files.
      files: index into ``paths`` of each example, int32 ``[n]``.
      offsets: its first byte in the file, int64 ``[n]``.
      lengths: its bytes, int64 ``[n]``; -1 for the whole file.
      labels: its class, int32 ``[n]``; None where examples are serialised ``tf.train.Example``
        records with the features ``image`` and ``label``.
    """

    paths: tuple[str, ...]
    files: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.files)

    def part(self, chosen: range) -> 'EncodedSplit':
        """The examples of a range of indices."""
        part = slice(chosen.start, chosen.stop)
        labels = None if self.labels is None else self.labels[part]
        return EncodedSplit(self.paths, self.files[part], self.offsets[part], self.lengths[part], labels)

    def read(self, example: int) -> bytes:
        """The bytes of an example; tried again for some seconds where a disk in a network fails.

        Raises:
          OSError: it cannot be read.
        """
        pauses = iter(PAUSES)
        while True:
            try:
                with open(self.paths[self.files[example]], 'rb') as file:
                    file.seek(self.offsets[example])
                    return file.read(self.lengths[example])
            except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
                raise
            except OSError:
                if (pause := next(pauses, None)) is None:
                    raise
                time.sleep(pause)

    def name(self, example: int) -> str:
        """The file of an example, and where in it, for people."""
        path = self.paths[self.files[example]]
        return path if self.lengths[example] < 0 else f'{path}, byte {self.offsets[example]}'


# ---------------------------------------------------------------------------- folders of files


def class_folders(folder: pathlib.Path) -> tuple[str, ...]:
    """The names of the classes of a split: its sub-folders, sorted."""
    entries = os.scandir(folder)
    return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith('.')))


def image_folder_split(folder: pathlib.Path, classes: tuple[str, ...]) -> EncodedSplit:
    """The images ``folder/CLASS/*.jpg`` (or png, bmp, gif), labelled by their class's place.

    They are in a fixed random order, so that a slice of the split has examples of every class.

    Raises:
      ValueError: a class without images, or one that is not among ``classes``.
    """
    found = class_folders(folder)
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(
            f'{str(folder / unknown[0])!r} is a class that the training split does not have; it has '
            f'{len(classes)} classes: {", ".join(classes[:5])}{", ..." if classes[5:] else ""}'
        )
    changed = tuple((folder / name).stat().st_mtime_ns for name in found)
    return _list_images(folder, found, classes, changed)


@functools.lru_cache(maxsize=4)
def _list_images(folder, found, classes, changed) -> EncodedSplit:
    """``changed``: when each class folder was changed last, so that a new listing is made then."""
    paths, labels, numbers = [], [], {name: number for number, name in enumerate(classes)}
    for name in found:
        images = sorted(
            entry.path
            for entry in os.scandir(folder / name)
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith('.')
        )
        if not images:
            raise ValueError(
                f'class folder {str(folder / name)!r} has no images ({", ".join(EXTENSIONS)}); fill it '
                'or remove it'
            )
        paths += images
        labels += [numbers[name]] * len(images)
    order = np.random.default_rng(0).permutation(len(paths))
    zeros = np.zeros(len(paths), np.int64)
    return EncodedSplit(
        tuple(paths), order.astype(np.int32), zeros, zeros - 1, np.array(labels, np.int32)[order]
    )


# --------------------------------------------------------------------------------- TFDS records


@dataclasses.dataclass(frozen=True)
class RecordsInfo:
    """What TFDS's metadata says of a data set, read without TensorFlow."""

    folder: pathlib.Path
    name: str  # that its files begin with
    shards: dict[str, tuple[int, ...]]  # examples of each file of a split
    num_classes: int
    channels: int

    @property
    def sizes(self) -> dict[str, int]:
        """The number of examples of each split."""
        return {split: sum(shards) for split, shards in self.shards.items()}


def tfds_folder(data_dir: pathlib.Path, name: str) -> pathlib.Path | None:
    """The folder of the newest version of a TFDS data set, None where there is none."""
    folders = [info.parent for info in (data_dir / name).glob('*/dataset_info.json')]
    complete = [f for f in folders if re.fullmatch(r'\d+(\.\d+)*', f.name)]  # not 1.0.0.incompleteAB
    return max(complete, key=lambda f: [int(part) for part in f.name.split('.')], default=None)


def records_info(folder: pathlib.Path) -> RecordsInfo:
    """Reads the metadata of a TFDS folder.

    Raises:
      ValueError: it holds no images with class labels in TFRecord files.
    """
    try:
        info = json.loads((folder / 'dataset_info.json').read_text(encoding='utf-8'))
        shards = {s['name']: tuple(map(int, s.get('shardLengths', ()))) for s in info['splits']}
        if not shards:
            raise ValueError('it has no splits')
        file_format, name = info.get('fileFormat'), info.get('name', folder.parent.name)
        text = (folder / 'features.json').read_text(encoding='utf-8')
        features = json.loads(text)['featuresDict']['features']
        channels = int(features['image']['image']['shape']['dimensions'][2])
        num_classes = int(features['label']['classLabel']['numClasses'])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{str(folder)!r} is not a TFDS folder of images with the features image and label: '
            f'{type(error).__name__}: {error}'
        ) from error
    if file_format not in (None, 'tfrecord'):
        raise ValueError(f'{str(folder)!r}: got file format {file_format!r}; accepted: tfrecord')
    return RecordsInfo(folder, name, shards, num_classes, channels)


def records_split(info: RecordsInfo, split: str) -> EncodedSplit:
    """The records of a split, found by hopping over the headers of its files, several at a time.

    Raises:
      ValueError, FileNotFoundError: a file is missing, or does not hold the records it should.
    """
    count = len(info.shards[split])
    paths = [info.folder / f'{info.name}-{split}.tfrecord-{k:05d}-of-{count:05d}' for k in range(count)]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f'{str(path)!r} is missing; fetch the data set again')
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(_index_records, paths))
    for path, (offsets, _), expected in zip(paths, tables, info.shards[split], strict=True):
        if len(offsets) != expected:
            raise ValueError(
                f'{str(path)!r} has {len(offsets)} records, its data set says {expected}; the file is '
                'incomplete or damaged'
            )
    return EncodedSplit(
        tuple(map(str, paths)),
        np.repeat(np.arange(count, dtype=np.int32), info.shards[split]),
        np.concatenate([offsets for offsets, _ in tables]),
        np.concatenate([lengths for _, lengths in tables]),
        labels=None,
    )


def _index_records(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths of the records: 8 bytes length, 4 checksum, the record, 4 checksum."""
    offsets, lengths, position = [], [], 0
    with open(path, 'rb', buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while position < size:
            length = int.from_bytes(os.pread(file.fileno(), 8, position), 'little')
            offsets.append(position + 12)
            lengths.append(length)
            position += length + 16
    if position != size:
        raise ValueError(f'{str(path)!r} ends inside a record; the file is incomplete or damaged')
    return np.array(offsets, np.int64), np.array(lengths, np.int64)
