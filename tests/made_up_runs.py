"""Made-up runs: the files of a work directory, for what reads them."""

import json

N = 100  # examples of an epoch


def write_run(
    folder, policy='fixed', seed=0, sizes=(10, 10), accuracy=0.9, seconds=10.0, finished=True, **config
):
    """The files of a made-up run of one epoch for each of ``sizes``, linear in everything."""
    folder.mkdir(parents=True)
    batch = {'policy': policy, 'base_size': sizes[0], **config}
    (folder / 'config.json').write_text(json.dumps({'seed': seed, 'batch': batch}))
    records, step = [], 0
    common = {'kind': 'session', 'step': 0, 'epoch': 0.0, 'examples_seen': 0, 'time': 0.0}
    records.append(common | {'reason': 'begins'})
    for stage, size in enumerate(sizes):
        if not stage or size != sizes[stage - 1]:
            described = {
                'kind': 'stage',
                'stage': stage,
                'batch_size': size,
                'learning_rate': 0.1 * size,
            }
            times = {
                'compile_seconds': 1.5,
                'stall_seconds': 0.25,
                'cache_hit': stage > 0,
                'reason': 'why',
            }
            split = {'microbatch_size': size, 'num_microbatches': 1}
            now = {'step': step, 'epoch': float(stage), 'time': seconds * stage}
            records.append(common | now | described | times | split)
        step += N // size
        now = {'step': step, 'epoch': stage + 1.0, 'examples_seen': N * (stage + 1)}
        now |= {'time': seconds * (stage + 1)}
        fields = {'stage': stage, 'batch_size': size, 'learning_rate': 0.1 * size}
        fields |= {'loss': 2.0 - stage, 'accuracy': 0.5, 'examples_per_second': N / seconds}
        noise = {'gradient_variance': 30.0, 'squared_gradient': 2.0 if stage else -1.0}
        records.append(common | now | {'kind': 'train'} | fields | noise)
        at = accuracy * (stage + 1) / len(sizes)
        evaluated = {'split': 'test', 'loss': 1.0 - at, 'accuracy': at, 'num_examples': 50}
        records.append(common | now | {'kind': 'eval'} | evaluated)
    if finished:
        end = {'updates': step, 'wall_seconds': 1.5 * seconds * len(sizes), 'final_accuracy': accuracy}
        end |= {'train_seconds': seconds * len(sizes), 'best_accuracy': accuracy, 'compile_seconds': 3.0}
        records.append(common | now | {'kind': 'summary'} | end)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    return folder


def control_and_adaptive(folder):
    """Two seeds of a control, three of an adaptive run."""
    found = [
        write_run(folder / f'fixed-{seed}', seed=seed, accuracy=0.9 + 0.02 * seed) for seed in (0, 1)
    ]
    return found + [
        write_run(
            *(folder / f'adabatch-{seed}', 'adabatch', seed, (10, 50)),
            accuracy=0.9 + 0.01 * seed,
            seconds=5.0 + seed,
        )
        for seed in (0, 1, 2)
    ]


def analyzed(folder, step, sharpness, optimum=None):
    """Adds an analysis of a checkpoint to a made-up run."""
    record = {
        'kind': 'analysis',
        'step': step,
        'num_examples': 40,
        'loss': 0.25,
        'gradient_norm': 0.5,
        'sharpness': [{'epsilon': 1e-3, 'dimensions': 7000, 'value': sharpness}],
        'hessian_eigenvalues': [2 * sharpness, 1.0],
        'hessian_trace': 9.0,
    }
    with open(folder / 'analysis.jsonl', 'a') as file:
        file.write(json.dumps(record | ({'optimum': optimum} if optimum is not None else {})) + '\n')
