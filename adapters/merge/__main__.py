"""`python -m adapters.merge` is `loraplex merge`."""

import sys

from adapters.merge.cli import main

sys.exit(main(sys.argv[1:]))
