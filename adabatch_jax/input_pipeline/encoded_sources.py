"""Data sets whose images stay on disk: TFDS folders of encoded images, and folders of files."""

import functools
import os
import pathlib

from adabatch_jax.input_pipeline import encoded
from adabatch_jax.input_pipeline.sources import Source, fingerprint, tfds_dir, used_splits

# Those of ImageNet's training images, for every data set of photographs.
_PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_IMAGENET = (1000, {'train': 1_281_167, 'validation': 50_000})


def _encoded_source(dataset, num_classes, channels, sizes, open_split, of_examples='') -> Source:
    """What all encoded images have in common: their size is the config's."""
    side = dataset.image_size or 224
    mean, std = ([255 * x for x in values] for values in _PHOTOGRAPHS)
    if channels != 3:
        mean, std = ([sum(values) / 3] * channels for values in (mean, std))
    shape = side, side, channels
    return Source(shape, num_classes, tuple(mean), tuple(std), sizes, None, open_split, of_examples)


def records_source(dataset, seed: int) -> Source:
    """A TFDS folder with the features ``image`` and ``label``."""
    name, data_dir = dataset.name, tfds_dir(dataset)
    folder = encoded.tfds_folder(data_dir, name)
    if folder is not None:
        info = encoded.records_info(folder)
        open_split = functools.partial(encoded.records_split, info)
        return _encoded_source(dataset, info.num_classes, info.channels, info.sizes, open_split)

    def missing(split=''):
        how = (
            'ImageNet has to be fetched by hand: see https://www.tensorflow.org/datasets/catalog/imagenet2012'
            if name == 'imagenet2012'
            else f'set dataset.data_dir to the folder that holds {name}/VERSION/'
        )
        raise FileNotFoundError(f'data set {name}: not found in {str(data_dir)!r}; {how}')

    if name != 'imagenet2012':
        missing()
    num_classes, sizes = _IMAGENET  # known without the data, so that a run can be planned anywhere
    return _encoded_source(dataset, num_classes, 3, sizes, missing)


def image_folder_source(dataset, seed: int) -> Source:
    """``data_dir/SPLIT/CLASS/*.jpg``; the training split's folders are the classes."""
    folder = pathlib.Path(os.path.expanduser(dataset.data_dir))
    splits = sorted(p.name for p in folder.glob('*') if p.is_dir()) if dataset.data_dir else []
    if not splits:
        raise FileNotFoundError(
            f'data set image_folder: no folders in {str(folder)!r}; set dataset.data_dir to a folder '
            'with train/CLASS/*.jpg and the same for dataset.eval_split'
        )
    used = used_splits(dataset, splits)
    classes = encoded.class_folders(folder / used[0])
    if not classes:
        raise ValueError(f'data set image_folder: {str(folder / used[0])!r} has no class folders')

    def open_split(split):
        return encoded.image_folder_split(folder / split, classes)

    sizes = {split: len(open_split(split)) for split in used}
    names = fingerprint('/'.join(classes).encode(errors='surrogateescape'))
    return _encoded_source(dataset, len(classes), 3, sizes, open_split, names)
