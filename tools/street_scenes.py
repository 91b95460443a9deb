"""`deepmoe street-scenes` as a script."""

import sys

from deepmoe_command import main

if __name__ == '__main__':
    main(['street-scenes', *sys.argv[1:]])
