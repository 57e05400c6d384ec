"""One of several processes that train the same runs.

    layout_child.py OUT PORT NUM_PROCESSES PROCESS_ID RUN...

Each leaves in ``OUT`` what it took part in: the positions and batch sizes of the updates, the examples
that its devices had in each, and the evaluations. Policies are shown made-up times, other ones in each
process, since real ones depend on what else the machine does.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from adabatch_jax import checkpoint, distributed, experiment, run, steps, stream, train
from adabatch_jax.config import default_config
from adabatch_jax.distributed import processes

BASIS = {
    'num_epochs': 2.0,
    'log_every_steps': 4,
    'checkpoint_every_epochs': 0.5,
    'model.name': 'cnn',
    'dataset.name': 'synthetic',
    'dataset.num_examples': 90,  # no batch size divides it, and evaluation ends with a partial batch
    'dataset.image_size': 8,
    'dataset.crop_padding': 1,
    'dataset.eval_batch_size': 32,
    'dataset.pipeline': 'device',
    'batch.base_size': 8,
    'batch.growth_epochs': 0.7,  # transitions lie inside epochs
    'learning_rate.effective': 0.02,
    'learning_rate.reference_batch_size': 8,
}
STATISTICAL = {
    'batch.growth_epochs': 1.0,
    'batch.max_size': 64,
    'batch.statistics.decision_epochs': 0.2,
    'batch.statistics.decay': 0.5,
    'model.batch_norm': 'ghost:2',
}
RUNS = {
    'accumulated': {'model.batch_norm': 'sync', 'batch.max_per_device': 2},
    'local': {'model.batch_norm': 'local', 'dataset.remainder': 'drop'},
    'in parts': {
        'model.batch_norm': 'ghost:2',
        'batch.max_per_device': 4,
        'dataset.pipeline': 'tf_data',
    },
    'svrg': {
        'model.batch_norm': 'ghost:2',
        'optimizer.name': 'svrg',
        'optimizer.svrg.snapshot_passes': 1.2,
        'optimizer.svrg.first_size': 16,
        'optimizer.svrg.mixed': True,
        'optimizer.svrg.skip_zeros': True,
        'learning_rate.effective': 0.002,
    },
    'noise scale': STATISTICAL | {'batch.policy': 'noise_scale'},
    'goodput': STATISTICAL | {'batch.policy': 'goodput'},
    'probes': STATISTICAL
    | {
        'batch.policy': 'critical_batch',
        'batch.max_size': 16,
        'batch.critical_batch.every_epochs': 0.5,
        'batch.critical_batch.probe_epochs': 0.4,
    },
}
SHARED = (
    np.array([-0.0, 0.0, np.nan, np.inf, 1e-45], np.float32),
    np.array(2**32 - 1, np.uint32),
    np.array([[True], [False]]),
)


def main(out, port, num_processes, process_id, names):
    distributed.join(f'localhost:{port}', num_processes, process_id)
    processes._BLOCK = 7  # messages are removed from the store again and again
    shared = distributed.share([x if distributed.is_first() else np.zeros_like(x) for x in SHARED])
    np.savez(pathlib.Path(out, f'shared-{process_id}.npz'), *shared)
    extremes = [processes.smallest(process_id), processes.largest(process_id)]
    pathlib.Path(out, f'extremes-{process_id}.json').write_text(json.dumps(extremes))
    experiment.PART_BYTES = 4 * 8 * 8 * 3  # a microbatch of four images is a part of a batch
    taken, evaluated = [], []
    update, evaluate, take_in = stream.Stream.update, run.evaluate, run.Run.take_in

    def updating(self, state, batch, updates, rates):
        examples = None
        if isinstance(batch, dict) and 'example' in batch:
            shards = sorted(batch['example'].addressable_shards, key=lambda shard: shard.index[0].start)
            examples = np.concatenate([np.ravel(shard.data) for shard in shards]).tolist()
        taken.extend((u.start, u.batch_size, examples) for u in updates)
        return update(self, state, batch, updates, rates)

    def evaluating(*args):
        evaluated.append(evaluate(*args))
        return evaluated[-1]

    def taking_in(self, update, sums, seconds):
        take_in(self, update, sums, (1 + process_id) * (0.01 + 1e-6 * update.batch_size))

    run.Run.take_in = taking_in
    steps.StepCache.is_compiling = False  # which makes times count for nothing
    # Batches come as iterators of parts, or as dictionaries.
    stream.Stream.update, run.evaluate = updating, evaluating
    for name in names:
        config = default_config()
        config.update_from_flattened_dict(BASIS | RUNS[name])
        workdir = pathlib.Path(out, name)
        summary = train.train(config, workdir)
        result = {'updates': taken, 'evaluations': evaluated, 'digest': summary['params_digest']}
        pathlib.Path(out, f'{name}-{process_id}.json').write_text(json.dumps(result))
        taken.clear()
        evaluated.clear()
    if distributed.is_first():
        for name in names:
            state, _ = checkpoint.restore(pathlib.Path(out, name, checkpoint.FOLDER))
            leaves = jax.tree.leaves({key: state[key] for key in ('params', 'batch_stats')})
            np.savez(pathlib.Path(out, f'{name}.npz'), *leaves)


if __name__ == '__main__':
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5:])
