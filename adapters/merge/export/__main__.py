"""python -m adapters.merge.export"""

import sys

from adapters.merge.export.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
