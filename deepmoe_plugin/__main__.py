"""`python -m deepmoe_plugin` is the command `deepmoe`; torchrun starts it so as well."""

from deepmoe_command import main

if __name__ == '__main__':
    main()
