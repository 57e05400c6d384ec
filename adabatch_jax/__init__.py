"""adabatch_jax: image classifiers trained with batch sizes that change during training.

A run is a sequence of stages; each stage has one global batch size, one compiled train step and a
learning rate coupled to it (AdaBatch: Devarakonda, Naumov and Garland, 2017).

Start with ``python -m adabatch_jax.main --config=configs/quickstart.py --workdir=runs/quickstart``,
or import the parts:

- ``schedules``: clock, stages, plan and the coupling of learning rate and batch size
- ``policies``: what decides the batch size
- ``models``, ``optimizers``, ``input_pipeline``: networks, optax chains and data by name
- ``train_state``, ``checkpoint``: the state of a run, restored and saved
- ``steps``, ``gradient_statistics``, ``line_search``: the compiled train step and what it can measure
- ``variance_reduction``, ``losses``: SVRG and SAGA, and what they minimise
- ``distributed``: devices and processes
- ``config``, ``experiment``, ``train``: a whole run from a config
- ``comparison``, ``report``, ``figures``: runs read back, compared and drawn
- ``analysis``, ``curvature``, ``sharpness``: the minima that runs find
- ``benchmark``, ``scaling``: how fast steps are, and how runs scale with devices
"""

__version__ = '0.1.0'
