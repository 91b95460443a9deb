"""`deepmoe benchmark` as a script."""

import sys

from deepmoe_command import main

if __name__ == '__main__':
    main(['benchmark', *sys.argv[1:]])
