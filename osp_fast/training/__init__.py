"""Training of the diffusion transformer: one step, the loop around it, and everything that must survive a kill.

`loop.py` reads from top to bottom like the training run itself. What a run needs before its first step:

- `build.py` makes the networks, `place.py` says where a run starts and ends, `output.py` looks at its folder,
  `resume.py` judges whether a checkpoint fits the settings, `cached.py` opens a latent cache that `precompute.py` made;
- `workload.py`, `footprint.py`, `dry_run.py`: what the flags ask of a GPU; `speed.py` plans activations, compiles and
  rehearses every bucket.

A step: `prepare.py` makes micro-batches on the device, ahead of time; `step.py` computes losses, gradients and the
update, `optimizer.py` and `ema.py` hold the state that changes; nothing of it waits for the GPU, and `records.py`
brings the step's numbers to the host. `checkpoint.py` knows what is on the disk, `manifest.py` what its files must be,
`saver.py` writes it in the background. `metrics.py`, `pace.py`, `observe.py`, `profile.py` tell what happens;
`guards.py`, `watchdog.py`, `hang_report.py` stop what must not go on.

Random states are not saved because there are none: every draw is named by its purpose and its place (`seeding.py`),
so the step, the epoch and the batch in a checkpoint say all there is to say. On a CPU, with the same settings and
numbers of threads and ranks, a run that was killed and resumed computes the same bits as one that was not; a GPU may
add up in another order. On another number of ranks the clips, their order and all that is drawn are the same, and sums
are rounded otherwise.
"""
