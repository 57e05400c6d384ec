"""adabatch_jax: image classifiers trained with batch sizes that change during training.

A run is a sequence of stages; each stage has one global batch size, one compiled train step and a
learning rate coupled to it (AdaBatch: Devarakonda, Naumov and Garland, 2017).

Start with ``python -m adabatch_jax.main --config=configs/quickstart.py --workdir=runs/quickstart``,
or import the parts: ``schedules`` (clock, plan, coupling), ``train_state``, ``steps``, ``models``.
"""

__version__ = '0.1.0'
