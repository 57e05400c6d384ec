"""Sweeps: several policies and seeds, each a process, and their comparison."""

import json
import signal
import sys

import pytest

from adabatch_jax import main, metrics, sweep, train
from adabatch_jax.config import ConfigError, changes, flatten, to_json

CONFIG = '--config=tests/small_run.py'


def config():
    return main.parse(['main', CONFIG]).config


def test_controls_differ_from_the_adaptive_run_in_their_batches_alone():
    runs = sweep.configs(config(), sweep.POLICIES, [3, 4])
    assert list(runs) == [f'{name}-{seed}' for name in sweep.POLICIES for seed in (3, 4)]
    adaptive = flatten(runs['adaptive-3'])
    assert changes(adaptive, flatten(runs['fixed_small-3'])) == [
        "batch.policy ('adabatch' before, 'fixed' now)"
    ]
    assert changes(adaptive, flatten(runs['fixed_large-3'])) == [
        'batch.base_size (8 before, 16 now)',
        "batch.policy ('adabatch' before, 'fixed' now)",
    ]
    assert changes(adaptive, flatten(runs['adaptive-4'])) == ['seed (3 before, 4 now)']


def test_all_have_the_coupling_of_the_adaptive_run():
    adaptive = config()
    adaptive.batch.policy, adaptive.batch.max_size = 'cabs', 16
    runs = sweep.configs(adaptive, ['fixed_small', 'adaptive', 'noise_scale'], [0])
    assert {run.learning_rate.coupling for run in runs.values()} == {'none'}
    assert runs['noise_scale-0'].batch.policy == 'noise_scale'


def test_adascale_is_swept_with_policies_that_have_a_coupling():
    runs = sweep.configs(config(), ['fixed_small', 'adaptive', 'adascale'], [0])
    assert runs['fixed_small-0'].learning_rate.coupling == 'linear'
    assert train.plan(runs['adascale-0']).learning_rate.coupling == 'none'


def rates(config):
    """Of the first and the last update with each batch size."""
    stages = train.plan(config).stages
    return [(s.batch_size, s.learning_rate_start, s.learning_rate_end) for s in stages]


@pytest.mark.parametrize(
    'changes, ratio',
    [
        ({}, 2),
        ({'optimizer.name': 'adam'}, 2**0.5),
        ({'learning_rate.coupling': 'sqrt'}, 2**0.5),
        ({'learning_rate.coupling': 'none'}, 1),
    ],
)
def test_controls_of_adascale_have_the_rates_that_they_have_by_themselves(changes, ratio):
    """The gain is of adascale alone: without a coupling a large batch would train at the small one's."""
    adaptive = config()
    changes = {'batch.stages': ((0, 8), (1, 16)), 'learning_rate.schedule': 'constant'} | changes
    adaptive.update_from_flattened_dict(changes | {'batch.policy': 'adascale'})
    runs = sweep.configs(adaptive, sweep.POLICIES, [0])
    assert rates(runs['adaptive-0']) == [(8, 0.01, 0.01), (16, 0.01, 0.01)]  # times the gain
    assert rates(runs['fixed_small-0']) == [(8, 0.01, 0.01)]
    ((size, *rate),) = rates(runs['fixed_large-0'])
    assert size == 16 and rate == pytest.approx([0.01 * ratio] * 2)
    by_hand = adaptive.copy_and_resolve_references()
    by_hand.batch.policy, by_hand.batch.base_size = 'fixed', 16
    assert rates(by_hand) == rates(runs['fixed_large-0'])


def test_what_would_be_the_same_run_is_trained_once():
    adaptive = config()
    adaptive.batch.policy, adaptive.batch.base_size = 'adascale', 16
    assert list(sweep.configs(adaptive, sweep.POLICIES, [0, 1])) == [
        'fixed_small-0', 'fixed_small-1', 'adaptive-0', 'adaptive-1',
    ]  # fmt: skip


def test_policies_begin_with_the_batch_that_the_adaptive_run_begins_with():
    adaptive = config()
    stages = {'batch.policy': 'stages', 'batch.stages': ((0, 16), (1, 32)), 'batch.max_size': 64}
    adaptive.update_from_flattened_dict(stages)  # base_size is 8, of no account
    runs = sweep.configs(adaptive, ['fixed', 'adaptive', 'noise_scale'], [0])
    assert [train.plan(run).stages[0].batch_size for run in runs.values()] == [16, 16, 16]


def test_a_sweep_trains_each_run_compares_them_and_goes_on_where_it_was_stopped(command_line, tmp_path):
    arguments = (CONFIG, f'--workdir={tmp_path}', '--sweep', '--quiet')
    arguments += ('--config.num_epochs=1', '--config.batch.growth_epochs=0.5')
    done = command_line(*arguments, '--seeds=1', '--policies=adaptive')
    assert done.returncode == 0, done.stderr
    first = metrics.read_records(tmp_path / 'adaptive-1')
    done = command_line(*arguments, '--seeds=0,1', '--policies=fixed_small,adaptive')
    assert done.returncode == 0, done.stderr
    assert metrics.read_records(tmp_path / 'adaptive-1') == first
    names = ['fixed_small-0', 'fixed_small-1', 'adaptive-0', 'adaptive-1']
    ends = [metrics.read_records(tmp_path / name)[-1] for name in names]
    assert [end['updates'] for end in ends] == [16, 16, 12, 12]
    assert len({end['params_digest'] for end in ends}) == 4
    page = (tmp_path / 'report.html').read_text()
    assert '2 of 2' in page and '>adabatch<' in page
    config_ = json.loads((tmp_path / 'adaptive-1/config.json').read_text())
    assert config_['seed'] == 1


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--policies=fixed_small,unknown', '--sweep'], 'config.batch'),
        (['--sweep', '--seeds=a'], "--seeds: got ['a']"),
        (['--seeds=1'], "--seeds: got ['1'] with --mode=train; accepted: --sweep"),
        (['--sweep', '--mode=plan'], '--sweep: got True with --mode=plan; accepted: --mode=train'),
        (['--sweep', '--allow_schedule_change'], '--allow_schedule_change: got --sweep as well'),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, arguments, message, capsys):
    workdir = tmp_path / 'sweep'
    assert main.main(['main', CONFIG, f'--workdir={workdir}', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    'name, message',
    [
        ('at 12:30', 'accepted: paths without a colon'),
        ('long' * 100, 'workdir: [Errno 36] File name too long'),
    ],
)
def test_a_directory_that_a_sweep_cannot_have_is_told_in_a_line(tmp_path, name, message, capsys):
    arguments = (f'--workdir={tmp_path / name}', '--sweep', '--policies=adaptive')
    assert main.main(['main', CONFIG, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('below', ['', 'folder'])
@pytest.mark.parametrize('arguments', [[], ['--sweep']])
def test_a_work_directory_that_is_a_file_or_below_one_is_told_in_a_line(
    tmp_path, arguments, below, capsys
):
    file = tmp_path / 'file'
    file.touch()
    assert main.main(['main', CONFIG, f'--workdir={file / below}', *arguments]) == 2
    expected = f'error: workdir: {str(file)!r} is a file; accepted: a directory\n'
    assert capsys.readouterr().err == expected


def test_a_sweep_of_other_runs_is_refused_and_leaves_these_as_they_are(tmp_path):
    other = config()
    (tmp_path / 'fixed_small-1').mkdir()
    (tmp_path / 'fixed_small-1/config.json').write_text(to_json(other))
    (tmp_path / 'fixed_small-0.py').write_text('as it was')
    with pytest.raises(ConfigError, match='fixed_small-1.* holds a run of another config; differing'):
        sweep.run(other, 'tests/small_run.py', tmp_path, ['fixed_small'], [0, 1])
    assert (tmp_path / 'fixed_small-0.py').read_text() == 'as it was'
    assert not (tmp_path / 'fixed_small-0').exists()


def test_a_sweep_is_refused_where_the_devices_of_its_runs_cannot_share_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, '_num_devices', lambda begin: 16)  # as there may be accelerators
    arguments = (config(), 'tests/small_run.py', tmp_path / 'sweep', sweep.POLICIES, [0])
    with pytest.raises(ConfigError, match='batch size 8 does not divide evenly over 16 devices'):
        sweep.run(*arguments)
    assert not (tmp_path / 'sweep').exists()


def test_devices_are_counted_as_the_runs_will_have_them(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '3')
    assert sweep._num_devices('print("of a config file")') == 3
    monkeypatch.setenv('JAX_PLATFORMS', 'nowhere')
    with pytest.raises(ConfigError, match='the devices of the runs could not be counted: .*nowhere'):
        sweep._num_devices('')


def test_a_sweep_is_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep.distributed, 'is_joined', lambda: True)
    with pytest.raises(ConfigError, match='--sweep: got several processes'):
        sweep.run(config(), 'tests/small_run.py', tmp_path, sweep.POLICIES, [0])


@pytest.fixture
def noticed():
    """SIGINT as at a terminal: a process that a script begins in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('noticed')
@pytest.mark.parametrize('number, ends', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize('status', [0, 2, 3, None])
def test_a_signal_to_a_sweep_alone_goes_to_its_run_and_begins_no_other(
    tmp_path, monkeypatch, number, ends, status
):
    """Whether the run ends by it (None) or just then with a status of its own."""
    code = f'os.kill(os.getppid(), {number:d}); time.sleep(10)'
    if status is None:
        code = f'signal.signal({number:d}, signal.SIG_DFL); {code}'
    else:
        code = f'signal.signal({number:d}, lambda *_: os._exit({status})); {code}'
    run = tmp_path / 'run'
    run.write_text(f'#!{sys.executable}\nimport os, signal, time\n{code}\n')
    run.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(run))
    monkeypatch.setattr(sweep, '_num_devices', lambda begin: 2)
    monkeypatch.setattr(sweep, '_PATIENCE_SECONDS', 0.1)
    before = signal.getsignal(number)
    found = sweep.run(config(), 'tests/small_run.py', tmp_path / 'sweep', sweep.POLICIES, [0], True)
    assert found == (2 if status == 2 else ends)  # what could not be saved is told
    assert len(list((tmp_path / 'sweep').glob('*.py'))) == 1
    assert signal.getsignal(number) is before


def test_a_config_file_that_adds_a_policy_can_be_swept(command_line, tmp_path):
    file = tmp_path / 'mine'  # whatever it is called
    file.write_text(
        'import types\nfrom adabatch_jax import models, policies, schedules\n'
        'def create(config, rate, clock):\n'
        '    sizes = enumerate([16, 8])\n'
        '    return policies.PlannedPolicy(tuple('
        'schedules.Transition(clock.examples(e), size, "mine") for e, size in sizes))\n'
        'policies.POLICIES["mine"] = types.SimpleNamespace(create=create, COUPLING="linear")\n'
        'def get_config():\n'
        '    from tests import small_run\n'
        '    config = small_run.get_config()\n'
        '    config.batch.policy = "mine"\n'
        '    models.MODELS["my_cnn"] = models.MODELS["cnn"]\n'  # or here, instead of above
        '    config.model.name = "my_cnn"\n'
        '    return config\n'
    )
    arguments = (f'--config={file}', f'--workdir={tmp_path / "sweep"}', '--sweep', '--quiet')
    done = command_line(*arguments, '--policies=fixed_small,adaptive')
    assert done.returncode == 0, done.stderr
    stages = {
        name: [
            r['batch_size']
            for r in metrics.read_records(tmp_path / 'sweep' / name)
            if r['kind'] == 'stage'
        ]
        for name in ('fixed_small-0', 'adaptive-0')
    }
    assert stages == {'fixed_small-0': [16], 'adaptive-0': [16, 8]}  # its first size, not base_size
