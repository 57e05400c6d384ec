"""TFDS records of encoded images: read at random, their metadata, and what is wrong with them."""

import itertools
import json

import numpy as np
import pytest
from test_encoded_images import dataset_config, make_pipeline, picture, take, tf

from adabatch_jax import input_pipeline
from adabatch_jax.input_pipeline import decoding, order


def write_records(folder, counts, labels=None, file_format='tfrecord'):
    """A TFDS data set ``pictures`` without TFDS: metadata, and ``counts`` records a file."""
    folder = folder / 'pictures' / '1.10.0'
    folder.mkdir(parents=True)
    shape = {'dimensions': ['-1', '-1', '3']}
    features = {'image': {'image': {'shape': shape}}, 'label': {'classLabel': {'numClasses': '3'}}}
    (folder / 'features.json').write_text(json.dumps({'featuresDict': {'features': features}}))
    splits = [{'name': 'train', 'shardLengths': [str(c) for c in counts]}]
    info = {'fileFormat': file_format, 'splits': splits}
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    labels = iter(labels or itertools.cycle(range(3)))
    for shard, count in enumerate(counts):
        path = folder / f'pictures-train.tfrecord-{shard:05d}-of-{len(counts):05d}'
        with tf.io.TFRecordWriter(str(path)) as writer:
            for k in range(count):
                jpeg = tf.io.encode_jpeg(picture(1000 * shard + k), quality=100).numpy()
                feature = {
                    'image': tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg])),
                    'label': tf.train.Feature(int64_list=tf.train.Int64List(value=[next(labels)])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())
    return folder


RECORDS = {'dataset.name': 'pictures', 'dataset.eval_split': 'train[:50%]'}


def test_records_are_read_at_random_as_they_were_written(tmp_path):
    older = tmp_path / 'pictures' / '1.9.0'
    older.mkdir(parents=True)
    (older / 'dataset_info.json').write_text('an older version, and no JSON')
    write_records(tmp_path, (5, 4))
    pipeline = make_pipeline(tmp_path, **RECORDS, **{'dataset.augment': 'none'})
    batches = take(pipeline, 4, 6, 4)
    ids = np.concatenate([b['example'] for b in batches])
    labels = np.concatenate([b['label'] for b in batches])
    np.testing.assert_array_equal(ids, order.examples_at(0, 9, 4, 24)[0])
    np.testing.assert_array_equal(labels, ids % 3)
    (folder,) = (tmp_path / 'pictures').glob('1.10.0')
    data = tf.data.TFRecordDataset(sorted(map(str, folder.glob('*.tfrecord-*'))))
    assert [pipeline._train.read(k) for k in range(9)] == list(data.as_numpy_iterator())


def test_records_that_are_cut_off_or_missing_are_refused_by_name(tmp_path):
    folder = write_records(tmp_path, (5, 4))
    first, second = sorted(folder.glob('*.tfrecord-*'))
    whole = second.read_bytes()
    second.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf'{second.name}.*inside a record'):
        make_pipeline(tmp_path, **RECORDS)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=rf'{second.name}.*5 records, its data set says 4'):
        make_pipeline(tmp_path, **RECORDS)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=second.name):
        make_pipeline(tmp_path, **RECORDS)


@pytest.mark.parametrize('label', [3, -1])
def test_labels_out_of_range_in_records_are_refused_by_name(tmp_path, label):
    write_records(tmp_path, (5,), labels=[0, 1, 2, label, 0])
    pipeline = make_pipeline(tmp_path, **RECORDS)
    with pytest.raises(decoding.DataError, match=rf'of-00001.*got label {label}; accepted: 0 to 2'):
        take(pipeline, 0, 4, 3)


def test_a_damaged_record_is_named_or_left_out(tmp_path):
    folder = write_records(tmp_path, (5, 4))
    first = min(folder.glob('*.tfrecord-*'))
    content = bytearray(first.read_bytes())
    content[12:30] = b'\xfb' * 18  # of the first record, after its header
    first.write_bytes(content)
    with pytest.raises(decoding.DataError, match=rf'{first.name}, byte 12: .*not a tf.train.Example'):
        take(make_pipeline(tmp_path, **RECORDS), 0, 9, 1)
    (batch,) = take(make_pipeline(tmp_path, **RECORDS, **{'dataset.skip_undecodable': True}), 0, 9, 1)
    np.testing.assert_array_equal(batch['label'] < 0, batch['example'] == 0)


@pytest.mark.parametrize(
    'text',
    [
        '{',
        '[]',
        'null',
        '{}',
        '{"splits": null}',
        '{"splits": []}',
        '{"splits": ["train"]}',
        '{"splits": [{}]}',
    ],
)
@pytest.mark.parametrize('name', ['pictures', 'cifar10'])
def test_metadata_that_cannot_be_read_is_refused_by_folder(tmp_path, text, name):
    folder = write_records(tmp_path, (2,))
    (folder / 'dataset_info.json').write_text(text)
    folder.parent.rename(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}/1.10.0' is not a TFDS folder"):
        input_pipeline.dataset_info(dataset_config(tmp_path, name=name))


def test_a_version_that_was_not_built_to_its_end_is_passed_over(tmp_path):
    folder = write_records(tmp_path, (2,))
    unfinished = folder.with_name('1.11.0.incompleteAB')
    unfinished.mkdir()
    (unfinished / 'dataset_info.json').write_bytes((folder / 'dataset_info.json').read_bytes())
    info = input_pipeline.dataset_info(dataset_config(tmp_path, name='pictures', eval_split='train'))
    assert info.num_train == 2


def test_an_empty_split_does_not_make_the_others_unusable(tmp_path):
    folder = write_records(tmp_path, (2,))
    info = json.loads((folder / 'dataset_info.json').read_text())
    info['splits'].append({'name': 'test'})  # as TFDS writes it
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    info = input_pipeline.dataset_info(dataset_config(tmp_path, name='pictures', eval_split='train'))
    assert info.num_train == 2


@pytest.mark.parametrize('name', ['pictures', 'cifar10'])
def test_other_file_formats_are_refused_by_the_plan(tmp_path, name):
    write_records(tmp_path, (2,), file_format='array_record').parent.rename(tmp_path / name)
    with pytest.raises(ValueError, match="'array_record'; accepted: tfrecord"):
        input_pipeline.dataset_info(dataset_config(tmp_path, name=name))


@pytest.mark.parametrize('name', ['pictures', 'mnist'])
def test_other_features_are_refused_by_the_plan(tmp_path, name):
    folder = write_records(tmp_path, (2,))
    features = folder / 'features.json'
    features.write_text(features.read_text().replace('{"image": {"image"', '{"img": {"image"'))
    folder.parent.rename(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}/.*' is not .* with the features image and label"):
        input_pipeline.dataset_info(dataset_config(tmp_path, name=name))


@pytest.mark.parametrize(
    'channels, mean, std',
    [(3, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), (1, (255 * 0.449,), (255 * 0.226,))],
)
def test_photographs_have_the_moments_of_imagenet_and_gray_ones_the_means_of_these(
    tmp_path, channels, mean, std
):
    features = write_records(tmp_path, (2,)) / 'features.json'
    features.write_text(features.read_text().replace('"3"]', f'"{channels}"]'))
    info = input_pipeline.dataset_info(dataset_config(tmp_path, name='pictures', eval_split='train'))
    assert (info.mean, info.std) == (pytest.approx(mean), pytest.approx(std))


def test_imagenet_can_be_planned_without_its_data_and_says_how_to_get_it(tmp_path):
    dataset = dataset_config(tmp_path, name='imagenet2012', eval_split='validation', image_size=0)
    info = input_pipeline.dataset_info(dataset)
    assert (info.num_train, info.num_eval, info.num_classes) == (1_281_167, 50_000, 1000)
    assert info.image_shape == (224, 224, 3)
    with pytest.raises(FileNotFoundError, match='fetched by hand'):
        input_pipeline.open_split(dataset, 'train')
