"""`deepmoe flops` as a script."""

import sys

from deepmoe_command import main

if __name__ == '__main__':
    main(['flops', *sys.argv[1:]])
