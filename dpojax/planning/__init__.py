"""What a run would take on machines that are not there: the plan command.

`hlo`, `scalars`, `products`, `collectives`, `traffic` and `walk` read a compiled
program; `chips` and `roofline` know hardware; `shapes`, `rows` and `step` make the very
step of a configuration and compile it for `slices`; `analytic` counts by hand, for
GPUs and to check; `figures`, `search` and `command` join them.
"""
