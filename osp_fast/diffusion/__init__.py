"""The mathematics of diffusion: what a model is trained to predict, and how its predictions become a clean latent.

`schedule.py` holds the noise schedule, the targets and the loss weights; `denoise.py` the samplers and guidance.
"""
