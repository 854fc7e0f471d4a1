"""TRL's recipes as settings of dpojax; every key has an outcome, none is dropped.

Reads YAML and knows `dpojax.config`; it loads no model and no data, and never TRL.
"""
