# SPDX-License-Identifier: Apache-2.0
"""`python -m flashcore`: the same as the command `flashcore`."""

import sys

from flashcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
