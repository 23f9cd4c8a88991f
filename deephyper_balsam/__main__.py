"""`python -m deephyper_balsam` is the command `deephyper-balsam`."""

from deephyper_balsam.cli import main

main(prog_name="deephyper-balsam")
