"""`python -m fixpass`: see `fixpass.cli`."""

import sys

from fixpass.cli import main

if __name__ == "__main__":
    sys.exit(main())
