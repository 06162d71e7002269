"""`python -m kvrelay_cli` is `kvrelay`."""

import sys

from kvrelay_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
