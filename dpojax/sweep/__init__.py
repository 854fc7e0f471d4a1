"""Many runs in one program: a grid of settings, trained at once by `jax.vmap`.

Runs that differ in their objective, its settings, the learning rate and the seed share
the frozen weights, those of a seed its batches too, and with adapters the reference's
forward pass; each has its own adapters, optimiser and statistics, stacked along axes of
their own. What each leaves is an ordinary run directory. `command` reads the settings,
and the loop in `wave` is that of `dpojax.run` for several states.
"""
