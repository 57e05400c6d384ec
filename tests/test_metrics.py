"""Records: whole lines, and readers that survive what a killed process leaves."""

import errno
import json
import os
import sys

import pytest

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
    (file,) = tmp_path.glob('events.out.tfevents.*')
    tags = {value.tag for event in read_events(file) for value in event.summary.value}
    assert 'train/epoch' in tags and 'train/loss' not in tags


def test_tensorboard_files_do_not_wait_for_pytorch(tmp_path, monkeypatch):
    (tmp_path / 'torch.py').write_text('raise AssertionError("imported")')
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition('.')[0] == 'tensorboardX']:
        monkeypatch.delitem(sys.modules, name)
    write(tmp_path, ('train', 1, 0.5))
    assert list(tmp_path.glob('events.out.tfevents.*')) and 'tensorboardX.writer' in sys.modules
    with pytest.raises(AssertionError, match='imported'):  # those who want it still get it
        import torch  # noqa: F401


def test_tensorboard_files_hold_the_scalars(tmp_path):
    """Over updates, and over examples seen: read back with what wrote them, without TensorFlow."""
    writer = metrics.MetricsWriter(tmp_path, hparams={'batch.policy': 'fixed', 'batch.stages': ()})
    for step in (3, 6):
        fields = {'loss': 1 / step, 'batch_size': 16, 'learning_rate': 0.5}
        writer.write('train', step=step, examples_seen=16 * step, epoch=0.1 * step, time=1.0, **fields)
    writer.close()
    for folder, scale in ((tmp_path, 1), (tmp_path / 'by_examples', 16)):
        (file,) = folder.glob('events.out.tfevents.*')
        events = read_events(file)
        for tag, expected in (
            ('loss', [1 / 3, 1 / 6]),
            ('batch_size', [16, 16]),
            ('learning_rate', [0.5, 0.5]),
        ):
            found = [
                (event.step, value.simple_value)
                for event in events
                for value in event.summary.value
                if value.tag == f'train/{tag}'
            ]
            assert found == [
                (3 * scale, pytest.approx(expected[0])),
                (6 * scale, pytest.approx(expected[1])),
            ]
        described = b'batch.policy' in file.read_bytes()
        assert described == (folder == tmp_path)


def read_events(path):
    """The events of a file of records: length, checksum, data, checksum."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    data, events, at = path.read_bytes(), [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], 'little')
        for begin, end in ((at, at + 8), (at + 12, at + 12 + size)):
            assert int.from_bytes(data[end : end + 4], 'little') == masked_crc32c(data[begin:end])
        events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
        at += 16 + size
    return events


def test_tensorboard_keeps_of_a_continued_run_what_its_records_keep(tmp_path):
    """At the start of a session it forgets what it has of that step and later ones."""
    sessions = [
        [('session', 0, 1.0), ('train', 4, 1.0), ('eval', 4, 1.0), ('train', 8, 1.0), ('eval', 8, 1.0)],
        [('session', 4, 2.0), ('train', 8, 2.0), ('eval', 8, 2.0)],
        [('session', 8, 3.0)],
    ]
    for records in sessions:
        writer = metrics.MetricsWriter(tmp_path, print)
        for kind, step, value in records:
            writer.write(kind, step=step, examples_seen=16 * step, value=value)
        writer.close()
    expected = {(r['kind'], r['step']): r['value'] for r in metrics.read_records(tmp_path)}
    for folder, scale in ((tmp_path, 1), (tmp_path / 'by_examples', 16)):
        shown = {}
        for path in sorted(folder.glob('events.out.tfevents.*')):
            for event in read_events(path):
                if event.HasField('session_log'):
                    shown = {at: value for at, value in shown.items() if at[1] < event.step}
                for scalar in event.summary.value:
                    kind, _, name = scalar.tag.partition('/')
                    if name == 'value':
                        shown[kind, event.step] = scalar.simple_value
        assert shown == {(kind, scale * step): value for (kind, step), value in expected.items()}
    assert len(expected) == 7


def test_records_that_a_full_disk_refused_are_written_when_it_has_room(tmp_path):
    reported = []
    writer = metrics.MetricsWriter(tmp_path, reported.append)
    writer.write('train', step=1, examples_seen=1, loss=0.5)
    files = [appended._file for appended in appended_to(writer)]

    class Full:
        def __init__(self, file):
            self.file, self.truncate = file, file.truncate

        def write(self, data):
            if len(data) > 10:
                return self.file.write(data[:10])  # as far as there was room
            raise OSError(errno.ENOSPC, 'No space left on device')

    for appended, file in zip(appended_to(writer), files, strict=True):
        appended._file = Full(file)
    writer.write('train', step=2, examples_seen=2, loss=0.25)
    writer.write('train', step=3, examples_seen=3, loss=0.125)
    assert [r['step'] for r in metrics.read_records(tmp_path)] == [1]
    assert (tmp_path / 'metrics.jsonl').read_bytes().endswith(b'}\n')
    assert len(reported) == 1 and 'No space left on device' in reported[0]
    with pytest.raises(OSError):
        writer.sync()
    for appended, file in zip(appended_to(writer), files, strict=True):
        appended._file = file
    writer.write('train', step=4, examples_seen=4, loss=0.1)
    writer.close()
    assert [r['step'] for r in metrics.read_records(tmp_path)] == [1, 2, 3, 4]
    for folder in (tmp_path, tmp_path / 'by_examples'):
        (path,) = folder.glob('events.out.tfevents.*')
        losses = [e.step for e in read_events(path) for v in e.summary.value if v.tag == 'train/loss']
        assert losses == [1, 2, 3, 4]


def appended_to(writer):
    return [writer._file, *(events._file for events in writer._event_files)]


def test_records_are_with_the_system_at_once_and_wait_for_the_disk_only_where_asked(
    tmp_path, monkeypatch
):
    waited = []
    monkeypatch.setattr(os, 'fsync', waited.append)
    writer = metrics.MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.write('train', step=step, examples_seen=step, loss=0.5)
        (path,) = tmp_path.glob('events.out.tfevents.*')
        last = read_events(path)[-1]
        assert (last.step, last.summary.value[0].tag) == (step, 'train/loss')
        assert metrics.read_records(tmp_path)[-1]['step'] == step
    assert not waited
    writer.sync()
    assert waited == [writer._file.fileno()]


def test_two_writers_of_one_directory_have_event_files_of_their_own(tmp_path):
    for step in (1, 2):
        write(tmp_path, ('train', step, 0.5))
    assert len(list(tmp_path.glob('events.out.tfevents.*'))) == 2


def test_a_session_takes_back_what_was_written_of_later_steps_and_an_earlier_end(tmp_path):
    write(tmp_path, ('session', 0, 0), ('train', 2, 0.5), ('train', 4, 0.4), ('summary', 4, 0))
    write(tmp_path, ('session', 3, 0), ('train', 6, 0.3))
    assert [(r['kind'], r['step']) for r in metrics.read_records(tmp_path)] == [
        ('session', 0), ('train', 2), ('session', 3), ('train', 6),
    ]  # fmt: skip
    write(tmp_path, ('summary', 6, 0))
    write(tmp_path, ('session', 6, 0), ('train', 8, 0.2), ('summary', 8, 0))
    kinds = [r['kind'] for r in metrics.read_records(tmp_path)]
    assert kinds.count('summary') == 1 and kinds[-1] == 'summary'


@pytest.mark.parametrize('cut', range(1, 60, 7))
def test_a_file_cut_off_anywhere_can_be_read_and_continued(tmp_path, cut):
    write(tmp_path, ('train', 1, 0.5), ('train', 2, 0.4))
    path = tmp_path / 'metrics.jsonl'
    os.truncate(path, path.stat().st_size - cut)
    write(tmp_path, ('train', 3, 0.3))
    assert [r['step'] for r in metrics.read_records(tmp_path)] == [1, 3]


def test_a_directory_without_records_has_none(tmp_path):
    assert metrics.read_records(tmp_path) == []
