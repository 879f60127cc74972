"""Training of the diffusion transformer: one step, the loop around it, and everything that must survive a kill.

`loop.py` reads from top to bottom like the training run itself. Beneath it: `build.py` makes the networks,
`step.py` computes the loss of a batch, `optimizer.py` and `ema.py` hold the state that changes, `checkpoint.py` writes
and reads it, `resume.py` judges whether a checkpoint fits the settings, `metrics.py` tells what happens, `place.py`
says where a run starts and ends, and `guards.py` stops what must not go on.

Random states are not saved because there are none: every draw is named by its purpose and its place (`seeding.py`),
so the step, the epoch and the batch in a checkpoint say all there is to say. On a CPU, with the same settings and
number of threads, a run that was killed and resumed computes the same bits as one that was not; a GPU may add up in
another order.
"""
