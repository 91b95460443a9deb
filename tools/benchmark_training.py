"""`deepmoe benchmark-training` as a script."""

import sys

from deepmoe_command import main

if __name__ == '__main__':
    main(['benchmark-training', *sys.argv[1:]])
