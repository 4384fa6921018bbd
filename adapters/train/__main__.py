"""`python -m adapters.train`: the command line of cli.py."""

import sys

from adapters.train.cli import main

sys.exit(main(sys.argv[1:]))
