"""The sub-commands of `deepmoe`, one module each with a function `main`, and what they share."""
