"""The first commands of the README, in full: as accurate as the control, in half of its updates."""

import pytest
from runs import of_kind


def test_the_quickstart_is_as_accurate_as_its_control_with_half_of_the_updates(
    command_line, monkeypatch, tmp_path
):
    monkeypatch.setenv('XLA_FLAGS', '')  # the code that users have
    final = {}
    for policy in ('adabatch', 'fixed'):
        directory = tmp_path / policy
        config = ('--config=configs/quickstart.py', f'--config.batch.policy={policy}')
        result = command_line(*config, f'--workdir={directory}', '--quiet', devices=1)
        assert result.returncode == 0, result.stderr
        final[policy] = of_kind(directory, 'summary')[-1]
    assert [summary['updates'] for summary in final.values()] == [1348, 2874]
    ours, controls = (summary['final_accuracy'] for summary in final.values())
    assert min(ours, controls) >= 0.97 and ours == pytest.approx(controls, abs=0.01)
