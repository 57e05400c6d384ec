"""Records: whole lines, and readers that survive what a killed process leaves."""

import json

from adabatch_jax import metrics


def write(directory, *records):
    writer = metrics.MetricsWriter(directory)
    for kind, step, value in records:
        writer.write(kind, step=step, epoch=0.0, examples_seen=0, time=0.0, loss=value)
    writer.close()


def test_a_half_written_last_line_is_cut_off_before_more_is_appended(tmp_path):
    write(tmp_path, ('train', 1, 0.5))
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"kind": "train", "st')
    write(tmp_path, ('train', 2, 0.25))
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [1, 2]


def test_readers_take_the_last_record_of_a_step_and_skip_broken_lines(tmp_path):
    write(tmp_path, ('train', 1, 0.5), ('train', 2, 0.4), ('eval', 2, 0.6))
    with open(tmp_path / 'metrics.jsonl', 'ab') as file:
        file.write(b'\xff\xfe not json\n[1, 2]\n')
    write(tmp_path, ('train', 2, 0.3))
    records = metrics.read_records(tmp_path)
    assert [(r['kind'], r['step'], r['loss']) for r in records] == [
        ('train', 1, 0.5),
        ('eval', 2, 0.6),
        ('train', 2, 0.3),
    ]


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    write(tmp_path, ('train', 1, float('nan')), ('train', 2, float('inf')))
    assert [r['loss'] for r in metrics.read_records(tmp_path)] == [None, None]


def test_tensorboard_files_hold_the_scalars(tmp_path):
    from tensorboardX import event_file_writer  # noqa: F401  writes without TensorFlow

    write(tmp_path, ('train', 3, 0.5))
    (events,) = tmp_path.glob('events.out.tfevents.*')
    assert b'train/loss' in events.read_bytes()


def test_a_directory_without_records_has_none(tmp_path):
    assert metrics.read_records(tmp_path) == []
