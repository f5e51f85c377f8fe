"""Subcommands of ``tinygptq``, a module for each family. A module has ``register(command)``: it calls
``command(name, run, about)`` for each of its subcommands, which returns the argparse parser to add arguments to. Anything
slow to import is imported inside ``run``.
"""
