"""Ready-made recipes, ``<model>-<target>-<precision>.yaml``: data files, no code."""
