"""The runtimes that decode, each in a module with a class ``Engine``; loop.py says what that is."""
