"""tf.data for encoded images: read, decode only the crop, resize, flip, from any position."""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import re
import weakref
from collections.abc import Callable, Iterator

import numpy as np

from adabatch_jax import distributed
from adabatch_jax.input_pipeline import order
from adabatch_jax.input_pipeline.datasets import (
    DataError,
    as_numpy_iterator,
    num_cores,
    open_split,
    tensorflow,
)
from adabatch_jax.input_pipeline.encoded import EncodedSplit
from adabatch_jax.input_pipeline.in_memory import Batch

tf = tensorflow()
# Several images are decoded at once already. Kernels that split the work of one over threads as well
# wait for each other longer than a small image takes.
with contextlib.suppress(RuntimeError):  # TensorFlow has been used in this process before
    tf.config.threading.set_intra_op_parallelism_threads(1)

Part = tuple[np.ndarray, np.ndarray]  # indices of examples, -1 for padding, and their epochs
# What is damaged inside a record can make a message that is not text.
_UNDECODABLE = (tf.errors.OpError, UnicodeDecodeError)

_THREADS = 16  # that read files; they wait for the disk most of the time
_GROUP = 8  # examples that a thread reads at a time, and that go into TensorFlow at once
_STREAMS = 5  # that may fail at the same batch: a disk may fail for longer than a read is tried again
_ATTEMPTS = 10  # at a crop that lies inside the image, as is usual for ImageNet
_DRAWS = 2 * _ATTEMPTS + 3
_LOG_RATIO = float(np.log(4 / 3))  # of width to height, up or down


class EncodedPipeline:
    """Training and evaluation batches of this process, decoded as they are needed.

    Memory holds a few batches and the positions of the examples, never the images. Images that cannot be
    decoded are an error that names their file; with ``dataset.skip_undecodable`` they take part as
    black images with label -1, which the train step and the evaluation leave out.
    """

    def __init__(self, config, info, clock):
        dataset = config.dataset
        self._seed = config.seed
        self._clock = clock
        self._side, _, self._channels = info.image_shape
        self._num_classes = info.num_classes
        self._min_area = dataset.min_crop_area if dataset.augment == 'random_resized_crop' else None
        # Of the shorter side of an image.
        self._eval_part = self._side / dataset.eval_resize if dataset.eval_resize else 224 / 256
        self._train = open_split(dataset, dataset.train_split)
        self._eval = open_split(dataset, dataset.eval_split)
        self._skip = dataset.skip_undecodable
        self._suspects: set[tuple[int, int]] = set()  # identity of the split, example that failed once
        self._readers = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix='read')

    def close(self) -> None:
        """Ends the threads that read ahead, and forgets where the images are.

        Without it both live as long as the process: tf.data keeps its generators, and through them the
        pipeline.
        """
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._train = self._eval = None

    def train_batches(self, start: int, batch_size: int, num_parts: int = 1) -> Iterator[Batch]:
        """As ``TfDataPipeline.train_batches``, with the label -1 for an image left out."""

        def parts(skipped):
            examples = order.update_examples(self._seed, self._clock, start, batch_size, num_parts)
            return itertools.islice(examples, skipped, None)  # after an error only; indices are cheap

        for batch in self._batches(self._train, parts, self._random_window):
            del batch['mask']
            yield batch

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """As ``InMemory.eval_batches``."""
        rows = distributed.local_rows(batch_size)

        def parts(skipped):
            for start in range(skipped * batch_size, len(self._eval), batch_size):
                examples = np.arange(start + rows.start, start + rows.stop)
                yield np.where(examples < len(self._eval), examples, -1), np.zeros_like(examples)

        for batch in self._batches(self._eval, parts, self._central_window):
            del batch['example']
            yield batch

    # ------------------------------------------------------------------ examples to batches

    def _batches(
        self, split: EncodedSplit, parts: Callable[[int], Iterator[Part]], window: Callable
    ) -> Iterator[Batch]:
        """The batches of ``parts(0)``; where one fails, again from there.

        By then a damaged image is known, and left out; or none is damaged, and the disk that failed may
        be back.
        """
        # Another stream may find that an image is damaged which this one has read ahead.
        known, unread = set(self._suspects), []
        stream = self._stream(split, parts(0), window, unread)
        for done, part in enumerate(parts(0)):
            for _ in range(_STREAMS):
                try:
                    batch = next(stream)
                    break
                except _UNDECODABLE as error:
                    failure = unread.pop() if unread else error
                    self._suspect(split, part, window, error, known)
                    known, unread = set(self._suspects), []
                    stream = self._stream(split, parts(done), window, unread)
            else:
                raise failure
            labels, used = batch['label'], batch['mask'] > 0
            wrong = used & ((labels < 0) | (labels >= self._num_classes))
            if wrong.any():
                raise DataError(
                    f'{split.name(batch["example"][wrong][0])}: got label {labels[wrong][0]}; accepted: '
                    f'0 to {self._num_classes - 1}'
                )
            yield batch

    def _stream(
        self, split: EncodedSplit, parts: Iterator[Part], window: Callable, unread: list[DataError]
    ) -> Iterator[Batch]:
        first, parts = _peek(parts)
        size = len(first[0])
        # TensorFlow keeps the functions below for as long as the process lives.
        in_record, table = split.labels is None, weakref.ref(split)
        decode = tf.autograph.experimental.do_not_convert(
            lambda *example: self._decode(in_record, window, *example)
        )
        signature = (
            tf.TensorSpec([None], tf.string),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, _DRAWS], tf.int64),
        )
        dataset = (
            tf.data.Dataset.from_generator(
                lambda: self._read(table(), parts, window, unread), output_signature=signature
            )
            .unbatch()
            .map(decode, num_parallel_calls=num_cores(), deterministic=True)
            .batch(size)
            .prefetch(2)
        )
        return as_numpy_iterator(dataset)

    def _read(
        self, split: EncodedSplit, parts: Iterator[Part], window: Callable, unread: list[DataError]
    ) -> Iterator[tuple]:
        """Bytes, labels, indices and random draws of a few examples at a time, read ahead by threads.

        No group reaches over the end of a part, so that one that cannot be read fails its own part. The
        reason goes into ``unread`` as well: TensorFlow passes on its text alone.
        """

        def read_one(example, words):
            suspect = (id(split), example) in self._suspects
            if example < 0 or (suspect and self._failure(split, window, example, words)):
                return b'', -1
            return _read_example(split, example), 0 if split.labels is None else split.labels[example]

        def read(examples, words):
            data, labels = np.empty(len(examples), object), np.empty(len(examples), np.int32)
            for k, example in enumerate(examples.tolist()):
                data[k], labels[k] = read_one(example, words[k])
            return data, labels, examples.astype(np.int32), words

        def reading():
            for examples, epochs in parts:
                for first in range(0, len(examples), _GROUP):
                    group = slice(first, first + _GROUP)
                    words = self._draws(examples[group], epochs[group])
                    yield self._readers.submit(read, examples[group], words)

        ahead, groups = collections.deque(), reading()
        while True:
            ahead.extend(itertools.islice(groups, _THREADS - len(ahead)))
            if not ahead:
                return
            try:
                group = ahead.popleft().result()
            except DataError as error:
                unread.append(error)
                raise
            yield group

    def _draws(self, examples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The random draws of each example."""
        return order.random_bits(self._seed, epochs, examples, _DRAWS).astype(np.int64)

    def _failure(self, split: EncodedSplit, window: Callable, example: int, words: np.ndarray) -> str:
        """Why an image cannot be decoded; nothing where it can."""
        arguments = map(tf.constant, (_read_example(split, example), 0, example, words))
        try:
            self._decode(split.labels is None, window, *arguments)
        except UnicodeDecodeError:
            return 'not a tf.train.Example'
        except _UNDECODABLE as error:
            return _plain(getattr(error, 'message', str(error)))
        return ''

    def _suspect(
        self,
        split: EncodedSplit,
        part: Part,
        window: Callable,
        error: Exception,
        known: set[tuple[int, int]],
    ) -> None:
        """Notes which images of a part that failed cannot be decoded, or raises for the first of them.

        It raises for one that cannot be read as well, which is no reason to leave it out.

        An image that is cut off may be whole inside one epoch's crop and not in another's. From here on
        each of these is tried by itself before it joins a batch, so that it is left out of the epochs
        in which it fails and of no others: this too depends on the position alone. The stream knew of
        those in ``known`` when it began.
        """
        examples, epochs = (array[part[0] >= 0] for array in part)
        words, examples = self._draws(examples, epochs), examples.tolist()
        reasons = self._readers.map(functools.partial(self._failure, split, window), examples, words)
        found = {
            example: reason
            for example, reason in zip(examples, reasons, strict=True)
            if reason and (id(split), example) not in known
        }
        for example, reason in found.items():
            message = f'{split.name(example)}: cannot be decoded ({reason})'
            if not self._skip:
                raise DataError(
                    f'{message}; repair or remove it, or set dataset.skip_undecodable=True'
                ) from error
            if (id(split), example) not in self._suspects:
                print(f'{message}; left out', flush=True)
                self._suspects.add((id(split), example))

    # --------------------------------------------------------------- one example, in TensorFlow

    def _decode(self, in_record, window, data, label, example, words):
        """An image of the model's size; a black one where the label -1 says to leave it out."""
        shape = (self._side, self._side, self._channels)

        def nothing():
            return tf.zeros(shape, tf.uint8), tf.constant(-1), tf.constant(0.0)

        def something():
            image, class_ = data, label
            if in_record:
                features = {
                    'image': tf.io.FixedLenFeature([], tf.string),
                    'label': tf.io.FixedLenFeature([], tf.int64),
                }
                record = tf.io.parse_single_example(data, features)
                image, class_ = record['image'], tf.cast(record['label'], tf.int32)
            pixels = self._decode_window(image, lambda *size: window(words, *size))
            # Means of values from 0 to 255 need no clipping.
            pixels = tf.cast(tf.round(tf.image.resize(pixels, shape[:2], antialias=True)), tf.uint8)
            if window == self._random_window and self._min_area is not None:
                mirrored = words[-1] >= 2**31
                # Many times as fast as pixels[:, ::-1] on the CPU, for three channels.
                pixels = tf.cond(mirrored, lambda: tf.reverse(pixels, [1]), lambda: pixels)
            return tf.ensure_shape(pixels, shape), class_, tf.constant(1.0)

        image, label, mask = tf.cond(label < 0, nothing, something)
        return {'image': image, 'label': label, 'example': example, 'mask': mask}

    def _decode_window(self, image, window):
        """Decodes the window ``(top, left, height, width)`` chosen for an image's size."""

        def jpeg():
            height, width, _ = tf.unstack(tf.image.extract_jpeg_shape(image))
            return tf.image.decode_and_crop_jpeg(
                image,
                tf.stack(window(height, width)),
                channels=self._channels,
                dct_method='INTEGER_ACCURATE',
            )

        def other():
            pixels = tf.io.decode_image(image, channels=self._channels, expand_animations=False)
            pixels = tf.ensure_shape(pixels, [None, None, self._channels])
            size = tf.shape(pixels)
            top, left, height, width = window(size[0], size[1])
            return pixels[top : top + height, left : left + width]

        return tf.cond(tf.io.is_jpeg(image), jpeg, other)

    def _central_window(self, words, height, width):
        """The central square that resizing and cropping would leave."""
        side = tf.cast(tf.minimum(height, width), tf.float64) * self._eval_part
        side = tf.maximum(tf.cast(tf.round(side), tf.int32), 1)
        return (height - side) // 2, (width - side) // 2, side, side

    def _random_window(self, words, height, width):
        """A random part of the area, of random aspect (Szegedy et al., 2015, section 6).

        The first of ten attempts that lies inside the image; if none does, the largest centred window
        of an aspect between 3:4 and 4:3. Without augmentation the window of evaluation.
        """
        if self._min_area is None:
            return self._central_window(words, height, width)
        uniform = tf.cast(words, tf.float64) / 2.0**32
        rows, columns = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
        area = rows * columns * (self._min_area + uniform[:_ATTEMPTS] * (1 - self._min_area))
        ratio = tf.exp((2 * uniform[_ATTEMPTS : 2 * _ATTEMPTS] - 1) * _LOG_RATIO)
        heights, widths = tf.round(tf.sqrt(area / ratio)), tf.round(tf.sqrt(area * ratio))
        fits = (heights >= 1) & (widths >= 1) & (heights <= rows) & (widths <= columns)
        first = tf.argmax(fits)
        any_fits = tf.reduce_any(fits)
        h = tf.where(any_fits, heights[first], tf.minimum(rows, tf.round(columns * 4 / 3)))
        w = tf.where(any_fits, widths[first], tf.minimum(columns, tf.round(rows * 4 / 3)))
        place = tf.where(any_fits, uniform[2 * _ATTEMPTS : 2 * _ATTEMPTS + 2], [0.5, 0.5])
        top = tf.floor(place[0] * (rows - h + 1))
        left = tf.floor(place[1] * (columns - w + 1))
        return tuple(tf.cast(value, tf.int32) for value in (top, left, h, w))


def _read_example(split: EncodedSplit, example: int) -> bytes:
    try:
        return split.read(example)
    except OSError as error:
        raise DataError(
            f'{split.name(example)}: could not be read ({error.strerror or error}); start again when it '
            'is a file there, and its disk can be read'
        ) from error


def _plain(message: str) -> str:
    """TensorFlow's message without the names of graph nodes around it."""
    return re.sub(r'\{\{.*?\}\}|\[Op:.*', '', message.partition('\n')[0]).strip()[:150]


def _peek(iterator):
    first = next(iterator)
    return first, itertools.chain([first], iterator)
